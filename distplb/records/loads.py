"""`read_loads` and `read_trace`: the door for files of counts, which may come from anywhere.

Shapes: T steps, L layers, E experts, M GPUs.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distplb.core.documents.arrays import array_names
from distplb.core.documents.read import SUFFIXES, check_is_file, read_document
from distplb.core.placement import Placement
from distplb.errors import DistplbError
from distplb.records.dumps import counts_of, key_of_counts
from distplb.records.tables import Table, read_table, role_of
from distplb.records.trace import Trace

__all__ = ["Loads", "is_trace", "read_loads", "read_trace"]

_TRACE = {"about", "load"}  # arrays that tell a trace from another archive
_TABLES = (".csv", ".tsv", ".txt")
_KINDS = ".npy, .npz, .csv, .tsv, .txt, .json, .yaml, .pt, .safetensors or a folder of trace parts"
_LAYOUT = "[layers, experts] or [steps, layers, experts]"
_STATISTICS = {"mean", "average", "avg", "median", "max", "min", "std"}  # names of rows beside the layers
_NUMBERED = re.compile(r"([a-z]+)[ _.-]?[0-9]+", re.IGNORECASE)


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
    - `.npy`, or another `.npz` of one array, or with one that is named as counts are: `[L, E]` or `[T, L, E]`;
    - `.csv`, `.tsv`, `.txt`: rows are layers, columns experts; or columns "layer", "expert" and "count". A header,
      names of layers, a column "step", and a total, which must be right, are recognised;
    - `.json`, `.yaml` (where PyYAML is installed): nested lists, an object with a list of counts for each layer's name,
      an object with one of the names of counts ("load", SGLang's "logical_count"), or a list of objects that are rows;
    - `.pt`, `.pth` of tensors alone, `.safetensors`: as objects of JSON.

    Args:
        path: of a file or a folder.
        max_bytes: refuse what would take more memory than this; nothing has been unpacked then.

    Raises:
        DistplbError: naming the file, what was found, and what to pass; also for what may be read in two ways.
    """
    path = Path(path)
    if is_trace(path):
        trace = Trace.read(path, max_bytes)
        return Loads(trace.load, trace.layers)
    return _of_table(path, _table(path, max_bytes))


def read_trace(path: str | os.PathLike[str], num_gpus: int | None = None, max_bytes: int = 2**32) -> Trace:
    """Read a trace; or counts as `read_loads` does, of which each step is an iteration, from 0, of contiguous experts.

    Args:
        path: of a file or a folder.
        num_gpus: M, which counts do not tell; of no account for a trace.
        max_bytes: as in `read_loads`.

    Raises:
        DistplbError: as `read_loads`; or for counts without `num_gpus`, of one step alone, or of experts that do not go
            evenly on the GPUs.
    """
    path = Path(path)
    if is_trace(path):
        return Trace.read(path, max_bytes)
    found = read_loads(path, max_bytes)
    if found.load.dim() == 2:
        raise DistplbError(f"{path} has one step alone, [layers, experts]; pass [steps, layers, experts] here")
    if num_gpus is None:
        raise DistplbError(f"{path} has counts, and no placement; pass --gpus-per-node, and --nodes, as well")
    steps, layers, experts = found.load.shape
    if experts % num_gpus:
        raise DistplbError(f"{path} has {experts} experts, which do not go evenly on {num_gpus} GPUs; pass other GPUs")
    begun = Placement.contiguous(layers, experts, num_gpus)
    index = torch.zeros(steps, dtype=torch.int64, device="cpu")
    return Trace(found.load, (begun,), index, torch.arange(steps, device="cpu"), found.layers, f"from {path}")


def is_trace(path: Path) -> bool:
    """Whether a path is a folder, or a file that has what a trace has.

    Raises:
        DistplbError: if there is no such file, it is empty, or is a `.npz` that cannot be read.
    """
    if path.is_dir():
        return True
    check_is_file(path, _KINDS)
    return path.suffix.lower() == ".npz" and set(array_names(path)) >= _TRACE


def _table(path: Path, max_bytes: int) -> Table:
    suffix = path.suffix.lower()
    if suffix in _TABLES:
        try:
            return read_table(path, max_bytes)
        except OSError as error:
            raise DistplbError(f"{path} cannot be read ({error.strerror or type(error).__name__})") from error
    if suffix not in SUFFIXES:
        raise DistplbError(f"{path} ends in {path.suffix[:20]!r}; pass {_KINDS}")
    document = read_document(path, lambda names: _chosen(path, names), max_bytes)
    if suffix == ".npz":  # of one array, whatever its name; one of a single dim is a layer
        (array,) = document.values()
        return Table(array, None) if array.ndim != 1 else counts_of(path, document)
    return counts_of(path, document)


