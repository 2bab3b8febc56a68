"""The tokens per expert that Megatron-LM writes: one file of JSON lines for each rank.

A line, as `ActivationLogger.save_tpe` of megatron-core 0.18.0 to 0.19.2 writes it; with "mtp_idx" in "block" "mtp"::

    {"iter": 100, "block": "decoder", "layer": 3, "tpe": [[128, 64], [96, 80]]}

"tpe" has a row for each micro-batch, with the tokens of each expert on that rank.
Shapes: S steps, B micro-batches of an iteration, D EP groups, L layers, E experts, M GPUs, G experts on each.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distplb.errors import DistplbError

__all__ = ["MegatronCounts", "read_megatron"]

Counts = NDArray[np.int64]
Records = dict[tuple[int, str], Counts]  # of one rank: by iteration and layer, [B, G]

_MAX_LINE_BYTES = 1 << 24


@dataclass(frozen=True)
class MegatronCounts:
    """`load [S, L, E]` and `iteration [S]`, int64; the layers' names, and M."""

    load: Counts
    iteration: Counts
    layers: tuple[str, ...]
    num_gpus: int


def read_megatron(
    paths: Sequence[Path],
    num_gpus: int | None,
    expert_tensor_parallel: int,
    pipeline_parallel: int,
    max_bytes: int,
) -> MegatronCounts:
    """Read the files of all ranks; arguments as for `Trace.from_megatron`."""
    files = _files_by_rank(paths, max_bytes)
    copies, stages = expert_tensor_parallel, pipeline_parallel
    num_gpus = len(files) // max(1, copies * stages) if num_gpus is None else num_gpus
    if min(num_gpus, copies, stages) < 1 or len(files) % (num_gpus * copies * stages):
        raise DistplbError(
            f"{len(files)} ranks with {num_gpus} GPUs in an EP group, expert tensor parallel {copies}, {stages} "
            "pipeline stages; pass the sizes of the job, whose product divides the ranks, and all ranks' files"
        )
    # The order of ranks is expert tensor, expert, expert data, pipeline; the first varies fastest.
    grid = np.arange(len(files)).reshape(stages, -1, num_gpus, copies)  # [stages, D, M, copies]
    records = [_read(files[rank]) for rank in range(len(files))]
    for first, *others in grid.reshape(-1, copies).tolist():
        for other in others:
            _check_same(files[first], records[first], files[other], records[other])
    iterations = sorted({iteration for iteration, _ in records[0]})
    loads = [_stage_load(grid[stage, ..., 0].tolist(), files, records, iterations) for stage in range(stages)]
    layers = [
        name if stages == 1 else f"pp{stage}.{name}"
        for stage in range(stages)
        for name in _layers(records[grid[stage, 0, 0, 0]])
    ]
    return _stacked(loads, iterations, tuple(layers), num_gpus)


def _files_by_rank(paths: Sequence[Path], max_bytes: int) -> Mapping[int, Path]:
    files: dict[int, Path] = {}
    found = [sorted(path.glob("rank*.jsonl")) if path.is_dir() else [path] for path in paths]
    for path in (path for each in found for path in each):
        match = re.fullmatch(r"rank(\d{1,9})\.jsonl", path.name)
        if not match or int(match[1]) in files:
            raise DistplbError(
                f"{path} is not a file rank<number>.jsonl, or the second of its rank; pass each rank's once"
            )
        if not path.is_file():
            raise DistplbError(f"there is no file {path}")
        files[int(match[1])] = path
    missing = next(rank for rank in range(len(files) + 1) if rank not in files)
    if missing < len(files) or not files:
        raise DistplbError(f"there is no file of rank {missing} in {[str(path) for path in paths]}; pass all ranks'")
    size = sum(path.stat().st_size for path in files.values())
    if size > max_bytes:
        raise DistplbError(
            f"the files of {len(files)} ranks have {size} bytes, {max_bytes} are allowed; pass a larger max_bytes"
        )
    return files


def _read(path: Path) -> Records:
    records: Records = {}
    with path.open("rb") as file:
        number = 0
        while line := file.readline(_MAX_LINE_BYTES + 1):
            number += 1
            if len(line) > _MAX_LINE_BYTES:
                raise DistplbError(f"{path}, line {number} has more than {_MAX_LINE_BYTES} bytes")
            try:
                iteration, layer, counts = _parsed(line)
            except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
                raise DistplbError(
                    f"{path}, line {number} is not a line of tokens per expert ({error!r}); "
                    "cut off what is damaged, in the files of all ranks"
                ) from error
            records[iteration, layer] = counts
    if not records:
        raise DistplbError(f"{path} has no lines")
    return records


