"""The cost of tokens and moves in a job: as its events recorded it, or assumed if there is only a trace."""

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
OPERATIONS = 6  # floating-point operations per parameter and token, forward and backward
FLOPS = 400e12  # per second, that a GPU reaches in experts


@dataclass(frozen=True, kw_only=True)
class AssumedJob:
    """Assumed cost of tokens and moves that were not measured; by default, a job of the size of DeepSeek-V3 on H100s.

    Args:
        seconds_per_token: time of a token in one expert, forward and backward.
        bytes_per_slot: bytes of one expert with its optimizer state.
        tokens_per_gpu: tokens of the mean GPU in a step and layer that has any; a token counts once for each of its
            experts. A trace's tokens are scaled to this number, so that a small job can stand for a large one.
        bandwidth_inside: bytes per second that each GPU sends and receives inside a node while all GPUs do: NVLink.
        bandwidth_between: the same between nodes: 400 Gbit/s.
    """

    seconds_per_token: float = OPERATIONS * EXPERT_PARAMETERS / FLOPS
    bytes_per_slot: int = BYTES_PER_PARAMETER * EXPERT_PARAMETERS
    tokens_per_gpu: float = 4096 * 8
    bandwidth_inside: float = 300e9
    bandwidth_between: float = 40e9

    def model(self, trace: Trace, num_gpus: int) -> MoveModel:
        """The model in tokens of a trace; if the traced job was small, each of them stands for several.

        Raises:
            DistplbError: if the trace has no tokens, or one of the numbers is not positive.
        """
        mean = tokens_of_mean_gpu(trace.load, num_gpus)
        if not mean:
            raise DistplbError("the trace has no tokens; pass the trace of a job that trains")
        return MoveModel(
            seconds_per_token=self.seconds_per_token * self.tokens_per_gpu / mean,
            bytes_per_slot=self.bytes_per_slot,
            bandwidth_inside=self.bandwidth_inside * num_gpus,
            bandwidth_between=self.bandwidth_between * num_gpus,
        )


def tokens_of_mean_gpu(load: Tensor, num_gpus: int) -> float:
    """Mean tokens per GPU in a step and layer, over those that have tokens; 0 if none has.

    Args:
        load: `[T, L, E]`, tokens of each expert.
        num_gpus: M.
    """
    counted = int(load.any(2).sum())
    return float(load.sum()) / max(1, counted) / num_gpus


def recorded_costs(events: Iterable[RebalanceEvent]) -> tuple[MoveModel, TimeCurve | None] | None:
    """The model and curve of a job's last priced rebalance; None if no rebalance had a model."""
    costs = None
    for event in events:
        token, slot, trust = event.seconds_per_token, event.bytes_per_slot, event.trust
        if token and slot and trust and event.bandwidth_inside and event.bandwidth_between:
            curve = None if event.time_curve is None else TimeCurve(*zip(*event.time_curve, strict=True))
            costs = MoveModel(token, slot, event.bandwidth_inside, event.bandwidth_between, trust), curve
    return costs


def steps_stood_for(trace: Trace, side_by_side: int = 1) -> float:
    """How many consecutive steps each recorded step stands for, as far as the iterations show.

    A window keeps a sample of the steps, and Megatron-LM writes only every few iterations, so recorded iterations may
    be far apart. Steps that a window left out inside an iteration do not show.

    Args:
        trace: the trace with all its iterations, also those without tokens: empty rows do not make others stand for
            more.
        side_by_side: number of EP groups (copies of the same experts) whose simultaneous steps are all in the trace, as
            in Megatron-LM's files; 1 for a `Rebalancer`'s trace, where each step belongs to one group.
    """
    distinct = len(trace.iteration.unique())
    span = int(trace.iteration[-1] - trace.iteration[0])
    return (span / (distinct - 1) if distinct > 1 else 1.0) / side_by_side
