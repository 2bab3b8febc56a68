"""What a job has measured of itself, as rank 0 tells it, and the price of moves that follows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from distplb.comm.agreement import root_values
from distplb.comm.base import Comm
from distplb.core.placement import Placement
from distplb.core.price import MoveModel
from distplb.core.topology import Topology
from distplb.errors import in_stage
from distplb.planning.chance import even_by_chance
from distplb.planning.options import PlanOptions
from distplb.planning.plan import PlanResult
from distplb.train.measure import measured_bandwidths
from distplb.train.observer import Observer
from distplb.train.stop_loss import Pace

__all__ = ["Measured", "Pricer", "default_price"]

# What a moved slot must save where nobody knows what moves cost: this share of the mean GPU's tokens. On DeepSeek-V3's
# load, disturbed by a tenth, on 16 GPUs of one node, it leaves an imbalance of 1.0051 with 9 % of slots moved, where
# moving for nothing leaves 1.0039 with 82 % (benchmarks/results/2026-11-26-default-price.md).
_LEAST_SAVING = 2.0**-13
# Of that, what a slot must save inside a node and between nodes, where links are slower. On the same load and 2 nodes,
# 194 slots instead of 630 cross over, and the imbalance is 1.0052 as before.
_BY_DISTANCE = (0.5, 2.0)


class Measured(NamedTuple):
    """What rank 0 has measured since the last rebalance, on all ranks."""

    pace: Pace  # of the iterations since the last rebalance
    last_seconds: float  # that that one took
    steps: int  # in the window, kept or not
    slot_bytes: int  # of an expert with all that travels with it; 0 where nothing travels
    tokens: int  # that rank 0 routed in the steps that are kept, in a layer: about as many as the mean GPU receives
    ties: tuple[float | None, ...]  # by layer, the share of tokens that its routers sent by chance, in one forward
    error: Exception | None = None  # why this rank could not measure; rank 0's figures are of no use then


class Pricer:
    """Prices moves by a model that was given, or measured before the first rebalance. Its methods are collective.

    Args:
        observer: of this rank's window and clock.
        comm: the ranks that rebalance together.
        topology: of one EP group.
        model: what moves cost; None to measure it, where the options have a time curve and experts travel.
        window_steps: T, the most that the window keeps.
    """

    def __init__(
        self, observer: Observer, comm: Comm, topology: Topology, model: MoveModel | None, window_steps: int
    ) -> None:
        self.model = model
        self._observer, self._comm, self._topology, self._window_steps = observer, comm, topology, window_steps

    def measured(
        self, last_seconds: float, slot_bytes: int, ties: Callable[[], Sequence[float | None]], num_layers: int
    ) -> Measured:
        """Rank 0's figures of what each rank measures for itself; the pace starts anew. One broadcast.

        Args:
            last_seconds: that the last rebalance took on this rank.
            slot_bytes: of an expert on this rank.
            ties: gives by layer the share of tokens that tied; None where nobody looked.
            num_layers: L.
        """
        figures, error = [0] * 7 + [-1] * num_layers, None
        try:
            pace = self._observer.pace()
            nanoseconds = [round(1e9 * value) for value in (pace.median, pace.error, last_seconds)]
            counts = [pace.iterations, self._observer.seen, slot_bytes, self._observer.tokens]
            shares = [-1 if share is None else round(1e9 * share) for share in ties()]
            figures = [*nanoseconds, *counts, *shares]
        except Exception as caught:  # the others are at the broadcast
            error = in_stage("count", caught)
        figures = root_values(self._comm, figures)
        median, error_of_median, last_seconds = (value * 1e-9 for value in figures[:3])
        iterations, steps, slot_bytes, tokens = figures[3:7]
        tied = tuple(None if share < 0 else share * 1e-9 for share in figures[7:])
        return Measured(Pace(median, error_of_median, iterations), last_seconds, steps, slot_bytes, tokens, tied, error)

    def priced(
        self, options: PlanOptions, current: Placement, measured: Measured, steps_until_next: float
    ) -> PlanOptions:
        """The options of one rebalance: from which placement, and at what price."""
        options = replace(options, current=current)
        if self.model is None and options.time_curve is not None and measured.slot_bytes:
            links = measured_bandwidths(self._comm, self._topology, self._observer.peers, self._observer.gpu)
            speed = max(options.time_curve.nanoseconds_per_token, 1e-6) * 1e-9
            self.model = MoveModel(speed, measured.slot_bytes, *links)
        steps = min(measured.steps, self._window_steps)
        if self.model is None or not steps:
            return replace(options, move_price=default_price(measured.tokens, self._topology))
        return replace(options, move_price=self.model.price(steps, steps_until_next))

    def worth(
        self, planned: PlanResult, current: Placement, options: PlanOptions
    ) -> tuple[Placement, tuple[bool, ...]]:
        """The plan, but for layers that are left alone; and which these are, by layer. Not collective.

        Where there is a model or a time curve it is the plan: what moves must save is then known. Where there is
        neither, layers are left alone whose GPUs are as even as chance leaves them. The same on all ranks.

        Args:
            planned: from counts of steps that ran under `current`.
            current: the placement in force.
            options: of the search.
        """
        if self.model is not None or options.time_curve is not None:
            return planned.placement, (False,) * current.num_layers
        is_even = even_by_chance(planned.load, current)
        table = torch.where(is_even[:, None], current.expert_of_slot, planned.placement.expert_of_slot)
        return Placement(table, current.num_experts, current.num_gpus), tuple(is_even.tolist())


def default_price(tokens: int, topology: Topology) -> tuple[float, float]:
    """Tokens of the window that a moved slot has to save, inside a node and between nodes, where nothing else is known.

    Args:
        tokens: of the mean GPU, in a layer and all steps of the window.
        topology: of one EP group.
    """
    inside, between = _BY_DISTANCE if topology.num_nodes > 1 else (1.0, 1.0)
    return inside * tokens * _LEAST_SAVING, between * tokens * _LEAST_SAVING
