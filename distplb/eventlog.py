"""`EventLog`: the records of all rebalances as lines of JSON, and as scalars for TensorBoard."""

from __future__ import annotations

import json
import logging
import os
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from distplb.arguments import refuse_wrong_types
from distplb.errors import DistplbError
from distplb.events import RebalanceEvent

__all__ = ["EventLog", "SummaryWriter", "read_events", "scalars"]

_LOGGER = logging.getLogger("distplb")
_OUTCOME, _VERSION = "distplb.outcome", 1
_TOLD_LATER = ("imbalance_next", "iteration_seconds_next", "repaid")  # by the next window


class SummaryWriter(Protocol):
    """What is asked of a writer of scalars: `torch.utils.tensorboard.SummaryWriter` has it."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> Any:
        """Take a number down."""

    def add_text(self, tag: str, text_string: str, global_step: int) -> Any:
        """Take a text down."""


class EventLog:
    """Takes the record of each rebalance and writes it, beside the training, from a thread of its own.

    A call costs the training thread the time of handing over a reference, and the writing lets go of the interpreter
    every fraction of a millisecond. It never raises: what goes wrong is logged under "distplb", once for each text, and
    the next record is tried again.

    The file is appended to. A rebalance is one line, `RebalanceEvent.to_json`, written when the rebalance is done; when
    the next window has told how it fared, a short line follows it: `"format": "distplb.outcome"`, `"version": 1`, the
    `iteration` that it belongs to, and the fields `imbalance_next`, `iteration_seconds_next` and `repaid`.

    >>> import tempfile
    >>> folder = tempfile.TemporaryDirectory()
    >>> log = EventLog(Path(folder.name) / "events.jsonl")
    >>> log(RebalanceEvent(iteration=500, layers=("0",), decision="kept", reason="", seconds={}, last_applied=500))
    >>> log.close()
    >>> [event.iteration for event in read_events(Path(folder.name) / "events.jsonl")]
    [500]
    >>> folder.cleanup()

    Args:
        path: of the file; its folder is made if need be. None for no file.
        summary_writer: gets `scalars` at the iteration of the rebalance, and decision and reason as a text.
    """

    def __init__(self, path: str | os.PathLike[str] | None, summary_writer: SummaryWriter | None = None) -> None:
        refuse_wrong_types({"path": (path, (str, os.PathLike, None), "the path of a file")})
        self._path, self._writer = None if path is None else Path(path), summary_writer
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="distplb-events")
        self._failures = set[str]()
        self._is_torn = False  # whether the last line may have been written in part

    def __call__(self, event: RebalanceEvent) -> None:
        """Take the record; as `on_event` of a `Rebalancer` on rank 0."""
        self.take(lambda: event)

    def take(self, make: Callable[[], RebalanceEvent]) -> None:
        """Take a record that is still to be made, which is done in the log's thread."""
        try:
            self._thread.submit(self._take_down, make)
        except RuntimeError as closed:
            self._tell(closed)

    def close(self) -> None:
        """Wait until all is written."""
        self._thread.shutdown()

    def _take_down(self, make: Callable[[], RebalanceEvent]) -> None:
        try:
            event = make()
        except Exception as error:
            self._tell(error)
            return
        for write in (self._write_line, self._write_scalars):
            try:
                write(event)
            except Exception as error:
                self._tell(error)

    def _write_line(self, event: RebalanceEvent) -> None:
        if self._path is None:
            return
        line = _let_go(event.json_parts()) if event.imbalance_next is None else _outcome(event)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        begin, self._is_torn = "\n" * self._is_torn, True
        with self._path.open("a", encoding="utf-8") as file:
            file.write(f"{begin}{line}\n")
        self._is_torn = False

    def _write_scalars(self, event: RebalanceEvent) -> None:
        if self._writer is None:
            return
        for name, value in scalars(event).items():
            self._writer.add_scalar(f"distplb/{name}", value, event.iteration)
            time.sleep(0)
        if event.imbalance_next is None:
            self._writer.add_text("distplb/decision", f"{event.decision}: {event.reason}", event.iteration)

    def _tell(self, error: Exception) -> None:
        text = f"{type(error).__name__}: {error}"
        if text not in self._failures:
            self._failures.add(text)
            _LOGGER.warning("the record of a rebalance could not be written (%s); training goes on", text)


