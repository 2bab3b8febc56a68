"""A plan is the same over every communicator, always takes equally many collectives, and can be repeated.

gloo on 1, 2 and 4 ranks is in test_plan.py, MPI in test_mpi.py. Shapes: T steps, L layers, E experts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from jobs import LAYERS, Job, by_slot
from plan_cases import SELECTION, selected_plans
from ranks import mesh_of, on_ranks
from torch import Tensor

from distplb import LoadWindow, MoveModel, RebalanceEvent, TimeCurve, Topology, Trace, plan
from distplb.comm.base import Comm, WorldOfOne
from distplb.comm.grid import GridComm
from distplb.comm.torchdist import TorchComm

Plans = dict[str, list[list[int]]]


class Counted:
    """A communicator that records the names of the collectives called on it."""

    def __init__(self, comm: Comm) -> None:
        self._comm = comm
        self.calls: list[str] = []
        self.rank, self.size, self.device = comm.rank, comm.size, comm.device

    def all_reduce_sum(self, tensor: Tensor) -> None:
        self.calls.append("sum")
        self._comm.all_reduce_sum(tensor)

    def all_reduce_min(self, tensor: Tensor) -> None:
        self.calls.append("min")
        self._comm.all_reduce_min(tensor)

    def broadcast(self, tensor: Tensor, root: int) -> None:
        self.calls.append("broadcast")
        self._comm.broadcast(tensor, root)


def grid_of(axes: str) -> GridComm:
    mesh = mesh_of(axes)
    return GridComm(TorchComm(mesh["ep"]), TorchComm(mesh["edp"]))


# --- over every communicator -----------------------------------------------------------------------------------------


def plans_of_three_and_of_grids() -> list[Plans]:
    three = dist.new_group([0, 1, 2])
    comms = [grid_of("edp ep"), grid_of("ep edp"), TorchComm(three) if dist.get_rank() < 3 else WorldOfOne()]
    return [selected_plans(comm) for comm in comms]


# --- collectives -----------------------------------------------------------------------------------------------------


def calls_of_a_plan(num_layers: int) -> list[list[str]]:
    """The calls by communicator: a group, the rows of a grid, its columns."""
    load = torch.randint(1, 1000, (3, num_layers, 16), generator=torch.Generator().manual_seed(1))
    mesh = mesh_of("edp ep")
    group, inner, outer = (Counted(TorchComm(part)) for part in (None, mesh["ep"], mesh["edp"]))
    grid = GridComm(inner, outer)
    inner.calls.clear()  # those of its construction
    outer.calls.clear()
    for comm in (group, grid):
        plan(load, Topology(1, 4), comm=comm, num_candidates=4, engine="reference")
    return [group.calls, inner.calls, outer.calls]


# --- repeated from its record ----------------------------------------------------------------------------------------

EXPERTS, EVERY, REBALANCES = 48, 3, 3  # enough experts that another seed gives another plan
CURVE = TimeCurve((0, 20, 180, 2000), (0, 20, 140, 1240))
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "priced": {"time_curve": CURVE, "model": MoveModel(1 / 3e9, 50, 1e9, 7e8), "num_candidates": 5},
    "dry run": {"dry_run": True, "time_curve": CURVE},
}


def recorded(folder: str) -> dict[str, list[RebalanceEvent]]:
    """The events of jobs of two EP groups on a grid, whose windows rank 0 records."""
    by_variant = {}
    for name, options in VARIANTS.items():
        events: list[RebalanceEvent] = []
        grid = grid_of("ep edp")
        job = Job(ranks=2, experts=EXPERTS)
        job.window = LoadWindow(LAYERS, EXPERTS, 4)
        rebalancer = job.rebalancer(
            comm=grid,
            gpu=grid.rank % 2,
            every=EVERY,
            seed=11,
            folder=f"{folder}/{name}",
            on_event=events.append,
            engine="reference",
            **options,
        )
        for iteration in range(EVERY * REBALANCES):
            generator = torch.Generator().manual_seed(10 * iteration + grid.rank)
            counts = torch.randint(1, 100, (LAYERS, EXPERTS), generator=generator) ** 2
            job.iterate(by_slot(counts, rebalancer.placement))
            rebalancer.step()
        rebalancer.close()
        by_variant[name] = [event for event in events if event.imbalance_next is None]
    return by_variant


# --- results of the ranks --------------------------------------------------------------------------------------------


def all_of_it(folder: str) -> dict[str, Any]:
    """Everything in one start of four processes."""
    return {
        "plans": plans_of_three_and_of_grids(),
        "calls": [calls_of_a_plan(num_layers) for num_layers in (1, 40)],
        "events": recorded(folder),
    }


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The folder of the windows, and each rank's results."""
    folder = tmp_path_factory.mktemp("windows")
    return folder, on_ranks(4, all_of_it, str(folder))


def test_plans_of_3_ranks_and_of_grids_are_those_of_one_process(ranks: tuple[Path, list[dict[str, Any]]]) -> None:
    alone = selected_plans(WorldOfOne())
    assert len({str(table) for table in alone.values()}) == len(SELECTION)
    for results in ranks[1]:
        assert results["plans"] == [alone] * 3


def test_a_plan_is_a_header_and_three_collectives_of_1_layer_and_of_40_and_twice_as_many_over_a_grid(
    ranks: tuple[Path, list[dict[str, Any]]],
) -> None:
    calls = ["min", "sum", "min", "broadcast"]
    for rank, results in enumerate(ranks[1]):
        small, large = results["calls"]
        assert small == large
        # The placement is broadcast in the root's row, and along all columns.
        assert small == [calls, calls if rank < 2 else calls[:3], calls]


def test_a_plan_of_a_grid_is_made_again_by_one_process_from_its_event_and_the_window(
    ranks: tuple[Path, list[dict[str, Any]]],
) -> None:
    folder, (first, *others) = ranks[0], [results["events"] for results in ranks[1]]
    for name, events in first.items():
        trace = Trace.read(folder / name)
        for event in events:
            steps = (trace.iteration > event.iteration - EVERY) & (trace.iteration <= event.iteration)
            again = plan(
                trace.load[steps],
                Topology(1, 2),
                current=trace.placements[int(trace.placement_of_step[steps][0])],
                move_price=event.move_price,
                time_curve=None if event.time_curve is None else TimeCurve(*zip(*event.time_curve, strict=True)),
                num_candidates=event.num_candidates,
                seed=event.seed,
                mode="permute",
            )
            assert again.digest() == event.placement_digest
        assert len(events) == REBALANCES
        assert len({event.placement_digest for event in events}) > 1
        for other in others:
            assert [event.placement_digest for event in other[name]] == [event.placement_digest for event in events]
