"""The other intervals between rebalances that a report tries on a trace, and the cost of moves there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from distplb.core.price import MoveModel, TimeCurve
from distplb.core.topology import Topology
from distplb.errors import DistplbError
from distplb.records.trace import Trace
from distplb.report.run import Run
from distplb.study.costs import AssumedJob, recorded_costs
from distplb.study.what_if import PRICED, Study

__all__ = ["with_trials"]

_FACTORS = (1, 2, 0.5, 4, 0.25)  # multiples of the run's own interval, the most informative first
_PARTS = (5, 10, 20, 40)  # divide the trace; with fewer than four judged intervals, chance cannot be ruled out
_MAX_NUMBERS = 24 * 58 * 256  # plans × layers × experts of all trials that were not requested: half a minute
_MAX_TRIALS = 5


def with_trials(
    run: Run,
    every: Sequence[int] | None = None,
    model: MoveModel | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Run:
    """Try other intervals on the run's trace; without a suitable trace, return the run unchanged.

    Args:
        run: the run, with or without a trace.
        every: intervals, in iterations; None chooses some around the run's own, and parts of the trace.
        model: what tokens and moves cost; None takes the costs that the run's events recorded, else assumed ones.
        progress: called with the number of steps done and their total.

    Raises:
        DistplbError: if intervals are requested but there is no trace, or they do not fit it.
    """
    trace, topology = run.trace, run.topology
    if trace is None or topology is None:
        if every:
            raise DistplbError(
                f"{run.name} has no trace to try intervals on; pass the folder of Rebalancer(record=...)"
            )
        return run
    if not every and (trace.num_experts % topology.num_gpus or run.trace_with_tokens is None):
        return run
    model, curve, costs = (model, None, "as given") if model is not None else _costs(run, trace, topology)
    study = Study(trace, topology, model, curve=curve)
    intervals = sorted(set(every or _suitable_intervals(run, study)))
    if not intervals:
        return run
    trials = study.run([(PRICED, interval) for interval in intervals], progress)
    return replace(run, what_if=tuple(trials), costs=costs)


def _costs(run: Run, trace: Trace, topology: Topology) -> tuple[MoveModel, TimeCurve | None, str]:
    """The costs that the last event with measurements recorded, else assumed ones; and their source, in words."""
    recorded = recorded_costs(run.events_with_load)
    if recorded is not None:
        return *recorded, "as this job measured them"
    assumed = "assumed, for experts of DeepSeek-V3's size on H100s, with the recorded tokens scaled to that job"
    return AssumedJob().model(trace, topology.num_gpus), None, assumed


def _suitable_intervals(run: Run, study: Study) -> list[int]:
    """Intervals that the trace can judge and that do not take too long to try."""
    total = study.iterations
    around_own = [round(run.every * factor) for factor in _FACTORS] if run.every else []
    suitable: list[int] = []
    remaining = _MAX_NUMBERS // (study.trace.num_layers * study.trace.num_experts)
    for interval in dict.fromkeys([*around_own, *(total // part for part in _PARTS)]):
        if interval < study.minimum_interval or not study.allows(interval):
            continue
        if total // interval <= remaining and len(suitable) < _MAX_TRIALS:
            suitable.append(interval)
            remaining -= total // interval
    return suitable
