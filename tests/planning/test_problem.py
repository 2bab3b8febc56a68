"""The planning problem: the cost of candidates, the table of each, and the bounds that they always keep.

`build` and `polish` take and return tables `[L, P]`; only the last one becomes a `Placement`.
Shapes: T steps, L layers, E experts, P slots, M GPUs, G slots on each GPU, B groups, K candidates.
"""

from __future__ import annotations

import pytest
import torch
from plain_costs import plain_costs
from policy_cases import (
    POLICIES,
    SIZES,
    breaking_rules,
    keeps_rules,
    placement_of,
    rows_of_every_kind,
    searched,
    skewed,
)
from torch import Tensor

from distplb import DistplbError, Placement, Topology, balanced_packing
from distplb.core.price import TimeCurve
from distplb.packing.steps import pack_loads
from distplb.planning.options import PlanOptions
from distplb.planning.problem import Problem

# --- candidates -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_steps", [1, 4])
@pytest.mark.parametrize("policy", POLICIES)
def test_costs_add_up_the_busiest_gpu_of_every_step(policy: str, num_steps: int) -> None:
    topology, options = POLICIES[policy]
    load = skewed(1, num_steps, 5, 16)
    load[:, 3], load[0, 4] = 0, 0
    problem = Problem(load, topology, PlanOptions(**options))
    costs = problem.costs(torch.arange(6))
    assert costs.dtype == torch.int64
    tables = [Problem(load, topology, PlanOptions(**options)).build(torch.full((5,), k)) for k in range(6)]
    assert costs.tolist() == [plain_costs(load, table, topology.num_gpus) for table in tables]
    assert (costs[:, 3] == 0).all()
    for table in tables:
        assert table.dtype == torch.int64
        Placement(table, 16, topology.num_gpus)  # checks itself
    if policy in ("flat", "replicas", "groups on nodes with replicas"):
        assert (costs[1:] != costs[0]).any()


@pytest.mark.parametrize("num_steps", [1, 3])
@pytest.mark.parametrize("policy", POLICIES)
def test_costs_add_the_price_of_every_slot_that_comes_from_another_gpu(policy: str, num_steps: int) -> None:
    """Also for loads beyond 2^40, for empty loads, and where all costs are beyond 2^41."""
    topology, options = POLICIES[policy]
    load = skewed(21, num_steps, 6, 16)
    load[:, 3], load[:, 4:] = 0, load[:, 4:] << 34
    assert load[:, 4:].sum((0, 2)).min() > 2**40
    current = torch.cat(
        [placement_of(policy, load.flip(2)).expert_of_slot[1:], breaking_rules(policy, 1, 1).expert_of_slot]
    )
    current = Placement(current, 16, topology.num_gpus)
    total, saturated = int(load[:, 0].sum()), 0
    for price in (0.3, total / 400, (0.0, 7.25), (total / 900, total / 90), (1e30, 0.0), 2.0**42, 1e30, float("inf")):
        problem = Problem(load, topology, PlanOptions(current=current, move_price=price, **options))
        costs = problem.costs(torch.arange(4))
        tables = [
            Problem(load, topology, problem_options).build(torch.full((6,), k))
            for k, problem_options in enumerate([PlanOptions(current=current, move_price=price, **options)] * 4)
        ]
        stays = [keeps_rules(policy, row, row) for row in current.expert_of_slot.tolist()]
        terms = current, price, topology.gpus_per_node, stays
        assert costs.tolist() == [plain_costs(load, table, topology.num_gpus, *terms) for table in tables]
        saturated += int((costs == 2**41 - 1).sum())
    assert saturated > 5 or policy in ("one slot a GPU", "large classes")  # which need not move, or not far


@pytest.mark.parametrize("policy", POLICIES)
def test_a_candidate_is_the_same_beside_any_others_and_whatever_was_searched_before(policy: str) -> None:
    """`costs` keeps the cheapest table of each layer, which `build` reuses; the result must be the same."""
    topology, options = POLICIES[policy]
    load, candidates = skewed(2, 3, 4, 16), [7, 0, 3, 2**22 - 1]
    options = {"current": placement_of(policy, load.flip(2)), "move_price": (2.0, 30.0), **options}
    assert_candidates_depend_on_their_name_alone(load, topology, options, candidates)
    assert_candidates_depend_on_their_name_alone(load, topology, POLICIES[policy][1], candidates)


def assert_candidates_depend_on_their_name_alone(
    load: Tensor, topology: Topology, options: dict, candidates: list[int]
) -> None:

    def fresh() -> Problem:
        return Problem(load, topology, PlanOptions(seed=5, **options))

    met = fresh()
    together = met.costs(torch.tensor(candidates))
    alone = [fresh().build(torch.full((4,), candidate)) for candidate in candidates]
    for row, candidate in enumerate(candidates):
        assert torch.equal(fresh().costs(torch.tensor([candidate]))[0], together[row])
        assert torch.equal(met.build(torch.full((4,), candidate)), alone[row])
    mixed = torch.stack([alone[row][layer] for layer, row in enumerate([0, 1, 2, 0])])
    best = torch.stack([alone[row][layer] for layer, row in enumerate(together.argmin(0).tolist())])
    for problem in (fresh(), met):
        assert torch.equal(problem.build(torch.tensor([7, 0, 3, 7])), mixed)
        assert torch.equal(problem.build(torch.tensor(candidates)[together.argmin(0)]), best)


