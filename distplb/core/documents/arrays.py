"""Arrays from an untrusted `.npy` or `.npz` file: sizes are checked first, and no code is run.

`Trace` reads archives that are a trace.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from distplb.errors import DistplbError

__all__ = ["array_names", "read_header", "read_npy", "read_npz"]

_PICKLE = "is refused because reading a pickle can run code"
_SUFFIX = ".npy"


def read_npy(path: Path, max_bytes: int) -> NDArray[Any]:
    """The numbers of a `.npy` file.

    Args:
        path: path of the file.
        max_bytes: the most bytes that they may take as int64.

    Raises:
        DistplbError: naming the file, if it is not a `.npy` file, or is damaged, a pickle or too large.
    """
    with path.open("rb") as file:
        if file.read(1) == b"\x80":  # the first byte of a pickle
            raise DistplbError(f"{path} is a pickle, which {_PICKLE}; pass an array written by numpy.save")
        file.seek(0)
        return _array(file, path.stat().st_size, str(path), max_bytes)


def read_npz(path: Path, choose: Callable[[Sequence[str]], str], max_bytes: int) -> dict[str, NDArray[Any]]:
    """One array of a `.npz` file, by its name.

    Args:
        path: path of the file.
        choose: picks one of the array names.
        max_bytes: as in `read_npy`.

    Raises:
        DistplbError: as in `read_npy`.
    """
    name = choose(array_names(path))
    try:
        with zipfile.ZipFile(path) as archive, archive.open(name + _SUFFIX) as member:
            size = archive.getinfo(name + _SUFFIX).file_size
            return {name: _array(member, size, f"{path}: array {name[:80]!r}", max_bytes)}
    except DistplbError:
        raise
    except Exception as damage:  # zipfile and zlib raise a dozen types
        raise _unreadable(str(path), damage) from damage


def array_names(path: Path) -> list[str]:
    """The names of all arrays in a `.npz` file, at least one.

    Raises:
        DistplbError: naming the file, if it is not such an archive, is empty or holds anything but arrays.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.namelist()
    except Exception as damage:
        raise _unreadable(str(path), damage) from damage
    others = [name for name in members if not name.endswith(_SUFFIX)]
    if any(name.endswith(".pkl") for name in others):
        raise DistplbError(
            f"{path} holds a pickle, which {_PICKLE}; pass arrays written by numpy.savez, or rename it to .pt if "
            "torch.save wrote it"
        )
    if others or not members:
        content = repr(others[0][:40]) if others else "nothing"
        raise DistplbError(f"{path} holds {content} where arrays are expected; pass a file written by numpy.savez")
    names = [name.removesuffix(_SUFFIX) for name in members]
    if len(set(names)) != len(names):
        raise DistplbError(f"{path} has two arrays of one name; write it again with numpy.savez")
    return names


def _array(file: IO[bytes], size: int, where: str, max_bytes: int) -> NDArray[Any]:
    """The array of a `.npy` stream of `size` bytes; its header must match the size before memory is allocated."""
    try:
        shape, dtype = read_header(file)
        start = file.tell()
        if dtype.hasobject:
            raise DistplbError(f"{where} holds Python objects as a pickle, which {_PICKLE}; pass integers")
        if dtype.kind not in "biuf":
            raise DistplbError(f"{where} has dtype {str(dtype)[:40]} and shape {shape}; pass integers")
        needed = start + math.prod(shape) * dtype.itemsize
        if min(shape, default=0) < 0 or needed != size:
            raise DistplbError(
                f"{where} has {size} bytes where shape {shape} of {dtype} takes {needed}; it is damaged or cut off: "
                "write it again"
            )
        if math.prod(shape) * max(8, dtype.itemsize) > max_bytes:
            raise DistplbError(f"{where} of shape {shape} would take more than {max_bytes} bytes; pass fewer steps")
        file.seek(0)
        values: NDArray[Any] = np.lib.format.read_array(file, allow_pickle=False)
        return values
    except DistplbError:
        raise
    except Exception as damage:  # numpy, tokenize and zlib raise a dozen types
        raise _unreadable(where, damage) from damage


def read_header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """The shape and dtype of a `.npy` stream in NumPy's format 1.0, whose headers take 64 KiB at most.

    Raises:
        ValueError: for another format, such as that of arrays with fields, or a damaged header.
    """
    version = np.lib.format.read_magic(file)
    if version != (1, 0):
        raise ValueError(f"NumPy's format {version[0]}.{version[1]} is not used for numbers")
    shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    return shape, dtype


def _unreadable(where: str, damage: Exception) -> DistplbError:
    if isinstance(damage, OSError) and damage.strerror:
        return DistplbError(f"{where} cannot be read ({damage.strerror})")
    why = " ".join(str(damage).split()) or type(damage).__name__
    return DistplbError(f"{where} cannot be read ({why[:200]}); it is damaged or cut off: write it again")
