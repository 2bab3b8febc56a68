"""`Trace`: the load of a job step by step with the placements in force, as a value and as files.

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
    """What a job counted, step by step, and the placement that each step ran under.

    >>> load = torch.tensor([[[3, 1]], [[2, 2]]])
    >>> trace = Trace(load, (Placement.contiguous(1, 2, 2),), torch.tensor([0, 0]), torch.tensor([7, 7]))
    >>> trace.num_steps, trace.layers
    (2, ('0',))

    Args:
        load: `[S, L, E]`, tokens of each expert, of any type that is exact; the steps in the order of time.
        placements: N of the same layers, experts, slots and GPUs.
        placement_of_step: `[S]` integers, the index of the placement that was in force.
        iteration: `[S]` integers, of the job; never falling. An iteration may have several steps, or none.
        layers: the L names; "0", "1", ... where none are given.
        note: whatever a reader should know, such as the command that made it.

    Raises:
        DistplbError: if shapes or numbers do not fit together.
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
                    f"Trace: {name} has shape {list(getattr(self, name).shape)} for {self.num_steps} steps; "
                    "pass one number for each step"
                )
        if not self.placements:
            raise DistplbError("Trace: there is no placement; pass the one that was in force")
        expected = (self.num_layers, self.num_experts, self.placements[0].num_slots, self.placements[0].num_gpus)
        for nth, one in enumerate(self.placements):
            sizes = (one.num_layers, one.num_experts, one.num_slots, one.num_gpus)
            if sizes != expected:
                raise DistplbError(
                    f"Trace: placement {nth} has {sizes} layers, experts, slots and GPUs where {expected} are "
                    "expected; pass placements of one model and cluster"
                )

    def _check_values(self) -> None:
        low, high = self.placement_of_step.aminmax()
        if low < 0 or high >= len(self.placements):
            raise DistplbError(
                f"Trace: placement_of_step goes from {int(low)} to {int(high)} for {len(self.placements)} placements"
            )
        if bool((self.iteration.diff() < 0).any()):
            raise DistplbError("Trace: iteration falls from one step to the next; pass the steps in the order of time")
        if len(set(self.layers)) != self.num_layers or len(self.layers) != self.num_layers:
            raise DistplbError(
                f"Trace: {len(set(self.layers))} different names for {self.num_layers} layers; pass one for each"
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
        """The first step of each iteration, rising from 0."""
        changes = self.iteration.diff(prepend=self.iteration[:1] - 1)
        return changes.nonzero()[:, 0]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a `.npz` file, compressed, counts in the smallest unsigned integers that hold them."""
        refuse_wrong_types({"path": (path, (str, os.PathLike), "the path of a file")})
        write_trace(self, Path(path))

    @classmethod
    def read(cls, path: str | os.PathLike[str], max_bytes: int = 2**32) -> Trace:
        """Read what `save` wrote, or a folder of parts that a `TraceWriter` wrote, in the order of their names.

        A job that was resumed goes back to an earlier iteration: what its earlier lives recorded from there on is left
        out. Of parts that do not say which life wrote them, an iteration that two have counts as in the later one.

        Args:
            path: a file, or a folder.
            max_bytes: refuse what would take more memory than this; nothing has been unpacked then.

        Raises:
            DistplbError: naming the file, if it is not a trace of a version that is known, damaged, too large, or of
                another job than the parts beside it.
        """
        refuse_wrong_types({"path": (path, (str, os.PathLike), "the path of a file or a folder")})
        max_bytes = whole_number("max_bytes", max_bytes, minimum=1)
        paths = sorted(Path(path).glob("*.npz")) if Path(path).is_dir() else [Path(path)]
        if not paths:
            raise DistplbError(f"{path} is a folder without .npz files; pass one that a TraceWriter wrote to")
        is_folder = Path(path).is_dir()
        files = [_with_advice(one, is_folder, open_part, one) for one in paths]
        size = sum(file.num_bytes for file in files)
        if size > max_bytes:
            raise DistplbError(
                f"{path} would take {size} bytes in memory, {max_bytes} are allowed; pass a larger max_bytes "
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

        The files know neither the parallel sizes nor a placement: experts are numbered by slot, and the placement is
        contiguous. Each micro-batch of each EP group is a step. Of lines of the same iteration and layer the last
        one counts: the job was resumed, or ran the iteration again. Where a rank has several virtual pipeline stages,
        the writer mixes their layers, and what is read is mixed likewise.

        Iterations that not all ranks have whole, as where one died while it wrote, are left out with a warning. A job
        that recomputes activations counts each micro-batch twice; where all have a twin, each is used once, with a
        warning.

        Source of the format: `ActivationLogger.save_tpe` in megatron/training/activation_logging.py of
        megatron-core 0.18.0 to 0.19.2 (pull request 3842), and of the revision before, which wrote one
        `tokens_per_expert.log` for all ranks; of the order of ranks: `initialize_model_parallel` in
        megatron/core/parallel_state.py, order tp-cp-ep-dp-pp. Earlier versions write no such files.

        Args:
            paths: the folder `tokens_per_expert` beside the checkpoints, or all ranks' files `rank<number>.jsonl`; or
                `tokens_per_expert.log`.
            num_gpus: M, the expert-parallel size; where None, all ranks are one EP group.
            expert_tensor_parallel: ranks that share each expert; they have the same counts.
            pipeline_parallel: stages; layers are then named "pp<stage>.decoder.layers.<number within the stage>".
            max_bytes: refuse files that are larger together.

        Raises:
            DistplbError: with file and line, for what is not such a line; if a rank is missing, no iteration is whole,
                or micro-batches differ between ranks or layers.
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
    """As `Trace.save`; a part of a running job says which life of it this is."""
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
    """The result of `read`; where it refuses a part among others, the error says what to do with that."""
    try:
        return read(source)
    except DistplbError as error:
        if not is_part:
            raise
        raise DistplbError(f"{error}; or move {path.name} away, to read the parts beside it") from error


def _trace_of(file: ArrayFile) -> tuple[Trace, int]:
    """One part, and its life. The version comes first: what else is wrong may be so because of it."""
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
        raise DistplbError(f"it has the number {int(values.max())}")
    return torch.from_numpy(values.astype(np.int64))


class _Part(NamedTuple):
    path: Path
    trace: Trace
    life: int

    @property
    def begin(self) -> int:
        return int(self.trace.iteration[0])


def _joined(parts: list[_Part]) -> Trace:
    """One trace of parts, each up to where the next one of its life begins, or any of a later life."""
    first, places = parts[0], dict[Placement, int]()
    begins = {life: min(part.begin for part in parts if part.life == life) for life in {part.life for part in parts}}
    loads, indices, iterations = [], [], []
    parts = sorted(parts, key=lambda part: part.life)  # within a life in the order of names, as they came
    for part, following in zip(parts, [*parts[1:], None], strict=True):
        if part.trace.layers != first.trace.layers:
            raise DistplbError(
                f"{part.path} has other layers than {first.path}; pass parts of one job, and of one stage of a pipeline"
            )
        end = min([begin for life, begin in begins.items() if life > part.life], default=None)
        if following is not None and following.life == part.life:
            if part.begin > following.begin:
                raise DistplbError(
                    f"{following.path} begins at iteration {following.begin}, before {part.path} at {part.begin}; "
                    "name parts in the order of time"
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
            f"the parts beside {first.path} are not of one job ({error}); move those of others away"
        ) from error
