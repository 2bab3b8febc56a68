"""One planning problem: a load, a topology, and the three calls that every search is made of.

Shapes: T steps, L layers, E experts, P slots, M GPUs, K candidates.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from distplb.cost import layer_cost
from distplb.load import scaled, widened
from distplb.packing.candidates import Names
from distplb.packing.engines import Engine, engine_named
from distplb.placement import Placement
from distplb.planning.classes import Classes
from distplb.planning.options import SearchOptions
from distplb.planning.policies import Blocks, Flat, Hierarchy, Policy
from distplb.planning.relabel import relabelled
from distplb.topology import Topology

__all__ = ["Problem"]

_EVEN_BITS = 13


class Problem:
    """Costs of candidates, the table behind a candidate, and the finish on a table; all of it pure.

    >>> problem = Problem(torch.tensor([[[9, 1, 5, 5]]]), Topology(1, 2))
    >>> problem.costs(torch.tensor([0, 1]))
    tensor([[10],
            [10]])

    Args:
        load: `[T, L, E]` int64 tokens, the same on every rank; the search runs on its device.
        topology: of the EP group.
        options: what else fixes the plan.

    Raises:
        DistplbError: if load, topology and options do not go together, or the engine is not there.
    """

    def __init__(self, load: Tensor, topology: Topology, options: SearchOptions | None = None) -> None:
        options = SearchOptions() if options is None else options
        options.check(topology, load.shape[1], load.shape[2])
        self.num_gpus = topology.num_gpus
        self.current = options.current
        self.seed = options.seed
        self._slot_class = None if options.slot_class is None else torch.as_tensor(options.slot_class).cpu().numpy()
        num_slots = options.slots(load.shape[2])
        self._load = scaled(load)
        if num_slots > load.shape[2]:  # shares are integer divisions: the rest must not count
            self._load = widened(self._load)
        self._weight = self._load.sum(0) if len(self._load) > 1 else self._load[0]  # [L, E]
        self.engine_name, engine = engine_named(options.engine, load.device)
        self._policy = _policy(options, topology, num_slots, load.shape[1], engine)
        # The same with replicas apart, where there are any, they may share, and there is room to keep them apart.
        self._apart: Policy | None = None
        nodes = topology.num_nodes if options.num_groups is not None else 1
        roomy = num_slots // topology.num_gpus <= load.shape[2] // nodes
        if num_slots > load.shape[2] and options.allow_shared_replicas and roomy:
            apart = replace(options, allow_shared_replicas=False)
            self._apart = _policy(apart, topology, num_slots, load.shape[1], engine)
        # The cheapest table that was met for each layer, so that a root need not build it a second time.
        self._met: tuple[Tensor, Tensor, Tensor] | None = None  # candidate [L], cost [L], table [L, P]

    def costs(self, candidates: Tensor) -> Tensor:
        """`[K, L]` int64: the cost of every candidate `[K]` in every layer."""
        num_layers = self._weight.shape[0]
        candidate = candidates.to(self._weight.device)
        tables = self._searched(candidate.repeat_interleave(num_layers)).unflatten(0, (len(candidates), num_layers))
        cost = layer_cost(self._load, tables, self.num_gpus)
        self._remember(candidate, cost, tables)
        return cost

    def build(self, candidate: Tensor) -> Tensor:
        """`[L, P]`: the table of one candidate for each layer, `[L]`."""
        candidate = candidate.to(self._weight.device)
        if self._met is None:
            return self._searched(candidate)
        table = self._met[2].clone()
        other = (self._met[0] != candidate).nonzero()[:, 0]
        if len(other):
            names: Names = {"layer": other, "candidate": candidate[other], "seed": self.seed}
            table[other] = self._candidates(self._weight[other], names)
        return table

    def polish(self, table: Tensor) -> Tensor:
        """`[L, P]`: more moves where they cost no more; then the names under which most experts stay in place.

        A layer whose current placement costs no more keeps it.
        """
        rows = self._uneven(table)
        if len(rows):
            polished = table.clone()
            polished[rows] = self._policy.polish(self._weight[rows], table[rows])
            # What is polished is the sum over the steps, which need not be good for each of them.
            table = polished if len(self._load) == 1 else self._no_dearer(polished, table)
        if self.current is None:
            return table
        fresh = Placement(table, self._weight.shape[1], self.num_gpus)
        moved = relabelled(fresh, self.current, self._policy.cells, self._slot_class)
        current = self.current.expert_of_slot.to(table.device)
        return self._no_dearer(current, moved.expert_of_slot.to(table.device))

    def _searched(self, candidate: Tensor) -> Tensor:
        """`[K·L, P]`: each candidate's table of each layer."""
        num_layers = self._weight.shape[0]
        repeats = len(candidate) // num_layers
        layer = torch.arange(num_layers, device=self._weight.device).repeat(repeats)
        weight = self._weight.repeat(repeats, 1) if repeats > 1 else self._weight
        return self._candidates(weight, {"layer": layer, "candidate": candidate, "seed": self.seed})

    def _candidates(self, weight: Tensor, names: Names) -> Tensor:
        """`[X, P]`: the tables of rows; replicas share a GPU only where that costs less than keeping them apart."""
        table = self._policy.search(weight, **names)
        if self._apart is not None and len(rows := self._sharing(table)):
            layer = names["layer"][rows]
            own: Names = {"layer": layer, "candidate": names["candidate"][rows], "seed": names["seed"]}
            other = self._apart.search(weight[rows], **own)
            load = self._load[:, layer]
            enough = layer_cost(load, other, self.num_gpus) <= layer_cost(load, table[rows], self.num_gpus)
            table[rows[enough]] = other[enough]
        return table

    def _sharing(self, table: Tensor) -> Tensor:
        """The rows in which a GPU holds an expert twice."""
        inside = table.view(len(table), self.num_gpus, -1).sort(dim=2).values
        return (inside[..., 1:] == inside[..., :-1]).any(2).any(1).nonzero()[:, 0]

    def _remember(self, candidate: Tensor, cost: Tensor, tables: Tensor) -> None:
        first = cost.argmin(0)  # ties stay with the first
        layer = torch.arange(len(first), device=cost.device)
        met = candidate[first], cost[first, layer], tables[first, layer]
        if self._met is not None:
            worse = self._met[1] <= met[1]
            met = (
                torch.where(worse, self._met[0], met[0]),
                torch.where(worse, self._met[1], met[1]),
                torch.where(worse[:, None], self._met[2], met[2]),
            )
        self._met = met

    def _uneven(self, table: Tensor) -> Tensor:
        """The layers whose fullest GPUs are more than 2^-13 above the mean, which no job would notice."""
        cost, total = layer_cost(self._load, table, self.num_gpus), self._weight.sum(1)
        return (cost - total // self.num_gpus > total // self.num_gpus >> _EVEN_BITS).nonzero()[:, 0]

    def _no_dearer(self, wanted: Tensor, other: Tensor) -> Tensor:
        """Layer by layer, `wanted` where it costs no more than `other`, which stands elsewhere; both `[L, P]`."""
        cheaper = layer_cost(self._load, wanted, self.num_gpus) <= layer_cost(self._load, other, self.num_gpus)
        return torch.where(cheaper[:, None], wanted, other)


def _policy(options: SearchOptions, topology: Topology, num_slots: int, num_layers: int, engine: Engine) -> Policy:
    """What the options ask for."""
    groups, nodes = options.num_groups, topology.num_nodes
    if options.slot_class is not None:
        start = Placement.contiguous(num_layers, num_slots, topology.num_gpus)
        start = start if options.current is None else options.current
        return Classes(topology.num_gpus, options.slot_class, start.expert_of_slot)
    if groups is not None and options.mode == "permute":
        return Blocks(engine, topology.num_gpus, groups, num_slots)
    if groups is not None and nodes > 1:
        inside = Flat(engine, topology.gpus_per_node, num_slots // nodes, options.allow_shared_replicas)
        return Hierarchy(inside, nodes, groups)
    return Flat(engine, topology.num_gpus, num_slots, options.allow_shared_replicas)
