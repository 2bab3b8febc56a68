"""Tensors from an untrusted file of `torch.save` or safetensors, as arrays.

safetensors files are parsed here because the package is needed for nothing else: eight bytes with the length of a JSON
object as a little-endian integer; the object, with dtype, shape and place of each tensor; the tensors' bytes.
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
_DEEPEST = 8  # levels of nested lists and objects
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
    """The content of a `torch.save` file: tensors as arrays, plain values in lists and dicts; nothing else is loaded.

    Args:
        path: path of the file.
        max_bytes: the most bytes that the file, and each tensor as int64, may take.

    Raises:
        DistplbError: if it holds anything but tensors and plain values, is damaged or too large.
    """
    sizes = _sizes(path, max_bytes)
    try:
        # Memory-mapped: only what is used is read into memory, and no tensor extends beyond the file.
        document = torch.load(str(path), map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises a dozen types
        code = re.search(r"GLOBAL ([\w.]+)", str(error))
        if "weights_only" in str(error) or code:
            raise DistplbError(
                f"{path} holds {code[1][:80] if code else 'more than tensors'}, and unpickling that can run code; "
                "pass a torch.save file of tensors or lists and dicts of them, or a .npy file"
            ) from error
        raise DistplbError(f"{path} cannot be read ({_line(error)}); write it again with torch.save") from error
    return _plain(path, document, sizes, max_bytes, 0)


def _sizes(path: Path, max_bytes: int) -> set[int]:
    """The sizes of the archive's members, which are checked to be intact, uncompressed and not too large."""
    size = path.stat().st_size
    if size > max_bytes:
        raise DistplbError(f"{path} has {size} bytes, more than {max_bytes}; pass only the counts")
    try:
        if not zipfile.is_zipfile(path):
            raise DistplbError(
                f"{path} is not an archive of torch.save in torch 1.6 or later, and a pickle is not read because it "
                "can run code; pass a torch.save file of tensors, or a .npy file"
            )
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            plain = [one for one in members if not re.search(r"(^|/)data/[^/]*$", one.filename)]
            if any(one.compress_type != zipfile.ZIP_STORED for one in members):
                raise DistplbError(f"{path} is compressed, which torch.save never does; write it again with torch.save")
            if sum(one.file_size for one in plain) > _MOST_HEADER:
                raise DistplbError(
                    f"{path} has more than {_MOST_HEADER} bytes besides its tensors; pass only the counts"
                )
            damaged = archive.testzip()
    except DistplbError:
        raise
    except Exception as damage:  # zipfile raises a dozen types
        raise DistplbError(f"{path} cannot be read ({_line(damage)}); write it again with torch.save") from damage
    if damaged is not None:
        raise DistplbError(f"{path} is damaged at {damaged[:80]!r}; write it again with torch.save")
    return {one.file_size for one in members}


def _plain(path: Path, value: Any, sizes: set[int], max_bytes: int, depth: int) -> Any:
    """Convert tensors to arrays, and the keys of dicts to text."""
    if depth > _DEEPEST:
        raise DistplbError(f"{path} has more than {_DEEPEST} levels of nested lists; pass only the counts")
    if isinstance(value, Tensor):
        return _array(path, value, sizes, max_bytes)
    if isinstance(value, Mapping):
        document = {str(name): _plain(path, one, sizes, max_bytes, depth + 1) for name, one in value.items()}
        if len(document) != len(value):
            raise DistplbError(f"{path} has two keys that read the same; give each a unique name")
        return document
    if isinstance(value, list | tuple):
        return [_plain(path, one, sizes, max_bytes, depth + 1) for one in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise DistplbError(f"{path} holds a value of type {type(value).__name__}; pass tensors or lists and dicts of them")


def _array(path: Path, tensor: Tensor, sizes: set[int], max_bytes: int) -> NDArray[Any]:
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized or tensor.is_complex():
        raise DistplbError(
            f"{path} holds a {tensor.dtype} tensor of layout {tensor.layout} on {tensor.device}; pass dense integers "
            "on the CPU"
        )
    if tensor.numel() * max(8, tensor.itemsize) > max_bytes:
        raise DistplbError(
            f"{path} has a tensor of shape {list(tensor.shape)}, which takes more than {max_bytes} bytes; "
            "pass only the counts"
        )
    if tensor.numel() and tensor.untyped_storage().nbytes() not in sizes:
        raise DistplbError(f"{path} has a tensor whose stored size is wrong; write it again with torch.save")
    plain = tensor.detach()
    try:  # copied, so that the file need not stay mapped
        array: NDArray[Any] = (plain.float() if plain.dtype == torch.bfloat16 else plain).numpy().copy()
    except TypeError as error:
        raise DistplbError(f"{path} holds a tensor of {tensor.dtype}; pass integers") from error
    return array


# --- safetensors ------------------------------------------------------------------------------------------------


def read_safetensors(path: Path, max_bytes: int) -> dict[str, NDArray[Any]]:
    """All tensors of a `.safetensors` file, by name.

    Args:
        path: path of the file.
        max_bytes: the most bytes that they may take as int64.

    Raises:
        DistplbError: if it is not such a file, its header does not match its content, or it is too large.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 2 <= length <= min(size - 8, _MOST_HEADER):
            raise DistplbError(f"{path} has no safetensors header or is cut off; write it again")
        try:
            header = parse_json(file.read(length))
            tensors = {name: one for name, one in header.items() if name != "__metadata__"}
            places = {name: _place(one) for name, one in tensors.items()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise DistplbError(f"{path} has an invalid safetensors header ({_line(error)}); write it again") from error
        total = sum(math.prod(shape) * max(8, dtype.itemsize) for _, dtype, shape, _, _ in places.values())
        if total > max_bytes:
            raise DistplbError(f"{path} would take more than {max_bytes} bytes; pass only the counts")
        return {name: _stored(path, name, 8 + length, size, place) for name, place in places.items()}


_Place = tuple[str, "np.dtype[Any]", tuple[int, ...], int, int]


def _place(tensor: Mapping[str, Any]) -> _Place:
    """A tensor's kind, dtype and shape, its first byte and the byte after its last."""
    kind, shape, (begin, end) = tensor["dtype"], tuple(tensor["shape"]), tensor["data_offsets"]
    if kind not in _KINDS:
        raise ValueError(f"dtype {str(kind)[:20]} cannot be counts")
    if not all(type(number) is int and number >= 0 for number in (*shape, begin, end)):
        raise ValueError("shapes and offsets must be non-negative integers")
    return kind, np.dtype(_KINDS[kind]), shape, begin, end


def _stored(path: Path, name: str, start: int, size: int, place: _Place) -> NDArray[Any]:
    kind, dtype, shape, begin, end = place
    if end - begin != math.prod(shape) * dtype.itemsize or start + end > size:
        raise DistplbError(
            f"{path}: the header puts tensor {name[:80]!r} of shape {list(shape)} at bytes {begin} to {end} of "
            f"{size - start}; it is damaged or cut off: write it again"
        )
    values: NDArray[Any] = np.fromfile(path, dtype, math.prod(shape), offset=start + begin).reshape(shape)
    if kind == "BF16":  # the upper half of a float32
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
