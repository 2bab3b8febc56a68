"""What a rebalancer reports: events for callbacks, a trace and a log in a folder, and warnings."""

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
    """An event that the next window will complete, once it shows how well the plan worked.

    Args:
        event: builds the event.
        slots_moved: how many slots the rebalance moved.
        placement: the placement that the next window runs under.
        pace: the pace of the iterations before the rebalance.
        seconds: how long the rebalance took.
    """

    event: Callable[[], RebalanceEvent]
    slots_moved: int
    placement: Placement
    pace: Pace
    seconds: float


class Journal:
    """Reports rebalances, on this rank only.

    Args:
        agreed: the rebalancer's options.

    Attributes:
        trace: the trace that this rank writes, if any.
        log: the event log that this rank writes, if any.
    """

    def __init__(self, agreed: Agreed) -> None:
        self._names, self._record = agreed.layer_names, agreed.record
        self._unfinished: Unfinished | None = None
        self._staying = set[int]()  # layers that could not be moved at the last check
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
        """Seconds that the last rebalance took; 0 if its event has been dropped."""
        return 0.0 if self._unfinished is None else self._unfinished.seconds

    def tell(self, event: Callable[[], RebalanceEvent]) -> None:
        """Pass an event to `on_event` and the log. Building it is slow; the log does so in the background."""
        if self._record.on_event is not None:
            where = ""
            try:
                record = event()
                where = f" at iteration {record.iteration}"
                self._record.on_event(record)
            except Exception:  # a failing callback must not end the training
                _LOGGER.exception("on_event failed%s; training continues", where)
        if self.log is not None:
            self.log.take(event)

    def tell_of_skipping(self, iteration: int, reason: str, last_applied: int, seconds: dict[str, float]) -> None:
        """Report a rebalance that was refused or skipped before there was a plan."""
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
        """Report a rebalance that has ended, and keep its event until the next window completes it."""
        self._unfinished = unfinished
        self.tell(unfinished.event)

    def finish(self, load: Tensor, measured: Measured, stop_loss: StopLoss) -> None:
        """Complete and report the last rebalance's event, and tell the stop-loss whether the rebalance paid off."""
        if self._unfinished is None:
            return
        last, repaid, self._unfinished = self._unfinished, None, None
        if last.slots_moved and measured.pace.iterations and last.pace.iterations:
            repaid = stop_loss.repaid(last.pace, measured.pace, measured.last_seconds)
        self.tell(lambda: completed(last.event(), load, last.placement, measured.pace, repaid))

    def forget(self) -> None:
        """Drop the open event of the last plan, because the next window does not show how well it worked."""
        self._unfinished = None

    def close(self) -> None:
        """Wait until trace and log are written."""
        for writer in (self.trace, self.log):
            if writer is not None:
                writer.close()

    # --- warnings --------------------------------------------------------------------------------------------

    def warn_of_refusal(self, reason: str) -> None:
        """Warn of a refused rebalance, unless the last one was refused for the same reason."""
        if reason != self._last_refusal:
            warn(f"distplb has skipped a rebalance: {reason}")
        self._last_refusal = reason

    def warn_of_skipping(self, differing: DisagreementError | UntrainedError) -> None:
        """Warn that ranks counted or planned differently; training continues.

        Raises:
            DisagreementError: the error itself, if ranks differ in anything else; training must stop then.
        """
        if isinstance(differing, DisagreementError) and not differing.field.endswith("(digest)"):
            raise differing
        warn(f"distplb has skipped a rebalance: {differing}")

    def warn_of_staying(self, staying: Mapping[int, str]) -> None:
        """Warn of layers that cannot be moved, unless that was so at the last check."""
        newly = {layer: why for layer, why in staying.items() if layer not in self._staying}
        self._staying = set(staying)
        if newly:
            warn(f"distplb: {why_layers_stay(self._names, newly)}")


def warn(text: str) -> None:
    """Warn at the line of the user's code that called distplb."""
    level = 1
    frame: FrameType | None = sys._getframe(0)
    while frame is not None and frame.f_globals.get("__name__", "").split(".")[0] in ("distplb", "contextlib"):
        level, frame = level + 1, frame.f_back
    warnings.warn(text, RuntimeWarning, stacklevel=level)