def scalars(event: RebalanceEvent) -> dict[str, float]:
    """What of a record is a number over time; means over layers.

    `now` is of the window that was planned on, under the placement in force while it was counted; `expected` of the
    same window under the plan; `next` of the window after it, under the plan, and there only in a completed record.

    Tokens, bytes and slots are counts, seconds are seconds; the others are ratios: imbalance >= 1, balancedness <= 1
    (`distplb.balance`), MaxVio >= 0.
    """
    if event.imbalance_next is not None:
        later = {"imbalance/next": _mean(event.imbalance_next)}
        if event.iteration_seconds_next:
            later["seconds/iteration_next"] = event.iteration_seconds_next
        return later
    found: dict[str, float] = {f"seconds/{stage}": seconds for stage, seconds in event.seconds.items()}
    found |= {"last_applied": event.last_applied}
    if not event.steps:  # nothing is known of the load
        return found
    for when, suffix in (("now", "before"), ("expected", "after")):
        found[f"imbalance/{when}"] = _mean(getattr(event, f"imbalance_{suffix}"))
        for name in ("balancedness_vllm", "balancedness_sglang", "tokens_peak", "tokens_p99"):
            found[f"{name}/{when}"] = getattr(event, f"{name}_{suffix}")
    found |= {"imbalance/bound": _mean(event.imbalance_bound), "max_violation": event.max_violation}
    for name in ("slots_moved", "bytes_inside", "bytes_between"):
        found[f"moved/{name}"] = getattr(event, name)
    if event.iteration_seconds:
        found["seconds/iteration"] = event.iteration_seconds
    return found


def read_events(path: str | os.PathLike[str]) -> list[RebalanceEvent]:
    """The records of a file, in the order of iterations, each complete as far as its next window has told.

    Of a job that was resumed and went through iterations again, those of its last life. A line that was written in
    part, because the job was killed or the disk was full, is left out with a warning.

    Raises:
        DistplbError: naming the file and line, if it cannot be read or holds something else.
    """
    refuse_wrong_types({"path": (path, (str, os.PathLike), "the path of a file that an EventLog wrote")})
    try:
        lines = Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise DistplbError(f"{path} cannot be read ({error.strerror}); pass a file that an EventLog wrote") from error
    found: dict[int, RebalanceEvent] = {}
    for number, line in enumerate(lines, start=1):
        try:
            document = json.loads(line)
        except (ValueError, RecursionError):
            if line.strip():
                warnings.warn(f"{path}: line {number} is not whole, and left out", RuntimeWarning, stacklevel=2)
            continue
        try:
            _take(document, line, found)
        except (DistplbError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DistplbError(f"{path}, line {number}: {error}; pass a file that an EventLog wrote") from error
    return list(found.values())


def _take(document: Mapping[str, Any], line: str, found: dict[int, RebalanceEvent]) -> None:
    """Add what a line says."""
    if not isinstance(document, dict) or document.get("format") != _OUTCOME:
        event = RebalanceEvent.from_json(line)
        for iteration in [one for one in found if one >= event.iteration]:  # of an earlier life of the job
            del found[iteration]
        found[event.iteration] = event
        return
    if document["version"] != _VERSION:
        raise DistplbError(f"it has version {document['version']!r:.40}; this distplb reads {_VERSION}")
    if document["iteration"] in found:
        known = {name: document[name] for name in _TOLD_LATER}
        event = found[document["iteration"]]
        found[event.iteration] = replace(event, **known | {"imbalance_next": tuple(known["imbalance_next"])})


def _let_go(parts: Iterable[str]) -> str:
    """All of them, with a chance for other threads after each."""
    found = []
    for part in parts:
        found.append(part)
        time.sleep(0)
    return "".join(found)


def _outcome(event: RebalanceEvent) -> str:
    known = {name: getattr(event, name) for name in _TOLD_LATER}
    return json.dumps({"format": _OUTCOME, "version": _VERSION, "iteration": event.iteration} | known, allow_nan=False)


def _mean(values: tuple[float, ...]) -> float:
    return sum(values) / len(values)
