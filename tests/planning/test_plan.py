"""A plan is the same on every rank and for every number of ranks; all ranks raise the error of one.

Shapes: T steps, L layers, E experts, P slots.
"""

from __future__ import annotations

import json
from importlib.util import find_spec
from typing import Any

import pytest
import torch
import torch.distributed as dist
from plan_cases import CURVE, EXPERTS, LAYERS, PLANS, STEPS, planned, random_placement, skewed_load
from ranks import errors_on_ranks, on_ranks
from torch import Tensor

from distplb import DistplbError, Placement, Topology, imbalance, lower_bound, plan
from distplb.comm.base import WorldOfOne
from distplb.comm.torchdist import TorchComm
from distplb.core.price import TimeCurve
from distplb.planning import plan as plan_module
from distplb.planning.options import PlanOptions
from distplb.planning.plan import StagedPlan, plan_in_stages
from distplb.planning.problem import Problem

# --- on any number of ranks -------------------------------------------------------------------------------------


def shared_plans(whole: Tensor) -> dict[str, list[list[int]]]:
    """Plan from counts that are spread unevenly over the ranks and sum to `whole`."""
    rank, size = dist.get_rank(), dist.get_world_size()
    mine = whole // size if rank else whole - (size - 1) * (whole // size)
    comm = TorchComm()
    return {name: planned(mine, name, comm).expert_of_slot.tolist() for name in PLANS}


@pytest.fixture(scope="module")
def plans_of_ranks() -> dict[int, list[dict[str, list[list[int]]]]]:
    """Each rank's plans, by number of ranks."""
    return {ranks: on_ranks(ranks, shared_plans, skewed_load()) for ranks in (1, 2, 4)}


@pytest.mark.parametrize("name", PLANS)
def test_plans_of_1_2_and_4_ranks_are_equal_to_the_bit(
    name: str, plans_of_ranks: dict[int, list[dict[str, list[list[int]]]]]
) -> None:
    alone = planned(skewed_load(), name).expert_of_slot.tolist()
    for ranks, by_rank in plans_of_ranks.items():
        assert [plans[name] for plans in by_rank] == [alone] * ranks


def replayed(record: str) -> int:
    """The digest of the plan of a record, in a process that has only the record."""
    data = json.loads(record)
    options = {name: value for name, value in data["options"].items() if value is not None}
    if "time_curve" in options:
        options["time_curve"] = TimeCurve(*(tuple(points) for points in options["time_curve"]))
    if "move_price" in options:
        options["move_price"] = tuple(options["move_price"])
    if "current" in options:
        options["current"] = Placement(torch.tensor(options["current"]), EXPERTS, 8)
    return plan(torch.tensor(data["load"]), Topology(*data["topology"]), **options).digest()


def test_a_plan_is_replayed_from_its_load_and_options() -> None:
    """Measured values come back from text to the last bit, prices and curves included."""
    start = random_placement(48)
    price, curve = (1 / 3, 1e3 * 2**0.5), TimeCurve.through([100, 1000, 4000], [1e-6 / 3, 2e-5 / 7, 1e-4 / 9])
    fresh = {"num_slots": 48, "num_candidates": 2, "seed": 11, "time_curve": curve}
    warm = {"num_slots": 48, "current": start, "seed": 12, "move_price": price, "time_curve": curve}
    load, records, digests = skewed_load(5), [], []
    for options in (fresh, warm):
        digests.append(plan(load, Topology(2, 4), **options).digest())
        written = options | {"time_curve": (curve.tokens, curve.nanoseconds)}
        if "current" in options:
            written["current"] = start.expert_of_slot.tolist()
        records.append(json.dumps({"load": load.tolist(), "topology": (2, 4), "options": written}))
    assert [on_ranks(1, replayed, record) for record in records] == [[digest] for digest in digests]
    assert digests[1] != start.digest()


