"""Renumber the GPUs of a fresh placement so that most experts stay where they are.

Shapes: L layers, P slots, M GPUs, G slots on each, n cells in a cell.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from distplb.core.placement import Placement

__all__ = ["relabelled"]

Table = NDArray[np.int64]


def relabelled(
    fresh: Placement,
    current: Placement,
    cells: Sequence[int],
    slot_class: Table | None = None,
    gpus_per_node: int | None = None,
) -> Placement:
    """Keep experts together as in `fresh`, in the cells (and slots) that leave most of them in place.

    Cells are matched by optimal assignment (scipy) on the number of experts that both hold, the largest first and
    smaller ones inside them. Experts that share a cell still do, so the balance does not change. An expert that stays
    in its smallest cell keeps its slot.

    Args:
        fresh, current: placements with the same layers, experts, slots and GPUs.
        cells: sizes in slots of the cells that may be swapped, each a divisor of the one before: (P / N, G) for nodes
            and GPUs; empty if none may.
        slot_class: `[P]`, the same for all cells, if experts must stay in slots of their class.
        gpus_per_node: for cells smaller than a node that may be swapped between nodes: of equal matchings, one that
            leaves more experts on their node is better.
    """
    classes = np.zeros(fresh.num_slots, dtype=np.int64) if slot_class is None else slot_class
    node = np.arange(fresh.num_slots) // (fresh.slots_per_gpu * (gpus_per_node or fresh.num_gpus))
    tables = [
        _relabelled_row(new, old, list(cells), classes, node)
        for new, old in zip(fresh.expert_of_slot.numpy(), current.expert_of_slot.numpy(), strict=True)
    ]
    return Placement(torch.from_numpy(np.stack(tables)), fresh.num_experts, fresh.num_gpus)


def _relabelled_row(new: Table, old: Table, cells: list[int], classes: Table, node: Table) -> Table:
    """Renumber one layer, or one cell of it: `[p]` each; `node` is each slot's node."""
    if not cells:
        return new
    parts, before = new.reshape(-1, cells[0]), old.reshape(-1, cells[0])  # [n, cell]
    nodes = node.reshape(-1, cells[0])
    held, holding = _counts(parts, before)
    worth = _common(held, holding)
    if (nodes == nodes[:, :1]).all() and nodes[0, 0] != nodes[-1, 0]:
        around = np.stack([holding[nodes[:, 0] == one].sum(0) for one in nodes[:, 0]])  # [n, E]
        worth = worth * (len(new) + 1) + _common(held, around)
    from scipy.optimize import linear_sum_assignment  # on first use: importing it takes a third as long as torch

    _, takes = linear_sum_assignment(worth, maximize=True)  # the place of each part
    placed = np.empty_like(parts)
    placed[takes] = parts
    if len(cells) > 1:
        inside = zip(placed, before, nodes, strict=True)
        return np.concatenate([_relabelled_row(one, was, cells[1:], classes, its) for one, was, its in inside])
    for number in np.unique(classes[: cells[0]]):
        same = classes[: cells[0]] == number
        for one, other in zip(placed, before, strict=True):
            one[same] = _in_place(one[same], other[same])
    return placed.reshape(-1)


def _counts(*tables: Table) -> list[Table]:
    """`[n, E]` each: how often each cell holds each expert."""
    height = int(max(table.max() for table in tables)) + 1
    counts = [np.zeros((len(table), height), dtype=np.int64) for table in tables]
    for count, table in zip(counts, tables, strict=True):
        np.add.at(count, (np.arange(len(table))[:, None], table), 1)
    return counts


def _common(held: Table, holding: Table) -> Table:
    """`[n, m]`: how many slots could stay for each pair of cells; an expert counts as often as both hold it."""
    if held.max() == holding.max() == 1:
        return np.asarray(held @ holding.T)
    return np.stack([np.minimum(count, holding).sum(1) for count in held])


def _in_place(new: Table, old: Table) -> Table:
    """The experts of `new [g]`: those that `old` holds in their slots there, the rest in the free slots, in order."""
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
