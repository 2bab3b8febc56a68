"""`EventLog`: writes the records of all rebalances as lines of JSON and as scalars for TensorBoard."""

from __future__ import annotations

import json
import logging
import os
import re
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from distplb.core.arguments import refuse_wrong_types, whole_number
from distplb.core.cost import mean_of_layers
from distplb.errors import DistplbError
from distplb.records.events import RebalanceEvent

__all__ = ["EventLog", "SummaryWriter", "check_log", "read_events", "scalars"]

_LOGGER = logging.getLogger("distplb")
_EVENT, _OUTCOME, _VERSION = "distplb.event", "distplb.outcome", 1
_MARK = '{"format": "distplb.'  # the start of each record
_TORN_EVENT = re.compile(r'\{"format": "distplb\.event", "version": 1, "iteration": (\d{1,18}),')
_MAX_LINE_BYTES = 1 << 24
_OF_NEXT_WINDOW = ("imbalance_next", "iteration_seconds_next", "repaid")  # known once that window has been counted


class SummaryWriter(Protocol):
    """The methods that `EventLog` calls; `torch.utils.tensorboard.SummaryWriter` has them."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> Any:
        """Record a number."""

    def add_text(self, tag: str, text_string: str, global_step: int) -> Any:
        """Record a text."""


class EventLog:
    """Writes the record of each rebalance in a background thread, while training continues.

    A call only hands a reference to that thread, which releases the interpreter lock every fraction of a millisecond.
    A call never raises: errors are logged under "distplb", each text once, and the next record is tried as usual.

    The file is appended to. Each rebalance is one line, `RebalanceEvent.to_json`, written when the rebalance has ended.
    When the next window has shown how the plan performed, a short line follows: `"format": "distplb.outcome"`,
    `"version": 1`, the `iteration` of the rebalance, and the fields `imbalance_next`, `iteration_seconds_next` and
    `repaid`.

    >>> import tempfile
    >>> folder = tempfile.TemporaryDirectory()
    >>> log = EventLog(Path(folder.name) / "events.jsonl")
    >>> log(RebalanceEvent(iteration=500, layers=("0",), decision="kept", reason="", seconds={}, last_applied=500))
    >>> log.close()
    >>> [event.iteration for event in read_events(Path(folder.name) / "events.jsonl")]
    [500]
    >>> folder.cleanup()

    Args:
        path: path of the file, whose folder is created if it does not exist; None writes no file.
        summary_writer: receives `scalars` at the iteration of the rebalance, and decision and reason as text.
    """

    def __init__(self, path: str | os.PathLike[str] | None, summary_writer: SummaryWriter | None = None) -> None:
        refuse_wrong_types({"path": (path, (str, os.PathLike, None), "the path of a file")})
        self._path, self._writer = None if path is None else Path(path), summary_writer
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="distplb-events")
        self._failures = set[str]()
        self._is_torn: bool | None = None  # whether the last line may be incomplete; None: check the file

    def __call__(self, event: RebalanceEvent) -> None:
        """Write a record; the log can be the `on_event` of a `Record`, on rank 0."""
        self.take(lambda: event)

    def take(self, make: Callable[[], RebalanceEvent]) -> None:
        """Write the record that `make` returns; `make` is called in the log's thread."""
        try:
            self._thread.submit(self._take_down, make)
        except RuntimeError as closed:
            self._warn(closed)

    def close(self) -> None:
        """Wait until everything is written."""
        self._thread.shutdown()

    def _take_down(self, make: Callable[[], RebalanceEvent]) -> None:
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

    def _write_line(self, event: RebalanceEvent) -> None:
        if self._path is None:
            return
        line = _joined(event.json_parts()) if event.imbalance_next is None else _outcome(event)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        begin = "\n" * (_is_torn(self._path) if self._is_torn is None else self._is_torn)
        self._is_torn = True
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

    def _warn(self, error: Exception) -> None:
        text = f"{type(error).__name__}: {error}"
        if text not in self._failures:
            self._failures.add(text)
            _LOGGER.warning("the record of a rebalance could not be written (%s); training continues", text)


