"""Combines the tokens per expert that the ranks of Megatron-LM write into the load of all experts.

Shapes: S steps, B micro-batches of an iteration, D EP groups, L layers, E experts, M GPUs, G experts on each.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from distplb.errors import DistplbError
from distplb.records.foreign.megatron_lines import CountArray, RankCounts, read_ranks

__all__ = ["MegatronCounts", "read_megatron"]

Rows = NDArray[np.intp]  # indices of micro-batches

_STACKLEVEL = 4  # of warnings: the caller of Trace.from_megatron
_MOST_NAMED = 3


@dataclass(frozen=True)
class MegatronCounts:
    """`load [S, L, E]` and `iteration [S]`, int64; the names of the layers, and M."""

    load: CountArray
    iteration: CountArray
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
    ranks, broken = read_ranks(paths, max_bytes)
    copies, stages = expert_tensor_parallel, pipeline_parallel
    num_gpus = len(ranks) // max(1, copies * stages) if num_gpus is None else num_gpus
    if min(num_gpus, copies, stages) < 1 or len(ranks) % (num_gpus * copies * stages):
        raise DistplbError(
            f"the number of ranks, {len(ranks)}, is not a multiple of EP size × expert tensor parallel × pipeline "
            f"stages, {num_gpus} × {copies} × {stages}; pass the sizes of the job and the files of all ranks"
        )
    # The order of ranks is expert tensor, expert, expert data, pipeline; the first varies fastest.
    grid = np.arange(len(ranks)).reshape(stages, -1, num_gpus, copies)  # [stages, D, M, copies]
    by_stage = [[ranks[number] for number in stage.flatten().tolist()] for stage in grid]
    layers = [_layers(of_stage) for of_stage in by_stage]
    iterations = _complete_iterations(by_stage, layers, broken)
    for first, *others in grid.reshape(-1, copies).tolist():
        for other in others:
            _check_same(ranks[first], ranks[other], iterations)
    stacks = [_Stage(of_stage, names, iterations) for of_stage, names in zip(by_stage, layers, strict=True)]
    _use_recomputed_once(stacks, iterations)
    loads = [stack.loads(grid[0].shape) for stack in stacks]
    names = [name if stages == 1 else f"pp{stage}.{name}" for stage, of_stage in enumerate(layers) for name in of_stage]
    return _stacked(loads, iterations, tuple(names), num_gpus)


def _layers(ranks: Iterable[RankCounts]) -> list[str]:
    """The names of a stage's layers, in numeric order, decoder before mtp."""
    return sorted({name for rank in ranks for one in rank.iterations.values() for name in one}, key=_natural)


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (0, part) for part in name.split(".")]


def _check_same(one: RankCounts, other: RankCounts, iterations: Sequence[int]) -> None:
    for at in iterations:
        if any(not np.array_equal(counts, other.iterations[at][name]) for name, counts in one.iterations[at].items()):
            raise DistplbError(
                f"{one.name} and {other.name} have different counts in iteration {at}, although expert_tensor_parallel "
                "says that they share experts; pass the job's value"
            )


# --- complete iterations ----------------------------------------------------------------------------------------


def _complete_iterations(by_stage: list[list[RankCounts]], layers: list[list[str]], broken: list[str]) -> list[int]:
    """The iterations that all ranks have with all layers, from the same run of the job; a warning names the others."""
    ranks = [(rank, names) for of_stage, names in zip(by_stage, layers, strict=True) for rank in of_stage]
    left_out = dict[int, str]()
    iterations_of_any = sorted({at for rank, _ in ranks for at in rank.iterations})
    for at in iterations_of_any:
        for rank, names in ranks:
            lacks = next((name for name in names if name not in rank.iterations.get(at, {})), None)
            if lacks is not None:
                left_out[at] = f"{rank.name} lacks iteration {at} of {lacks}"
                break
    whole = [at for at in iterations_of_any if at not in left_out]
    if not whole:
        raise DistplbError(
            f"{left_out[iterations_of_any[0]]}, and no iteration is complete on all ranks; pass the files of one job "
            "and its pipeline_parallel"
        )
    # A rank that died before its first line in a run has no sign of that run in its file.
    rewinds_differ, is_end = any(one.rewinds != ranks[0][0].rewinds for one, _ in ranks), True
    for at in reversed(whole):
        first = ranks[0][0]
        other = next((one for one, _ in ranks if (at in one.stale) != (at in first.stale)), None)
        if other is None and rewinds_differ and (is_end or at in first.stale):
            other = next((one for one, _ in ranks if one.versions(at) != first.versions(at)), None)
        if other is not None:
            left_out[at] = f"{other.name} or {first.name} has iteration {at} from an earlier run of the job"
        elif at not in first.stale:
            is_end = False  # all ranks reached this iteration in the last run
    iterations = [at for at in whole if at not in left_out]
    if not iterations:
        raise DistplbError(f"{left_out[whole[0]]}, and so for all others; pass the files of one run of the job")
    _warn_of(left_out, broken, len(iterations_of_any))
    return iterations


