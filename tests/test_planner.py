"""A plan is the same on every rank and for every number of ranks; what is wrong on one is told by all.

Shapes: T steps, L layers, E experts.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from ranks import errors_on_ranks, on_ranks
from torch import Tensor

from distplb import DistplbError, Placement, Topology, imbalance, lower_bound, plan
from distplb.comm.torchdist import TorchComm
from distplb.planner import PlanOptions, plan_in_stages
from distplb.planning.problem import Problem

STEPS, LAYERS, EXPERTS = 3, 5, 32


def skewed_load(seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    hot = torch.randn(1, LAYERS, EXPERTS, generator=generator).mul(1.2).exp()  # [1, L, E]
    wobble = torch.randn(STEPS, LAYERS, EXPERTS, generator=generator).mul(0.5).exp()
    return (1000 * hot * wobble).long()


def shared_plan(whole: Tensor, candidates: int, current: Placement | None = None) -> list[list[int]]:
    """Plan from counts that are spread unevenly over the ranks; their sum is `whole`."""
    rank, size = dist.get_rank(), dist.get_world_size()
    mine = whole // size if rank else whole - (size - 1) * (whole // size)
    placement = plan(mine, Topology(2, 4), comm=TorchComm(), num_candidates=candidates, seed=7, current=current)
    return placement.expert_of_slot.tolist()


@pytest.mark.parametrize("candidates", [1, 3, 64])
def test_plans_of_1_2_and_4_ranks_are_equal_to_the_bit(candidates: int) -> None:
    load = skewed_load()
    alone = plan(load, Topology(2, 4), num_candidates=candidates, seed=7).expert_of_slot.tolist()
    for ranks in (1, 2, 4):
        assert on_ranks(ranks, shared_plan, load, candidates) == [alone] * ranks


def test_plans_from_a_current_placement_are_equal_to_the_bit() -> None:
    load, current = skewed_load(), Placement.contiguous(LAYERS, EXPERTS, 8)
    alone = plan(load, Topology(2, 4), num_candidates=8, seed=7, current=current).expert_of_slot.tolist()
    for ranks in (2, 4):
        assert on_ranks(ranks, shared_plan, load, 8, current) == [alone] * ranks


def test_a_plan_is_better_than_contiguous_on_steps_it_has_not_seen() -> None:
    generator = torch.Generator().manual_seed(3)
    rate = torch.randn(LAYERS, EXPERTS, generator=generator).exp() * 300
    seen, unseen = (torch.poisson(rate.expand(8, -1, -1), generator=generator) for _ in range(2))
    topology = Topology(1, 4)
    planned = imbalance(unseen, plan(seen, topology)).mean()
    static = imbalance(unseen, Placement.contiguous(LAYERS, EXPERTS, 4)).mean()
    assert planned - 1 < (static - 1) / 4
    assert float(planned) >= float(lower_bound(unseen, topology, EXPERTS).mean())


def test_the_seed_and_nothing_global_decides() -> None:
    load = torch.randint(500, 1500, (2, EXPERTS), generator=torch.Generator().manual_seed(5))
    torch.manual_seed(0)
    one = plan(load, Topology(1, 8), seed=1)
    torch.manual_seed(1)
    assert plan(load, Topology(1, 8), seed=1) == one
    assert plan(load, Topology(1, 8), seed=2) != one


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

    plan(skewed_load(), Topology(1, 4), comm=Counting(), num_candidates=4)
    return calls


def test_a_plan_costs_a_header_and_three_collectives() -> None:
    for calls in on_ranks(2, collective_calls):
        header, *data = calls
        assert header[0] == "min"
        assert header[1][0] < 32
        assert data == [("sum", (STEPS, LAYERS, EXPERTS)), ("min", (LAYERS,)), ("broadcast", (LAYERS, EXPERTS))]


def refused(case: str) -> str:
    """The error of a plan in which the last rank does something that the others do not."""
    odd = dist.get_rank() == dist.get_world_size() - 1
    load, options, topology = skewed_load(), {"num_candidates": 4}, Topology(1, 4)
    if odd and case == "NaN":
        load = load.double()
        load[1, 2, 3] = float("nan")
    if odd and case == "negative":
        load[0, 1, 2] = -5
    if odd and case == "shape":
        load = load[:, :, :16]
    if odd and case == "steps":
        load = load[:2]
    if odd and case == "seed":
        options["seed"] = 3
    if odd and case == "type":
        load = "no tensor"
    if case == "experts":
        topology = Topology(1, 5)
    if odd and case == "topology":
        topology = Topology(2, 2)
    if odd and case == "current":
        options["current"] = Placement.contiguous(LAYERS, EXPERTS, 4)
    if case == "candidates":
        options["num_candidates"] = 0
    if case == "engine":
        options["engine"] = "magic"
    if case == "replicas":
        options["num_slots"] = 40
    try:
        plan(load, topology, comm=TorchComm(), **options)
    except DistplbError as error:
        return str(error)
    return "no error"


CASES = {
    "NaN": "rank 2: load is nan at index [1, 2, 3] (1 such); counts must be finite: check the counter",
    "negative": "rank 2: load is -5 at index [0, 1, 2] (1 such); counts must be non-negative: check the counter",
    "shape": "ranks disagree on the load's experts: 16 on one, 32 on another",
    "steps": "ranks disagree on the load's steps: 2 on one, 3 on another",
    "seed": "ranks disagree on seed: 0 on one, 3 on another",
    "type": "rank 2: ",
    "experts": "32 slots cannot be spread evenly over 5 GPUs (1 nodes × 5); make the number of slots a multiple of 5",
    "topology": "ranks disagree on num_nodes: 1 on one, 2 on another",
    "current": "ranks disagree on the current placement (digest): -1 on one",
    "candidates": "num_candidates is 0; pass 1 to 2^22",
    "engine": "engine 'magic' is not there; pass one of reference, or None",
    "replicas": "num_slots is 40 for 32 experts: replicas are not planned yet; pass num_slots=32",
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_wrong_is_told_on_every_rank(case: str) -> None:
    for text in errors_on_ranks(3, refused, case, deadline=60):
        assert CASES[case] in text


def fails_in_the_middle(stage: str) -> str:
    def break_down(*_: object) -> None:
        raise MemoryError("no room")

    if stage == "search" and dist.get_rank() == 1:
        Problem.costs = break_down
    if stage == "polish":
        Problem.polish = break_down
    try:
        plan(skewed_load(), Topology(1, 4), comm=TorchComm(), num_candidates=8)
    except DistplbError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize(("stage", "rank"), [("search", 1), ("polish", 0)])
def test_a_rank_that_fails_in_the_middle_leaves_nobody_waiting(stage: str, rank: int) -> None:
    for text in errors_on_ranks(3, fails_in_the_middle, stage, deadline=60):
        assert text == f"rank {rank}: MemoryError('no room')"


def test_a_caller_can_add_fields_to_the_header() -> None:
    from distplb.comm.base import WorldOfOne

    planned = plan_in_stages(
        skewed_load(), Topology(1, 4), WorldOfOne(), PlanOptions(num_candidates=2), fields={"x": 1}
    )
    assert planned.engine == "reference"
    assert torch.equal(planned.load, skewed_load())
