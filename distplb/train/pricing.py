"""What a job has measured, as reported by rank 0, and the price of moves that follows from it."""

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

# A moved slot must save this share of the mean GPU's tokens if the cost of moves is unknown. On DeepSeek-V3's load,
# perturbed by a tenth, on 16 GPUs of one node, the imbalance is then 1.0051 with 9 % of slots moved; with free moves it
# is 1.0039 with 82 % (benchmarks/results/2026-11-26-default-price.md).
_LEAST_SAVING = 2.0**-13
# Factors for moves inside a node and between nodes, where links are slower. With the same load on 2 nodes, they reduce
# the slots that change nodes from 630 to 194, and the imbalance is 1.0052 either way.
_BY_DISTANCE = (0.5, 2.0)


class Measured(NamedTuple):
    """Rank 0's measurements since the last rebalance, the same on all ranks."""

    pace: Pace  # of the iterations since the last rebalance
    last_seconds: float  # that the last rebalance took
    steps: int  # in the window, kept or not
    slot_bytes: int  # of an expert with all that travels with it; 0 if nothing travels
    tokens: int  # per layer, routed by rank 0 in the kept steps: about as many as the mean GPU receives
    ties: tuple[float | None, ...]  # by layer, the share of tokens that tied in its router, in one forward
    error: Exception | None = None  # why this rank could not measure; the figures above must not be used then


class Pricer:
    """Prices moves by a given model, or by one that is measured before the first rebalance.

    Its methods are collective unless they say otherwise.

    Args:
        observer: reads this rank's window and clock.
        comm: the ranks that rebalance together.
        topology: the nodes and GPUs of one EP group.
        model: what moves cost; None to measure it, if the options have a time curve and experts travel.
        window_steps: T, the most steps that the window keeps.
    """

    def __init__(
        self, observer: Observer, comm: Comm, topology: Topology, model: MoveModel | None, window_steps: int
    ) -> None:
        self.model = model
        self._observer, self._comm, self._topology, self._window_steps = observer, comm, topology, window_steps

    def measured(
        self, last_seconds: float, slot_bytes: int, ties: Callable[[], Sequence[float | None]], num_layers: int
    ) -> Measured:
        """Give all ranks rank 0's measurements, in one broadcast, and start a new pace.

        Args:
            last_seconds: how long the last rebalance took on this rank.
            slot_bytes: bytes of an expert on this rank.
            ties: returns by layer the share of tokens that tied; None if it was not measured.
            num_layers: L.
        """
        figures, error = [0] * 7 + [-1] * num_layers, None
        try:
            pace = self._observer.pace()
            nanoseconds = [round(1e9 * value) for value in (pace.median, pace.error, last_seconds)]
            counts = [pace.iterations, self._observer.seen, slot_bytes, self._observer.tokens]
            shares = [-1 if share is None else round(1e9 * share) for share in ties()]
            figures = [*nanoseconds, *counts, *shares]
        except Exception as caught:  # kept for later: the other ranks are already at the broadcast
            error = in_stage("count", caught)
        figures = root_values(self._comm, figures)
        median, error_of_median, last_seconds = (value * 1e-9 for value in figures[:3])
        iterations, steps, slot_bytes, tokens = figures[3:7]
        tied = tuple(None if share < 0 else share * 1e-9 for share in figures[7:])
        return Measured(Pace(median, error_of_median, iterations), last_seconds, steps, slot_bytes, tokens, tied, error)

    def priced(
        self, options: PlanOptions, current: Placement, measured: Measured, steps_until_next: float
    ) -> PlanOptions:
        """Return the options of one rebalance, with the placement in force and the price of moves."""
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
        """Return the plan without the layers that are left alone, and by layer whether it is. Not collective.

        With a model or a time curve the whole plan is returned, because the price of moves is known. With neither, a
        layer is left alone if its GPUs differ no more than by chance. The same on all ranks.

        Args:
            planned: a plan from counts of steps that ran under `current`.
            current: the placement in force.
            options: options of the search.
        """
        if self.model is not None or options.time_curve is not None:
            return planned.placement, (False,) * current.num_layers
        is_even = even_by_chance(planned.load, current)
        table = torch.where(is_even[:, None], current.expert_of_slot, planned.placement.expert_of_slot)
        return Placement(table, current.num_experts, current.num_gpus), tuple(is_even.tolist())


def default_price(tokens: int, topology: Topology) -> tuple[float, float]:
    """Tokens of the window that a moved slot has to save, inside a node and between nodes, if moves have no known cost.

    Args:
        tokens: tokens of the mean GPU in one layer, over all steps of the window.
        topology: the nodes and GPUs of one EP group.
    """
    inside, between = _BY_DISTANCE if topology.num_nodes > 1 else (1.0, 1.0)
    return inside * tokens * _LEAST_SAVING, between * tokens * _LEAST_SAVING
