"""The input of `plan` and `compare`: a load, the placement in force, and options that fit both.

Shapes: T steps, L layers, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from distplb.cli.empty_parts import EmptyParts
from distplb.core.bound import lower_bound
from distplb.core.cost import steps_with_tokens
from distplb.core.counts import as_tokens
from distplb.core.placement import Placement, load_placement
from distplb.core.topology import Topology
from distplb.planning.greedy import contiguous
from distplb.planning.options import PlanOptions
from distplb.records.read_loads import read_loads

__all__ = ["PlanRequest"]


@dataclass(frozen=True, eq=False)
class PlanRequest:
    """A load and everything needed to plan for it.

    Args:
        path: file of the load.
        load: `[T, L, E]` int64; only the steps that have tokens, or all if none has.
        layers: L names.
        topology: topology of the EP group.
        options: options of the search, with the placement in force as `current`.
        in_force: the placement in force.
        has_steps: whether the file has steps; if not, it is one step, the sum over several.
        empty_parts: parts without tokens of the load as read.
    """

    path: Path
    load: Tensor
    layers: tuple[str, ...]
    topology: Topology
    options: PlanOptions
    in_force: Placement
    has_steps: bool
    empty_parts: EmptyParts

    @classmethod
    def read(cls, path: Path, topology: Topology, options: PlanOptions, current: Path | None) -> PlanRequest:
        """Read the load, and the placement in force, which is contiguous if there is no file.

        Raises:
            DistplbError: if a file cannot be read, or options do not fit together.
        """
        loads = read_loads(path)
        load = as_tokens(loads.load, layers=loads.layers)
        _, num_layers, num_experts = load.shape
        replace(options, move_price=0.0).check(topology, num_layers, num_experts)
        if current is None:
            table = contiguous(load[0], topology, options.slots(num_experts))
            in_force = Placement(table, num_experts, topology.num_gpus)
        else:
            in_force = load_placement(current, loads.layers, num_experts, topology.num_gpus, all_layers=True)
        options = replace(options, current=in_force)
        options.check(topology, num_layers, num_experts)
        empty_parts = EmptyParts.of(load, loads.layers)
        if empty_parts.counted_steps:
            load = steps_with_tokens(load)
        return cls(path, load, loads.layers, topology, options, in_force, loads.load.dim() == 3, empty_parts)

    def bound(self, load: Tensor) -> Tensor:
        """`[L]` float64: lower bound of the imbalance of any placement with these options on a load."""
        groups, experts = self.options.num_groups, load.shape[-1]
        if groups is not None and groups % self.topology.num_nodes:
            groups = None  # in mode "permute", a block of whole GPUs may spread a group over nodes
        return lower_bound(load, self.topology, self.options.slots(experts), groups)

    def cluster_as_json(self) -> dict[str, Any]:
        """Fields of a command's JSON object: the cluster that is planned for."""
        return {
            "nodes": self.topology.num_nodes,
            "gpus_per_node": self.topology.gpus_per_node,
            "slots": self.in_force.num_slots,
        }
