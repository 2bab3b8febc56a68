"""Reads the file of an `EventLog`: the records of rebalances and of sampled steps, also if some are incomplete."""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from distplb.core.arguments import refuse_wrong_types, whole_number
from distplb.errors import DistplbError
from distplb.records.event_log import OF_NEXT_WINDOW, OUTCOME_FORMAT
from distplb.records.events import EVENT_FORMAT, RebalanceEvent
from distplb.records.json_lines import VERSION
from distplb.records.step_event import STEP_FORMAT, StepEvent

__all__ = ["check_log", "read_events", "read_steps"]

_MARK = '{"format": "distplb.'  # the start of each record
_TORN_EVENT = re.compile(r'\{"format": "distplb\.event", "version": 1, "iteration": (\d{1,18}),')
_MAX_LINE_BYTES = 1 << 24


def read_events(path: str | os.PathLike[str], max_bytes: int = 2**30) -> list[RebalanceEvent]:
    """Read the rebalances in a file, in order of iteration, each with its outcome if the file has it.

    If a job was resumed and repeated iterations, the records of the last run are used. A record that is incomplete,
    because the job was killed or the disk was full, is left out with a warning; a record that follows it on the same
    line is kept. Records of steps are passed over.

    Args:
        path: path of the file.
        max_bytes: refuse a larger file; a line may have at most 16 MiB.

    Raises:
        DistplbError: naming the file and line, if it cannot be read, is too large, or holds something else.
    """
    events: dict[int, RebalanceEvent] = {}
    _read(path, max_bytes, lambda document, text: _add(document, text, events), lambda text: _rewind(text, events))
    return list(events.values())


def read_steps(path: str | os.PathLike[str], max_bytes: int = 2**30) -> list[StepEvent]:
    """Read the sampled steps in a file, in the order in which they were written.

    A job that was resumed begins again at step 1, with a later `started`. Records of rebalances are passed over, and
    incomplete records are left out with a warning.

    Args:
        path: path of the file.
        max_bytes: as for `read_events`.

    Raises:
        DistplbError: as `read_events` does.
    """
    steps: list[StepEvent] = []

    def add(document: Any, text: str) -> None:
        found = document.get("format") if isinstance(document, dict) else None
        if found not in (EVENT_FORMAT, OUTCOME_FORMAT):
            steps.append(StepEvent.from_json(text))

    _read(path, max_bytes, add, lambda text: None)
    return steps


def _read(
    path: str | os.PathLike[str], max_bytes: int, add: Callable[[Any, str], None], torn: Callable[[str], None]
) -> None:
    """Pass each record to `add`, as a document and as text, and each incomplete one to `torn`."""
    refuse_wrong_types({"path": (path, (str, os.PathLike), "the path of a file that an EventLog wrote")})
    max_bytes = whole_number("max_bytes", max_bytes, minimum=1)
    incomplete: list[int] = []
    is_log, has_records = True, False
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
                incomplete.append(number)
                is_log = is_log and text.startswith(_MARK[: len(text)])
                torn(text)
                continue
            try:
                add(document, text)
            except (DistplbError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise DistplbError(f"{path}, line {number}: {error}; pass a file that an EventLog wrote") from error
            has_records = True
    except OSError as error:
        raise DistplbError(f"{path} cannot be read ({error.strerror}); pass a file that an EventLog wrote") from error
    if incomplete and not has_records and not is_log:
        raise DistplbError(f"{path}, line {incomplete[0]}: it is not JSON; pass a file that an EventLog wrote")
    if incomplete:
        several = f"lines {', '.join(map(str, incomplete[:9]))} are"
        lines = f"line {incomplete[0]} is" if len(incomplete) == 1 else several
        more = f" (and {len(incomplete) - 9} more)" if len(incomplete) > 9 else ""
        warnings.warn(f"{path}: {lines} incomplete and left out{more}", RuntimeWarning, stacklevel=3)


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
    kind = document.get("format") if isinstance(document, dict) else None
    if kind not in (EVENT_FORMAT, OUTCOME_FORMAT, STEP_FORMAT):
        raise DistplbError(f"{path} is not a log of rebalances; record in another folder, or move the file away")
    if kind == STEP_FORMAT:  # its layers have the names that their forwards use
        return
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


def _rewind(text: str, events: dict[int, RebalanceEvent]) -> None:
    """Drop the records that a truncated one replaces: those of an earlier run, from its iteration on."""
    match = _TORN_EVENT.match(text)
    if match is not None:
        _drop_from(events, int(match[1]))


def _drop_from(events: dict[int, RebalanceEvent], iteration: int) -> None:
    while events and next(reversed(events)) >= iteration:
        events.popitem()


def _add(document: Any, text: str, events: dict[int, RebalanceEvent]) -> None:
    """Add an event, or add an outcome to its event; pass over a step."""
    kind = document.get("format") if isinstance(document, dict) else None
    if kind == STEP_FORMAT:
        return
    if kind != OUTCOME_FORMAT:
        event = RebalanceEvent.from_json(text)
        _drop_from(events, event.iteration)
        events[event.iteration] = event
        return
    if document["version"] != VERSION:
        raise DistplbError(f"it has version {document['version']!r:.40}; this distplb reads {VERSION}")
    if document["iteration"] in events:
        known = {name: document[name] for name in OF_NEXT_WINDOW}
        event = events[document["iteration"]]
        events[event.iteration] = replace(event, **known | {"imbalance_next": tuple(known["imbalance_next"])})
