"""Plans from a placement in force: they never cost more, every other one starts from it, and none breaks the rules.

Shapes: T steps, L layers, E experts, P slots, M GPUs.
"""

from __future__ import annotations

import random
from collections import Counter

import pytest
import torch
from plain_costs import plain_costs
from policy_cases import POLICIES, SIZES, breaking_rules, keeps_rules, placement_of, random_table, searched, skewed
from torch import Tensor

from distplb import Placement, Topology
from distplb.core.price import moved_slots
from distplb.planning.options import PlanOptions
from distplb.planning.problem import Problem


@pytest.mark.parametrize("num_steps", [1, 4])
@pytest.mark.parametrize(("num_experts", "num_slots", "num_gpus"), [(e, e, m) for e, m in SIZES] + [(8, 12, 4)])
def test_a_plan_never_costs_more_than_the_current_placement(
    num_experts: int, num_slots: int, num_gpus: int, num_steps: int
) -> None:
    random_ = random.Random(num_experts + num_steps)
    load = skewed(num_experts + 50, num_steps, 30, num_experts)
    current = random_table(random_, 30, num_experts, num_slots)

    def planned_from(current: Tensor) -> Tensor:
        options = PlanOptions(num_slots=num_slots, current=Placement(current, num_experts, num_gpus))
        return searched(Problem(load, Topology(1, num_gpus), options), 3)

    for _ in range(3):  # the plan is the current placement of the next round
        table = planned_from(current)
        costs = zip(plain_costs(load, table, num_gpus), plain_costs(load, current, num_gpus), strict=True)
        for layer, (new, old) in enumerate(costs):
            assert new <= old
            if new == old:
                assert torch.equal(table[layer], current[layer])
        current = table
    assert torch.equal(planned_from(current), current)


def test_a_layer_that_cannot_be_improved_keeps_its_slots_while_others_move() -> None:
    load = torch.tensor([[[4, 3, 2, 1], [9, 8, 1, 0]]])  # [T, L, E]
    current = Placement(torch.tensor([[3, 0, 2, 1], [0, 1, 2, 3]]), 4, 2)  # 5 and 5; 17 and 1
    table = searched(Problem(load, Topology(1, 2), PlanOptions(current=current)), 2)
    assert table[0].tolist() == [3, 0, 2, 1]
    assert plain_costs(load, table, 2) == [5, 9]
    assert int((table[1] != current.expert_of_slot[1]).sum()) == 2


@pytest.mark.parametrize("policy", POLICIES)
def test_a_layer_without_tokens_stays_unless_it_breaks_the_rules(policy: str) -> None:
    topology, options = POLICIES[policy]
    table = torch.cat(
        [placement_of(policy, skewed(7, 1, 1, 16)).expert_of_slot, breaking_rules(policy, 7, 1).expert_of_slot]
    )
    with_current = PlanOptions(current=Placement(table, 16, topology.num_gpus), **options)
    load = torch.zeros(2, 2, 16, dtype=torch.int64)
    for num_candidates in (1, 2):
        plan = searched(Problem(load, topology, with_current), num_candidates).tolist()
        for row, start in zip(plan, table.tolist(), strict=True):
            assert row == start if keeps_rules(policy, start, start) else keeps_rules(policy, row, start)


# --- where candidates start -------------------------------------------------------------------------------------------


def gpu_contents(table: Tensor, num_gpus: int) -> list[list[list[int]]]:
    """By layer, the experts on each GPU, in an order that does not depend on GPUs or slots."""
    return [sorted(sorted(gpu) for gpu in row) for row in table.unflatten(1, (num_gpus, -1)).tolist()]


