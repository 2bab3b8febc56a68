"""The job of every rank of bench_scaling: plans, and bare collectives of the same sizes, in turns.

Started by torchrun; rank 0 writes the measurements of all ranks as JSON. All times are on the clock that the processes
of a machine share. Each rank searches with one thread, so that only the number of ranks varies.
Shapes: T steps, L layers, E experts, P slots, K candidates.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.shared.loads import real_loads, wobbling_steps
from benchmarks.shared.processes import run_job
from benchmarks.shared.sequences import read_sequences, steps_of
from distplb import Placement, Topology, imbalance, lower_bound
from distplb.comm.base import Comm, Round
from distplb.comm.torchdist import TorchComm
from distplb.core.stages import Stages
from distplb.planning.options import PlanOptions
from distplb.planning.plan import plan_in_stages

__all__ = ["CASES", "Case", "dealt"]

LOADAVG = Path("/proc/loadavg")
LOOK_SECONDS, LOOKS = 5e-3, 4  # seconds between checks of the machine, and quiet checks in a row before a turn starts
LEAD_SECONDS = 5e-3  # from the agreement on a start to the start
STEPS, SEQUENCES = 32, 32  # steps of a window, and sequences of a step
WOBBLE = 0.3  # standard deviation of an expert's log popularity between steps, for records without steps


@dataclass(frozen=True)
class Case:
    """A load, the cluster that it is planned for, and how much is measured.

    Args:
        load: reads the load `[T, L, E]` from the folder of loads.
        topology, slots: cluster and slots of the plan.
        fixed: K in the cells whose K does not depend on the ranks.
        each: candidates per rank in the cells whose K grows with the ranks.
        turns: number of turns of each cell.
        largest: the largest K whose imbalance is reported.
    """

    load: Callable[[Path], Tensor]
    topology: Topology
    slots: int
    fixed: int
    each: int
    turns: int
    largest: int


def _olmoe(folder: Path) -> Tensor:
    return real_loads(folder)["olmoe-1b-7b"][0][None]


def _sequences(folder: Path) -> Tensor:
    return steps_of(next(iter(read_sequences(folder).values())), STEPS, SEQUENCES, seed=0)


def _deepseek(folder: Path) -> Tensor:
    return real_loads(folder)["deepseek-v3"][0][None]


def _deepseek_in_steps(folder: Path) -> Tensor:
    """Draw steps around the record, which has none."""
    return wobbling_steps(_deepseek(folder)[0], STEPS, WOBBLE, seed=0)


CASES = {
    "OLMoE": Case(_olmoe, Topology(1, 8), 64, fixed=64, each=8, turns=60, largest=1 << 14),
    "DeepSeek-V2-Lite, T = 32": Case(_sequences, Topology(1, 8), 64, fixed=64, each=8, turns=15, largest=1 << 10),
    "DeepSeek-V3": Case(_deepseek, Topology(4, 8), 288, fixed=64, each=8, turns=15, largest=1 << 11),
    "DeepSeek-V3, T = 32": Case(_deepseek_in_steps, Topology(4, 8), 256, fixed=8, each=1, turns=5, largest=1 << 4),
}


def dealt(load: Tensor, rank: int, size: int) -> Tensor:
    """Return this rank's counts; the counts of all ranks sum to the load.

    >>> [dealt(torch.tensor([7, 2]), rank, 3).tolist() for rank in range(3)]
    [[3, 1], [2, 1], [2, 0]]
    """
    return load // size + (rank < load % size)


class TimedStages(Stages):
    """Also records when a stage began and ended, and the CPU seconds that this process spent in it."""

    def __init__(self) -> None:
        super().__init__()
        self.marks: dict[str, list[float]] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Record a stage; one in several parts lasts from the first part's begin to the last part's end."""
        begin, _, spent = self.marks.get(name, (time.perf_counter(), 0.0, 0.0))
        cpu = time.process_time()
        try:
            with super().stage(name):
                yield
        finally:
            self.marks[name] = [begin, time.perf_counter(), spent + time.process_time() - cpu]


class RecordingComm:
    """A communicator that passes all calls on, and records its collectives."""

    def __init__(self, comm: Comm) -> None:
        self._comm, self.rank, self.size, self.device = comm, comm.rank, comm.size, comm.device
        self.collectives: list[tuple[str, Tensor]] = []

    def all_reduce_sum(self, tensor: Tensor) -> None:
        """Record and pass on."""
        self.collectives.append(("sum", tensor))
        self._comm.all_reduce_sum(tensor)

    def all_reduce_min(self, tensor: Tensor) -> None:
        """Record and pass on."""
        self.collectives.append(("min", tensor))
        self._comm.all_reduce_min(tensor)

    def broadcast(self, tensor: Tensor, root: int) -> None:
        """Record and pass on."""
        self.collectives.append(("broadcast", tensor))
        self._comm.broadcast(tensor, root)

    def connect(self, peers: Sequence[int]) -> None:
        """Not used: no plan sends messages."""
        raise NotImplementedError

    def exchange(self, rounds: Sequence[Round]) -> None:
        """Not used: no plan sends messages."""
        raise NotImplementedError


