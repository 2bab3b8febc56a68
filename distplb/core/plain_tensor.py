"""Tensors, arrays of NumPy and nested lists of numbers as one plain tensor; all else is refused by name and place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distplb.core.arguments import shown
from distplb.errors import DistplbError

__all__ = ["INTEGERS", "as_tensor", "refuse_unreadable"]

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (
    *(torch.uint8, torch.uint16, torch.uint32, torch.uint64),
    *(torch.int8, torch.int16, torch.int32, torch.int64),
)
_NUMBERS = frozenset((torch.bool, *INTEGERS, *_FLOATS))


def as_tensor(name: str, value: Any) -> Tensor:
    """A plain tensor of any shape, in the dtype that the numbers came in, without a graph.

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
    """`load.to_dense()` of the argument "LoadWindow.add: load": what to write, without the function that has it."""
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
            first, other = (f"a list of {one}" if one >= 0 else "no list" for one in (lengths[0], length))
            raise DistplbError(
                f"{name}{place}[0] is {first}, {_call(name, place)}[{nth}] is {other}; pass lists of equal length"
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
