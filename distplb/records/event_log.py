"""`EventLog`: writes the records of rebalances and of sampled steps as lines of JSON and as scalars for TensorBoard."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

from distplb.core.arguments import refuse_wrong_types
from distplb.records.events import RebalanceEvent
from distplb.records.json_lines import VERSION
from distplb.records.scalars import scalars, step_scalars
from distplb.records.step_event import StepEvent

__all__ = ["OF_NEXT_WINDOW", "OUTCOME_FORMAT", "EventLog", "SummaryWriter"]

_LOGGER = logging.getLogger("distplb")
OUTCOME_FORMAT = "distplb.outcome"
OF_NEXT_WINDOW = ("imbalance_next", "iteration_seconds_next", "repaid")  # known once that window has been counted


class SummaryWriter(Protocol):
    """The methods that `EventLog` calls; `torch.utils.tensorboard.SummaryWriter` has them."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> Any:
        """Record a number."""

    def add_text(self, tag: str, text_string: str, global_step: int) -> Any:
        """Record a text."""


class EventLog:
    """Writes the records of rebalances and of sampled steps in a background thread, while training continues.

    A call only hands a reference to that thread, which releases the interpreter lock every fraction of a millisecond.
    A call never raises: errors are logged under "distplb", each text once, and the next record is tried as usual.

    The file is appended to. Each rebalance is one line, `RebalanceEvent.to_json`, written when the rebalance has ended.
    When the next window has shown how the plan performed, a short line follows: `"format": "distplb.outcome"`,
    `"version": 1`, the `iteration` of the rebalance, and the fields `imbalance_next`, `iteration_seconds_next` and
    `repaid`. Each sampled step of a `StepBalancer` is one line, `StepEvent.to_json`; give it a log of its own, such as
    `EventLog("run/steps.jsonl")` beside the folder of `Record("run")`, where `distplb report` looks for it.

    >>> import tempfile
    >>> folder = tempfile.TemporaryDirectory()
    >>> log = EventLog(Path(folder.name) / "events.jsonl")
    >>> log(RebalanceEvent(iteration=500, layers=("0",), decision="kept", reason="", seconds={}, last_applied=500))
    >>> log.close()
    >>> from distplb.records.read_log import read_events
    >>> [event.iteration for event in read_events(Path(folder.name) / "events.jsonl")]
    [500]
    >>> folder.cleanup()

    Args:
        path: path of the file, whose folder is created if it does not exist; None writes no file.
        summary_writer: receives numbers under `distplb/`: those of a rebalance at its iteration, with decision and
            reason as text, and those of a step, under `distplb/step/`, at its number.
    """

    def __init__(self, path: str | os.PathLike[str] | None, summary_writer: SummaryWriter | None = None) -> None:
        refuse_wrong_types({"path": (path, (str, os.PathLike, None), "the path of a file")})
        self._path, self._writer = None if path is None else Path(path), summary_writer
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="distplb-events")
        self._failures = set[str]()
        self._is_torn: bool | None = None  # whether the last line may be incomplete; None: check the file

    def __call__(self, event: RebalanceEvent | StepEvent) -> None:
        """Write a record; the log can be the `on_event` of a `Record` or of a `StepBalancer`, on rank 0."""
        self.take(lambda: event)

    def take(self, make: Callable[[], RebalanceEvent | StepEvent]) -> None:
        """Write the record that `make` returns; `make` is called in the log's thread."""
        try:
            self._thread.submit(self._take_down, make)
        except RuntimeError as closed:
            self._warn(closed)

    def close(self) -> None:
        """Wait until everything is written."""
        self._thread.shutdown()

    def _take_down(self, make: Callable[[], RebalanceEvent | StepEvent]) -> None:
        try:
            event = make()
        except Exception as error:
            self._warn(error)
            return
        for write in (self._write_line, self._write_scalars):
            try:
                write(event)
            except Exception as error:
                self._warn(error)

    def _write_line(self, event: RebalanceEvent | StepEvent) -> None:
        if self._path is None:
            return
        if isinstance(event, RebalanceEvent) and event.imbalance_next is not None:
            line = _outcome(event)
        else:
            line = _joined(event.json_parts())
        self._path.parent.mkdir(parents=True, exist_ok=True)
        begin = "\n" * (_is_torn(self._path) if self._is_torn is None else self._is_torn)
        self._is_torn = True
        with self._path.open("a", encoding="utf-8") as file:
            file.write(f"{begin}{line}\n")
        self._is_torn = False

    def _write_scalars(self, event: RebalanceEvent | StepEvent) -> None:
        if self._writer is None:
            return
        if isinstance(event, StepEvent):
            values, number = step_scalars(event), event.step
        else:
            values, number = scalars(event), event.iteration
        for name, value in values.items():
            self._writer.add_scalar(f"distplb/{name}", value, number)
            time.sleep(0)
        if isinstance(event, RebalanceEvent) and event.imbalance_next is None:
            self._writer.add_text("distplb/decision", f"{event.decision}: {event.reason}", event.iteration)

    def _warn(self, error: Exception) -> None:
        text = f"{type(error).__name__}: {error}"
        if text not in self._failures:
            self._failures.add(text)
            _LOGGER.warning("a record could not be written (%s); training continues", text)


def _is_torn(path: Path) -> bool:
    """Whether the last line of a file lacks its newline because the process that wrote it was killed."""
    if not path.is_file() or not path.stat().st_size:
        return False
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"


def _joined(parts: Iterable[str]) -> str:
    """Join the parts; other threads may run after each."""
    written = []
    for part in parts:
        written.append(part)
        time.sleep(0)
    return "".join(written)


def _outcome(event: RebalanceEvent) -> str:
    known = {name: getattr(event, name) for name in OF_NEXT_WINDOW}
    return json.dumps(
        {"format": OUTCOME_FORMAT, "version": VERSION, "iteration": event.iteration} | known, allow_nan=False
    )
