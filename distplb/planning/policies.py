"""Policies that pack a placement: all slots at once, node by node, block by block, or class by class (`slot_classes`).

Each policy turns candidates into tables with one of the engines, and polishes chosen tables.
Shapes: X rows (layers, or layers times candidates), E experts, P slots, M GPUs, G slots on each, N nodes, B groups,
C classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from distplb.packing.engines import Engine
from distplb.packing.noise import Names, noisy_keys
from distplb.packing.settle import MOST_BITS, Terms
from distplb.packing.steps import greedy, pack_loads
from distplb.planning.legal import keeps_blocks

__all__ = ["Blocks", "Flat", "Hierarchy", "Policy"]


class Policy(Protocol):
    """Builds tables `[X, P]` from weights `[X, E]` int64, whose rows sum to at most 2^40."""

    @property
    def cells(self) -> tuple[int, ...]:
        """Sizes in slots of the cells that may be swapped as a whole, largest first: nodes, blocks, GPUs."""

    def search(self, weight: Tensor, *, layer: Tensor, candidate: Tensor, seed: int) -> Tensor:
        """Build the table of one candidate per row, `[X]`."""

    def polish(self, weight: Tensor, table: Tensor) -> Tensor:
        """Return a table that is no worse, under the same constraints."""

    @property
    def region(self) -> Tensor:
        """`[P]`: the region of each slot; slots exchange experts only inside a region."""

    def settle(self, terms: Terms, table: Tensor, *, layer: Tensor, ceiling: Tensor) -> Tensor:
        """Return a table that is no worse by `terms`, which have this policy's regions, under the same constraints."""

    @property
    def rule(self) -> str:
        """The constraints in words, to follow "must have"."""

    def allows(self, table: Tensor, *, layer: Tensor) -> Tensor:
        """`[X]` bool: whether a table that places every expert keeps the constraints; `layer [X]` is its layer."""


