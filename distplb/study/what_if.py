"""Estimate what rebalancing would have saved on a recorded trace: several planners, and other intervals.

Shapes: S steps, T steps of a window, L layers, E experts, R rebalances.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from distplb.core.bound import lower_bound
from distplb.core.cost import busiest_gpu, mean_of_known
from distplb.core.placement import Placement
from distplb.core.price import MoveModel, TimeCurve
from distplb.core.topology import Topology
from distplb.errors import DistplbError
from distplb.planning.plan import plan
from distplb.records.trace import Trace
from distplb.study.bootstrap import estimate_gain
from distplb.study.costs import steps_stood_for
from distplb.study.replay import Planner, Replay, chosen_steps, run_planner, without_empty_steps

__all__ = ["PRICED", "STATIC", "STEPS", "SUM", "WINDOW_STEPS", "Study", "WhatIf", "evenly"]

STATIC, SUM, STEPS, PRICED = "static", "plan on the sum", "plan on the steps", "plan with the price"
WINDOW_STEPS = 64  # that a plan is made from at most, as in a `Rebalancer`
Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class WhatIf:
    """The outcome of a planner on a trace after its first plan, judged on steps that the plans had not seen.

    Means are over steps and layers that have tokens.

    Args:
        every: iterations between rebalances.
        rebalances: R, each followed by one interval that is judged.
        imbalance: busiest GPU / mean GPU, mean over layers and steps.
        imbalance_seen: the same on the steps that the plans were made from.
        worst_step: the largest mean over the layers of one step.
        slots_moved: slots moved by all rebalances, over all layers.
        compute_seconds: modelled time of the busiest GPU, summed over steps and layers.
        move_seconds: modelled time of all moves.
        static_seconds: modelled time of the same steps under the contiguous placement.
        saved: share of `static_seconds` that is saved, moves included; negative if computing and moving take longer.
        low: with `high`, the 95 % interval of `saved`; None if there are too few rebalances to estimate it.
        high: see `low`.
    """

    every: int
    rebalances: int
    imbalance: float
    imbalance_seen: float
    worst_step: float
    slots_moved: int
    compute_seconds: float
    move_seconds: float
    static_seconds: float
    saved: float
    low: float | None
    high: float | None


class Study:
    """Replays of one trace, each compared with the contiguous placement on the steps after its first rebalance.

    Steps without tokens are left out first, and iterations that have no other steps do not count: of a partly filled
    buffer only the filled part is replayed, and moves have as many steps to pay off as if the rest did not exist.

    Args:
        trace: the trace whose loads are replayed; its placements do not matter.
        topology: topology of the EP group.
        model: cost of tokens and moves, as from `AssumedJob.model`.
        curve: maps an expert's tokens to its time, in place of the model's seconds per token.
        window: the most steps that a plan is made from: an even sample of those since the last plan.
        stands_for: consecutive steps of the job that each step of the trace stands for; if None, derived from its
            iterations.
        num_candidates, engine: as in `plan`.

    Raises:
        DistplbError: if the experts cannot be spread evenly over the GPUs, a number is not positive, or no step has
            tokens.
    """

    def __init__(
        self,
        trace: Trace,
        topology: Topology,
        model: MoveModel,
        *,
        curve: TimeCurve | None = None,
        window: int = WINDOW_STEPS,
        stands_for: float | None = None,
        num_candidates: int | None = None,
        engine: str | None = None,
    ) -> None:
        self.stands_for = steps_stood_for(trace) if stands_for is None else stands_for
        if not self.stands_for > 0 or window < 1:
            raise DistplbError(f"stands_for is {self.stands_for}, window is {window}; pass more than 0 steps")
        topology.experts_per_gpu(trace.num_experts)
        self._recorded = trace.iteration.unique()
        self.trace, self.topology, self.window, self._curve = without_empty_steps(trace), topology, window, curve
        self._second = model.seconds_per_token if curve is None else 1e-9
        # Times are first counted per recorded step: one that stands for several steps bears that fraction of a move.
        self._model = replace(
            model,
            seconds_per_token=model.seconds_per_token if curve is None else curve.nanoseconds_per_token * 1e-9,
            bandwidth_inside=model.bandwidth_inside * self.stands_for,
            bandwidth_between=model.bandwidth_between * self.stands_for,
        )
        self._search: dict[str, Any] = {"num_candidates": num_candidates, "engine": engine, "time_curve": curve}
        self._static = self._replay(self.trace, lambda load, current: current, [], None)

    @property
    def iterations(self) -> int:
        """Iterations of the job that the trace covers, recorded or not, except those recorded without tokens."""
        recorded, counted = self._recorded, len(self.trace.iteration.unique())
        span = int(recorded[-1] - recorded[0])
        return round(span * counted / (len(recorded) - 1)) if len(recorded) > 1 else 1

    @property
    def minimum_interval(self) -> int:
        """The fewest iterations between rebalances: recorded iterations may be far apart."""
        return -(-self.iterations // len(self.trace.begins))

    def cuts_of(self, every: int) -> list[int]:
        """The first step of each rebalance's interval, and the end of the last; all have equally many whole iterations.

        Raises:
            DistplbError: if the trace has fewer iterations than one in `every`, or fewer than two intervals.
        """
        begins = self.trace.begins
        recorded = round(every * len(begins) / self.iterations)
        if recorded < 1:
            minimum = self.minimum_interval
            raise DistplbError(
                f"the trace has no step in {every} iteration{'s' * (every != 1)}; rebalance every {minimum} or more"
            )
        if len(begins) < 2:
            raise DistplbError(
                "the trace covers one iteration, but it takes two, one to plan on and one to judge; record for longer"
            )
        if 2 * recorded > len(begins):
            raise DistplbError(
                f"the trace covers {self.iterations} iterations, but rebalancing every {every} takes two intervals, "
                f"one to plan on and one to judge; rebalance every {self.iterations // 2} or less, or record for longer"
            )
        # Whole intervals only: in one that is cut off, moves would not have the time to pay off.
        return [*begins.tolist(), self.trace.num_steps][recorded::recorded]

    def allows(self, every: int) -> bool:
        """Whether a rebalance every `every` iterations can be replayed."""
        try:
            return bool(self.cuts_of(every))
        except DistplbError:
            return False

    def bound(self, every: int) -> float:
        """Lower bound of any placement's mean imbalance, over layers and an even sample of the judged steps."""
        sample = evenly(self.trace.load[self.cuts_of(every)[0] :], WINDOW_STEPS)
        return float(mean_of_known(lower_bound(sample, self.topology, self.trace.num_experts)))

    def run(self, trials: Sequence[tuple[str, int]], progress: Progress | None = None) -> list[WhatIf]:
        """Replay each pair of a planner's name and iterations between rebalances.

        Args:
            trials: pairs of `STATIC`, `SUM`, `STEPS` or `PRICED` (whose plans pay for their moves) and an interval of
                at most half of the iterations that the trace covers.
            progress: called with the number of finished steps and of all steps to replay.

        Raises:
            DistplbError: before anything is replayed, if the trace has no step in an interval, or an interval is longer
                than half of the trace.
        """
        cuts, total = [self.cuts_of(every) for _, every in trials], self.trace.num_steps
        outcomes = []
        for nth, ((planner, every), own_cuts) in enumerate(zip(trials, cuts, strict=True)):
            part = None if progress is None else _part(progress, nth * total, len(trials) * total)
            outcomes.append(self._outcome(planner, every, own_cuts, part))
        return outcomes

    def _outcome(self, planner: str, every: int, cuts: list[int], progress: Progress | None) -> WhatIf:
        trace = chosen_steps(self.trace, slice(cuts[-1]))
        sampling = _SamplingPlanner(self._planner(planner, round(cuts[-1] / len(cuts))), self.window, self._curve)
        replayed = self._replay(trace, sampling, cuts[:-1], progress)
        compute, static = (
            torch.stack([part.sum() for part in one.busiest[cuts[0] : cuts[-1]].split(_lengths(cuts))]).double()
            * self._second
            for one in (replayed, self._static)
        )  # [R], seconds of each interval
        moves = torch.tensor(
            [self._model.seconds(*moved) for moved in replayed.moved.tolist()], dtype=torch.float64, device="cpu"
        )
        if not bool(static.sum()):
            raise DistplbError("the time curve gives 0 ns for the tokens of the trace; pass a measured curve")
        gain = estimate_gain((compute + moves).tolist(), static.tolist())
        uneven = mean_of_known(replayed.imbalance[cuts[0] :], dim=1)
        return WhatIf(
            every=every,
            rebalances=len(moves),
            imbalance=float(mean_of_known(uneven)),
            imbalance_seen=sampling.mean_imbalance,
            worst_step=float(uneven.nan_to_num(nan=1.0).max()),
            slots_moved=replayed.slots_moved,
            compute_seconds=float(compute.sum()) * self.stands_for,
            move_seconds=float(moves.sum()) * self.stands_for,
            static_seconds=float(static.sum()) * self.stands_for,
            saved=gain.share,
            low=gain.low,
            high=gain.high,
        )

    def _replay(self, trace: Trace, planner: Planner, cuts: list[int], progress: Progress | None) -> Replay:
        return run_planner(
            trace, planner, cuts, topology=self.topology, model=self._model, curve=self._curve, progress=progress
        )

    def _planner(self, name: str, steps: int) -> Planner:
        def planned(load: Tensor, current: Placement) -> Placement:
            if name == STATIC:
                return current
            price = self._model.price(len(load), steps) if name == PRICED else 0.0
            load = load.sum(0) if name == SUM else load
            return plan(load, self.topology, current=current, move_price=price, **self._search)

        return planned


class _SamplingPlanner:
    """A planner that gets an even sample of the steps, and records their mean imbalance under its plans."""

    def __init__(self, planner: Planner, window: int, curve: TimeCurve | None) -> None:
        self._planner, self._window, self._curve = planner, window, curve
        self._imbalances: list[float] = []

    @property
    def mean_imbalance(self) -> float:
        return sum(self._imbalances) / len(self._imbalances)

    def __call__(self, load: Tensor, current: Placement) -> Placement:
        load = evenly(load, self._window)
        placement = self._planner(load, current)
        self._imbalances.append(float(mean_of_known(busiest_gpu(load, placement, self._curve)[1])))
        return placement


def evenly(rows: Tensor, limit: int) -> Tensor:
    """An even sample of at most `limit` rows, in order."""
    number = min(limit, len(rows))
    return rows[torch.arange(number, device="cpu") * len(rows) // number]


def _lengths(cuts: Sequence[int]) -> list[int]:
    return [end - begin for begin, end in itertools.pairwise(cuts)]


def _part(progress: Progress, before: int, total: int) -> Progress:
    return lambda done, _: progress(before + done, total)
