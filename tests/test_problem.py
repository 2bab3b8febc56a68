"""The planning problem: costs, build, polish, and the names under which most experts stay.

Shapes: T steps, L layers, E experts, P slots, M GPUs, G slots on each GPU, K candidates.
"""

from __future__ import annotations

import random
from itertools import permutations

import pytest
import torch
from torch import Tensor

from distplb import DistplbError, Placement, Topology, balanced_packing
from distplb.packing import reference
from distplb.planning.problem import Problem
from distplb.planning.relabel import relabelled

SIZES = [(8, 2), (12, 3), (16, 4), (20, 5), (6, 6), (4, 1)]  # (E, M)


def skewed(seed: int, *shape: int) -> Tensor:
    """Lognormal tokens of any shape."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).mul(1.2).exp().mul(300).long()


def random_placement(random_: random.Random, num_layers: int, num_experts: int, num_gpus: int) -> Placement:
    rows = [random_.sample(range(num_experts), num_experts) for _ in range(num_layers)]
    return Placement(torch.tensor(rows), num_experts, num_gpus)


def plain_costs(load: Tensor, placement: Placement) -> list[int]:
    """`[L]`: the fullest GPU's tokens, added up over the steps."""
    size = placement.slots_per_gpu
    return [
        sum(
            max(sum(step[layer][expert] for expert in row[at : at + size]) for at in range(0, len(row), size))
            for step in load.tolist()
        )
        for layer, row in enumerate(placement.expert_of_slot.tolist())
    ]


def gpu_groups(placement: Placement) -> list[set[frozenset[int]]]:
    """By layer, the sets of experts that share a GPU."""
    size = placement.slots_per_gpu
    return [
        {frozenset(row[at : at + size]) for at in range(0, len(row), size)} for row in placement.expert_of_slot.tolist()
    ]


def searched(problem: Problem, num_candidates: int) -> Placement:
    """Stages 2 to 4 on one rank."""
    return problem.polish(problem.build(problem.costs(torch.arange(num_candidates)).argmin(0)))


# --- without a current placement --------------------------------------------------------------------------------


