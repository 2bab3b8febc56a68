"""Archives of arrays, in which traces are stored. Sizes are checked before unpacking, and no code is run."""

from __future__ import annotations

import math
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distplb.core.arguments import listed
from distplb.core.documents.arrays import read_header
from distplb.errors import DistplbError

__all__ = ["ArrayFile", "write_arrays"]

Array = NDArray[Any]


def write_arrays(path: Path, arrays: Mapping[str, Any]) -> None:
    """Write a compressed `.npz`; a reader sees either the old file or the new one, never a partial one."""
    draft = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with draft.open("wb") as file:
            np.savez_compressed(file, **dict(arrays))
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


class ArrayFile:
    """A `.npz` file; opening it reads only the headers.

    Args:
        path: path of the file.
        kinds: for the name of each array, the allowed kinds of its dtype (as in `numpy.dtype.kind`) and its number of
            dims. The file must hold these arrays and no others.

    Raises:
        DistplbError: naming the file, if it is not such an archive or is damaged.
    """

    def __init__(self, path: Path, kinds: Mapping[str, tuple[str, int]]) -> None:
        self.path, self.shapes, self._dtypes = path, dict[str, tuple[int, ...]](), dict[str, np.dtype[Any]]()
        try:
            with zipfile.ZipFile(path) as archive:
                sizes = {member.filename.removesuffix(".npy"): member.file_size for member in archive.infolist()}
                if set(sizes) != set(kinds) or len(archive.infolist()) != len(kinds):
                    raise self._error(f"holds {_few(sizes)} instead of {_few(kinds)}")
                for name, size in sizes.items():
                    self._read_header(archive, name, size, *kinds[name])
        except DistplbError:
            raise
        except Exception as damage:  # numpy, zipfile, zlib and struct raise a dozen types
            raise self._error(f"cannot be read ({damage or type(damage).__name__})") from damage

    def _read_header(self, archive: zipfile.ZipFile, name: str, size: int, kinds: str, dims: int) -> None:
        with archive.open(f"{name}.npy") as member:
            shape, dtype = read_header(member)
            start = member.tell()
        if dtype.hasobject or dtype.kind not in kinds or len(shape) != dims or min(shape, default=0) < 0:
            raise self._error(f"has array {name!r} with dtype {dtype} and shape {shape}")
        if start + math.prod(shape) * dtype.itemsize != size:
            raise self._error(f"has array {name!r} with shape {shape}, which does not fit its {size} bytes")
        self.shapes[name], self._dtypes[name] = shape, dtype

    @property
    def num_bytes(self) -> int:
        """Bytes that all arrays take in memory once they are int64."""
        return sum(math.prod(shape) * max(8, self._dtypes[name].itemsize) for name, shape in self.shapes.items())

    def read(self, name: str) -> Array:
        """Read and unpack one array."""
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open(f"{name}.npy") as member:
                array: Array = np.lib.format.read_array(member, allow_pickle=False)
                if member.read(1) or (array.shape, array.dtype) != (self.shapes[name], self._dtypes[name]):
                    raise self._error(f"changed while array {name!r} was read")
                return array
        except DistplbError:
            raise
        except Exception as damage:
            raise self._error(f"cannot be read ({damage or type(damage).__name__})") from damage

    def _error(self, what: str) -> DistplbError:
        return DistplbError(f"{self.path} {what}; pass a trace written by Trace.save or TraceWriter")


def _few(names: Mapping[str, object]) -> str:
    return f"arrays {listed(sorted(names))}" if names else "no arrays"
