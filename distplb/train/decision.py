"""Decides what to do with a plan, and why: which part is worth its moves, can move, and fits in the budget."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from distplb.core.placement import Placement
from distplb.errors import in_stage
from distplb.migrate.budget import within_budget
from distplb.planning.options import PlanOptions
from distplb.planning.plan import PlanResult
from distplb.train.agreed_options import Agreed
from distplb.train.pricing import Pricer
from distplb.train.rebalance_event import AS_EVEN

__all__ = ["Target", "decision", "target_of", "why_layers_stay", "with_rows_of"]


@dataclass(frozen=True)
class Target:
    """The part of a plan that is worth its moves, and the part that is carried out.

    Args:
        worth: the placement that would be put into force without a budget.
        placement: the placement to put into force.
        left_alone: by layer, whether it stays as it is because its GPUs differ no more than by chance.
        error: why this rank could not compute the target.
    """

    worth: Placement
    placement: Placement
    left_alone: tuple[bool, ...]
    error: Exception | None = None


def target_of(
    planned: PlanResult,
    current: Placement,
    options: PlanOptions,
    *,
    agreed: Agreed,
    pricer: Pricer,
    slot_bytes: int,
    staying: Collection[int],
) -> Target:
    """Compute the part of the plan that is worth its moves, can move and fits in the budget. The same on all ranks.

    Args:
        planned: the plan.
        current: the placement in force.
        options: the options of this plan, with the price of moves.
        agreed: the rebalancer's options.
        pricer: decides which layers are left alone.
        slot_bytes: bytes of an expert with all that travels with it; 0 if nothing travels.
        staying: layers that cannot be moved.
    """
    worth, left_alone = planned.placement, (False,) * current.num_layers
    try:
        worth, left_alone = pricer.worth(planned, current, options)
        worth = with_rows_of(current, worth, staying)
        if agreed.moves.max_bytes is None or not slot_bytes:
            return Target(worth, worth, left_alone)
        curve = options.time_curve
        load = planned.load if curve is None else curve.time(planned.load)
        copies = agreed.comm.size // agreed.topology.num_gpus  # EP groups, each of which moves its own copy
        most = agreed.moves.max_bytes // (slot_bytes * copies)
        return Target(worth, within_budget(load, current, worth, most, agreed.routing.num_groups), left_alone)
    except Exception as failed:  # kept for later: the other ranks are already at the agreement of the move
        return Target(worth, worth, left_alone, in_stage("move", failed))


def decision(
    plan: Placement,
    target: Target,
    current: Placement,
    *,
    layer_names: Sequence[str],
    staying: Mapping[int, str],
    is_dry_run: bool,
    strikes_out: int,
) -> tuple[str, str]:
    """Return what is done with a plan, and why: an event's `decision` and `reason`.

    Args:
        plan: the result of the search.
        target: the part of the plan that would be carried out.
        current: the placement in force.
        layer_names: the names of all L layers.
        staying: the layers that cannot be moved, each with the reason.
        is_dry_run: whether nothing is to be moved.
        strikes_out: how many rebalances in a row did not pay off, if that is too many; else 0.
    """
    why_stay = why_layers_stay(layer_names, staying) if staying else ""
    more = f"; {why_stay}" if staying else ""
    if is_dry_run:
        return "dry run", f"dry_run is set{more}"
    if strikes_out:
        return "stopped", (
            f"{'the last rebalance' if strikes_out == 1 else f'{strikes_out} rebalances in a row'} did not pay off; "
            "set enabled = True to continue, or rebalance less often"
        )
    if plan == current:
        return "kept", "no layer has a placement that is worth its moves"
    if len(staying) == len(layer_names):
        return "skipped", why_stay
    if target.worth == current and any(target.left_alone):
        return "kept", f"{AS_EVEN}, in every layer that would have moved{more}"
    if target.placement == current:
        why = "no other layer is worth its moves" if staying else "no move that pays off fits in max_bytes"
        return "kept", why + more
    return "moved", "the moves lower the cost by more than their price" + more


def why_layers_stay(layer_names: Sequence[str], staying: Mapping[int, str]) -> str:
    """Name the layers that stay, with the reason of the first."""
    names = [layer_names[layer] for layer in sorted(staying)]
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{names[0]}{more} could not be moved: {staying[min(staying)]}"


def with_rows_of(other: Placement, placement: Placement, layers: Collection[int]) -> Placement:
    """Return the placement, with the given layers taken from the other one."""
    if not layers:
        return placement
    table, some = placement.expert_of_slot.clone(), sorted(layers)
    table[some] = other.expert_of_slot[some]
    return Placement(table, placement.num_experts, placement.num_gpus)
