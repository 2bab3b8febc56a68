"""Arguments of a wrong type are refused when they are given, by name, not where they are first used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from distplb.errors import DistplbError

__all__ = ["refuse_wrong_types"]


def refuse_wrong_types(given: Mapping[str, tuple[Any, tuple[Any, ...], str]]) -> None:
    """Look at each argument.

    >>> refuse_wrong_types({"seed": (1.5, (int,), "a whole number")})
    Traceback (most recent call last):
    distplb.errors.DistplbError: seed is 1.5; pass a whole number

    Args:
        given: by name the value, the types that it may have (None for None itself), and these in words. A bool is no
            number.

    Raises:
        DistplbError: for the first of another type.
    """
    for name, (value, types, words) in given.items():
        kinds = tuple(kind for kind in types if kind is not None)
        is_fine = isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))
        if not is_fine and not (value is None and None in types):
            is_short = value is None or isinstance(value, bool | int | float | str)
            raise DistplbError(f"{name} is {repr(value) if is_short else 'a ' + type(value).__name__}; pass {words}")
