"""The account of a rebalance: its inputs, the figures that follow from them, and the event that reports them.

Shapes: T steps, L layers, M GPUs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from distplb.core.balance import balancedness_sglang, balancedness_vllm, max_violation
from distplb.core.bound import lower_bound
from distplb.core.cost import busiest_gpu, gpu_tokens, imbalance, mean_of_known, nan_to_none, steps_with_tokens
from distplb.core.placement import Placement
from distplb.core.price import MoveModel, moved_slots
from distplb.core.topology import Topology
from distplb.migrate.transfer import MoveTotals
from distplb.planning.options import PlanOptions
from distplb.planning.plan import PlanResult
from distplb.records.events import RebalanceEvent
from distplb.train.stop_loss import Pace

__all__ = ["AS_EVEN", "Account", "completed"]

AS_EVEN = "the GPUs differ no more than by chance"
_NO_TOKENS = "the layer had no tokens"

_HOTTEST = 4  # experts of each layer that are listed
_UNEVEN = 1e-3  # a layer whose imbalance is this close to the bound needs no reason


@dataclass(frozen=True, kw_only=True)
class Account:
    """One rebalance, from the window to the plan; `event` builds its event.

    Args:
        iteration: the job's iteration.
        layers: the L names.
        topology: the nodes and GPUs of one EP group.
        old: the placement in force while the window was counted.
        planned: the plan, the load that it was made from, and the engine. All tensors are on the host, so that the
            event can be built in the background without a kernel launch or a wait for the GPU.
        target: the part of the plan that is carried out.
        left_alone: by layer, whether it stays as it is because its GPUs differ no more than by chance.
        options: options of the search.
        model: what moves cost, if that is known.
        pace: the pace of the iterations before the rebalance.
        steps_until_next: steps until the next rebalance, as assumed by the price.
        router_ties: by layer, the share of tokens that were routed by chance.
        last_applied: the iteration at which the last completed rebalance began.
        stays: the layers that could not be moved, each with the reason.
    """

    iteration: int
    layers: tuple[str, ...]
    topology: Topology
    old: Placement
    planned: PlanResult
    target: Placement
    left_alone: tuple[bool, ...]
    options: PlanOptions
    model: MoveModel | None
    pace: Pace
    steps_until_next: float
    router_ties: tuple[float | None, ...]
    last_applied: int
    stays: Mapping[int, str] = field(default_factory=dict)

    def event(self, moved: MoveTotals, decision: str, reason: str, seconds: dict[str, float]) -> RebalanceEvent:
        """Build the event, without the fields that the next window fills in."""
        load, model, curve = steps_with_tokens(self.planned.load), self.model, self.options.time_curve
        return RebalanceEvent(
            iteration=self.iteration,
            layers=self.layers,
            num_experts=load.shape[2],
            num_nodes=self.topology.num_nodes,
            **(self._of_load(load) if len(load) else {}),
            slots_moved=moved.slots,
            bytes_inside=moved.bytes_inside,
            bytes_between=moved.bytes_between,
            decision=decision,
            reason=reason,
            move_price=self.options.prices,
            seconds_per_token=None if model is None else model.seconds_per_token,
            bytes_per_slot=None if model is None else model.bytes_per_slot,
            bandwidth_inside=None if model is None else model.bandwidth_inside,
            bandwidth_between=None if model is None else model.bandwidth_between,
            trust=None if model is None else model.trust,
            time_curve=None if curve is None else tuple(zip(curve.tokens, curve.nanoseconds, strict=True)),
            iteration_seconds=self.pace.median,
            router_ties=self.router_ties,
            num_candidates=self.options.candidates,
            seed=self.options.seed,
            seconds=seconds,
            engine=self.planned.engine,
            placement_digest=self.planned.placement.digest(),
            dry_run=decision == "dry run",
            last_applied=self.last_applied,
        )

    def _of_load(self, load: Tensor) -> dict[str, Any]:
        """The fields that follow from the load; at least one step has tokens."""
        before, after = (_tokens(load, placement) for placement in (self.old, self.target))  # [T, L, M]
        saved, moving = self._modelled()
        reached = by_layer(load, self.target)
        bound = nan_to_none(lower_bound(load, self.topology, self.target.num_slots))
        return {
            "steps": len(load),
            "imbalance_before": by_layer(load, self.old),
            "imbalance_after": reached,
            "imbalance_bound": bound,
            **_memory(before, "before"),
            **_memory(after, "after"),
            "tokens_of_gpu_before": _table(before.sum(0)),
            "tokens_of_gpu_after": _table(after.sum(0)),
            "hottest_experts": _hottest(load.sum(0)),
            "balancedness_vllm_before": balancedness_vllm(before),
            "balancedness_vllm_after": balancedness_vllm(after),
            "balancedness_sglang_before": balancedness_sglang(before),
            "balancedness_sglang_after": balancedness_sglang(after),
            "max_violation": max_violation(load),
            "left_out": self._left_out(reached, bound),
            "saved_seconds": saved,
            "move_seconds": moving,
        }

    def _modelled(self) -> tuple[float | None, float | None]:
        """Modelled seconds: saved until the next rebalance, and spent on moves."""
        if self.model is None:
            return None, None
        load, curve = self.planned.load, self.options.time_curve
        second = 1e-9 if curve is not None else self.model.seconds_per_token
        before, after = (busiest_gpu(load, placement, curve)[0].sum() for placement in (self.old, self.target))
        inside, between = moved_slots(self.old, self.target, self.topology).sum(0).tolist()
        # Like the price, count all steps of the window, even those without tokens: as many will follow.
        saved = (before - after).item() * second * self.steps_until_next / len(load) * self.model.trust
        return saved, self.model.seconds(inside, between)

    def _left_out(self, after: Sequence[float | None], bound: Sequence[float | None]) -> tuple[str, ...]:
        """By layer, why the plan does not reach the bound, or the target not the plan."""
        over = (self.target.expert_of_slot != self.planned.placement.expert_of_slot).sum(1).tolist()
        is_priced = any(self.options.prices)
        texts = []
        for layer, (reached, possible, slots) in enumerate(zip(after, bound, over, strict=True)):
            if layer in self.stays:
                texts.append(self.stays[layer])
            elif reached is None or possible is None:
                texts.append(_NO_TOKENS)
            elif self.left_alone[layer]:
                texts.append(AS_EVEN)
            elif slots:
                texts.append(f"{slots} {'slot is' if slots == 1 else 'slots are'} over the budget")
            else:
                is_uneven = reached - possible > _UNEVEN
                texts.append("the search found no other move that pays off" if is_uneven and is_priced else "")
        return tuple(texts)


def completed(event: RebalanceEvent, load: Tensor, plan: Placement, pace: Pace, repaid: bool | None) -> RebalanceEvent:
    """Return the event with the results of the next window."""
    return replace(event, imbalance_next=by_layer(load, plan), iteration_seconds_next=pace.median, repaid=repaid)


def by_layer(load: Tensor, placement: Placement) -> tuple[float | None, ...]:
    """Imbalance of each layer, the mean over the steps in which it has tokens; None if there are none."""
    return nan_to_none(mean_of_known(imbalance(load, placement), dim=0))


def _tokens(load: Tensor, placement: Placement) -> Tensor:
    return gpu_tokens(load, placement.expert_of_slot.to(load.device), placement.num_gpus)


def _memory(of_gpu: Tensor, when: str) -> dict[str, Any]:
    """Peak and 99th percentile of tokens per GPU and step, summed over layers: what memory must hold.

    Rounded up to whole tokens, because replicas may share an expert's tokens in fractions.
    """
    tokens = of_gpu.sum(1).flatten()  # [T · M]
    p99 = torch.quantile(tokens.double(), 0.99, interpolation="higher").item()
    return {f"tokens_peak_{when}": math.ceil(tokens.max().item()), f"tokens_p99_{when}": math.ceil(p99)}


def _table(values: Tensor) -> tuple[tuple[float, ...], ...]:
    return tuple(map(tuple, values.tolist()))


def _hottest(load: Tensor) -> tuple[tuple[tuple[int, int], ...], ...]:
    """By layer of `[L, E]`, the experts with most tokens and their tokens; ties go to the lower expert id."""
    tokens, experts = load.sort(dim=1, descending=True, stable=True)
    few = slice(0, _HOTTEST)
    pairs = zip(experts[:, few].tolist(), tokens[:, few].tolist(), strict=True)
    return tuple(tuple(zip(*of_layer, strict=True)) for of_layer in pairs)
