"""The numbers of a record that are worth following over time, by name, as scalars for TensorBoard."""

from __future__ import annotations

from collections.abc import Iterable

from distplb.core.cost import mean_of_layers
from distplb.records.events import RebalanceEvent
from distplb.records.step_event import StepEvent

__all__ = ["scalars", "step_scalars"]


def scalars(event: RebalanceEvent) -> dict[str, float]:
    """The numbers of a record that are worth following over time.

    `now` describes the window that was planned on, under the placement in force while it was counted; `expected` the
    same window under the plan; `next` the window after it, under the plan, which only a completed record has.

    Tokens, bytes and slots are counts, seconds are seconds, and `last_applied` is an iteration. The others are ratios:
    imbalance >= 1, the mean over the layers that had tokens; balancedness <= 1 (`distplb.core.balance`); MaxVio >= 0.
    """
    if event.imbalance_next is not None:
        next_level = _mean_imbalance("next", event.imbalance_next)
        if event.iteration_seconds_next:
            next_level["seconds/iteration_next"] = event.iteration_seconds_next
        return next_level
    values: dict[str, float] = {f"seconds/{stage}": seconds for stage, seconds in event.seconds.items()}
    values |= {"last_applied": event.last_applied}
    if not event.steps:  # the load is unknown
        return values
    for when, suffix in (("now", "before"), ("expected", "after")):
        values |= _mean_imbalance(when, getattr(event, f"imbalance_{suffix}"))
        for name in ("balancedness_vllm", "balancedness_sglang", "tokens_peak", "tokens_p99"):
            values[f"{name}/{when}"] = getattr(event, f"{name}_{suffix}")
    values |= _mean_imbalance("bound", event.imbalance_bound) | {"max_violation": event.max_violation}
    for name in ("slots_moved", "bytes_inside", "bytes_between"):
        values[f"moved/{name}"] = getattr(event, name)
    if event.iteration_seconds:
        values["seconds/iteration"] = event.iteration_seconds
    return values


def step_scalars(event: StepEvent) -> dict[str, float]:
    """The same of a sampled step: imbalances and replicas are means over layers, the rest are sums.

    `worst` is the imbalance, with replicas, of the layer where it is largest. Bytes are those of all ranks.
    """
    values: dict[str, float] = {}
    for when in ("before", "after", "bound"):
        values |= _mean_imbalance(when, getattr(event, f"imbalance_{when}"))
    known = [level for level in event.imbalance_after if level is not None]
    if known:
        values["imbalance/worst"] = max(known)
    values["replicas"] = event.num_replicas / max(1, len(event.layers))
    values |= {"bytes_inside": event.bytes_inside, "bytes_between": event.bytes_between}
    values |= {f"seconds/{part}": seconds for part, seconds in event.seconds.items()}
    return {f"step/{name}": value for name, value in values.items()}


def _mean_imbalance(name: str, values: Iterable[float | None]) -> dict[str, float]:
    """The mean imbalance over layers; empty if no layer had tokens."""
    mean = mean_of_layers(values)
    return {} if mean is None else {f"imbalance/{name}": mean}
