"""What `plan` and `compare` begin with: the load, the placement in force, and options that go with both.

Shapes: T steps, L layers, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from distplb.core.bound import lower_bound
from distplb.core.counts import as_tokens
from distplb.core.placement import Placement, load_placement
from distplb.core.topology import Topology
from distplb.planning.greedy import contiguous
from distplb.planning.options import PlanOptions
from distplb.records.loads import read_loads

__all__ = ["Inputs", "read_inputs"]


@dataclass(frozen=True, eq=False)
class Inputs:
    """A load and what is to be planned for it.

    Args:
        load: `[T, L, E]` int64.
        layers: L names.
        topology: of the EP group.
        options: of the search, with the placement in force as `current`.
        start: that placement.
        has_steps: whether the file has steps; what has none is one step, a sum over some.
    """

    load: Tensor
    layers: tuple[str, ...]
    topology: Topology
    options: PlanOptions
    start: Placement
    has_steps: bool

    def bound(self, load: Tensor) -> Tensor:
        """`[L]` float64: what no placement of these options can beat on a load."""
        groups, experts = self.options.num_groups, load.shape[-1]
        if groups is not None and groups % self.topology.num_nodes:
            groups = None  # blocks of whole GPUs, which mode "permute" keeps, may spread a group over nodes
        return lower_bound(load, self.topology, self.options.slots(experts), groups)


def read_inputs(loads: Path, topology: Topology, options: PlanOptions, current: Path | None) -> Inputs:
    """Read the load, and the placement in force: contiguous where there is no file of it.

    Raises:
        DistplbError: for a file that cannot be read, and what does not go together.
    """
    found = read_loads(loads)
    load = as_tokens(found.load, layers=found.layers)
    _, num_layers, num_experts = load.shape
    replace(options, move_price=0.0).check(topology, num_layers, num_experts)
    if current is None:
        table = contiguous(load[0], topology, options.slots(num_experts))
        start = Placement(table, num_experts, topology.num_gpus)
    else:
        start = load_placement(current, found.layers, num_experts, topology.num_gpus, all_layers=True)
    options = replace(options, current=start)
    options.check(topology, num_layers, num_experts)
    return Inputs(load, found.layers, topology, options, start, found.load.dim() == 3)
