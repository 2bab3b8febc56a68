"""The planners of the benchmarks: variants of one algorithm agree, and their placements are valid.

Shapes: L layers, E experts, P slots, M GPUs, G = P / M slots on each.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from benchmark_modules import imported
from torch import Tensor

from distplb import DistplbError, Placement, Topology, imbalance
from distplb.planning.greedy import pack_numpy

baselines = imported("shared.baselines")

GREEDY = [baselines.greedy_loops, baselines.greedy_numpy]
# (nodes, GPUs per node, E, P, groups)
SHAPES = [
    (1, 1, 3, 3, None),
    (1, 4, 8, 8, None),
    (1, 4, 4, 4, None),  # one slot per GPU
    (2, 2, 12, 12, 4),
    (2, 4, 12, 16, 4),
    (2, 4, 12, 16, 2),  # one group per node
    (3, 1, 9, 9, 9),
    (2, 2, 8, 12, 3),  # 3 groups cannot be divided evenly over 2 nodes, and are ignored
    (1, 3, 5, 9, None),
    (1, 8, 16, 64, None),
    (4, 2, 32, 48, 8),
]
# The example in the documentation of the published program, and the placement printed there.
PUBLISHED_LOAD = [
    [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
    [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
]
PUBLISHED_PLACEMENT = [
    [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
    [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
]


def loads_of_every_kind(experts: int) -> Tensor:
    """Draw a load `[L, E]` with skewed, flat, tied and sparse layers, one with a hot expert, one without tokens."""
    random = np.random.default_rng(experts)
    hot = np.full(experts, 10)
    hot[random.integers(experts)] = 10_000
    rows = [
        *(random.lognormal(6, sigma, experts) for sigma in (0.3, 1.0, 2.0)),
        random.integers(0, 1000, experts),
        random.integers(0, 3, experts),
        random.integers(0, 2, experts) * random.integers(0, 50, experts),
        hot,
        np.zeros(experts),
    ]
    return torch.from_numpy(np.rint(rows).astype(np.int64))


def sharing(expert_of_slot: Tensor, num_gpus: int) -> bool:
    """Whether any GPU has two replicas of one expert."""
    inside = expert_of_slot.unflatten(1, (num_gpus, -1)).sort(-1).values
    return bool((inside[..., 1:] == inside[..., :-1]).any())


def check(table: Tensor, load: Tensor, topology: Topology, num_slots: int, groups: int | None) -> None:
    """Check that every expert has a slot, and that the experts of a group stay on one node."""
    assert table.dtype == torch.int64
    assert table.shape == (len(load), num_slots)
    Placement(table, load.shape[1], topology.num_gpus)
    if groups is not None and groups % topology.num_nodes == 0:
        of_node = (table * groups // load.shape[1]).unflatten(1, (topology.num_nodes, -1))
        for layer in of_node.tolist():
            assert sum(len(set(node)) for node in layer) == groups


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_greedy_variants_give_the_same_valid_placement(shape: tuple[int, ...], shared: bool) -> None:
    nodes, gpus, experts, slots, groups = shape
    topology, load = Topology(nodes, gpus), loads_of_every_kind(experts)
    tables = [plan(load, topology, slots, num_groups=groups, allow_shared_replicas=shared) for plan in GREEDY]
    for table in tables:
        check(table, load, topology, slots, groups)
        assert shared or not sharing(table, topology.num_gpus)
        assert torch.equal(table, tables[0])
        Placement(table, experts, topology.num_gpus)  # checks itself


@pytest.mark.parametrize("plan", GREEDY)
def test_greedy_is_the_published_one(plan: Callable[..., Tensor]) -> None:
    table = plan(torch.tensor(PUBLISHED_LOAD), Topology(2, 4), 16, num_groups=4)
    assert table.tolist() == PUBLISHED_PLACEMENT


@pytest.mark.parametrize("plan", GREEDY)
def test_greedy_by_hand(plan: Callable[..., Tensor]) -> None:
    # 9 | 6, then 9 | 6 + 5, 9 + 4 | 11 and 13 | 11 + 3; the second GPU is full: 13 + 1 | 14.
    assert plan(torch.tensor([[1, 9, 5, 3, 6, 4]]), Topology(1, 2), 6).tolist() == [[1, 5, 0, 4, 2, 3]]
    # Spare slots go to 8 = 4 + 4 and then, as 4 < 5, to 5 = 2.5 + 2.5.
    assert plan(torch.tensor([[8, 5, 1, 1]]), Topology(1, 2), 6).tolist() == [[0, 1, 2, 0, 1, 3]]


@pytest.mark.parametrize("plan", GREEDY)
def test_no_expert_has_more_replicas_than_gpus_where_they_may_not_share(plan: Callable[..., Tensor]) -> None:
    load = torch.tensor([[1000, 3, 2, 1]])
    assert (plan(load, Topology(1, 2), 8)[0] == 0).sum() == 5
    table = plan(load, Topology(1, 2), 8, allow_shared_replicas=False)
    assert table.view(2, 4).sort().values.tolist() == [[0, 1, 2, 3], [0, 1, 2, 3]]
    with pytest.raises(DistplbError, match="4 experts with at most 2 replicas each; pass fewer slots"):
        plan(load, Topology(1, 2), 10, allow_shared_replicas=False)


@pytest.mark.parametrize("pack", [baselines._pack_loops, pack_numpy])
def test_a_replica_without_a_gpu_takes_the_place_of_the_nearest(pack: Callable[..., Tensor]) -> None:
    # Only the pack that holds the first 7 is open to the second. It changes places with 8, the nearest load in the full
    # pack, or with 9 if the open pack also holds the expert of 8.
    load = torch.tensor([[100, 10, 9, 8, 7, 7]] * 2).double()
    kind = torch.tensor([[0, 1, 2, 3, 4, 4], [3, 1, 2, 3, 4, 4]])
    assert pack(load, kind, 2).tolist() == [[0, 4, 3, 1, 2, 5], [0, 4, 2, 1, 5, 3]]


@pytest.mark.parametrize("plan", GREEDY)
def test_an_exchange_is_made_without_tokens_too(plan: Callable[..., Tensor]) -> None:
    # Spare slots go to experts 0, 0, 1, 1. Only a GPU that holds expert 1 is open to its last replica; 3 makes room.
    table = plan(torch.zeros(1, 5, dtype=torch.int64), Topology(1, 3), 9, allow_shared_replicas=False)
    assert table.tolist() == [[0, 1, 2, 1, 4, 0, 0, 1, 3]]


def test_contiguous() -> None:
    assert baselines.contiguous(torch.ones(2, 4), Topology(1, 2), 4).tolist() == [[0, 1, 2, 3]] * 2
    assert baselines.contiguous(torch.ones(1, 4), Topology(1, 2), 6).tolist() == [[0, 0, 1, 2, 2, 3]]


def test_snake_by_hand() -> None:
    load = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8, 9]])
    assert baselines.snake(load, Topology(1, 3), 9).tolist() == [[8, 3, 2, 7, 4, 1, 6, 5, 0]]


@pytest.mark.parametrize("shape", SHAPES)
def test_contiguous_and_snake_are_valid(shape: tuple[int, ...]) -> None:
    nodes, gpus, experts, slots, groups = shape
    topology, load = Topology(nodes, gpus), loads_of_every_kind(experts)
    check(baselines.contiguous(load, topology, slots), load, topology, slots, groups)
    check(baselines.snake(load, topology, slots, num_groups=groups), load, topology, slots, groups)


def test_the_packing_core_as_a_planner() -> None:
    load, topology = loads_of_every_kind(16), Topology(1, 4)
    table = baselines.balanced_packing(load, topology, 4)
    check(table, load, topology, 16, None)
    searched = imbalance(load, Placement(table, 16, 4))
    greedy = imbalance(load, Placement(baselines.greedy_numpy(load, topology, 16), 16, 4))
    assert not (searched > greedy + 1e-12).any()  # both are NaN for a layer without tokens
