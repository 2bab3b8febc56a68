"""The record of one rebalance, as a value and as JSON. Shapes: L layers, M GPUs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields
from typing import Any

from distplb.errors import DistplbError

__all__ = ["RebalanceEvent"]

_FORMAT, _VERSION = "distplb.event", 1
# Of the fields without a default, which tells that of the others.
_KINDS = {"iteration": int, "layers": tuple, "decision": str, "reason": str, "seconds": dict, "last_applied": int}


@dataclass(frozen=True, kw_only=True)
class RebalanceEvent:
    """What one rebalance saw, decided and did; equal on all ranks but for the seconds by stage.

    Imbalances are busiest GPU / mean GPU in tokens, for each layer the mean over the steps of a window in which it had
    tokens; None for a layer that had none at all. Means over layers and steps leave those without tokens out. What was
    measured is rank 0's measurement. With the load and the placement that was in force, the options in here give the
    plan again, to the bit.

    Args:
        iteration: calls of `Rebalancer.step` so far, this one included.
        layers: the L names, in the order of all that follows.
        num_experts: E.
        num_nodes: of the EP group; its GPUs go evenly on them.
        steps: in the window that the plan was made from, as far as they had tokens. 0 where none had: nothing is known
            of the load then, and all that follows from it is left at its default.
        imbalance_before: of this window, under the placement in force while it was counted.
        imbalance_after: of this window, which the plan has seen, under the plan.
        imbalance_bound: what no placement could beat on this window.
        imbalance_next: of the **next** window, which the plan had not seen, under the plan; None until that
            window has been counted. The record is then given a second time, complete. After a dry run it says what
            the plan would have left.
        tokens_peak_before: tokens of the busiest GPU in the busiest step, all layers added up: what memory must hold.
        tokens_p99_before: the 99th percentile of tokens per GPU and step, likewise. Both are whole tokens, rounded up
            where replicas share their expert's.
        tokens_peak_after, tokens_p99_after: of the same window under the plan.
        tokens_of_gpu_before: `[L, M]`, of the window, all steps added up, under the placement in force; integers, or
            floats where there are replicas, which share their expert's tokens evenly.
        tokens_of_gpu_after: the same under the plan.
        hottest_experts: by layer, (expert, its tokens in the window) of those that got most, the first one most.
        balancedness_vllm_before, balancedness_vllm_after: mean GPU's tokens of all layers and steps, added up, over the
            busiest GPU's, added up: a ratio of sums, in (0, 1]; see `distplb.core.balance`.
        balancedness_sglang_before, balancedness_sglang_after: mean over layers and steps of mean / busiest GPU.
        max_violation: MaxVio, mean over layers and steps of the hottest expert / mean expert - 1. It is the router's:
            no placement changes it.
        slots_moved: slots that received another expert, over all layers.
        bytes_inside, bytes_between: what crossed from rank to rank, over all ranks: inside nodes, and between them.
        decision: "moved", "kept" (nothing moved), "dry run", "stopped" (rebalancing has turned itself off), or
            "skipped": the ranks' digests differed, of the steps they had counted or of the placement; experts are
            trained by other settings on some rank, or by no gradient any more; no layer could be moved; or it was
            refused, with `on_refusal="skip"`. Where that was so before there was a plan, nothing is known of the load,
            and all that follows from it is left at its default.
        reason: of the decision, in words.
        left_out: for each layer, why moves that would even it out, or seemed to, were not made; empty where there is
            nothing to say.
        move_price: tokens of the window for a moved slot, inside a node and between nodes.
        saved_seconds: modelled, by the plan until the next rebalance, as far as it is trusted; None without a price.
        move_seconds: modelled, of the moves; None without a price.
        seconds_per_token, bytes_per_slot, bandwidth_inside, bandwidth_between, trust: what the price was made from, as
            in `MoveModel`; None without one.
        time_curve: (tokens, nanoseconds) of the points of the curve that was balanced; None where that was tokens.
        iteration_seconds: the median iteration before this rebalance; 0 where none was timed.
        iteration_seconds_next: the median one after it; None until the record is given a second time.
        repaid: False where iterations certainly did not become faster by what the rebalance took, True where they did
            or that is in doubt; None until then, and where nothing moved.
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
        """Bytes that crossed from rank to rank, over all ranks."""
        return self.bytes_inside + self.bytes_between

    def to_json(self) -> str:
        """One line: an object of `"format": "distplb.event"`, `"version": 1` and the fields by their names."""
        return "".join(self.json_parts())

    def json_parts(self) -> Iterator[str]:
        """`to_json` in small parts: a thread that makes them can let others have the interpreter in between."""
        yield f'{{"format": "{_FORMAT}", "version": {_VERSION}'
        for one in fields(self):
            yield f', "{one.name}": '
            yield from _parts(getattr(self, one.name))
        yield "}"

    @classmethod
    def from_json(cls, line: str) -> RebalanceEvent:
        """What `to_json` wrote, by this version or by one with fewer fields or more, which are left out.

        Raises:
            DistplbError: if the line is not such an object, lacks a field that all have, or is of a version that is not
                known.
        """
        try:
            document = json.loads(line)
            kind = (document.pop("format"), document.pop("version"))
            if kind != (_FORMAT, _VERSION):
                raise DistplbError(f"it is {kind[0]!r:.40}, version {kind[1]!r:.40}; this distplb reads {_FORMAT} 1")
            return cls(**_known(document))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise DistplbError(f"it is not a rebalance's record ({error})") from error


def _parts(value: Any) -> Iterator[str]:
    """JSON; of a table row by row."""
    if not isinstance(value, tuple) or not value or not isinstance(value[0], tuple):
        yield json.dumps(value, allow_nan=False)
        return
    for number, row in enumerate(value):
        yield f"{', ' if number else '['}{json.dumps(row, allow_nan=False)}"
    yield "]"


def _known(document: dict[str, Any]) -> dict[str, Any]:
    """The fields that this version knows, each checked for its type."""
    known = {one.name: one for one in fields(RebalanceEvent)}
    lacking = [name for name, one in known.items() if one.default is MISSING and name not in document]
    if lacking:
        raise ValueError(f"it lacks {', '.join(lacking)}")
    values = {name: _frozen(value) for name, value in document.items() if name in known}
    for name, value in values.items():
        kind = _KINDS.get(name, type(known[name].default))
        is_number = kind is float and type(value) is int
        if kind is not type(None) and type(value) is not kind and not is_number:
            raise ValueError(f"{name} is {value!r:.40}")
    return values


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list) else value