def _chosen(path: Path, names: Sequence[str]) -> str:
    """Of the arrays of an archive."""
    key = key_of_counts(path, names)
    if key is None and len(names) != 1:
        shown = ", ".join(repr(one[:40]) for one in names[:8])
        raise DistplbError(f"{path} holds arrays {shown}; pass a file of one array, or name it 'load'")
    return names[0] if key is None else key


def _of_table(path: Path, table: Table) -> Loads:
    values, layers = table
    _check_shape(path, values)
    load = _int64(path, values)
    if layers is not None:
        load, layers = _without_total(path, load, layers)
        _check_names(path, layers)
    return Loads(torch.from_numpy(load), layers or tuple(str(layer) for layer in range(load.shape[-2])))


def _check_shape(path: Path, values: NDArray[Any]) -> None:
    shape = tuple(values.shape)
    if values.ndim == 4:
        raise DistplbError(
            f"{path} has shape {shape}, 4 dims; sum over the ranks, or whatever is beside steps, layers and experts, "
            f"and pass counts, {_LAYOUT}"
        )
    if values.ndim not in (2, 3) or 0 in shape or values.dtype.kind not in "biufO":
        raise DistplbError(f"{path} has dtype {values.dtype} and shape {shape}; pass counts, {_LAYOUT}, none empty")


def _without_total(
    path: Path, load: NDArray[np.int64], layers: tuple[str, ...]
) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """Without a row that is the sum of the others."""
    found = [at for at, name in enumerate(layers) if role_of(name) == "total"]
    if not found or len(layers) < 2:
        return load, layers
    others = [at for at in range(len(layers)) if at != found[0]]
    if not np.array_equal(load[..., others, :].sum(-2), load[..., found[0], :]):
        raise DistplbError(
            f"{path}: {layers[found[0]][:40]!r} is not the sum of the other rows; correct it, leave it out, or give "
            "the layer another name"
        )
    return np.ascontiguousarray(load[..., others, :]), tuple(layers[at] for at in others)


def _check_names(path: Path, layers: tuple[str, ...]) -> None:
    if len(set(layers)) != len(layers):
        twice = next(name for name in layers if layers.count(name) > 1)
        raise DistplbError(f"{path} has layer {twice[:80]!r} twice; give each layer a name of its own")
    other = next((name for name in layers if role_of(name) not in (None, "total")), None)
    if other is not None:
        raise DistplbError(
            f"{path}: {other[:40]!r} is what a column is named, and stands where a layer's name is expected; pass a "
            "list of counts for each layer, or rows with names of columns above them"
        )
    made = next((name for name in layers if name.strip().lower() in _STATISTICS), None)
    if made is not None and len(layers) > 1:
        raise DistplbError(
            f"{path}: {made[:40]!r} is no layer but made of the others; leave it out, or give the layer another name"
        )
    kinds = {match and role_of(match[1]) for match in (_NUMBERED.fullmatch(name) for name in layers)}
    if len(kinds) == 1 and kinds <= {"expert", "rank", "step"}:
        (kind,) = kinds
        raise DistplbError(
            f"{path}: {layers[0][:40]!r} names {'an expert' if kind == 'expert' else f'a {kind}'} where a layer is "
            "expected; pass a row for each layer and a column for each expert, of all ranks together"
        )
    if not all(layers):
        raise DistplbError(f"{path} has a layer without a name; give each layer a name of its own")


def _int64(path: Path, values: NDArray[Any]) -> NDArray[np.int64]:
    """The counts as int64, if they are counts that their dtype holds exactly."""
    if values.dtype.kind == "O":  # Python's own, of more digits
        floats = np.frompyfunc(lambda number: isinstance(number, float) and not number.is_integer(), 1, 1)(values)
        _refuse(path, values, floats.astype(bool), "whole: pass tokens, not shares of them")
    if values.dtype.kind == "f":
        _refuse(path, values, ~np.isfinite(values), "finite: check the counter that made them")
        _refuse(path, values, values != np.rint(values), "whole: pass tokens, not shares of them")
        most = 2 ** min(62, np.finfo(values.dtype).nmant + 1)
        _refuse(
            path, values, np.abs(values) > most, f"at most {most} in {values.dtype}, which rounds others: use int64"
        )
    _refuse(path, values, values < 0, "non-negative: check the counter that made them")
    if values.dtype.kind in "uO":
        _refuse(path, values, values > np.iinfo(np.int64).max, "below 2^63: pass tokens of one window")
    return np.ascontiguousarray(values, dtype=np.int64)


def _refuse(path: Path, values: NDArray[Any], wrong: NDArray[Any], must_be: str) -> None:
    places = np.argwhere(wrong)
    if len(places):
        place = tuple(places[0].tolist())
        found = str(values[place].tolist() if isinstance(values[place], np.generic) else values[place])[:40]
        raise DistplbError(f"{path} has {found} at {list(place)} ({len(places)} such); counts must be {must_be}")
