"""The record of one rebalance. Shapes: L layers."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["RebalanceEvent"]


@dataclass(frozen=True, kw_only=True)
class RebalanceEvent:
    """What one rebalance saw, decided and did; equal on all ranks but for the seconds by stage.

    Imbalances are fullest GPU / mean GPU in tokens, for each layer the mean over the steps of a window. What was
    measured is rank 0's measurement. With the load and the placement that was in force, the options in here give the
    plan again, to the bit.

    Args:
        iteration: calls of `Rebalancer.step` so far, this one included.
        layers: the L names, in the order of all that follows.
        steps: in the window that the plan was made from.
        imbalance_before: of this window, under the placement in force while it was counted.
        imbalance_after: of this window, which the plan has seen, under the plan.
        imbalance_bound: what no placement could beat on this window.
        imbalance_next: of the **next** window, which the plan had not seen, under the plan; None until that
            window has been counted. The record is then given a second time, complete. After a dry run it says what
            the plan would have left.
        tokens_peak_before: tokens of the fullest GPU in the fullest step, all layers added up: what memory must hold.
        tokens_p99_before: the 99th percentile of tokens per GPU and step, likewise.
        tokens_peak_after, tokens_p99_after: of the same window under the plan.
        slots_moved: slots that received another expert, over all layers.
        bytes_moved: what crossed from rank to rank, over all ranks.
        decision: "moved", "kept" (nothing moved), "dry run", "stopped" (rebalancing has turned itself off), or
            "skipped" where ranks had different digests: of the steps they had counted, and then nothing is known of the
            load and all that follows from it is empty; or of the placement.
        reason: of the decision, in words.
        left_out: for each layer, why moves that would even it out were not made; empty where there is nothing to say.
        move_price: tokens of the window for a moved slot, inside a node and between nodes.
        saved_seconds: modelled, by the plan until the next rebalance, as far as it is trusted; None without a price.
        move_seconds: modelled, of the moves; None without a price.
        seconds_per_token, bytes_per_slot, bandwidth_inside, bandwidth_between, trust: what the price was made from, as
            in `MoveModel`; None without one.
        time_curve: (tokens, nanoseconds) of the points of the curve that was balanced; None where that was tokens.
        iteration_seconds: the median iteration before this rebalance; 0 where none was timed.
        iteration_seconds_next: the median one after it; None until the record is given a second time.
        repaid: whether iterations became faster by what the rebalance took; None until then, and where nothing moved.
        router_ties: by layer, the share of rank 0's tokens whose last chosen and first rejected score were equal in one
            forward of the window: after a permutation these may go to the other expert. None where nobody looked.
        num_candidates, seed: of the search.
        seconds: on this rank, by stage.
        engine: the packing engine's name.
        placement_digest: of the placement that was planned.
        dry_run: whether nothing was moved because that was asked for.
        last_applied: the iteration of the last rebalance that was carried out, this one included; 0 for none. Where it
            falls behind, rebalancing has stopped, whatever the reason.
    """

    iteration: int
    layers: tuple[str, ...]
    steps: int
    imbalance_before: tuple[float, ...]
    imbalance_after: tuple[float, ...]
    imbalance_bound: tuple[float, ...]
    imbalance_next: tuple[float, ...] | None
    tokens_peak_before: int
    tokens_p99_before: int
    tokens_peak_after: int
    tokens_p99_after: int
    slots_moved: int
    bytes_moved: int
    decision: str
    reason: str
    left_out: tuple[str, ...]
    move_price: tuple[float, float]
    saved_seconds: float | None
    move_seconds: float | None
    seconds_per_token: float | None
    bytes_per_slot: int | None
    bandwidth_inside: float | None
    bandwidth_between: float | None
    trust: float | None
    time_curve: tuple[tuple[int, int], ...] | None
    iteration_seconds: float
    iteration_seconds_next: float | None
    repaid: bool | None
    router_ties: tuple[float | None, ...]
    num_candidates: int
    seed: int
    seconds: dict[str, float]
    engine: str
    placement_digest: int
    dry_run: bool
    last_applied: int
