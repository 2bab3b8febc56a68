"""The planning problem: what candidates cost, the table behind each, the finish on it, and what is never lost by them.

`build` and `polish` take and return tables `[L, P]`; a `Placement` is made of the last one only.
Shapes: T steps, L layers, E experts, P slots, M GPUs, G slots on each GPU, B groups, K candidates.
"""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from distplb import DistplbError, Placement, Topology, balanced_packing
from distplb.packing.steps import pack_loads
from distplb.planning.options import SearchOptions
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


def plain_costs(load: Tensor, table: Tensor, num_gpus: int) -> list[int]:
    """`[L]`: the fullest GPU's tokens, added up over the steps; replicas share by whole division.

    With replicas in the units of the search: a layer's load is doubled as long as its total stays below 2^40.
    """
    steps, costs = load.tolist(), []
    for layer, row in enumerate(table.tolist()):
        size, factor, total = len(row) // num_gpus, 1, sum(sum(step[layer]) for step in steps)
        while len(row) > load.shape[2] and 0 < 2 * factor * total <= 2**40:
            factor *= 2
        count = {expert: row.count(expert) for expert in row}
        gpus = [row[at : at + size] for at in range(0, len(row), size)]
        of_steps = [max(sum(factor * step[layer][e] // count[e] for e in gpu) for gpu in gpus) for step in steps]
        costs.append(sum(of_steps))
    return costs


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
    problem = Problem(load, topology, SearchOptions(**options))
    costs = problem.costs(torch.arange(6))
    assert costs.dtype == torch.int64
    tables = [Problem(load, topology, SearchOptions(**options)).build(torch.full((5,), k)) for k in range(6)]
    assert costs.tolist() == [plain_costs(load, table, topology.num_gpus) for table in tables]
    assert (costs[:, 3] == 0).all()
    for table in tables:
        assert table.dtype == torch.int64
        Placement(table, 16, topology.num_gpus)  # checks itself
    if policy in ("flat", "replicas", "groups on nodes with replicas"):
        assert (costs[1:] != costs[0]).any()


@pytest.mark.parametrize("policy", POLICIES)
def test_a_candidate_is_the_same_in_any_company_and_whatever_was_met_before(policy: str) -> None:
    """`costs` keeps the cheapest table of each layer; `build` takes it from there, and must not be told apart."""
    topology, options = POLICIES[policy]
    load, candidates = skewed(2, 3, 4, 16), [7, 0, 3, 2**22 - 1]

    def fresh() -> Problem:
        return Problem(load, topology, SearchOptions(seed=5, **options))

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
    load, options = skewed(3, 2, 20, 16), SearchOptions(num_slots=24)
    problem = Problem(load, Topology(1, 4), options)
    costs = torch.cat([problem.costs(torch.tensor(part)) for part in ([3, 1], [0], [2, 4, 5])])
    order = torch.tensor([3, 1, 0, 2, 4, 5])
    cheapest = order[costs.argmin(0)]
    assert len(cheapest.unique()) > 2
    assert torch.equal(problem.build(cheapest), Problem(load, Topology(1, 4), options).build(cheapest))


def test_the_cheapest_tables_that_were_met_are_not_searched_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The root of a plan would else spend the time of a candidate more."""
    problem = Problem(skewed(4, 1, 20, 16), Topology(1, 4), SearchOptions(num_slots=24))
    costs = torch.cat([problem.costs(torch.arange(4) + first) for first in (0, 4)])
    wanted = problem.build(costs.argmin(0))
    monkeypatch.delattr(Problem, "_candidates")
    assert torch.equal(problem.build(costs.argmin(0)), wanted)
    with pytest.raises(AttributeError):
        problem.build(costs.argmax(0))


@pytest.mark.parametrize("policy", POLICIES)
def test_a_layer_alone_is_planned_as_among_others(policy: str) -> None:
    """Rows are worked on together, and each must stop by itself."""
    topology, options = POLICIES[policy]
    load = rows_of_every_kind(4, 16)[None]
    together = Problem(load, topology, SearchOptions(**options))
    plain = together.build(torch.zeros(load.shape[1], dtype=torch.int64))
    polished = together.polish(plain)
    for layer in range(load.shape[1]):
        alone = Problem(load[:, layer : layer + 1], topology, SearchOptions(**options))
        table = alone.build(torch.zeros(1, dtype=torch.int64))
        assert torch.equal(table[0], plain[layer])
        assert torch.equal(alone.polish(table)[0], polished[layer])


def test_the_seed_changes_every_candidate_but_the_plain_one() -> None:
    load = skewed(3, 1, 40, 24)
    for num_slots in (24, 32):
        one, other, again = (
            Problem(load, Topology(1, 4), SearchOptions(num_slots=num_slots, seed=seed)) for seed in (0, 1, 0)
        )
        plain, noisy = torch.zeros(40, dtype=torch.int64), torch.ones(40, dtype=torch.int64)
        assert torch.equal(one.build(plain), other.build(plain))
        assert not torch.equal(one.build(noisy), other.build(noisy))
        assert torch.equal(one.build(noisy), again.build(noisy))


@pytest.mark.parametrize("policy", POLICIES)
def test_the_engines_reference_and_cpu_make_the_same_tables(policy: str) -> None:
    topology, options = POLICIES[policy]
    load = torch.stack([rows_of_every_kind(seed, 16)[::9] for seed in range(2)])
    slow, fast = (Problem(load, topology, SearchOptions(engine=name, **options)) for name in ("reference", "cpu"))
    assert (slow.engine_name, fast.engine_name) == ("reference", "cpu")
    assert torch.equal(slow.costs(torch.arange(3)), fast.costs(torch.arange(3)))
    for candidate in range(3):
        table = slow.build(torch.full((len(load[0]),), candidate))
        assert torch.equal(table, fast.build(torch.full((len(load[0]),), candidate)))
        assert torch.equal(slow.polish(table), fast.polish(table))


def test_nodes_times_gpus_is_all_that_the_search_needs_of_a_topology_without_groups() -> None:
    load = skewed(5, 2, 3, 16)
    for options in (SearchOptions(), SearchOptions(num_slots=24)):
        one, other = (searched(Problem(load, topology, options), 4) for topology in (Topology(2, 2), Topology(1, 4)))
        assert torch.equal(one, other)


# --- polish -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_steps", [1, 6])
@pytest.mark.parametrize("num_slots", [12, 18])
def test_polish_never_costs_more_than_what_it_was_given(num_slots: int, num_steps: int) -> None:
    """It works on the sum of the steps; where that costs more in the steps themselves, the layer is left."""
    random_, load = random.Random(4), skewed(4, num_steps, 60, 12)
    problem = Problem(load, Topology(1, 3), SearchOptions(num_slots=num_slots))
    given = random_table(random_, 60, 12, num_slots)
    before = plain_costs(load, given, 3)
    polished = problem.polish(given)
    after = plain_costs(load, polished, 3)
    assert all(a <= b for a, b in zip(after, before, strict=True))
    assert sum(after) < sum(before)
    alone = Problem(load.sum(0)[None], Topology(1, 3), SearchOptions(num_slots=num_slots)).polish(given)
    dearer = [a > b for a, b in zip(plain_costs(load, alone, 3), before, strict=True)]
    assert any(dearer) == (num_steps > 1)
    for layer, was_dearer in enumerate(dearer):
        assert torch.equal(polished[layer], given[layer] if was_dearer else alone[layer])


@pytest.mark.parametrize("policy", POLICIES)
def test_polish_never_costs_more_than_a_candidate_under_any_policy(policy: str) -> None:
    topology, options = POLICIES[policy]
    for num_steps in (1, 3):
        load = torch.stack([rows_of_every_kind(seed, 16) for seed in range(num_steps)])
        problem = Problem(load, topology, SearchOptions(**options))
        for candidate in (0, 1):
            table = problem.build(torch.full((load.shape[1],), candidate))
            after = plain_costs(load, problem.polish(table), topology.num_gpus)
            before = plain_costs(load, table, topology.num_gpus)
            assert all(a <= b for a, b in zip(after, before, strict=True))


@pytest.mark.parametrize("policy", POLICIES)
def test_neither_load_nor_table_is_written_to(policy: str) -> None:
    topology, options = POLICIES[policy]
    load = skewed(6, 2, 3, 16)
    table = random_table(random.Random(6), 3, 16, options.get("num_slots", 16))
    options = SearchOptions(current=Placement(table, 16, topology.num_gpus), **options)
    problem = Problem(load, topology, options)
    given = problem.build(torch.zeros(3, dtype=torch.int64))
    before, was = load.clone(), given.clone()
    problem.polish(given)
    searched(problem, 4)
    assert torch.equal(load, before)
    assert torch.equal(given, was)
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
            found, floor = (pack_loads(load, each, num_gpus).amax(1) for each in (table, packed))
            assert (found <= floor).all(), (num_experts, num_gpus, num_candidates, load[found > floor].tolist())
            lighter += int((found < floor).sum())
    assert lighter > 5


@pytest.mark.parametrize("num_slots", [12, 18])
def test_layers_of_more_tokens_than_the_search_counts_with_are_planned_as_their_shape_is(num_slots: int) -> None:
    load = skewed(7, 3, 20, 12)
    large = torch.cat([load, load << 22, load << 32], 1)  # [T, 3L, E]: as it is, beyond 2^30, beyond 2^40
    assert large[:, :20].sum((0, 2)).max() < 2**30 < large[:, 20:40].sum((0, 2)).min()
    assert large[:, 20:40].sum((0, 2)).max() < 2**40 < large[:, 40:].sum((0, 2)).min()
    found = searched(Problem(large, Topology(1, 3), SearchOptions(num_slots=num_slots)), 1)
    assert torch.equal(found[:20], found[20:40])
    assert torch.equal(found[:20], found[40:])


def test_more_candidates_never_cost_more_and_sometimes_less() -> None:
    load = skewed(8, 4, 30, 16)
    for options in ({}, {"num_slots": 24}, {"num_slots": 24, "num_groups": 4}):
        problem = Problem(load, Topology(2, 2), SearchOptions(**options))
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
        options = SearchOptions(num_slots=num_slots, current=Placement(current, num_experts, num_gpus))
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
    table = searched(Problem(load, Topology(1, 2), SearchOptions(current=current)), 2)
    assert table[0].tolist() == [3, 0, 2, 1]
    assert plain_costs(load, table, 2) == [5, 9]
    assert int((table[1] != current.expert_of_slot[1]).sum()) == 2


@pytest.mark.parametrize("policy", POLICIES)
def test_a_layer_without_tokens_stays(policy: str) -> None:
    topology, options = POLICIES[policy]
    table = random_table(random.Random(7), 2, 16, options.get("num_slots", 16))
    options = SearchOptions(current=Placement(table, 16, topology.num_gpus), **options)
    load = torch.zeros(2, 2, 16, dtype=torch.int64)
    assert torch.equal(searched(Problem(load, topology, options), 2), table)


@pytest.mark.parametrize("num_slots", [16, 24])
def test_the_current_placement_changes_names_and_not_costs(num_slots: int) -> None:
    load = skewed(8, 1, 20, 16)
    table = torch.cat([torch.arange(16), torch.arange(num_slots - 16)]).expand(20, -1)
    current = Placement(table, 16, 4)  # nowhere as good
    free, bound = (
        searched(Problem(load, Topology(1, 4), SearchOptions(num_slots=num_slots, current=each)), 3)
        for each in (None, current)
    )
    assert gpu_contents(bound, 4) == gpu_contents(free, 4)
    moved = [int((each != table).sum()) for each in (bound, free)]
    assert moved[0] < moved[1]


# --- refusals ---------------------------------------------------------------------------------------------------


def test_what_the_options_refuse_the_problem_refuses() -> None:
    load = torch.ones(1, 2, 4, dtype=torch.int64)
    with pytest.raises(DistplbError, match="4 slots cannot be spread evenly over 3 GPUs"):
        Problem(load, Topology(3, 1))
    with pytest.raises(DistplbError, match="engine 'warp' is not there; pass one of reference, cpu, cuda, or None"):
        Problem(load, Topology(1, 2), SearchOptions(engine="warp"))
    assert Problem(load, Topology(1, 2), SearchOptions(num_slots=4, engine="reference")).engine_name == "reference"


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
        Problem(torch.ones(1, 2, 4, dtype=torch.int64), Topology(1, 2), SearchOptions(current=current))
    assert f"(layers, experts, slots, GPUs) = {found}, the load and topology (2, 4, 4, 2)" in str(refused.value)
    assert "pass the placement in force of the same model" in str(refused.value)
