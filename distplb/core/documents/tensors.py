"""Tensors from a file of `torch.save` or safetensors that may come from anywhere, as arrays.

The format of safetensors, read here because the package is needed for nothing else: eight bytes, the length of a JSON
object as a little-endian integer; the object, with dtype, shape and place of each tensor; their bytes.
https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import math
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distplb.core.documents.text import parse_json
from distplb.errors import DistplbError

__all__ = ["read_pt", "read_safetensors"]

_MOST_HEADER = 1 << 24  # bytes of names, shapes and other plain values
_DEEPEST = 8  # of lists and objects in each other
_KINDS = {
    "BOOL": "|b1",
    "I8": "<i1",
    "I16": "<i2",
    "I32": "<i4",
    "I64": "<i8",
    "U8": "<u1",
    "U16": "<u2",
    "U32": "<u4",
    "U64": "<u8",
    "F16": "<f2",
    "F32": "<f4",
    "F64": "<f8",
    "BF16": "<u2",
}


# --- torch.save -------------------------------------------------------------------------------------------------


def read_pt(path: Path, max_bytes: int) -> Any:
    """What `torch.save` wrote: tensors, as arrays, and plain values in lists and objects; nothing else is unpickled.

    Args:
        path: of the file.
        max_bytes: that the file, and each tensor as int64, may take.

    Raises:
        DistplbError: if it needs more than tensors and plain values, is damaged, or too large.
    """
    sizes = _sizes(path, max_bytes)
    try:
        # Mapped: no more than is used comes into memory, and no tensor reaches beyond the file.
        document = torch.load(str(path), map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises a dozen kinds
        code = re.search(r"GLOBAL ([\w.]+)", str(error))
        if "weights_only" in str(error) or code:
            raise DistplbError(
                f"{path} holds {code[1][:80] if code else 'more than tensors'}, and unpickling that can run code; "
                "pass torch.save of tensors, lists and dicts of them, or .npy"
            ) from error
        raise DistplbError(f"{path} cannot be read ({_line(error)}); write it anew with torch.save") from error
    return _plain(path, document, sizes, max_bytes, 0)


def _sizes(path: Path, max_bytes: int) -> set[int]:
    """The sizes of the archive's members, once these are known to be whole, plain and no larger than allowed."""
    size = path.stat().st_size
    if size > max_bytes:
        raise DistplbError(f"{path} has {size} bytes, {max_bytes} are read; pass the counts alone")
    try:
        if not zipfile.is_zipfile(path):
            raise DistplbError(
                f"{path} is no archive of torch.save, as torch 1.6 and later write; a pickle can run code and is not "
                "read: pass torch.save of tensors, or .npy"
            )
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            plain = [one for one in members if not re.search(r"(^|/)data/[^/]*$", one.filename)]
            if any(one.compress_type != zipfile.ZIP_STORED for one in members):
                raise DistplbError(f"{path} is compressed, which torch.save never does; write it anew with torch.save")
            if sum(one.file_size for one in plain) > _MOST_HEADER:
                raise DistplbError(
                    f"{path} has more than {_MOST_HEADER} bytes beside its tensors; pass the counts alone"
                )
            damaged = archive.testzip()
    except DistplbError:
        raise
    except Exception as damage:  # zipfile raises a dozen kinds
        raise DistplbError(f"{path} cannot be read ({_line(damage)}); write it anew with torch.save") from damage
    if damaged is not None:
        raise DistplbError(f"{path} is damaged at {damaged[:80]!r}; write it anew with torch.save")
    return {one.file_size for one in members}