def _parsed(line: bytes) -> tuple[int, str, Counts]:
    """Iteration, layer and `[B, G]` of one line."""
    record: dict[str, Any] = json.loads(line)
    names = ["iter", "layer"] + ["mtp_idx"] * (record["block"] == "mtp")
    numbers = [record[name] for name in names]
    if not all(type(value) is int and 0 <= value < 1 << 62 for value in numbers):
        raise ValueError(f"{names} are {str(numbers)[:80]}")
    if record["block"] not in ("decoder", "mtp"):
        raise ValueError(f"block is {str(record['block'])[:80]!r}")
    counts = np.asarray(record["tpe"])
    if counts.ndim != 2 or counts.dtype != np.int64 or not counts.size or counts.min() < 0:
        raise ValueError(f"tpe has shape {list(counts.shape)} and dtype {counts.dtype}")
    if record["block"] == "decoder":
        return numbers[0], f"decoder.layers.{numbers[1]}", counts
    return numbers[0], f"mtp.layers.{numbers[2]}.mtp_model_layer.layers.{numbers[1]}", counts


def _layers(records: Records) -> list[str]:
    """The names of a rank's layers, numbers in their order, decoder before mtp."""
    return sorted({layer for _, layer in records}, key=_natural)


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (0, part) for part in name.split(".")]


def _check_same(path: Path, records: Records, other_path: Path, others: Records) -> None:
    if records.keys() != others.keys() or any(not np.array_equal(records[key], others[key]) for key in records):
        raise DistplbError(
            f"{path} and {other_path} have different counts, but are said to share their experts; "
            "pass expert_tensor_parallel as in the job"
        )


def _stage_load(
    ranks: list[list[int]], files: Mapping[int, Path], records: Sequence[Records], iterations: list[int]
) -> list[Counts]:
    """Of one stage, whose ranks are `[D, M]`: for each iteration `[B, D, L, E]`."""
    first = ranks[0][0]
    layers = _layers(records[first])
    wanted = {(iteration, layer) for iteration in iterations for layer in layers}
    experts = next(iter(records[first].values())).shape[1]
    for rank in (rank for group in ranks for rank in group):
        differ = sorted(wanted ^ records[rank].keys())
        if differ:
            raise DistplbError(
                f"{files[rank]} or {files[0]} lacks iteration {differ[0][0]} of {differ[0][1]}; "
                "cut the files to the iterations that all ranks have"
            )
        for (iteration, layer), counts in records[rank].items():
            shape = (records[first][iteration, layers[0]].shape[0], experts)
            if counts.shape != shape:
                raise DistplbError(
                    f"{files[rank]} has {counts.shape} micro-batches and experts in iteration {iteration} of {layer}, "
                    f"others have {shape}; pass the files of one job"
                )
    return [
        np.stack(
            [
                np.stack([np.concatenate([records[rank][at, layer] for rank in group], axis=1) for layer in layers], 1)
                for group in ranks
            ],
            axis=1,
        )
        for at in iterations
    ]


def _stacked(
    loads: list[list[Counts]], iterations: list[int], layers: tuple[str, ...], num_gpus: int
) -> MegatronCounts:
    """All stages' layers beside each other, all micro-batches and EP groups after each other."""
    steps = []
    for nth, iteration in enumerate(iterations):
        stages = [load[nth] for load in loads]  # [B, D, L, E] each
        if len({stage.shape[:2] + stage.shape[3:] for stage in stages}) != 1:
            raise DistplbError(
                f"the pipeline stages have {[len(stage) for stage in stages]} micro-batches of "
                f"{[stage.shape[3] for stage in stages]} experts in iteration {iteration}; "
                "pass pipeline_parallel as in the job"
            )
        together = np.concatenate(stages, axis=2)
        steps.append(together.reshape(-1, *together.shape[2:]))
    iteration_of_step = np.repeat(np.array(iterations), [len(step) for step in steps])
    return MegatronCounts(np.concatenate(steps), iteration_of_step, layers, num_gpus)