def _warn_of(left_out: Mapping[int, str], broken: Sequence[str], number: int) -> None:
    parts = [_few(broken)] if broken else []
    if left_out:
        whys = [left_out[at] for at in sorted(left_out)]
        parts.append(f"left out {len(left_out)} of {number} iterations: {_few(whys)}")
    if parts:
        warnings.warn("; ".join(parts), RuntimeWarning, stacklevel=_STACKLEVEL + 1)


def _few(texts: Sequence[str]) -> str:
    more = f" and {len(texts) - _MOST_NAMED} more" if len(texts) > _MOST_NAMED else ""
    return ", ".join(texts[:_MOST_NAMED]) + more


# --- activation recomputation -----------------------------------------------------------------------------------


class _Stage:
    """The counts of a pipeline stage: `[B, ranks, G]` for each iteration and layer."""

    def __init__(self, ranks: Sequence[RankCounts], layers: Sequence[str], iterations: Sequence[int]) -> None:
        self.layers = layers
        shape = ranks[0].iterations[iterations[0]][layers[0]].shape
        self.counts: dict[int, list[CountArray]] = {}
        for at in iterations:
            self.counts[at] = []
            for name in layers:
                rows = len(ranks[0].iterations[at][name])
                for rank in ranks:
                    counts = rank.iterations[at][name]
                    if counts.shape != (rows, shape[1]):
                        raise DistplbError(
                            f"{rank.name} has counts [micro-batches, experts] of shape {list(counts.shape)} in "
                            f"iteration {at} of {name}, other ranks have {[rows, shape[1]]}; pass the files of one job"
                        )
                self.counts[at].append(np.stack([rank.iterations[at][name] for rank in ranks], axis=1))
        self.first = ranks[0]

    def rows(self, at: int) -> CountArray:
        """`[B, numbers]`: all counts of each micro-batch of an iteration."""
        return np.concatenate([counts.reshape(len(counts), -1) for counts in self.counts[at]], axis=1)

    def keep(self, at: int, rows: Rows) -> None:
        """Keep only these micro-batches of an iteration."""
        self.counts[at] = [counts[rows] for counts in self.counts[at]]

    def loads(self, shape: tuple[int, ...]) -> list[CountArray]:
        """The load of each iteration, `[B, D, L, E]`; `shape` arranges the ranks as `[D, M, copies]`."""
        loads = []
        for at, of_layers in self.counts.items():
            rows = len(of_layers[0])
            for name, counts in zip(self.layers, of_layers, strict=True):
                if len(counts) != rows:
                    raise DistplbError(
                        f"{self.first.name} has different numbers of micro-batches in iteration {at}: {len(counts)} of "
                        f"{name}, {rows} of {self.layers[0]}; pass the files of one job"
                    )
            # All copies of a GPU have the same experts.
            load = np.stack([counts.reshape(rows, *shape, -1)[:, :, :, 0] for counts in of_layers], axis=2)
            loads.append(load.reshape(*load.shape[:3], -1))
        return loads