def bare(collectives: Sequence[tuple[str, Tensor]]) -> list[float]:
    """Call the same collectives directly in torch.distributed; return when they began, and when each was done."""
    marks = [time.perf_counter()]
    for kind, buffer in collectives:
        if kind == "broadcast":
            dist.broadcast(buffer, 0)
        else:
            dist.all_reduce(buffer, dist.ReduceOp.SUM if kind == "sum" else dist.ReduceOp.MIN)
        marks.append(time.perf_counter())
    return marks


def start_together(patience: float) -> bool:
    """Return on all ranks at one agreed moment, when nothing else runs on the machine.

    Args:
        patience: maximum seconds that the root waits until nothing else runs.

    Returns:
        Whether nothing else ran.
    """
    dist.barrier()
    until, looks = time.perf_counter() + patience, 0
    # Meanwhile the other ranks sleep in the broadcast.
    while dist.get_rank() == 0 and looks < LOOKS and time.perf_counter() < until:
        looks = looks + 1 if others_running() == 0 else 0
        time.sleep(LOOK_SECONDS)
    start = torch.tensor([time.perf_counter() + LEAD_SECONDS, looks == LOOKS], dtype=torch.float64)
    dist.broadcast(start, 0)
    moment, quiet = start.tolist()
    time.sleep(max(0.0, moment - time.perf_counter()))
    return bool(quiet)


def others_running() -> int:
    """Count the machine's other threads that run or wait for a core now; 0 if the system does not report it."""
    return int(LOADAVG.read_text().split()[3].split("/")[0]) - 1 if LOADAVG.exists() else 0


def measured(
    name: str, case: Case, load: Tensor, candidates: int, turns: int, patience: float
) -> dict[str, Any] | None:
    """Measure one cell, and return the marks of all ranks on rank 0; turns begin as in `start_together`."""
    comm, options = TorchComm(), PlanOptions(num_slots=case.slots, num_candidates=candidates)
    mine = dealt(load, comm.rank, comm.size)
    recording = RecordingComm(comm)
    placement = plan_in_stages(mine, case.topology, recording, options).placement
    collectives = [(kind, torch.zeros_like(tensor)) for kind, tensor in recording.collectives]
    marks: list[dict[str, Any]] = [{} for _ in range(turns)]
    for turn in range(turns):
        quiet = True
        for what in ("plan", "bare") if turn % 2 else ("bare", "plan"):
            quiet &= start_together(patience)
            marks[turn][what] = bare(collectives) if what == "bare" else planned(mine, case, comm, options)
        marks[turn]["quiet"] = quiet
    everyone: list[Any] = [None] * comm.size
    dist.all_gather_object(everyone, marks)
    if comm.rank:
        return None
    return {
        "case": name,
        "ranks": comm.size,
        "candidates": candidates,
        "collectives": [(kind, tensor.numel() * tensor.element_size()) for kind, tensor in collectives],
        "digest": placement.digest(),
        **quality(load, case, placement),
        "turns": [[rank[turn] for rank in everyone] for turn in range(turns)],
    }


def planned(load: Tensor, case: Case, comm: Comm, options: PlanOptions) -> dict[str, Any]:
    """Make one plan; return begin, end and CPU seconds of the whole plan and of each stage."""
    stages = TimedStages()
    begin, cpu = time.perf_counter(), time.process_time()
    plan_in_stages(load, case.topology, comm, options, stages=stages)
    end = time.perf_counter()
    return {**stages.marks, "whole": [begin, end, time.process_time() - cpu]}


def quality(load: Tensor, case: Case, placement: Placement) -> dict[str, float]:
    """Compute mean imbalance and lower bound over layers and steps."""
    bound = lower_bound(load, case.topology, case.slots)
    return {"imbalance": float(imbalance(load, placement).mean()), "bound": float(bound.mean())}


def job(task: dict[str, Any]) -> list[dict[str, Any] | None]:
    """Measure every cell `[case, candidates, turns]` of the task."""
    loads = {name: CASES[name].load(Path(task["loads"])) for name, _, _ in task["cells"]}
    return [
        measured(name, CASES[name], loads[name], candidates, turns, task["patience"])
        for name, candidates, turns in task["cells"]
    ]


def main() -> None:
    """Run one rank."""
    parser = argparse.ArgumentParser(description="A rank of bench_scaling.")
    parser.add_argument("--job", type=Path, metavar="FOLDER", required=True)
    options = parser.parse_args()
    os.environ["LOCAL_WORLD_SIZE"] = str(os.cpu_count())  # one thread of the engine
    run_job(options.job, job)


if __name__ == "__main__":
    main()
