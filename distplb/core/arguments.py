"""Checks arguments where they come in: a wrong type is refused by name, before the value is used."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from torch import Tensor

from distplb.errors import DistplbError

__all__ = ["listed", "plain", "refuse_wrong_types", "shown", "whole_number"]


def refuse_wrong_types(arguments: Mapping[str, tuple[Any, tuple[Any, ...], str]]) -> None:
    """Check the type of each argument.

    >>> refuse_wrong_types({"seed": (1.5, (int,), "a whole number")})
    Traceback (most recent call last):
    distplb.errors.DistplbError: seed is 1.5; pass a whole number

    Args:
        arguments: by name the value, the types that it may have (None for None itself), and these in words. A bool is
            no number.

    Raises:
        DistplbError: for the first of another type.
    """
    for name, (value, types, words) in arguments.items():
        kinds = tuple(kind for kind in types if kind is not None)
        is_fine = isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))
        if not is_fine and not (value is None and None in types):
            raise DistplbError(f"{name} is {shown(value)}; pass {words}")


def plain(value: Any) -> Any:
    """A scalar of NumPy or torch as Python's own number; everything else as it is.

    >>> import torch
    >>> plain(torch.tensor(4)), plain(np.float32(0.5)), plain("4")
    (4, 0.5, '4')
    """
    if isinstance(value, np.number | np.bool_):
        return value.item()
    if isinstance(value, np.ndarray) and value.ndim == 0 and value.dtype.kind in "biuf":
        return value.item()
    if isinstance(value, Tensor) and value.dim() == 0 and not value.is_meta and not hasattr(value, "full_tensor"):
        return value.item()
    return value


def whole_number(name: str, value: Any, minimum: int | None = None, expected: str = "") -> int:
    """A whole number of Python, NumPy or torch, as Python's own; 4.0 and True are none.

    >>> whole_number("num_slots", np.int64(4))
    4
    >>> whole_number("num_slots", 4.0)
    Traceback (most recent call last):
    distplb.errors.DistplbError: num_slots is 4.0; pass a whole number

    Args:
        name: of the argument.
        value: of the argument.
        minimum: the smallest number that is accepted; none where None.
        expected: what to pass, in words; a whole number of at least `minimum` where empty.

    Raises:
        DistplbError: for what is none, or less.
    """
    number = plain(value)
    if not isinstance(number, int) or isinstance(number, bool) or (minimum is not None and number < minimum):
        expected = expected or ("a whole number" if minimum is None else f"a whole number of at least {minimum}")
        raise DistplbError(f"{name} is {shown(value)}; pass {expected}")
    return number


def shown(value: Any) -> str:
    """A value in a few words: a number or text as it is, and of everything else the type.

    >>> shown("gloo"), shown([1, 2])
    ("'gloo'", 'a list')
    """
    value = plain(value)
    if value is None or isinstance(value, bool | int | float | str):
        text = repr(value)
        return text if len(text) <= 80 else f"{text[:77]}..."
    if isinstance(value, type):
        return f"the class {value.__name__}"
    name = type(value).__name__
    return f"{'an' if name[0] in 'AEIOUaeiou' else 'a'} {name}"


def listed(names: Iterable[object]) -> str:
    """Names read from a file, in quotes and cut to fit a message: the first eight.

    >>> listed(["load", "iteration"])
    "'load', 'iteration'"
    """
    texts = [repr(str(name)[:40]) for name in names]
    return ", ".join(texts[:8] + ["..."] * (len(texts) > 8))
