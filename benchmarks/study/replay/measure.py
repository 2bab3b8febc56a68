"""How long a job would have waited under every planner, on one trace after the other.

Shapes: S steps, T steps of a window, L layers, E experts, M GPUs, K candidates.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from functools import partial

from torch import Tensor

import distplb
from benchmarks.shared import baselines
from benchmarks.shared.tables import progress
from benchmarks.shared.traces import Case
from distplb import MoveModel, Placement, replay
from distplb.study.costs import AssumedJob
from distplb.study.replay import Planner, Replay

STATIC, GREEDY, SUM, STEPS, PRICED = "static", "greedy", "ours on the sum", "ours on the steps", "ours with the price"
JOB = AssumedJob()


@dataclass(frozen=True)
class Result:
    """The replays of a case, by planner."""

    case: Case
    model: MoveModel
    every: int
    replays: dict[str, Replay]

    @property
    def even(self) -> Tensor:
        """`[S]` float64: modelled seconds of each step if all GPUs had the same load."""
        return self.case.trace.load.sum((1, 2)).double() / self.case.topology.num_gpus * self.model.seconds_per_token

    def uneven(self, name: str) -> Tensor:
        """`[S]`: imbalance of each step after the first rebalance, mean over layers."""
        return self.replays[name].imbalance[self.every :].mean(1)

    def seconds(self, name: str) -> Tensor:
        """`[S]` float64: modelled seconds of each step; moves count in the first step after them."""
        run = self.replays[name]
        seconds = run.busiest.sum(1).double() * self.model.seconds_per_token
        for step, (inside, between) in zip(run.rebalance_steps, run.moved.tolist(), strict=True):
            seconds[step] += self.model.seconds(inside, between)
        return seconds

    def saved(self, name: str) -> float:
        """The share of the seconds of static that a planner saves."""
        return 1 - self.replays[name].seconds / self.replays[STATIC].seconds


def planners_of(case: Case, model: MoveModel, options: argparse.Namespace, engine: str) -> dict[str, Planner]:
    """All planners that are compared, by name."""
    cluster = {"topology": case.topology, "num_candidates": options.candidates, "engine": engine}

    def priced(load: Tensor, current: Placement, times: float = 1.0) -> Placement:
        inside, between = model.price(len(load), options.every)
        return distplb.plan(load, current=current, move_price=(times * inside, times * between), **cluster)

    planners: dict[str, Planner] = {
        STATIC: lambda load, current: current,
        GREEDY: partial(greedy, case),
        SUM: lambda load, current: distplb.plan(load.sum(0), current=current, **cluster),
        STEPS: lambda load, current: distplb.plan(load, current=current, **cluster),
        PRICED: priced,
    }
    return planners | {dearer(times): partial(priced, times=times) for times in options.dearer}


def dearer(times: float) -> str:
    """The name of a planner at a multiple of the price."""
    return f"{PRICED} × {times:g}"


def greedy(case: Case, load: Tensor, current: Placement) -> Placement:
    """DeepSeek's greedy planner, on the sum; it ignores the placement in force."""
    table = baselines.greedy_numpy(load.sum(0), case.topology, current.num_slots)
    return Placement(table, current.num_experts, current.num_gpus)


def replayed(case: Case, options: argparse.Namespace, engine: str) -> Result:
    """Replay a case under every planner."""
    model = JOB.model(case.trace, case.topology.num_gpus)
    replays = {}
    for name, planner in planners_of(case, model, options, engine).items():
        progress(f"{case.title}: {name}")
        replays[name] = replay(case.trace, planner, topology=case.topology, every=options.every, model=model)
    return Result(case, model, options.every, replays)
