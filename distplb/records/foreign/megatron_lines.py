"""Parses the lines of tokens per expert that each rank of Megatron-LM writes, in the current and the previous format.

Current: a file `rank<number>.jsonl` for each rank, a line for each iteration and layer; "mtp_idx" if "block" is "mtp"::

    {"iter": 100, "block": "decoder", "layer": 3, "tpe": [[128, 64], [96, 80]]}

Previous: one file `tokens_per_expert.log` for all ranks, a line for each micro-batch::

    Rank=0 iter=100 layer=3 tokens_per_expert=[128, 64]

Shapes: B micro-batches of an iteration, G experts on each GPU.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from distplb.errors import DistplbError

__all__ = ["CountArray", "RankCounts", "is_megatron", "num_ranks", "read_ranks"]

CountArray = NDArray[np.int64]

_MAX_LINE_BYTES = 1 << 24
_JSON, _TEXT = b'{"iter"', b"Rank="  # how lines begin
_TEXT_NAME = "tokens_per_expert.log"
_TEXT_LINE = re.compile(rb"Rank=(\d{1,9}) iter=(\d{1,18}) layer=(\d{1,9}) tokens_per_expert=(\[[\d, ]*\])\s*")
_RANK_NAME = re.compile(r"rank(\d{1,9})\.jsonl")


class RankCounts:
    """The counts that one rank wrote; the last lines of each iteration are used.

    A resumed job goes back to an earlier iteration and writes to the same files.

    Args:
        name: name of the rank, for messages.

    Attributes:
        iterations: by iteration and layer, `[B, G]`.
        stale: iterations that only an earlier run of the job wrote, after the one where the next run began.
        rewinds: the iteration where each run that went back began.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.iterations: dict[int, dict[str, CountArray]] = {}
        self.stale: set[int] = set()
        self.rewinds: list[int] = []
        self._path: list[int] = []  # iterations of the last run and of those that led to it, ascending
        self._earlier: dict[int, dict[str, CountArray]] = {}
        self._versions: dict[int, int] = {}

    def take(self, iteration: int, layer: str, counts: CountArray) -> None:
        """Add a line with all micro-batches of a layer; a repeated iteration or layer restarts the iteration."""
        last = self._path[-1] if self._path else -1
        if iteration != last or layer in self.iterations[iteration]:
            self._begin(iteration)
        self.iterations[iteration][layer] = counts

    def _begin(self, iteration: int) -> None:
        """Start an iteration: replace its earlier counts, and mark later iterations as stale."""
        if self._path and self._path[-1] >= iteration:
            self.rewinds.append(iteration)
        while self._path and self._path[-1] >= iteration:
            self.stale.add(self._path.pop())
        self._path.append(iteration)
        self.stale.discard(iteration)
        if iteration in self.iterations:
            self._versions[iteration] = self.versions(iteration)
            self._earlier[iteration] = self.iterations[iteration]
        self.iterations[iteration] = {}

    def versions(self, iteration: int) -> int:
        """How often an iteration was rewritten with different counts."""
        before, now = self._earlier.get(iteration, {}), self.iterations.get(iteration, {})
        differs = any(not np.array_equal(before[layer], now[layer]) for layer in before.keys() & now.keys())
        return self._versions.get(iteration, 0) + differs


def is_megatron(paths: Sequence[Path]) -> bool:
    """Whether these are, by name, files of tokens per expert, or a folder of such files."""
    first = paths[0]
    if first.is_dir():
        return (first / _TEXT_NAME).is_file() or any(first.glob("rank*.jsonl"))
    return first.suffix in (".jsonl", ".log")


def num_ranks(paths: Sequence[Path]) -> int:
    """The number of ranks in all files; a file in the previous format is read to count them."""
    text = _text_file(paths)
    if text is None:
        return len(_files_by_rank(paths))
    return len({match[1] for line in _lines(text) if (match := re.match(rb"Rank=(\d{1,9}) ", line.text))})


