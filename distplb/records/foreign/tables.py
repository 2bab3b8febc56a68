"""Counts in a text table: one row for each layer and one column for each expert, or one row for each count.

Shapes: T steps, L layers, E experts.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from distplb.core.documents.text import read_text
from distplb.errors import DistplbError
from distplb.records.foreign.columns import Columns, Line, header_of, is_index
from distplb.records.foreign.number_formats import is_number, number_array, parse_counts

__all__ = ["Table", "parse_table", "read_table"]

_SEPARATORS = ",;\t|"
_NAMED = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "'|'"}
_SEP_LINE = re.compile(r'"?sep=([,;\t|:])"?\r?\n')  # as Excel writes it


class Table(NamedTuple):
    """Counts as they are in the file, and the names of the layers if it has them."""

    values: NDArray[Any]  # [L, E] or [T, L, E]
    layers: tuple[str, ...] | None


def read_table(path: Path, max_bytes: int) -> Table:
    """Read a `.csv`, `.tsv` or `.txt`.

    Raises:
        DistplbError: naming the line, if something is not a count, is ambiguous, or does not fit together.
    """
    return parse_table(path, _lines(path, read_text(path, max_bytes)))


def parse_table(path: Path, lines: list[Line], *, headed: bool = False) -> Table:
    """Read the counts from rows, in any of the layouts that `read_loads` lists.

    Args:
        path: path of the file.
        lines: all its lines, at least one.
        headed: whether the first line is known to be a header.

    Raises:
        DistplbError: as in `read_table`.
    """
    header = lines[0].cells if headed else header_of(path, lines)
    rows = lines if header is None else lines[1:]
    if not rows:
        raise DistplbError(
            f"{path} has a header but no rows; pass one row of counts for each layer, below a header if its counts are "
            "0, 1, 2 and so on"
        )
    width = len(lines[0].cells)
    for line in rows:
        if len(line.cells) != width:
            raise DistplbError(
                f"{path}, {line.place} and the first line have different numbers of cells, {len(line.cells)} and "
                f"{width}; pass a count for each expert in every row"
            )
    if header is None:
        return _without_header(path, rows)
    columns = Columns.of(path, lines[0].place, header)
    if columns.tokens is not None or columns.expert is not None:
        return _long(path, columns, rows)
    return _wide(path, columns, rows)


# --- text into lines --------------------------------------------------------------------------------------------


def _lines(path: Path, text: str) -> list[Line]:
    separator, text, skipped = _separator(path, text)
    if separator is None:
        rows = [(number, line.split()) for number, line in enumerate(text.splitlines(), 1)]
    else:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
        try:
            rows = [(reader.line_num, [cell.strip() for cell in cells]) for cells in reader]
        except csv.Error as error:
            why = str(error)[:200].replace("\t", "\\t")  # it names the separator, which may be a tab
            raise DistplbError(
                f"{path}, line {reader.line_num + skipped}: {why}; pass counts separated by commas"
            ) from error
    rows = [(number, cells) for number, cells in rows if any(cells) and not cells[0].startswith("#")]
    if not rows:
        raise DistplbError(f"{path} has no rows; pass one row of counts for each layer")
    used = max(at + 1 for _, cells in rows for at, cell in enumerate(cells) if cell)  # later columns are empty
    return [Line(f"line {number + skipped}", cells[:used]) for number, cells in rows]


def _separator(path: Path, text: str) -> tuple[str | None, str, int]:
    """The cell separator, None for blanks; the text below a line that declares it; 1 for such a line, else 0."""
    declared = _SEP_LINE.match(text)
    if declared:
        return declared[1], text[declared.end() :], 1
    bare = re.sub(r'"[^"]*"', "", "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#")))
    present = [sign for sign in _SEPARATORS if sign in bare]
    suffix = path.suffix.lower()
    if suffix == ".tsv" and "\t" in present:
        return "\t", text, 0
    if len(present) == 1:
        return present[0], text, 0
    if present:
        names = " and ".join(_NAMED[sign] for sign in present)
        raise DistplbError(f"{path} has {names}; begin it with a line such as 'sep=;' that names the separator")
    if suffix == ".txt":
        return None, text, 0
    if any(len(line.split()) > 1 for line in bare.splitlines()):
        raise DistplbError(
            f"{path} has neither commas nor tabs; pass counts separated by commas, or name the file .txt"
        )
    return ",", text, 0


# --- rows -------------------------------------------------------------------------------------------------------


def _without_header(path: Path, rows: list[Line]) -> Table:
    named = not any(is_number(line.cells[0]) for line in rows)
    width = len(rows[0].cells)
    if width < 2 + named:
        raise DistplbError(
            f"{path}, {rows[0].place} has too few cells ({width}); pass a row for each layer, with a count for each "
            "expert"
        )
    first = [line.cells[0] for line in rows]
    if len(rows) > 2 and first in [[str(number) for number in range(start, start + len(rows))] for start in (0, 1)]:
        raise DistplbError(
            f"{path}: the first column numbers the rows from {first[0]}; add a header: 'layer,0,1,2' and so on if that "
            "column is the layer's index, '0,1,2' and so on if it has counts"
        )
    values = _values(path, rows, list(range(int(named), width)))
    return Table(values, tuple(first) if named else None)


def _values(path: Path, rows: list[Line], columns: list[int]) -> NDArray[Any]:
    """The counts `[rows, columns]`."""
    texts = [line.cells[column] for line in rows for column in columns]
    if all(len(text) < 19 and text.isascii() and text.isdecimal() for text in texts):
        return np.array([int(text) for text in texts]).reshape(len(rows), len(columns))

    def place(at: int) -> str:
        row, column = divmod(at, len(columns))
        return f"{path}, {rows[row].place}, column {columns[column] + 1}"

    return number_array(parse_counts(texts, place)).reshape(len(rows), len(columns))


def _wide(path: Path, columns: Columns, rows: list[Line]) -> Table:
    values = _values(path, rows, columns.experts)
    if columns.total is not None:
        totals = _values(path, rows, [columns.total])[:, 0]
        for line, row, total in zip(rows, values.tolist(), totals.tolist(), strict=True):
            if sum(row) != total:
                raise DistplbError(
                    f"{path}, {line.place}: the counts add up to {sum(row)}, but the total is {total}; correct it, or "
                    "leave the column out"
                )
    names = None if columns.layer is None else [line.cells[columns.layer] for line in rows]
    if columns.step is None:
        return Table(values, None if names is None else tuple(names))
    by_place: dict[tuple[int, str], tuple[str, Any]] = {}
    for nth, line in enumerate(rows):
        key = (_index_in(path, line, columns.step), "0" if names is None else names[nth])
        what = f"layer {key[1][:40]!r} of step {key[0]}"
        _put(path, by_place, key, what, line.place, values[nth])
    return _grid(path, by_place, names)


def _long(path: Path, columns: Columns, rows: list[Line]) -> Table:
    """Read a table with one row for each count."""
    if (
        columns.layer is None
        or columns.expert is None
        or columns.tokens is None
        or columns.experts
        or columns.total is not None
    ):
        others = [*columns.names, *(["a total"] if columns.total is not None else [])]
        surplus = f", but not {others[0][:40]!r}" if others else ""
        raise DistplbError(
            f"{path} has a column of expert ids or of counts; pass columns 'layer', 'expert' and 'count', with or "
            f"without 'step'{surplus}"
        )
    values = _values(path, rows, [columns.tokens])[:, 0]
    by_expert: dict[tuple[int, str, int], tuple[str, Any]] = {}
    for nth, line in enumerate(rows):
        step = 0 if columns.step is None else _index_in(path, line, columns.step)
        key = (step, line.cells[columns.layer], _index_in(path, line, columns.expert))
        what = f"expert {key[2]} of layer {key[1][:40]!r}{_in_step(columns.step, step)}"
        _put(path, by_expert, key, what, line.place, values[nth])
    experts = sorted({expert for *_, expert in by_expert})
    if experts != list(range(len(experts))):
        missing = next(number for number in range(len(experts)) if number not in experts)
        raise DistplbError(
            f"{path} has expert {experts[-1]}, but no expert {missing}; number experts from 0, and pass zeros too"
        )
    by_place: dict[tuple[int, str], tuple[str, Any]] = {}
    for step, layer in dict.fromkeys((step, layer) for step, layer, _ in by_expert):
        for expert in experts:
            if (step, layer, expert) not in by_expert:
                raise DistplbError(
                    f"{path} has no count for expert {expert} in layer {layer[:40]!r}{_in_step(columns.step, step)}; "
                    "pass zeros too"
                )
        place = by_expert[step, layer, 0][0]
        by_place[step, layer] = place, np.array([by_expert[step, layer, expert][1] for expert in experts])
    table = _grid(path, by_place, [line.cells[columns.layer] for line in rows])
    return table if columns.step is not None else Table(table.values[0], table.layers)


def _in_step(column: int | None, step: int) -> str:
    return "" if column is None else f" of step {step}"


def _index_in(path: Path, line: Line, column: int) -> int:
    place = f"{path}, {line.place}, column {column + 1}"
    number = parse_counts([line.cells[column]], lambda _: place)[0]
    if number < 0:
        raise DistplbError(f"{place}: {number} is not the index of a step or an expert")
    return number


def _put(path: Path, table: dict[Any, tuple[str, Any]], key: Any, what: str, place: str, value: Any) -> None:
    if key in table:
        raise DistplbError(f"{path}, {place} has {what} again, after {table[key][0]}; pass each once")
    table[key] = place, value


def _grid(path: Path, rows: Mapping[tuple[int, str], tuple[str, Any]], names: list[str] | None) -> Table:
    """`[T, L, E]`: steps in numeric order; layers in numeric order if all are numbers, else in order of appearance."""
    steps = sorted({step for step, _ in rows})
    layers = list(dict.fromkeys(layer for _, layer in rows))
    if all(is_index(layer) for layer in layers):
        layers.sort(key=int)
    for step in steps:
        for layer in layers:
            if (step, layer) not in rows:
                raise DistplbError(
                    f"{path} has no row for layer {layer[:40]!r} in step {step}; pass all layers of each step"
                )
    values = np.array([[rows[step, layer][1] for layer in layers] for step in steps])
    return Table(values, None if names is None else tuple(layers))