def test_what_was_met_in_several_calls_is_the_cheapest_of_all() -> None:
    load, options = skewed(3, 2, 20, 16), PlanOptions(num_slots=24)
    problem = Problem(load, Topology(1, 4), options)
    costs = torch.cat([problem.costs(torch.tensor(part)) for part in ([3, 1], [0], [2, 4, 5])])
    order = torch.tensor([3, 1, 0, 2, 4, 5])
    cheapest = order[costs.argmin(0)]
    assert len(cheapest.unique()) > 2
    assert torch.equal(problem.build(cheapest), Problem(load, Topology(1, 4), options).build(cheapest))


def test_the_cheapest_tables_that_were_met_are_not_searched_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the root of a plan would spend the time of another candidate."""
    problem = Problem(skewed(4, 1, 20, 16), Topology(1, 4), PlanOptions(num_slots=24))
    costs = torch.cat([problem.costs(torch.arange(4) + first) for first in (0, 4)])
    expected = problem.build(costs.argmin(0))
    monkeypatch.delattr(Problem, "_candidates")
    assert torch.equal(problem.build(costs.argmin(0)), expected)
    with pytest.raises(AttributeError):
        problem.build(costs.argmax(0))


@pytest.mark.parametrize("policy", POLICIES)
def test_a_layer_alone_is_planned_as_among_others(policy: str) -> None:
    """Rows are processed together, and each must stop on its own."""
    topology, options = POLICIES[policy]
    load = rows_of_every_kind(4, 16)[None]
    together = Problem(load, topology, PlanOptions(**options))
    plain = together.build(torch.zeros(load.shape[1], dtype=torch.int64))
    polished = together.polish(plain)
    for layer in range(load.shape[1]):
        alone = Problem(load[:, layer : layer + 1], topology, PlanOptions(**options))
        table = alone.build(torch.zeros(1, dtype=torch.int64))
        assert torch.equal(table[0], plain[layer])
        assert torch.equal(alone.polish(table)[0], polished[layer])


@pytest.mark.parametrize("policy", POLICIES)
def test_a_layer_alone_starts_from_the_current_placement_as_among_others(policy: str) -> None:
    topology, options = POLICIES[policy]
    load = torch.stack([rows_of_every_kind(seed, 16)[::5] for seed in (4, 5)])
    num_layers, start = load.shape[1], placement_of(policy, load.flip(2)).expert_of_slot
    start[1::2] = breaking_rules(policy, 2, num_layers).expert_of_slot[1::2]

    def options_of(table: Tensor) -> PlanOptions:
        return PlanOptions(current=Placement(table, 16, topology.num_gpus), move_price=(5.0, 40.0), **options)

    together = Problem(load, topology, options_of(start))
    first = together.build(torch.ones(num_layers, dtype=torch.int64))
    polished = together.polish(first)
    for layer in range(num_layers):
        one = slice(layer, layer + 1)
        alone = Problem(load[:, one], topology, options_of(start[one]))
        table = alone.build(torch.ones(1, dtype=torch.int64))
        # The noise of a fresh start depends on the layer's index.
        if layer == 0 or bool(alone._may_stay[0]):
            assert torch.equal(table[0], first[layer])
        assert torch.equal(alone.polish(first[one])[0], polished[layer])


def test_the_seed_changes_every_candidate_but_the_plain_one() -> None:
    load = skewed(3, 1, 40, 24)
    for num_slots in (24, 32):
        one, other, again = (
            Problem(load, Topology(1, 4), PlanOptions(num_slots=num_slots, seed=seed)) for seed in (0, 1, 0)
        )
        plain, noisy = torch.zeros(40, dtype=torch.int64), torch.ones(40, dtype=torch.int64)
        assert torch.equal(one.build(plain), other.build(plain))
        assert not torch.equal(one.build(noisy), other.build(noisy))
        assert torch.equal(one.build(noisy), again.build(noisy))


CURVE = TimeCurve((0, 100, 200, 1000), (0, 900, 950, 4000))
# What a plan starts from, and what it pays for.
VARIANTS = {
    "fresh": {},
    "current": {"current": True},
    "price": {"current": True, "move_price": 20.0},
    "all": {"current": True, "move_price": (2.5, 25.0), "time_curve": CURVE},
}


def variant_of(variant: str, policy: str, load: Tensor) -> dict:
    """Options with a placement in force for `load [T, L, E]` that keeps the policy's rules in all layers but one."""
    options = POLICIES[policy][1] | VARIANTS[variant]
    if options.get("current"):
        table = placement_of(policy, load.flip(2)).expert_of_slot
        table[-1] = breaking_rules(policy, 3, 1).expert_of_slot[0]
        options["current"] = Placement(table, 16, POLICIES[policy][0].num_gpus)
    return options


