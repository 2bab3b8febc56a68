"""`replay`: what a planner would have made of a recorded job, every step judged under a plan that had not seen it.

Shapes: S steps, T steps of a window, L layers, E experts, P slots, M GPUs, R rebalances.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from distplb.arguments import refuse_wrong_types, whole_number
from distplb.errors import DistplbError
from distplb.placement import Placement
from distplb.price import MoveModel, TimeCurve, moved_slots
from distplb.topology import Topology
from distplb.traces.trace import Trace

__all__ = ["Planner", "Replay", "replay"]

Planner = Callable[[Tensor, Placement], Placement]

_STEPS_AT_ONCE = 32  # of the loads by slot, which are as many times as large as one step


@dataclass(frozen=True, eq=False)
class Replay:
    """What each step cost under the plan that was in force, and what the moves cost.

    Args:
        imbalance: `[S, L]` float64, fullest GPU over mean GPU, of what `fullest` counts.
        fullest: `[S, L]` int64, of the fullest GPU: tokens, or nanoseconds where a curve was given.
        moved: `[R, 2]` int64, slots that each rebalance moved inside nodes and between them, over all layers.
        rebalance_steps: `[R]`, the first step under each new plan.
        placements: R + 1, the one at the start first.
        compute_seconds: modelled: the fullest GPU of every step and layer, all added up.
        move_seconds: modelled, of all moves.
    """

    imbalance: Tensor
    fullest: Tensor
    moved: Tensor
    rebalance_steps: tuple[int, ...]
    placements: tuple[Placement, ...]
    compute_seconds: float
    move_seconds: float

    @property
    def seconds(self) -> float:
        """Modelled, of computing and moving."""
        return self.compute_seconds + self.move_seconds

    @property
    def slots_moved(self) -> int:
        """By all rebalances, inside nodes and between them, over all layers."""
        return int(self.moved.sum())

    @property
    def mean_imbalance(self) -> float:
        """Over all steps and layers."""
        return float(self.imbalance.mean())


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
    """Call a planner every so many steps with what it would have seen by then, and judge its plan on the steps after.

    The trace's own placements play no part: its loads are of experts, wherever those were.

    >>> trace = Trace(torch.tensor([[[6, 6, 1, 1]]] * 4), (Placement.contiguous(1, 4, 2),), torch.zeros(4).long(),
    ...               torch.arange(4))
    >>> swap = lambda load, current: Placement(torch.tensor([[0, 2, 1, 3]]), num_experts=4, num_gpus=2)
    >>> model = MoveModel(seconds_per_token=0.5, bytes_per_slot=8, bandwidth_inside=2, bandwidth_between=1)
    >>> found = replay(trace, swap, topology=Topology(num_nodes=1, gpus_per_node=2), every=2, model=model)
    >>> found.fullest.flatten().tolist(), found.moved.tolist()
    ([12, 12, 7, 7], [[2, 0]])
    >>> found.compute_seconds, found.move_seconds
    (19.0, 8.0)

    Args:
        trace: S steps.
        planner: gets `[T, L, E]` tokens and the placement in force, and returns the next; the same if it would stay.
        topology: of the EP group that is modelled, which need not be that of the trace.
        every: steps between its calls.
        model: what tokens and moves cost in seconds.
        curve: from an expert's tokens to its time, in place of the model's seconds per token; replicas share tokens.
        window: the most steps that the planner gets, the last of those since its last call; all where None.
        start: the placement of the first steps, contiguous where None; it may hold replicas.
        progress: called with the steps that are done and S.

    Raises:
        DistplbError: for a number below 1, or a placement of another model or cluster than the trace and topology.
    """
    every = whole_number("replay: every", every, 1, "steps, at least 1")
    window = None if window is None else whole_number("replay: window", window, 1, "steps, at least 1")
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
    current = Placement.contiguous(trace.num_layers, trace.num_experts, topology.num_gpus) if start is None else start
    _check(current, "start", trace, topology)
    placements, moved, judged = [current], [], []
    for begin in range(0, trace.num_steps, every):
        if begin:
            seen = trace.load[max(begin - every, begin - (window or every)) : begin]
            current = planner(seen.clone(), current)
            _check(current, f"the plan for step {begin}", trace, topology)
            moved.append(moved_slots(placements[-1], current, topology).sum(0))
            placements.append(current)
        judged += [_judged(steps, current, curve) for steps in trace.load[begin : begin + every].split(_STEPS_AT_ONCE)]
        if progress is not None:
            progress(min(begin + every, trace.num_steps), trace.num_steps)
    fullest, imbalance = (torch.cat(parts) for parts in zip(*judged, strict=True))
    moves = torch.stack(moved) if moved else torch.zeros(0, 2, dtype=torch.int64, device="cpu")
    inside, between = moves.sum(0).tolist()
    return Replay(
        imbalance=imbalance,
        fullest=fullest,
        moved=moves,
        rebalance_steps=tuple(range(every, trace.num_steps, every)),
        placements=tuple(placements),
        compute_seconds=int(fullest.sum()) * (model.seconds_per_token if curve is None else 1e-9),
        move_seconds=model.seconds(inside, between),
    )


def _check(placement: Placement, name: str, trace: Trace, topology: Topology) -> None:
    refuse_wrong_types({f"replay: {name}": (placement, (Placement,), "a Placement")})
    found = (placement.num_layers, placement.num_experts, placement.num_gpus)
    wanted = (trace.num_layers, trace.num_experts, topology.num_gpus)
    if found != wanted:
        raise DistplbError(
            f"replay: {name} has {found} layers, experts and GPUs, the trace and topology have {wanted}; "
            "pass one of the same model and cluster"
        )


def _judged(load: Tensor, placement: Placement, curve: TimeCurve | None) -> tuple[Tensor, Tensor]:
    """`[T, L]` int64 and float64: the fullest GPU, and its ratio to the mean; 1 where nothing is to be done."""
    slots = placement.expert_of_slot
    share = load // placement.replicas  # [T, L, E], as in `layer_cost`
    share = share if curve is None else curve.time(share)
    of_gpu = share.gather(2, slots.expand(len(load), -1, -1)).unflatten(2, (placement.num_gpus, -1)).sum(3)
    fullest, total = of_gpu.amax(2), of_gpu.sum(2)  # [T, L]
    even = total.double() / placement.num_gpus
    return fullest, torch.where(total > 0, fullest / even.clamp(min=1e-300), 1.0)