@pytest.mark.parametrize("num_slots", [16, 24])
def test_the_current_placement_changes_names_and_not_costs_of_what_starts_afresh(num_slots: int) -> None:
    load = skewed(8, 1, 20, 16)
    table = torch.cat([torch.arange(16), torch.arange(num_slots - 16)]).expand(20, -1)
    current = Placement(table, 16, 4)  # worse in every layer
    free, bound = (
        searched(Problem(load, Topology(1, 4), PlanOptions(num_slots=num_slots, current=each)), 1)
        for each in (None, current)
    )
    assert gpu_contents(bound, 4) == gpu_contents(free, 4)
    moved = [int((each != table).sum()) for each in (bound, free)]
    assert moved[0] < moved[1]


@pytest.mark.parametrize("num_steps", [1, 3])
@pytest.mark.parametrize("policy", POLICIES)
def test_even_candidates_start_afresh_and_odd_ones_from_the_current_placement(policy: str, num_steps: int) -> None:
    topology, options = POLICIES[policy]
    load = skewed(12, num_steps, 12, 16)
    current, replicas = placement_of(policy, load.flip(2)), options.get("num_slots", 16) > 16
    free, warm, even = (
        Problem(each, topology, PlanOptions(current=start, seed=3, **options))
        for each, start in ((load, None), (load, current), (torch.full_like(load, 77), current))
    )

    def table_of(problem: Problem, candidate: int) -> Tensor:
        return problem.build(torch.full((12,), candidate))

    for candidate in (0, 2, 4):
        assert torch.equal(table_of(warm, candidate), table_of(free, candidate)) or "slot_class" in options
    # Where all experts are equal and there is nothing to gain, an odd candidate keeps the placement it starts from.
    assert torch.equal(table_of(even, 1), current.expert_of_slot) or replicas
    begun = current.expert_of_slot
    before = plain_costs(load, begun, topology.num_gpus)
    for candidate in (1, 3, 5, 7):
        table = table_of(warm, candidate)
        counts = [[Counter(row) for row in each.tolist()] for each in (table, begun)]
        assert (counts[0] != counts[1]) == (replicas and candidate % 4 == 3)
        if candidate % 4 == 1:  # exchanges, in slightly coarser units
            after = plain_costs(load, table, topology.num_gpus)
            assert all(a <= b * (1 + 2**-20) for a, b in zip(after, before, strict=True))
            assert sum(after) < sum(before) or policy == "one slot a GPU"


@pytest.mark.parametrize("num_steps", [1, 3])
@pytest.mark.parametrize("policy", POLICIES)
def test_every_candidate_and_every_plan_keeps_the_rules(policy: str, num_steps: int) -> None:
    """From a placement that keeps them, and from one that breaks them; a layer once kept that if it cost no more."""
    topology, options = POLICIES[policy]
    load = skewed(13, num_steps, 12, 16)
    for current in (placement_of(policy, load.flip(2)), breaking_rules(policy, 4, 12)):
        for price in (0.0, (1.0, 30.0), 1e30):
            priced = PlanOptions(current=current, move_price=price, **options)
            problem = Problem(load, topology, priced)
            tables = [problem.build(torch.full((12,), candidate)) for candidate in range(5)]
            for table in [*tables, *(problem.polish(table) for table in tables)]:
                for row, start in zip(table.tolist(), current.expert_of_slot.tolist(), strict=True):
                    assert keeps_rules(policy, row, start)


def whole_groups_unevenly() -> list[list[int]]:
    """Two layers of 16 experts in 4 groups and 32 slots on 2 nodes: 3 groups and 1; 2 and 2, but one of them split."""
    three, one = [*range(12), 0, 1, 2, 3], [12, 13, 14, 15] * 4
    split = [*range(8), *range(8)], [*range(8, 16), *range(9, 16), 0]
    return [three + one, split[0] + split[1]]


