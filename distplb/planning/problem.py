"""One planning problem: a load, a topology, and the three calls that every search is made of.

Shapes: T steps, L layers, E experts, P slots, M GPUs, K candidates.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distplb.cost import layer_cost
from distplb.errors import DistplbError
from distplb.load import scaled
from distplb.packing.engines import engine_named
from distplb.placement import Placement
from distplb.planning.relabel import relabelled
from distplb.topology import Topology

__all__ = ["Problem"]


class Problem:
    """Costs of candidates, the placement behind a candidate, and the finish on a placement; all of it pure.

    >>> problem = Problem(torch.tensor([[[9, 1, 5, 5]]]), Topology(1, 2))
    >>> problem.costs(torch.tensor([0, 1]))
    tensor([[10],
            [10]])

    Args:
        load: `[T, L, E]` int64 tokens, the same on every rank; the search runs on its device.
        topology: of the EP group.
        num_slots: P; E where None. Replicas (P > E) are not planned yet.
        current: the placement in force, which a layer keeps unless the plan costs it less.
        seed: with a candidate's integer, all that is random.
        engine: its name; the fastest that is there where None.

    Raises:
        DistplbError: if the slots cannot be spread evenly, or `current` is of another shape or has replicas.
    """

    def __init__(
        self,
        load: Tensor,
        topology: Topology,
        *,
        num_slots: int | None = None,
        current: Placement | None = None,
        seed: int = 0,
        engine: str | None = None,
    ) -> None:
        num_layers, num_experts = load.shape[1:]
        check_slots(topology, num_experts, num_slots)
        check_current(current, num_layers, num_experts, topology)
        self.num_gpus = topology.num_gpus
        self.current = current
        self.seed = seed
        self.engine_name, self._engine = engine_named(engine)
        self._load = scaled(load)
        self._weight = self._load.sum(0)  # [L, E]

    def costs(self, candidates: Tensor) -> Tensor:
        """`[K, L]` int64: the cost of every candidate `[K]` in every layer."""
        num_layers = self._weight.shape[0]
        candidate = candidates.to(self._weight.device).repeat_interleave(num_layers)  # [K·L]
        items = self._packed(candidate).unflatten(0, (len(candidates), num_layers))
        return layer_cost(self._load, items, self.num_gpus)

    def build(self, candidate: Tensor) -> Placement:
        """The placement of one candidate for each layer, `[L]`."""
        return self._placement(self._packed(candidate.to(self._weight.device)))

    def polish(self, placement: Placement) -> Placement:
        """Pair swaps and the last clean-up where they cost no more; then the names under which most stay in place.

        A layer whose current placement costs no more keeps it.
        """
        items = placement.expert_of_slot.to(self._weight.device)
        items = self._no_dearer(self._engine.finish(self._weight, items, self.num_gpus), items)
        if self.current is None:
            return self._placement(items)
        moved = relabelled(self._placement(items), self.current).expert_of_slot.to(items.device)
        return self._placement(self._no_dearer(self.current.expert_of_slot.to(items.device), moved))

    def _packed(self, candidate: Tensor) -> Tensor:
        """`[K·L, P]`: each candidate's packing of each layer."""
        num_layers = self._weight.shape[0]
        repeats = len(candidate) // num_layers
        layer = torch.arange(num_layers, device=self._weight.device).repeat(repeats)
        weight = self._weight.repeat(repeats, 1)
        return self._engine.pack(weight, self.num_gpus, layer=layer, candidate=candidate, seed=self.seed)

    def _no_dearer(self, wanted: Tensor, other: Tensor) -> Tensor:
        """Layer by layer, `wanted` where it costs no more than `other`, which stands elsewhere; both `[L, P]`."""
        cost = layer_cost(self._load, torch.stack([wanted, other]), self.num_gpus)  # [2, L]
        return torch.where((cost[0] <= cost[1])[:, None], wanted, other)

    def _placement(self, items: Tensor) -> Placement:
        return Placement(items, self._weight.shape[1], self.num_gpus)


def check_slots(topology: Topology, num_experts: int, num_slots: int | None) -> None:
    """Refuse slots that cannot be spread over the GPUs, and replicas."""
    if num_slots is not None and num_slots != num_experts:
        raise DistplbError(
            f"num_slots is {num_slots} for {num_experts} experts: replicas are not planned yet; "
            f"pass num_slots={num_experts} or leave it out"
        )
    topology.slots_per_gpu(num_experts)


def check_current(current: Placement | None, num_layers: int, num_experts: int, topology: Topology) -> None:
    """Refuse a current placement of other layers, experts or GPUs than the load's."""
    if current is None:
        return
    found = (current.num_layers, current.num_experts, current.num_slots, current.num_gpus)
    wanted = (num_layers, num_experts, num_experts, topology.num_gpus)
    if found != wanted:
        raise DistplbError(
            f"current has (layers, experts, slots, GPUs) = {found}, the load and topology {wanted}; "
            "pass the placement in force of the same model"
        )
