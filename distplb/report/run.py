"""`Run`: what a job recorded, read and checked: its rebalances, its trace, its sampled steps, or several of these.

Shapes: L layers, M GPUs.
"""

from __future__ import annotations

import itertools
import math
import os
import statistics
import warnings
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch

from distplb.core.placement import Placement
from distplb.core.topology import Topology
from distplb.errors import DistplbError
from distplb.records.events import RebalanceEvent
from distplb.records.read_loads import read_trace
from distplb.records.read_log import read_events, read_steps
from distplb.records.step_event import StepEvent
from distplb.records.trace import Trace
from distplb.report.formatting import printable
from distplb.report.sampled_steps import SampledSteps
from distplb.report.step_checks import check_step, num_gpus
from distplb.report.step_times import StepTime
from distplb.report.trace_evaluation import Evaluation
from distplb.study.replay import without_empty_steps
from distplb.study.what_if import WhatIf

__all__ = ["Run"]

_EVENTS = "events.jsonl"
_STEPS = "steps.jsonl"


@dataclass(frozen=True, eq=False)
class Run:
    """What a job recorded, as the input of a report.

    Args:
        name: name of the file or folder.
        events: the records of the rebalances, in order of iteration.
        trace: the steps that were recorded.
        topology: topology of the EP group; None takes that of the events, else puts all GPUs of the trace on one node.
            A trace without events may be evaluated on another number of GPUs than it ran on: it then starts there
            with the experts in contiguous order.
        what_if: other intervals between rebalances, tried on the trace by `distplb.study.what_if.Study`.
        costs: where the seconds in `what_if` come from, in words.
        steps: the records of sampled steps, in any order. Their layers may differ from those of events and trace.
        beside: other runs of the same job, whose steps are compared with this one's; see `with_beside`.

    Raises:
        DistplbError: if a record is damaged, or events, trace and topology do not fit together.
    """

    name: str
    events: tuple[RebalanceEvent, ...] = ()
    trace: Trace | None = None
    topology: Topology | None = None
    what_if: tuple[WhatIf, ...] = ()
    costs: str = ""
    steps: tuple[StepEvent, ...] = ()
    beside: tuple[Run, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "events", tuple(self.events))
        for event in self.events:
            _check(self.name, event)
        object.__setattr__(self, "steps", tuple(self.steps))
        for step in self.steps:
            check_step(self.name, step)
        object.__setattr__(self, "topology", self.topology or self._recorded_topology())
        if self.trace is not None and self.topology is not None:
            object.__setattr__(self, "trace", self._on(self.trace, self.topology))

    @classmethod
    def read(cls, path: str | os.PathLike[str], topology: Topology | None = None) -> Run:
        """Read the folder of `Rebalancer(record=...)`, a file of events (`.jsonl`), or a trace (`.npz`).

        A folder may also hold the steps of `StepBalancer(on_event=EventLog("run/steps.jsonl"))`, or nothing else. With
        `topology`, counts `[steps, layers, experts]` in any file that `distplb plan` reads also serve as a trace.

        Raises:
            DistplbError: naming the file, if it is none of these, damaged, or empty.
        """
        path = Path(path)
        if not path.exists():
            raise DistplbError(
                f"there is no file or folder {path}; pass the folder of Rebalancer(record=...), or a file in it"
            )
        folder = path.is_dir()
        logs = [path / _EVENTS, path / _STEPS] if folder else [path] * (path.suffix == ".jsonl")
        events, steps = _read_logs([log for log in logs if log.is_file()])
        is_trace = any(path.glob("*.npz")) if folder else not logs
        if not events and not steps and not is_trace:
            raise DistplbError(
                f"{path} has no events, no trace and no sampled steps; pass the folder of Rebalancer(record=...)"
            )
        trace = read_trace(path, None if topology is None else topology.num_gpus) if is_trace else None
        return cls(path.resolve().name, tuple(events), trace, topology, steps=tuple(steps))

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the L layers, from the last event, else from the trace."""
        if self.events:
            return self.events[-1].layers
        return () if self.trace is None else self.trace.layers

    @cached_property
    def events_with_load(self) -> tuple[RebalanceEvent, ...]:
        """The events that recorded a load, and have the same layers as the last event."""
        return tuple(event for event in self.events if self.has_load(event))

    def has_load(self, event: RebalanceEvent) -> bool:
        """Whether an event is among `events_with_load`."""
        return event.steps > 0 and bool(event.layers) and event.layers == self.layers

    @cached_property
    def evaluation(self) -> Evaluation | None:
        """The evaluation of the trace's steps that have tokens; None if there are none."""
        return (
            None
            if self.trace_with_tokens is None or self.topology is None
            else Evaluation(self.trace_with_tokens, self.topology)
        )

    @cached_property
    def trace_with_tokens(self) -> Trace | None:
        """The trace without the steps that have no tokens; None if no step has any."""
        return None if self.trace is None or not bool(self.trace.load.any()) else without_empty_steps(self.trace)

    @property
    def empty_steps(self) -> int:
        """How many steps of the trace are left out because they have no tokens."""
        return (
            0
            if self.trace is None or self.trace_with_tokens is None
            else self.trace.num_steps - self.trace_with_tokens.num_steps
        )

    @cached_property
    def empty_layers(self) -> tuple[str, ...]:
        """Layers without tokens in any step of the trace or, if there is no trace, in any window of the events."""
        if self.trace_with_tokens is not None:
            has_tokens = self.trace_with_tokens.load.any(2).any(0).tolist()
        else:
            levels = [event.imbalance_before for event in self.events_with_load]
            has_tokens = [any(level is not None for level in layer) for layer in zip(*levels, strict=True)]
        return tuple(name for name, has in zip(self.layers, has_tokens, strict=False) if not has)

    @cached_property
    def sampled(self) -> SampledSteps | None:
        """The sampled steps, in order; None if there are none."""
        return SampledSteps.of(self.steps) if self.steps else None

    @cached_property
    def step_time(self) -> StepTime | None:
        """Where the time of a sampled step goes; None if no time was recorded."""
        return StepTime.of(self.sampled)

    @cached_property
    def every(self) -> int | None:
        """The median number of iterations between rebalances; None if fewer than two are known."""
        numbers = [event.iteration for event in self.events]
        gaps = [later - earlier for earlier, later in itertools.pairwise(numbers)]
        return round(statistics.median(gaps)) if gaps else None

    def _recorded_topology(self) -> Topology | None:
        for event in reversed(self.events):
            gpus = len(event.tokens_of_gpu_after[0]) if event.tokens_of_gpu_after else 0
            if gpus and event.num_nodes:
                return Topology(event.num_nodes, gpus // event.num_nodes)
        of_steps = self._topology_of_steps()
        if self.trace is None:
            return of_steps
        gpus = self.trace.placements[0].num_gpus
        return of_steps if of_steps is not None and of_steps.num_gpus == gpus else Topology(1, gpus)

    def _topology_of_steps(self) -> Topology | None:
        last = None if self.sampled is None else self.sampled.events[-1]
        gpus = None if last is None else num_gpus(last)
        return None if last is None or gpus is None else Topology(last.num_nodes, gpus // last.num_nodes)

    def _on(self, trace: Trace, topology: Topology) -> Trace:
        num_gpus = trace.placements[0].num_gpus
        if self.events and (num_gpus != topology.num_gpus or trace.layers != self.layers):
            raise DistplbError(
                f"{printable(self.name)}: its trace (GPUs: {num_gpus}, layers: {trace.num_layers}) does not match the "
                f"topology (GPUs: {topology.num_gpus}) or the events (layers: {len(self.layers)}); pass files of one "
                "job, and the topology that it ran on or none"
            )
        if num_gpus == topology.num_gpus:
            return trace
        topology.experts_per_gpu(trace.num_experts)
        contiguous = Placement.contiguous(trace.num_layers, trace.num_experts, topology.num_gpus)
        return replace(trace, placements=(contiguous,), placement_of_step=torch.zeros_like(trace.placement_of_step))


def _read_logs(logs: list[Path]) -> tuple[list[RebalanceEvent], list[StepEvent]]:
    """The rebalances of the first log, and the steps of all; a warning about an incomplete record is given once."""
    events, steps = list[RebalanceEvent](), list[StepEvent]()
    for number, log in enumerate(logs):
        steps += read_steps(log)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            events += [] if number else read_events(log)
    return events, steps


def _check(name: str, event: RebalanceEvent) -> None:
    """Check the type and size of everything that is drawn: a log may come from anywhere."""
    try:
        wrong = _wrong_numbers(event) or _wrong_sizes(event)
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        wrong = str(error)
    if wrong:
        raise DistplbError(f"{printable(name)}: the event of iteration {event.iteration!r:.20} is damaged ({wrong})")


def _wrong_numbers(event: RebalanceEvent) -> str:
    numbers = [
        *(event.iteration, event.steps, event.num_experts, event.num_nodes, event.max_violation),
        *(event.slots_moved, event.bytes_inside, event.bytes_between, event.tokens_peak_before),
        *(event.iteration_seconds, event.iteration_seconds_next or 0, *event.seconds.values()),
        *(event.balancedness_vllm_before, event.balancedness_sglang_before),
        *(level for levels in _levels(event) for level in levels if level is not None),
        *(tokens for row in event.tokens_of_gpu_before + event.tokens_of_gpu_after for tokens in row),
        *(number for pairs in event.hottest_experts for pair in pairs for number in pair),
    ]
    if not all(math.isfinite(number) and number >= 0 for number in numbers):
        return "a number is negative or not finite"
    texts = (event.decision, event.reason, *event.layers, *event.seconds)
    return "" if all(isinstance(text, str) for text in texts) else "a name is not text"


def _levels(event: RebalanceEvent) -> list[tuple[float | None, ...]]:
    """The imbalances by layer that an event has; None for layers without tokens."""
    fields = [event.imbalance_before, event.imbalance_after, event.imbalance_bound, event.imbalance_next]
    return [levels for levels in fields if levels is not None]


def _wrong_sizes(event: RebalanceEvent) -> str:
    layers = len(event.layers)
    if event.steps and any(len(levels) != layers for levels in _levels(event)):
        return f"layers: {layers}, imbalances: {len(event.imbalance_before)}"
    of_window = [event.imbalance_before, event.imbalance_after, event.imbalance_bound]
    if event.steps and layers and any(set(levels) == {None} for levels in of_window):
        return f"steps: {event.steps}, but no tokens in any layer"
    tables = [event.tokens_of_gpu_before, event.tokens_of_gpu_after]
    if any(len(table) not in (0, layers) for table in [*tables, event.hottest_experts]):
        return f"layers: {layers}, but tokens for another number of them"
    gpus = {len(row) for table in tables for row in table}
    if len(gpus) > 1 or 0 in gpus or any(number % (event.num_nodes or 1) for number in gpus):
        return f"nodes: {event.num_nodes}, GPUs by layer: {sorted(gpus)}"
    return (
        "" if all(len(pair) == 2 for pairs in event.hottest_experts for pair in pairs) else "hottest experts: not pairs"
    )
