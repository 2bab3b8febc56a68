"""The exact search: it finds replicas wherever there are some, and proves it where there are none.

Shapes: E experts, M GPUs, R replica slots on each GPU.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import numpy as np
import pytest
from splits import best_of_all

from distplb.splitting import exact, reference
from distplb.splitting.exact import Within, lowest_level, replicas_within
from distplb.splitting.rules import Rules


class Step(NamedTuple):
    """The tokens of each expert, their homes, the node of each GPU, and R."""

    tokens: Any
    home: Any
    node: Any
    slots: int

    @property
    def mean(self) -> int:
        """Tokens of the mean GPU, rounded up."""
        return -(-int(self.tokens.sum()) // len(self.node))

    @property
    def busiest(self) -> int:
        """Tokens of the busiest GPU without replicas."""
        return int(self.loads().max())

    @property
    def optimum(self) -> int:
        """The lowest level of all splits."""
        return max(self.lowest_of_node(number) for number in np.unique(self.node))

    def lowest_of_node(self, number: int) -> int:
        gpus = (self.node == number).nonzero()[0]
        here = np.isin(self.home, gpus)
        home = np.searchsorted(gpus, self.home[here])
        return min(best_of_all(self.tokens[here], home, len(gpus), self.slots).values())

    def loads(self, expert: Any = None, part: Any = None) -> Any:
        """`[M]`, with replicas."""
        load = np.zeros(len(self.node), np.int64)
        np.add.at(load, self.home, self.tokens)
        if expert is not None:
            gpu, slot = (expert >= 0).nonzero()
            np.add.at(load, gpu, part[gpu, slot])
            np.subtract.at(load, self.home[expert[gpu, slot]], part[gpu, slot])
        return load


def step(tokens: Any, home: Any, num_gpus: int, slots: int, node: Any = None) -> Step:
    node = np.zeros(num_gpus, np.int64) if node is None else np.array(node)
    return Step(np.array(tokens, np.int64), np.array(home, np.int64), node, slots)


def crowded(seed: int) -> Step:
    """2 to 4 GPUs, 4 to 8 experts, most on few GPUs and in any order; even, skewed and tied tokens, and zeros."""
    random = np.random.default_rng(seed)
    num_gpus = int(random.integers(2, 5))
    num_experts = int(random.integers(4, 7 if num_gpus == 4 else 9))
    slots = 1 if num_gpus == 4 else int(random.integers(0, 3))
    kinds = (
        random.integers(1, 13, num_experts),
        random.lognormal(3, 1, num_experts),
        random.choice([0, 6, 8, 10, 30], num_experts),
        random.integers(20, 30, num_experts),
    )
    home = np.minimum(random.integers(0, num_gpus, num_experts), random.integers(0, num_gpus, num_experts))
    return step(kinds[seed % 4], home, num_gpus, slots)


def engine(one: Step, level: int) -> tuple[Any, Any]:
    """What the engines find for the level."""
    return reference.replicas(one.tokens, one.home, one.node, Rules(one.slots, level))


def check(one: Step, found: Within, level: int) -> None:
    """The replicas are legal, and no GPU exceeds the level with them."""
    assert found.is_proven
    assert found.replicas is not None
    expert, part = found.replicas
    assert expert.shape == part.shape == (len(one.node), one.slots)
    assert expert.dtype == part.dtype == np.int64
    assert ((expert >= 0) == (part > 0)).all()
    assert ((expert == -1) == (part == 0)).all()
    gpu, slot = (expert >= 0).nonzero()
    lent = expert[gpu, slot]
    assert (one.home[lent] != gpu).all()
    assert (one.node[one.home[lent]] == one.node[gpu]).all()
    assert len(set(zip(lent.tolist(), gpu.tolist(), strict=True))) == len(lent)
    given = np.zeros(len(one.tokens), np.int64)
    np.add.at(given, lent, part[gpu, slot])
    assert (given <= one.tokens).all()
    load = one.loads(expert, part)
    assert load.sum() == one.tokens.sum()
    assert load.max(initial=0) <= level


def check_at_optimum(one: Step, optimum: int) -> None:
    """At the optimum there are replicas; one token lower, provably none; and bisection finds it."""
    check(one, replicas_within(*one, level=optimum), optimum)
    assert replicas_within(*one, level=optimum - 1) == Within(None, is_proven=True)
    assert lowest_level(*one, low=min(one.mean, optimum), high=one.busiest) == (optimum, True)


def test_it_is_the_best_of_all_splits() -> None:
    for seed in range(120):
        one = crowded(seed)
        if one.tokens.any():
            check_at_optimum(one, one.optimum)


# Seeds of `crowded` where the engines end above the optimum: 26 of the first 1,000, by up to 12 %.
MISSED = [3, 31, 130, 179, 181, 198, 244, 369]


def test_it_finds_what_the_engines_miss() -> None:
    missed = 0
    for seed in MISSED:
        one = crowded(seed)
        optimum = one.optimum
        check_at_optimum(one, optimum)
        missed += one.loads(*engine(one, optimum)).max() > optimum
    assert missed >= 4  # all 8 when this was written


@pytest.mark.parametrize("seed", [0, 7, 37, 66])
def test_it_finds_it_on_8_gpus_too(seed: int) -> None:
    """One slot a GPU, 32 experts of log-normal size: the engines end above the mean in 5 % of them."""
    random = np.random.default_rng(seed)
    one = step(random.lognormal(6, 1.0, 32), random.permutation(np.arange(32) % 8), 8, 1)
    assert one.loads(*engine(one, one.mean)).max() > one.mean
    check(one, replicas_within(*one, level=one.mean), one.mean)


def test_on_several_nodes_it_is_that_of_the_node_that_is_worst_off() -> None:
    """GPUs of a node do not stand side by side, and node numbers have gaps."""
    for seed in range(0, 60, 2):
        parts = [crowded(next_seed)._replace(slots=1) for next_seed in (seed, seed + 1)]
        node = np.concatenate([np.full(len(part.node), 3 * number) for number, part in enumerate(parts)])
        order = np.random.default_rng(seed).permutation(len(node))  # the new number of each GPU
        home = np.concatenate([parts[0].home, parts[1].home + len(parts[0].node)])
        tokens, mixed = np.concatenate([part.tokens for part in parts]), np.empty_like(node)
        mixed[order] = node
        one = step(tokens, order[home], len(node), 1, mixed)
        check_at_optimum(one, one.optimum)


SPECIAL = {
    "no tokens": (step([0, 0, 0], [0, 1, 2], 3, 1), 0),
    "one GPU": (step([5, 0, 7], [0, 0, 0], 1, 2), 12),
    "one expert": (step([10], [1], 3, 1), 4),
    "one expert a GPU": (step([100, 3, 2, 1], [0, 1, 2, 3], 4, 2), 27),
    "all tokens on one expert": (step([0, 0, 999, 0], [0, 1, 2, 3], 4, 1), 250),
    "no replica slots": (step([100, 3, 2, 1], [0, 1, 2, 3], 4, 0), 100),
    "more slots than experts": (step([100, 3, 2, 1], [0, 1, 2, 3], 4, 9), 27),
    "ties": (step([8] * 4 + [0] * 4, [0, 0, 1, 1, 2, 2, 3, 3], 4, 1), 8),
    "GPUs without experts": (step([9, 8, 7, 6], [3, 3, 1, 3], 4, 1), 8),
    "slots that cannot take enough": (step([10] * 8, [0] * 8, 4, 1), 50),
    "a GPU with some room has to give before it can take": (step([6, 6, 6, 6, 8], [0, 0, 0, 0, 1], 3, 1), 13),
    "an idle node": (step([9, 8, 0, 0], [0, 1, 2, 3], 4, 2, [0, 0, 1, 1]), 9),
    "nodes that take turns": (step([9, 8, 1, 0], [0, 1, 2, 3], 4, 1, [1, 0, 1, 0]), 5),
}


@pytest.mark.parametrize("name", SPECIAL)
def test_special_cases(name: str) -> None:
    one, optimum = SPECIAL[name]
    check_at_optimum(one, optimum)


def test_a_level_that_needs_no_replicas_has_none() -> None:
    one = crowded(0)
    found = replicas_within(*one, level=one.busiest)
    check(one, found, one.busiest)
    assert found.replicas is not None
    assert (found.replicas[0] == -1).all()


@pytest.mark.parametrize("scale", [1 << 20, 1 << 40])
def test_large_counts_are_exact_to_a_token(scale: int) -> None:
    """Floats of the search accept a few tokens too many; the integer flow and its cuts do not."""
    for seed in range(24):
        one = crowded(seed)
        if one.tokens.any():
            noise = np.random.default_rng(seed).integers(0, 9, len(one.tokens))
            one = one._replace(tokens=one.tokens * scale + noise)
            check_at_optimum(one, one.optimum)


def test_no_replica_is_left_that_the_level_does_not_need() -> None:
    """Two slots on each GPU, so that some stay empty: without any one of the replicas, no quotas keep the level."""
    for seed in range(0, 60, 3):
        one = crowded(seed)._replace(slots=2)
        found = replicas_within(*one, level=one.busiest * 3 // 4)
        if found.replicas is None:
            continue
        holders = [{gpu} for gpu in one.home.tolist()]
        gpu, slot = (found.replicas[0] >= 0).nonzero()
        replicas = list(zip(found.replicas[0][gpu, slot].tolist(), gpu.tolist(), strict=True))
        for expert, where in replicas:
            holders[expert].add(where)
        for expert, where in replicas:
            fewer = [held - {where} if other == expert else held for other, held in enumerate(holders)]
            assert lowest_with(one, fewer) > one.busiest * 3 // 4


def lowest_with(one: Step, holders: list[set[int]]) -> int:
    """The lowest level of all quotas of these holders (Hall's theorem)."""
    gpus = range(len(one.node))
    sets = [set(some) for size in gpus for some in itertools.combinations(gpus, size + 1)]
    tokens = list(zip(one.tokens.tolist(), holders, strict=True))
    return max(-(-sum(count for count, held in tokens if held <= some) // len(some)) for some in sets)


def test_equal_input_has_an_equal_answer() -> None:
    one = crowded(198)
    first, second = (replicas_within(*one, level=26).replicas for _ in range(2))
    assert first is not None
    assert second is not None
    assert np.array_equal(first, second)


# --- given up ---------------------------------------------------------------------------------------------------


def test_what_is_too_large_is_given_up() -> None:
    """65 GPUs × 65 experts that all have tokens have 4,160 pairs of an expert and a GPU that is not its home."""
    one = step(np.arange(65) + 1, np.arange(65), 65, 1)
    assert replicas_within(*one, level=33) == Within(None, is_proven=False)
    assert lowest_level(*one, low=33, high=65) == (65, False)


def test_what_needs_no_search_is_answered_at_any_size() -> None:
    one = step(np.arange(65) + 1, np.arange(65), 65, 1)
    check(one, replicas_within(*one, level=65), 65)
    assert replicas_within(*one, level=32) == Within(None, is_proven=True)  # below the mean


def test_without_effort_it_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact, "_EFFORT", 0)
    one = crowded(198)
    assert replicas_within(*one, level=26) == Within(None, is_proven=False)
    level, is_proven = lowest_level(*one, low=26, high=one.busiest)
    assert (level, is_proven) == (one.busiest, False)


def test_a_node_that_cannot_keep_the_level_is_proof_even_if_another_is_too_large() -> None:
    large = step(np.arange(65) + 1, np.arange(65), 65, 1)
    tokens, home = np.append(large.tokens, 500), np.append(large.home, 65)
    one = step(tokens, home, 66, 1, [0] * 65 + [1])
    assert replicas_within(*one, level=40) == Within(None, is_proven=True)
    assert lowest_level(*one, low=40, high=500) == (500, True)
