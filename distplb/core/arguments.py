"""Check arguments on entry: a wrong type is refused by name, before the value is used."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from torch import Tensor

from distplb.errors import DistplbError

__all__ = ["listed", "plain", "refuse_wrong_types", "shown", "whole_number"]


def refuse_wrong_types(arguments: Mapping[str, tuple[Any, tuple[Any, ...], str]]) -> None:
    """Check the type of each argument.

    >>> refuse_wrong_types({"seed": (1.5, (int,), "an integer")})
    Traceback (most recent call last):
    distplb.errors.DistplbError: seed is 1.5; pass an integer

    Args:
        arguments: for each name, the value, its allowed types (None for None itself) and these types in words. A bool
            does not count as a number.

    Raises:
        DistplbError: for the first argument of another type.
    """
    for name, (value, types, words) in arguments.items():
        kinds = tuple(kind for kind in types if kind is not None)
        is_fine = isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))
        if not is_fine and not (value is None and None in types):
            raise DistplbError(f"{name} is {shown(value)}; pass {words}")


def plain(value: Any) -> Any:
    """A NumPy or torch scalar as a Python number; any other value unchanged.

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
    """A Python, NumPy or torch integer as a Python int; 4.0 and True are refused.

    >>> whole_number("num_slots", np.int64(4))
    4
    >>> whole_number("num_slots", 4.0)
    Traceback (most recent call last):
    distplb.errors.DistplbError: num_slots is 4.0; pass an integer

    Args:
        name: the argument's name.
        value: the argument's value.
        minimum: the smallest value that is accepted; None for no minimum.
        expected: what to pass, in words; if empty, an integer of at least `minimum`.

    Raises:
        DistplbError: if the value is not an integer, or is less than `minimum`.
    """
    number = plain(value)
    if not isinstance(number, int) or isinstance(number, bool) or (minimum is not None and number < minimum):
        expected = expected or ("an integer" if minimum is None else f"an integer of at least {minimum}")
        raise DistplbError(f"{name} is {shown(value)}; pass {expected}")
    return number


def shown(value: Any) -> str:
    """A value in a few words: numbers and text as they are, anything else by its type.

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
    """The first eight names from a file, quoted and shortened to fit a message.

    >>> listed(["load", "iteration"])
    "'load', 'iteration'"
    """
    texts = [repr(str(name)[:40]) for name in names]
    return ", ".join(texts[:8] + ["..."] * (len(texts) > 8))