def test_a_plan_is_better_than_contiguous_on_steps_it_has_not_seen() -> None:
    generator = torch.Generator().manual_seed(3)
    rate = torch.randn(LAYERS, EXPERTS, generator=generator).exp() * 300
    past, future = (torch.poisson(rate.expand(8, -1, -1), generator=generator) for _ in range(2))
    topology = Topology(1, 4)
    planned = imbalance(future, plan(past, topology)).mean()
    static = imbalance(future, Placement.contiguous(LAYERS, EXPERTS, 4)).mean()
    assert planned - 1 < (static - 1) / 4
    assert float(planned) >= float(lower_bound(future, topology, EXPERTS).mean())


@pytest.mark.parametrize("move_price", [0.0, 2.0, 1e30])
def test_a_current_placement_that_takes_groups_apart_is_not_kept(move_price: float) -> None:
    """It was, if no plan cost less, because the placement in force was assumed legal. Here its GPUs are perfectly
    balanced, and every block holds experts of two groups."""
    load, current = torch.tensor([[4, 6, 4, 6, 1, 3, 1, 3]]), Placement(torch.tensor([[0, 3, 4, 7, 1, 2, 5, 6]]), 8, 2)
    options = {"num_groups": 4, "mode": "permute", "current": current, "move_price": move_price}
    row = plan(load, Topology(1, 2), **options).expert_of_slot[0].tolist()
    assert [row[at] // 2 == row[at + 1] // 2 for at in range(0, 8, 2)] == [True] * 4
    # Pairs are split over two GPUs: one expert of each must move, which leaves 14 tokens on each GPU.
    assert sum(load[0, row[:4]].tolist()) == 14
    assert sum(expert in current.expert_of_slot[0, :4] for expert in row[:4]) == 2


@pytest.mark.parametrize("move_price", [0.0, 2.0, 1e30])
def test_a_current_placement_whose_replicas_share_a_gpu_is_not_kept_where_they_must_not(move_price: float) -> None:
    """It was, if no plan cost less."""
    load, current = torch.tensor([[6, 6, 6, 0]]), Placement(torch.tensor([[0, 0, 1, 1, 2, 3]]), 4, 3)
    options = {"num_slots": 6, "allow_shared_replicas": False, "current": current, "move_price": move_price}
    row = plan(load, Topology(1, 3), **options).expert_of_slot[0].tolist()
    assert [row[at] != row[at + 1] for at in range(0, 6, 2)] == [True] * 3
    assert set(row) == {0, 1, 2, 3}


def test_the_seed_and_nothing_global_decides() -> None:
    load = torch.randint(500, 1500, (8, EXPERTS), generator=torch.Generator().manual_seed(5))
    torch.manual_seed(0)
    one = plan(load, Topology(1, 8), seed=1, num_candidates=8)
    torch.manual_seed(1)
    assert plan(load, Topology(1, 8), seed=1, num_candidates=8) == one
    assert plan(load, Topology(1, 8), seed=2, num_candidates=8) != one
    # With one candidate, nothing is random.
    assert plan(load, Topology(1, 8), seed=1) == plan(load, Topology(1, 8), seed=2)


def collective_calls() -> list[tuple[str, tuple[int, ...]]]:
    """The collectives of a plan, call by call."""
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
# How the last of three ranks differs from the others, and the error that all of them raise.
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
        "rank 2: load has nan for expert 3 of layer 2 in step 1 (1 such value); counts must be finite: check the",
    ),
    "negative": (
        {"load": skewed_load().masked_fill(WRONG_ENTRY, -5)},
        "rank 2: load has -5 for expert 3 of layer 2 in step 1 (1 such value); counts must be non-negative: check the",
    ),
    "type": ({"load": "no tensor"}, "rank 2: "),
    "replicas in mode permute": (
        {"num_slots": 48, "mode": "permute"},
        "rank 2: num_slots is 48 for 32 experts, and mode 'permute' does not support replicas; pass mode='remap'",
    ),
}
# The same, when all ranks start from a placement in force, and moves have a price.
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
    "no number": ({"move_price": float("nan")}, "rank 2: move_price is nan; pass tokens of the window per moved "),
    "a price of nothing": ({"current": None}, "rank 2: move_price is 2.5 without current; pass the placement in force"),
}
# Errors that all ranks make alike.
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "slots": (
        {"topology": Topology(1, 5)},
        "32 slots cannot be spread evenly over 5 GPUs (1 node × 5); pass num_slots=35 (3 for replicas), or",
    ),
    "candidates": ({"num_candidates": 0}, "num_candidates is 0; pass 1 to 2^22"),
    "engine": ({"engine": "magic"}, "engine 'magic' is unknown; pass one of reference, cpu, cuda, or engine=None"),
}


