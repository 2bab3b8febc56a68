"""`max_tokens_per_gpu`: kept wherever some split keeps it, else refused with the smallest cap that one keeps."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from splits import best_of_all, power_law

from distplb import DistplbError, Split, TimeCurve, Topology, split, step_bound


def counts_of(tokens: Any, num_gpus: int) -> torch.Tensor:
    """`[M, E]`, all tokens at the first source."""
    counts = torch.zeros(num_gpus, len(tokens), dtype=torch.int64)
    counts[0] = torch.as_tensor(tokens)
    return counts


def smallest_cap(counts: torch.Tensor, home: Any, topology: Topology, **options: Any) -> int:
    """What the refusal of a cap of 1 token names."""
    text = r"max_tokens_per_gpu is 1, but with (no replicas|\d+ replica slots on each GPU) this step needs"
    with pytest.raises(DistplbError, match=text) as refused:
        split(counts, home, topology=topology, max_tokens_per_gpu=1, **options)
    found = re.search(r"needs (\d+)", str(refused.value))
    assert found is not None
    return int(found[1])


def test_every_cap_that_some_split_keeps_is_kept_and_every_other_one_refused() -> None:
    """Against all splits of small cases, at the optimum and one token below."""
    for seed in range(80):
        random = np.random.default_rng(seed)
        num_gpus = int(random.integers(2, 5))
        num_experts = int(random.integers(num_gpus, num_gpus + 3))
        tokens = random.lognormal(4, 1.2, num_experts).astype(np.int64) + 1
        home, slots = random.permutation(np.arange(num_experts) % num_gpus), int(random.integers(0, 2))
        best = min(best_of_all(tokens, home, num_gpus, slots).values())
        options = {"topology": Topology(1, num_gpus), "replica_slots": slots}
        counts = counts_of(tokens, num_gpus)
        assert smallest_cap(counts, home, **options) == best
        kept = split(counts, home, max_tokens_per_gpu=best, **options)
        assert int(kept.load.amax()) <= best
        with pytest.raises(DistplbError, match=f"needs {best};"):
            split(counts, home, max_tokens_per_gpu=best - 1, **options)


def test_the_exact_search_keeps_a_cap_that_the_engines_miss() -> None:
    """GPU 2 has to hand 7 of its 10 tokens to GPU 3, so that it can take 4 of GPU 1's."""
    counts, home = counts_of([7, 6, 10, 5], 4), [1, 1, 2, 1]
    options: dict[str, Any] = {"topology": Topology(1, 4), "replica_slots": 1}
    best = min(best_of_all(counts[0].numpy(), np.array(home), 4, 1).values())
    assert split(counts, home, tolerance=0.0, **options).load.amax() > best
    assert split(counts, home, max_tokens_per_gpu=best, **options).load.amax() == best
    with pytest.raises(DistplbError, match=f"needs {best}; pass at least that"):
        split(counts, home, max_tokens_per_gpu=best - 1, **options)


@pytest.mark.long
def test_ten_thousand_random_caps_are_kept_or_refused_for_good_reason() -> None:
    check_random_caps(range(10_000))


def test_random_caps_are_kept_or_refused_for_good_reason() -> None:
    check_random_caps(range(600))


def check_random_caps(seeds: range) -> None:
    """Several nodes, prices, tiles and smallest quotas, R = 0 to 4: the cap rules over all of them."""
    kept = refused = 0
    for seed in seeds:
        random = np.random.default_rng([7, seed])
        topology = Topology(int(random.integers(1, 4)), int(random.integers(1, 5)))
        num_gpus = topology.num_gpus
        num_experts = num_gpus * int(random.integers(1, 4))
        counts = random.lognormal(2, 1.5, (num_gpus, num_experts)).astype(np.int64)
        home = random.permutation(np.arange(num_experts) % num_gpus)
        inside = float(random.choice((0, 5, 50)))
        options: dict[str, Any] = {
            "replica_slots": int(random.integers(0, 5)),
            "push_price": (inside, inside * 3 if random.random() < 0.3 else math.inf),
            "min_quota": int(random.choice((1, 20))),
            "tile": int(random.choice((1, 8))),
        }
        if random.random() < 0.2:
            options["time_curve"] = TimeCurve((0, 16, 64), (0, 300, 500))
        where = topology if options["push_price"][1] == math.inf else Topology(1, num_gpus)
        bound = step_bound(counts, home, topology=where, replica_slots=options["replica_slots"])
        cap = max(1, int(bound * random.uniform(0.9, 1.3)))
        try:
            found = split(counts, home, topology=topology, max_tokens_per_gpu=cap, **options)
        except DistplbError as error:
            needs = int(re.search(r"needs (\d+)", str(error))[1])  # type: ignore[index]
            assert cap < needs
            refused += 1
            assert needs >= bound
            found = split(counts, home, topology=topology, max_tokens_per_gpu=needs, **options)
            assert int(found.load.amax()) == needs
        else:
            kept += 1
            assert int(found.load.amax()) <= cap
    assert min(kept, refused) > len(seeds) // 10


@pytest.mark.parametrize("slots", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("imbalance", [1.1, 3.0])
def test_on_large_steps_the_smallest_cap_is_near_the_bound_and_told(imbalance: float, slots: int) -> None:
    tokens, home, topology = power_law(imbalance, 0), np.arange(256) // 4, Topology(1, 64)
    options: dict[str, Any] = {"topology": topology, "replica_slots": slots}
    counts = counts_of(tokens, 64)
    with pytest.raises(DistplbError) as refused:
        split(counts, home, max_tokens_per_gpu=1, **options)
    needs = int(re.search(r"needs (\d+)", str(refused.value))[1])  # type: ignore[index]
    bound = step_bound(counts, home, **options)
    assert bound <= needs <= bound * 1.001
    if needs > bound:
        assert f"needs {needs} (found; no split needs fewer than {bound})" in str(refused.value)
    assert int(split(counts, home, max_tokens_per_gpu=needs, **options).load.amax()) <= needs


def test_a_cap_comes_before_prices_quotas_tiles_and_time() -> None:
    """Nothing pays here, and no replica fits a tile or is large enough; the cap is kept all the same."""
    counts, home = counts_of([30, 10, 10, 10], 4), [0, 1, 2, 3]
    options: dict[str, Any] = {"topology": Topology(1, 4), "push_price": (100.0, math.inf), "min_quota": 64, "tile": 64}
    assert split(counts, home, **options).is_trivial
    capped = split(counts, home, max_tokens_per_gpu=20, time_curve=TimeCurve((0, 64), (0, 1)), **options)
    assert sorted(capped.load.tolist()) == [10, 10, 20, 20]


def test_a_cap_that_the_split_keeps_anyway_changes_nothing() -> None:
    counts, home = counts_of([40, 10, 10, 20], 4), [0, 1, 2, 3]
    free = split(counts, home, topology=Topology(1, 4))
    capped = split(counts, home, topology=Topology(1, 4), max_tokens_per_gpu=int(free.load.amax()))
    assert isinstance(capped, Split)
    assert torch.equal(free.quota, capped.quota)


def test_a_cap_leaves_a_node_only_where_replicas_may() -> None:
    counts, home, nodes = counts_of([40, 30, 0, 0], 4), [0, 1, 2, 3], Topology(2, 2)
    assert smallest_cap(counts, home, nodes) == 35
    kept = split(counts, home, topology=nodes, push_price=(0.0, 1000.0), max_tokens_per_gpu=20)
    assert int(kept.load.amax()) <= 20
    assert smallest_cap(counts, home, nodes, push_price=(math.inf, math.inf)) == 40
