"""A plan is the same on every rank and for every number of ranks; what is wrong on one is told by all.

Shapes: T steps, L layers, E experts, P slots.
"""

from __future__ import annotations

import importlib.util
import json
import random
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranks import errors_on_ranks, on_ranks
from torch import Tensor

from distplb import DistplbError, Placement, Topology, imbalance, lower_bound, plan, planner
from distplb.comm.base import Comm, WorldOfOne
from distplb.comm.torchdist import TorchComm
from distplb.core.price import TimeCurve
from distplb.planning.options import SearchOptions
from distplb.planning.plan import Planning, plan_in_stages
from distplb.planning.problem import Problem

BASELINES = Path(__file__).parents[2] / "benchmarks" / "shared" / "baselines.py"
_spec = importlib.util.spec_from_file_location("baselines", BASELINES)
baselines = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(baselines)

STEPS, LAYERS, EXPERTS = 3, 5, 32


def skewed_load(seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    hot = torch.randn(1, LAYERS, EXPERTS, generator=generator).mul(1.2).exp()  # [1, L, E]
    wobble = torch.randn(STEPS, LAYERS, EXPERTS, generator=generator).mul(0.5).exp()
    return (1000 * hot * wobble).long()


def random_placement(num_slots: int) -> Placement:
    """Every expert, and some more than once, on 8 GPUs."""
    random_ = random.Random(num_slots)
    spare = [random_.choices(range(EXPERTS), k=num_slots - EXPERTS) for _ in range(LAYERS)]
    return Placement(torch.tensor([random_.sample([*range(EXPERTS), *more], num_slots) for more in spare]), EXPERTS, 8)


# --- on any number of ranks -------------------------------------------------------------------------------------

CURVE = TimeCurve((0, 200, 400, 4000), (0, 900, 1000, 30000))
PLANS: dict[str, dict[str, Any]] = {
    "plain": {"num_candidates": 1},
    "fewer candidates than ranks": {"num_candidates": 3},
    "many candidates": {"num_candidates": 64},
    "current": {"num_candidates": 8, "current": Placement.contiguous(LAYERS, EXPERTS, 8)},
    "replicas": {"num_candidates": 6, "num_slots": 48},
    "replicas apart": {"num_candidates": 6, "num_slots": 80, "allow_shared_replicas": False},
    "current with replicas": {"num_candidates": 6, "num_slots": 48, "current": random_placement(48)},
    "groups": {"num_candidates": 6, "num_groups": 8},
    "groups with replicas": {"num_candidates": 6, "num_groups": 4, "num_slots": 64},
    "current with groups": {"num_candidates": 6, "num_groups": 4, "num_slots": 48, "current": random_placement(48)},
    "permute": {"num_candidates": 6, "mode": "permute"},
    "blocks over GPUs": {"num_candidates": 6, "mode": "permute", "num_groups": 4},
    "blocks in GPUs": {"num_candidates": 6, "mode": "permute", "num_groups": 16},
    "classes": {"num_candidates": 6, "slot_class": torch.tensor([0, 1, 2, 3] * 8)},
    "two slots of a class": {"num_candidates": 6, "slot_class": torch.tensor([0, 1, 1, 2] * 8)},
    "uneven classes": {"num_candidates": 6, "slot_class": torch.arange(32) % 3, "current": random_placement(32)},
    "a price": {"num_candidates": 6, "current": random_placement(32), "move_price": 120.5},
    "a pair of prices": {"current": random_placement(32), "move_price": (0.25, 400.0)},
    "a price with replicas": {"num_slots": 48, "current": random_placement(48), "move_price": (10.0, 90.0)},
    "a price with groups": {"num_groups": 4, "num_slots": 48, "current": random_placement(48), "move_price": 50.0},
    "a price with classes": {"slot_class": torch.arange(32) % 3, "current": random_placement(32), "move_price": 50.0},
    "a curve": {"num_candidates": 3, "time_curve": CURVE},
    "a curve with replicas and a price": {
        "num_slots": 48,
        "current": random_placement(48),
        "move_price": (2.0, 30.0),
        "time_curve": CURVE,
        "num_candidates": 7,
    },
    "one step": {"steps": 1, "num_candidates": 6},
    "one step with a price": {"steps": 1, "current": random_placement(32), "move_price": 60.0},
    "one step from replicas": {"steps": 1, "num_slots": 48, "current": random_placement(48)},
    "even": {"load": torch.ones_like},
    "even, with replicas and groups": {"load": torch.ones_like, "num_slots": 64, "num_groups": 4},
    "no tokens": {"load": torch.zeros_like},
    "some steps have no tokens": {"load": lambda load: load * (torch.arange(len(load)) % 2)[:, None, None]},
}


def planned(whole: Tensor, name: str, comm: Comm | None = None) -> Placement:
    """One of the plans above, from this rank's counts."""
    options = {option: value for option, value in PLANS[name].items() if option not in ("steps", "load")}
    load = PLANS[name].get("load", lambda load: load)(whole[: PLANS[name].get("steps")])
    return plan(load, Topology(2, 4), comm=comm, seed=7, **options)


def shared_plans(whole: Tensor) -> dict[str, list[list[int]]]:
    """Plan from counts that are spread unevenly over the ranks; their sum is `whole`."""
    rank, size = dist.get_rank(), dist.get_world_size()
    mine = whole // size if rank else whole - (size - 1) * (whole // size)
    comm = TorchComm()
    return {name: planned(mine, name, comm).expert_of_slot.tolist() for name in PLANS}


@pytest.fixture(scope="module")
def plans_of_ranks() -> dict[int, list[dict[str, list[list[int]]]]]:
    """By number of ranks, each rank's plans."""
    return {ranks: on_ranks(ranks, shared_plans, skewed_load()) for ranks in (1, 2, 4)}


@pytest.mark.parametrize("name", PLANS)
def test_plans_of_1_2_and_4_ranks_are_equal_to_the_bit(
    name: str, plans_of_ranks: dict[int, list[dict[str, list[list[int]]]]]
) -> None:
    alone = planned(skewed_load(), name).expert_of_slot.tolist()
    for ranks, found in plans_of_ranks.items():
        assert [plans[name] for plans in found] == [alone] * ranks


def replayed(record: str) -> int:
    """The digest of the plan that a record tells of, in a process that knows nothing else."""
    told = json.loads(record)
    options = {name: value for name, value in told["options"].items() if value is not None}
    if "time_curve" in options:
        options["time_curve"] = TimeCurve(*(tuple(points) for points in options["time_curve"]))
    if "move_price" in options:
        options["move_price"] = tuple(options["move_price"])
    if "current" in options:
        options["current"] = Placement(torch.tensor(options["current"]), EXPERTS, 8)
    return plan(torch.tensor(told["load"]), Topology(*told["topology"]), **options).digest()


def test_a_plan_is_replayed_from_its_load_and_options() -> None:
    """What was measured comes back from a text to the last bit, prices and curves included."""
    start = random_placement(48)
    price, curve = (1 / 3, 1e3 * 2**0.5), TimeCurve.through([100, 1000, 4000], [1e-6 / 3, 2e-5 / 7, 1e-4 / 9])
    fresh = {"num_slots": 48, "num_candidates": 2, "seed": 11, "time_curve": curve}
    warm = {"num_slots": 48, "current": start, "seed": 12, "move_price": price, "time_curve": curve}
    load, records, digests = skewed_load(5), [], []
    for options in (fresh, warm):
        digests.append(plan(load, Topology(2, 4), **options).digest())
        told = options | {"time_curve": (curve.tokens, curve.nanoseconds)}
        if "current" in options:
            told["current"] = start.expert_of_slot.tolist()
        records.append(json.dumps({"load": load.tolist(), "topology": (2, 4), "options": told}))
    assert [on_ranks(1, replayed, record) for record in records] == [[digest] for digest in digests]
    assert digests[1] != start.digest()


def test_a_plan_is_better_than_contiguous_on_steps_it_has_not_seen() -> None:
    generator = torch.Generator().manual_seed(3)
    rate = torch.randn(LAYERS, EXPERTS, generator=generator).exp() * 300
    seen, unseen = (torch.poisson(rate.expand(8, -1, -1), generator=generator) for _ in range(2))
    topology = Topology(1, 4)
    planned = imbalance(unseen, plan(seen, topology)).mean()
    static = imbalance(unseen, Placement.contiguous(LAYERS, EXPERTS, 4)).mean()
    assert planned - 1 < (static - 1) / 4
    assert float(planned) >= float(lower_bound(unseen, topology, EXPERTS).mean())


@pytest.mark.parametrize("move_price", [0.0, 2.0, 1e30])
def test_a_current_placement_that_takes_groups_apart_is_not_kept(move_price: float) -> None:
    """It was, where no plan cost less: what is in force was taken for something that may stay. Here its GPUs are as
    full as they can be, and every block holds experts of two groups."""
    load, current = torch.tensor([[4, 6, 4, 6, 1, 3, 1, 3]]), Placement(torch.tensor([[0, 3, 4, 7, 1, 2, 5, 6]]), 8, 2)
    options = {"num_groups": 4, "mode": "permute", "current": current, "move_price": move_price}
    found = plan(load, Topology(1, 2), **options).expert_of_slot[0].tolist()
    assert [found[at] // 2 == found[at + 1] // 2 for at in range(0, 8, 2)] == [True] * 4
    # Pairs that stand on two GPUs: one of each must move, and no pair can be found to leave 14 tokens each.
    assert sum(load[0, found[:4]].tolist()) == 14
    assert sum(expert in current.expert_of_slot[0, :4] for expert in found[:4]) == 2


@pytest.mark.parametrize("move_price", [0.0, 2.0, 1e30])
def test_a_current_placement_whose_replicas_share_a_gpu_is_not_kept_where_they_must_not(move_price: float) -> None:
    """It was, where no plan cost less."""
    load, current = torch.tensor([[6, 6, 6, 0]]), Placement(torch.tensor([[0, 0, 1, 1, 2, 3]]), 4, 3)
    options = {"num_slots": 6, "allow_shared_replicas": False, "current": current, "move_price": move_price}
    found = plan(load, Topology(1, 3), **options).expert_of_slot[0].tolist()
    assert [found[at] != found[at + 1] for at in range(0, 6, 2)] == [True] * 3
    assert set(found) == {0, 1, 2, 3}


def test_the_seed_and_nothing_global_decides() -> None:
    load = torch.randint(500, 1500, (8, EXPERTS), generator=torch.Generator().manual_seed(5))
    torch.manual_seed(0)
    one = plan(load, Topology(1, 8), seed=1, num_candidates=8)
    torch.manual_seed(1)
    assert plan(load, Topology(1, 8), seed=1, num_candidates=8) == one
    assert plan(load, Topology(1, 8), seed=2, num_candidates=8) != one
    # Of one candidate nothing is random.
    assert plan(load, Topology(1, 8), seed=1) == plan(load, Topology(1, 8), seed=2)


def collective_calls() -> list[tuple[str, tuple[int, ...]]]:
    """What a plan sends, call by call."""
    calls = []

    class Counting(TorchComm):
        def all_reduce_sum(self, tensor: Tensor) -> None:
            calls.append(("sum", tuple(tensor.shape)))
            super().all_reduce_sum(tensor)

        def all_reduce_min(self, tensor: Tensor) -> None:
            calls.append(("min", tuple(tensor.shape)))
            super().all_reduce_min(tensor)

        def broadcast(self, tensor: Tensor, root: int) -> None:
            calls.append(("broadcast", tuple(tensor.shape)))
            super().broadcast(tensor, root)

    for options in ({}, {"num_slots": 48, "num_groups": 4, "current": random_placement(48)}):
        plan(skewed_load(), Topology(2, 4), comm=Counting(), num_candidates=4, **options)
    return calls


def test_a_plan_costs_a_header_and_three_collectives() -> None:
    for calls in on_ranks(2, collective_calls):
        assert len(calls) == 8
        for (header, *data), num_slots in ((calls[:4], EXPERTS), (calls[4:], 48)):
            assert header[0] == "min"
            assert header[1][0] < 40
            assert data == [("sum", (STEPS, LAYERS, EXPERTS)), ("min", (LAYERS,)), ("broadcast", (LAYERS, num_slots))]


WRONG_ENTRY = torch.zeros(STEPS, LAYERS, EXPERTS, dtype=torch.bool)
WRONG_ENTRY[1, 2, 3] = True
# What the last of three ranks does otherwise than the others, and what all of them are told.
ODD: dict[str, tuple[dict[str, Any], str]] = {
    "seed": ({"seed": 3}, "ranks disagree on seed: 0 on one, 3 on another"),
    "candidates": ({"num_candidates": 5}, "ranks disagree on num_candidates: 4 on one, 5 on another"),
    "slots": ({"num_slots": 48}, "ranks disagree on num_slots: 32 on one, 48 on another"),
    "groups": ({"num_groups": 4}, "ranks disagree on num_groups: -1 on one, 4 on another"),
    "classes": ({"slot_class": torch.arange(32)}, "ranks disagree on slot_class (digest): -1 on one"),
    "current": (
        {"current": Placement.contiguous(LAYERS, EXPERTS, 4)},
        "ranks disagree on the current placement (digest): -1 on one",
    ),
    "sharing": ({"allow_shared_replicas": False}, "ranks disagree on allow_shared_replicas: 0 on one, 1 on another"),
    "mode": ({"mode": "permute"}, "ranks disagree on mode (permute is 1): 0 on one, 1 on another"),
    "topology": ({"topology": Topology(2, 2)}, "ranks disagree on num_nodes: 1 on one, 2 on another"),
    "experts": ({"load": skewed_load()[:, :, :16]}, "ranks disagree on the load's experts: 16 on one, 32 on another"),
    "steps": ({"load": skewed_load()[:2]}, "ranks disagree on the load's steps: 2 on one, 3 on another"),
    "layers": ({"load": skewed_load()[:, :4]}, "ranks disagree on the load's layers: 4 on one, 5 on another"),
    "NaN": (
        {"load": skewed_load().double().masked_fill(WRONG_ENTRY, float("nan"))},
        "rank 2: load has nan for expert 3 of layer 2 in step 1 (1 such); counts must be finite: check the counter",
    ),
    "negative": (
        {"load": skewed_load().masked_fill(WRONG_ENTRY, -5)},
        "rank 2: load has -5 for expert 3 of layer 2 in step 1 (1 such); counts must be non-negative: check the",
    ),
    "type": ({"load": "no tensor"}, "rank 2: "),
    "replicas in mode permute": (
        {"num_slots": 48, "mode": "permute"},
        "rank 2: num_slots is 48 for 32 experts, and mode 'permute' knows no replicas; pass mode='remap'",
    ),
}
# The same, where all ranks start from what is in force, and moves have a price.
PRICED: dict[str, tuple[dict[str, Any], str]] = {
    "price": (
        {"move_price": 3.5},
        "ranks disagree on move_price inside a node (in 2^-16): 163840 on one, 229376 on another",
    ),
    "pair": (
        {"move_price": (2.5, 3.5)},
        "ranks disagree on move_price between nodes (in 2^-16): 163840 on one, 229376",
    ),
    "the last bit of the price": ({"move_price": 2.5 + 2**-50}, "ranks disagree on move_price (digest): "),
    "no price": ({"move_price": 0.0}, "ranks disagree on move_price inside a node (in 2^-16): 0 on one, 163840"),
    "no current": ({"move_price": 0.0, "current": None}, "ranks disagree on the current placement (digest): -1 on one"),
    "curve": ({"time_curve": CURVE}, "ranks disagree on time_curve (digest): -1 on one, "),
    "no number": ({"move_price": float("nan")}, "rank 2: move_price is nan; pass tokens of the window for each moved "),
    "a price of nothing": ({"current": None}, "rank 2: move_price is 2.5 without current; pass the placement in force"),
}
# What all ranks do alike.
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "slots": (
        {"topology": Topology(1, 5)},
        "32 slots cannot be spread evenly over 5 GPUs (1 nodes × 5); pass num_slots=35, 3 more than experts",
    ),
    "candidates": ({"num_candidates": 0}, "num_candidates is 0; pass 1 to 2^22"),
    "engine": ({"engine": "magic"}, "engine 'magic' is not there; pass one of reference, cpu, cuda, or engine=None"),
}


CASES = {"odd": ODD, "priced": PRICED, "wrong": WRONG}


def refusals() -> dict[str, str]:
    """The errors of one plan after another; a rank left waiting would take the next one's calls for its own."""
    comm, told = TorchComm(), {}
    for kind, cases in CASES.items():
        for case, (changed, _) in cases.items():
            options: dict[str, Any] = {"load": skewed_load(), "topology": Topology(1, 4), "num_candidates": 4}
            if kind == "priced":
                options |= {"current": Placement.contiguous(LAYERS, EXPERTS, 4), "move_price": 2.5}
            if kind == "wrong" or comm.rank == comm.size - 1:
                options |= changed
            try:
                plan(comm=comm, **options)
                told[f"{kind} {case}"] = "no error"
            except DistplbError as error:
                told[f"{kind} {case}"] = str(error)
    told["after all"] = str(plan(skewed_load(), Topology(1, 4), comm=comm).expert_of_slot.tolist())
    return told


@pytest.fixture(scope="module")
def refusals_of_ranks() -> list[dict[str, str]]:
    return on_ranks(3, refusals, deadline=90)


@pytest.mark.parametrize("case", [f"{kind} {case}" for kind, cases in CASES.items() for case in cases])
def test_what_is_wrong_is_told_on_every_rank(case: str, refusals_of_ranks: list[dict[str, str]]) -> None:
    kind, name = case.split(" ", 1)
    _, wording = CASES[kind][name]
    for told in refusals_of_ranks:
        assert wording in told[case]
        assert "rank" in told[case]


def test_after_all_these_errors_the_ranks_still_plan_together(refusals_of_ranks: list[dict[str, str]]) -> None:
    alone = plan(3 * skewed_load(), Topology(1, 4)).expert_of_slot.tolist()
    assert [told["after all"] for told in refusals_of_ranks] == [str(alone)] * 3


def fails_in_the_middle(stage: str) -> str:
    def break_down(*_: object) -> None:
        raise MemoryError("no room")

    if stage == "search" and dist.get_rank() == 1:
        Problem.costs = break_down
    if stage == "count" and dist.get_rank() == 1:
        planner._copied = break_down
    if stage == "polish":
        Problem.polish = break_down
    try:
        plan(skewed_load(), Topology(1, 4), comm=TorchComm(), num_candidates=8)
    except DistplbError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize(("stage", "rank"), [("count", 1), ("search", 1), ("polish", 0)])
def test_a_rank_that_fails_in_the_middle_leaves_nobody_waiting(stage: str, rank: int) -> None:
    for text in errors_on_ranks(3, fails_in_the_middle, stage, deadline=60):
        assert text == f"rank {rank}: in stage {stage}: MemoryError('no room')"


def test_a_caller_can_add_fields_to_the_header_and_goes_from_stage_to_stage() -> None:
    options = SearchOptions(num_candidates=2, engine="reference")
    planning = Planning(skewed_load(), Topology(1, 4), WorldOfOne(), options, fields={"x": 1})
    assert torch.equal(planning.load, skewed_load())
    planning.search()
    planning.choose()
    planning.polish()
    planned = planning.share()
    assert planned.engine == "reference"
    assert torch.equal(planned.load, skewed_load())
    assert planned.placement == plan_in_stages(skewed_load(), Topology(1, 4), WorldOfOne(), options).placement


@pytest.mark.skipif(find_spec("numba") is None, reason="needs Numba")
def test_the_fastest_engine_that_is_there_plans() -> None:
    for load in (skewed_load(), skewed_load()[0]):
        planned = plan_in_stages(load, Topology(1, 4), WorldOfOne(), SearchOptions())
        assert planned.engine == ("cuda" if load.is_cuda else "cpu")
        assert planned.placement == plan(load, Topology(1, 4), engine="reference")


# --- never worse than greedy ------------------------------------------------------------------------------------


def thousand_rows(num_experts: int) -> Tensor:
    """`[1000, E]`: lognormal, Zipf, a few hot experts, equal, many zeros; 200 of each."""
    generator = np.random.default_rng(num_experts)
    zipf = 1e5 / np.arange(1, num_experts + 1) ** generator.uniform(0.5, 2, (200, 1))
    hot = generator.permuted(np.arange(num_experts) < max(1, num_experts // 16), axis=0)
    warm = generator.integers(50, 150, (200, num_experts))
    some = generator.random((200, num_experts)) < generator.uniform(0.02, 0.4, (200, 1))
    kinds = [
        generator.lognormal(6, 1.2, (200, num_experts)),
        generator.permuted(zipf, axis=1),
        generator.permuted(warm * np.where(hot, generator.integers(5, 200, (200, 1)), 1), axis=1),
        np.repeat(generator.integers(1, 1000, (200, 1)), num_experts, axis=1),
        generator.integers(0, 1000, (200, num_experts)) * some,
    ]
    return torch.from_numpy(np.rint(np.concatenate(kinds)).astype(np.int64))


# (E, P, N, GPUs on each, B)
CLUSTERS = [
    (8, 8, 1, 2, None),
    (8, 16, 1, 16, None),  # one slot a GPU
    (8, 12, 1, 4, None),
    (8, 28, 1, 4, None),
    (5, 9, 1, 3, None),
    (3, 6, 1, 2, None),
    (16, 16, 2, 2, 4),
    (16, 24, 2, 4, 4),
    (16, 32, 2, 8, 4),
    (16, 24, 2, 4, 2),  # one group a node
    (12, 24, 4, 2, 12),  # one expert a group
    (9, 18, 3, 3, 3),
    (32, 48, 4, 2, 8),
    (64, 64, 2, 4, 8),
    (64, 72, 1, 8, None),
    (32, 64, 1, 32, None),
]


def both_imbalances(
    load: Tensor, cluster: tuple[int, int, int, int, int | None], shared: bool
) -> tuple[Tensor, Tensor]:
    """`[L]` each: of a plan from one candidate, and of greedy under the same rules."""
    num_experts, num_slots, nodes, gpus, groups = cluster
    topology, options = Topology(nodes, gpus), {"num_groups": groups, "allow_shared_replicas": shared}
    greedy = Placement(baselines.greedy_numpy(load, topology, num_slots, **options), num_experts, topology.num_gpus)
    found = plan(load, topology, num_slots=num_slots, **options)
    counted = load.any(1)  # a row without tokens is neither
    return imbalance(load, found)[0, counted], imbalance(load, greedy)[0, counted]


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("cluster", CLUSTERS)
def test_a_plan_is_never_worse_than_greedy(cluster: tuple[int, int, int, int, int | None], shared: bool) -> None:
    """In every one of 1,000 rows, replicas sharing a GPU or not, with one candidate."""
    load = thousand_rows(cluster[0])
    found, greedy = both_imbalances(load, cluster, shared)
    worse = (found > greedy * (1 + 1e-9)).nonzero()[:, 0]
    assert not len(worse), [
        (load[load.any(1)][row].tolist(), float(found[row]), float(greedy[row])) for row in worse[:3]
    ]
    if cluster[1] > cluster[2] * cluster[3]:
        assert found.mean() <= greedy.mean()
    if cluster in ((64, 72, 1, 8, None), (16, 24, 2, 4, 4)):
        assert found.mean() < greedy.mean() - 0.01


@pytest.mark.parametrize(
    ("load", "cluster", "shared"),
    [
        ([1, 1, 1, 1, 3, 1], (6, 12, 2, 3, 6), True),
        ([1, 1, 2, 1, 0, 1, 1, 2], (8, 12, 2, 3, 4), True),
        ([0, 0, 2, 2, 1, 0, 0, 2, 1, 1, 1, 0], (12, 20, 2, 5, 4), False),
        ([1, 1, 2, 3, 3, 3, 3, 1, 0, 0, 0, 4], (12, 24, 2, 3, 6), False),
    ],
)
def test_ties_among_groups_do_not_make_it_worse_than_greedy(
    load: list[int], cluster: tuple[int, int, int, int, int | None], shared: bool
) -> None:
    """Greedy takes equal experts of a node in the order in which the node got their groups. A search that took them in
    ascending order ended, in a few rows in 100,000, in a dead end up to a fifth worse than where greedy did."""
    found, greedy = both_imbalances(torch.tensor([load]), cluster, shared)
    assert float(found) <= float(greedy) * (1 + 1e-9)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("cluster", [cluster for cluster in CLUSTERS if cluster[4] is not None])
def test_rows_full_of_ties_are_never_worse_than_greedy_either(
    cluster: tuple[int, int, int, int, int | None], shared: bool
) -> None:
    load = torch.randint(0, 4, (2000, cluster[0]), generator=torch.Generator().manual_seed(1))
    found, greedy = both_imbalances(load, cluster, shared)
    assert (found <= greedy * (1 + 1e-9)).all()