def _plain(path: Path, value: Any, sizes: set[int], max_bytes: int, depth: int) -> Any:
    """Tensors as arrays, objects with texts as names."""
    if depth > _DEEPEST:
        raise DistplbError(f"{path} has lists in lists, more than {_DEEPEST}; pass the counts alone")
    if isinstance(value, Tensor):
        return _array(path, value, sizes, max_bytes)
    if isinstance(value, Mapping):
        document = {str(name): _plain(path, one, sizes, max_bytes, depth + 1) for name, one in value.items()}
        if len(document) != len(value):
            raise DistplbError(f"{path} names something twice; give each a name of its own")
        return document
    if isinstance(value, list | tuple):
        return [_plain(path, one, sizes, max_bytes, depth + 1) for one in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise DistplbError(f"{path} holds a {type(value).__name__}; pass tensors, lists and dicts of them")


def _array(path: Path, tensor: Tensor, sizes: set[int], max_bytes: int) -> NDArray[Any]:
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized or tensor.is_complex():
        raise DistplbError(f"{path} holds a tensor of {tensor.layout}, {tensor.dtype}; pass dense integers")
    if tensor.numel() * max(8, tensor.itemsize) > max_bytes:
        raise DistplbError(f"{path} has a tensor of shape {list(tensor.shape)}, more than {max_bytes} bytes")
    if tensor.numel() and tensor.untyped_storage().nbytes() not in sizes:
        raise DistplbError(f"{path} has a tensor of more or fewer bytes than it says; write it anew with torch.save")
    plain = tensor.detach()
    try:  # copied: what is mapped is let go of
        array: NDArray[Any] = (plain.float() if plain.dtype == torch.bfloat16 else plain).numpy().copy()
    except TypeError as error:
        raise DistplbError(f"{path} holds a tensor of {tensor.dtype}; pass integers") from error
    return array


# --- safetensors ------------------------------------------------------------------------------------------------


def read_safetensors(path: Path, max_bytes: int) -> dict[str, NDArray[Any]]:
    """All tensors of a `.safetensors` file, by name.

    Args:
        path: of the file.
        max_bytes: that they may take as int64.

    Raises:
        DistplbError: if it is no such file, its header does not tell the truth, or it is too large.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 2 <= length <= min(size - 8, _MOST_HEADER):
            raise DistplbError(f"{path} has no header of safetensors, or is cut off; write it anew")
        try:
            header = parse_json(file.read(length))
            tensors = {name: one for name, one in header.items() if name != "__metadata__"}
            places = {name: _place(one) for name, one in tensors.items()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise DistplbError(
                f"{path} has a header that is not safetensors' ({_line(error)}); write it anew"
            ) from error
        total = sum(math.prod(shape) * max(8, dtype.itemsize) for _, dtype, shape, _, _ in places.values())
        if total > max_bytes:
            raise DistplbError(f"{path} would take more than {max_bytes} bytes; pass the counts alone")
        return {name: _stored(path, name, 8 + length, size, place) for name, place in places.items()}


_Place = tuple[str, "np.dtype[Any]", tuple[int, ...], int, int]


def _place(tensor: Mapping[str, Any]) -> _Place:
    """Kind, dtype, shape, and the first byte and the one after the last."""
    kind, shape, (begin, end) = tensor["dtype"], tuple(tensor["shape"]), tensor["data_offsets"]
    if kind not in _KINDS:
        raise ValueError(f"dtype {str(kind)[:20]} is no number that counts")
    if not all(type(number) is int and number >= 0 for number in (*shape, begin, end)):
        raise ValueError("shapes and offsets are whole numbers")
    return kind, np.dtype(_KINDS[kind]), shape, begin, end


def _stored(path: Path, name: str, start: int, size: int, place: _Place) -> NDArray[Any]:
    kind, dtype, shape, begin, end = place
    if end - begin != math.prod(shape) * dtype.itemsize or start + end > size:
        raise DistplbError(
            f"{path}: tensor {name[:80]!r} of shape {list(shape)} is said to be at bytes {begin} to {end} of "
            f"{size - start}: it is damaged or cut off; write it anew"
        )
    values: NDArray[Any] = np.fromfile(path, dtype, math.prod(shape), offset=start + begin).reshape(shape)
    if kind == "BF16":  # the upper half of a float32
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
