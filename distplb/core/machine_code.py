"""Numba's machine code: one folder on each node, which the first process fills and all others load from.

A module of Numba functions must be imported through `compiled_module`, because Numba reads the place of its cache when
a function is decorated. The module and those that it imports from its package are named `cpu_*.py`, in one folder.
"""

from __future__ import annotations

import hashlib
import os
import stat
import tempfile
from contextlib import AbstractContextManager
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from distplb.errors import DistplbError

__all__ = ["compile_lock", "compiled_module", "is_there"]

_SOURCES = "cpu_*.py"


@cache
def is_there() -> bool:
    """Whether Numba is installed, without importing it."""
    return find_spec("numba") is not None


@cache
def compiled_module(name: str) -> ModuleType:
    """Import the module of that name; its functions keep their machine code in this node's folder."""
    import numba

    config: Any = numba.config  # its settings are created at run time
    cache_dir = config.CACHE_DIR
    config.CACHE_DIR = str(_folder(name))
    try:
        return import_module(name)
    finally:
        config.CACHE_DIR = cache_dir


def compile_lock(name: str) -> AbstractContextManager[object]:
    """A lock to hold while a module's functions are first called: one process compiles, the others wait."""
    from filelock import FileLock

    return FileLock(_folder(name) / "warm-up.lock")


def _folder(name: str) -> Path:
    """The folder of a module's code: in NUMBA_CACHE_DIR if set, else on this node's disk, as home may be on a network.

    Raises:
        DistplbError: if another user could write there, because the code in it is executed.
    """
    cache_dir = os.environ.get("NUMBA_CACHE_DIR")
    folder = Path(cache_dir) if cache_dir else Path(tempfile.gettempdir()) / f"distplb-{os.getuid()}"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.lstat()
    is_private = stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o022
    if not cache_dir and not is_private:
        raise DistplbError(
            f"{folder} is not a folder that only you can write to, so compiled code cannot be kept there; "
            "remove it, or set NUMBA_CACHE_DIR to a folder of your own"
        )
    # Numba checks only a function's own file for changes, not the files of the functions that it calls.
    spec = find_spec(name)
    assert spec is not None
    assert spec.origin is not None
    sources = b"".join(path.read_bytes() for path in sorted(Path(spec.origin).parent.glob(_SOURCES)))
    folder /= hashlib.sha256(sources).hexdigest()[:16]
    folder.mkdir(exist_ok=True)
    return folder
