"""`read_loads`: loads from files of many kinds, which may come from anywhere.

Shapes: T steps, L layers, E experts.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distplb.errors import DistplbError
from distplb.traces.arrays import array_names, read_npy, read_npz
from distplb.traces.tables import Table, read_csv, read_json
from distplb.traces.trace import Trace

__all__ = ["Loads", "read_loads"]

_TRACE = {"about", "load"}  # arrays that tell a trace from another archive
_KINDS = ".npy, .npz, .csv, .json or a folder of trace parts"


@dataclass(frozen=True, eq=False)
class Loads:
    """What a file holds.

    Args:
        load: `[L, E]` or `[T, L, E]` int64, tokens of each expert.
        layers: the L names; "0", "1", ... where the file has none.
    """

    load: Tensor
    layers: tuple[str, ...]


def read_loads(path: str | os.PathLike[str], max_bytes: int = 2**32) -> Loads:
    """Read tokens per expert: a trace, or counts that somebody else has written.

    - a folder of trace parts, or a `.npz` that `Trace.save` wrote: `[T, L, E]`, with its layers' names;
    - another `.npz` of one array, or with one named "load", or a `.npy`: `[L, E]` or `[T, L, E]`;
    - `.csv`: rows are layers, columns experts; a header and a first column of names are recognised;
    - `.json`: nested lists of `[L, E]` or `[T, L, E]`, or an object with a list of counts for each layer's name.

    Args:
        path: of a file or a folder.
        max_bytes: refuse what would take more memory than this; nothing has been unpacked then.

    Raises:
        DistplbError: naming the file, what was found, and what to pass.
    """
    path = Path(path)
    if path.is_dir():
        return _of_trace(path, max_bytes)
    if not path.is_file():
        raise DistplbError(f"there is no file {path}; pass {_KINDS}")
    if not path.stat().st_size:
        raise DistplbError(f"{path} is empty; pass {_KINDS}, with tokens of each expert")
    suffix = path.suffix.lower()
    if suffix == ".npz" and set(array_names(path)) >= _TRACE:
        return _of_trace(path, max_bytes)
    if suffix in (".npy", ".npz"):
        table = Table((read_npy if suffix == ".npy" else read_npz)(path, max_bytes), None)
    elif suffix in (".csv", ".json"):
        table = (read_csv if suffix == ".csv" else read_json)(path)
    else:
        raise DistplbError(f"{path} ends in {path.suffix!r}; pass {_KINDS}")
    return _of_table(path, table)


def _of_trace(path: Path, max_bytes: int) -> Loads:
    trace = Trace.read(path, max_bytes)
    return Loads(trace.load, trace.layers)


def _of_table(path: Path, table: Table) -> Loads:
    load = torch.from_numpy(_whole(path, table.values))
    layers = table.layers or tuple(str(layer) for layer in range(load.shape[-2]))
    if len(set(layers)) != len(layers):
        twice = next(name for name in layers if layers.count(name) > 1)
        raise DistplbError(f"{path} has layer {twice[:80]!r} twice; give each layer a name of its own")
    return Loads(load, layers)


def _whole(path: Path, values: NDArray[Any]) -> NDArray[np.int64]:
    """The counts as int64, if they are counts."""
    if values.dtype.kind == "f":
        _refuse(path, values, ~np.isfinite(values), "finite: check the counter that made them")
        _refuse(path, values, values != np.rint(values), "whole: pass tokens, not shares of them")
    if values.dtype.kind != "i":  # floats, unsigned, and Python's own where JSON has more digits
        _refuse(path, values, values >= 2.0**63, "below 2^63: pass tokens of one window")
    _refuse(path, values, values < 0, "non-negative: check the counter that made them")
    return np.ascontiguousarray(values, dtype=np.int64)


def _refuse(path: Path, values: NDArray[Any], wrong: NDArray[Any], must_be: str) -> None:
    places = np.argwhere(wrong)
    if len(places):
        place = tuple(places[0].tolist())
        raise DistplbError(
            f"{path} has {values[place]} at {list(place)} ({len(places)} such); counts must be {must_be}"
        )
