"""The account of a rebalance: what it was decided from, what follows from it, and the event that tells it.

Shapes: T steps, L layers, M GPUs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from distplb.bound import lower_bound
from distplb.cost import gpu_tokens, imbalance, layer_cost
from distplb.events import RebalanceEvent
from distplb.migrate.transfer import Moved
from distplb.placement import Placement
from distplb.planner import Planned
from distplb.planning.options import SearchOptions
from distplb.price import MoveModel, moved_slots
from distplb.stoploss import Pace
from distplb.topology import Topology

__all__ = ["Account", "completed", "skipped_event"]

_UNEVEN = 1e-3  # of imbalance above the bound, below which there is nothing to say of a layer


@dataclass(frozen=True, kw_only=True)
class Account:
    """One rebalance, from the window to the plan; `event` closes it.

    Args:
        iteration: of the job.
        layers: the L names.
        topology: of the EP group.
        old: the placement in force while the window was counted.
        planned: the plan, the load that it was made from, and the engine.
        target: the part of the plan that is carried out.
        options: of the search.
        model: what moves cost, if they have a price.
        pace: of the iterations before.
        steps_until_next: as many as the price was made for.
        router_ties: by layer, the share of tokens that were routed by chance.
        last_applied: the iteration of the last rebalance that was carried out.
    """

    iteration: int
    layers: tuple[str, ...]
    topology: Topology
    old: Placement
    planned: Planned
    target: Placement
    options: SearchOptions
    model: MoveModel | None
    pace: Pace
    steps_until_next: float
    router_ties: tuple[float | None, ...]
    last_applied: int

    def event(self, moved: Moved, decision: str, reason: str, seconds: dict[str, float]) -> RebalanceEvent:
        """The record; what the next window tells is left open."""
        load, model, curve = self.planned.load, self.model, self.options.time_curve
        peaks = [_tokens(load, placement) for placement in (self.old, self.target)]
        saved, moving = self._modelled()
        after = by_layer(load, self.target)
        bound = tuple(lower_bound(load, self.topology, self.target.num_slots).tolist())
        return RebalanceEvent(
            iteration=self.iteration,
            layers=self.layers,
            steps=len(load),
            imbalance_before=by_layer(load, self.old),
            imbalance_after=after,
            imbalance_bound=bound,
            imbalance_next=None,
            tokens_peak_before=peaks[0][0],
            tokens_p99_before=peaks[0][1],
            tokens_peak_after=peaks[1][0],
            tokens_p99_after=peaks[1][1],
            slots_moved=moved.slots,
            bytes_moved=moved.bytes,
            decision=decision,
            reason=reason,
            left_out=self._left_out(after, bound),
            move_price=self.options.prices,
            saved_seconds=saved,
            move_seconds=moving,
            seconds_per_token=None if model is None else model.seconds_per_token,
            bytes_per_slot=None if model is None else model.bytes_per_slot,
            bandwidth_inside=None if model is None else model.bandwidth_inside,
            bandwidth_between=None if model is None else model.bandwidth_between,
            trust=None if model is None else model.trust,
            time_curve=None if curve is None else tuple(zip(curve.tokens, curve.nanoseconds, strict=True)),
            iteration_seconds=self.pace.median,
            iteration_seconds_next=None,
            repaid=None,
            router_ties=self.router_ties,
            num_candidates=self.options.candidates,
            seed=self.options.seed,
            seconds=seconds,
            engine=self.planned.engine,
            placement_digest=self.planned.placement.digest(),
            dry_run=decision == "dry run",
            last_applied=self.last_applied,
        )

    def _modelled(self) -> tuple[float | None, float | None]:
        """Seconds saved until the next rebalance, and seconds of the moves."""
        if self.model is None:
            return None, None
        load, curve = self.planned.load, self.options.time_curve
        time = load if curve is None else curve.time(load)
        second = 1e-9 if curve is not None else self.model.seconds_per_token
        before, after = (
            layer_cost(time, placement.expert_of_slot.to(time.device), placement.num_gpus).sum()
            for placement in (self.old, self.target)
        )
        inside, between = moved_slots(self.old, self.target, self.topology).sum(0).tolist()
        saved = int(before - after) * second * self.steps_until_next / len(load) * self.model.trust
        return saved, self.model.seconds(inside, between)

    def _left_out(self, after: Sequence[float], bound: Sequence[float]) -> tuple[str, ...]:
        """Layer by layer, why the plan stops short of the bound, or this of the plan."""
        over = (self.target.expert_of_slot != self.planned.placement.expert_of_slot).sum(1).tolist()
        is_priced = any(self.options.prices)
        texts = []
        for reached, possible, slots in zip(after, bound, over, strict=True):
            if slots:
                texts.append(f"{slots} slots are over the budget")
            else:
                is_uneven = reached - possible > _UNEVEN
                texts.append("no other move was found that repays itself" if is_uneven and is_priced else "")
        return tuple(texts)


def skipped_event(
    iteration: int, layers: tuple[str, ...], reason: str, last_applied: int, seconds: dict[str, float]
) -> RebalanceEvent:
    """The record of a rebalance for which there is no load that the ranks agree on."""
    return RebalanceEvent(
        iteration=iteration,
        layers=layers,
        steps=0,
        imbalance_before=(),
        imbalance_after=(),
        imbalance_bound=(),
        imbalance_next=None,
        tokens_peak_before=0,
        tokens_p99_before=0,
        tokens_peak_after=0,
        tokens_p99_after=0,
        slots_moved=0,
        bytes_moved=0,
        decision="skipped",
        reason=reason,
        left_out=(),
        move_price=(0.0, 0.0),
        saved_seconds=None,
        move_seconds=None,
        seconds_per_token=None,
        bytes_per_slot=None,
        bandwidth_inside=None,
        bandwidth_between=None,
        trust=None,
        time_curve=None,
        iteration_seconds=0.0,
        iteration_seconds_next=None,
        repaid=None,
        router_ties=(),
        num_candidates=0,
        seed=0,
        seconds=seconds,
        engine="",
        placement_digest=0,
        dry_run=False,
        last_applied=last_applied,
    )


def completed(event: RebalanceEvent, load: Tensor, plan: Placement, pace: Pace, repaid: bool | None) -> RebalanceEvent:
    """The record with what the next window told."""
    return replace(event, imbalance_next=by_layer(load, plan), iteration_seconds_next=pace.median, repaid=repaid)


def by_layer(load: Tensor, placement: Placement) -> tuple[float, ...]:
    """Imbalance of each layer, the mean over the steps."""
    return tuple(imbalance(load, placement).mean(0).tolist())


def _tokens(load: Tensor, placement: Placement) -> tuple[int, int]:
    """Peak and 99th percentile of tokens per GPU and step, all layers added up."""
    tokens = gpu_tokens(load, placement.expert_of_slot.to(load.device), placement.num_gpus).sum(1).flatten()  # [T · M]
    return int(tokens.max()), int(torch.quantile(tokens.double(), 0.99, interpolation="higher"))
