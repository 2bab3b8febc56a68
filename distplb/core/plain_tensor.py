"""Tensors, NumPy arrays and nested lists of numbers as one plain tensor; the rest is refused by name and place."""

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
    """The numbers as one plain tensor, in the dtype that they came in, detached from any graph.

    Args:
        name: the argument's name.
        value: a tensor, a NumPy array or scalar, or nested sequences of numbers, arrays or tensors.

    Raises:
        DistplbError: for anything else, and for tensors whose values cannot be read directly.
    """
    if isinstance(value, Tensor):
        refuse_unreadable(name, value)
        if value.is_meta:
            raise DistplbError(f"{name} is on the meta device, which holds no values; pass real counts")
        return value.detach()
    if isinstance(value, np.ndarray | np.generic):
        return _of_array(name, value)
    if isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray | memoryview):
        return _of_sequence(name, value)
    raise DistplbError(f"{name} is {shown(value)}; pass a tensor, a NumPy array or nested lists of numbers")


def refuse_unreadable(name: str, value: Tensor) -> None:
    """Refuse tensors that are not plain tensors of numbers. Reads no values, so that it can be compiled.

    Raises:
        DistplbError: for DTensors, sparse, nested and quantized tensors, and dtypes that cannot be counts.
    """
    # By the name of its class, because importing DTensor takes as long as importing torch; in compiled code, only the
    # class is known.
    if type(value).__name__ == "DTensor" or hasattr(value, "full_tensor"):
        part = any(placement.is_partial() for placement in getattr(value, "placements", ()))
        what = ".to_local(), this rank's own counts" if part else ".full_tensor(), the counts of all ranks"
        raise DistplbError(f"{name} is a DTensor with placements {tuple(value.placements)}; pass {_call(name, what)}")  # type: ignore[attr-defined]
    if value.is_nested:
        raise DistplbError(f"{name} is a nested tensor; pass rows of equal length")
    if value.layout != torch.strided:
        raise DistplbError(f"{name} has the layout {value.layout}; pass {_call(name, '.to_dense()')}")
    if value.is_quantized:
        raise DistplbError(f"{name} is quantized ({value.dtype}), which rounds counts; pass exact counts")
    if value.dtype not in _NUMBERS:
        raise DistplbError(f"{name} has dtype {value.dtype}; pass counts as integers")


def _call(name: str, method: str) -> str:
    """The call to write: `load.to_dense()` for the argument "LoadWindow.add: load"."""
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
    # torch reads only native byte order and no negative strides, and warns about read-only arrays.
    return torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("="), order="C", copy=True))


def _of_sequence(name: str, values: Sequence[Any]) -> Tensor:
    leaf: Any = values
    while isinstance(leaf, Sequence) and not isinstance(leaf, str) and len(leaf):
        leaf = leaf[0]
    if isinstance(leaf, Tensor) or (isinstance(leaf, np.ndarray) and leaf.ndim):
        return _stacked(name, values)
    try:
        array = np.array(values)
    except Exception as unreadable:  # NumPy may raise anything for objects of other types
        _refuse_ragged(name, values)
        raise DistplbError(f"{name} is {shown(values)} of values that are not numbers; pass counts") from unreadable
    return _of_array(name, array)


def _stacked(name: str, values: Sequence[Any]) -> Tensor:
    """Stack a sequence whose leaves are tensors or arrays, such as one for each layer."""
    parts = [as_tensor(f"{name}[{nth}]", one) for nth, one in enumerate(values)]
    kinds = [(one.dtype, tuple(one.shape), str(one.device)) for one in parts]
    for nth, kind in enumerate(kinds):
        if kind != kinds[0]:
            first, other = (f"{dtype} of shape {shape} on {device}" for dtype, shape, device in (kinds[0], kind))
            raise DistplbError(
                f"{name}[0] is {first}, {_call(name, '')}[{nth}] is {other}; "
                "pass parts of equal dtype, shape and device"
            )
    return torch.stack(parts)


def _refuse_ragged(name: str, values: Any, place: str = "") -> None:
    """Refuse the first item whose length or depth differs from that of its first sibling."""
    lengths = [len(one) if isinstance(one, Sequence) and not isinstance(one, str) else -1 for one in values]
    for nth, length in enumerate(lengths):
        if length != lengths[0]:
            first, other = (f"a list of length {one}" if one >= 0 else "not a list" for one in (lengths[0], length))
            raise DistplbError(
                f"{name}{place}[0] is {first}, {_call(name, place)}[{nth}] is {other}; pass lists of equal length"
            )
    if lengths and lengths[0] >= 0:
        for nth, one in enumerate(values):
            _refuse_ragged(name, one, f"{place}[{nth}]")


def _first_other(array: NDArray[Any]) -> str:
    """The first object that is not a number or does not fit into 64 bits, in words."""
    for place, one in np.ndenumerate(array):
        if isinstance(one, bool) or not isinstance(one, int | float):
            return f", {shown(one)} at {list(place)}"
        if isinstance(one, int) and not -(2**63) <= one < 2**63:
            return f", a number outside the range of int64 at {list(place)}"
    return ""