@pytest.mark.parametrize("num_candidates", [1, 6])
@pytest.mark.parametrize(("num_experts", "num_gpus"), SIZES)
def test_one_step_is_planned_as_balanced_packing_packs_it(num_experts: int, num_gpus: int, num_candidates: int) -> None:
    load = skewed(num_experts, 1, 30, num_experts)
    load[:, -1] <<= 35  # a layer of more than 2^40 tokens
    placement = searched(Problem(load, Topology(1, num_gpus)), num_candidates)
    pack_index, rank_in_pack = balanced_packing(load[0], num_gpus, num_candidates)
    slot = pack_index * (num_experts // num_gpus) + rank_in_pack  # [L, E]
    assert torch.equal(placement.inverse[..., 0], slot)


def test_costs_add_up_the_fullest_gpu_of_every_step() -> None:
    load = skewed(1, 5, 4, 12)
    problem = Problem(load, Topology(1, 3))
    costs = problem.costs(torch.arange(6))
    assert costs.dtype == torch.int64
    assert costs.tolist() == [plain_costs(load, problem.build(torch.full((4,), k))) for k in range(6)]
    assert (costs[1:] != costs[0]).any()


def test_a_candidate_is_the_same_in_any_company() -> None:
    load = skewed(2, 3, 4, 16)
    problem = Problem(load, Topology(1, 4))
    together = problem.costs(torch.tensor([7, 0, 3, 2**22 - 1]))
    for row, candidate in enumerate([7, 0, 3, 2**22 - 1]):
        assert torch.equal(problem.costs(torch.tensor([candidate]))[0], together[row])
    mixed = problem.build(torch.tensor([7, 0, 3, 7])).expert_of_slot
    for layer, candidate in enumerate([7, 0, 3, 7]):
        alone = problem.build(torch.full((4,), candidate)).expert_of_slot
        assert torch.equal(mixed[layer], alone[layer])


def test_the_seed_changes_every_candidate_but_the_plain_one() -> None:
    load = skewed(3, 1, 40, 24)
    one, other = (Problem(load, Topology(1, 4), seed=seed) for seed in (0, 1))
    plain, noisy = torch.zeros(40, dtype=torch.int64), torch.ones(40, dtype=torch.int64)
    assert one.build(plain) == other.build(plain)
    assert one.build(noisy) != other.build(noisy)
    assert one.build(noisy) == Problem(load, Topology(1, 4), seed=0).build(noisy)


def test_polish_never_costs_more_than_what_it_was_given() -> None:
    """With several steps a pair swap that evens out their sum may cost more, and is then left."""
    random_, load = random.Random(4), skewed(4, 6, 60, 12)
    problem = Problem(load, Topology(1, 3))
    given = random_placement(random_, 60, 12, 3)
    polished = problem.polish(given)
    before, after = plain_costs(load, given), plain_costs(load, polished)
    assert all(a <= b for a, b in zip(after, before, strict=True))
    assert sum(after) < sum(before)
    finished = Placement(reference.finish(load.sum(0), given.expert_of_slot, 3), 12, 3)
    dearer = [a > b for a, b in zip(plain_costs(load, finished), before, strict=True)]
    assert any(dearer)
    for layer, was_dearer in enumerate(dearer):
        wanted = given if was_dearer else finished
        assert torch.equal(polished.expert_of_slot[layer], wanted.expert_of_slot[layer])


def test_nodes_times_gpus_is_all_that_the_search_needs_of_a_topology() -> None:
    load = skewed(5, 2, 3, 16)
    assert searched(Problem(load, Topology(2, 2)), 4) == searched(Problem(load, Topology(1, 4)), 4)


def test_the_load_is_not_written_to() -> None:
    load = skewed(6, 2, 3, 16)
    before = load.clone()
    searched(Problem(load, Topology(1, 4), current=Placement.contiguous(3, 16, 4)), 4)
    assert torch.equal(load, before)


# --- with a current placement -----------------------------------------------------------------------------------


@pytest.mark.parametrize("num_steps", [1, 4])
@pytest.mark.parametrize(("num_experts", "num_gpus"), SIZES)
def test_a_plan_never_costs_more_than_the_current_placement(num_experts: int, num_gpus: int, num_steps: int) -> None:
    random_ = random.Random(num_experts + num_steps)
    load = skewed(num_experts + 50, num_steps, 30, num_experts)
    current = random_placement(random_, 30, num_experts, num_gpus)
    for _ in range(3):  # the plan is the current placement of the next round
        plan = searched(Problem(load, Topology(1, num_gpus), current=current), 3)
        costs = zip(plain_costs(load, plan), plain_costs(load, current), strict=True)
        for layer, (new, old) in enumerate(costs):
            assert new <= old
            if new == old:
                assert torch.equal(plan.expert_of_slot[layer], current.expert_of_slot[layer])
        current = plan
    assert searched(Problem(load, Topology(1, num_gpus), current=current), 3) == current


def test_a_layer_that_cannot_be_improved_keeps_its_slots_while_others_move() -> None:
    load = torch.tensor([[[4, 3, 2, 1], [9, 8, 1, 0]]])  # [T, L, E]
    current = Placement(torch.tensor([[3, 0, 2, 1], [0, 1, 2, 3]]), 4, 2)  # 5 and 5; 17 and 1
    plan = searched(Problem(load, Topology(1, 2), current=current), 2)
    assert plan.expert_of_slot[0].tolist() == [3, 0, 2, 1]
    assert plain_costs(load, plan) == [5, 9]
    assert int((plan.expert_of_slot[1] != current.expert_of_slot[1]).sum()) == 2


def test_a_layer_without_tokens_stays() -> None:
    current = random_placement(random.Random(7), 2, 8, 4)
    load = torch.zeros(2, 2, 8, dtype=torch.int64)
    assert searched(Problem(load, Topology(1, 4), current=current), 2) == current


def test_the_current_placement_changes_names_and_not_costs() -> None:
    load = skewed(8, 1, 20, 16)
    free = searched(Problem(load, Topology(1, 4)), 3)
    bound = searched(Problem(load, Topology(1, 4), current=Placement.contiguous(20, 16, 4)), 3)
    assert plain_costs(load, bound) == plain_costs(load, free)  # the contiguous placement is nowhere as good
    assert gpu_groups(bound) == gpu_groups(free)
    moved = [int((p.expert_of_slot != torch.arange(16)).sum()) for p in (bound, free)]
    assert moved[0] < moved[1]


# --- relabel ----------------------------------------------------------------------------------------------------


def fewest_moves(fresh: list[int], current: list[int], num_gpus: int) -> int:
    """Slots that change hands under the best of all M! ways to name the GPUs of one layer."""
    size = len(fresh) // num_gpus
    groups = [set(fresh[at : at + size]) for at in range(0, len(fresh), size)]
    held = [set(current[at : at + size]) for at in range(0, len(current), size)]
    return min(
        len(fresh) - sum(len(groups[group] & held[gpu]) for gpu, group in enumerate(order))
        for order in permutations(range(num_gpus))
    )


@pytest.mark.parametrize(("num_experts", "num_gpus"), [*SIZES, (10, 5), (30, 3)])
def test_relabelling_keeps_the_groups_and_moves_as_few_slots_as_any_naming(num_experts: int, num_gpus: int) -> None:
    random_ = random.Random(num_experts)
    fresh = random_placement(random_, 30, num_experts, num_gpus)
    current = random_placement(random_, 30, num_experts, num_gpus)
    named = relabelled(fresh, current)
    assert gpu_groups(named) == gpu_groups(fresh)
    moved = (named.expert_of_slot != current.expert_of_slot).sum(1).tolist()
    if num_gpus <= 5:
        tables = zip(fresh.expert_of_slot.tolist(), current.expert_of_slot.tolist(), strict=True)
        assert moved == [fewest_moves(new, old, num_gpus) for new, old in tables]
    else:
        assert moved == [0] * 30  # a GPU holds one slot here, so any placement is the current one under other names


def test_relabelling_the_same_groups_moves_nothing() -> None:
    random_ = random.Random(9)
    current = random_placement(random_, 10, 12, 3)
    blocks = current.expert_of_slot.view(10, 3, 4)
    shuffled = blocks[:, [2, 0, 1]][:, :, [3, 1, 0, 2]].reshape(10, 12)
    assert relabelled(Placement(shuffled, 12, 3), current) == current


# --- refusals ---------------------------------------------------------------------------------------------------


def test_replicas_uneven_slots_and_engines_that_are_not_there_are_refused() -> None:
    load = torch.ones(1, 2, 4, dtype=torch.int64)
    with pytest.raises(
        DistplbError, match="num_slots is 8 for 4 experts: replicas are not planned yet; pass num_slots=4"
    ):
        Problem(load, Topology(1, 2), num_slots=8)
    with pytest.raises(DistplbError, match="4 slots cannot be spread evenly over 3 GPUs"):
        Problem(load, Topology(3, 1))
    with pytest.raises(DistplbError, match="engine 'warp' is not there"):
        Problem(load, Topology(1, 2), engine="warp")
    assert Problem(load, Topology(1, 2), num_slots=4, engine="reference").engine_name == "reference"


@pytest.mark.parametrize(
    "current",
    [
        Placement.contiguous(1, 4, 2),
        Placement.contiguous(2, 8, 2),
        Placement.contiguous(2, 4, 4),
        Placement(torch.tensor([[0, 1, 2, 3, 0, 1]] * 2), 4, 2),
    ],
)
def test_a_current_placement_of_another_model_is_refused(current: Placement) -> None:
    found = (current.num_layers, current.num_experts, current.num_slots, current.num_gpus)
    with pytest.raises(DistplbError) as refused:
        Problem(torch.ones(1, 2, 4, dtype=torch.int64), Topology(1, 2), current=current)
    assert f"(layers, experts, slots, GPUs) = {found}, the load and topology (2, 4, 4, 2)" in str(refused.value)
    assert "pass the placement in force of the same model" in str(refused.value)