CASES = {"odd": ODD, "priced": PRICED, "wrong": WRONG}


def refusals() -> dict[str, str]:
    """The errors of one plan after another; a rank left waiting would mistake the next plan's calls for its own."""
    comm, messages = TorchComm(), {}
    for kind, cases in CASES.items():
        for case, (changed, _) in cases.items():
            options: dict[str, Any] = {"load": skewed_load(), "topology": Topology(1, 4), "num_candidates": 4}
            if kind == "priced":
                options |= {"current": Placement.contiguous(LAYERS, EXPERTS, 4), "move_price": 2.5}
            if kind == "wrong" or comm.rank == comm.size - 1:
                options |= changed
            try:
                plan(comm=comm, **options)
                messages[f"{kind} {case}"] = "no error"
            except DistplbError as error:
                messages[f"{kind} {case}"] = str(error)
    messages["after all"] = str(plan(skewed_load(), Topology(1, 4), comm=comm).expert_of_slot.tolist())
    return messages


@pytest.fixture(scope="module")
def refusals_of_ranks() -> list[dict[str, str]]:
    return on_ranks(3, refusals, deadline=90)


@pytest.mark.parametrize("case", [f"{kind} {case}" for kind, cases in CASES.items() for case in cases])
def test_what_is_wrong_is_told_on_every_rank(case: str, refusals_of_ranks: list[dict[str, str]]) -> None:
    kind, name = case.split(" ", 1)
    _, wording = CASES[kind][name]
    for messages in refusals_of_ranks:
        assert wording in messages[case]
        assert "rank" in messages[case]


def test_after_all_these_errors_the_ranks_still_plan_together(refusals_of_ranks: list[dict[str, str]]) -> None:
    alone = plan(3 * skewed_load(), Topology(1, 4)).expert_of_slot.tolist()
    assert [messages["after all"] for messages in refusals_of_ranks] == [str(alone)] * 3


def fails_in_the_middle(stage: str) -> str:
    def break_down(*_: object) -> None:
        raise MemoryError("no room")

    if stage == "search" and dist.get_rank() == 1:
        Problem.costs = break_down
    if stage == "count" and dist.get_rank() == 1:
        plan_module._copied = break_down
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
    options = PlanOptions(num_candidates=2, engine="reference")
    staged = StagedPlan(skewed_load(), Topology(1, 4), WorldOfOne(), options, fields={"x": 1})
    assert torch.equal(staged.load, skewed_load())
    staged.search()
    staged.choose()
    staged.polish()
    result = staged.share()
    assert result.engine == "reference"
    assert torch.equal(result.load, skewed_load())
    assert result.placement == plan_in_stages(skewed_load(), Topology(1, 4), WorldOfOne(), options).placement


@pytest.mark.skipif(find_spec("numba") is None, reason="needs Numba")
def test_the_fastest_engine_that_is_there_plans() -> None:
    for load in (skewed_load(), skewed_load()[0]):
        result = plan_in_stages(load, Topology(1, 4), WorldOfOne(), PlanOptions())
        assert result.engine == ("cuda" if load.is_cuda else "cpu")
        assert result.placement == plan(load, Topology(1, 4), engine="reference")