def scalars(event: RebalanceEvent) -> dict[str, float]:
    """The numbers of a record that are worth following over time.

    `now` describes the window that was planned on, under the placement in force while it was counted; `expected` the
    same window under the plan; `next` the window after it, under the plan, which only a completed record has.

    Tokens, bytes and slots are counts, seconds are seconds, and `last_applied` is an iteration. The others are ratios:
    imbalance >= 1, the mean over the layers that had tokens; balancedness <= 1 (`distplb.core.balance`); MaxVio >= 0.
    """
    if event.imbalance_next is not None:
        next_level = _mean_imbalance("next", event.imbalance_next)
        if event.iteration_seconds_next:
            next_level["seconds/iteration_next"] = event.iteration_seconds_next
        return next_level
    values: dict[str, float] = {f"seconds/{stage}": seconds for stage, seconds in event.seconds.items()}
    values |= {"last_applied": event.last_applied}
    if not event.steps:  # the load is unknown
        return values
    for when, suffix in (("now", "before"), ("expected", "after")):
        values |= _mean_imbalance(when, getattr(event, f"imbalance_{suffix}"))
        for name in ("balancedness_vllm", "balancedness_sglang", "tokens_peak", "tokens_p99"):
            values[f"{name}/{when}"] = getattr(event, f"{name}_{suffix}")
    values |= _mean_imbalance("bound", event.imbalance_bound) | {"max_violation": event.max_violation}
    for name in ("slots_moved", "bytes_inside", "bytes_between"):
        values[f"moved/{name}"] = getattr(event, name)
    if event.iteration_seconds:
        values["seconds/iteration"] = event.iteration_seconds
    return values


