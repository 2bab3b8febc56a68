"""The record of one rebalance. Shapes: L layers."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["RebalanceEvent"]


@dataclass(frozen=True, kw_only=True)
class RebalanceEvent:
    """What one rebalance saw, decided and did; equal on all ranks but for the seconds.

    Imbalances are fullest GPU / mean GPU, for each layer the mean over the steps of a window.

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
        slots_moved: slots that received another expert, over all layers.
        bytes_moved: what crossed from rank to rank, over all ranks.
        seconds: on this rank, by stage.
        engine: the packing engine's name.
        placement_digest: of the placement that was planned.
        dry_run: whether nothing was moved because that was asked for.
    """

    iteration: int
    layers: tuple[str, ...]
    steps: int
    imbalance_before: tuple[float, ...]
    imbalance_after: tuple[float, ...]
    imbalance_bound: tuple[float, ...]
    imbalance_next: tuple[float, ...] | None
    slots_moved: int
    bytes_moved: int
    seconds: dict[str, float]
    engine: str
    placement_digest: int
    dry_run: bool
