"""What a rebalancer tells of itself: events to whoever listens, trace and log in a folder, warnings to the loop."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import FrameType

from torch import Tensor

from distplb.core.placement import Placement
from distplb.errors import DisagreementError, UntrainedError
from distplb.records.event_log import EventLog
from distplb.records.events import RebalanceEvent
from distplb.records.trace_writer import TraceWriter
from distplb.train.agreed_options import Agreed
from distplb.train.decision import why_layers_stay
from distplb.train.pricing import Measured
from distplb.train.rebalance_event import completed
from distplb.train.stop_loss import Pace, StopLoss

__all__ = ["Journal", "Unfinished"]

_LOGGER = logging.getLogger("distplb")


@dataclass(frozen=True)
class Unfinished:
    """An event that waits for the next window to tell how the plan fared.

    Args:
        event: makes it.
        slots_moved: by that rebalance.
        placement: that the next window ran under.
        pace: of the iterations before.
        seconds: that the rebalance took.
    """

    event: Callable[[], RebalanceEvent]
    slots_moved: int
    placement: Placement
    pace: Pace
    seconds: float


class Journal:
    """Tells of rebalances, on this rank alone.

    Args:
        agreed: what the rebalancer was built from.

    Attributes:
        trace: that is written, if any.
        log: that is written, if any.
    """

    def __init__(self, agreed: Agreed) -> None:
        self._names, self._record = agreed.layer_names, agreed.record
        self._unfinished: Unfinished | None = None
        self._staying = set[int]()  # layers that could not be moved when last looked at
        self._last_refusal = ""
        self.trace: TraceWriter | None = None
        self.log: EventLog | None = None
        if agreed.is_writer:
            folder, writer = self._record.folder, self._record.summary_writer
            if folder is not None:
                self.trace = TraceWriter(folder, layers=self._names)
            if folder is not None or writer is not None:
                self.log = EventLog(self._record.events_file, writer)

    @property
    def last_seconds(self) -> float:
        """That the last rebalance took, unless that has been forgotten."""
        return 0.0 if self._unfinished is None else self._unfinished.seconds

    def tell(self, event: Callable[[], RebalanceEvent]) -> None:
        """Whoever listens on this rank. Making the record takes longer than all else here; the log does it beside."""
        if self._record.on_event is not None:
            where = ""
            try:
                record = event()
                where = f" at iteration {record.iteration}"
                self._record.on_event(record)
            except Exception:  # nobody's training ends because of a figure
                _LOGGER.exception("on_event failed%s; training goes on", where)
        if self.log is not None:
            self.log.take(event)

    def tell_of_skipping(self, iteration: int, reason: str, last_applied: int, seconds: dict[str, float]) -> None:
        """A rebalance that was refused or skipped before there was a plan."""
        event = RebalanceEvent(
            iteration=iteration,
            layers=self._names,
            decision="skipped",
            reason=reason,
            seconds=seconds,
            last_applied=last_applied,
        )
        self.tell(lambda: event)

    def begin(self, unfinished: Unfinished) -> None:
        """Tell of a rebalance that has ended, and wait for the next window."""
        self._unfinished = unfinished
        self.tell(unfinished.event)

    def finish(self, load: Tensor, measured: Measured, stop_loss: StopLoss) -> None:
        """The last rebalance's event, now that a window has told how it fared; whether it repaid itself counts."""
        if self._unfinished is None:
            return
        last, repaid, self._unfinished = self._unfinished, None, None
        if last.slots_moved and measured.pace.iterations and last.pace.iterations:
            repaid = stop_loss.repaid(last.pace, measured.pace, measured.last_seconds)
        self.tell(lambda: completed(last.event(), load, last.placement, measured.pace, repaid))

    def forget(self) -> None:
        """How the last plan fared: the next window does not tell of it."""
        self._unfinished = None

    def close(self) -> None:
        """Wait until all is written."""
        for writer in (self.trace, self.log):
            if writer is not None:
                writer.close()

    # --- warnings --------------------------------------------------------------------------------------------

    def warn_of_refusal(self, reason: str) -> None:
        """What is told again and again is warned of once."""
        if reason != self._last_refusal:
            warn(f"distplb has skipped a rebalance: {reason}")
        self._last_refusal = reason

    def warn_of_skipping(self, differing: DisagreementError | UntrainedError) -> None:
        """Ranks that counted or planned differently keep training; where they differ in more, they must not.

        Raises:
            DisagreementError: that one, in this case.
        """
        if isinstance(differing, DisagreementError) and not differing.field.endswith("(digest)"):
            raise differing
        warn(f"distplb has skipped a rebalance: {differing}")

    def warn_of_staying(self, staying: Mapping[int, str]) -> None:
        """Once for each layer, when it begins to stay."""
        newly = {layer: why for layer, why in staying.items() if layer not in self._staying}
        self._staying = set(staying)
        if newly:
            warn(f"distplb: {why_layers_stay(self._names, newly)}")


def warn(text: str) -> None:
    """As of the line of the user's that called distplb."""
    level = 1
    frame: FrameType | None = sys._getframe(0)
    while frame is not None and frame.f_globals.get("__name__", "").split(".")[0] in ("distplb", "contextlib"):
        level, frame = level + 1, frame.f_back
    warnings.warn(text, RuntimeWarning, stacklevel=level)
