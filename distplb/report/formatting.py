"""Formats words and numbers for a report; strings from a run's files are untrusted."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = [
    "amount",
    "differing",
    "from_to",
    "label",
    "percent",
    "plural",
    "printable",
    "seconds",
    "shortened",
    "unit_of",
]

_PREFIXES = ("", "k", "M", "G", "T", "P")


def printable(text: str) -> str:
    """Replace characters that a page or an image cannot hold, or that would reverse the direction of the text.

    >>> printable("a\\0b\\ud800")
    'a�b�'
    """
    return "".join(one if one.isprintable() or one == "\n" else "�" for one in text)


def shortened(text: str, max_letters: int = 48) -> str:
    """The text, or only its beginning and end if it is longer.

    >>> shortened("model.layers.17.mlp.experts", max_letters=13)
    'model.…xperts'
    """
    half = (max_letters - 1) // 2
    return text if len(text) <= max_letters else f"{text[:half]}…{text[-half:]}"


def label(text: str, max_letters: int = 48) -> str:
    """A string as a figure shows it: on one line, and never parsed as a formula."""
    return shortened(printable(" ".join(text.split())), max_letters).replace("$", r"\$")


def differing(names: Sequence[str]) -> tuple[str, tuple[str, ...]]:
    """The parts that names share, with a star for the rest, and the parts in which they differ.

    >>> differing(["blocks.0.moe", "blocks.11.moe"])
    ('blocks.*.moe', ('0', '11'))
    >>> differing(["moe"])
    ('', ('moe',))
    """
    parts = [name.split(".") for name in names]
    first, last = _in_common(parts), _in_common([part[::-1] for part in parts])
    if len(names) < 2 or not first + last:
        return "", tuple(names)
    last = min(last, min(map(len, parts)) - 1 - first)
    differs = [".".join(part[first : len(part) - last]) for part in parts]
    return ".".join([*parts[0][:first], "*", *parts[0][len(parts[0]) - last :]]), tuple(differs)


def _in_common(parts: Sequence[Sequence[str]]) -> int:
    """The number of leading parts that all names share; less than the number that any name has."""
    shortest = min(map(len, parts)) - 1
    return next((at for at in range(shortest) if len({part[at] for part in parts}) > 1), shortest)


def amount(number: float, unit: str) -> str:
    """Format a quantity with three digits and a unit prefix.

    >>> amount(3_145_728, "B"), amount(0, "B"), amount(999_999, "B")
    ('3.15 MB', '0 B', '1 MB')
    """
    size, prefixed = unit_of(number, unit)
    return f"{number / size:.3g} {prefixed}"


def unit_of(number: float, unit: str) -> tuple[float, str]:
    """The size and name of the prefixed unit in which a number has one to three digits before its decimal point.

    >>> unit_of(3_145_728, "B")
    (1000000.0, 'MB')
    """
    size = 1.0
    for prefix in _PREFIXES:
        if abs(number) < 999.5 * size or prefix == _PREFIXES[-1]:
            break
        size *= 1000
    return size, f"{prefix}{unit}"


def seconds(number: float) -> str:
    """Format a duration with three digits.

    >>> seconds(0.01234), seconds(75), seconds(5000)
    ('12.3 ms', '75 s', '83.3 min')
    """
    if number >= 600:
        return f"{number / 60:.3g} min"
    return f"{number * 1000:.3g} ms" if 0 < number < 0.9995 else f"{number:.3g} s"


def from_to(before: str, after: str) -> str:
    """Join two quantities with an arrow; a shared unit is written once.

    >>> from_to("810 ms", "773 ms"), from_to("1.2 s", "773 ms")
    ('810 → 773 ms', '1.2 s → 773 ms')
    """
    number, _, unit = before.partition(" ")
    return f"{number if unit == after.partition(' ')[2] else before} → {after}"


def percent(share: float) -> str:
    """Format a share with one decimal, and without a sign if it rounds to 0.

    >>> percent(0.1234), percent(-0.0002), percent(0.0002)
    ('12.3 %', '0.0 %', 'below 0.1 %')
    """
    if 0 < share < 0.0005:
        return "below 0.1 %"
    return f"{round(100 * share, 1) + 0.0:.1f} %"


def plural(number: int, noun: str) -> str:
    """Format a number with its noun, in the singular or plural.

    >>> plural(1, "slot"), plural(1200, "slot")
    ('1 slot', '1,200 slots')
    """
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
