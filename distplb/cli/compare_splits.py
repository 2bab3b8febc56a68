"""What replicas for single steps would leave of each planner's imbalance, for `distplb compare --replica-slots`.

A load has the tokens of each expert, not those of each source GPU. Replicas and quotas depend on these totals only, so
one GPU stands for all sources here; which tokens would cross GPUs remains unknown.

Shapes: T steps, L layers, E experts, M GPUs, R replica slots on each GPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distplb.cli.plan_request import PlanRequest
from distplb.core.cost import imbalance, mean_of_known
from distplb.core.hashing import hashed
from distplb.core.placement import Placement
from distplb.core.topology import Topology
from distplb.errors import DistplbError
from distplb.splitting.bound import step_bound
from distplb.splitting.split import split

__all__ = [
    "TOLERANCE",
    "Imbalance",
    "Splits",
    "StepsToSplit",
    "bound_of_all",
    "refuse_replica_slots",
]

TOLERANCE = 0.005  # the busiest GPU above the mean, as a fraction: half a percent, as the sentence below the table says
_MOST_SPLITS = 2048  # of one planner; with its bound, each takes a fraction of a millisecond


class Imbalance(NamedTuple):
    """Means over the steps that have tokens.

    Args:
        mean: over layers that have tokens.
        worst: of all layers.
    """

    mean: float
    worst: float

    @classmethod
    def of(cls, by_layer: Tensor) -> Imbalance:
        """From `[L]`, the means over steps; NaN for a layer without tokens."""
        return cls(float(mean_of_known(by_layer)), float(by_layer.nan_to_num(nan=1.0).max()))


class Splits(NamedTuple):
    """One planner's homes, with replicas for every step.

    Args:
        imbalance: what the splits leave.
        homes_alone: what the homes leave of the same steps.
        bound: what no split leaves less of, with these homes.
        replicas: mean number in a step and layer.
    """

    imbalance: Imbalance
    homes_alone: Imbalance
    bound: Imbalance
    replicas: float


@dataclass(frozen=True, eq=False)
class StepsToSplit:
    """The steps to split under each planner's homes; of a long load, a sample.

    Args:
        load: `[T, L, E]` int64, of these steps alone.
        steps: T numbers, of the steps in the load that they are from.
        num_judged: the number of steps of that load.
        topology: nodes and GPUs.
        replica_slots: R.
        engine: of the splits; None for the fastest.
    """

    load: Tensor
    steps: Sequence[int]
    num_judged: int
    topology: Topology
    replica_slots: int
    engine: str | None

    @classmethod
    def of(cls, judged: Tensor, request: PlanRequest, replica_slots: int) -> StepsToSplit:
        """All steps of `judged [T, L, E]`, or one drawn from each of as many equal parts as there is time for."""
        most = max(1, _MOST_SPLITS // judged.shape[1])
        steps = _sample(len(judged), most)
        engine = request.options.engine if request.options.engine in ("reference", "cpu") else None
        return cls(judged[steps], steps.tolist(), len(judged), request.topology, replica_slots, engine)

    def as_json(self) -> dict[str, Any]:
        """Fields of the command's JSON object."""
        return {"replica_slots": self.replica_slots, "tolerance": TOLERANCE, "steps_split": list(self.steps)}

    def under(self, placement: Placement, advance: Callable[[], None]) -> Splits:
        """Split all steps with the homes of a placement that has one slot for each expert.

        Args:
            placement: the homes.
            advance: called after each step.
        """
        homes = placement.inverse.squeeze(2) // placement.slots_per_gpu  # [L, E]
        figures = torch.full((3, *self.load.shape[:2]), math.nan, dtype=torch.float64, device="cpu")  # [3, T, L]
        for at, step in enumerate(self.load):
            for layer in step.any(1).nonzero().flatten().tolist():
                figures[:, at, layer] = self._of_one(step[layer], homes[layer])
            advance()
        left, bound, replicas = (mean_of_known(of_pairs, dim=0) for of_pairs in figures)  # [L] each
        alone = mean_of_known(imbalance(self.load, placement), dim=0)
        return Splits(Imbalance.of(left), Imbalance.of(alone), Imbalance.of(bound), float(mean_of_known(replicas)))

    def _of_one(self, tokens: Tensor, home: Tensor) -> Tensor:
        """`[3]`: imbalance, its bound, and replicas of one step and layer with `tokens [E]` and `home [E]`."""
        counts = torch.zeros(self.topology.num_gpus, len(tokens), dtype=torch.int64, device="cpu")  # [M, E]
        counts[0] = tokens
        chosen = split(
            counts,
            home,
            topology=self.topology,
            replica_slots=self.replica_slots,
            tolerance=TOLERANCE,
            engine=self.engine,
        )
        lowest = self._bound(counts, home, reached=int(chosen.load.amax()))
        bound = lowest * self.topology.num_gpus / int(tokens.sum())
        return torch.tensor([chosen.imbalance, bound, chosen.num_replicas], dtype=torch.float64, device="cpu")

    def _bound(self, counts: Tensor, home: Tensor, reached: int) -> int:
        """`step_bound`, without its search where a split has reached the mean GPU of the busiest node."""
        each = self.topology.gpus_per_node
        of_node = torch.zeros(self.topology.num_nodes, dtype=torch.int64, device="cpu")
        of_node.index_add_(0, home // each, counts.sum(0))
        if reached == -(-int(of_node.amax()) // each):
            return reached
        return step_bound(counts, home, topology=self.topology, replica_slots=self.replica_slots)


def bound_of_all(planners: Sequence[Splits]) -> Imbalance:
    """What no split leaves less of, with any of these planners' homes; other homes may have a lower bound."""
    return Imbalance(*(min(values) for values in zip(*(one.bound for one in planners), strict=True)))


def refuse_replica_slots(request: PlanRequest, replica_slots: int) -> None:
    """Refuse replicas for single steps beside copies of experts that stay.

    Raises:
        DistplbError: if both are asked for.
    """
    num_slots, num_experts = request.in_force.num_slots, request.in_force.num_experts
    if replica_slots and num_slots > num_experts:
        raise DistplbError(
            f"--slots {num_slots} gives some of {num_experts} experts several homes, but --replica-slots "
            f"{replica_slots} needs one home for each; pass --slots {num_experts}, or --replica-slots 0"
        )


def _sample(total: int, most: int) -> Tensor:
    """At most `most` of the numbers below `total`, ascending: all, or one of each of `most` equal parts, by a hash.

    Steps at equal distances could all be of the same EP group or micro-batch.
    """
    if total <= most:
        return torch.arange(total, device="cpu")
    part = torch.arange(most, device="cpu")
    begin, end = part * total // most, (part + 1) * total // most
    return begin + hashed(torch.zeros_like(part), part) % (end - begin)
