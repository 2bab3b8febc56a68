"""Why a number is no count, in words: the errors of `distplb.core.counts`, and how far a float dtype counts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distplb.errors import DistplbError

__all__ = ["below_int64", "exact_limit", "layer_in_words", "non_negative", "refuse_counts", "refuse_weights"]

# What counts must be, in words, of the first value that is not.
_Requirement = Callable[[Any], str]


def exact_limit(dtype: torch.dtype) -> int:
    """Up to which a float dtype has every whole number: 256, 2,048, 2^24, 2^53.

    >>> exact_limit(torch.bfloat16)
    256
    """
    return int(2 / torch.finfo(dtype).eps)


def refuse_counts(name: str, value: Tensor, tokens: Tensor, dims: Sequence[str], layers: Sequence[str]) -> None:
    """Raise for the first value that is no count; there is one.

    Args:
        name: of the argument.
        value: as it came in.
        tokens: the same, cast to int64; of uint64 the bits.
        dims: what is counted along each dim; nothing that has a name where empty.
        layers: names, where they are known.

    Raises:
        DistplbError: with its place, what it is and what counts must be.
    """
    if value.dtype == torch.uint64:
        is_wrong = tokens < 0
        raise _error(name, is_wrong, lambda place: int(tokens[place]) + 2**64, below_int64, dims, layers)
    for is_wrong, requirement in _requirements(value):
        if bool(is_wrong.any()):
            raise _error(name, is_wrong, lambda place: _short(value[place]), requirement, dims, layers)
    raise AssertionError(f"{name} has values that are no counts, and none of them was found")


def refuse_weights(name: str, value: Tensor, dims: Sequence[str]) -> None:
    """Refuse floats that are not finite, or negative.

    Raises:
        DistplbError: as `refuse_counts`.
    """
    for is_wrong, requirement in ((~value.isfinite(), _finite), (value < 0, non_negative(value.dtype))):
        if bool(is_wrong.any()):
            raise _error(name, is_wrong, lambda place: _short(value[place]), requirement, dims, ())


def layer_in_words(number: int, layers: Sequence[str]) -> str:
    """A layer's name in quotes, or its number where names are not known."""
    return repr(layers[number]) if layers else str(number)


# --- what counts must be ----------------------------------------------------------------------------------------


def _requirements(value: Tensor) -> list[tuple[Tensor, _Requirement]]:
    """Where each requirement is not met."""
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
    return "finite: check the counter that made them"


def non_negative(dtype: torch.dtype) -> _Requirement:
    """In words, of a negative value."""
    bits = 8 * dtype.itemsize if dtype in (torch.int8, torch.int16) else 32

    def words(value: float) -> str:
        # Counting on from the smallest number of a signed type, a counter seldom comes far before it is looked at.
        if -(2 ** (bits - 1)) <= value <= -(2 ** (bits - 8)):
            return f"non-negative: a {bits}-bit counter that overflowed shows {int(value) + 2**bits} so; count in int64"
        return "non-negative: check the counter that made them"

    return words


def _whole(value: float) -> str:
    return (
        "whole tokens: multiply frequencies by the tokens they stand for, and of means over steps pass the sums "
        "(mean × steps)"
    )


def _exact(dtype: torch.dtype) -> _Requirement:
    limit = exact_limit(dtype)
    return lambda value: (
        f"exact: {dtype} has every whole number up to {limit} only, and a larger one may be rounded; count in int64"
    )


def below_int64(value: int) -> str:
    """In words, of an unsigned value."""
    return "below 2^63: check the counter that made them"


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
        f"{name} has {value} for {_place_in_words(place, dims, layers)} ({len(places)} such); "
        f"counts must be {requirement(value)}"
    )


def _short(value: Tensor) -> Any:
    """As short as its dtype allows: 0.7, not 0.699999988079071."""
    number = value.item()
    return np.float32(number) if value.is_floating_point() and value.dtype.itemsize <= 4 else number


def _place_in_words(place: Sequence[int], dims: Sequence[str], layers: Sequence[str]) -> str:
    """As in: expert 3 of layer 'moe.0' in step 7."""
    if not dims:
        return f"place {list(place)}"
    parts = [
        f"{dim} {layer_in_words(at, layers) if dim == 'layer' else at}" for dim, at in zip(dims, place, strict=True)
    ]  # the outermost first
    innermost = " of ".join(reversed(parts[-2:]))
    return " in ".join([innermost, *reversed(parts[:-2])])
