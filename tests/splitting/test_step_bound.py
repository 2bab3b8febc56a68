"""`step_bound`: never above what a split can reach, nearly always equal to it, and what it refuses.

Shapes: E experts, M GPUs, N nodes, R replica slots on each GPU.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from splits import best_of_all, power_law

from distplb import DistplbError, Topology
from distplb.splitting.bound import step_bound
from distplb.splitting.split import split


class Step(NamedTuple):
    """The tokens of each expert, their homes, and the replica slots of GPUs on one node."""

    tokens: Any
    home: Any
    num_gpus: int
    slots: int

    @property
    def counts(self) -> Any:
        """`[M, E]`: all tokens have the first GPU as their source."""
        return counts(self.tokens, self.num_gpus)

    @property
    def mean(self) -> int:
        """Tokens of the mean GPU, rounded up."""
        return -(-int(self.tokens.sum()) // self.num_gpus)

    @property
    def bound(self) -> int:
        """What is tested."""
        return step_bound(self.counts, self.home, topology=Topology(1, self.num_gpus), replica_slots=self.slots)


def counts(tokens: Any, num_gpus: int) -> Any:
    return np.vstack([tokens, np.zeros((num_gpus - 1, len(tokens)), np.int64)])


def crowded(seed: int) -> Step:
    """Most experts on few GPUs, so that slots are scarce; even, skewed and tied tokens, and zeros."""
    random = np.random.default_rng(seed)
    num_gpus, num_experts = int(random.integers(2, 5)), int(random.integers(4, 7))
    slots = 1 if num_gpus == 4 else int(random.integers(0, 3))
    kinds = (
        random.integers(1, 13, num_experts),
        random.lognormal(3, 1, num_experts).astype(np.int64),
        random.choice([0, 6, 8, 10, 30], num_experts),
        random.integers(20, 30, num_experts),
    )
    home = np.minimum(random.integers(0, num_gpus, num_experts), random.integers(0, num_gpus, num_experts))
    return Step(kinds[seed % 4], home, num_gpus, slots)


def test_it_is_never_above_the_best_of_all_splits_and_seldom_below() -> None:
    """Of 3,000 such cases it is the optimum in 99.3 %, where the mean is in 63 %; otherwise 12 % below at most."""
    number, equal, mean_alone = 300, 0, 0
    for seed in range(number):
        one = crowded(seed)
        best = min(best_of_all(one.tokens, one.home, one.num_gpus, one.slots).values())
        assert one.mean <= one.bound <= best <= 1.15 * one.bound, one
        equal += one.bound == best
        mean_alone += one.mean == best
    assert equal >= 0.98 * number
    assert mean_alone <= 0.7 * number


def test_on_several_nodes_it_is_that_of_the_node_that_is_worst_off() -> None:
    number, equal = 60, 0
    for seed in range(0, 3 * number, 3):
        one, other = (crowded(next_seed)._replace(num_gpus=3, slots=1) for next_seed in (seed, seed + 1))
        one, other = (node._replace(home=node.home % 3) for node in (one, other))
        tokens, home = np.concatenate([one.tokens, other.tokens]), np.concatenate([one.home, other.home + 3])
        found = step_bound(counts(tokens, 6), home, topology=Topology(2, 3), replica_slots=1)
        assert found == max(one.bound, other.bound)
        best = max(min(best_of_all(*node).values()) for node in (one, other))
        assert found <= best
        equal += found == best
    assert equal >= 0.9 * number


def test_without_replica_slots_it_is_the_busiest_gpu() -> None:
    for seed in range(50):
        one = crowded(seed)._replace(slots=0)
        assert one.bound == np.bincount(one.home, one.tokens).max()


def test_more_slots_never_raise_it_and_enough_of_them_leave_the_mean() -> None:
    for seed in range(100):
        bounds = [crowded(seed)._replace(slots=slots).bound for slots in (0, 1, 2, 3, 10**9)]
        assert bounds == sorted(bounds, reverse=True)
        assert bounds[-1] == crowded(seed).mean


# Each with what the conditions that come to mind first would say.
SCARCE = {
    "a GPU can take no more than its slots hold": (Step([10] * 8, [0] * 8, 4, 1), 50),  # the mean: 20
    "an expert of more tokens than the level fills several GPUs": (Step([50, 3, 3, 3, 3], [0] * 5, 4, 1), 16),
    "a few large experts are enough": (Step([30, 30, 1, 1, 1, 1], [0] * 6, 3, 1), 22),
    # Leaving out one piece of GPUs 0 and 1 together gives 12: but GPU 1 has room for 4 tokens at 12, and has to give
    # GPU 2 its own expert to take a piece of 6, and then GPU 0 keeps 18. Prices between 0 and 1 see this.
    "a GPU with some room has to give before it can take": (Step([6, 6, 6, 6, 8], [0, 0, 0, 0, 1], 3, 1), 13),
}


@pytest.mark.parametrize("name", SCARCE)
def test_scarce_slots_count(name: str) -> None:
    one, wanted = SCARCE[name]
    one = one._replace(tokens=np.array(one.tokens), home=np.array(one.home))
    assert one.bound == wanted
    assert min(best_of_all(*one).values()) == wanted


def test_no_split_of_a_large_step_is_below_it() -> None:
    """Homes in any order, up to 4 nodes of 8 GPUs; among them many with all experts on a few GPUs."""
    for seed in range(60):
        random = np.random.default_rng(seed)
        topology = Topology(int(random.integers(1, 5)), 8)
        tokens = random.lognormal(5, float(random.choice((0.3, 1, 2))), 64).astype(np.int64)
        home = random.integers(0, topology.num_gpus, 64) // int(random.choice((1, 1, 4)))
        options: dict[str, Any] = {"topology": topology, "replica_slots": int(random.integers(0, 4))}
        given = counts(tokens, topology.num_gpus)
        found = split(given, home, tolerance=0.0, engine="reference", **options)
        assert step_bound(given, home, **options) <= int(found.load.amax())


@pytest.mark.parametrize("imbalance", [1.1, 1.5, 2.0, 3.0])
@pytest.mark.parametrize("slots", [1, 2])
def test_on_power_laws_it_is_the_mean_which_a_split_reaches(imbalance: float, slots: int) -> None:
    one = Step(power_law(imbalance, 0), np.arange(256) // 4, 64, slots)
    found = split(one.counts, one.home, topology=Topology(1, 64), replica_slots=slots, tolerance=0.0)
    assert one.bound == one.mean == int(found.load.amax())


@pytest.mark.parametrize("scale", [1 << 20, 1 << 40])
def test_large_counts_are_exact_to_a_token(scale: int) -> None:
    for seed in range(30):
        one = crowded(seed)
        large = one._replace(tokens=one.tokens * scale)
        assert (one.bound - 1) * scale < large.bound <= one.bound * scale


def test_a_step_without_tokens_has_the_bound_0() -> None:
    assert step_bound([[0, 0], [0, 0]], [0, 1], topology=Topology(2, 1)) == 0


def test_counts_and_homes_of_any_kind_give_the_same() -> None:
    given, home = [[7.0, 1.0], [5.0, 0.0]], [0, 1]
    for kind in (list, np.array, torch.tensor):
        assert step_bound(kind(given), kind(home), topology=Topology(1, 2)) == 7


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "GPUs": ({"counts": [[1, 2]]}, "counts has shape [1, 2]; pass [GPUs, experts] with the topology's 2 GPUs"),
    "negative": ({"counts": [[1, 2], [-3, 4]]}, "counts has -3 for expert 0"),
    "homes": ({"home": [0]}, "home has shape [1]; pass the GPU of each of 2 experts"),
    "a home": ({"home": [0, 2]}, "home has GPUs 0 to 2; pass GPUs in [0, 2)"),
    "float homes": ({"home": [0.0, 1.0]}, "home is torch.float64 of shape (2,); pass the GPU of each expert"),
    "slots": ({"replica_slots": -1}, "replica_slots is -1; pass an integer of at least 0"),
    "no topology": ({"topology": (1, 2)}, "topology is a tuple; pass a Topology, such as Topology.from_env()"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_refused_with_what_to_pass(name: str) -> None:
    changed, text = WRONG[name]
    arguments: dict[str, Any] = {"counts": [[1, 2], [3, 4]], "home": [0, 1], "topology": Topology(1, 2)} | changed
    with pytest.raises(DistplbError) as refused:
        step_bound(arguments.pop("counts"), arguments.pop("home"), **arguments)
    assert text in str(refused.value)
