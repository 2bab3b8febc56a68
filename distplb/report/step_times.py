"""`StepTime`: where the time of a step goes, and how far one run is from another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from distplb.report.sampled_steps import SampledSteps

__all__ = ["GROUPS", "OTHER", "PARTS", "StepTime"]

OTHER = "other"  # the sum of parts with names that this version does not know
PARTS = (
    *("experts", "experts backward", "dispatch", "waiting", "waiting backward", "waiting to count"),
    *("count", "split", "push", "push again", "bring home", OTHER),
)
GROUPS: Mapping[str, tuple[str, ...]] = {
    "waiting": ("waiting", "waiting backward", "waiting to count"),
    "push": ("push", "push again", "bring home"),
    "split": ("count", "split"),
    "products": ("experts", "experts backward"),
    "the rest": ("dispatch", OTHER),
}
_OF_EVEN_GPU = ("experts", "experts backward", "dispatch", OTHER)
_BACKWARD = ("experts backward", "waiting backward", "push again", "bring home")
_MEASURED_BACKWARD = "experts backward"


@dataclass(frozen=True)
class StepTime:
    """Seconds of a typical step by part: the mean of the middle half of the steps, sorted by their total.

    The first step after each start is left out as a warm-up, if others are left. If the backward of some steps was
    measured, only these count. Parts add up to the total, which medians of the parts would not.

    >>> StepTime({"experts": 0.08, "waiting": 0.02}, num_steps=5).total
    0.1

    Args:
        parts: seconds by part, in the order of `PARTS`; parts that did not run are left out.
        num_steps: the number of steps in the middle half.
    """

    parts: dict[str, float]
    num_steps: int

    @classmethod
    def of(cls, steps: SampledSteps | None) -> StepTime | None:
        """The time of a typical step; None if no time was recorded."""
        events = () if steps is None else steps.events
        starts = [event.started for event in events]
        warm = [event for event, before in zip(events[1:], starts, strict=False) if event.started == before]
        timed = [_known_parts(event.seconds) for event in warm or events if any(event.seconds.values())]
        timed = [parts for parts in timed if _MEASURED_BACKWARD in parts] or timed
        timed.sort(key=lambda parts: sum(parts.values()))
        middle = timed[len(timed) // 4 : len(timed) - len(timed) // 4]
        if not middle:
            return None
        sums = {name: sum(parts.get(name, 0.0) for parts in middle) for name in PARTS}
        return cls({name: total / len(middle) for name, total in sums.items() if total}, len(middle))

    @property
    def has_backward(self) -> bool:
        """Whether the backward was measured."""
        return _MEASURED_BACKWARD in self.parts

    @property
    def total(self) -> float:
        """Seconds of all parts."""
        return sum(self.parts.values())

    @property
    def even(self) -> StepTime:
        """The fair ceiling: an even GPU with the same skewed experts, which waits for nobody and needs no replica."""
        return StepTime({name: value for name, value in self.parts.items() if name in _OF_EVEN_GPU}, self.num_steps)

    @property
    def groups(self) -> dict[str, float]:
        """Seconds by group of parts, in the order of `GROUPS`."""
        return {name: sum(self.parts.get(part, 0.0) for part in parts) for name, parts in GROUPS.items()}

    def without_backward(self) -> StepTime:
        """The forward alone."""
        return StepTime({name: value for name, value in self.parts.items() if name not in _BACKWARD}, self.num_steps)

    def comparable(self, other: StepTime) -> tuple[StepTime, StepTime]:
        """Both, or the forward of both if either's backward was not measured."""
        if self.has_backward and other.has_backward:
            return self, other
        return self.without_backward(), other.without_backward()

    def minus(self, other: StepTime) -> dict[str, float]:
        """Seconds by group that this one takes longer than another; forward only, if either lacks the backward.

        >>> this = StepTime({"experts": 0.08, "waiting": 0.02}, num_steps=5)
        >>> {name: round(value, 3) for name, value in this.minus(StepTime({"experts": 0.07}, num_steps=5)).items()}
        {'waiting': 0.02, 'push': 0.0, 'split': 0.0, 'products': 0.01, 'the rest': 0.0}
        """
        one, two = self.comparable(other)
        return {name: value - two.groups[name] for name, value in one.groups.items()}


def _known_parts(seconds: Mapping[str, Any]) -> dict[str, float]:
    known = {name: float(value) for name, value in seconds.items() if name in PARTS and name != OTHER}
    unknown = sum(float(value) for name, value in seconds.items() if name not in known)
    return known | ({OTHER: unknown} if unknown else {})
