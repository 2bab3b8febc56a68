"""The errors of `distplb.core.counts`: why a number is not a count, and up to where a float dtype is exact."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distplb.errors import DistplbError

__all__ = ["below_int64", "exact_limit", "layer_in_words", "non_negative", "refuse_counts", "refuse_weights"]

# From the first bad value to what counts must be, in words.
_Requirement = Callable[[Any], str]


def exact_limit(dtype: torch.dtype) -> int:
    """The number up to which a float dtype represents every integer: 256, 2,048, 2^24 or 2^53.

    >>> exact_limit(torch.bfloat16)
    256
    """
    return int(2 / torch.finfo(dtype).eps)


def refuse_counts(name: str, value: Tensor, tokens: Tensor, dims: Sequence[str], layers: Sequence[str]) -> None:
    """Raise for the first value that is not a count; the caller has found that there is one.

    Args:
        name: the argument's name.
        value: the tensor as passed.
        tokens: the same tensor cast to int64; for uint64, its bits.
        dims: what each dim stands for; empty if the dims have no names.
        layers: the layers' names, if known.

    Raises:
        DistplbError: with the value, its place and what counts must be.
    """
    if value.dtype == torch.uint64:
        is_wrong = tokens < 0
        raise _error(name, is_wrong, lambda place: int(tokens[place]) + 2**64, below_int64, dims, layers)
    for is_wrong, requirement in _requirements(value):
        if bool(is_wrong.any()):
            raise _error(name, is_wrong, lambda place: _short(value[place]), requirement, dims, layers)
    raise AssertionError(f"{name} was refused although all its values are counts")


def refuse_weights(name: str, value: Tensor, dims: Sequence[str]) -> None:
    """Refuse floats that are negative or not finite.

    Raises:
        DistplbError: as in `refuse_counts`.
    """
    for is_wrong, requirement in ((~value.isfinite(), _finite), (value < 0, non_negative(value.dtype))):
        if bool(is_wrong.any()):
            raise _error(name, is_wrong, lambda place: _short(value[place]), requirement, dims, ())


def layer_in_words(number: int, layers: Sequence[str]) -> str:
    """A layer's name in quotes, or its index if names are not known."""
    return repr(layers[number]) if layers else str(number)


# --- what counts must be ----------------------------------------------------------------------------------------


def _requirements(value: Tensor) -> list[tuple[Tensor, _Requirement]]:
    """The requirements of counts, each with a mask of the values that do not meet it."""
    negative = (value < 0, non_negative(value.dtype))
    if not value.is_floating_point():
        return [negative]
    wide, limit = value.double(), exact_limit(value.dtype)
    return [
        (~wide.isfinite(), _finite),
        negative,
        (wide != wide.round(), _whole),
        (wide > limit, _exact(value.dtype)),
    ]


def _finite(value: float) -> str:
    return "finite: check the counter that produced them"


def non_negative(dtype: torch.dtype) -> _Requirement:
    """Say what a negative value should be, and whether it looks like an overflow of its dtype."""
    bits = 8 * dtype.itemsize if dtype in (torch.int8, torch.int16) else 32

    def words(value: float) -> str:
        # An overflowed counter continues from the smallest value of its type and seldom gets far before it is read.
        if -(2 ** (bits - 1)) <= value <= -(2 ** (bits - 8)):
            return (
                f"non-negative: an overflowed {bits}-bit counter shows this for {int(value) + 2**bits}; count in int64"
            )
        return "non-negative: check the counter that produced them"

    return words


def _whole(value: float) -> str:
    return (
        "whole tokens: multiply frequencies by the number of tokens, and pass sums over steps instead of means "
        "(mean × steps)"
    )


def _exact(dtype: torch.dtype) -> _Requirement:
    limit = exact_limit(dtype)
    return lambda value: (
        f"exact: {dtype} represents every integer only up to {limit}, and may round larger ones; count in int64"
    )


def below_int64(value: int) -> str:
    """Say what an unsigned value too large for int64 should be."""
    return "below 2^63: check the counter that produced them"


# --- messages ---------------------------------------------------------------------------------------------------


def _error(
    name: str,
    is_wrong: Tensor,
    value_at: Callable[[tuple[int, ...]], Any],
    requirement: _Requirement,
    dims: Sequence[str],
    layers: Sequence[str],
) -> DistplbError:
    places = is_wrong.nonzero()
    place = tuple(places[0].tolist())
    value = value_at(place)
    return DistplbError(
        f"{name} has {value} for {_place_in_words(place, dims, layers)} "
        f"({len(places)} such value{'s' * (len(places) != 1)}); counts must be {requirement(value)}"
    )


def _short(value: Tensor) -> Any:
    """As short as its dtype allows: 0.7, not 0.699999988079071."""
    number = value.item()
    return np.float32(number) if value.is_floating_point() and value.dtype.itemsize <= 4 else number


def _place_in_words(place: Sequence[int], dims: Sequence[str], layers: Sequence[str]) -> str:
    """A place in words, such as "expert 3 of layer 'moe.0' in step 7"."""
    if not dims:
        return f"index {list(place)}"
    parts = [
        f"{dim} {layer_in_words(at, layers) if dim == 'layer' else at}" for dim, at in zip(dims, place, strict=True)
    ]  # outermost first
    innermost = " of ".join(reversed(parts[-2:]))
    return " in ".join([innermost, *reversed(parts[:-2])])
