"""`Evaluation`: the imbalance of a trace under the placements that were in force, and under others.

Shapes: S steps, B steps of a sample, L layers, M GPUs.
"""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from distplb.core.bound import lower_bound
from distplb.core.cost import gpu_tokens, imbalance, mean_of_known
from distplb.core.placement import Placement
from distplb.core.topology import Topology
from distplb.planning.plan import plan
from distplb.records.trace import Trace
from distplb.study.what_if import evenly

__all__ = ["Evaluation", "UnseenSteps"]

_STEPS_AT_ONCE = 64
_PLANNED_ON = 64  # steps, sampled evenly from those that a plan may see
_BOUND_STEPS = 256  # sampled evenly from all steps: each bound takes 10 ms


class UnseenSteps(NamedTuple):
    """Some steps under two placements, the second of which was planned without them.

    Args:
        first, last: the first and last iteration.
        before, after: `[L, M]`, tokens of each GPU; int64, or float64 if a placement has replicas.
        imbalance_before, imbalance_after: means over layers and steps that have tokens.
        is_replayed: whether the second placement was never in force, but planned on the steps before.
    """

    first: int
    last: int
    before: Tensor
    after: Tensor
    imbalance_before: float
    imbalance_after: float
    is_replayed: bool


class Evaluation:
    """The steps of a trace under several placements; results that take long are computed once."""

    def __init__(self, trace: Trace, topology: Topology) -> None:
        self.trace, self.topology = trace, topology

    @property
    def has_moved(self) -> bool:
        """Whether the job ever ran under another placement than its first."""
        return len(self.trace.placement_of_step.unique()) > 1

    @cached_property
    def imbalance_in_force(self) -> Tensor:
        """`[S, L]` float64: the imbalance of each step under the placement in force; NaN without tokens."""
        imbalances = torch.ones(self.trace.num_steps, self.trace.num_layers, dtype=torch.float64, device="cpu")
        for index in self.trace.placement_of_step.unique().tolist():
            steps = (self.trace.placement_of_step == index).nonzero()[:, 0]
            imbalances[steps] = _imbalance(self.trace.load, steps, self.trace.placements[index])
        return imbalances

    @cached_property
    def imbalance_unmoved(self) -> Tensor:
        """`[S, L]` float64: the same under the placement of the first step."""
        steps = torch.arange(self.trace.num_steps, device="cpu")
        return _imbalance(self.trace.load, steps, self._first) if self.has_moved else self.imbalance_in_force

    @cached_property
    def bound(self) -> tuple[Tensor, Tensor]:
        """`[B]` steps, and `[B, L]` float64: their lower bounds, which no placement can beat; NaN without tokens."""
        steps = evenly(torch.arange(self.trace.num_steps, device="cpu"), _BOUND_STEPS)
        slots = self._first.num_slots
        return steps, torch.stack([lower_bound(self.trace.load[step], self.topology, slots) for step in steps])

    @property
    def since_move(self) -> Tensor:
        """`[S]` bool: the steps from the first move on."""
        index = self.trace.placement_of_step
        return (index != index[0]).long().cummax(0).values.bool()

    @property
    def middle_step(self) -> int:
        """The step at which the second half of the trace begins, rounded up to the first step of an iteration."""
        middle = max(1, self.trace.num_steps // 2)
        later = self.trace.begins[self.trace.begins >= middle]
        return int(later[0]) if len(later) else self.trace.num_steps

    @cached_property
    def unseen(self) -> UnseenSteps | None:
        """The last placement on its own steps; if nothing moved, a plan from the first half on the second half.

        None if no iteration begins in the second half.
        """
        trace = self.trace
        if self.has_moved:
            last = int(trace.placement_of_step[-1])
            steps = (trace.placement_of_step == last).nonzero()[:, 0]
            return self._under(steps, trace.placements[last], is_replayed=False)
        if self.middle_step == trace.num_steps:
            return None
        first_half, second_half = torch.arange(trace.num_steps, device="cpu").tensor_split([self.middle_step])
        slots = self._first.num_slots
        planned = plan(trace.load[evenly(first_half, _PLANNED_ON)], self.topology, num_slots=slots, current=self._first)
        return self._under(second_half, planned, is_replayed=True)

    @property
    def _first(self) -> Placement:
        return self.trace.placements[int(self.trace.placement_of_step[0])]

    def _under(self, steps: Tensor, placement: Placement, is_replayed: bool) -> UnseenSteps:
        load, iterations, both = self.trace.load, self.trace.iteration[steps], (self._first, placement)
        before, after = (_tokens(load, steps, one) for one in both)
        level, level_after = (float(mean_of_known(_imbalance(load, steps, one))) for one in both)
        return UnseenSteps(int(iterations[0]), int(iterations[-1]), before, after, level, level_after, is_replayed)


def _tokens(load: Tensor, steps: Tensor, placement: Placement) -> Tensor:
    table, gpus = placement.expert_of_slot, placement.num_gpus
    return torch.stack([gpu_tokens(load[some], table, gpus).sum(0) for some in steps.split(_STEPS_AT_ONCE)]).sum(0)


def _imbalance(load: Tensor, steps: Tensor, placement: Placement) -> Tensor:
    return torch.cat([imbalance(load[some], placement) for some in steps.split(_STEPS_AT_ONCE)])