def read_events(path: str | os.PathLike[str], max_bytes: int = 2**30) -> list[RebalanceEvent]:
    """Read the records of a file, in order of iteration, each with its outcome if the file has it.

    If a job was resumed and repeated iterations, the records of the last run are used. A record that is incomplete,
    because the job was killed or the disk was full, is left out with a warning; a record that follows it on the same
    line is kept.

    Args:
        path: path of the file.
        max_bytes: refuse a larger file; a line may have at most 16 MiB.

    Raises:
        DistplbError: naming the file and line, if it cannot be read, is too large, or holds something else.
    """
    refuse_wrong_types({"path": (path, (str, os.PathLike), "the path of a file that an EventLog wrote")})
    max_bytes = whole_number("max_bytes", max_bytes, minimum=1)
    events: dict[int, RebalanceEvent] = {}
    torn: list[int] = []
    is_log = True
    try:
        size = Path(path).stat().st_size
        if size > max_bytes:
            raise DistplbError(
                f"{path} has {size} bytes, but max_bytes allows {max_bytes}; pass a larger max_bytes if you trust it"
            )
        for number, text in _records(Path(path)):
            try:
                document = json.loads(text)
            except (ValueError, RecursionError):
                torn.append(number)
                is_log = is_log and text.startswith(_MARK[: len(text)])
                _rewind_to_torn(text, events)
                continue
            try:
                _add(document, text, events)
            except (DistplbError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise DistplbError(f"{path}, line {number}: {error}; pass a file that an EventLog wrote") from error
    except OSError as error:
        raise DistplbError(f"{path} cannot be read ({error.strerror}); pass a file that an EventLog wrote") from error
    if torn and not events and not is_log:
        raise DistplbError(f"{path}, line {torn[0]}: it is not JSON; pass a file that an EventLog wrote")
    if torn:
        lines = f"line {torn[0]} is" if len(torn) == 1 else f"lines {', '.join(map(str, torn[:9]))} are"
        more = f" (and {len(torn) - 9} more)" if len(torn) > 9 else ""
        warnings.warn(f"{path}: {lines} incomplete and left out{more}", RuntimeWarning, stacklevel=2)
    return list(events.values())


def check_log(path: Path, layers: Sequence[str], num_experts: int, num_gpus: int) -> None:
    """Check that a log to append to, if it exists, begins with a record of the same job.

    Raises:
        DistplbError: naming the file, if it is not a log or belongs to another job.
    """
    if not path.is_file():
        return
    text = next((text for _, text in _records(path)), "")
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        document = None
        if text.startswith(_MARK[: len(text)]):  # a truncated record, or an empty file
            return
    if not isinstance(document, dict) or document.get("format") not in (_EVENT, _OUTCOME):
        raise DistplbError(f"{path} is not a log of rebalances; record in another folder, or move the file away")
    tables = document.get("tokens_of_gpu_after")
    known = {
        "layers": (document.get("layers"), list(layers)),
        "num_experts": (document.get("num_experts"), num_experts),
        "GPUs": (len(tables[0]) if tables else None, num_gpus),
    }
    for name, (there, here) in known.items():
        if there and there != here:
            raise DistplbError(
                f"{path} belongs to another job: it has {name} {there!r:.80}, this job has {here!r:.80}; record in "
                "another folder, or move the file away"
            )


def _records(path: Path) -> Iterator[tuple[int, str]]:
    """Yield line number and text of each record; a line has several if one is truncated or lacks its newline.

    Quotes inside a record's own texts are escaped, so `_MARK` cannot occur there.
    """
    with path.open("rb") as file:
        number = 0
        while line := file.readline(_MAX_LINE_BYTES + 1):
            number += 1
            if len(line) > _MAX_LINE_BYTES:
                raise DistplbError(
                    f"{path}, line {number} has more than {_MAX_LINE_BYTES} bytes; remove it, or pass a file that an "
                    "EventLog wrote"
                )
            whole = line.decode("utf-8", "replace")
            parts = (
                [whole] if whole.find(_MARK, 1) < 0 or _is_json(whole) else re.split(f"(?={re.escape(_MARK)})", whole)
            )
            yield from ((number, text) for part in parts if (text := part.strip("\0 \t\r\n")))


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _rewind_to_torn(text: str, events: dict[int, RebalanceEvent]) -> None:
    """Drop the records that a truncated one replaces: those of an earlier run, from its iteration on."""
    match = _TORN_EVENT.match(text)
    if match is not None:
        _rewind(events, int(match[1]))


def _rewind(events: dict[int, RebalanceEvent], iteration: int) -> None:
    while events and next(reversed(events)) >= iteration:
        events.popitem()


def _add(document: Any, text: str, events: dict[int, RebalanceEvent]) -> None:
    """Add an event, or add an outcome to its event."""
    if not isinstance(document, dict) or document.get("format") != _OUTCOME:
        event = RebalanceEvent.from_json(text)
        _rewind(events, event.iteration)
        events[event.iteration] = event
        return
    if document["version"] != _VERSION:
        raise DistplbError(f"it has version {document['version']!r:.40}; this distplb reads {_VERSION}")
    if document["iteration"] in events:
        known = {name: document[name] for name in _OF_NEXT_WINDOW}
        event = events[document["iteration"]]
        events[event.iteration] = replace(event, **known | {"imbalance_next": tuple(known["imbalance_next"])})


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
    known = {name: getattr(event, name) for name in _OF_NEXT_WINDOW}
    return json.dumps({"format": _OUTCOME, "version": _VERSION, "iteration": event.iteration} | known, allow_nan=False)


def _mean_imbalance(name: str, values: Iterable[float | None]) -> dict[str, float]:
    """The mean imbalance over layers; empty if no layer had tokens."""
    mean = mean_of_layers(values)
    return {} if mean is None else {f"imbalance/{name}": mean}
