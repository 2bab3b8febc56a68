"""One planning problem: a load, a topology, and the three calls that make up every search.

Rows are read by `index_select` and written by `index_copy`, because indexing with tensors enters torch's thread pool
for any size, and on busy cores then waits milliseconds for its threads.
Shapes: T steps, L layers, E experts, P slots, M GPUs, K candidates, X rows (layers, or layers times candidates).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from distplb.core.cost import COST_BITS, MAX_COST, steps_with_tokens
from distplb.core.fixed_point import excess_bits, spare_bits
from distplb.core.placement import Placement
from distplb.core.topology import Topology
from distplb.errors import DistplbError
from distplb.packing.engines import Engine, engine_named
from distplb.packing.noise import Names, ceilings
from distplb.packing.settle import MOST_BITS, Terms
from distplb.planning.greedy import contiguous
from distplb.planning.move_cost import cost_of_moves, distances, price_by_distance
from distplb.planning.options import PlanOptions
from distplb.planning.policies import Blocks, Flat, Hierarchy, Policy
from distplb.planning.renumber_gpus import relabelled
from distplb.planning.slot_classes import SlotClasses
from distplb.planning.warm_start import reassign_replicas

__all__ = ["Problem"]

_EVEN_BITS = 13
_LAST_CEILING = 1 << 14  # of the last exchanges, on the chosen table: a quarter of the height, in units of 2^-16


class Problem:
    """Costs of candidates, the table of a candidate, and the polish of a table; all of it pure.

    Even candidates start afresh; odd ones start from the placement in force, if there is one and it keeps the rules.
    Steps without tokens are left out, so a plan does not depend on them.

    >>> problem = Problem(torch.tensor([[[9, 1, 5, 5]]]), Topology(1, 2))
    >>> problem.costs(torch.tensor([0, 1]))
    tensor([[10],
            [10]])

    Args:
        load: `[T, L, E]` int64 tokens, the same on every rank; the search runs on its device.
        topology: topology of the EP group.
        options: everything else that determines the plan.
        engine: name and engine that packs; the one that the options request if None.

    Raises:
        DistplbError: if load, topology and options do not fit together, or the engine is not available.
    """

    def __init__(
        self,
        load: Tensor,
        topology: Topology,
        options: PlanOptions | None = None,
        engine: tuple[str, Engine] | None = None,
    ) -> None:
        options = PlanOptions() if options is None else options
        options.check(topology, load.shape[1], load.shape[2])
        self.num_gpus, self._gpus_per_node = topology.num_gpus, topology.gpus_per_node
        self.current = options.current
        self.seed = options.seed
        self._shares = options.allow_shared_replicas
        self._slot_class = (
            None if options.slot_class is None else torch.as_tensor(options.slot_class, device="cpu").numpy()
        )
        num_slots = options.slots(load.shape[2])
        self.engine_name, packing = engine_named(options.engine, load.device) if engine is None else engine
        self._engine = packing
        self._policy = _policy(options, topology, num_slots, load.shape[1], packing)
        # The same with replicas kept apart, if there are replicas that may share a GPU and room to keep them apart.
        self._apart: Policy | None = None
        nodes = topology.num_nodes if options.num_groups is not None else 1
        roomy = num_slots // topology.num_gpus <= load.shape[2] // nodes
        if num_slots > load.shape[2] and options.allow_shared_replicas and roomy:
            apart = replace(options, allow_shared_replicas=False)
            self._apart = _policy(apart, topology, num_slots, load.shape[1], packing)
        # A layer keeps this unless a legal table costs less: the placement in force, or else the experts in order.
        self._kept = contiguous(load[0], topology, num_slots) if self.current is None else self.current.expert_of_slot
        self._kept = self._kept.to(load.device)  # [L, P]
        self._every_layer = torch.arange(load.shape[1], device=load.device)  # [L]
        self._may_be_kept = self._allows(self._kept)  # [L]
        self._may_stay = self._may_be_kept & (self.current is not None)
        counted = steps_with_tokens(load) if len(load) > 1 else load
        self._measure(counted if len(counted) else load[:1], topology, options)
        if len(self._load) == 1 and isinstance(self._policy, Flat):
            self._apart = None  # on a single step, the engine's search has already compared both
        # The cheapest table of each layer so far, so that the root need not build it again.
        self._cheapest: tuple[Tensor, Tensor, Tensor] | None = None  # candidate [L], cost [L], table [L, P]

    def _measure(self, load: Tensor, topology: Topology, options: PlanOptions) -> None:
        """Set up the objective, in units that leave headroom: at most 2^40 in a layer's window."""
        time = load if options.time_curve is None else options.time_curve.time(load)
        token = 1.0 if options.time_curve is None else options.time_curve.nanoseconds_per_token
        excess = excess_bits(time)
        self._load, shift = time >> excess[:, None], -excess
        prices = options.prices[0] * token, options.prices[1] * token
        if options.slots(load.shape[2]) > load.shape[2] or any(prices):
            # Shares are integer divisions and prices may be fractions: rounding errors must not matter.
            spare = spare_bits(self._load)
            self._load, shift = self._load << spare[:, None], shift + spare
        self._weight = self._load.sum(0) if len(self._load) > 1 else self._load[0]  # [L, E]
        self._distance = self._price = self._coarser = self._cost_of_current = None
        if self.current is not None and any(prices):
            self._distance = distances(self.current, topology).to(load.device)
            self._price = price_by_distance(prices, shift)
            # A layer that must move may have to move everything: without this, all its costs could saturate and tie.
            dearest = self._price.amax(1) * options.slots(load.shape[2])
            self._coarser = excess_bits(dearest[None, :, None], COST_BITS - 1).masked_fill(self._may_stay, 0)
            self._cost_of_current = self._cost(self.current.expert_of_slot.to(load.device))  # [L]
        self._terms: Terms | None = None
        if len(load) > 1 or self.current is not None:
            self._terms = self._coarse_terms()

    def _coarse_terms(self) -> Terms:
        """The objective, in the units of steps 10 and 11."""
        shift = excess_bits(self._load, MOST_BITS)  # [L]
        load = (self._load >> shift[:, None]).transpose(0, 1).contiguous()
        terms = Terms(load, self._policy.region.to(load.device), apart=not self._shares)
        if self._price is None:
            return terms
        up = (1 << shift[:, None]) - 1  # rounds up, so that a positive price stays at least 1
        price = ((self._price + up) >> shift[:, None]).clamp(max=1 << MOST_BITS)
        return terms._replace(distance=self._distance, price=price)

    def costs(self, candidates: Tensor) -> Tensor:
        """`[K, L]` int64: the cost of every candidate `[K]` in every layer."""
        candidate = candidates.to(self._weight.device)
        shape = len(candidate), len(self._every_layer)
        layer = self._every_layer.expand(shape).flatten()
        names: Names = {"layer": layer, "candidate": candidate[:, None].expand(shape).flatten(), "seed": self.seed}
        tables = self._candidates(names).unflatten(0, shape)
        cost = self._cost(tables)
        self._remember(candidate, cost, tables)
        return cost

    def build(self, candidate: Tensor) -> Tensor:
        """`[L, P]`: the table of one candidate per layer, `candidate [L]`."""
        candidate = candidate.to(self._weight.device)
        if self._cheapest is None:
            return self._candidates({"layer": self._every_layer, "candidate": candidate, "seed": self.seed})
        table = self._cheapest[2]
        other = (self._cheapest[0] != candidate).nonzero()[:, 0]
        if not len(other):
            return table
        names: Names = {"layer": other, "candidate": candidate[other], "seed": self.seed}
        return table.index_copy(0, other, self._candidates(names))

    def polish(self, table: Tensor) -> Tensor:
        """`[L, P]`: the table after more exchanges, with GPUs renumbered so that most experts stay in place.

        Each change is kept only where it costs no more. A layer keeps its current placement, or without one the
        experts in order, if that keeps the rules and costs no more.

        Raises:
            DistplbError: if a layer breaks the rules; a candidate's table never does.
        """
        table = self._polished(table)
        broken = (~self._allows(table)).nonzero()
        if len(broken):
            raise DistplbError(
                f"internal: layer {int(broken[0])} of the plan must have {self._policy.rule}, but does not; please "
                "report this with the load and the options"
            )
        return table

    def _polished(self, table: Tensor) -> Tensor:
        """`polish` without the check."""
        if self._price is None and self._cheapest is not None and torch.equal(table, self._cheapest[2]):
            tokens = self._cheapest[1]
        else:
            tokens = self._tokens(table, self._every_layer)
        cost = self._with_moves(tokens, table)
        rows = self._uneven(tokens)
        if len(rows):
            polished = table.index_copy(0, rows, self._finished(table.index_select(0, rows), rows))
            # Steps 10 and 11 count in coarser units and step 9 ignores the price: the result may cost more.
            table, cost = self._no_dearer(polished, table, cost)
        if self.current is not None:
            table, cost = self._no_dearer(self._named_as(table), table, cost)
        kept = (self._may_be_kept & (self._cost(self._kept) <= cost)).nonzero()[:, 0]
        return table.index_copy(0, kept, self._kept.index_select(0, kept)) if len(kept) else table

    def _finished(self, table: Tensor, layer: Tensor) -> Tensor:
        """`[X, P]`: the table after step 9 for one step of load, after steps 10 and 11 again for several."""
        if self._terms is None or len(self._load) == 1:
            return self._policy.polish(self._weight.index_select(0, layer), table)
        return self._policy.settle(self._terms, table, layer=layer, ceiling=torch.full_like(layer, _LAST_CEILING))

    def _candidates(self, names: Names) -> Tensor:
        """`[X, P]`: the table of each row's candidate."""
        layer, candidate = names["layer"], names["candidate"]
        if self.current is None and self._terms is None:
            return self._afresh(self._weight.index_select(0, layer), names)
        table = torch.empty(len(layer), self._policy.region.shape[0], dtype=torch.int64, device=layer.device)
        warm = (candidate % 2 == 1) & self._may_stay[layer]
        rows, others = warm.nonzero()[:, 0], (~warm).nonzero()[:, 0]
        if len(rows):
            table.index_copy_(0, rows, self._from_current(layer[rows], candidate[rows]))
        if len(others):
            own: Names = {"layer": layer[others], "candidate": candidate[others], "seed": names["seed"]}
            table.index_copy_(0, others, self._afresh(self._weight.index_select(0, layer[others]), own))
        rows = (warm | self._may_gain(layer, table)).nonzero()[:, 0]
        if self._terms is not None and len(rows):
            names = {"layer": layer[rows], "candidate": candidate[rows], "seed": names["seed"]}
            ceiling, unsettled = ceilings(**names), table.index_select(0, rows)
            settled = self._policy.settle(self._terms, unsettled, layer=names["layer"], ceiling=ceiling)
            settled = settled if self._price is None else self._unless_dearer(settled, unsettled, names["layer"])
            table.index_copy_(0, rows, settled)
        return table

    def _unless_dearer(self, settled: Tensor, unsettled: Tensor, layer: Tensor) -> Tensor:
        """`[X, P]`: the tables after steps 10 and 11, or before them if a layer must move and that is cheaper.

        That happens where whole blocks are exchanged: those steps price a block by one of its experts.
        """
        rows = (~self._may_stay[layer]).nonzero()[:, 0]
        if len(rows):
            dearer = self._cost(settled[rows], layer[rows]) > self._cost(unsettled[rows], layer[rows])
            settled[rows[dearer]] = unsettled[rows[dearer]]
        return settled

    def _may_gain(self, layer: Tensor, table: Tensor) -> Tensor:
        """`[X]` bool: whether steps 10 and 11 may improve a fresh table enough to be chosen."""
        if self._price is None or self._distance is None or self._cost_of_current is None:
            # For one step of load without a price, the fresh search has already minimised the cost.
            return torch.full_like(layer, len(self._load) > 1, dtype=torch.bool)
        # A table cannot win if the layer may stay, and its moves with perfect balance cost as much as staying.
        moves = cost_of_moves(table, self._distance[layer], self._price[layer])
        minimum = moves + self._weight.sum(1)[layer] // self.num_gpus
        return (minimum < self._cost_of_current[layer]) | ~self._may_stay[layer]

    def _from_current(self, layer: Tensor, candidate: Tensor) -> Tensor:
        """`[X, P]`: the placement in force; every second candidate gets other replica counts, if there are replicas."""
        assert self.current is not None
        table = self.current.expert_of_slot.to(layer.device)[layer]
        rows = (candidate % 4 == 3).nonzero()[:, 0]
        if len(rows) and self.current.has_replicas:
            region = self._policy.region.to(layer.device)
            table[rows] = reassign_replicas(self._weight[layer[rows]], table[rows], region, self.num_gpus)
        return table

    def _afresh(self, weight: Tensor, names: Names) -> Tensor:
        """`[X, P]`: tables searched on the sum over the steps; replicas share a GPU only where that costs less.

        If moves have a price, GPUs are renumbered so that most experts stay in place.
        """
        table = self._policy.search(weight, **names)
        if self._apart is not None and len(rows := self._engine.crowded(table, self.num_gpus).nonzero()[:, 0]):
            layer = names["layer"][rows]
            own: Names = {"layer": layer, "candidate": names["candidate"][rows], "seed": names["seed"]}
            other = self._apart.search(weight[rows], **own)
            enough = self._tokens(other, layer) <= self._tokens(table[rows], layer)
            table[rows[enough]] = other[enough]
        return table if self._price is None else self._named_as(table, names["layer"])

    def _named_as(self, table: Tensor, layer: Tensor | None = None) -> Tensor:
        """`[X, P]`: the same experts on each GPU, with GPUs renumbered so that most experts stay in place."""
        assert self.current is not None
        num_experts = self._weight.shape[1]
        current = self.current
        if layer is not None:
            current = Placement(current.expert_of_slot[layer.cpu()], num_experts, self.num_gpus)
        fresh = Placement(table, num_experts, self.num_gpus)
        named = relabelled(fresh, current, self._policy.cells, self._slot_class, self._gpus_per_node)
        return named.expert_of_slot.to(table.device)

    def _remember(self, candidate: Tensor, cost: Tensor, tables: Tensor) -> None:
        if len(candidate) == 1:
            cheapest = candidate.expand(cost.shape[1]), cost[0], tables[0]
        else:
            first = cost.argmin(0)  # of equals, the first
            rows = first * tables.shape[1] + self._every_layer
            cheapest = candidate.index_select(0, first), cost.amin(0), tables.flatten(0, 1).index_select(0, rows)
        if self._cheapest is not None:
            worse = self._cheapest[1] <= cheapest[1]
            cheapest = (
                torch.where(worse, self._cheapest[0], cheapest[0]),
                torch.where(worse, self._cheapest[1], cheapest[1]),
                torch.where(worse[:, None], self._cheapest[2], cheapest[2]),
            )
        self._cheapest = cheapest

    def _cost(self, table: Tensor, layer: Tensor | None = None) -> Tensor:
        """`[..., X]` int64: the cost of tables `[..., X, P]` of these layers (all by default), moves included."""
        rows = self._every_layer if layer is None else layer
        if table.dim() == 2:
            return self._with_moves(self._tokens(table, rows), table, layer)
        shape = table.shape[:-1]
        tokens = self._tokens(table.flatten(0, -2), rows.expand(shape).flatten()).view(shape)
        return self._with_moves(tokens, table, layer)

    def _with_moves(self, tokens: Tensor, table: Tensor, layer: Tensor | None = None) -> Tensor:
        """`[..., X]` int64: the cost of tables with these `tokens`; as in `_cost`."""
        if self._distance is None or self._price is None or self._coarser is None:
            return tokens
        rows = slice(None) if layer is None else layer
        moves = cost_of_moves(table, self._distance[rows], self._price[rows])
        return ((tokens + moves) >> self._coarser[rows]).clamp(max=MAX_COST)

    def _tokens(self, table: Tensor, layer: Tensor) -> Tensor:
        """`[X]` int64: the busiest GPU's load in tables `[X, P]` of the layers `[X]`, summed over the steps."""
        return self._engine.cost(self._load, table, self.num_gpus, layer=layer)

    def _uneven(self, tokens: Tensor) -> Tensor:
        """The layers whose busiest GPUs `[L]` are more than 2^-13 above the mean; no job would notice less."""
        mean = self._weight.sum(1) // self.num_gpus
        return (tokens - mean > mean >> _EVEN_BITS).nonzero()[:, 0]

    def _allows(self, table: Tensor) -> Tensor:
        """`[L]` bool: whether the policy allows a table `[L, P]`."""
        return self._policy.allows(table, layer=self._every_layer)

    def _no_dearer(self, preferred: Tensor, other: Tensor, cost: Tensor) -> tuple[Tensor, Tensor]:
        """Layer by layer, `preferred` where it costs no more than `other`, else `other`; both `[L, P]`. And the costs.

        Args:
            cost: `[L]`, the cost of `other`.
        """
        cost_of_preferred = self._cost(preferred)
        table = torch.where((cost_of_preferred <= cost)[:, None], preferred, other)
        return table, torch.minimum(cost_of_preferred, cost)


def _policy(options: PlanOptions, topology: Topology, num_slots: int, num_layers: int, engine: Engine) -> Policy:
    """The policy that the options request."""
    groups, nodes = options.num_groups, topology.num_nodes
    if options.slot_class is not None:
        start = Placement.contiguous(num_layers, num_slots, topology.num_gpus)
        start = start if options.current is None else options.current
        return SlotClasses(engine, topology.num_gpus, options.slot_class, start.expert_of_slot)
    if groups is not None and options.mode == "permute":
        return Blocks(engine, topology.num_gpus, groups, num_slots)
    if groups is not None and nodes > 1:
        inside = Flat(engine, topology.gpus_per_node, num_slots // nodes, options.allow_shared_replicas)
        return Hierarchy(inside, nodes, groups)
    return Flat(engine, topology.num_gpus, num_slots, options.allow_shared_replicas)
