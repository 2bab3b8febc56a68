"""`Trace`: the load of a job, step by step, with the placements in force, as a value and as files.

Shapes: S steps, L layers, E experts, P slots, M GPUs, N placements.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distplb.core.arguments import refuse_wrong_types, whole_number
from distplb.core.counts import as_integers, as_step_counts
from distplb.core.placement import Placement
from distplb.errors import DistplbError
from distplb.records.archive import ArrayFile, write_arrays
from distplb.records.foreign.megatron import read_megatron
from distplb.records.trace_parts import About, open_part, read_about, write_about

__all__ = ["Trace", "write_trace"]

A = TypeVar("A")
T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Trace:
    """The counts of a job, step by step, and the placement that each step ran under.

    >>> load = torch.tensor([[[3, 1]], [[2, 2]]])
    >>> trace = Trace(load, (Placement.contiguous(1, 2, 2),), torch.tensor([0, 0]), torch.tensor([7, 7]))
    >>> trace.num_steps, trace.layers
    (2, ('0',))

    Args:
        load: `[S, L, E]`, tokens of each expert, of any dtype that holds them exactly; steps in chronological order.
        placements: N placements of the same layers, experts, slots and GPUs.
        placement_of_step: `[S]` integers, the index of the placement that was in force.
        iteration: `[S]` integers, the job's iteration, never decreasing. An iteration may have several steps, or none.
        layers: names of the L layers; "0", "1", ... if empty.
        note: anything a reader should know, such as the command that made the trace.

    Raises:
        DistplbError: if shapes or values do not fit together.
    """

    load: Tensor
    placements: tuple[Placement, ...]
    placement_of_step: Tensor
    iteration: Tensor
    layers: tuple[str, ...] = ()
    note: str = ""

    def __post_init__(self) -> None:
        one = (self.placements, (Sequence,), "placements, such as (Placement.contiguous(num_layers, ...),)")
        refuse_wrong_types({"Trace: placements": one, "Trace: layers": (self.layers, (Sequence,), "names")})
        for nth, placement in enumerate(self.placements):
            refuse_wrong_types({f"Trace: placements[{nth}]": (placement, (Placement,), "a Placement")})
        object.__setattr__(self, "load", as_step_counts("Trace: load", self.load, self.layers).cpu().contiguous())
        for name in ("placement_of_step", "iteration"):
            value = as_integers(f"Trace: {name}", getattr(self, name), "integers")
            object.__setattr__(self, name, value.cpu().contiguous())
        object.__setattr__(self, "placements", tuple(self.placements))
        self._check_shapes()
        object.__setattr__(self, "layers", tuple(self.layers) or tuple(str(at) for at in range(self.num_layers)))
        self._check_values()

    def _check_shapes(self) -> None:
        for name in ("placement_of_step", "iteration"):
            if getattr(self, name).shape != self.load.shape[:1]:
                raise DistplbError(
                    f"Trace: {name} has shape {list(getattr(self, name).shape)} where [{self.num_steps}] is expected; "
                    "pass one integer for each step"
                )
        if not self.placements:
            raise DistplbError("Trace: placements is empty; pass the placement that was in force")
        expected = (self.num_layers, self.num_experts, self.placements[0].num_slots, self.placements[0].num_gpus)
        for nth, one in enumerate(self.placements):
            sizes = (one.num_layers, one.num_experts, one.num_slots, one.num_gpus)
            if sizes != expected:
                raise DistplbError(
                    f"Trace: placement {nth} has [layers, experts, slots, GPUs] {list(sizes)} where {list(expected)} "
                    "is expected; pass placements of the same model and cluster"
                )

    def _check_values(self) -> None:
        low, high = self.placement_of_step.aminmax()
        if low < 0 or high >= len(self.placements):
            raise DistplbError(
                f"Trace: placement_of_step has values from {int(low)} to {int(high)}; pass indices in "
                f"[0, {len(self.placements)})"
            )
        if bool((self.iteration.diff() < 0).any()):
            raise DistplbError(
                "Trace: iteration decreases from one step to the next; pass steps in chronological order"
            )
        if len(set(self.layers)) != self.num_layers or len(self.layers) != self.num_layers:
            raise DistplbError(
                f"Trace: layers in the load: {self.num_layers}, different names: {len(set(self.layers))}; pass one "
                "name for each layer"
            )

    @property
    def num_steps(self) -> int:
        """S."""
        return int(self.load.shape[0])

    @property
    def num_layers(self) -> int:
        """L."""
        return int(self.load.shape[1])

    @property
    def num_experts(self) -> int:
        """E."""
        return int(self.load.shape[2])

    @property
    def begins(self) -> Tensor:
        """Index of the first step of each iteration, ascending from 0."""
        changes = self.iteration.diff(prepend=self.iteration[:1] - 1)
        return changes.nonzero()[:, 0]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a compressed `.npz` file, with counts in the smallest unsigned integers that hold them."""
        refuse_wrong_types({"path": (path, (str, os.PathLike), "the path of a file")})
        write_trace(self, Path(path))

    @classmethod
    def read(cls, path: str | os.PathLike[str], max_bytes: int = 2**32) -> Trace:
        """Read a file that `save` wrote, or a folder of parts that a `TraceWriter` wrote, in the order of their names.

        A resumed job goes back to an earlier iteration; steps that its earlier runs recorded from there on are left
        out. If parts do not record which run wrote them, the later part is used for an iteration that two parts have.

        Args:
            path: path of a file or a folder.
            max_bytes: refuse a trace that would take more memory than this, before anything is unpacked.

        Raises:
            DistplbError: naming the file, if it is not a trace, has an unknown version, is damaged or too large, or
                belongs to another job than the other parts.
        """
        refuse_wrong_types({"path": (path, (str, os.PathLike), "the path of a file or a folder")})
        max_bytes = whole_number("max_bytes", max_bytes, minimum=1)
        paths = sorted(Path(path).glob("*.npz")) if Path(path).is_dir() else [Path(path)]
        if not paths:
            raise DistplbError(f"{path} is a folder without .npz files; pass a folder that a TraceWriter wrote to")
        is_folder = Path(path).is_dir()
        files = [_with_advice(one, is_folder, open_part, one) for one in paths]
        size = sum(file.num_bytes for file in files)
        if size > max_bytes:
            raise DistplbError(
                f"{path} would take {size} bytes in memory, but max_bytes allows {max_bytes}; pass a larger max_bytes "
                "if you trust it"
            )
        return _joined([_Part(one.path, *_with_advice(one.path, is_folder, _trace_of, one)) for one in files])

    @classmethod
    def from_megatron(
        cls,
        *paths: str | os.PathLike[str],
        num_gpus: int | None = None,
        expert_tensor_parallel: int = 1,
        pipeline_parallel: int = 1,
        max_bytes: int = 2**32,
    ) -> Trace:
        """Read the tokens per expert that Megatron-LM writes with `--save-tokens-per-expert-interval`.

        The files contain neither the parallel sizes nor a placement: experts are numbered by slot, and the placement is
        contiguous. Each micro-batch of each EP group is a step. If several lines have the same iteration and layer, the
        last one is used: the job was resumed, or repeated the iteration. If a rank has several virtual pipeline stages,
        the writer mixes their layers, and they stay mixed here.

        Iterations that some rank does not have completely, for example because it died while writing, are left out with
        a warning. A job that recomputes activations counts each micro-batch twice; if all micro-batches have a
        duplicate, each is used once, with a warning.

        Source of the format: `ActivationLogger.save_tpe` in megatron/training/activation_logging.py of
        megatron-core 0.18.0 to 0.19.2 (pull request 3842), and of the revision before it, which wrote one
        `tokens_per_expert.log` for all ranks. Source of the order of ranks: `initialize_model_parallel` in
        megatron/core/parallel_state.py, order tp-cp-ep-dp-pp. Earlier versions write no such files.

        Args:
            paths: the folder `tokens_per_expert` next to the checkpoints, the files `rank<number>.jsonl` of all ranks,
                or `tokens_per_expert.log`.
            num_gpus: M, the expert-parallel size; None treats all ranks of a pipeline stage as one EP group.
            expert_tensor_parallel: ranks that share each expert; they have the same counts.
            pipeline_parallel: pipeline stages; with more than one, layers are named
                "pp<stage>.decoder.layers.<number within the stage>".
            max_bytes: refuse files whose sizes add up to more than this.

        Raises:
            DistplbError: naming file and line, if a line is malformed; also if a rank is missing, no iteration is
                complete, or micro-batches differ between ranks or layers.
        """
        counts = read_megatron(
            [Path(path) for path in paths], num_gpus, expert_tensor_parallel, pipeline_parallel, max_bytes
        )
        steps, num_layers, num_experts = counts.load.shape
        return cls(
            torch.from_numpy(counts.load),
            (Placement.contiguous(num_layers, num_experts, counts.num_gpus),),
            torch.zeros(steps, dtype=torch.int64, device="cpu"),
            torch.from_numpy(counts.iteration),
            counts.layers,
            note=f"from Megatron-LM's tokens per expert, {', '.join(str(path) for path in paths)}",
        )


