"""The saved state of a rebalancer, by layer, so that it loads on any number of GPUs and any split into pipeline stages.

It holds only tensors, keyed by their layer: a checkpoint that several ranks write keeps all entries whose keys differ,
but only one of those with equal keys. Shapes: L layers, P slots.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from distplb.core.placement import Placement
from distplb.errors import DistplbError

__all__ = ["Counters", "Saved"]

_VERSION = 3


class Counters(NamedTuple):
    """The counters of a rebalancer."""

    iteration: int
    rebalances: int
    enabled: bool
    strikes: int


class Saved(NamedTuple):
    """Placement in force, first placement, and counters."""

    placement: Placement
    first: Placement
    counters: Counters

    def to_state(self, names: Sequence[str]) -> dict[str, Any]:
        """Return a state dict of tensors, keyed by layer name."""
        layers = {
            name: {
                "expert_of_slot": self.placement.expert_of_slot[index].clone(),
                "first": self.first.expert_of_slot[index].clone(),
                "counters": torch.tensor([int(value) for value in self.counters], device="cpu"),
            }
            for index, name in enumerate(names)
        }
        return {"version": torch.tensor(_VERSION, device="cpu"), "layers": layers}

    @classmethod
    def from_state(cls, state: Mapping[str, Any], names: Sequence[str], num_experts: int, num_gpus: int) -> Saved:
        """Read the named layers from a state, for any number of GPUs; the state may hold other layers too.

        Raises:
            DistplbError: if the state is not from `state_dict`, has another version, lacks a layer, or has another
                number of experts.
        """
        if "version" not in state or "layers" not in state:
            raise DistplbError("state is not one of a Rebalancer; pass what Rebalancer.state_dict returned")
        version = int(state["version"])
        if version != _VERSION:
            raise DistplbError(f"state has version {version}; this distplb reads version {_VERSION}")
        layers = state["layers"]
        missing = [name for name in names if name not in layers]
        if missing:
            raise DistplbError(
                f"state has no layer {missing[0]!r} (its layers: {', '.join(sorted(layers)) or 'none'}); load the "
                "state of this model"
            )
        placements = []
        for key in ("expert_of_slot", "first"):
            tables = [torch.as_tensor(layers[name][key], device="cpu") for name in names]
            for name, table in zip(names, tables, strict=True):
                if tuple(table.shape) != (num_experts,):
                    raise DistplbError(
                        f"state has {table.numel()} slots in layer {name!r} where the model has {num_experts}; load "
                        "the state of this model"
                    )
            placements.append(Placement(torch.stack(tables), num_experts, num_gpus))
        # Layers may come from several pipeline stages: if rebalancing was off in one of them, it stays off.
        counters = torch.stack([torch.as_tensor(layers[name]["counters"], device="cpu") for name in names])  # [L, 4]
        iteration, rebalances, _, strikes = counters.max(0).values.tolist()
        enabled = bool(counters[:, 2].min())
        return cls(placements[0], placements[1], Counters(iteration, rebalances, enabled, strikes))
