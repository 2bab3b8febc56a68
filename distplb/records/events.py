"""The record of one rebalance, as a value and as JSON. Shapes: L layers, M GPUs."""

from __future__ import annotations

from dataclasses import dataclass

from distplb.records.json_lines import JsonRecord

__all__ = ["EVENT_FORMAT", "RebalanceEvent"]

EVENT_FORMAT = "distplb.event"
# Types of the fields without a default; the others have the type of their default.
_KINDS = {"iteration": int, "layers": tuple, "decision": str, "reason": str, "seconds": dict, "last_applied": int}


@dataclass(frozen=True, kw_only=True)
class RebalanceEvent(JsonRecord):
    """What one rebalance measured, decided and did; the same on all ranks, except for `seconds`.

    Imbalance is busiest GPU / mean GPU in tokens. A layer's imbalance is the mean over those steps of a window in which
    the layer had tokens, or None if it never had any. Means over layers and steps leave out those without tokens.
    Measured values are rank 0's. "Under the plan" means under the part of the plan that was chosen to be carried out.
    With the load and the placement in force, the recorded options reproduce the planned placement bit for bit.

    Args:
        iteration: calls of `Rebalancer.step` so far, including this one.
        layers: names of the L layers; every field that has a value for each layer is in this order.
        num_experts: E.
        num_nodes: nodes of the EP group, over which its GPUs are spread evenly.
        steps: steps that had tokens in the window that the plan was made from. 0 if no step had any: the load is
            unknown then, and the fields that depend on it keep their defaults.
        imbalance_before: by layer, in this window, under the placement in force while it was counted.
        imbalance_after: by layer, in this window, from which the plan was made, under the plan.
        imbalance_bound: by layer, in this window, a lower bound that no placement can beat.
        imbalance_next: by layer, in the **next** window, which the plan had not seen, under the plan. None until that
            window has been counted; the record is then issued a second time, complete. After a dry run it is the
            imbalance that the plan would have had.
        tokens_peak_before: tokens of the busiest GPU in the busiest step, summed over layers: what memory must hold.
        tokens_p99_before: the 99th percentile of tokens per GPU and step, summed over layers. Both values are integers,
            rounded up where replicas share the tokens of their expert.
        tokens_peak_after, tokens_p99_after: the same in this window under the plan.
        tokens_of_gpu_before: `[L, M]`, tokens in the window, summed over steps, under the placement in force; integers,
            or floats if there are replicas, which share the tokens of their expert evenly.
        tokens_of_gpu_after: the same under the plan.
        hottest_experts: by layer, (expert, its tokens in the window) for the hottest experts, hottest first.
        balancedness_vllm_before, balancedness_vllm_after: tokens of the mean GPU / tokens of the busiest GPU, both
            summed over layers and steps before dividing, in (0, 1]; see `distplb.core.balance`.
        balancedness_sglang_before, balancedness_sglang_after: mean GPU / busiest GPU, averaged over layers and steps.
        max_violation: MaxVio: hottest expert / mean expert - 1, averaged over layers and steps. It measures the router;
            no placement changes it.
        slots_moved: slots that received another expert, over all layers.
        bytes_inside, bytes_between: bytes sent from rank to rank, over all ranks, inside nodes and between nodes.
        decision: "moved", "kept" (nothing moved), "dry run", "stopped" (rebalancing turned itself off) or "skipped". A
            rebalance is skipped if the ranks' digests of the counted steps or of the placement differ; if experts are
            trained with other settings on some rank, or no longer receive gradients; if no layer could be moved; or if
            it was refused, with `on_refusal="skip"`. If it is skipped before there is a plan, the load is unknown, and
            the fields that depend on it keep their defaults.
        reason: why, in words.
        left_out: by layer, why moves that would balance it, or seemed to, were not made; empty if there is nothing to
            report.
        move_price: price of a moved slot inside a node and between nodes, in tokens of the window.
        saved_seconds: modelled seconds that the plan saves until the next rebalance, multiplied by `trust`; None
            without a price.
        move_seconds: modelled seconds that the moves take; None without a price.
        seconds_per_token, bytes_per_slot, bandwidth_inside, bandwidth_between, trust: what the price was computed from,
            as in `MoveModel`; None without a price.
        time_curve: (tokens, nanoseconds) at each point of the time curve that was balanced; None if tokens were.
        iteration_seconds: seconds of the median iteration before this rebalance; 0 if none was timed.
        iteration_seconds_next: seconds of the median iteration after it; None until the record is issued again.
        repaid: whether faster iterations saved what the rebalance took: False if they certainly did not, True if they
            did or if it is uncertain. None until the record is issued again, and if nothing moved or no iterations
            were timed.
        router_ties: by layer, the share of rank 0's tokens whose last chosen and first rejected score were equal in one
            forward pass of the window; after a permutation these may go to the other expert. None if not checked.
        num_candidates, seed: options of the search.
        seconds: seconds by stage, on this rank.
        engine: name of the packing engine.
        placement_digest: digest of the placement that was planned.
        dry_run: whether nothing was moved because a dry run was requested.
        last_applied: iteration of the last rebalance that was carried out, including this one; 0 if there was none. If
            it falls behind, rebalancing has stopped, for whatever reason.
    """

    FORMAT = EVENT_FORMAT
    TYPES = _KINDS
    REFUSAL = "it is not a rebalance's record ({})"

    iteration: int
    layers: tuple[str, ...]
    decision: str
    reason: str
    seconds: dict[str, float]
    last_applied: int
    num_experts: int = 0
    num_nodes: int = 0
    steps: int = 0
    imbalance_before: tuple[float | None, ...] = ()
    imbalance_after: tuple[float | None, ...] = ()
    imbalance_bound: tuple[float | None, ...] = ()
    imbalance_next: tuple[float | None, ...] | None = None
    tokens_peak_before: int = 0
    tokens_p99_before: int = 0
    tokens_peak_after: int = 0
    tokens_p99_after: int = 0
    tokens_of_gpu_before: tuple[tuple[float, ...], ...] = ()
    tokens_of_gpu_after: tuple[tuple[float, ...], ...] = ()
    hottest_experts: tuple[tuple[tuple[int, int], ...], ...] = ()
    balancedness_vllm_before: float = 1.0
    balancedness_vllm_after: float = 1.0
    balancedness_sglang_before: float = 1.0
    balancedness_sglang_after: float = 1.0
    max_violation: float = 0.0
    slots_moved: int = 0
    bytes_inside: int = 0
    bytes_between: int = 0
    left_out: tuple[str, ...] = ()
    move_price: tuple[float, float] = (0.0, 0.0)
    saved_seconds: float | None = None
    move_seconds: float | None = None
    seconds_per_token: float | None = None
    bytes_per_slot: int | None = None
    bandwidth_inside: float | None = None
    bandwidth_between: float | None = None
    trust: float | None = None
    time_curve: tuple[tuple[int, int], ...] | None = None
    iteration_seconds: float = 0.0
    iteration_seconds_next: float | None = None
    repaid: bool | None = None
    router_ties: tuple[float | None, ...] = ()
    num_candidates: int = 0
    seed: int = 0
    engine: str = ""
    placement_digest: int = 0
    dry_run: bool = False

    @property
    def bytes_moved(self) -> int:
        """Bytes sent from rank to rank, over all ranks."""
        return self.bytes_inside + self.bytes_between