def write_trace(trace: Trace, path: Path, life: int = 0) -> None:
    """Write a trace as `Trace.save` does; `life`, if not 0, records which run of the job wrote this part."""
    about = write_about(About(trace.placements[0].num_gpus, trace.layers, trace.note, life))
    arrays = {
        "about": np.frombuffer(about, dtype=np.uint8),
        "load": _smallest(trace.load.numpy()),
        "iteration": trace.iteration.numpy(),
        "placement_of_step": trace.placement_of_step.numpy(),
        "expert_of_slot": _smallest(torch.stack([one.expert_of_slot for one in trace.placements]).numpy()),
    }
    write_arrays(path, arrays)


def _smallest(values: NDArray[np.int64]) -> NDArray[Any]:
    return values.astype(np.min_scalar_type(int(values.max())))


def _with_advice(path: Path, is_part: bool, read: Callable[[A], T], source: A) -> T:
    """Return the result of `read`; if it refuses one part of a folder, the error adds how to read the others."""
    try:
        return read(source)
    except DistplbError as error:
        if not is_part:
            raise
        raise DistplbError(f"{error}; or move {path.name} away to read the other parts") from error


def _trace_of(file: ArrayFile) -> tuple[Trace, int]:
    """Read a part and its life. The version is checked first, because an unknown one may explain other errors."""
    try:
        about = read_about(file)
        load = _int64(file.read("load"))
        tables = _int64(file.read("expert_of_slot"))
        placements = tuple(Placement(table, load.shape[2], about.num_gpus) for table in tables)
        index, iteration = (_int64(file.read(name)) for name in ("placement_of_step", "iteration"))
        return Trace(load, placements, index, iteration, about.layers, about.note), about.life
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError, DistplbError) as error:
        raise DistplbError(f"{file.path} is not a trace ({error})") from error