def read_ranks(paths: Sequence[Path], max_bytes: int) -> tuple[list[RankCounts], list[str]]:
    """Read all ranks, in order; also returns a message for each truncated line, which is left out.

    Raises:
        DistplbError: naming file and line, if a line is malformed; also if a rank is missing or files are too large.
    """
    text = _text_file(paths)
    if text is not None:
        if text.stat().st_size > max_bytes:
            raise DistplbError(
                f"{text} has {text.stat().st_size} bytes, but max_bytes allows {max_bytes}; pass a larger max_bytes"
            )
        return _read_text(text)
    files = _files_by_rank(paths)
    _check_size(list(files.values()), max_bytes)
    broken: list[str] = []
    return [_read_json(files[rank], broken) for rank in range(len(files))], broken


# --- files ------------------------------------------------------------------------------------------------------


def _text_file(paths: Sequence[Path]) -> Path | None:
    """The file in the previous format, if the paths lead to it."""
    if len(paths) != 1:
        return None
    path = paths[0]
    if path.is_dir() and not any(path.glob("rank*.jsonl")):
        path = path / _TEXT_NAME
    return path if path.suffix == ".log" and path.is_file() else None


def _files_by_rank(paths: Sequence[Path]) -> Mapping[int, Path]:
    files: dict[int, Path] = {}
    by_argument = [sorted(path.glob("rank*.jsonl")) if path.is_dir() else [path] for path in paths]
    for path in (path for each in by_argument for path in each):
        match = _RANK_NAME.fullmatch(path.name)
        if not match or int(match[1]) in files:
            raise DistplbError(
                f"{path} is not named rank<number>.jsonl, or is a second file of its rank; pass one file for each rank"
            )
        if not path.is_file():
            raise DistplbError(f"there is no file {path}; pass the files of all ranks")
        files[int(match[1])] = path
    missing = next(rank for rank in range(len(files) + 1) if rank not in files)
    if missing < len(files) or not files:
        raise DistplbError(
            f"there is no file of rank {missing} in {[str(path) for path in paths]}; pass the files of all ranks"
        )
    return files


def _check_size(files: Sequence[Path], max_bytes: int) -> None:
    size = sum(path.stat().st_size for path in files)
    if size > max_bytes:
        raise DistplbError(
            f"the files of all ranks have {size} bytes, but max_bytes allows {max_bytes}; pass a larger max_bytes"
        )


# --- lines ------------------------------------------------------------------------------------------------------


class _Line(NamedTuple):
    """The text of one record."""

    number: int
    text: bytes
    is_open: bool  # not followed by a newline, but by another record or the end of the file

    def may_be_torn(self, mark: bytes) -> bool:
        """Whether a text that is not a record may be the beginning of one whose writer died."""
        return self.is_open and self.text.startswith(mark[: len(self.text)]) and not self.text.endswith(b"}")


def _lines(path: Path) -> Iterator[_Line]:
    """Yield records; a line has several if the job died while writing one and the next run continued on that line."""
    with path.open("rb") as file:
        number = 0
        while line := file.readline(_MAX_LINE_BYTES + 1):
            number += 1
            if len(line) > _MAX_LINE_BYTES:
                raise DistplbError(f"{path}, line {number} has more than {_MAX_LINE_BYTES} bytes; remove it")
            line = line.strip(b"\0")  # a file system may leave these when a machine dies
            begins = sorted({0, *(match.start() for match in re.finditer(rb'\{"iter"|Rank=', line))})
            ends = [*begins[1:], len(line)]
            for begin, end in zip(begins, ends, strict=True):
                text = line[begin:end].strip(b"\0")
                yield _Line(number, text, end < len(line) or not line.endswith(b"\n"))


def _read_json(path: Path, broken: list[str]) -> RankCounts:
    rank = RankCounts(str(path))
    for line in _lines(path):
        try:
            iteration, layer, counts = _parsed(line.text)
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            if not line.may_be_torn(_JSON):
                raise _refused(path, line, error) from error
            broken += _broken_line(path, line, rb'"iter": (\d{1,18}),')
            continue
        rank.take(iteration, layer, counts)
    if not rank.iterations:
        raise DistplbError(f"{path} has no complete line; pass files that have at least one")
    return rank


def _broken_line(path: Path, line: _Line, pattern: bytes) -> list[str]:
    """A message for a truncated line; none if it is empty."""
    match = re.search(pattern, line.text)
    which = "" if match is None else f" (iteration {int(match[1])})"
    return [f"{path}: line {line.number}{which} is truncated"] if line.text else []


