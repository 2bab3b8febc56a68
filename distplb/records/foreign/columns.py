"""The columns of a table: whether its first line is a header, and the roles of the names in it.

Shapes: E experts.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from distplb.errors import DistplbError
from distplb.records.foreign.number_formats import is_number

__all__ = ["Columns", "Line", "header_of", "is_index", "role_of"]

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


class Line(NamedTuple):
    """One row: its place in the file, in words, and its cells."""

    place: str
    cells: list[str]


def role_of(name: str) -> str | None:
    """The role of a column or row with this name, a key of `_ROLES`; None for an expert or a layer."""
    return _ROLE.get(re.sub(r"[ .-]", "_", name.strip().lower()))


def is_index(text: str) -> bool:
    """Whether a text may be the index of a layer or an expert."""
    return bool(_INDEX.fullmatch(text))


def header_of(path: Path, lines: list[Line]) -> list[str] | None:
    """The first line if it is certainly a header; None if it is certainly a row.

    Raises:
        DistplbError: naming the line, if it may be either, or is a header with columns that are not understood.
    """
    place, cells = lines[0]
    roles = [role_of(cell) for cell in cells]
    corner = not cells[0] or roles[0] is not None
    if not any(is_number(cell) for cell in cells):
        return cells if len(lines) > 1 or corner else None
    experts = [cell for at, cell in enumerate(cells) if not (roles[at] or (at == 0 and not cell))]
    if corner or any(roles):
        numbers = sorted(int(cell) for cell in experts if is_index(cell))
        words = [cell for cell in experts if cell and not is_number(cell)]
        if words:
            raise DistplbError(
                f"{path}, {place} has column {words[0][:40]!r} next to numbered experts; leave it out, or name it "
                "'layer' or 'step' if that is what it holds"
            )
        if len(numbers) < len(experts) or numbers not in (_numbers_from(0, experts), _numbers_from(1, experts)):
            first = next(cell for cell in cells if role_of(cell)) if any(roles) else ""
            raise DistplbError(
                f"{path}, {place} has {first[:40]!r} like a header, but its numbers do not run from 0 or 1; pass a "
                "header such as 'layer,0,1,2', or only names and counts"
            )
        return cells
    if len(cells) > 1 and cells == [str(number) for number in _numbers_from(0, cells)]:
        return cells
    if len(cells) > 3 and set(cells) in [{str(number) for number in _numbers_from(first, cells)} for first in (0, 1)]:
        raise DistplbError(
            f"{path}, {place} has each number from {min(map(int, cells))} to {max(map(int, cells))} once, so it may be "
            "a header or counts; pass a header such as 'layer,0,1,2', and names of the layers"
        )
    forms = {_DIGITS.sub("#", line.cells[0]) for line in lines}
    is_layer = len(forms) == 1 and "#" in min(forms)  # as in moe.0, moe.1
    if not is_number(cells[0]) and not is_layer and _number_experts(cells[1:]):
        raise DistplbError(
            f"{path}, {place} has {cells[0][:40]!r} and the numbers from {cells[1]} to {cells[-1]}, so it may be a "
            "header or counts; if it is a header, name its first column 'layer' or 'step', else add a header above it"
        )
    return None


def _number_experts(cells: Sequence[str]) -> bool:
    """Whether the cells number experts: from 0, or at least three of them from 1. Counts rarely look like that."""
    firsts = (0, 1) if len(cells) > 2 else (0,)
    return len(cells) > 1 and any(cells == [str(number) for number in _numbers_from(first, cells)] for first in firsts)


def _numbers_from(first: int, items: Sequence[object]) -> list[int]:
    return list(range(first, first + len(items)))


class Columns(NamedTuple):
    """The index of each column by its role; expert columns are in the order of their numbers."""

    experts: list[int]
    names: list[str]
    layer: int | None
    step: int | None
    expert: int | None
    tokens: int | None
    total: int | None

    @classmethod
    def of(cls, path: Path, place: str, header: list[str]) -> Columns:
        """The columns of a header.

        Raises:
            DistplbError: naming the column, if two have the same role, names do not number experts, or each row
                belongs to one rank.
        """
        roles: dict[str, int] = {}
        experts = []
        for at, name in enumerate(header):
            role = role_of(name) or ("index" if not name and at == 0 else None)
            if role is None:
                experts.append(at)
            elif role in roles:
                raise DistplbError(
                    f"{path}, {place}: columns {header[roles[role]][:40]!r} and {name[:40]!r} both name the "
                    f"{role}; keep one of them"
                )
            else:
                roles[role] = at
        if "rank" in roles:
            raise DistplbError(
                f"{path}, {place}: column {header[roles['rank']][:40]!r} means that each row belongs to one rank; sum "
                "over the ranks, and pass a row for each layer"
            )
        if "layer" not in roles and "index" in roles:
            roles["layer"] = roles["index"]
        names = [header[at] for at in experts]
        if "count" not in roles and "expert" not in roles:
            order = _order(path, place, names)
            experts = [experts[at] for at in order]
        return cls(experts, names, *(roles.get(role) for role in ("layer", "step", "expert", "count", "total")))


def _order(path: Path, place: str, names: list[str]) -> list[int]:
    """The order of the columns by the numbers in their names; unchanged if the names have no numbers."""
    if not names or not all(names):
        raise DistplbError(
            f"{path}, {place} has no columns of experts, or one without a name; name a column for each expert"
        )
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise DistplbError(f"{path}, {place} has column {twice[:40]!r} twice; give each column its own name")
    matches = [_NUMBERED.fullmatch(name) for name in names]
    parts = [(match[1].lower(), int(match[2])) for match in matches if match]
    if not parts:
        return list(range(len(names)))
    other = next((name for name, match in zip(names, matches, strict=True) if not match), None)
    if other is None and len({prefix for prefix, _ in parts}) > 1:
        other = next(name for name, (prefix, _) in zip(names, parts, strict=True) if prefix != parts[0][0])
    if other is not None:
        numbered = next(name for name, match in zip(names, matches, strict=True) if match and name != other)
        raise DistplbError(
            f"{path}, {place} has column {other[:40]!r}, which does not number an expert as {numbered[:40]!r} does; "
            "leave it out, or name it 'layer' or 'step' if that is what it holds"
        )
    role = role_of(parts[0][0].rstrip("_-. ")) if parts[0][0] else None
    if role in ("layer", "step", "rank"):
        raise DistplbError(
            f"{path}, {place}: column {names[0][:40]!r} names a {role}; pass a row for each layer and a column for "
            "each expert, summed over all ranks"
        )
    numbers = [number for _, number in parts]
    for first in (0, 1):
        if sorted(numbers) == _numbers_from(first, names):
            return [numbers.index(number) for number in _numbers_from(first, names)]
    missing = next(number for number in range(len(names) + 1) if number not in numbers)
    raise DistplbError(
        f"{path}, {place} numbers experts as in {names[0][:40]!r}, but has no column with number {missing}; pass a "
        "column for each expert"
    )
