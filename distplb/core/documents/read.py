"""`read_document`: the content of a file, whatever its kind."""

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
    """The content as nested lists, objects, arrays, numbers and texts; the suffix says how to read it.

    Args:
        path: of a file with one of `SUFFIXES`, in small or large letters.
        choose: of a `.npz`, the one array that is meant.
        otherwise: the suffix that others are read as.
        max_bytes: refuse what would take more memory than this; nothing has been unpacked then.

    Raises:
        DistplbError: in one line that begins with the file, if it cannot be read.
    """
    suffix = path.suffix.lower()
    suffix = otherwise if otherwise and suffix not in SUFFIXES else suffix
    with reading(path):
        return read_npz(path, choose, max_bytes) if suffix == ".npz" else _READERS[suffix](path, max_bytes)


def check_is_file(path: Path, expected: str) -> None:
    """Refuse what is no file, or an empty one; `expected` says what to pass."""
    with reading(path):
        if not path.is_file():
            raise DistplbError(f"there is no file {path}; pass {expected}")
        if not path.stat().st_size:
            raise DistplbError(f"{path} is empty; pass {expected}")


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Errors of the operating system inside become ones that name the file."""
    try:
        yield
    except OSError as error:
        raise DistplbError(f"{path} cannot be read ({error.strerror or type(error).__name__})") from error