def _refused(path: Path, line: _Line, error: Exception) -> DistplbError:
    why = f"it has no {error}" if isinstance(error, KeyError) else " ".join(str(error).split()) or type(error).__name__
    return DistplbError(
        f"{path}, line {line.number} is not a line of tokens per expert ({why:.300}); "
        "remove what is damaged from the files of all ranks"
    )


def _parsed(text: bytes) -> tuple[int, str, CountArray]:
    """The iteration, the layer and the counts `[B, G]` of one line."""
    record: dict[str, Any] = json.loads(text)
    names = ["iter", "layer"] + ["mtp_idx"] * (record["block"] == "mtp")
    numbers = [record[name] for name in names]
    if not all(type(value) is int and 0 <= value < 1 << 62 for value in numbers):
        raise ValueError(f"{names} are {str(numbers)[:80]}")
    if record["block"] not in ("decoder", "mtp"):
        raise ValueError(f"block is {str(record['block'])[:80]!r}")
    counts = np.asarray(record["tpe"])
    if counts.dtype == np.int64 and counts.size and counts.min() < 0:
        raise ValueError(f"tpe has {counts.min()}, but counts must be non-negative")
    if counts.ndim != 2 or counts.dtype != np.int64 or not counts.size:
        raise ValueError(f"tpe has shape {list(counts.shape)} and dtype {counts.dtype}")
    if record["block"] == "decoder":
        return numbers[0], f"decoder.layers.{numbers[1]}", counts
    return numbers[0], f"mtp.layers.{numbers[2]}.mtp_model_layer.layers.{numbers[1]}", counts


def _read_text(path: Path) -> tuple[list[RankCounts], list[str]]:
    ranks: dict[int, RankCounts] = {}
    broken: list[str] = []
    # A rank writes its lines of an iteration together; lines of other ranks in between mean that it was restarted.
    for (number, iteration), lines in itertools.groupby(_text_lines(path, broken), key=lambda line: line[:2]):
        rows: dict[str, list[CountArray]] = {}
        for _, _, layer, counts in lines:
            rows.setdefault(layer, []).append(counts)
        if "" in rows:
            continue
        rank = ranks.setdefault(number, RankCounts(f"{path}, rank {number}"))
        for layer, of_layer in rows.items():
            if len({len(counts) for counts in of_layer}) > 1:
                raise DistplbError(
                    f"{rank.name} has lines with different numbers of experts in iteration {iteration} of {layer}; "
                    "pass the log of one job"
                )
            rank.take(iteration, layer, np.stack(of_layer))
    if not ranks:
        raise DistplbError(f"{path} has no complete line; pass a log that has at least one")
    missing = next(number for number in range(len(ranks) + 1) if number not in ranks)
    if missing < len(ranks):
        raise DistplbError(f"{path} has lines of rank {max(ranks)}, but not of rank {missing}; pass a log of all ranks")
    return [ranks[number] for number in range(len(ranks))], broken


def _text_lines(path: Path, broken: list[str]) -> Iterator[tuple[int, int, str, CountArray]]:
    """Yield the rank, iteration, layer and counts `[G]` of each line; the layer is "" if the line is truncated."""
    last: tuple[int, int] | None = None
    for line in _lines(path):
        match = _TEXT_LINE.fullmatch(line.text)
        try:
            if match is None:
                raise ValueError(repr(line.text[:80].decode(errors="replace").strip()))
            counts = np.asarray(json.loads(match[4]))
            if counts.dtype != np.int64 or not counts.size:
                raise ValueError(f"counts of size {counts.size} and dtype {counts.dtype}")
        except ValueError as error:
            if match is not None or not line.may_be_torn(_TEXT):
                raise _refused(path, line, error) from error
            broken += _broken_line(path, line, rb"iter=(\d{1,18}) ")
            begin = re.match(rb"Rank=(\d{1,9}) iter=(\d{1,18}) ", line.text)
            torn = (int(begin[1]), int(begin[2])) if begin else last
            if torn is not None and line.text:
                yield *torn, "", np.empty(0, dtype=np.int64)
            continue
        last = int(match[1]), int(match[2])
        yield *last, f"decoder.layers.{int(match[3])}", counts
