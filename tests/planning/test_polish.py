"""The polish of the chosen tables: it never costs more, keeps experts in order if nothing is gained, and is legal.

Shapes: T steps, L layers, E experts, P slots, M GPUs.
"""

from __future__ import annotations

import random

import pytest
import torch
from plain_costs import plain_costs
from policy_cases import (
    POLICIES,
    breaking_rules,
    keeps_rules,
    placement_of,
    random_table,
    rows_of_every_kind,
    searched,
    skewed,
)

from distplb import DistplbError, Placement, Topology
from distplb.planning.greedy import contiguous
from distplb.planning.options import PlanOptions
from distplb.planning.problem import Problem


@pytest.mark.parametrize("num_steps", [1, 6])
@pytest.mark.parametrize("num_slots", [12, 18])
def test_polish_never_costs_more_than_what_it_was_given(num_slots: int, num_steps: int) -> None:
    """One step of load is polished by step 9; several are settled again, under a ceiling of a quarter."""
    random_, load = random.Random(4), skewed(4, num_steps, 60, 12)
    problem = Problem(load, Topology(1, 3), PlanOptions(num_slots=num_slots))
    start = random_table(random_, 60, 12, num_slots)
    before = plain_costs(load, start, 3)
    polished = problem.polish(start)
    after = plain_costs(load, polished, 3)
    assert all(a <= b for a, b in zip(after, before, strict=True))
    assert sum(after) < 0.95 * sum(before)
    on_the_sum = Problem(load.sum(0)[None], Topology(1, 3), PlanOptions(num_slots=num_slots)).polish(start)
    if num_steps == 1:
        assert torch.equal(polished, on_the_sum)
        return
    assert sum(after) < 0.98 * sum(plain_costs(load, on_the_sum, 3))  # a polish on the sum misses this
    ceiling, terms = torch.full((60,), 1 << 14), problem._terms
    settled = problem._policy.settle(terms, start, layer=torch.arange(60), ceiling=ceiling)
    dearer = [a > b for a, b in zip(plain_costs(load, settled, 3), before, strict=True)]
    for layer, was_dearer in enumerate(dearer):
        assert torch.equal(polished[layer], start[layer] if was_dearer else settled[layer])


def test_what_is_even_enough_is_not_polished() -> None:
    """No job would notice a busiest GPU that is 2^-13 above the mean."""
    load = torch.tensor([[[10**6 + 220, 10**6, 10**6, 10**6], [10**6 + 1000, 10**6, 10**6, 10**6 + 990]]] * 2)
    problem = Problem(load, Topology(1, 2))
    start = torch.tensor([[0, 1, 2, 3], [0, 3, 1, 2]])
    polished = problem.polish(start)
    assert torch.equal(polished[0], start[0])
    assert plain_costs(load, polished, 2) == [2 * (2 * 10**6 + 220), 2 * (2 * 10**6 + 1000)]


@pytest.mark.parametrize("num_slots", [12, 18])
def test_polish_never_costs_more_with_the_price_of_its_moves(num_slots: int) -> None:
    """Step 9 ignores the price, and its moves may cost more than they gain."""
    for num_steps in (1, 4):
        load, random_ = skewed(5, num_steps, 60, 12), random.Random(5)
        current, start = (random_table(random_, 60, 12, num_slots) for _ in range(2))
        current = Placement(current, 12, 3)
        unpriced = Problem(load, Topology(1, 3), PlanOptions(num_slots=num_slots)).polish(start)
        lost = 0
        for price in (1.0, 100.0, (30.0, 500.0)):
            options = PlanOptions(num_slots=num_slots, current=current, move_price=price)
            polished = Problem(load, Topology(3, 1), options).polish(start)
            before, after, other, kept = (
                plain_costs(load, table, 3, current, price, 1)
                for table in (start, polished, unpriced, current.expert_of_slot)
            )
            assert all(a <= min(b, c) for a, b, c in zip(after, before, kept, strict=True))
            assert sum(after) < sum(before)
            lost += sum(a > b for a, b in zip(other, before, strict=True))
        assert lost


