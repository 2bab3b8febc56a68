"""The one door for counts: whatever they are held in becomes int64 tokens, or is refused by name, place and value.

Integers of every type are counts, and so are floats that are whole numbers which their dtype counts exactly. Floats
with fractions are weights: right where one process plans or judges them, refused where counts are added up.

Shapes: T steps, L layers, E experts; X rows of n items.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distplb.core.arguments import shown
from distplb.core.fixed_point import fixed_point
from distplb.errors import DistplbError

__all__ = [
    "Counts",
    "as_counts",
    "as_integers",
    "as_load",
    "as_step_counts",
    "as_tensor",
    "as_tokens",
    "as_weights",
    "exact_limit",
    "marked",
    "refuse_marked",
    "refuse_unreadable",
]

# What counts may be held in; nested sequences may hold numbers, arrays or tensors.
Counts = Tensor | NDArray[Any] | Sequence[Any]

# Each rank's own total stays below this, so that the sum over 2^14 of them cannot leave an int64.
_MAX_RANK_TOTAL = 2.0**48
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_INTEGERS = (
    *(torch.uint8, torch.uint16, torch.uint32, torch.uint64),
    *(torch.int8, torch.int16, torch.int32, torch.int64),
)
_NUMBERS = frozenset((torch.bool, *_INTEGERS, *_FLOATS))
_LAYOUTS = "[layers, experts] or [steps, layers, experts], none empty"
# What stands in a window for a number that is no count, by the dtype that it came in. No counter gets there.
_MARKS = {dtype: -(2**63) + 1 + nth for nth, dtype in enumerate((*_FLOATS, torch.uint64))}


# --- loads, weights, numbers ------------------------------------------------------------------------------------


def as_tokens(load: Counts, name: str = "load", layers: Sequence[str] = ()) -> Tensor:
    """`[T, L, E]` int64 from `[L, E]` or `[T, L, E]` of any type that is exact.

    >>> as_tokens([[3.0, 1.0]])
    tensor([[[3, 1]]])

    Args:
        load: a tensor, an array of NumPy or nested lists.
        name: of the argument.
        layers: the L names, where they are known.

    Raises:
        DistplbError: for another shape, what is no count, or too many tokens, with its place and value.
    """
    given = as_tensor(name, load)
    if given.dim() not in (2, 3) or 0 in given.shape:
        raise DistplbError(f"{name} has shape {tuple(given.shape)}; pass {_LAYOUTS}")
    layers = layers if len(layers) == given.shape[-2] else ()
    tokens = as_counts(name, given, ("step", "layer", "expert")[3 - given.dim() :], layers)
    tokens = tokens if tokens.dim() == 3 else tokens[None]
    most = int(tokens.max()) * tokens.shape[0] * tokens.shape[2]  # exact sums only where they may matter
    if most >= _MAX_RANK_TOTAL:
        total = tokens.double().sum((0, 2))  # [L]
        layer = int(total.argmax())
        if float(total[layer]) >= _MAX_RANK_TOTAL:
            raise DistplbError(
                f"{name} has {float(total[layer]):.3g} tokens in layer {_layer(layer, layers)}; "
                "2^48 on each rank is the most that can be added up"
            )
    return tokens


def as_load(load: Counts, name: str = "load") -> Tensor:
    """As `as_tokens`, where nobody adds anything: of floats with fractions, which are weights, proportional numbers.

    A layer with fractions is multiplied by a power of two, the same in all steps, so that what is rounded is a part of
    2^39 of its total. Ratios, as an imbalance is one, are what they were.

    >>> as_load([[0.5, 0.5, 0.5, 1.5]]) / 2**37
    tensor([[[0.5000, 0.5000, 0.5000, 1.5000]]])

    Raises:
        DistplbError: as of `as_tokens`, fractions apart.
    """
    given = as_tensor(name, load)
    if not given.is_floating_point() or given.dim() not in (2, 3) or bool((given == given.round()).all()):
        return as_tokens(given, name)
    weights = _checked_weights(name, given, ("step", "layer", "expert")[3 - given.dim() :])
    rows = (weights if weights.dim() == 3 else weights[None]).transpose(0, 1)  # [L, T, E]
    if float(rows.sum((1, 2)).max()) >= _MAX_RANK_TOTAL:
        raise DistplbError(f"{name} has a layer whose total is 2^48 or more; divide the weights by a power of two")
    return fixed_point(rows.flatten(1)).view(rows.shape).transpose(0, 1).contiguous()


def as_counts(name: str, value: Any, dims: Sequence[str], layers: Sequence[str] = ()) -> Tensor:
    """Tokens of any shape as int64, on their device.

    Args:
        name: of the argument.
        value: a tensor, an array of NumPy or nested lists.
        dims: what is counted along each dim, as in ("layer", "expert"); nothing that has a name where empty.
        layers: names, where they are known.

    Raises:
        DistplbError: for what is not a finite, whole, non-negative number that its dtype counts exactly.
    """
    value = as_tensor(name, value)
    found = _int64(value)
    if _is_fine(value, found):
        return found
    if value.dtype == torch.uint64:
        wrong = found < 0
        raise _refused(name, wrong, lambda place: int(found[place]) + 2**64, _beyond_int64(), dims, layers)
    for wrong, what in _faults(value):
        if bool(wrong.any()):
            raise _refused(name, wrong, lambda place: _number(value[place]), what, dims, layers)
    raise AssertionError(f"{name} has values that are no counts, and none of them was found")


def as_step_counts(name: str, value: Any, layers: Sequence[str] = ()) -> Tensor:
    """`[T, L, E]` int64 on its device, of what has all three dims; nothing is added up.

    Raises:
        DistplbError: for another shape, or what is no count, with its place and value.
    """
    given = as_tensor(name, value)
    if given.dim() != 3 or 0 in given.shape:
        raise DistplbError(f"{name} has shape {list(given.shape)}; pass [steps, layers, experts], none 0")
    known = layers if len(layers) == given.shape[1] else ()
    return as_counts(name, given, ("step", "layer", "expert"), known)


def as_weights(name: str, value: Any, dims: Sequence[str] = ("row", "item")) -> Tensor:
    """`[X, n]` non-negative numbers: int64, or float64 of what came as floats, fractions too.

    Raises:
        DistplbError: for another shape, NaN, infinite or negative values, with place and value.
    """
    value = as_tensor(name, value)
    if value.dim() != 2 or 0 in value.shape:
        raise DistplbError(
            f"{name} has shape {tuple(value.shape)}; pass numbers of shape [{dims[0]}s, {dims[1]}s], none empty"
        )
    if not value.is_floating_point():
        return as_counts(name, value, dims)
    return _checked_weights(name, value, dims)


def _checked_weights(name: str, value: Tensor, dims: Sequence[str]) -> Tensor:
    """As float64, where they are finite and none is negative."""
    wide: Tensor = value.double()
    for wrong, what in ((~wide.isfinite(), _finite), (wide < 0, _non_negative(value.dtype))):
        if bool(wrong.any()):
            raise _refused(name, wrong, lambda place: _number(value[place]), what, dims, ())
    return wide


def as_integers(name: str, value: Any, wanted: str) -> Tensor:
    """Whole numbers of either sign that are no counts, such as numbers of experts or iterations: int64.

    >>> as_integers("iteration", range(3), "integers")
    tensor([0, 1, 2])

    Args:
        name: of the argument.
        value: a tensor, an array of NumPy or a sequence, of integers.
        wanted: what to pass, in words.

    Raises:
        DistplbError: for floats, bools and what has no numbers.
    """
    given = as_tensor(name, value)
    if given.dtype not in _INTEGERS and given.numel():
        raise DistplbError(f"{name} is {given.dtype} of shape {tuple(given.shape)}; pass {wanted}")
    found = _int64(given)
    if given.dtype == torch.uint64 and bool((found < 0).any()):
        raise DistplbError(f"{name} has {int(found.min()) + 2**64}; pass {wanted}, below 2^63")
    return found


def exact_limit(dtype: torch.dtype) -> int:
    """Up to which a float dtype has every whole number: 256, 2,048, 2^24, 2^53.

    >>> exact_limit(torch.bfloat16)
    256
    """
    return int(2 / torch.finfo(dtype).eps)


# --- on the way into a window -----------------------------------------------------------------------------------


def marked(tokens: Tensor) -> Tensor:
    """int64, where what is no count is negative. Never waits for the device; NaN there is whatever a cast makes of it.

    Three operations more for floats, four for half floats, two for uint64; none for other integers, which keep their
    values.
    """
    if tokens.dtype == torch.uint64:
        found = _int64(tokens)
        return found.masked_fill(found < 0, _MARKS[tokens.dtype])
    if not tokens.is_floating_point():
        return tokens.to(torch.int64)
    # A remainder is another number for all that is negative or too large, and NaN for what is not finite. It is by the
    # next number that the dtype has. Half floats are compared as wider ones, where no integer is infinite.
    above, mark = exact_limit(tokens.dtype) + 2, _MARKS[tokens.dtype]
    tokens = tokens if tokens.dtype.itemsize > 2 else tokens.float()
    found = tokens.remainder(above).to(torch.int64)
    return found.masked_fill_(found != tokens, mark)


def refuse_marked(load: Tensor, steps: Tensor, layers: Sequence[str]) -> None:
    """Refuse a window's `[T, L, E]` int64 where `marked` or a counter left something negative.

    Args:
        load: that was kept.
        steps: `[T]`, their numbers.
        layers: the L layers, in words.

    Raises:
        DistplbError: with layer, step and expert, and what was wrong.
    """
    if not load.numel() or int(load.min()) >= 0:
        return
    wrong = (load < 0).nonzero()
    step, layer, expert = wrong[0].tolist()
    value = int(load[step, layer, expert])
    place = f"for expert {expert} in step {int(steps[step])} ({len(wrong)} such)"
    dtypes = [dtype for dtype, mark in _MARKS.items() if mark == value]
    if not dtypes:
        what = f"{value} {place}; counts must be {_non_negative(torch.int64)(value)}"
    elif dtypes[0] == torch.uint64:
        what = f"a number of {dtypes[0]} from 2^63 on {place}; counts must be {_beyond_int64()(value)}"
    else:
        limit = exact_limit(dtypes[0])
        what = (
            f"a number of {dtypes[0]} that is no whole one from 0 to {limit} {place}; counts must be whole tokens, and "
            f"{dtypes[0]} counts to {limit} only: check the counter that made them, or count in int64"
        )
    raise DistplbError(f"LoadWindow: layer {layers[layer]} has {what}")


# --- what numbers come in ---------------------------------------------------------------------------------------


def as_tensor(name: str, value: Any) -> Tensor:
    """A plain tensor of numbers, of any shape, with the dtype that they came in; without a graph.

    Args:
        name: of the argument.
        value: a tensor, an array or scalar of NumPy, or nested sequences of numbers, arrays or tensors.

    Raises:
        DistplbError: for whatever else, and for tensors whose numbers cannot be read as they are.
    """
    if isinstance(value, Tensor):
        refuse_unreadable(name, value)
        if value.is_meta:
            raise DistplbError(f"{name} is on the device meta, which keeps no values; pass the counts themselves")
        return value.detach()
    if isinstance(value, np.ndarray | np.generic):
        return _of_array(name, value)
    if isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray | memoryview):
        return _of_sequence(name, value)
    raise DistplbError(f"{name} is {shown(value)}; pass a tensor, an array of NumPy or nested lists, of numbers")


def refuse_unreadable(name: str, value: Tensor) -> None:
    """Refuse what is no plain tensor of numbers. Looks at no value, so that it may be compiled.

    Raises:
        DistplbError: for DTensors, sparse, nested and quantized tensors, and dtypes that are no counts.
    """
    # Importing DTensor takes as long as importing torch; a compiler knows its class alone.
    if type(value).__name__ == "DTensor" or hasattr(value, "full_tensor"):
        part = any(placement.is_partial() for placement in getattr(value, "placements", ()))
        what = ".to_local(), this rank's own counts" if part else ".full_tensor(), the counts of all"
        raise DistplbError(f"{name} is a DTensor with placements {tuple(value.placements)}; pass {_call(name, what)}")  # type: ignore[attr-defined]
    if value.is_nested:
        raise DistplbError(f"{name} is a nested tensor; pass rows of equal length")
    if value.layout != torch.strided:
        raise DistplbError(f"{name} has the layout {value.layout}; pass {_call(name, '.to_dense()')}")
    if value.is_quantized:
        raise DistplbError(f"{name} is quantized ({value.dtype}), and so rounded; pass the counts themselves")
    if value.dtype not in _NUMBERS:
        raise DistplbError(f"{name} has dtype {value.dtype}; pass counts as integers")


def _call(name: str, method: str) -> str:
    """Of an argument that may be told with its function."""
    return name.rsplit(": ", 1)[-1] + method


def _of_array(name: str, value: NDArray[Any] | np.generic) -> Tensor:
    if isinstance(value, np.ma.MaskedArray) and np.ma.is_masked(value):
        raise DistplbError(
            f"{name} is masked in {int(value.mask.sum())} of {value.size} places; pass {_call(name, '.filled(0)')}"
        )
    array = np.asarray(value)
    if array.dtype.kind == "O":
        raise DistplbError(f"{name} is an array of objects{_first_other(array)}; pass counts as integers")
    if array.dtype.kind in "US":
        raise DistplbError(f"{name} holds text, such as {str(array.flat[0])[:40]!r}; pass counts as integers")
    if array.dtype.kind not in "biuf" or array.dtype.itemsize > 8:
        raise DistplbError(f"{name} has dtype {array.dtype}; pass counts as integers")
    # Torch knows this machine's order of bytes alone, no negative strides, and warns of what may not be written.
    return torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("="), order="C", copy=True))


def _of_sequence(name: str, values: Sequence[Any]) -> Tensor:
    leaf: Any = values
    while isinstance(leaf, Sequence) and not isinstance(leaf, str) and len(leaf):
        leaf = leaf[0]
    if isinstance(leaf, Tensor) or (isinstance(leaf, np.ndarray) and leaf.ndim):
        return _stacked(name, values)
    try:
        array = np.array(values)
    except Exception as unreadable:  # whatever NumPy makes of objects that are none of its own
        _refuse_ragged(name, values)
        raise DistplbError(f"{name} is {shown(values)} that holds no plain numbers; pass counts") from unreadable
    return _of_array(name, array)


def _stacked(name: str, values: Sequence[Any]) -> Tensor:
    """Of sequences whose leaves are tensors or arrays, as of one for each layer."""
    parts = [as_tensor(f"{name}[{nth}]", one) for nth, one in enumerate(values)]
    kinds = [(one.dtype, tuple(one.shape), str(one.device)) for one in parts]
    for nth, kind in enumerate(kinds):
        if kind != kinds[0]:
            first, other = (f"{shape} of {dtype} on {device}" for dtype, shape, device in (kinds[0], kind))
            raise DistplbError(f"{name}[0] is {first}, {_call(name, '')}[{nth}] is {other}; pass parts that are alike")
    return torch.stack(parts)


def _refuse_ragged(name: str, values: Any, place: str = "") -> None:
    """The first two neighbours of different lengths, or of different depths."""
    lengths = [len(one) if isinstance(one, Sequence) and not isinstance(one, str) else -1 for one in values]
    for nth, length in enumerate(lengths):
        if length != lengths[0]:
            told = [f"a list of {one}" if one >= 0 else "no list" for one in (lengths[0], length)]
            raise DistplbError(
                f"{name}{place}[0] is {told[0]}, {_call(name, place)}[{nth}] is {told[1]}; pass lists of equal length"
            )
    if lengths and lengths[0] >= 0:
        for nth, one in enumerate(values):
            _refuse_ragged(name, one, f"{place}[{nth}]")


def _first_other(array: NDArray[Any]) -> str:
    """The first object that is no number, or too large a one."""
    for place, one in np.ndenumerate(array):
        if isinstance(one, bool) or not isinstance(one, int | float):
            return f", {shown(one)} at {list(place)}"
        if isinstance(one, int) and not -(2**63) <= one < 2**63:
            return f", a number beyond 2^63 at {list(place)}"
    return ""


# --- values -----------------------------------------------------------------------------------------------------


def _int64(value: Tensor) -> Tensor:
    """As it is cast; of uint64 the bits, which are negative from 2^63 on."""
    return value.contiguous().view(torch.int64) if value.dtype == torch.uint64 else value.to(torch.int64)


def _is_fine(value: Tensor, found: Tensor) -> bool:
    """Whether `found`, cast from `value`, is what it says. Waits for the device once."""
    if not found.numel() or value.dtype in (torch.bool, torch.uint8, torch.uint16, torch.uint32):
        return True
    if not value.is_floating_point():
        return int(found.min()) >= 0
    # A cast of what is not finite is any number, and none that is equal to it.
    return not bool(((found != value) | (found < 0) | (found > exact_limit(value.dtype))).any())


# What counts must be, of the first value that is not.
_Words = Callable[[Any], str]


def _finite(value: float) -> str:
    return "finite: check the counter that made them"


def _faults(value: Tensor) -> list[tuple[Tensor, _Words]]:
    negative = (value < 0, _non_negative(value.dtype))
    if not value.is_floating_point():
        return [negative]
    wide, limit = value.double(), exact_limit(value.dtype)
    return [
        (~wide.isfinite(), _finite),
        negative,
        (wide != wide.round(), _whole),
        (wide > limit, _exact(value.dtype)),
    ]


def _non_negative(dtype: torch.dtype) -> _Words:
    bits = 8 * dtype.itemsize if dtype in (torch.int8, torch.int16) else 32

    def words(value: float) -> str:
        # Counting on from the least number of a signed type, a counter seldom comes far before it is looked at.
        if -(2 ** (bits - 1)) <= value <= -(2 ** (bits - 8)):
            return f"non-negative: a {bits}-bit counter that overflowed shows {int(value) + 2**bits} so; count in int64"
        return "non-negative: check the counter that made them"

    return words


def _whole(value: float) -> str:
    return (
        "whole tokens: multiply frequencies by the tokens they stand for, and of means over steps pass the sums "
        "(mean × steps)"
    )


def _exact(dtype: torch.dtype) -> _Words:
    limit = exact_limit(dtype)
    return lambda value: (
        f"exact: {dtype} has every whole number up to {limit} only, and a larger one may be rounded; count in int64"
    )


def _beyond_int64() -> _Words:
    return lambda value: "below 2^63: check the counter that made them"


def _refused(
    name: str,
    wrong: Tensor,
    value_at: Callable[[tuple[int, ...]], Any],
    words: _Words,
    dims: Sequence[str],
    layers: Sequence[str],
) -> DistplbError:
    places = wrong.nonzero()
    place = tuple(places[0].tolist())
    value = value_at(place)
    return DistplbError(
        f"{name} has {value} for {_told(place, dims, layers)} ({len(places)} such); counts must be {words(value)}"
    )


def _number(value: Tensor) -> Any:
    """As short as its dtype allows: 0.7, not 0.699999988079071."""
    number = value.item()
    return np.float32(number) if value.is_floating_point() and value.dtype.itemsize <= 4 else number


def _told(place: Sequence[int], dims: Sequence[str], layers: Sequence[str]) -> str:
    """As in: expert 3 of layer 'moe.0' in step 7."""
    if not dims:
        return f"place {list(place)}"
    parts = [
        f"{dim} {_layer(at, layers) if dim == 'layer' else at}" for dim, at in zip(dims, place, strict=True)
    ]  # the outermost first
    told = " of ".join(reversed(parts[-2:]))
    return " in ".join([told, *reversed(parts[:-2])])


def _layer(number: int, layers: Sequence[str]) -> str:
    return repr(layers[number]) if layers else str(number)