def _use_recomputed_once(stages: Sequence[_Stage], iterations: Sequence[int]) -> None:
    """Use each micro-batch once if the job recomputes activations: its layers count forward, and again before backward.

    The pipeline schedule determines how the two interleave, but equally for all layers and ranks of a stage. So a
    micro-batch is identified by all counts of these layers and ranks, and each must occur twice, in all iterations with
    the same number of rows. Rows that are all equal, as from a router that is forced to be even, prove nothing.
    """
    halved = set[int]()
    for stage in stages:
        halved |= {at for at in iterations if _halve_some_layers(stage.counts[at])}
    doubled: dict[int, list[Rows]] = {}
    for size in {len(stages[0].counts[at][0]) for at in iterations}:
        of_size = [at for at in iterations if len(stages[0].counts[at][0]) == size and at not in halved]
        kept_rows = {at: rows for at in of_size if (rows := _twins(stages, at)) is not None}
        if len(kept_rows) == len(of_size):
            doubled |= kept_rows
    if doubled and _rows_differ(stages, doubled):
        for at, rows in doubled.items():
            for stage, of_stage in zip(stages, rows, strict=True):
                stage.keep(at, of_stage)
        halved |= doubled.keys()
    if halved:
        warnings.warn(
            f"{stages[0].first.name}: iterations in which each micro-batch is counted twice, as with activation "
            f"recomputation: {len(halved)} of {len(iterations)}; each micro-batch is used once",
            RuntimeWarning,
            stacklevel=_STACKLEVEL,
        )


def _halve_some_layers(of_layers: list[CountArray]) -> bool:
    """Halve layers with twice as many rows as the others if each row has a duplicate; returns whether it did."""
    sizes = sorted({len(counts) for counts in of_layers})
    if len(sizes) != 2 or sizes[1] != 2 * sizes[0]:
        return False
    some = [nth for nth, counts in enumerate(of_layers) if len(counts) == sizes[1]]
    rows = _first_of_twins(np.concatenate([of_layers[nth].reshape(sizes[1], -1) for nth in some], axis=1))
    for nth in some if rows is not None else ():
        of_layers[nth] = of_layers[nth][rows]
    return rows is not None


def _twins(stages: Sequence[_Stage], at: int) -> list[Rows] | None:
    """The micro-batches to keep in each stage of an iteration, so that each is used once; None if one is unpaired."""
    if len({len(counts) for stage in stages for counts in stage.counts[at]}) > 1:
        return None
    kept_rows = [rows for stage in stages if (rows := _first_of_twins(stage.rows(at))) is not None]
    return kept_rows if len(kept_rows) == len(stages) else None


def _first_of_twins(rows: CountArray) -> Rows | None:
    """Of rows `[B, numbers]`, the first half of each set of equal rows; None if a set has an odd size."""
    _, group, sizes = np.unique(rows, axis=0, return_inverse=True, return_counts=True)
    if (sizes % 2).any():
        return None
    group = group.reshape(-1)
    order = np.argsort(group, kind="stable")
    nth = np.empty_like(order)
    nth[order] = np.arange(len(order)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return np.flatnonzero(nth < sizes[group] // 2)


def _rows_differ(stages: Sequence[_Stage], doubled: Iterable[int]) -> bool:
    """Whether micro-batches differ within an iteration, or between iterations that have a single one, twice."""
    for stage in stages:
        alone = set[bytes]()
        for at in doubled:
            rows = stage.rows(at)
            if (rows != rows[0]).any():
                return True
            if len(rows) == 2:
                alone.add(rows[0].tobytes())
        if len(alone) > 1:
            return True
    return False


def _stacked(
    loads: list[list[CountArray]], iterations: list[int], layers: tuple[str, ...], num_gpus: int
) -> MegatronCounts:
    """Concatenate the layers of all stages; each micro-batch of each EP group becomes a step."""
    steps = []
    for nth, iteration in enumerate(iterations):
        stages = [load[nth] for load in loads]  # [B, D, L, E] each
        if len({stage.shape[:2] + stage.shape[3:] for stage in stages}) != 1:
            raise DistplbError(
                f"the pipeline stages have {[len(stage) for stage in stages]} micro-batches of "
                f"{[stage.shape[3] for stage in stages]} experts in iteration {iteration}; "
                "pass the job's pipeline_parallel"
            )
        together = np.concatenate(stages, axis=2)
        steps.append(together.reshape(-1, *together.shape[2:]))
    iteration_of_step = np.repeat(np.array(iterations), [len(step) for step in steps])
    return MegatronCounts(np.concatenate(steps), iteration_of_step, layers, num_gpus)