@pytest.mark.parametrize(
    ("variant", "num_steps"),
    [("fresh", 1), ("fresh", 2), ("current", 2), ("price", 1), ("all", 2)],
)
@pytest.mark.parametrize("policy", POLICIES)
def test_the_engines_reference_and_cpu_make_the_same_tables(policy: str, variant: str, num_steps: int) -> None:
    topology = POLICIES[policy][0]
    load = torch.stack([rows_of_every_kind(seed, 16)[[0, 8, 71]] for seed in range(num_steps)])
    options = variant_of(variant, policy, load)
    slow, fast = (Problem(load, topology, PlanOptions(engine=name, **options)) for name in ("reference", "cpu"))
    assert (slow.engine_name, fast.engine_name) == ("reference", "cpu")
    assert torch.equal(slow.costs(torch.arange(4)), fast.costs(torch.arange(4)))
    candidate = torch.tensor([3, 2**22 - 1, 1])
    table = slow.build(candidate)
    assert torch.equal(table, fast.build(candidate))
    assert torch.equal(slow.polish(table), fast.polish(table))


def test_nodes_times_gpus_is_all_that_the_search_needs_of_a_topology_without_groups() -> None:
    load = skewed(5, 2, 3, 16)
    for options in (PlanOptions(), PlanOptions(num_slots=24)):
        one, other = (searched(Problem(load, topology, options), 4) for topology in (Topology(2, 2), Topology(1, 4)))
        assert torch.equal(one, other)


# --- lower limit ------------------------------------------------------------------------------------------------------


def test_a_plan_is_never_worse_than_balanced_packing_with_as_many_candidates() -> None:
    """For one step of load, one slot per expert and seed 0, in any row."""
    lighter = 0
    for num_experts, num_gpus in [*SIZES, (16, 8), (24, 8), (64, 8), (96, 8), (34, 2)]:
        load = rows_of_every_kind(num_gpus, num_experts)
        for num_candidates in (1, 8):
            table = searched(Problem(load[None], Topology(1, num_gpus)), num_candidates)
            pack_index, rank_in_pack = balanced_packing(load, num_gpus, num_candidates)
            packed = (pack_index * (num_experts // num_gpus) + rank_in_pack).argsort(1)
            planned, floor = (pack_loads(load, each, num_gpus).amax(1) for each in (table, packed))
            assert (planned <= floor).all(), (num_experts, num_gpus, num_candidates, load[planned > floor].tolist())
            lighter += int((planned < floor).sum())
    assert lighter > 5


@pytest.mark.parametrize("num_slots", [12, 18])
def test_layers_of_more_tokens_than_the_search_counts_with_are_planned_as_their_shape_is(num_slots: int) -> None:
    load = skewed(7, 3, 20, 12)
    large = torch.cat([load, load << 22, load << 32], 1)  # [T, 3L, E]: unscaled, beyond 2^30, beyond 2^40
    assert large[:, :20].sum((0, 2)).max() < 2**30 < large[:, 20:40].sum((0, 2)).min()
    assert large[:, 20:40].sum((0, 2)).max() < 2**40 < large[:, 40:].sum((0, 2)).min()
    planned = searched(Problem(large, Topology(1, 3), PlanOptions(num_slots=num_slots)), 1)
    assert torch.equal(planned[:20], planned[20:40])
    assert torch.equal(planned[:20], planned[40:])


def test_more_candidates_never_cost_more_and_sometimes_less() -> None:
    load = skewed(8, 4, 30, 16)
    for options in ({}, {"num_slots": 24}, {"num_slots": 24, "num_groups": 4}):
        problem = Problem(load, Topology(2, 2), PlanOptions(**options))
        costs = problem.costs(torch.arange(32))
        assert (costs.amin(0) <= costs[0]).all()
        assert (costs.amin(0) < costs[0]).any()


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_what_the_options_refuse_the_problem_refuses() -> None:
    load = torch.ones(1, 2, 4, dtype=torch.int64)
    with pytest.raises(DistplbError, match="4 slots cannot be spread evenly over 3 GPUs"):
        Problem(load, Topology(3, 1))
    with pytest.raises(
        DistplbError, match="engine 'warp' is unknown; pass one of reference, cpu, cuda, or engine=None"
    ):
        Problem(load, Topology(1, 2), PlanOptions(engine="warp"))
    assert Problem(load, Topology(1, 2), PlanOptions(num_slots=4, engine="reference")).engine_name == "reference"


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
    sizes = (current.num_layers, current.num_experts, current.num_slots, current.num_gpus)
    with pytest.raises(DistplbError) as refused:
        Problem(torch.ones(1, 2, 4, dtype=torch.int64), Topology(1, 2), PlanOptions(current=current))
    assert f"(layers, experts, slots, GPUs) = {sizes}, load and topology have (2, 4, 4, 2)" in str(refused.value)
    assert "pass the placement in force for the same model" in str(refused.value)
