"""The planning problem: what candidates cost, the table behind each, the finish on it, and what is never lost by them.

`build` and `polish` take and return tables `[L, P]`; a `Placement` is made of the last one only.
Shapes: T steps, L layers, E experts, P slots, M GPUs, G slots on each GPU, B groups, K candidates.
"""

from __future__ import annotations

import random
from collections import Counter

import pytest
import torch
from plain_costs import plain_costs
from torch import Tensor

from distplb import DistplbError, Placement, Topology, balanced_packing, imbalance
from distplb.core.cost import mean_of_known
from distplb.core.price import TimeCurve, moved_slots
from distplb.packing.steps import pack_loads
from distplb.planning.greedy import contiguous, greedy_numpy
from distplb.planning.options import PlanOptions
from distplb.planning.problem import Problem

SIZES = [(8, 2), (12, 3), (16, 4), (20, 5), (6, 6), (4, 1)]  # (E, M)
CLASSES = torch.tensor([0, 1, 1, 2] * 4)
# Every policy, for 16 experts: the topology and what is asked for.
POLICIES = {
    "flat": (Topology(1, 4), {}),
    "one slot a GPU": (Topology(2, 8), {}),
    "replicas": (Topology(1, 4), {"num_slots": 24}),
    "replicas apart": (Topology(1, 4), {"num_slots": 40, "allow_shared_replicas": False}),
    "more replicas than fit apart": (Topology(1, 2), {"num_slots": 40}),
    "groups on nodes": (Topology(2, 2), {"num_groups": 8}),
    "groups on nodes with replicas": (Topology(2, 4), {"num_groups": 4, "num_slots": 32}),
    "blocks over GPUs": (Topology(1, 8), {"num_groups": 4, "mode": "permute"}),
    "blocks in GPUs": (Topology(2, 1), {"num_groups": 8, "mode": "permute"}),
    "classes": (Topology(1, 4), {"slot_class": CLASSES}),
    "large classes": (Topology(1, 2), {"slot_class": torch.arange(16) % 2}),
}