@pytest.mark.parametrize("num_steps", [1, 3])
def test_from_what_breaks_the_rules_all_candidates_start_afresh(num_steps: int) -> None:
    """Three groups on one node and one on the other once passed as legal."""
    broken = {
        "replicas apart": [[*range(16), *range(16), *range(7), 6], [*range(16), *range(16), *range(8)]],
        "groups on nodes": [random.Random(1).sample(range(16), 16) for _ in range(2)],
        "groups on nodes with replicas": whole_groups_unevenly(),
        "blocks over GPUs": [random.Random(2).sample(range(16), 16) for _ in range(2)],
        "blocks in GPUs": [random.Random(3).sample(range(16), 16) for _ in range(2)],
    }
    for policy, rows in broken.items():
        topology, options = POLICIES[policy]
        load = skewed(14, num_steps, 3, 16)
        whole = placement_of(policy, load.flip(2)).expert_of_slot[2:]
        current = Placement(torch.cat([torch.tensor(rows), whole]), 16, topology.num_gpus)
        free, warm = (Problem(load, topology, PlanOptions(current=each, **options)) for each in (None, current))
        broke = [not keeps_rules(policy, row, row) for row in current.expert_of_slot.tolist()]
        assert broke == [True, policy != "replicas apart", False]
        for candidate in (1, 3):
            tables = [problem.build(torch.full((3,), candidate)) for problem in (free, warm)]
            same = (tables[0] == tables[1]).all(1).tolist()
            assert [a or not b for a, b in zip(same, broke, strict=True)] == [True] * 3
            assert not same[2]


# --- where the current placement may not stay -------------------------------------------------------------------------


BOUND = ["replicas apart", "groups on nodes", "groups on nodes with replicas", "blocks over GPUs", "blocks in GPUs"]


@pytest.mark.parametrize("num_steps", [1, 3])
@pytest.mark.parametrize("policy", BOUND)
def test_what_must_move_costs_no_more_than_any_candidate(policy: str, num_steps: int) -> None:
    """Also where moves cost far more than 2^41: all candidates had the same cost then, and the polish no price."""
    topology, options = POLICIES[policy]
    load = skewed(22, num_steps, 12, 16)
    current, total = breaking_rules(policy, 8, 12), int(load.sum()) / 12
    stays = [keeps_rules(policy, row, row) for row in current.expert_of_slot.tolist()]
    assert stays.count(False) > 8
    moved = []
    for price in (0.0, 1e-3 * total, (1e-3 * total, 1e-1 * total), total, 1e30, float("inf")):
        problem = Problem(load, topology, PlanOptions(current=current, move_price=price, **options))
        costs = problem.costs(torch.arange(6))
        table = problem.polish(problem.build(costs.argmin(0)))
        assert [keeps_rules(policy, row, row) for row in table.tolist()] == [True] * 12
        final = plain_costs(load, table, topology.num_gpus, current, price, topology.gpus_per_node, stays)
        assert all(a <= b < 2**41 - 1 for a, b in zip(final, costs.amin(0).tolist(), strict=True))
        moved.append(int(moved_slots(current, Placement(table, 16, topology.num_gpus), topology).sum()))
    assert moved[0] >= moved[1] > moved[4] == moved[5]
    assert moved[3] <= moved[4] * 1.1  # a price of all tokens is as good as infinite


@pytest.mark.parametrize("num_steps", [1, 3])
@pytest.mark.parametrize("policy", BOUND)
def test_what_must_move_is_settled_although_it_costs_more_than_what_may_not_stay(policy: str, num_steps: int) -> None:
    """A fresh candidate was only renumbered if its moves cost more than staying."""
    topology, options = POLICIES[policy]
    load = skewed(23, num_steps, 12, 16)
    priced = PlanOptions(current=breaking_rules(policy, 9, 12), move_price=float(load.sum()), **options)
    problem, layer, first = Problem(load, topology, priced), torch.arange(12), torch.zeros(12, dtype=torch.int64)
    table, names = problem.build(first), {"layer": layer, "candidate": first, "seed": 0}
    unsettled = problem._afresh(problem._weight, names)
    must = ~problem._may_stay
    assert must.sum() > 8
    cost, before = problem._cost(table), problem._cost(unsettled)
    assert (cost <= before).all()
    assert (cost < before)[must].any()
