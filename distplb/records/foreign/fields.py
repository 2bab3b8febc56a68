"""The field that holds the counts, in files of SGLang, vLLM and TensorRT-LLM and in any object or archive.

Formats, according to their sources in November 2026:

- SGLang, `_StatAccumulator.dump` in python/sglang/srt/eplb/expert_distribution.py: a `.pt` with "logical_count"
  `[steps, layers, experts]`, summed over all ranks. `_DetailAccumulator.dump`: "records" for each pass and rank.
- vLLM, `EplbState` in vllm/distributed/eplb/eplb_state.py: "expert_load_window" `[steps, layers, physical experts]`, a
  ring buffer of one rank's tokens.
- TensorRT-LLM, examples/ep_load_balancer/utils.py: `rank<number>.safetensors` with `[experts]` for each name
  "<iteration>_<layer>", to be summed over the ranks.

Shapes: T steps, L layers, E experts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distplb.core.arguments import listed
from distplb.errors import DistplbError
from distplb.records.foreign.columns import Line
from distplb.records.foreign.number_formats import number_array
from distplb.records.foreign.tables import Table, parse_table

__all__ = ["choose_array", "counts_of"]

_LAYOUT = "[layers][experts] or [steps][layers][experts]"
_COUNTS = (
    *("load", "loads", "logical_count", "expert_load", "expert_loads", "logical_expert_load", "load_history"),
    *("expert_count", "expert_counts", "tokens_per_expert", "counts"),
)
_SUMMED = "logical_count"  # over all ranks, although SGLang writes one rank's index next to it
# Fields that are not counts of experts over all ranks: what they are, and what to do.
_OTHERS = {
    "expert_load_window": "is a ring buffer of one rank's tokens on physical experts: sum over the ranks and replicas",
    "expert_load_pass": "has one rank's tokens on physical experts: sum over the ranks and replicas",
    "global_physical_count": "counts physical experts: sum over the replicas, by the map from physical to logical",
    "records": "holds single passes and ranks, as SGLang's mode per_pass writes them: record in mode stat",
    "physical_to_logical_map": "is a placement, which --current and Placement.load read",
    "last_physical_to_logical_map": "is a placement, which --current and Placement.load read",
    "initial_global_assignments": "is a placement, which --current and Placement.load read",
    "layer_list": "is a placement, which --current and Placement.load read",
    "expert_of_slot": "is a placement, which --current and Placement.load read",
}
_OF_ONE_RANK = ("rank", "rank_id", "ep_rank", "global_rank", "local_rank")
_ITERATION_AND_LAYER = re.compile(r"[0-9]+_[0-9]+")


def counts_of(path: Path, document: Any) -> Table:
    """The counts, with any number of dims, and the names of the layers if the file has them.

    Raises:
        DistplbError: naming the place, if something is not a count, or not certain to be one.
    """
    if isinstance(document, Mapping):
        key = _key_of_counts(path, list(document))
        if key is None:
            return _by_layer(path, document)
        if isinstance(document[key], Mapping):
            return _by_layer(path, document[key])
        return Table(_array(path, document[key], f"{path}: {key!r}"), None)
    if isinstance(document, list) and document and all(isinstance(one, Mapping) for one in document):
        return _records(path, document)
    return Table(_array(path, document, str(path)), None)


def choose_array(path: Path, names: Sequence[str]) -> str:
    """Choose, by name, the array of an archive that holds the counts.

    Raises:
        DistplbError: if several may hold them, or none does.
    """
    key = _key_of_counts(path, names)
    if key is None and len(names) != 1:
        raise DistplbError(
            f"{path} holds arrays {listed(names)}; pass a file with one array, or name the counts 'load'"
        )
    return names[0] if key is None else key


def _key_of_counts(path: Path, names: Sequence[str]) -> str | None:
    """The name of the counts; None if all names may be layers."""
    keys = ["load"] if "load" in names else [name for name in names if name in _COUNTS]
    if len(keys) > 1:
        raise DistplbError(f"{path} has several fields of counts, {listed(keys)}; keep one of them, or name it 'load'")
    if keys:
        rank = next((name for name in names if name.lower() in _OF_ONE_RANK), None)
        if rank is not None and keys[0] != _SUMMED:
            raise DistplbError(
                f"{path} has {rank!r} next to {keys[0]!r}, so it belongs to one rank; sum over all ranks"
            )
        return keys[0]
    for name, why in _OTHERS.items():
        if name in names:
            raise DistplbError(f"{path}: {name!r} {why}; pass {_LAYOUT} as 'load'")
    if names and all(_ITERATION_AND_LAYER.fullmatch(name) for name in names):
        raise DistplbError(
            f"{path} has names such as {names[0][:40]!r}, as in TensorRT-LLM's statistics of one rank; sum over the "
            "files of all ranks, and pass [iterations, layers, experts] as 'load'"
        )
    return None


def _by_layer(path: Path, document: Mapping[str, Any]) -> Table:
    """The counts of an object that has a list of E counts for each layer name."""
    for name, value in document.items():
        if isinstance(value, Mapping):
            raise DistplbError(
                f"{path}: {name[:40]!r} is an object, as pandas writes it, and may be a layer or an expert; pass a "
                "list of counts for each layer"
            )
        if not isinstance(value, list | np.ndarray):
            raise DistplbError(
                f"{path}: {name[:40]!r} is {json.dumps(value, default=str)[:40]} where a list of counts is expected; "
                "pass a list of counts for each layer, all of equal length, or name [steps][layers][experts] 'load' "
                f"(the file has {listed(list(document))})"
            )
    rows = [_array(path, value, f"{path}: {name[:40]!r}") for name, value in document.items()]
    for name, row in zip(document, rows, strict=True):
        if row.ndim != 1 or not row.size or row.shape != rows[0].shape:
            raise DistplbError(
                f"{path}: {name[:40]!r} has shape {list(row.shape)}; pass a list of counts for each layer, all of "
                "equal length, with no empty list, or name [steps][layers][experts] 'load' (the file has "
                f"{listed(list(document))})"
            )
    if not rows:
        raise DistplbError(f"{path} has no layers; pass a list of counts for each layer")
    return Table(np.stack(rows), tuple(document))


def _records(path: Path, objects: Sequence[Mapping[str, Any]]) -> Table:
    """The counts of a list of objects, one for each row, as pandas and spreadsheets write them."""
    names = list(objects[0])
    lines = [Line("the first object", names)]
    for nth, one in enumerate(objects):
        if set(one) != set(names):
            raise DistplbError(f"{path}, object {nth} has other names than the first; give all objects the same")
        for value in one.values():
            if isinstance(value, bool | list | Mapping) or value is None:
                raise DistplbError(f"{path}, object {nth}: {json.dumps(value, default=str)[:40]} is not a count")
        lines.append(Line(f"object {nth}", [str(one[name]) for name in names]))
    return parse_table(path, lines, headed=True)


def _array(path: Path, nested: Any, where: str) -> NDArray[Any]:
    """The array in an array or in nested lists of equal length."""
    if isinstance(nested, np.ndarray):
        return nested
    if isinstance(nested, list) and nested and all(isinstance(one, np.ndarray) for one in nested):
        if len({one.shape for one in nested}) > 1:
            raise DistplbError(f"{where} has arrays of different shapes; pass counts as {_LAYOUT}")
        return np.stack(nested)
    shape = _shape(nested)
    if 0 in shape:
        raise DistplbError(f"{where} has lists of shape {list(shape)}; pass {_LAYOUT}, with no empty dim")
    flat = list(_flat(where, nested, shape, ()))
    if any(isinstance(number, int) for number in flat):  # a common float dtype would lose digits of the integers
        flat = [int(number) if isinstance(number, float) and number.is_integer() else number for number in flat]
    return number_array(flat).reshape(shape)


def _shape(nested: Any) -> tuple[int, ...]:
    """The shape along the first element of each list; `_flat` checks the others."""
    shape = []
    while isinstance(nested, list):
        shape.append(len(nested))
        nested = nested[0] if nested else None
    return tuple(shape)


def _flat(where: str, nested: Any, shape: tuple[int, ...], place: tuple[int, ...]) -> Iterator[int | float]:
    """Yield all numbers; lists of another length than in `shape` are refused."""
    if not shape:
        if isinstance(nested, bool) or not isinstance(nested, int | float):
            raise DistplbError(f"{where}: {json.dumps(nested, default=str)[:40]} at {list(place)} is not a count")
        yield nested
        return
    if not isinstance(nested, list) or len(nested) != shape[0]:
        value = f"a list of {len(nested)}" if isinstance(nested, list) else json.dumps(nested, default=str)[:40]
        raise DistplbError(
            f"{where}: {value} at {list(place)} where a list of {shape[0]} is expected; pass counts as {_LAYOUT}"
        )
    for at, one in enumerate(nested):
        yield from _flat(where, one, shape[1:], (*place, at))
