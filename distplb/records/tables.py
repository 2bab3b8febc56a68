"""Counts as a table of text: one row a layer, one column an expert; or one row a count.

Shapes: T steps, L layers, E experts.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from distplb.core.documents.text import read_text
from distplb.errors import DistplbError
from distplb.records.numbers import counts, is_number

__all__ = ["Line", "Table", "read_table", "role_of", "table_of"]

_SEPARATORS = ",;\t|"
_NAMED = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "'|'"}
_SEP_LINE = re.compile(r'"?sep=([,;\t|:])"?\r?\n')  # as Excel writes it
_ROLES = {
    "layer": "layer layers layer_id layer_idx layer_index layer_name layer_number name",
    "step": "step steps step_id step_idx iteration iter",
    "rank": "rank ranks rank_id ep_rank gpu gpu_id device device_id",
    "expert": "expert experts expert_id expert_idx expert_index",
    "count": "count counts tokens num_tokens token_count load value",
    "total": "total totals sum all",
    "index": "index unnamed:_0",
}
_ROLE = {name: role for role, names in _ROLES.items() for name in names.split()}
_INDEX = re.compile(r"[0-9]{1,9}")
_DIGITS = re.compile(r"[0-9]+")
_NUMBERED = re.compile(r"(.*?)([0-9]{1,9})", re.DOTALL)


class Table(NamedTuple):
    """Counts as the file has them, and the names of the layers where it has some."""

    values: NDArray[Any]  # [L, E] or [T, L, E]
    layers: tuple[str, ...] | None


class Line(NamedTuple):
    """One row: where it stands, in words, and its cells."""

    place: str
    cells: list[str]


def role_of(name: str) -> str | None:
    """What a column or a row of this name is, where it is no expert and no layer: a key of `_ROLES`."""
    return _ROLE.get(re.sub(r"[ .-]", "_", name.strip().lower()))


def read_table(path: Path, max_bytes: int) -> Table:
    """Read a `.csv`, `.tsv` or `.txt`.

    Raises:
        DistplbError: with the line, for what is no count, may be read in two ways, or does not fit together.
    """
    return table_of(path, _lines(path, read_text(path, max_bytes)))


def table_of(path: Path, lines: list[Line], *, headed: bool = False) -> Table:
    """The counts of rows; of several forms, as `read_loads` tells.

    Args:
        path: of the file.
        lines: all of it, at least one.
        headed: whether the first is known to be a header.

    Raises:
        DistplbError: as `read_table`.
    """
    header = lines[0].cells if headed else _header(path, lines)
    rows = lines if header is None else lines[1:]
    if not rows:
        raise DistplbError(
            f"{path} has a header and no rows; pass one row of counts for each layer, below a header if its counts are "
            "0, 1, 2 and so on"
        )
    width = len(lines[0].cells)
    for line in rows:
        if len(line.cells) != width:
            raise DistplbError(
                f"{path}, {line.place} has {len(line.cells)} cells where the first line has {width}; "
                "pass a count for each expert in every row"
            )
    if header is None:
        return _without_header(path, rows)
    columns = _Columns.of(path, lines[0].place, header)
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
            raise DistplbError(
                f"{path}, line {reader.line_num + skipped}: {str(error)[:200]}; pass counts separated by commas"
            ) from error
    rows = [(number, cells) for number, cells in rows if any(cells) and not cells[0].startswith("#")]
    if not rows:
        raise DistplbError(f"{path} has no rows; pass one row of counts for each layer")
    used = max(at + 1 for _, cells in rows for at, cell in enumerate(cells) if cell)  # beyond, columns are empty
    return [Line(f"line {number + skipped}", cells[:used]) for number, cells in rows]


def _separator(path: Path, text: str) -> tuple[str | None, str, int]:
    """What parts the cells, None for blanks; the text without a line that says so, and how many lines that took."""
    told = _SEP_LINE.match(text)
    if told:
        return told[1], text[told.end() :], 1
    bare = re.sub(r'"[^"]*"', "", "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#")))
    found = [sign for sign in _SEPARATORS if sign in bare]
    suffix = path.suffix.lower()
    if suffix == ".tsv" and "\t" in found:
        return "\t", text, 0
    if len(found) == 1:
        return found[0], text, 0
    if found:
        names = " and ".join(_NAMED[sign] for sign in found)
        raise DistplbError(f"{path} has {names}; begin it with a line 'sep=;' that names what parts the cells")
    if suffix == ".txt":
        return None, text, 0
    if any(len(line.split()) > 1 for line in bare.splitlines()):
        raise DistplbError(f"{path} has neither commas nor tabs; pass counts separated by commas, or name it .txt")
    return ",", text, 0


# --- the header -------------------------------------------------------------------------------------------------


def _header(path: Path, lines: list[Line]) -> list[str] | None:
    """The first line, where it is certain that it is one; None where it is certain that it is a row."""
    place, cells = lines[0]
    roles = [role_of(cell) for cell in cells]
    corner = not cells[0] or roles[0] is not None
    if not any(is_number(cell) for cell in cells):
        return cells if len(lines) > 1 or corner else None
    experts = [cell for at, cell in enumerate(cells) if not (roles[at] or (at == 0 and not cell))]
    if corner or any(roles):
        numbers = sorted(int(cell) for cell in experts if _INDEX.fullmatch(cell))
        words = [cell for cell in experts if cell and not is_number(cell)]
        if words:
            raise DistplbError(
                f"{path}, {place} has column {words[0][:40]!r} beside experts that are numbered; leave it out, or name "
                "it 'layer' or 'step' if it is that"
            )
        if len(numbers) < len(experts) or numbers not in (_from(0, experts), _from(1, experts)):
            first = next(cell for cell in cells if role_of(cell)) if any(roles) else ""
            raise DistplbError(
                f"{path}, {place} has {first[:40]!r} as a header has, and numbers that do not count the experts; pass "
                "a header such as 'layer,0,1,2', or names and counts alone"
            )
        return cells
    if len(cells) > 1 and cells == [str(number) for number in _from(0, cells)]:
        return cells
    if len(cells) > 3 and set(cells) in [{str(number) for number in _from(first, cells)} for first in (0, 1)]:
        raise DistplbError(
            f"{path}, {place} has each number from {min(map(int, cells))} to {max(map(int, cells))}, and may be a "
            "header or counts; pass a header such as 'layer,0,1,2', and names of the layers"
        )
    forms = {_DIGITS.sub("#", line.cells[0]) for line in lines}
    is_layer = len(forms) == 1 and "#" in min(forms)  # as in moe.0, moe.1
    if not is_number(cells[0]) and not is_layer and _count_on(cells[1:]):
        raise DistplbError(
            f"{path}, {place} has {cells[0][:40]!r} and the numbers from {cells[1]} to {cells[-1]}, and may be a "
            "header or counts; name its first column 'layer' or 'step' if it is a header, else put one above it"
        )
    return None


def _count_on(cells: Sequence[str]) -> bool:
    """Whether they number experts, as seldom counts do: from 0, or at least three from 1."""
    firsts = (0, 1) if len(cells) > 2 else (0,)
    return len(cells) > 1 and any(cells == [str(number) for number in _from(first, cells)] for first in firsts)


def _from(first: int, of: Sequence[object]) -> list[int]:
    return list(range(first, first + len(of)))


class _Columns(NamedTuple):
    """Places of columns by what they are; of experts in the order of their numbers."""

    experts: list[int]
    names: list[str]
    layer: int | None
    step: int | None
    expert: int | None
    tokens: int | None
    total: int | None

    @classmethod
    def of(cls, path: Path, place: str, header: list[str]) -> _Columns:
        roles: dict[str, int] = {}
        experts = []
        for at, name in enumerate(header):
            role = role_of(name) or ("index" if not name and at == 0 else None)
            if role is None:
                experts.append(at)
            elif role in roles:
                raise DistplbError(
                    f"{path}, {place}: columns {header[roles[role]][:40]!r} and {name[:40]!r} both name the "
                    f"{role}; pass one"
                )
            else:
                roles[role] = at
        if "rank" in roles:
            raise DistplbError(
                f"{path}, {place}: column {header[roles['rank']][:40]!r} says that rows are of one rank each; add up "
                "the ranks, and pass a row for each layer"
            )
        if "layer" not in roles and "index" in roles:
            roles["layer"] = roles["index"]
        names = [header[at] for at in experts]
        if "count" not in roles and "expert" not in roles:
            order = _numbered(path, place, names)
            experts = [experts[at] for at in order]
        return cls(experts, names, *(roles.get(role) for role in ("layer", "step", "expert", "count", "total")))


def _numbered(path: Path, place: str, names: list[str]) -> list[int]:
    """The columns in the order of their numbers, where they have such; else as they are."""
    if not names or not all(names):
        raise DistplbError(f"{path}, {place} names no experts, or one of them not; pass a column for each expert")
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise DistplbError(f"{path}, {place} has column {twice[:40]!r} twice; give each a name of its own")
    found = [_NUMBERED.fullmatch(name) for name in names]
    parts = [(match[1].lower(), int(match[2])) for match in found if match]
    if not parts:
        return list(range(len(names)))
    other = next((name for name, match in zip(names, found, strict=True) if not match), None)
    if other is None and len({prefix for prefix, _ in parts}) > 1:
        other = next(name for name, (prefix, _) in zip(names, parts, strict=True) if prefix != parts[0][0])
    if other is not None:
        numbered = next(name for name, match in zip(names, found, strict=True) if match and name != other)
        raise DistplbError(
            f"{path}, {place} has column {other[:40]!r}, which does not number an expert as {numbered[:40]!r} does; "
            "leave it out, or name it 'layer' or 'step' if it is that"
        )
    role = role_of(parts[0][0].rstrip("_-. ")) if parts[0][0] else None
    if role in ("layer", "step", "rank"):
        raise DistplbError(
            f"{path}, {place}: column {names[0][:40]!r} names a {role}; pass a row for each layer and a column for "
            "each expert, of all ranks together"
        )
    numbers = [number for _, number in parts]
    for first in (0, 1):
        if sorted(numbers) == _from(first, names):
            return [numbers.index(number) for number in _from(first, names)]
    missing = next(number for number in range(len(names) + 1) if number not in numbers)
    raise DistplbError(
        f"{path}, {place} has column {names[0][:40]!r} and {len(names) - 1} more, and none of number {missing}; pass a "
        "column for each expert"
    )


# --- rows -------------------------------------------------------------------------------------------------------


def _without_header(path: Path, rows: list[Line]) -> Table:
    named = not any(is_number(line.cells[0]) for line in rows)
    width = len(rows[0].cells)
    if width < 2 + named:
        raise DistplbError(
            f"{path}, {rows[0].place} has {width} cells; pass a row for each layer, with a count for each expert"
        )
    first = [line.cells[0] for line in rows]
    if len(rows) > 2 and first in [[str(number) for number in _from(begin, rows)] for begin in (0, 1)]:
        raise DistplbError(
            f"{path}: the first column counts the rows from {first[0]}; put a header above it, 'layer,0,1,2' and so on "
            "if it is the number of the layer, '0,1,2' if it is a count"
        )
    values = _values(path, rows, list(range(int(named), width)))
    return Table(values, tuple(first) if named else None)


def _values(path: Path, rows: list[Line], columns: list[int]) -> NDArray[Any]:
    """`[rows, columns]`."""
    texts = [line.cells[column] for line in rows for column in columns]
    if all(len(text) < 19 and text.isascii() and text.isdecimal() for text in texts):
        return np.array([int(text) for text in texts]).reshape(len(rows), len(columns))

    def place(at: int) -> str:
        row, column = divmod(at, len(columns))
        return f"{path}, {rows[row].place}, column {columns[column] + 1}"

    return _int64(counts(texts, place)).reshape(len(rows), len(columns))


def _int64(numbers: list[int]) -> NDArray[Any]:
    return np.array(numbers) if all(-(2**63) <= number < 2**63 for number in numbers) else np.array(numbers, object)


def _wide(path: Path, columns: _Columns, rows: list[Line]) -> Table:
    values = _values(path, rows, columns.experts)
    if columns.total is not None:
        totals = _values(path, rows, [columns.total])[:, 0]
        for line, row, total in zip(rows, values.tolist(), totals.tolist(), strict=True):
            if sum(row) != total:
                raise DistplbError(
                    f"{path}, {line.place}: the experts have {sum(row)} tokens, and the total is {total}; correct it, "
                    "or leave the column out"
                )
    names = None if columns.layer is None else [line.cells[columns.layer] for line in rows]
    if columns.step is None:
        return Table(values, None if names is None else tuple(names))
    by_place: dict[tuple[int, str], tuple[str, Any]] = {}
    for nth, line in enumerate(rows):
        key = (_whole(path, line, columns.step), "0" if names is None else names[nth])
        told = f"layer {key[1][:40]!r} of step {key[0]}"
        _put(path, by_place, key, told, line.place, values[nth])
    return _grid(path, by_place, names)


def _long(path: Path, columns: _Columns, rows: list[Line]) -> Table:
    """One row for each count."""
    if (
        columns.layer is None
        or columns.expert is None
        or columns.tokens is None
        or columns.experts
        or columns.total is not None
    ):
        others = [*columns.names, *(["a total"] if columns.total is not None else [])]
        surplus = f", and not {others[0][:40]!r}" if others else ""
        raise DistplbError(
            f"{path} has a column of experts or of counts; pass columns 'layer', 'expert' and 'count', with or without "
            f"'step'{surplus}"
        )
    values = _values(path, rows, [columns.tokens])[:, 0]
    by_expert: dict[tuple[int, str, int], tuple[str, Any]] = {}
    for nth, line in enumerate(rows):
        step = 0 if columns.step is None else _whole(path, line, columns.step)
        key = (step, line.cells[columns.layer], _whole(path, line, columns.expert))
        told = f"expert {key[2]} of layer {key[1][:40]!r}{_in_step(columns.step, step)}"
        _put(path, by_expert, key, told, line.place, values[nth])
    experts = sorted({expert for *_, expert in by_expert})
    if experts != _from(0, experts):
        missing = next(number for number in _from(0, experts) if number not in experts)
        raise DistplbError(
            f"{path} has no expert {missing}, but {experts[-1]}; number experts from 0, and pass zeros too"
        )
    by_place: dict[tuple[int, str], tuple[str, Any]] = {}
    for step, layer in dict.fromkeys((step, layer) for step, layer, _ in by_expert):
        for expert in experts:
            if (step, layer, expert) not in by_expert:
                raise DistplbError(
                    f"{path} has no count of expert {expert} in layer {layer[:40]!r}{_in_step(columns.step, step)}; "
                    "pass zeros too"
                )
        place = by_expert[step, layer, 0][0]
        by_place[step, layer] = place, np.array([by_expert[step, layer, expert][1] for expert in experts])
    table = _grid(path, by_place, [line.cells[columns.layer] for line in rows])
    return table if columns.step is not None else Table(table.values[0], table.layers)


def _in_step(column: int | None, step: int) -> str:
    return "" if column is None else f" of step {step}"


def _whole(path: Path, line: Line, column: int) -> int:
    place = f"{path}, {line.place}, column {column + 1}"
    found = counts([line.cells[column]], lambda _: place)[0]
    if found < 0:
        raise DistplbError(f"{place}: {found} is no number of a step or an expert")
    return found


def _put(path: Path, table: dict[Any, tuple[str, Any]], key: Any, told: str, place: str, value: Any) -> None:
    if key in table:
        raise DistplbError(f"{path}, {place} has {told} a second time, after {table[key][0]}; pass each once")
    table[key] = place, value


def _grid(path: Path, rows: Mapping[tuple[int, str], tuple[str, Any]], names: list[str] | None) -> Table:
    """`[T, L, E]`: steps in the order of their numbers, layers in that of theirs, or in which they come."""
    steps = sorted({step for step, _ in rows})
    layers = list(dict.fromkeys(layer for _, layer in rows))
    if all(_INDEX.fullmatch(layer) for layer in layers):
        layers.sort(key=int)
    for step in steps:
        for layer in layers:
            if (step, layer) not in rows:
                raise DistplbError(
                    f"{path} has no row of layer {layer[:40]!r} in step {step}; pass all layers of each step"
                )
    values = np.array([[rows[step, layer][1] for layer in layers] for step in steps])
    return Table(values, None if names is None else tuple(layers))
