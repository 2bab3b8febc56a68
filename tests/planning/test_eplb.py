"""The replacement for DeepSeek's EPLB: its three results mean the same and are no worse than the published ones.

Shapes: L layers, E experts, P slots, R the largest number of replicas of an expert, B groups, N nodes, M GPUs.
"""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from distplb import DistplbError, Placement, Topology, imbalance, plan, rebalance_experts

# The example in the published program's README (github.com/deepseek-ai/EPLB), and the placement printed there.
WEIGHT = [
    [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
    [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
]
PUBLISHED = [
    [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
    [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
]
# (E, P, B, N, M)
SHAPES = [
    (12, 16, 4, 2, 8),
    (8, 8, 1, 1, 4),
    (8, 8, 8, 8, 8),  # one slot per GPU
    (16, 24, 4, 2, 4),
    (16, 16, 8, 4, 8),
    (6, 30, 2, 2, 6),
    (5, 9, 1, 1, 3),
    (9, 12, 3, 2, 4),  # groups that the nodes cannot share
    (32, 48, 8, 4, 16),
]


def uneven_weight(seed: int, num_experts: int) -> Tensor:
    """`[L, E]` int64: lognormal, equal, mostly zero, none, and one hot expert."""
    random_ = random.Random(f"{seed} {num_experts}")
    rows = [[int(random_.lognormvariate(5, 1.2)) for _ in range(num_experts)] for _ in range(6)]
    rows += [[7] * num_experts, [0] * num_experts, [random_.choice([0, 0, 5]) for _ in range(num_experts)]]
    return torch.tensor([*rows, [1000, *[3] * (num_experts - 1)]])


def check(results: tuple[Tensor, Tensor, Tensor], num_layers: int, num_experts: int, num_slots: int) -> None:
    """Check that the three results agree, in the published form."""
    phy2log, log2phy, logcnt = results
    assert {result.dtype for result in results} == {torch.int64}
    assert {result.device.type for result in results} == {"cpu"}
    assert phy2log.shape == (num_layers, num_slots)
    assert logcnt.shape == (num_layers, num_experts)
    assert log2phy.shape == (num_layers, num_experts, int(logcnt.max()))
    for layer in range(num_layers):
        experts = phy2log[layer].tolist()
        for expert in range(num_experts):
            slots = [slot for slot, held in enumerate(experts) if held == expert]
            assert logcnt[layer, expert] == len(slots) >= 1
            assert log2phy[layer, expert].tolist() == slots + [-1] * (log2phy.shape[2] - len(slots))


def groups_are_whole(phy2log: Tensor, num_experts: int, groups: int, nodes: int) -> bool:
    """Whether each group of experts is on one node, and all nodes have equally many."""
    of_node = (phy2log * groups // num_experts).unflatten(1, (nodes, -1)).tolist()
    return all(
        sum(len(set(node)) for node in layer) == groups and len(set(layer[0])) == groups // nodes for layer in of_node
    )


def test_the_published_example_is_solved_at_least_as_evenly() -> None:
    weight, topology = torch.tensor(WEIGHT), Topology(2, 4)
    phy2log, log2phy, logcnt = rebalance_experts(weight, num_replicas=16, num_groups=4, num_nodes=2, num_gpus=8)
    check((phy2log, log2phy, logcnt), 2, 12, 16)
    assert groups_are_whole(phy2log, 12, 4, 2)
    assert groups_are_whole(torch.tensor(PUBLISHED), 12, 4, 2)
    ours, published = (
        imbalance(weight, Placement(torch.as_tensor(table), 12, topology.num_gpus))[0] for table in (phy2log, PUBLISHED)
    )
    assert (ours <= published * (1 + 1e-9)).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_the_three_results_say_the_same(shape: tuple[int, ...]) -> None:
    num_experts, num_slots, groups, nodes, gpus = shape
    weight = uneven_weight(0, num_experts)
    results = rebalance_experts(weight, num_slots, groups, nodes, gpus)
    check(results, len(weight), num_experts, num_slots)
    assert groups % nodes or groups_are_whole(results[0], num_experts, groups, nodes)


@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_the_plan_of_one_candidate(shape: tuple[int, ...]) -> None:
    num_experts, num_slots, groups, nodes, gpus = shape
    weight = uneven_weight(1, num_experts)
    planned = plan(
        weight,
        Topology(nodes, gpus // nodes),
        num_slots=num_slots,
        num_groups=groups if groups % nodes == 0 else None,
    )
    phy2log, log2phy, logcnt = rebalance_experts(weight, num_slots, groups, nodes, gpus)
    assert torch.equal(phy2log, planned.expert_of_slot)
    assert torch.equal(log2phy, planned.inverse)
    assert torch.equal(logcnt, planned.replicas)


def test_groups_that_the_nodes_cannot_share_are_disregarded_with_the_nodes() -> None:
    weight = uneven_weight(2, 12)
    for one, other in zip(rebalance_experts(weight, 16, 3, 2, 4), rebalance_experts(weight, 16, 1, 1, 4), strict=True):
        assert torch.equal(one, other)
    assert not groups_are_whole(rebalance_experts(weight, 16, 3, 2, 4)[0], 12, 6, 2)


def test_names_of_arguments_are_the_published_ones() -> None:
    by_name = rebalance_experts(weight=torch.tensor(WEIGHT), num_replicas=16, num_groups=4, num_nodes=2, num_gpus=8)
    for one, other in zip(by_name, rebalance_experts(torch.tensor(WEIGHT), 16, 4, 2, 8), strict=True):
        assert torch.equal(one, other)


# --- weights of any kind ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int32, torch.float16, torch.bfloat16])
def test_whole_numbers_of_any_type_are_placed_alike(dtype: torch.dtype) -> None:
    weight = torch.tensor(WEIGHT)  # integers up to 256 are exact in all of these types
    for one, other in zip(
        rebalance_experts(weight.to(dtype), 16, 4, 2, 8), rebalance_experts(weight, 16, 4, 2, 8), strict=True
    ):
        assert torch.equal(one, other)


@pytest.mark.parametrize("scale", [1e-3, 1e-30, 1e-300, 1e30, 1e290])
def test_only_the_proportions_of_fractions_count(scale: float) -> None:
    """Also of tiny ones, which would be 0 tokens."""
    weight = uneven_weight(3, 16).double() / 7
    expected = Placement(rebalance_experts(weight, 24, 4, 2, 4)[0], 16, 4)
    scaled = Placement(rebalance_experts(weight * scale, 24, 4, 2, 4)[0], 16, 4)
    # A scale that is not a power of two changes last digits, and with them the order of equals.
    load = uneven_weight(3, 16)
    assert imbalance(load, scaled)[0] == pytest.approx(imbalance(load, expected)[0], rel=0.01, nan_ok=True)
    assert imbalance(load, scaled).nanmean() < 1.5
    for power in (2.0**-900, 2.0**700):
        for one, other in zip(
            rebalance_experts(weight * power, 24, 4, 2, 4), rebalance_experts(weight, 24, 4, 2, 4), strict=True
        ):
            assert torch.equal(one, other)


def test_weights_stay_as_they_are_and_may_belong_to_a_graph() -> None:
    weight = torch.tensor(WEIGHT, dtype=torch.float32, requires_grad=True)
    before = weight.detach().clone()
    results = rebalance_experts(weight, 16, 4, 2, 8)
    assert torch.equal(weight, before)
    assert not any(result.requires_grad for result in results)


def test_lists_are_taken_for_tensors() -> None:
    assert torch.equal(
        rebalance_experts(WEIGHT, 16, 4, 2, 8)[0], rebalance_experts(torch.tensor(WEIGHT), 16, 4, 2, 8)[0]
    )


def test_large_counts_are_placed_as_small_ones() -> None:
    weight = torch.tensor(WEIGHT)
    assert torch.equal(rebalance_experts(weight << 50, 16, 4, 2, 8)[0], rebalance_experts(weight, 16, 4, 2, 8)[0])


# --- refusals ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weight", "wording"),
    [
        (
            torch.tensor([[1.0, float("nan"), 1, 1]]),
            "weight has nan for expert 1 of layer 0 (1 such value); counts must be finite",
        ),
        (
            torch.tensor([[1.0, 1, float("inf"), 1]]),
            "weight has inf for expert 2 of layer 0 (1 such value); counts must be finite",
        ),
        (
            torch.tensor([[1.0, 1, 1, -2]]),
            "weight has -2.0 for expert 3 of layer 0 (1 such value); counts must be non-negative",
        ),
        (torch.ones(4), "weight has shape (4,); pass numbers of shape [layers, experts], with no empty dim"),
        (torch.ones(1, 1, 4), "weight has shape (1, 1, 4); pass numbers of shape [layers, experts]"),
        (torch.ones(0, 4), "weight has shape (0, 4); pass numbers of shape [layers, experts], with no empty dim"),
        (torch.full((1, 4), 2**61), "weight has a row whose total is 9.22e+18, too large to add up; divide"),
    ],
)
def test_weights_that_are_none_are_refused(weight: Tensor, wording: str) -> None:
    with pytest.raises(DistplbError) as refused:
        rebalance_experts(weight, 6, 1, 1, 2)
    assert wording in str(refused.value)


@pytest.mark.parametrize(
    ("numbers", "wording"),
    [
        (
            (5, 1, 1, 2),
            "5 slots cannot be spread evenly over 2 GPUs (1 node × 2); pass num_slots=6 (2 for replicas), or",
        ),
        (
            (2, 1, 1, 2),
            "num_slots is 2 for 4 experts; it counts the slots of all GPUs, and every expert needs one: "
            "pass num_slots=6 (2 for replicas), or num_slots=4 (2 on each of 2 GPUs)",
        ),
        ((6, 3, 1, 2), "num_groups is 3, which does not divide 4 experts; pass the router's number of groups"),
        ((6, 0, 1, 2), "num_groups is 0, which does not divide 4 experts; pass the router's number of groups"),
        ((6, 1, 2, 3), "3 GPUs cannot be spread evenly over 2 nodes"),
        ((6, 1, 0, 2), "2 GPUs cannot be spread evenly over 0 nodes"),
        ((6, 1, 1, 0), "0 GPUs cannot be spread evenly over 1 node"),
    ],
)
def test_numbers_that_do_not_divide_are_refused(numbers: tuple[int, ...], wording: str) -> None:
    with pytest.raises(DistplbError) as refused:
        rebalance_experts(torch.ones(1, 4), *numbers)
    assert wording in str(refused.value)
