"""What every rank of bench_scaling.py does: plans, and bare collectives of the same sizes, turn by turn.

Started by torchrun; rank 0 writes what all ranks measured, as JSON. All times are of the clock that the processes of a
machine share. Each rank searches with one thread, so that it is ranks that are varied.
Shapes: T steps, L layers, E experts, P slots, K candidates.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from cases import real_loads
from sequences import read_sequences, steps_of
from torch import Tensor

from distplb import Placement, Topology, imbalance, lower_bound
from distplb.comm.base import Comm, Round
from distplb.comm.torchdist import TorchComm
from distplb.core.stages import Stages
from distplb.planning.options import PlanOptions
from distplb.planning.plan import plan_in_stages

__all__ = ["CASES", "Case", "dealt"]

LOADAVG = Path("/proc/loadavg")
LOOK_SECONDS, LOOKS = 5e-3, 4  # between two looks at the machine, and quiet ones in a row before a turn starts
LEAD_SECONDS = 5e-3  # from the moment that a start is agreed on to the start
STEPS, SEQUENCES = 32, 32  # of a window, and of each of its steps
WAVER = 0.3  # of the logarithm of an expert's popularity from one step to the next, where a record has no steps


@dataclass(frozen=True)
class Case:
    """A load, what it is planned for, and how much of it is measured.

    Args:
        load: from the folder of loads, `[T, L, E]`.
        topology, slots: of the plan.
        fixed: K at any number of ranks.
        each: candidates a rank, where K grows with the ranks.
        turns: of each cell.
        most: the largest K whose imbalance is looked at.
    """

    load: Callable[[Path], Tensor]
    topology: Topology
    slots: int
    fixed: int
    each: int
    turns: int
    most: int


def _olmoe(folder: Path) -> Tensor:
    return real_loads(folder)["olmoe-1b-7b"][0][None]


def _sequences(folder: Path) -> Tensor:
    return steps_of(next(iter(read_sequences(folder).values())), STEPS, SEQUENCES, seed=0)


def _deepseek(folder: Path) -> Tensor:
    return real_loads(folder)["deepseek-v3"][0][None]


def _deepseek_in_steps(folder: Path) -> Tensor:
    """The record has no steps: they are drawn around it."""
    load, generator = _deepseek(folder)[0].numpy(), np.random.default_rng(0)
    popularity = load * generator.lognormal(0, WAVER, (STEPS, *load.shape))
    drawn = generator.multinomial(load.sum(1) // STEPS, popularity / popularity.sum(2, keepdims=True))
    return torch.from_numpy(drawn.astype(np.int64))


CASES = {
    "OLMoE": Case(_olmoe, Topology(1, 8), 64, fixed=64, each=8, turns=60, most=1 << 14),
    "DeepSeek-V2-Lite, T = 32": Case(_sequences, Topology(1, 8), 64, fixed=64, each=8, turns=15, most=1 << 10),
    "DeepSeek-V3": Case(_deepseek, Topology(4, 8), 288, fixed=64, each=8, turns=15, most=1 << 11),
    "DeepSeek-V3, T = 32": Case(_deepseek_in_steps, Topology(4, 8), 256, fixed=8, each=1, turns=5, most=1 << 4),
}


def dealt(load: Tensor, rank: int, size: int) -> Tensor:
    """What this rank has counted; all ranks' counts add up to the load.

    >>> [dealt(torch.tensor([7, 2]), rank, 3).tolist() for rank in range(3)]
    [[3, 1], [2, 1], [2, 0]]
    """
    return load // size + (rank < load % size)


class Clocked(Stages):
    """Also when a stage began and ended, and the CPU seconds of this process in it."""

    def __init__(self) -> None:
        super().__init__()
        self.marks: dict[str, list[float]] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """A stage that comes in parts lasts from the first part's begin to the last one's end."""
        begin, _, spent = self.marks.get(name, (time.perf_counter(), 0.0, 0.0))
        cpu = time.process_time()
        try:
            with super().stage(name):
                yield
        finally:
            self.marks[name] = [begin, time.perf_counter(), spent + time.process_time() - cpu]


class Listening:
    """A communicator that passes everything on, and keeps which collectives were asked for."""

    def __init__(self, comm: Comm) -> None:
        self._comm, self.rank, self.size, self.device = comm, comm.rank, comm.size, comm.device
        self.asked: list[tuple[str, Tensor]] = []

    def all_reduce_sum(self, tensor: Tensor) -> None:
        """Kept and passed on, as the others."""
        self.asked.append(("sum", tensor))
        self._comm.all_reduce_sum(tensor)

    def all_reduce_min(self, tensor: Tensor) -> None:
        """The same."""
        self.asked.append(("min", tensor))
        self._comm.all_reduce_min(tensor)

    def broadcast(self, tensor: Tensor, root: int) -> None:
        """The same."""
        self.asked.append(("broadcast", tensor))
        self._comm.broadcast(tensor, root)

    def connect(self, peers: Sequence[int]) -> None:
        """No plan sends messages."""
        raise NotImplementedError

    def exchange(self, rounds: Sequence[Round]) -> None:
        """No plan sends messages."""
        raise NotImplementedError


def bare(asked: Sequence[tuple[str, Tensor]]) -> list[float]:
    """The same collectives straight from torch.distributed; when they began, and when each was done."""
    marks = [time.perf_counter()]
    for kind, buffer in asked:
        if kind == "broadcast":
            dist.broadcast(buffer, 0)
        else:
            dist.all_reduce(buffer, dist.ReduceOp.SUM if kind == "sum" else dist.ReduceOp.MIN)
        marks.append(time.perf_counter())
    return marks


def start_together(patience: float) -> bool:
    """Return on all ranks at one moment, agreed on beforehand, when nothing else runs on the machine.

    Args:
        patience: seconds that the root waits for that at most.

    Returns:
        Whether nothing else ran.
    """
    dist.barrier()
    until, looks = time.perf_counter() + patience, 0
    # The others sleep in the broadcast.
    while dist.get_rank() == 0 and looks < LOOKS and time.perf_counter() < until:
        looks = looks + 1 if others_running() == 0 else 0
        time.sleep(LOOK_SECONDS)
    told = torch.tensor([time.perf_counter() + LEAD_SECONDS, looks == LOOKS], dtype=torch.float64)
    dist.broadcast(told, 0)
    moment, quiet = told.tolist()
    time.sleep(max(0.0, moment - time.perf_counter()))
    return bool(quiet)


def others_running() -> int:
    """Threads of the machine that run or wait for a core now, but for this one; 0 where the system does not tell."""
    return int(LOADAVG.read_text().split()[3].split("/")[0]) - 1 if LOADAVG.exists() else 0


def measured(
    name: str, case: Case, load: Tensor, candidates: int, turns: int, patience: float
) -> dict[str, Any] | None:
    """All ranks' marks in so many turns, on rank 0; before each turn so long is waited for a quiet machine at most."""
    comm, options = TorchComm(), PlanOptions(num_slots=case.slots, num_candidates=candidates)
    mine = dealt(load, comm.rank, comm.size)
    listening = Listening(comm)
    placement = plan_in_stages(mine, case.topology, listening, options).placement
    asked = [(kind, torch.zeros_like(tensor)) for kind, tensor in listening.asked]
    marks: list[dict[str, Any]] = [{} for _ in range(turns)]
    for turn in range(turns):
        quiet = True
        for what in ("plan", "bare") if turn % 2 else ("bare", "plan"):
            quiet &= start_together(patience)
            marks[turn][what] = bare(asked) if what == "bare" else planned(mine, case, comm, options)
        marks[turn]["quiet"] = quiet
    everyone: list[Any] = [None] * comm.size
    dist.all_gather_object(everyone, marks)
    if comm.rank:
        return None
    return {
        "case": name,
        "ranks": comm.size,
        "candidates": candidates,
        "collectives": [(kind, tensor.numel() * tensor.element_size()) for kind, tensor in asked],
        "digest": placement.digest(),
        **quality(load, case, placement),
        "turns": [[rank[turn] for rank in everyone] for turn in range(turns)],
    }


