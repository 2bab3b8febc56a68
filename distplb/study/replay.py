"""`replay`: run a planner on a recorded job, and judge every step under a plan that was made without it.

Shapes: S steps, T steps of a window, L layers, E experts, P slots, M GPUs, R rebalances.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from distplb.core.arguments import refuse_wrong_types, whole_number
from distplb.core.cost import busiest_gpu, mean_of_known
from distplb.core.placement import Placement
from distplb.core.price import MoveModel, TimeCurve, moved_slots
from distplb.core.topology import Topology
from distplb.errors import DistplbError
from distplb.records.trace import Trace

__all__ = ["Planner", "Replay", "chosen_steps", "replay", "run_planner", "without_empty_steps"]

Planner = Callable[[Tensor, Placement], Placement]  # tokens [T, L, E] and the placement in force -> the next one

_STEPS_AT_ONCE = 32  # steps whose loads by slot are in memory at a time


@dataclass(frozen=True, eq=False)
class Replay:
    """The cost of each step under the plan in force, and the cost of the moves.

    Args:
        imbalance: `[S, L]` float64, busiest GPU / mean GPU, of the quantity in `busiest`; NaN where a step has no
            tokens in a layer.
        busiest: `[S, L]`, load of the busiest GPU: tokens, or nanoseconds if a curve was given; 0 where a step has no
            tokens in a layer. int64, or float64 if a placement holds replicas, whose shares may be fractions.
        moved: `[R, 2]` int64, slots that each rebalance moved inside nodes and between them, over all layers.
        rebalance_steps: `[R]`, the first step under each new plan.
        placements: R + 1 placements, the one at the start first.
        compute_seconds: modelled time of the busiest GPU, summed over all steps and layers.
        move_seconds: modelled time of all moves.
    """

    imbalance: Tensor
    busiest: Tensor
    moved: Tensor
    rebalance_steps: tuple[int, ...]
    placements: tuple[Placement, ...]
    compute_seconds: float
    move_seconds: float

    @property
    def seconds(self) -> float:
        """Modelled time of computing and moving."""
        return self.compute_seconds + self.move_seconds

    @property
    def slots_moved(self) -> int:
        """Slots moved by all rebalances, inside nodes and between them, over all layers."""
        return int(self.moved.sum())

    @property
    def mean_imbalance(self) -> float:
        """Mean over all steps and layers that have tokens; NaN if none has."""
        return float(mean_of_known(self.imbalance))


def replay(
    trace: Trace,
    planner: Planner,
    *,
    topology: Topology,
    every: int,
    model: MoveModel,
    curve: TimeCurve | None = None,
    window: int | None = None,
    start: Placement | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Replay:
    """Call a planner at regular intervals with the load it would have seen, and judge each plan on the steps after it.

    As in a job, it is called between two iterations. All steps of an iteration (its micro-batches, and the EP groups
    that hold copies of the same experts) are either seen by a plan or judged under it.

    The trace's own placements do not matter: its loads are per expert, wherever the experts were.

    >>> trace = Trace(torch.tensor([[[6, 6, 1, 1]]] * 4), (Placement.contiguous(1, 4, 2),), torch.zeros(4).long(),
    ...               torch.arange(4))
    >>> swap = lambda load, current: Placement(torch.tensor([[0, 2, 1, 3]]), num_experts=4, num_gpus=2)
    >>> model = MoveModel(seconds_per_token=0.5, bytes_per_slot=8, bandwidth_inside=2, bandwidth_between=1)
    >>> swapped = replay(trace, swap, topology=Topology(num_nodes=1, gpus_per_node=2), every=2, model=model)
    >>> swapped.busiest.flatten().tolist(), swapped.moved.tolist()
    ([12, 12, 7, 7], [[2, 0]])
    >>> swapped.compute_seconds, swapped.move_seconds
    (19.0, 8.0)

    Args:
        trace: a trace of S steps.
        planner: gets `[T, L, E]` tokens and the placement in force, and returns the next placement, or the same one.
        topology: topology of the modelled EP group, which may differ from the trace's.
        every: steps between calls; each call is put off to the end of the iteration.
        model: cost of tokens and moves in seconds.
        curve: maps an expert's tokens to its time, in place of the model's seconds per token; replicas share tokens
            evenly, and fractions of a token are interpolated linearly.
        window: the most steps that the planner gets: the last whole iterations since its last call, or part of the
            last iteration if that is longer; all steps since then if None.
        start: the placement of the first steps, contiguous if None; it may hold replicas.
        progress: called with the number of finished steps and S.

    Raises:
        DistplbError: if a number is below 1, or a placement does not fit the trace and topology.
    """
    every = whole_number("replay: every", every, 1, "steps, at least 1")
    window = None if window is None else whole_number("replay: window", window, 1, "steps, at least 1")
    _check_types(trace, planner, topology, model, curve, start, progress)
    return run_planner(
        trace,
        planner,
        _cuts(trace, every),
        topology=topology,
        model=model,
        curve=curve,
        window=window,
        start=start,
        progress=progress,
    )


def _check_types(
    trace: object, planner: object, topology: object, model: object, curve: object, start: object, progress: object
) -> None:
    refuse_wrong_types(
        {
            "replay: trace": (trace, (Trace,), "a Trace"),
            "replay: planner": (planner, (Callable,), "a function of a load and the placement in force"),
            "replay: topology": (topology, (Topology,), "a Topology"),
            "replay: model": (model, (MoveModel,), "a MoveModel"),
            "replay: curve": (curve, (TimeCurve, None), "a TimeCurve"),
            "replay: start": (start, (Placement, None), "a Placement"),
            "replay: progress": (progress, (Callable, None), "a function of two numbers"),
        }
    )


def _cuts(trace: Trace, every: int) -> list[int]:
    """For each multiple of `every` steps, the first step of the iteration that begins there or next."""
    steps = torch.arange(0, trace.num_steps, every, device="cpu")[1:]
    cuts = trace.begins[torch.searchsorted(trace.begins, steps).clamp(max=len(trace.begins) - 1)]
    later: list[int] = cuts[cuts >= steps].unique().tolist()  # the last iteration may begin earlier, and none follows
    return later


def run_planner(
    trace: Trace,
    planner: Planner,
    cuts: Sequence[int],
    *,
    topology: Topology,
    model: MoveModel,
    curve: TimeCurve | None = None,
    window: int | None = None,
    start: Placement | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Replay:
    """`replay` that plans before given steps: `cuts`, ascending, each the first step of an iteration."""
    current = Placement.contiguous(trace.num_layers, trace.num_experts, topology.num_gpus) if start is None else start
    _check(current, "start", trace, topology)
    placements, moved, parts = [current], [], []
    for last, (begin, end) in zip([0, 0, *cuts], itertools.pairwise([0, *cuts, trace.num_steps]), strict=False):
        if begin:
            past = trace.load[_window(trace, last, begin, window) : begin]
            current = planner(past.clone(), current)
            _check(current, f"the plan for step {begin}", trace, topology)
            moved.append(moved_slots(placements[-1], current, topology).sum(0))
            placements.append(current)
        parts += [busiest_gpu(steps, current, curve) for steps in trace.load[begin:end].split(_STEPS_AT_ONCE)]
        if progress is not None:
            progress(end, trace.num_steps)
    busiest, imbalance = (torch.cat(values) for values in zip(*parts, strict=True))
    moves = torch.stack(moved) if moved else torch.zeros(0, 2, dtype=torch.int64, device="cpu")
    inside, between = moves.sum(0).tolist()
    return Replay(
        imbalance=imbalance,
        busiest=busiest,
        moved=moves,
        rebalance_steps=tuple(cuts),
        placements=tuple(placements),
        compute_seconds=busiest.sum().item() * (model.seconds_per_token if curve is None else 1e-9),
        move_seconds=model.seconds(inside, between),
    )


def _window(trace: Trace, last: int, begin: int, window: int | None) -> int:
    """The first step of a window that ends where a rebalance begins, and starts no earlier than the last rebalance."""
    first = last if window is None else max(last, begin - window)
    whole = trace.begins[(trace.begins >= first) & (trace.begins < begin)]
    return int(whole[0]) if len(whole) else first


def _check(placement: Placement, name: str, trace: Trace, topology: Topology) -> None:
    refuse_wrong_types({f"replay: {name}": (placement, (Placement,), "a Placement")})
    sizes = (placement.num_layers, placement.num_experts, placement.num_gpus)
    expected = (trace.num_layers, trace.num_experts, topology.num_gpus)
    if sizes != expected:
        raise DistplbError(
            f"replay: {name} has {sizes} layers, experts and GPUs, the trace and topology have {expected}; "
            "pass a placement of the same model and cluster"
        )


def without_empty_steps(trace: Trace) -> Trace:
    """The trace without the steps in which no layer has tokens, such as rows of a buffer that were never filled.

    Raises:
        DistplbError: if no step has tokens.
    """
    steps = trace.load.flatten(1).any(1).nonzero()[:, 0]
    if not len(steps):
        raise DistplbError(
            f"the trace has no tokens in {trace.num_steps} step{'s' * (trace.num_steps != 1)}; pass the trace of a job "
            "that trains"
        )
    return trace if len(steps) == trace.num_steps else chosen_steps(trace, steps)


def chosen_steps(trace: Trace, steps: Tensor | slice) -> Trace:
    """The same trace with only these steps."""
    names = ("load", "placement_of_step", "iteration")
    return replace(trace, **{name: getattr(trace, name)[steps] for name in names})
