"""`read_loads` and `read_trace`: read files of counts, distplb's own and those of other programs (`foreign`).

Shapes: T steps, L layers, E experts, M GPUs.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from distplb.core.documents.arrays import array_names
from distplb.core.documents.read import SUFFIXES, check_is_file, read_document, reading
from distplb.core.placement import Placement
from distplb.errors import DistplbError
from distplb.records.foreign.fields import choose_array, counts_of
from distplb.records.foreign.tables import Table, read_table
from distplb.records.foreign.validation import validated
from distplb.records.trace import Trace

__all__ = ["Loads", "is_trace", "read_loads", "read_trace"]

_TRACE = {"about", "load"}  # arrays that distinguish a trace from other archives
_TABLES = (".csv", ".tsv", ".txt")
_KINDS = ".npy, .npz, .csv, .tsv, .txt, .json, .yaml, .pt, .safetensors or a folder of trace parts"


@dataclass(frozen=True, eq=False)
class Loads:
    """The counts in a file.

    Args:
        load: `[L, E]` or `[T, L, E]` int64, tokens of each expert.
        layers: names of the L layers; "0", "1", ... if the file has none.
    """

    load: Tensor
    layers: tuple[str, ...]


def read_loads(path: str | os.PathLike[str], max_bytes: int = 2**32) -> Loads:
    """Read tokens per expert from a trace or from a file of another program.

    - a folder of trace parts, or a `.npz` that `Trace.save` wrote: `[T, L, E]`, with the names of the layers;
    - `.npy`, or another `.npz` with a single array or with one array under a known name: `[L, E]` or `[T, L, E]`;
    - `.csv`, `.tsv`, `.txt`: rows are layers and columns experts; or columns "layer", "expert" and "count". A header,
      layer names, a column "step" and totals, which must be right, are recognised;
    - `.json`, `.yaml` (if PyYAML is installed): nested lists, an object that maps each layer name to a list of counts,
      an object with counts under a known name ("load", SGLang's "logical_count"), or a list of objects, one for each
      row;
    - `.pt`, `.pth` with nothing but tensors, `.safetensors`: like objects in JSON.

    Args:
        path: path of a file or a folder.
        max_bytes: refuse a file that would take more memory than this, before anything is unpacked.

    Raises:
        DistplbError: naming the file, what was found and what to pass; also if the counts are ambiguous.
    """
    path = Path(path)
    if is_trace(path):
        trace = Trace.read(path, max_bytes)
        return Loads(trace.load, trace.layers)
    load, layers = validated(path, _table(path, max_bytes))
    return Loads(torch.from_numpy(load), layers)


def read_trace(path: str | os.PathLike[str], num_gpus: int | None = None, max_bytes: int = 2**32) -> Trace:
    """Read a trace, or counts as `read_loads` does: then step t is iteration t, and experts are placed contiguously.

    Args:
        path: path of a file or a folder.
        num_gpus: M, which files of counts do not contain; ignored for a trace.
        max_bytes: as in `read_loads`.

    Raises:
        DistplbError: as in `read_loads`; also for counts without `num_gpus`, counts of a single step, or experts that
            cannot be spread evenly over the GPUs.
    """
    path = Path(path)
    if is_trace(path):
        return Trace.read(path, max_bytes)
    loads = read_loads(path, max_bytes)
    if loads.load.dim() == 2:
        raise DistplbError(f"{path} has counts of a single step, [layers, experts]; pass [steps, layers, experts]")
    if num_gpus is None:
        raise DistplbError(f"{path} has counts but no placement; also pass --gpus-per-node and, if needed, --nodes")
    steps, layers, experts = loads.load.shape
    if experts % num_gpus:
        raise DistplbError(
            f"{path}: {experts} expert{'' if experts == 1 else 's'} cannot be spread evenly over {num_gpus} GPUs; pass "
            "another number of GPUs"
        )
    start = Placement.contiguous(layers, experts, num_gpus)
    index = torch.zeros(steps, dtype=torch.int64, device="cpu")
    return Trace(loads.load, (start,), index, torch.arange(steps, device="cpu"), loads.layers, f"from {path}")


def is_trace(path: Path) -> bool:
    """Whether a path is a folder or a file with the arrays of a trace.

    Raises:
        DistplbError: if the file does not exist, is empty, or is a `.npz` that cannot be read.
    """
    if path.is_dir():
        return True
    check_is_file(path, _KINDS)
    return path.suffix.lower() == ".npz" and set(array_names(path)) >= _TRACE


def _table(path: Path, max_bytes: int) -> Table:
    suffix = path.suffix.lower()
    if suffix in _TABLES:
        with reading(path):
            return read_table(path, max_bytes)
    if suffix not in SUFFIXES:
        raise DistplbError(f"{path} ends in {path.suffix[:20]!r}; pass {_KINDS}")
    document = read_document(path, lambda names: choose_array(path, names), max_bytes)
    if suffix == ".npz":  # a single array, whatever its name; with one dim it is one layer
        (array,) = document.values()
        return Table(array, None) if array.ndim != 1 else counts_of(path, document)
    return counts_of(path, document)
