"""What tokens and moves cost in a job: as its events record it, or as assumed where only a trace is known."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from distplb.core.price import MoveModel, TimeCurve
from distplb.errors import DistplbError
from distplb.records.events import RebalanceEvent
from distplb.records.trace import Trace

__all__ = [
    "BYTES_PER_PARAMETER",
    "EXPERT_PARAMETERS",
    "FLOPS",
    "OPERATIONS",
    "AssumedJob",
    "recorded_costs",
    "steps_stood_for",
    "tokens_of_mean_gpu",
]

# A job of the size of DeepSeek-V3 in bfloat16 on H100s.
EXPERT_PARAMETERS = 3 * 7168 * 2048  # of one expert: gate, up and down
BYTES_PER_PARAMETER = 2 + 4 + 4 + 4  # weight, master copy, two moments
OPERATIONS = 6  # floating-point operations of a parameter and token, forward and backward
FLOPS = 400e12  # that a GPU reaches in them, in a second


@dataclass(frozen=True, kw_only=True)
class AssumedJob:
    """What tokens and moves cost where they were not measured; by default in a job of the size of DeepSeek-V3 on H100s.

    Args:
        seconds_per_token: of one expert, forward and backward.
        bytes_per_slot: of one expert, with its optimizer state.
        tokens_per_gpu: of the mean GPU in a step and layer that has any, each token counted once for each of its
            experts. A trace's tokens are scaled to it: those of a small job stand for those of a large one.
        bandwidth_inside: bytes per second that each GPU sends and receives inside a node while all do: NVLink.
        bandwidth_between: likewise between nodes: 400 Gbit/s.
    """

    seconds_per_token: float = OPERATIONS * EXPERT_PARAMETERS / FLOPS
    bytes_per_slot: int = BYTES_PER_PARAMETER * EXPERT_PARAMETERS
    tokens_per_gpu: float = 4096 * 8
    bandwidth_inside: float = 300e9
    bandwidth_between: float = 40e9

    def model(self, trace: Trace, num_gpus: int) -> MoveModel:
        """In the tokens of a trace, each of which stands for several where the traced job was small.

        Raises:
            DistplbError: if the trace has no tokens, or one of the numbers is not positive.
        """
        mean = tokens_of_mean_gpu(trace.load, num_gpus)
        if not mean:
            raise DistplbError("the trace has no tokens; pass one of a job that trains")
        return MoveModel(
            seconds_per_token=self.seconds_per_token * self.tokens_per_gpu / mean,
            bytes_per_slot=self.bytes_per_slot,
            bandwidth_inside=self.bandwidth_inside * num_gpus,
            bandwidth_between=self.bandwidth_between * num_gpus,
        )


def tokens_of_mean_gpu(load: Tensor, num_gpus: int) -> float:
    """In a step and layer, over those that have tokens; 0 where none has.

    Args:
        load: `[T, L, E]`, tokens of each expert.
        num_gpus: M.
    """
    counted = int(load.any(2).sum())
    return float(load.sum()) / max(1, counted) / num_gpus


def recorded_costs(events: Iterable[RebalanceEvent]) -> tuple[MoveModel, TimeCurve | None] | None:
    """The model and curve that priced the last priced rebalance of a job; None where no rebalance had a model."""
    costs = None
    for event in events:
        token, slot, trust = event.seconds_per_token, event.bytes_per_slot, event.trust
        if token and slot and trust and event.bandwidth_inside and event.bandwidth_between:
            curve = None if event.time_curve is None else TimeCurve(*zip(*event.time_curve, strict=True))
            costs = MoveModel(token, slot, event.bandwidth_inside, event.bandwidth_between, trust), curve
    return costs


def steps_stood_for(trace: Trace, side_by_side: int = 1) -> float:
    """How many steps, one after the other, each recorded step stands for, as far as the iterations tell.

    A window keeps a sample of the steps, and Megatron-LM writes every so many iterations: of iterations that are
    so far apart only one was recorded. Steps that a window left out within an iteration are not known of.

    Args:
        trace: with its iterations, also those without tokens: that a row is empty does not make the others last longer.
        side_by_side: EP groups whose steps at the same time are all in the trace, as in Megatron-LM's files; 1 for
            a `Rebalancer`'s, where each step is that of one group.
    """
    distinct = len(trace.iteration.unique())
    span = int(trace.iteration[-1] - trace.iteration[0])
    return (span / (distinct - 1) if distinct > 1 else 1.0) / side_by_side
