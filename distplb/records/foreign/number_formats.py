"""Parses counts as people and programs write them: thousands separators, decimal commas, powers of ten.

Ambiguous numbers are refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distplb.errors import DistplbError

__all__ = ["is_number", "number_array", "parse_counts"]

_PLAIN = re.compile(r"[+-]?[0-9]{1,40}")
# A space or an apostrophe between groups of three digits is never a decimal sign.
_SPACED = re.compile(r"[0-9]{1,3}(?:[  \u202f'’_][0-9]{3})+")
_POINTED = re.compile(r"[0-9]*(?:[.,][0-9]*)+")
_POWER = re.compile(r"([0-9]+)[.,]?([0-9]*)[eE]([+-]?[0-9]{1,2})")
_GROUPS = {sign: re.compile(rf"[1-9][0-9]{{0,2}}(?:{re.escape(sign)}[0-9]{{3}})+") for sign in ".,"}


def is_number(text: str) -> bool:
    """Whether a text is a number in any of these formats, though perhaps not a count."""
    bare = text.lstrip("+-")
    return bool(
        _PLAIN.fullmatch(text)
        or _SPACED.fullmatch(bare)
        or (_POINTED.fullmatch(bare) and any(letter.isdigit() for letter in bare))
        or _POWER.fullmatch(bare)
    )


def parse_counts(cells: Sequence[str], place: Callable[[int], str]) -> list[int]:
    """Parse the integers in the cells of one table, which all use the same format.

    >>> parse_counts(["1,234,567", "1,234", "7.00"], place="cell {}".format)
    [1234567, 1234, 7]

    Args:
        cells: the texts of the cells.
        place: returns the place of a cell, in words, from its index.

    Raises:
        DistplbError: beginning with the place, if a cell is not an integer or is ambiguous.
    """
    odd = [at for at, text in enumerate(cells) if not _PLAIN.fullmatch(text)]
    for at in odd:
        if not is_number(cells[at]):
            raise DistplbError(f"{place(at)}: {cells[at][:40]!r} is not a count")
    thousands = _thousands(cells, odd, place)
    return [_count(text, at, thousands, place) for at, text in enumerate(cells)]


def number_array(numbers: Sequence[int | float]) -> NDArray[Any]:
    """`[n]`, with NumPy's dtype for the numbers; Python's numbers (dtype object) if an integer does not fit int64."""
    is_long = any(isinstance(number, int) and not -(2**63) <= number < 2**63 for number in numbers)
    return np.array(numbers, object if is_long else None)


def _thousands(cells: Sequence[str], odd: Sequence[int], place: Callable[[int], str]) -> str:
    """The signs that separate thousands in this table; the others are decimal signs."""
    thousands = ""
    for sign in ".,":
        shown: dict[str, int] = {}  # the first cell of each use of the sign
        for at in odd:
            if sign in cells[at]:
                shown.setdefault(_use(cells[at].lstrip("+-"), sign), at)
        if "decimals" in shown and "thousands" in shown:
            one, other = shown["decimals"], shown["thousands"]
            raise DistplbError(
                f"{place(one)}: {cells[one][:40]!r} has {sign!r} before decimals, but {place(other)}: "
                f"{cells[other][:40]!r} has it between thousands; write counts in digits only"
            )
        if list(shown) == ["either"]:
            at = shown["either"]
            whole, rest = cells[at].split(sign)
            raise DistplbError(
                f"{place(at)}: {cells[at][:40]!r} may be {whole}{rest}, or {whole} and {rest} thousandths; write "
                "counts in digits only"
            )
        thousands += sign * ("thousands" in shown)
    return thousands


def _use(text: str, sign: str) -> str:
    """The use of a sign in a number without plus or minus: "decimals", "thousands" or "either"."""
    other = "," if sign == "." else "."
    if other in text and text.rfind(other) > text.rfind(sign):  # as the comma in 1,234.00
        return "thousands" if _GROUPS[sign].fullmatch(text[: text.index(other)]) else "decimals"
    if other in text or not _GROUPS[sign].fullmatch(text):
        return "decimals"
    return "thousands" if text.count(sign) > 1 else "either"


def _count(text: str, at: int, thousands: str, place: Callable[[int], str]) -> int:
    if _PLAIN.fullmatch(text):
        return int(text)
    if _SPACED.fullmatch(text.lstrip("+-")):
        return int(re.sub(r"[^0-9+-]", "", text))
    plain = text
    for sign in ".,":
        plain = plain.replace(sign, "" if sign in thousands else ".")
    power = _POWER.fullmatch(plain.lstrip("+-"))
    if power and int(power[3]) > len(power[2]):
        raise DistplbError(f"{place(at)}: {text[:40]!r} may be rounded; write counts in digits only")
    if plain.count(".") > 1:
        raise DistplbError(f"{place(at)}: {text[:40]!r} is not a count")
    value = Decimal(plain)
    if value != value.to_integral_value():
        raise DistplbError(f"{place(at)}: {text[:40]!r} is not an integer; pass tokens, not fractions or means of them")
    return int(value)