@pytest.mark.parametrize("policy", POLICIES)
def test_polish_never_costs_more_than_a_candidate_under_any_policy(policy: str) -> None:
    topology, options = POLICIES[policy]
    for num_steps in (1, 3):
        load = torch.stack([rows_of_every_kind(seed, 16) for seed in range(num_steps)])
        far = breaking_rules(policy, 6, load.shape[1])  # breaks the rules, so that no layer may keep it
        for current, price in ((None, 0.0), (far, 40.0)):
            problem = Problem(load, topology, PlanOptions(current=current, move_price=price, **options))
            for candidate in (0, 1):
                table = problem.build(torch.full((load.shape[1],), candidate))
                before, after = (
                    plain_costs(load, each, topology.num_gpus, current, price)
                    for each in (table, problem.polish(table))
                )
                assert all(a <= b for a, b in zip(after, before, strict=True))


@pytest.mark.parametrize("policy", POLICIES)
def test_neither_load_nor_table_is_written_to(policy: str) -> None:
    topology, options = POLICIES[policy]
    load = skewed(6, 2, 3, 16)
    table = random_table(random.Random(6), 3, 16, options.get("num_slots", 16))
    options = PlanOptions(current=Placement(table, 16, topology.num_gpus), move_price=(1.5, 9.0), **options)
    problem = Problem(load, topology, options)
    start = problem.build(torch.zeros(3, dtype=torch.int64))
    before, was = load.clone(), start.clone()
    problem.polish(start)
    searched(problem, 4)
    assert torch.equal(load, before)
    assert torch.equal(start, was)
    assert torch.equal(options.current.expert_of_slot, table)


# --- experts in order -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
def test_experts_stay_in_order_where_no_legal_plan_costs_less(policy: str) -> None:
    """An even load, or none, was planned as 0, 2, 4, 6, 1, 3, 5, 7."""
    topology, options = POLICIES[policy]
    load = torch.ones(3, 6, 16, dtype=torch.int64)
    load[:, 1] = 0
    load[:, 2] = 7 * 2**40
    load[:, 3, 0] = 10**6  # one hot expert makes its GPU the busiest, wherever it is
    load[:, 4:] = torch.randint(0, 3, (3, 2, 16), generator=torch.Generator().manual_seed(1))
    in_order = contiguous(load[0], topology, options.get("num_slots", 16))
    is_legal = keeps_rules(policy, in_order[0].tolist(), list(range(16)))
    assert is_legal == (policy != "replicas apart")
    for steps in (load, load[:1]):
        plan = searched(Problem(steps, topology, PlanOptions(**options)), 1)
        costs, other = (plain_costs(steps, table, topology.num_gpus) for table in (plan, in_order))
        for row, ordered, cost, of_order in zip(plan.tolist(), in_order.tolist(), costs, other, strict=True):
            assert keeps_rules(policy, row, list(range(16)))
            if is_legal:
                assert row == ordered if cost == of_order else cost < of_order
        if is_legal:
            assert plan[:3].tolist() == in_order[:3].tolist()


# --- the last check ---------------------------------------------------------------------------------------------------


def test_a_plan_that_breaks_the_rules_is_not_given_out() -> None:
    """No plan is known to; otherwise a bug in the search would first show in a router, or while experts move."""
    broken = {
        "replicas apart": "replicas of an expert on different GPUs",
        "groups on nodes": "4 whole groups on each of 2 nodes",
        "blocks over GPUs": "the experts of one group in each block of 4 slots",
        "classes": "every expert in a slot of its class",
    }
    for policy, rule in broken.items():
        (topology, options), load = POLICIES[policy], skewed(24, 1, 3, 16)
        problem, table = Problem(load, topology, PlanOptions(**options)), placement_of(policy, load).expert_of_slot
        problem.polish(table)
        wrong = next(
            row
            for seed in range(99)
            if not keeps_rules(policy, row := breaking_rules(policy, seed, 1).expert_of_slot[0].tolist(), [*range(16)])
        )
        table[1] = torch.tensor(wrong)
        with pytest.raises(DistplbError, match=f"^internal: layer 1 of the plan must have {rule}, but does not; "):
            problem.polish(table)
    both = POLICIES["groups on nodes with replicas"][1] | {"allow_shared_replicas": False}
    rule = Problem(skewed(24, 1, 3, 16), Topology(2, 4), PlanOptions(**both))._policy.rule
    assert rule == "2 whole groups on each of 2 nodes, and replicas of an expert on different GPUs"