def planned(load: Tensor, case: Case, comm: Comm, options: PlanOptions) -> dict[str, Any]:
    """One plan: begin and end of all of it, and of each stage, with CPU seconds."""
    stages = Clocked()
    begin, cpu = time.perf_counter(), time.process_time()
    plan_in_stages(load, case.topology, comm, options, stages=stages)
    end = time.perf_counter()
    return {**stages.marks, "whole": [begin, end, time.process_time() - cpu]}


def quality(load: Tensor, case: Case, placement: Placement) -> dict[str, float]:
    """Means over layers and steps."""
    bound = lower_bound(load, case.topology, case.slots)
    return {"imbalance": float(imbalance(load, placement).mean()), "bound": float(bound.mean())}


def main() -> None:
    """Measure `[case, candidates, turns]` of a list, one after the other."""
    parser = argparse.ArgumentParser(description="A rank of bench_scaling.py.")
    parser.add_argument("--loads", type=Path, required=True)
    parser.add_argument("--what", type=json.loads, required=True)
    parser.add_argument("--patience", type=float, required=True)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    os.environ["LOCAL_WORLD_SIZE"] = str(os.cpu_count())  # one thread of the engine
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    loads = {name: CASES[name].load(options.loads) for name, _, _ in options.what}
    found = [
        measured(name, CASES[name], loads[name], candidates, turns, options.patience)
        for name, candidates, turns in options.what
    ]
    if dist.get_rank() == 0:
        options.output.write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