@dataclass(frozen=True)
class Flat:
    """Any expert on any GPU.

    Args:
        engine: the engine that packs.
        num_gpus: M.
        num_slots: P.
        shared: whether replicas of an expert may share a GPU.
    """

    engine: Engine
    num_gpus: int
    num_slots: int
    shared: bool

    @property
    def cells(self) -> tuple[int, ...]:
        """GPUs."""
        return (self.num_slots // self.num_gpus,)

    def search(self, weight: Tensor, *, layer: Tensor, candidate: Tensor, seed: int) -> Tensor:
        """See `Policy`."""
        names: Names = {"layer": layer, "candidate": candidate, "seed": seed}
        return self.engine.refine(weight, self.num_gpus, self.num_slots, shared=self.shared, **names)

    def polish(self, weight: Tensor, table: Tensor) -> Tensor:
        """See `Policy`."""
        return self.engine.polish(weight, table, self.num_gpus)

    @property
    def region(self) -> Tensor:
        """A single region."""
        return torch.zeros(self.num_slots, dtype=torch.int64, device="cpu")

    def settle(self, terms: Terms, table: Tensor, *, layer: Tensor, ceiling: Tensor) -> Tensor:
        """See `Policy`."""
        return self.engine.settle(terms, table, self.num_gpus, layer=layer, ceiling=ceiling)

    @property
    def rule(self) -> str:
        """See `Policy`."""
        return "every expert" if self.shared else "replicas of an expert on different GPUs"

    def allows(self, table: Tensor, *, layer: Tensor) -> Tensor:
        """See `Policy`."""
        if self.shared:
            return torch.ones(len(table), dtype=torch.bool, device=table.device)
        return ~self.engine.crowded(table, self.num_gpus)


@dataclass(frozen=True)
class Hierarchy:
    """Groups pinned to nodes, DeepSeek's hierarchical policy: a node holds B / N whole groups and all their replicas.

    (1) Groups are packed into nodes, once greedily and once refined. Inside each node (2) replicas are created and
    (3) packed onto its GPUs, as `Flat` does. The better of the two tables is kept.

    Args:
        inside: the policy of one node, with M / N GPUs and P / N slots.
        num_nodes: N.
        num_groups: B; a multiple of N that divides E.
    """

    inside: Flat
    num_nodes: int
    num_groups: int

    @property
    def cells(self) -> tuple[int, ...]:
        """Nodes, and the GPUs inside them."""
        return (self.inside.num_slots, *self.inside.cells)

    def search(self, weight: Tensor, *, layer: Tensor, candidate: Tensor, seed: int) -> Tensor:
        """See `Policy`."""
        group = weight.unflatten(1, (self.num_groups, -1)).sum(2)  # [X, B]
        key = noisy_keys(group, layer=layer, candidate=candidate, seed=seed)
        # Unrefined greedy is the published policy, and better balanced nodes may pack worse inside.
        nodes = greedy(group, key, torch.ones_like(key), self.num_nodes, apart=False)
        names: Names = {"layer": layer, "candidate": candidate, "seed": seed}
        table = self._packed(weight, nodes, **names)
        if self.num_nodes == self.num_groups:
            return table
        refined = self.inside.engine.refine(group, self.num_nodes, self.num_groups, **names)
        differ = (_sets(refined, self.num_nodes) != _sets(nodes, self.num_nodes)).any(1).nonzero()[:, 0]
        if len(differ):
            names = {"layer": layer[differ], "candidate": candidate[differ], "seed": seed}
            other = self._packed(weight[differ], refined[differ], **names)
            better = self._peak(weight[differ], other) < self._peak(weight[differ], table[differ])
            table[differ[better]] = other[better]
        return table

    def polish(self, weight: Tensor, table: Tensor) -> Tensor:
        """See `Policy`."""
        return _cell_by_cell(self.inside, weight, table, self.num_nodes)

    @property
    def region(self) -> Tensor:
        """Nodes."""
        return torch.arange(self.num_nodes, device="cpu").repeat_interleave(self.inside.num_slots)

    def settle(self, terms: Terms, table: Tensor, *, layer: Tensor, ceiling: Tensor) -> Tensor:
        """See `Policy`."""
        num_gpus = self.inside.num_gpus * self.num_nodes
        return self.inside.engine.settle(terms, table, num_gpus, layer=layer, ceiling=ceiling)

    @property
    def rule(self) -> str:
        """See `Policy`."""
        whole = f"{self.num_groups // self.num_nodes} whole groups on each of {self.num_nodes} nodes"
        return whole if self.inside.shared else f"{whole}, and {self.inside.rule}"

    def allows(self, table: Tensor, *, layer: Tensor) -> Tensor:
        """See `Policy`."""
        node = self.region.to(table.device)
        size = (int(table.max()) + 1) // self.num_groups
        # The node of one slot of each group; a group is whole if all its other slots are there too.
        home = torch.zeros(len(table), self.num_groups, dtype=torch.int64, device=table.device)
        home.scatter_(1, table // size, node.expand_as(table).contiguous())
        whole = (home.gather(1, table // size) == node).all(1)
        share = self.num_groups // self.num_nodes
        even = torch.arange(self.num_nodes, device=table.device).repeat_interleave(share)  # [B], the node of each
        is_even = (home.sort(dim=1).values == even).all(1)
        cells = self.inside.allows(
            table.view(len(table) * self.num_nodes, -1), layer=layer.repeat_interleave(self.num_nodes)
        )
        return whole & is_even & cells.view(len(table), -1).all(1)

    def _packed(self, weight: Tensor, nodes: Tensor, *, layer: Tensor, candidate: Tensor, seed: int) -> Tensor:
        """Do (2) and (3), with the groups of each node given as `nodes [X, B]`."""
        size = weight.shape[1] // self.num_groups
        members = (nodes[:, :, None] * size + torch.arange(size, device=nodes.device)).view(
            len(nodes), self.num_nodes, -1
        )  # [X, N, E / N], in the order in which a node got its groups, because greedy breaks ties by it
        return _searched_in_cells(self.inside, weight, members, layer, candidate, seed)

    def _peak(self, weight: Tensor, table: Tensor) -> Tensor:
        """`[X]`: the load of the busiest GPU."""
        replicas = torch.zeros_like(weight).scatter_add_(1, table, torch.ones_like(table))
        return pack_loads(weight // replicas, table, self.inside.num_gpus * self.num_nodes).amax(1)


@dataclass(frozen=True)
class Blocks:
    """Block permutations: experts stay in their group's block of slots, and blocks are moved as a whole.

    Under group-limited routing and without replicas, only these leave the model unchanged. If a block spans several
    GPUs, its experts are packed onto them; if a GPU holds several blocks, blocks are packed onto GPUs.

    Args:
        engine: the engine that packs.
        num_gpus: M.
        num_groups: B; the block of E / B slots is a multiple or a divisor of the G slots of a GPU.
        num_slots: P = E.
    """

    engine: Engine
    num_gpus: int
    num_groups: int
    num_slots: int

    @property
    def cells(self) -> tuple[int, ...]:
        """Blocks and GPUs, the larger first."""
        sizes = {self.num_slots // self.num_groups, self.num_slots // self.num_gpus}
        return tuple(sorted(sizes, reverse=True))

    @property
    def _spanned(self) -> int:
        """The number of GPUs that a block spans; 0 if a GPU holds several blocks."""
        return self.num_gpus // self.num_groups

    def search(self, weight: Tensor, *, layer: Tensor, candidate: Tensor, seed: int) -> Tensor:
        """See `Policy`."""
        size = weight.shape[1] // self.num_groups
        expert = torch.arange(weight.shape[1], device=weight.device).expand(len(weight), -1)
        members = expert.view(len(weight), self.num_groups, size)  # [X, B, E / B]
        if self._spanned:
            inside = Flat(self.engine, self._spanned, size, shared=False)
            return _searched_in_cells(inside, weight, members, layer, candidate, seed)
        group = weight.unflatten(1, (self.num_groups, size)).sum(2)  # [X, B]
        names: Names = {"layer": layer, "candidate": candidate, "seed": seed}
        order = self.engine.refine(group, self.num_gpus, self.num_groups, **names)  # [X, B]
        return members.gather(1, order[:, :, None].expand(-1, -1, size)).view(len(weight), -1)

    def polish(self, weight: Tensor, table: Tensor) -> Tensor:
        """See `Policy`."""
        size = weight.shape[1] // self.num_groups
        if self._spanned:
            return _cell_by_cell(Flat(self.engine, self._spanned, size, shared=False), weight, table, self.num_groups)
        group = weight.unflatten(1, (self.num_groups, size)).sum(2)
        blocks = table.view(len(table), self.num_groups, size)
        order = self.engine.polish(group, blocks[:, :, 0] // size, self.num_gpus)
        return self._in_order(blocks, order)

    @property
    def region(self) -> Tensor:
        """Blocks."""
        return torch.arange(self.num_groups, device="cpu").repeat_interleave(self.num_slots // self.num_groups)

    def settle(self, terms: Terms, table: Tensor, *, layer: Tensor, ceiling: Tensor) -> Tensor:
        """See `Policy`; if a GPU holds several blocks, whole blocks are exchanged.

        The distance of a group's first expert then stands for the group. All its experts have the same, unless the
        placement in force splits the group; the returned table may then cost more.
        """
        size = table.shape[1] // self.num_groups
        if self._spanned:
            return self.engine.settle(terms, table, self.num_gpus, layer=layer, ceiling=ceiling)
        blocks = table.view(len(table), self.num_groups, size)
        whole = Terms(
            terms.load.unflatten(2, (self.num_groups, size)).sum(3),
            torch.zeros(self.num_groups, dtype=torch.int64, device=table.device),
            None if terms.distance is None else terms.distance[:, ::size].contiguous(),
            None if terms.price is None else (terms.price * size).clamp(max=1 << MOST_BITS),
            terms.apart,
        )
        order = self.engine.settle(whole, blocks[:, :, 0] // size, self.num_gpus, layer=layer, ceiling=ceiling)
        return self._in_order(blocks, order)

    @property
    def rule(self) -> str:
        """See `Policy`."""
        return f"the experts of one group in each block of {self.num_slots // self.num_groups} slots"

    def allows(self, table: Tensor, *, layer: Tensor) -> Tensor:
        """See `Policy`."""
        return keeps_blocks(table, self.num_groups)

    def _in_order(self, blocks: Tensor, order: Tensor) -> Tensor:
        """`[X, P]`: the `blocks [X, B, E / B]` of a table, unchanged inside, their groups in the order `[X, B]`."""
        size = blocks.shape[2]
        # [X, B], where each group is
        place = torch.empty_like(order).scatter_(1, blocks[:, :, 0] // size, _positions(order))
        return blocks.gather(1, place.gather(1, order)[:, :, None].expand(-1, -1, size)).view(len(blocks), -1)


def _searched_in_cells(
    inside: Flat, weight: Tensor, members: Tensor, layer: Tensor, candidate: Tensor, seed: int
) -> Tensor:
    """`[X, P]`: each cell packed separately from its experts `members [X, cells, experts]`."""
    rows, cells = members.shape[:2]
    own = weight.gather(1, members.flatten(1)).view(rows * cells, -1)
    # Noise differs between the cells of a layer, but does not depend on the position of the row.
    cell_layer = (layer[:, None] * cells + torch.arange(cells, device=layer.device)).flatten()
    local = inside.search(own, layer=cell_layer, candidate=candidate.repeat_interleave(cells), seed=seed)
    return members.gather(2, local.view(rows, cells, -1)).view(rows, -1)


def _cell_by_cell(inside: Flat, weight: Tensor, table: Tensor, cells: int) -> Tensor:
    """`[X, P]`: each cell of the table polished separately."""
    local = table.view(len(table) * cells, -1)
    return inside.polish(weight.repeat_interleave(cells, 0), local).view(len(table), -1)


def _sets(packs: Tensor, num_packs: int) -> Tensor:
    """`[X, B]`: the packs in a canonical order, whatever the order of packs and of places inside them."""
    inside = packs.view(len(packs), num_packs, -1).sort(dim=2).values
    first = inside[:, :, 0].argsort(dim=1)[:, :, None].expand_as(inside)
    return inside.gather(1, first).view(len(packs), -1)


def _positions(table: Tensor) -> Tensor:
    return torch.arange(table.shape[1], device=table.device).expand_as(table)
