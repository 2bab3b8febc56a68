"""The single entry for counts: any container becomes int64 tokens, or is refused with name, place and value.

Integers of every type are counts, and so are floats without fractions, as far as their dtype represents every integer.
Floats with fractions are weights: accepted where one process plans or evaluates, refused where counts are added up.

Shapes: T steps, L layers, E experts; X rows of n items.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from distplb.core.count_errors import (
    below_int64,
    exact_limit,
    layer_in_words,
    non_negative,
    refuse_counts,
    refuse_weights,
)
from distplb.core.fixed_point import fixed_point
from distplb.core.plain_tensor import INTEGERS, as_tensor
from distplb.errors import DistplbError

__all__ = [
    "Counts",
    "as_counts",
    "as_integers",
    "as_load",
    "as_step_counts",
    "as_tokens",
    "as_weights",
    "marked",
    "refuse_marked",
]

# Containers of counts; nested sequences may hold numbers, arrays or tensors.
Counts = Tensor | NDArray[Any] | Sequence[Any]

# Each rank's total stays below this, so that the sum over 2^14 ranks fits into an int64.
_MAX_RANK_TOTAL = 2.0**48
_DIMS = ("step", "layer", "expert")
_LAYOUTS = "[layers, experts] or [steps, layers, experts], with no empty dim"
# What a window holds in place of a bad count, by the dtype that it came in. No counter reaches these values.
_MARKED_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.uint64)
_MARKS = {dtype: -(2**63) + 1 + nth for nth, dtype in enumerate(_MARKED_DTYPES)}


# --- loads, weights, numbers ------------------------------------------------------------------------------------


def as_tokens(load: Counts, name: str = "load", layers: Sequence[str] = ()) -> Tensor:
    """`[T, L, E]` int64 from `[L, E]` or `[T, L, E]` of any exact type.

    >>> as_tokens([[3.0, 1.0]])
    tensor([[[3, 1]]])

    Args:
        load: a tensor, a NumPy array or nested lists.
        name: the argument's name.
        layers: the names of the L layers, if known.

    Raises:
        DistplbError: for another shape, a value that is not a count, or too many tokens, with place and value.
    """
    values = as_tensor(name, load)
    if values.dim() not in (2, 3) or 0 in values.shape:
        raise DistplbError(f"{name} has shape {tuple(values.shape)}; pass {_LAYOUTS}")
    layers = layers if len(layers) == values.shape[-2] else ()
    tokens = as_counts(name, values, _DIMS[3 - values.dim() :], layers)
    tokens = tokens if tokens.dim() == 3 else tokens[None]
    upper_limit = int(tokens.max()) * tokens.shape[0] * tokens.shape[2]  # sums only if they can be too large
    if upper_limit >= _MAX_RANK_TOTAL:
        total = tokens.double().sum((0, 2))  # [L]
        layer = int(total.argmax())
        if float(total[layer]) >= _MAX_RANK_TOTAL:
            raise DistplbError(
                f"{name} has {float(total[layer]):.3g} tokens in layer {layer_in_words(layer, layers)}; "
                "pass fewer than 2^48 tokens per layer on each rank"
            )
    return tokens


def as_load(load: Counts, name: str = "load") -> Tensor:
    """Like `as_tokens`, for a load that is not added up: floats with fractions are weights, scaled to integers.

    A layer with fractions is multiplied by a power of two, the same in all steps, so that each value is rounded by at
    most 2^-39 of the layer's total. Ratios, such as an imbalance, do not change.

    >>> as_load([[0.5, 0.5, 0.5, 1.5]]) / 2**37
    tensor([[[0.5000, 0.5000, 0.5000, 1.5000]]])

    Raises:
        DistplbError: as in `as_tokens`, except for fractions.
    """
    values = as_tensor(name, load)
    if not values.is_floating_point() or values.dim() not in (2, 3) or bool((values == values.round()).all()):
        return as_tokens(values, name)
    refuse_weights(name, values, _DIMS[3 - values.dim() :])
    weights = values.double()
    rows = (weights if weights.dim() == 3 else weights[None]).transpose(0, 1)  # [L, T, E]
    if float(rows.sum((1, 2)).max()) >= _MAX_RANK_TOTAL:
        raise DistplbError(f"{name} has a layer whose total is 2^48 or more; divide the weights by a power of two")
    return fixed_point(rows.flatten(1)).view(rows.shape).transpose(0, 1).contiguous()


def as_counts(name: str, value: Any, dims: Sequence[str], layers: Sequence[str] = ()) -> Tensor:
    """Tokens of any shape as int64, on their device.

    Args:
        name: the argument's name.
        value: a tensor, a NumPy array or nested lists.
        dims: what each dim stands for, as in ("layer", "expert"); empty if the dims have no names.
        layers: the layers' names, if known.

    Raises:
        DistplbError: for a value that is not a non-negative integer, or is beyond the exact range of its dtype.
    """
    value = as_tensor(name, value)
    tokens = _int64(value)
    if not _is_exact(value, tokens):
        refuse_counts(name, value, tokens, dims, layers)
    return tokens


def as_step_counts(name: str, value: Any, layers: Sequence[str] = ()) -> Tensor:
    """`[T, L, E]` int64 on its device, from a load that has all three dims; nothing is added up.

    Raises:
        DistplbError: for another shape, or a value that is not a count, with place and value.
    """
    value = as_tensor(name, value)
    if value.dim() != 3 or 0 in value.shape:
        raise DistplbError(f"{name} has shape {list(value.shape)}; pass [steps, layers, experts], with no empty dim")
    return as_counts(name, value, _DIMS, layers if len(layers) == value.shape[1] else ())


def as_weights(name: str, value: Any, dims: Sequence[str] = ("row", "item")) -> Tensor:
    """`[X, n]` non-negative numbers: int64, or float64 for floats, which may have fractions.

    Raises:
        DistplbError: for another shape, NaN, infinite or negative values, with place and value.
    """
    value = as_tensor(name, value)
    if value.dim() != 2 or 0 in value.shape:
        raise DistplbError(
            f"{name} has shape {tuple(value.shape)}; pass numbers of shape [{dims[0]}s, {dims[1]}s], with no empty dim"
        )
    if not value.is_floating_point():
        return as_counts(name, value, dims)
    refuse_weights(name, value, dims)
    weights: Tensor = value.double()
    return weights


def as_integers(name: str, value: Any, expected: str) -> Tensor:
    """int64 from integers of either sign that are not counts, such as expert ids or iterations.

    >>> as_integers("iteration", range(3), "integers")
    tensor([0, 1, 2])

    Args:
        name: the argument's name.
        value: a tensor, a NumPy array or a sequence of integers.
        expected: what to pass, in words.

    Raises:
        DistplbError: for floats, bools and anything that is not numbers.
    """
    value = as_tensor(name, value)
    if value.dtype not in INTEGERS and value.numel():
        raise DistplbError(f"{name} is {value.dtype} of shape {tuple(value.shape)}; pass {expected}")
    integers = _int64(value)
    if value.dtype == torch.uint64 and bool((integers < 0).any()):
        raise DistplbError(f"{name} has {int(integers.min()) + 2**64}; pass {expected}, below 2^63")
    return integers


# --- on the way into a window -----------------------------------------------------------------------------------


def marked(tokens: Tensor) -> Tensor:
    """The counts as int64, with a negative mark in place of each bad one. Never waits for the device.

    Marking takes three operations for floats, four for half floats, two for uint64, and none for other integers, which
    keep their values.
    """
    if tokens.dtype == torch.uint64:
        bits = _int64(tokens)
        return bits.masked_fill(bits < 0, _MARKS[tokens.dtype])
    if not tokens.is_floating_point():
        return tokens.to(torch.int64)
    # A remainder differs from a value that is negative or too large, and is NaN for one that is not finite; NaN is cast
    # to an arbitrary integer, which differs as well. The divisor is the next number that the dtype represents. Half
    # floats are compared as wider floats, in which no integer becomes infinite.
    above, mark = exact_limit(tokens.dtype) + 2, _MARKS[tokens.dtype]
    tokens = tokens if tokens.dtype.itemsize > 2 else tokens.float()
    whole = tokens.remainder(above).to(torch.int64)
    return whole.masked_fill_(whole != tokens, mark)


def refuse_marked(load: Tensor, steps: Tensor, layers: Sequence[str]) -> None:
    """Refuse a window's `[T, L, E]` int64 if it has marks of `marked` or negative counts.

    Args:
        load: the window's counts.
        steps: `[T]`, the number of each step.
        layers: the L layers, in words.

    Raises:
        DistplbError: with layer, step and expert, and what is wrong.
    """
    if not load.numel() or int(load.min()) >= 0:
        return
    places = (load < 0).nonzero()
    step, layer, expert = places[0].tolist()
    value = int(load[step, layer, expert])
    place = f"for expert {expert} in step {int(steps[step])} ({len(places)} such value{'s' * (len(places) != 1)})"
    dtypes = [dtype for dtype, mark in _MARKS.items() if mark == value]
    if not dtypes:
        what = f"{value} {place}; counts must be {non_negative(torch.int64)(value)}"
    elif dtypes[0] == torch.uint64:
        what = f"a {dtypes[0]} value of 2^63 or more {place}; counts must be {below_int64(value)}"
    else:
        limit = exact_limit(dtypes[0])
        what = (
            f"a {dtypes[0]} value that is not an integer from 0 to {limit} {place}; counts must be whole tokens, which "
            f"{dtypes[0]} represents exactly only up to {limit}: check the counter, or count in int64"
        )
    raise DistplbError(f"LoadWindow: layer {layers[layer]} has {what}")


# --- casts ------------------------------------------------------------------------------------------------------


def _int64(value: Tensor) -> Tensor:
    """Cast to int64; of uint64, take the bits, which are negative from 2^63 on."""
    return value.contiguous().view(torch.int64) if value.dtype == torch.uint64 else value.to(torch.int64)


def _is_exact(value: Tensor, tokens: Tensor) -> bool:
    """Whether `tokens`, cast from `value`, are all counts and equal to it. Waits for the device once."""
    if not tokens.numel() or value.dtype in (torch.bool, torch.uint8, torch.uint16, torch.uint32):
        return True
    if not value.is_floating_point():
        return int(tokens.min()) >= 0
    # NaN and infinity are cast to arbitrary integers, which are not equal to them.
    return not bool(((tokens != value) | (tokens < 0) | (tokens > exact_limit(value.dtype))).any())
