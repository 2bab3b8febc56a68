"""Counts as text: CSV of one row a layer, or JSON of nested lists.

Shapes: T steps, L layers, E experts.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from distplb.errors import DistplbError

__all__ = ["Table", "read_csv", "read_json"]

_MOST_BYTES = 1 << 28  # of text, which takes ten times as much once it is read
_CORNERS = {"", "layer", "layers", "name"}  # what stands above names of layers
_LAYOUT = "[layers][experts] or [steps][layers][experts]"


class Table(NamedTuple):
    """Numbers as the file has them, and the names of the layers where it has some."""

    values: NDArray[Any]  # [L, E] or [T, L, E]
    layers: tuple[str, ...] | None


def read_csv(path: Path) -> Table:
    """One row a layer, one column an expert.

    A first line is a header if none of its cells is a number, or if it counts the experts from 0 and stands above
    names. The first column has names if the header says so ("layer", "name" or nothing), or if no row begins with a
    number.

    Raises:
        DistplbError: with the line, for what is not a number, and for rows of different lengths.
    """
    lines = _csv_lines(path)
    header = lines.pop(0).cells if _is_header(lines[0].cells) else None
    if not lines:
        raise DistplbError(f"{path} has a header and no rows; pass one row of counts for each layer")
    above = header is not None and header[0].lower() in _CORNERS
    names = above or all(_number(line.cells[0]) is None for line in lines)
    width = len(header if header is not None else lines[0].cells)
    rows = [_counts(path, line, width, first=int(names)) for line in lines]
    return Table(np.array(rows), tuple(line.cells[0] for line in lines) if names else None)


def read_json(path: Path) -> Table:
    """Nested lists, [L][E] or [T][L][E]; or an object with a list of E counts for each name of a layer.

    Raises:
        DistplbError: with the place, for what is not a number, and for lists of different lengths.
    """
    try:
        document = json.loads(_text(path), object_pairs_hook=_different)
    except (ValueError, RecursionError) as error:
        raise DistplbError(f"{path} is not JSON that can be read ({error}); pass counts as {_LAYOUT}") from error
    layers = tuple(document) if isinstance(document, dict) else None
    nested = list(document.values()) if isinstance(document, dict) else document
    shape = _shape(nested)
    if len(shape) not in ((2,) if layers else (2, 3)) or 0 in shape:
        wanted = "a list of counts for each layer" if layers else _LAYOUT
        raise DistplbError(f"{path} has lists of shape {list(shape)}; pass {wanted}, none empty")
    flat = list(_flat(path, nested, shape, ()))
    return Table(np.array(flat).reshape(shape), layers)


def _text(path: Path) -> str:
    size = path.stat().st_size
    if size > _MOST_BYTES:
        raise DistplbError(f"{path} has {size} bytes of text, {_MOST_BYTES} are read; pass it as .npy")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DistplbError(f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8") from error


# --- CSV --------------------------------------------------------------------------------------------------------


class _Line(NamedTuple):
    number: int  # in the file, from 1
    cells: list[str]


def _csv_lines(path: Path) -> list[_Line]:
    reader = csv.reader(_text(path).splitlines(), strict=True)
    try:
        lines = [_Line(reader.line_num, [cell.strip() for cell in cells]) for cells in reader if cells]
    except csv.Error as error:
        raise DistplbError(f"{path}, line {reader.line_num}: {error}; pass counts separated by commas") from error
    if not lines:
        raise DistplbError(f"{path} has no rows; pass one row of counts for each layer")
    return lines


def _is_header(cells: list[str]) -> bool:
    numbered = [str(expert) for expert in range(len(cells) - 1)]
    return all(_number(cell) is None for cell in cells) or (cells[0].lower() in _CORNERS and cells[1:] == numbered)


def _counts(path: Path, line: _Line, width: int, first: int) -> list[int | float]:
    if len(line.cells) != width or width == first:
        raise DistplbError(
            f"{path}, line {line.number} has {len(line.cells)} cells where the first line has {width}; "
            "pass a count for each expert in every row, separated by commas"
        )
    found = []
    for column, cell in enumerate(line.cells[first:], first + 1):
        count = _number(cell)
        if count is None:
            raise DistplbError(f"{path}, line {line.number}, column {column}: {cell[:40]!r} is not a count")
        found.append(count)
    return found


def _number(text: str) -> int | float | None:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return None


# --- JSON -------------------------------------------------------------------------------------------------------


def _different(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) != len(pairs):
        raise ValueError("an object names something twice")
    return document


def _shape(nested: Any) -> tuple[int, ...]:
    """Along the first of each list; whether the others are alike is seen later."""
    shape = []
    while isinstance(nested, list):
        shape.append(len(nested))
        nested = nested[0] if nested else None
    return tuple(shape)


def _flat(path: Path, nested: Any, shape: tuple[int, ...], place: tuple[int, ...]) -> Iterator[int | float]:
    """All numbers, once every list is as long as `shape` says."""
    if not shape:
        if isinstance(nested, bool) or not isinstance(nested, int | float):
            raise DistplbError(f"{path}: {json.dumps(nested)[:40]} at {list(place)} is not a count")
        yield nested
        return
    if not isinstance(nested, list) or len(nested) != shape[0]:
        found = f"a list of {len(nested)}" if isinstance(nested, list) else json.dumps(nested)[:40]
        raise DistplbError(
            f"{path}: {found} at {list(place)} where a list of {shape[0]} is expected; pass counts as {_LAYOUT}"
        )
    for at, one in enumerate(nested):
        yield from _flat(path, one, shape[1:], (*place, at))
