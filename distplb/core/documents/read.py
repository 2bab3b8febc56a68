"""`read_document`: the content of a file of any supported format."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from distplb.core.documents.arrays import read_npy, read_npz
from distplb.core.documents.tensors import read_pt, read_safetensors
from distplb.core.documents.text import read_json, read_yaml
from distplb.errors import DistplbError

__all__ = ["SUFFIXES", "check_is_file", "read_document", "reading"]

_READERS: dict[str, Callable[[Path, int], Any]] = {
    ".json": read_json,
    ".npy": read_npy,
    ".pt": read_pt,
    ".pth": read_pt,
    ".safetensors": read_safetensors,
    ".yaml": read_yaml,
    ".yml": read_yaml,
}
SUFFIXES = (*_READERS, ".npz")


def read_document(
    path: Path, choose: Callable[[Sequence[str]], str], max_bytes: int, otherwise: str | None = None
) -> Any:
    """The content as nested lists, objects, arrays, numbers and text; the suffix decides the format.

    Args:
        path: path of a file with one of `SUFFIXES`, in lower or upper case.
        choose: picks an array of a `.npz` by name.
        otherwise: the suffix to assume for any other.
        max_bytes: refuse a file that would take more memory than this, before anything is unpacked.

    Raises:
        DistplbError: if the file cannot be read; one line that begins with its path.
    """
    suffix = path.suffix.lower()
    suffix = otherwise if otherwise and suffix not in SUFFIXES else suffix
    with reading(path):
        return read_npz(path, choose, max_bytes) if suffix == ".npz" else _READERS[suffix](path, max_bytes)


def check_is_file(path: Path, expected: str) -> None:
    """Refuse a missing or empty file; `expected` says what to pass."""
    with reading(path):
        if not path.is_file():
            raise DistplbError(f"there is no file {path}; pass {expected}")
        if not path.stat().st_size:
            raise DistplbError(f"{path} is empty; pass {expected}")


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn errors of the operating system into errors that name the file."""
    try:
        yield
    except OSError as error:
        raise DistplbError(f"{path} cannot be read ({error.strerror or type(error).__name__})") from error
