"""Counts as people and programs write them: separators of thousands, decimal commas, powers of ten.

What may be read in two ways is refused.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal
from typing import NamedTuple

from distplb.errors import DistplbError

__all__ = ["Cell", "counts", "is_number"]

_PLAIN = re.compile(r"[+-]?[0-9]{1,40}")
# A space or an apostrophe between groups of three digits is no decimal sign anywhere.
_SPACED = re.compile(r"[0-9]{1,3}(?:[  \u202f'’_][0-9]{3})+")
_POINTED = re.compile(r"[0-9]*(?:[.,][0-9]*)+")
_POWER = re.compile(r"([0-9]+)[.,]?([0-9]*)[eE]([+-]?[0-9]{1,2})")
_GROUPS = {sign: re.compile(rf"[1-9][0-9]{{0,2}}(?:{re.escape(sign)}[0-9]{{3}})+") for sign in ".,"}


class Cell(NamedTuple):
    """A text where a count is expected, and where it stands, in words."""

    text: str
    place: str


def is_number(text: str) -> bool:
    """Whether it is a number in any of these ways, though perhaps no count."""
    bare = text.lstrip("+-")
    return bool(
        _PLAIN.fullmatch(text)
        or _SPACED.fullmatch(bare)
        or (_POINTED.fullmatch(bare) and any(letter.isdigit() for letter in bare))
        or _POWER.fullmatch(bare)
    )


def counts(cells: Sequence[Cell]) -> list[int]:
    """The whole numbers that the cells of one table hold; all are written in one way.

    >>> counts([Cell("1,234,567", "line 1"), Cell("1,234", "line 2"), Cell("7.00", "line 3")])
    [1234567, 1234, 7]

    Raises:
        DistplbError: beginning with the place, for what is no whole number, or may be two.
    """
    if all(_PLAIN.fullmatch(cell.text) for cell in cells):
        return [int(cell.text) for cell in cells]
    odd = [cell for cell in cells if not _PLAIN.fullmatch(cell.text)]
    for cell in odd:
        if not is_number(cell.text):
            raise DistplbError(f"{cell.place}: {cell.text[:40]!r} is not a count")
    thousands = _thousands(odd)
    return [_count(cell, thousands) for cell in cells]


def _thousands(odd: Sequence[Cell]) -> str:
    """The signs that part thousands in this table; the others are decimal signs."""
    thousands = ""
    for sign in ".,":
        shown: dict[str, Cell] = {}  # a cell for each use of the sign
        for cell in odd:
            if sign in cell.text:
                shown.setdefault(_use(cell.text.lstrip("+-"), sign), cell)
        if "decimals" in shown and "thousands" in shown:
            one, other = shown["decimals"], shown["thousands"]
            raise DistplbError(
                f"{one.place}: {one.text[:40]!r} has {sign!r} before decimals, {other.place}: {other.text[:40]!r} "
                "between thousands; write counts as digits alone"
            )
        if list(shown) == ["either"]:
            whole, rest = shown["either"].text.split(sign)
            raise DistplbError(
                f"{shown['either'].place}: {shown['either'].text[:40]!r} may be {whole}{rest}, or {whole} and {rest} "
                "thousandths; write counts as digits alone"
            )
        thousands += sign * ("thousands" in shown)
    return thousands


def _use(text: str, sign: str) -> str:
    """What a sign in a number without plus or minus is for: "decimals", "thousands", or "either"."""
    other = "," if sign == "." else "."
    if other in text and text.rfind(other) > text.rfind(sign):  # such as , in 1,234.00
        return "thousands" if _GROUPS[sign].fullmatch(text[: text.index(other)]) else "decimals"
    if other in text or not _GROUPS[sign].fullmatch(text):
        return "decimals"
    return "thousands" if text.count(sign) > 1 else "either"


def _count(cell: Cell, thousands: str) -> int:
    text = cell.text
    if _PLAIN.fullmatch(text):
        return int(text)
    if _SPACED.fullmatch(text.lstrip("+-")):
        return int(re.sub(r"[^0-9+-]", "", text))
    for sign in ".,":
        text = text.replace(sign, "" if sign in thousands else ".")
    power = _POWER.fullmatch(text.lstrip("+-"))
    if power and int(power[3]) > len(power[2]):
        raise DistplbError(f"{cell.place}: {cell.text[:40]!r} may be rounded; write counts as digits alone")
    if text.count(".") > 1:
        raise DistplbError(f"{cell.place}: {cell.text[:40]!r} is not a count")
    value = Decimal(text)
    if value != value.to_integral_value():
        raise DistplbError(f"{cell.place}: {cell.text[:40]!r} is not whole; pass tokens, not shares or means of them")
    return int(value)
