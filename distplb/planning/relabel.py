"""Give the GPUs of a fresh placement the names under which most experts stay where they are.

Shapes: L layers, P slots, M GPUs, G slots on each, n cells in a cell.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from distplb.placement import Placement

__all__ = ["relabelled"]

Table = NDArray[np.int64]


def relabelled(
    fresh: Placement,
    current: Placement,
    cells: Sequence[int],
    slot_class: Table | None = None,
    gpus_per_node: int | None = None,
) -> Placement:
    """The same experts together as in `fresh`, in the cells (and slots) that leave most of them in place.

    Cells are matched by optimal assignment (scipy), the largest first and the smaller inside them, by the experts
    that both hold. Which experts share a cell does not change, so neither does the balance. An expert that stays in
    its smallest cell keeps its slot.

    Args:
        fresh, current: of the same layers, experts, slots and GPUs.
        cells: slots of the cells that may change places, each a divisor of the one before: (P / N, G) for nodes and
            GPUs; none if nothing may.
        slot_class: `[P]`, the same for all cells, if experts may only stand in slots of their class.
        gpus_per_node: where cells smaller than a node change places freely, and of equals the way is better that
            leaves more experts on their node.
    """
    classes = np.zeros(fresh.num_slots, dtype=np.int64) if slot_class is None else slot_class
    node = fresh.num_slots if gpus_per_node is None else gpus_per_node * fresh.slots_per_gpu
    tables = [
        _relabelled_row(new, old, list(cells), classes, node)
        for new, old in zip(fresh.expert_of_slot.numpy(), current.expert_of_slot.numpy(), strict=True)
    ]
    return Placement(torch.from_numpy(np.stack(tables)), fresh.num_experts, fresh.num_gpus)


def _relabelled_row(new: Table, old: Table, cells: list[int], classes: Table, node: int) -> Table:
    """One layer, or one cell of it: `[p]` each; `node` slots are a node."""
    if not cells:
        return new
    parts, before = new.reshape(-1, cells[0]), old.reshape(-1, cells[0])  # [n, cell]
    worth = _common(parts, before)
    if cells[0] < node < len(new) and node % cells[0] == 0:
        nodes = old.reshape(-1, node)
        beside = _common(parts, nodes).repeat(node // cells[0], axis=1)  # [n, n]
        worth = worth * (len(new) + 1) + beside
    _, takes = linear_sum_assignment(worth, maximize=True)  # the place of each part
    placed = np.empty_like(parts)
    placed[takes] = parts
    if len(cells) > 1:
        inside = [_relabelled_row(*pair, cells[1:], classes, node) for pair in zip(placed, before, strict=True)]
        return np.concatenate(inside)
    for number in np.unique(classes[: cells[0]]):
        same = classes[: cells[0]] == number
        for one, other in zip(placed, before, strict=True):
            one[same] = _in_place(one[same], other[same])
    return placed.reshape(-1)


def _common(parts: Table, before: Table) -> Table:
    """`[n, m]`: the slots of each pair of cells that could stay, an expert as often as both hold it."""
    height = int(max(parts.max(), before.max())) + 1
    counts = []
    for cells in (parts, before):
        count = np.zeros((len(cells), height), dtype=np.int64)
        np.add.at(count, (np.arange(len(cells))[:, None], cells), 1)
        counts.append(count)
    if counts[0].max() == counts[1].max() == 1:
        return np.asarray(counts[0] @ counts[1].T)
    return np.stack([np.minimum(count, counts[1]).sum(1) for count in counts[0]])


def _in_place(new: Table, old: Table) -> Table:
    """The experts of `new [g]`, those that `old` holds in its slots, the rest in the free ones in their order."""
    left = {int(expert): int(count) for expert, count in zip(*np.unique(new, return_counts=True), strict=True)}
    table = np.full_like(new, -1)
    for slot, expert in enumerate(old.tolist()):
        if left.get(expert, 0):
            table[slot] = expert
            left[expert] -= 1
    arriving = []
    for expert in new.tolist():
        if left[expert]:
            arriving.append(expert)
            left[expert] -= 1
    table[table < 0] = arriving
    return table