def _int64(values: NDArray[Any]) -> Tensor:
    if values.size and int(values.max()) >= 1 << 63:
        raise DistplbError(f"it has {int(values.max())}, which does not fit int64")
    return torch.from_numpy(values.astype(np.int64))


class _Part(NamedTuple):
    path: Path
    trace: Trace
    life: int

    @property
    def begin(self) -> int:
        return int(self.trace.iteration[0])


def _joined(parts: list[_Part]) -> Trace:
    """Join parts into one trace; each ends where the next part of its life, or any part of a later life, begins."""
    first, places = parts[0], dict[Placement, int]()
    begins = {life: min(part.begin for part in parts if part.life == life) for life in {part.life for part in parts}}
    loads, indices, iterations = [], [], []
    parts = sorted(parts, key=lambda part: part.life)  # stable: within a life, by name
    for part, following in zip(parts, [*parts[1:], None], strict=True):
        if part.trace.layers != first.trace.layers:
            raise DistplbError(
                f"{part.path} has other layers than {first.path}; pass parts of one job and one pipeline stage"
            )
        end = min([begin for life, begin in begins.items() if life > part.life], default=None)
        if following is not None and following.life == part.life:
            if part.begin > following.begin:
                raise DistplbError(
                    f"{following.path} begins at iteration {following.begin}, before {part.path} at {part.begin}; "
                    "name parts in chronological order"
                )
            end = following.begin if end is None else min(end, following.begin)
        kept = torch.ones_like(part.trace.iteration, dtype=torch.bool) if end is None else part.trace.iteration < end
        index = torch.tensor([places.setdefault(one, len(places)) for one in part.trace.placements], device="cpu")
        loads.append(part.trace.load[kept])
        indices.append(index[part.trace.placement_of_step[kept]])
        iterations.append(part.trace.iteration[kept])
    try:
        return Trace(
            torch.cat(loads),
            tuple(places),
            torch.cat(indices),
            torch.cat(iterations),
            first.trace.layers,
            first.trace.note,
        )
    except (DistplbError, RuntimeError) as error:
        raise DistplbError(
            f"{first.path} and the other parts belong to different jobs ({error}); move the parts of other jobs away"
        ) from error
