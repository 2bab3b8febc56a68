"""`SampledSteps`: the steps that a `StepBalancer` recorded, in order and as columns.

Shapes: S sampled steps, N pairs of a sampled step and a layer that had tokens in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from distplb.records.step_event import StepEvent

__all__ = ["SampledSteps", "mean_of", "worst_of"]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def mean_of(levels: Floats) -> float | None:
    """The mean of the known values; None if there are none.

    >>> mean_of(np.array([1.0, np.nan, 2.0])), mean_of(np.array([np.nan]))
    (1.5, None)
    """
    known = levels[~np.isnan(levels)]
    return float(known.mean()) if len(known) else None


def worst_of(levels: Floats) -> float | None:
    """The largest of the known values; None if there are none.

    >>> worst_of(np.array([1.0, np.nan, 2.0]))
    2.0
    """
    known = levels[~np.isnan(levels)]
    return float(known.max()) if len(known) else None


@dataclass(frozen=True, eq=False)
class SampledSteps:
    """Sampled steps in the order in which they ran. Layers without tokens in a step are left out of it.

    Args:
        events: the S records, in order.
        at: `[S]`, the number of each step; a job that was resumed goes on counting.
        resumed_at: the first sampled step of each later start of the job.
        layers: names of all layers, in the order in which they first occur.
        step, layer: `[N]`, index in `events` and in `layers` of each pair.
        before, after, bound: `[N]`, the imbalance of each pair; NaN if it was not recorded.
        replicas: `[N]`, the replicas of each pair.
    """

    events: tuple[StepEvent, ...]
    at: Floats
    resumed_at: tuple[int, ...]
    layers: tuple[str, ...]
    step: Ints
    layer: Ints
    before: Floats
    after: Floats
    bound: Floats
    replicas: Ints

    @classmethod
    def of(cls, events: Sequence[StepEvent]) -> SampledSteps:
        """The steps of a log, which may be in any order."""
        ordered = tuple(sorted(events, key=lambda event: (event.started, event.step)))
        at, resumed_at = _numbered(ordered)
        index_of: dict[str, int] = {}
        rows = []
        for number, event in enumerate(ordered):
            unknown = (None,) * len(event.layers)
            levels = (event.imbalance_before, event.imbalance_after, event.imbalance_bound)
            replicas = map(len, event.replicas or ((),) * len(event.layers))
            columns = zip(event.layers, *(one or unknown for one in levels), replicas, strict=True)
            for name, before, after, bound, count in columns:
                index = index_of.setdefault(name, len(index_of))
                if before is not None or after is not None:
                    rows.append((number, index, before, after, bound, count))
        table = np.array(rows, dtype=np.float64).reshape(-1, 6).T
        step, layer, counts = (table[column].astype(np.int64) for column in (0, 1, 5))
        before, after, bound = table[2:5]
        return cls(ordered, at, resumed_at, tuple(index_of), step, layer, before, after, bound, counts)

    @cached_property
    def by_step(self) -> tuple[Floats, Floats, Floats]:
        """`[S]`, three times: the mean over the layers that have tokens, before, after, and of the bound; else NaN."""
        return tuple(self._by_step(levels) for levels in (self.before, self.after, self.bound))  # type: ignore[return-value]

    def _by_step(self, levels: Floats) -> Floats:
        known = ~np.isnan(levels)
        total = np.bincount(self.step[known], levels[known], len(self.events))
        count = np.bincount(self.step[known], minlength=len(self.events))
        return np.asarray(np.divide(total, count, out=np.full(len(self.events), np.nan), where=count > 0))


def _numbered(ordered: Sequence[StepEvent]) -> tuple[Floats, tuple[int, ...]]:
    """The number of each step, which goes on counting after a restart; and the first step of each later start."""
    at: list[int] = []
    resumed_at: list[int] = []
    past = 0
    for number, event in enumerate(ordered):
        if number and event.started != ordered[number - 1].started:
            past = at[-1]
            resumed_at.append(past + event.step)
        at.append(past + event.step)
    return np.array(at, dtype=np.float64), tuple(resumed_at)