def skewed(seed: int, *shape: int) -> Tensor:
    """Lognormal tokens of any shape."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).mul(1.2).exp().mul(300).long()


def rows_of_every_kind(seed: int, num_experts: int) -> Tensor:
    """`[L, E]`: lognormal, Zipf, a few hot experts, equal, many zeros, ties, and none."""
    random_, rows = random.Random(f"{seed} {num_experts}"), []
    for _ in range(12):
        skew, hot = random_.uniform(0.5, 2), random_.sample(range(num_experts), max(1, num_experts // 16))
        zipf = [int(10**5 / rank**skew) for rank in range(1, num_experts + 1)]
        rows += [
            [int(random_.lognormvariate(6, 1.2)) for _ in range(num_experts)],
            random_.sample(zipf, num_experts),
            [random_.randrange(50, 150) * (50 if expert in hot else 1) for expert in range(num_experts)],
            [random_.randrange(1000)] * num_experts,
            [random_.choice([0, 0, 0, random_.randrange(1000)]) for _ in range(num_experts)],
            [random_.randrange(4) for _ in range(num_experts)],
        ]
    return torch.tensor([*rows, [0] * num_experts])


def random_table(random_: random.Random, num_layers: int, num_experts: int, num_slots: int) -> Tensor:
    """`[L, P]`: every expert, and some more than once."""
    spare = [random_.choices(range(num_experts), k=num_slots - num_experts) for _ in range(num_layers)]
    return torch.tensor([random_.sample([*range(num_experts), *more], num_slots) for more in spare])


def keeps_rules(policy: str, row: list[int], start: list[int]) -> bool:
    """Whether one layer's table is one that the policy may give; `start` was there first."""
    topology, options = POLICIES[policy]
    groups, size = options.get("num_groups"), len(row) // topology.num_gpus
    gpus = [row[at : at + size] for at in range(0, len(row), size)]
    if "slot_class" in options:
        classes = options["slot_class"].tolist()
        return all(classes[row.index(expert)] == classes[start.index(expert)] for expert in range(16))
    if groups and options.get("mode") == "permute":
        size = 16 // groups
        return all(len({e // size for e in row[at : at + size]}) == 1 for at in range(0, 16, size))
    if groups:
        size = len(row) // topology.num_nodes
        nodes = [{e * groups // 16 for e in row[at : at + size]} for at in range(0, len(row), size)]
        return [len(node) for node in nodes] == [groups // topology.num_nodes] * topology.num_nodes
    return options.get("allow_shared_replicas", True) or all(len(set(gpu)) == size for gpu in gpus)


def placement_of(policy: str, load: Tensor) -> Placement:
    """A plan that keeps the policy's rules."""
    topology, options = POLICIES[policy]
    table = searched(Problem(load, topology, PlanOptions(**options)), 1)
    return Placement(table, 16, topology.num_gpus)


def breaking_rules(policy: str, seed: int, num_layers: int) -> Placement:
    """Whatever stands anywhere."""
    topology, options = POLICIES[policy]
    table = random_table(random.Random(seed), num_layers, 16, options.get("num_slots", 16))
    return Placement(table, 16, topology.num_gpus)


def gpu_contents(table: Tensor, num_gpus: int) -> list[list[list[int]]]:
    """By layer, what is together on a GPU, in an order that does not depend on GPUs or slots."""
    return [sorted(sorted(gpu) for gpu in row) for row in table.unflatten(1, (num_gpus, -1)).tolist()]


def searched(problem: Problem, num_candidates: int) -> Tensor:
    """Stages 2 to 4 on one rank."""
    return problem.polish(problem.build(problem.costs(torch.arange(num_candidates)).argmin(0)))


# --- candidates -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_steps", [1, 4])
@pytest.mark.parametrize("policy", POLICIES)
def test_costs_add_up_the_fullest_gpu_of_every_step(policy: str, num_steps: int) -> None:
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
    """Also where loads are beyond 2^40, where there are none, and where all is beyond 2^41."""
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
    assert saturated > 5 or policy in ("one slot a GPU", "large classes")  # which need not move, or cannot far


@pytest.mark.parametrize("policy", POLICIES)
def test_a_candidate_is_the_same_in_any_company_and_whatever_was_met_before(policy: str) -> None:
    """`costs` keeps the cheapest table of each layer; `build` takes it from there, and must not be told apart."""
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
    """The root of a plan would else spend the time of a candidate more."""
    problem = Problem(skewed(4, 1, 20, 16), Topology(1, 4), PlanOptions(num_slots=24))
    costs = torch.cat([problem.costs(torch.arange(4) + first) for first in (0, 4)])
    expected = problem.build(costs.argmin(0))
    monkeypatch.delattr(Problem, "_candidates")
    assert torch.equal(problem.build(costs.argmin(0)), expected)
    with pytest.raises(AttributeError):
        problem.build(costs.argmax(0))


@pytest.mark.parametrize("policy", POLICIES)
def test_a_layer_alone_is_planned_as_among_others(policy: str) -> None:
    """Rows are worked on together, and each must stop by itself."""
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
        # The noise of a fresh start depends on the layer's number.
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
# What a plan starts from and pays for.
VARIANTS = {
    "fresh": {},
    "current": {"current": True},
    "price": {"current": True, "move_price": 20.0},
    "all": {"current": True, "move_price": (2.5, 25.0), "time_curve": CURVE},
}


def variant_of(variant: str, policy: str, load: Tensor) -> dict:
    """Options, with a placement in force for `load [T, L, E]`, which keeps the policy's rules in all layers but one."""
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


# --- polish -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_steps", [1, 6])
@pytest.mark.parametrize("num_slots", [12, 18])
def test_polish_never_costs_more_than_what_it_was_given(num_slots: int, num_steps: int) -> None:
    """One step of load is finished by step 9, several are settled once more, under a ceiling of a quarter."""
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
    assert sum(after) < 0.98 * sum(plain_costs(load, on_the_sum, 3))  # what one polish would lose, the other has
    ceiling, terms = torch.full((60,), 1 << 14), problem._terms
    settled = problem._policy.settle(terms, start, layer=torch.arange(60), ceiling=ceiling)
    dearer = [a > b for a, b in zip(plain_costs(load, settled, 3), before, strict=True)]
    for layer, was_dearer in enumerate(dearer):
        assert torch.equal(polished[layer], start[layer] if was_dearer else settled[layer])


def test_what_is_even_enough_is_not_polished() -> None:
    """A step whose fullest GPU is 2^-13 above the mean costs nobody anything that would be noticed."""
    load = torch.tensor([[[10**6 + 220, 10**6, 10**6, 10**6], [10**6 + 1000, 10**6, 10**6, 10**6 + 990]]] * 2)
    problem = Problem(load, Topology(1, 2))
    start = torch.tensor([[0, 1, 2, 3], [0, 3, 1, 2]])
    polished = problem.polish(start)
    assert torch.equal(polished[0], start[0])
    assert plain_costs(load, polished, 2) == [2 * (2 * 10**6 + 220), 2 * (2 * 10**6 + 1000)]


@pytest.mark.parametrize("num_slots", [12, 18])
def test_polish_never_costs_more_with_the_price_of_its_moves(num_slots: int) -> None:
    """Step 9 knows no price, and its moves may be dearer than what they gain."""
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
        far = breaking_rules(policy, 6, load.shape[1])  # in which nothing could be kept for its low cost
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


# --- the floor --------------------------------------------------------------------------------------------------


def test_a_plan_is_never_worse_than_balanced_packing_with_as_many_candidates() -> None:
    """For one step of load and one slot for each expert, with seed 0: in any row."""
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
    large = torch.cat([load, load << 22, load << 32], 1)  # [T, 3L, E]: as it is, beyond 2^30, beyond 2^40
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


# --- with a current placement -----------------------------------------------------------------------------------


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


# --- experts in order -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
def test_experts_stay_in_order_where_no_legal_plan_costs_less(policy: str) -> None:
    """An even load, or none, was planned as 0, 2, 4, 6, 1, 3, 5, 7."""
    topology, options = POLICIES[policy]
    load = torch.ones(3, 6, 16, dtype=torch.int64)
    load[:, 1] = 0
    load[:, 2] = 7 * 2**40
    load[:, 3, 0] = 10**6  # one hot expert, which is the fullest GPU wherever it is
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


@pytest.mark.parametrize("num_candidates", [1, 4])
@pytest.mark.parametrize("policy", POLICIES)
def test_steps_without_tokens_do_not_change_a_plan(policy: str, num_candidates: int) -> None:
    """One step and an empty one was planned by steps 10 and 11, as several steps are."""
    topology, options = POLICIES[policy]
    current = Placement(placement_of(policy, skewed(31, 1, 3, 16)).expert_of_slot, 16, topology.num_gpus)
    for load in (skewed(30, 1, 3, 16), skewed(30, 4, 3, 16)):
        padded = torch.cat([torch.zeros_like(load[:1]), load[:1], torch.zeros_like(load), load[1:]])
        for start in ({}, {"current": current}, {"current": current, "move_price": 25.0}):
            plans = [
                searched(Problem(one, topology, PlanOptions(**options, **start)), num_candidates)
                for one in (load, padded)
            ]
            assert torch.equal(*plans)


# --- few tokens, and replicas -----------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 8])
@pytest.mark.parametrize("factor", [3, 10**5])
def test_a_plan_of_few_tokens_is_that_of_as_many_times_as_many(steps: int, factor: int) -> None:
    """Shares of replicas are fractions of a token, which a search in whole tokens would not see."""
    load = torch.poisson(torch.ones(steps, 4, 16), generator=torch.Generator().manual_seed(steps)).long()
    costs = []
    for one in (load, load * factor):
        plan = Placement(searched(Problem(one, Topology(1, 4), PlanOptions(num_slots=32)), 2), 16, 4)
        costs.append(mean_of_known(imbalance(load, plan)))
        greedy = Placement(greedy_numpy(one.sum(0), Topology(1, 4), 32), 16, 4)
        assert costs[-1] <= mean_of_known(imbalance(load, greedy)) + 1e-9
    assert float(costs[0]) == pytest.approx(float(costs[1]), rel=0.02)


@pytest.mark.parametrize("num_slots", [16, 24])
def test_the_current_placement_changes_names_and_not_costs_of_what_starts_afresh(num_slots: int) -> None:
    load = skewed(8, 1, 20, 16)
    table = torch.cat([torch.arange(16), torch.arange(num_slots - 16)]).expand(20, -1)
    current = Placement(table, 16, 4)  # nowhere as good
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
    # Where all experts are equal and there is nothing to gain, an odd candidate is what it started from.
    assert torch.equal(table_of(even, 1), current.expert_of_slot) or replicas
    begun = current.expert_of_slot
    before = plain_costs(load, begun, topology.num_gpus)
    for candidate in (1, 3, 5, 7):
        table = table_of(warm, candidate)
        counts = [[Counter(row) for row in each.tolist()] for each in (table, begun)]
        assert (counts[0] != counts[1]) == (replicas and candidate % 4 == 3)
        if candidate % 4 == 1:  # exchanges, in units that are a little coarser
            after = plain_costs(load, table, topology.num_gpus)
            assert all(a <= b * (1 + 2**-20) for a, b in zip(after, before, strict=True))
            assert sum(after) < sum(before) or policy == "one slot a GPU"


@pytest.mark.parametrize("num_steps", [1, 3])
@pytest.mark.parametrize("policy", POLICIES)
def test_what_starts_from_the_current_placement_moves_only_what_pays(policy: str, num_steps: int) -> None:
    """Also whole blocks, each of whose experts has its price; in units that are a little coarser."""
    topology, options = POLICIES[policy]
    load = skewed(19, num_steps, 40, 16)
    current, total = placement_of(policy, load.flip(2)), int(load.sum()) / 40
    for part in (0.003, 0.01, 0.03, 0.1):
        problem = Problem(load, topology, PlanOptions(current=current, move_price=part * total, **options))
        table = problem.build(torch.ones(40, dtype=torch.int64))
        costs = [
            plain_costs(load, each, topology.num_gpus, current, part * total)
            for each in (table, current.expert_of_slot)
        ]
        assert all(a <= b * (1 + 2**-20) for a, b in zip(*costs, strict=True))


def test_what_costs_anything_costs_something_in_coarser_units_too() -> None:
    load = skewed(20, 2, 3, 16)
    for price, expected in ((1e-9, [0, 1, 1]), ((0.0, 1e-9), [0, 0, 1]), (1e30, [0, 2**30, 2**30])):
        options = PlanOptions(current=Placement.contiguous(3, 16, 4), move_price=price)
        problem = Problem(load, Topology(2, 2), options)
        assert problem._load.sum((0, 2)).min() > 2**39
        assert problem._terms.load.sum((1, 2)).max() <= 2**30
        assert problem._terms.price.tolist() == [expected] * 3


@pytest.mark.parametrize("num_steps", [1, 3])
@pytest.mark.parametrize("policy", POLICIES)
def test_every_candidate_and_every_plan_keeps_the_rules(policy: str, num_steps: int) -> None:
    """Starting from what keeps them; and from what breaks them, which a layer once kept where it cost no more."""
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
    """Two layers of 16 experts in 4 groups and 32 slots on 2 nodes: 3 groups and 1; and 2 and 2, but one split."""
    three, one = [*range(12), 0, 1, 2, 3], [12, 13, 14, 15] * 4
    split = [*range(8), *range(8)], [*range(8, 16), *range(9, 16), 0]
    return [three + one, split[0] + split[1]]


@pytest.mark.parametrize("num_steps", [1, 3])
def test_from_what_breaks_the_rules_all_candidates_start_afresh(num_steps: int) -> None:
    """Three groups on a node and one on the other were once taken for a placement that keeps them."""
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


def drifted(seed: int, num_steps: int, num_layers: int, num_experts: int) -> tuple[Tensor, Tensor]:
    """Two loads `[T, L, E]`, the second after each expert's share has gone up or down by about a third."""
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(1, num_layers, num_experts, generator=generator).mul(1.2).exp() * 3000
    wobble = (
        torch.randn(2, num_steps, num_layers, num_experts, generator=generator).mul(0.4 if num_steps > 1 else 0).exp()
    )
    drift = torch.randn(num_layers, num_experts, generator=generator).mul(0.3).exp()
    return (mean * wobble[0]).long(), (mean * wobble[1] * drift).long()


MOVING = [(slots, steps) for slots in (32, 48) for steps in (1, 4)]


@pytest.mark.parametrize(("num_slots", "num_steps"), MOVING)
def test_without_a_price_a_plan_is_as_even_as_one_that_starts_afresh(num_slots: int, num_steps: int) -> None:
    """Measured: 1.001 times its cost at most, on the mean, and 1.011 in a layer; what stood had 1.06 to 1.29."""
    old, new = drifted(30, num_steps, 60, 32)
    topology = Topology(2, 4)
    placed = Placement(searched(Problem(old, topology, PlanOptions(num_slots)), 1), 32, 8)
    free, warm = (
        searched(Problem(new, topology, PlanOptions(num_slots, current=current)), 4) for current in (None, placed)
    )
    cost = [torch.tensor(plain_costs(new, table, 8)).double() for table in (free, warm, placed.expert_of_slot)]
    ratio, kept = cost[1] / cost[0], cost[2] / cost[0]
    assert ratio.mean() < 1.003
    assert ratio.max() < 1.02
    assert kept.mean() > 1.05


@pytest.mark.parametrize(("num_slots", "num_steps"), MOVING)
def test_the_dearer_a_move_the_fewer_there_are(num_slots: int, num_steps: int) -> None:
    """No plan costs more than what stands, with its price, and it costs as much only where it is that."""
    old, new = drifted(31, num_steps, 40, 32)
    topology = Topology(2, 4)
    placed = Placement(searched(Problem(old, topology, PlanOptions(num_slots)), 1), 32, 8)
    total = int(new.sum()) / 40
    moved = []
    for part in (0.0, 1e-5, 1e-4, 1e-3, 1e-2, 1e30):
        price = part * total
        table = searched(Problem(new, topology, PlanOptions(num_slots, current=placed, move_price=price)), 4)
        moved.append(int(moved_slots(placed, Placement(table, 32, 8), topology).sum()))
        costs = [plain_costs(new, each, 8, placed, price, 4) for each in (table, placed.expert_of_slot)]
        for layer, (cost, kept) in enumerate(zip(*costs, strict=True)):
            assert cost <= kept
            assert (cost == kept) == torch.equal(table[layer], placed.expert_of_slot[layer])
    assert moved == sorted(moved, reverse=True)
    assert moved[0] > moved[2] > moved[3] > 2 * moved[4]
    assert moved[-1] == 0


@pytest.mark.parametrize("num_slots", [32, 48])
def test_where_moves_have_a_price_a_fresh_candidate_takes_the_names_that_keep_most(num_slots: int) -> None:
    """Its cost would else hide how even it is. Measured: 0.74 and 0.71 of the moves under the names that it had."""
    old, new = drifted(34, 1, 40, 32)
    topology = Topology(2, 4)
    placed = Placement(searched(Problem(old, topology, PlanOptions(num_slots)), 1), 32, 8)
    moved = []
    for options in (PlanOptions(num_slots), PlanOptions(num_slots, current=placed, move_price=1e-3)):
        table = Placement(Problem(new, topology, options).build(torch.zeros(40, dtype=torch.int64)), 32, 8)
        moved.append(int(moved_slots(placed, table, topology).sum()))
    assert moved[1] < 0.82 * moved[0]


@pytest.mark.parametrize("num_slots", [32, 48])
def test_a_pair_of_prices_moves_experts_inside_nodes_rather(num_slots: int) -> None:
    """Measured: from 81 inside and 74 between nodes to 252 and 12; with replicas from 212 and 130 to 665 and 14."""
    old, new = drifted(32, 4, 40, 32)
    topology = Topology(2, 4)
    placed = Placement(searched(Problem(old, topology, PlanOptions(num_slots)), 1), 32, 8)
    total = int(new.sum()) / 40
    moved = {}
    for price in (1e-3 * total, (1e-4 * total, 3e-3 * total), (0.0, 1e30)):
        table = searched(Problem(new, topology, PlanOptions(num_slots, current=placed, move_price=price)), 4)
        moved[price] = moved_slots(placed, Placement(table, 32, 8), topology).sum(0).tolist()
    one, pair, shut = moved.values()
    assert pair[0] > 2 * one[0]
    assert pair[1] < one[1] / 2
    assert shut[1] == 0 < shut[0]


@pytest.mark.parametrize("num_steps", [1, 3])
@pytest.mark.parametrize("policy", POLICIES)
def test_under_a_saturated_price_nothing_moves(policy: str, num_steps: int) -> None:
    """What stands is kept; but replicas that may share a GPU may come together, for a GPU copies what it holds."""
    topology, options = POLICIES[policy]
    load = skewed(15, num_steps, 20, 16)
    shares = options.get("num_slots", 16) > 16 and options.get("allow_shared_replicas", True)
    current = placement_of(policy, load.flip(2))
    for num_candidates in (1, 4, 7):
        saturated = PlanOptions(current=current, move_price=1e30, **options)
        table = searched(Problem(load, topology, saturated), num_candidates)
        assert int(moved_slots(current, Placement(table, 16, topology.num_gpus), topology).sum()) == 0
        assert shares or torch.equal(table, current.expert_of_slot)


def test_replica_counts_follow_the_load_where_that_pays_for_the_moves() -> None:
    """Measured: in 45 of 60 layers where moves are free, in 28 where they are not."""
    old, new = drifted(33, 1, 60, 32)
    topology = Topology(2, 4)
    apart = PlanOptions(48, allow_shared_replicas=False)
    placed = Placement(searched(Problem(old, topology, apart), 1), 32, 8)
    total = int(new.sum()) / 60
    changed = []
    for price in (0.0, 1e-3 * total, 1e30):
        options = PlanOptions(48, current=placed, move_price=price, allow_shared_replicas=False)
        problem = Problem(new, topology, options)
        only_warm = problem.costs(torch.tensor([1, 3]))
        table = problem.polish(problem.build(torch.tensor([1, 3])[only_warm.argmin(0)]))
        changed.append(int((Placement(table, 32, 8).replicas != placed.replicas).any(1).sum()))
    assert changed[0] >= changed[1] > 15
    assert changed[2] == 0


# --- where the current placement may not stay -------------------------------------------------------------------

BOUND = ["replicas apart", "groups on nodes", "groups on nodes with replicas", "blocks over GPUs", "blocks in GPUs"]


@pytest.mark.parametrize("num_steps", [1, 3])
@pytest.mark.parametrize("policy", BOUND)
def test_what_must_move_costs_no_more_than_any_candidate(policy: str, num_steps: int) -> None:
    """Also where moves cost more than 2^41 by far: all candidates were alike then, and the polish knew no price."""
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
    assert moved[3] <= moved[4] * 1.1  # a total for a move is as good as never


@pytest.mark.parametrize("num_steps", [1, 3])
@pytest.mark.parametrize("policy", BOUND)
def test_what_must_move_is_settled_although_it_costs_more_than_what_may_not_stay(policy: str, num_steps: int) -> None:
    """A fresh candidate was only named anew where its moves cost more than staying would."""
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


def test_a_plan_that_breaks_the_rules_is_not_given_out() -> None:
    """None is known to; a fault of the search would else be found by a router, or by the exchange of experts."""
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
        with pytest.raises(DistplbError, match=f"^internal: layer 1 of the plan must have {rule}, and does not; "):
            problem.polish(table)
    both = POLICIES["groups on nodes with replicas"][1] | {"allow_shared_replicas": False}
    rule = Problem(skewed(24, 1, 3, 16), Topology(2, 4), PlanOptions(**both))._policy.rule
    assert rule == "2 whole groups on each of 2 nodes, and replicas of an expert on different GPUs"


# --- steps and time ---------------------------------------------------------------------------------------------


def hot_in_company(seed: int, num_steps: int, company: int) -> Tensor:
    """`[T, 12, 32]`: in each step the experts of some companies have eight times as much; on the mean all are equal."""
    generator = torch.Generator().manual_seed(seed)
    hot = torch.rand(num_steps, 12, 32 // company, generator=generator) < 0.25
    tokens = torch.where(hot, 800.0, 100.0).repeat_interleave(company, 2)
    member = torch.stack([torch.randperm(32, generator=torch.Generator().manual_seed(layer)) for layer in range(12)])
    return torch.poisson(tokens.gather(2, member.expand(num_steps, -1, -1)), generator=generator).long()


@pytest.mark.parametrize(("company", "bound"), [(2, 0.92), (4, 0.72), (8, 0.25)])
def test_experts_that_are_hot_in_the_same_steps_are_kept_apart(company: int, bound: float) -> None:
    """Planned on 32 steps, judged on 128 others.

    Measured: 0.88, 0.64 and 0.16 of the excess that planning on their sum leaves.
    """
    past, future = hot_in_company(1, 32, company), hot_in_company(2, 128, company)
    mean, excess = int(future.sum()) / 8, []
    for load in (past.sum(0, keepdim=True), past):
        for num_candidates in (1, 4):
            table = searched(Problem(load, Topology(1, 8)), num_candidates)
            excess.append(sum(plain_costs(future, table, 8)) / mean - 1)
    assert max(excess[2:]) < bound * min(excess[:2])


def test_one_step_without_a_current_placement_is_never_settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its plan is that of steps 1 to 9, or experts in order where these do as well."""

    def refuse(*_: object, **__: object) -> Tensor:
        raise AssertionError("settled")

    for name, (topology, options) in POLICIES.items():
        load, policy = skewed(16, 1, 10, 16), Problem(skewed(16, 1, 10, 16), topology, PlanOptions(**options))._policy
        monkeypatch.setattr(type(policy), "settle", refuse)
        problem = Problem(load, topology, PlanOptions(seed=4, **options))
        assert problem._terms is None
        candidate, weight = torch.full((10,), 3), problem._weight
        table = problem.build(candidate)
        if problem._apart is None:
            assert torch.equal(table, policy.search(weight, layer=torch.arange(10), candidate=candidate, seed=4)), name
        finished, even = policy.polish(weight, table), problem._uneven(table)
        expected = torch.where(torch.isin(torch.arange(10), even)[:, None], finished, table)
        in_order = contiguous(weight, topology, options.get("num_slots", 16))
        if keeps_rules(name, in_order[0].tolist(), list(range(16))):
            costs = zip(*(plain_costs(load, each, topology.num_gpus) for each in (in_order, expected)), strict=True)
            is_kept = torch.tensor([kept <= other for kept, other in costs])
            assert not is_kept.all() or name == "one slot a GPU"
            expected = torch.where(is_kept[:, None], in_order, expected)
        assert torch.equal(problem.polish(table), expected), name
    with pytest.raises(AssertionError, match="settled"):
        Problem(skewed(16, 2, 10, 16), Topology(1, 4)).build(torch.zeros(10, dtype=torch.int64))


TILES = TimeCurve((0, 1000, 2000, 20000), (0, 50000, 60000, 2000000))  # a step, then ten times as steep


@pytest.mark.parametrize("num_slots", [16, 24])
@pytest.mark.parametrize("num_steps", [1, 3])
def test_with_a_time_curve_a_plan_balances_time(num_slots: int, num_steps: int) -> None:
    """As if time had been counted, and a move priced at the time of its tokens.

    Measured: 0.92 to 0.97 of the time that a plan on tokens takes.
    """
    load = torch.randn(num_steps, 30, 16, generator=torch.Generator().manual_seed(17)).mul(0.7).exp().mul(1200).long()
    time, topology = TILES.time(load), Topology(2, 2)
    current = Placement(random_table(random.Random(17), 30, 16, num_slots), 16, 4)
    for price in (0.0, 50.0, (0.25, 600.0)):
        pair = price if isinstance(price, tuple) else (price, price)
        plain = PlanOptions(num_slots, current=current, move_price=tuple(each * 100 for each in pair))
        curved = PlanOptions(num_slots, current=current, move_price=price, time_curve=TILES)
        one, other = Problem(time, topology, plain), Problem(load, topology, curved)
        assert torch.equal(one.costs(torch.arange(4)), other.costs(torch.arange(4)))
        assert torch.equal(searched(one, 4), searched(other, 4))
    tables = [searched(Problem(load, topology, PlanOptions(num_slots, time_curve=each)), 4) for each in (None, TILES)]
    costs = [[sum(plain_costs(what, table, 4)) for table in tables] for what in (load, time)]
    assert costs[0][0] < 0.98 * costs[0][1]
    assert costs[1][1] < 0.98 * costs[1][0]


@pytest.mark.parametrize("num_slots", [16, 24])
@pytest.mark.parametrize("num_steps", [1, 3])
def test_a_linear_curve_gives_the_plan_of_none(num_slots: int, num_steps: int) -> None:
    """To the bit for a power of two where prices or replicas make units fine; else up to noise and rounding.

    Measured: the cost, in tokens, within 0.0024.
    """
    load, topology = skewed(18, num_steps, 30, 16) * 3, Topology(2, 2)
    current = Placement(random_table(random.Random(18), 30, 16, num_slots), 16, 4)

    def planned(curve: TimeCurve | None, candidates: int, **options: object) -> Tensor:
        return searched(Problem(load, topology, PlanOptions(num_slots, time_curve=curve, **options)), candidates)

    priced = [{"current": current, "move_price": price} for price in (40.0, (0.3, 80.0), 1e30)]
    for options in ({}, {"current": current}, *priced):
        expected = planned(None, 4, **options)
        fine = num_slots > 16 or "move_price" in options
        for slope in (1.0, 1024.0) if fine else (1.0,):
            assert torch.equal(planned(TimeCurve.linear(slope), 4, **options), expected)
        # Nothing random, nothing rounded.
        if not fine:
            assert torch.equal(planned(TimeCurve.linear(1000.0), 1, **options), planned(None, 1, **options))
        for slope in (0.7, 2.7, 1234.5):
            current_and_price = options.get("current"), options.get("move_price", 0.0), 2
            table = planned(TimeCurve.linear(slope), 4, **options)
            ratio = sum(plain_costs(load, table, 4, *current_and_price)) / sum(
                plain_costs(load, expected, 4, *current_and_price)
            )
            assert abs(ratio - 1) < 0.004


# --- refusals ---------------------------------------------------------------------------------------------------


def test_what_the_options_refuse_the_problem_refuses() -> None:
    load = torch.ones(1, 2, 4, dtype=torch.int64)
    with pytest.raises(DistplbError, match="4 slots cannot be spread evenly over 3 GPUs"):
        Problem(load, Topology(3, 1))
    with pytest.raises(
        DistplbError, match="engine 'warp' is not there; pass one of reference, cpu, cuda, or engine=None"
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
    assert f"(layers, experts, slots, GPUs) = {sizes}, the load and topology (2, 4, 4, 2)" in str(refused.value)
    assert "pass the placement in force of the same model" in str(refused.value)
