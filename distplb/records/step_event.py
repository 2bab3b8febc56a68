"""The record of one sampled step of a `StepBalancer`, as a value and as JSON. Shapes: L layers, M GPUs, P slots."""

from __future__ import annotations

from dataclasses import dataclass

from distplb.records.json_lines import JsonRecord

__all__ = ["STEP_FORMAT", "StepEvent"]

STEP_FORMAT = "distplb.step"
# Types of the fields without a default; the others have the type of their default.
_KINDS = {"step": int, "started": float, "layers": tuple, "num_slots": int, "num_nodes": int, "replica_slots": int}
_KINDS |= {"seconds": dict}


@dataclass(frozen=True, kw_only=True)
class StepEvent(JsonRecord):
    """What a `StepBalancer` did in one step, in all layers; the same on all ranks.

    Imbalance is busiest GPU / mean GPU in tokens; None for a layer without tokens in this step.

    Args:
        step: the forwards that each layer has had since the balancer was created, including this one; recomputations
            are not counted.
        started: when the balancer was created, in seconds since 1970, on rank 0. A job that is resumed begins again
            at step 1, with a later `started`.
        layers: names of the L layers; every field that has a value for each layer is in this order.
        num_slots: P.
        num_nodes: nodes of the EP group, over which its GPUs are spread evenly.
        replica_slots: R.
        imbalance_before: by layer, if every token were computed at home.
        imbalance_after: by layer, with the replicas.
        imbalance_bound: by layer, a lower bound that no split with R replica slots inside nodes can beat.
        tokens_of_gpu_before: `[L, M]`, the tokens of each GPU if all were computed at home.
        tokens_of_gpu_after: `[L, M]`, the tokens that each GPU computed; in a dry run, this, `imbalance_after` and
            `replicas` are what would have been.
        replicas: by layer, (slot of the expert, GPU that held the replica, tokens that it computed) for each replica.
        bytes_inside, bytes_between: bytes of weights pushed and gradients brought home, over all layers and ranks,
            inside nodes and between nodes.
        seconds: seconds by part of the step, summed over the layers, the mean over the ranks; on a GPU, of the stream
            that computes. Together they are the time from `dispatch` to the end of `compute`, and of the experts'
            backward. "count": the exchange of counts, on the rank that waited least for the others; "waiting to
            count": what the others waited there; "split"; "push": replicas, as far as the experts had to wait for
            them; "dispatch": between `dispatch` and `compute`, where the caller exchanges tokens; "experts": on the
            mean GPU; "waiting": what the busiest GPU's experts took longer; "push again", "experts backward",
            "waiting backward" and "bring home": the same of the backward. What a recomputation repeats is added. A
            part that did not run, or had not ended when the next step was sampled, is left out.
    """

    FORMAT = STEP_FORMAT
    TYPES = _KINDS
    REFUSAL = "it is not a step's record ({})"

    step: int
    started: float
    layers: tuple[str, ...]
    num_slots: int
    num_nodes: int
    replica_slots: int
    seconds: dict[str, float]
    imbalance_before: tuple[float | None, ...] = ()
    imbalance_after: tuple[float | None, ...] = ()
    imbalance_bound: tuple[float | None, ...] = ()
    tokens_of_gpu_before: tuple[tuple[int, ...], ...] = ()
    tokens_of_gpu_after: tuple[tuple[int, ...], ...] = ()
    replicas: tuple[tuple[tuple[int, int, int], ...], ...] = ()
    bytes_inside: int = 0
    bytes_between: int = 0

    @property
    def num_replicas(self) -> int:
        """Replicas of all layers."""
        return sum(map(len, self.replicas))
