"""What `plan` and `compare` are asked for: a load, the placement in force, and options that fit both.

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
    """A load and what is to be planned for it.

    Args:
        path: of the load.
        load: `[T, L, E]` int64; its steps that have tokens, or all where none has.
        layers: L names.
        topology: of the EP group.
        options: of the search, with the placement in force as `current`.
        in_force: that placement.
        has_steps: whether the file has steps; a file without is one step, a sum over some.
        empty_parts: of the load as it was read.
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
        """Read the load, and the placement in force: contiguous where there is no file of it.

        Raises:
            DistplbError: for a file that cannot be read, and for options that do not go together.
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
        """`[L]` float64: what no placement of these options can beat on a load."""
        groups, experts = self.options.num_groups, load.shape[-1]
        if groups is not None and groups % self.topology.num_nodes:
            groups = None  # blocks of whole GPUs, which mode "permute" keeps, may spread a group over nodes
        return lower_bound(load, self.topology, self.options.slots(experts), groups)

    def cluster_as_json(self) -> dict[str, Any]:
        """Fields of a command's object: what is planned for."""
        return {
            "nodes": self.topology.num_nodes,
            "gpus_per_node": self.topology.gpus_per_node,
            "slots": self.in_force.num_slots,
        }
