"""Choose the moves of a plan that fit in a budget: those that save most per moved slot. Pure.

Shapes: T steps, L layers, E experts, P slots.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distplb.core.cost import layer_cost
from distplb.core.placement import Placement
from distplb.migrate.schedule import exchanges

__all__ = ["within_budget"]


def within_budget(
    load: Tensor, old: Placement, new: Placement, max_slots: int, num_groups: int | None = None
) -> Placement:
    """Return the part of a change of placement that changes at most `max_slots` slots; without replicas.

    Whole layers that fit come first, in descending order of what they save per slot. Then the remaining layers follow
    in the same order; in each, as long as some exchange fits and saves anything, the one that saves most per slot is
    made. An exchange is a closed cycle of slots or, with routing groups, of blocks, so the result keeps every rule that
    both placements keep, whichever exchanges are left out.

    >>> load = torch.tensor([[[9, 9, 1, 1], [5, 4, 1, 1]]])
    >>> old = Placement.contiguous(num_layers=2, num_experts=4, num_gpus=2)
    >>> new = Placement(torch.tensor([[0, 2, 1, 3], [0, 2, 1, 3]]), num_experts=4, num_gpus=2)
    >>> within_budget(load, old, new, max_slots=2).expert_of_slot
    tensor([[0, 2, 1, 3],
            [0, 1, 2, 3]])

    Args:
        load: `[T, L, E]` int64, tokens or times.
        old: the placement in force.
        new: the planned placement.
        max_slots: how many slots may receive another expert, over all layers.
        num_groups: number of routing groups, which stay in blocks; see `exchanges`.
    """
    table, target = old.expert_of_slot.clone(), new.expert_of_slot
    slots = (table != target).sum(1)  # [L]
    left = max_slots
    if int(slots.sum()) <= left:
        return new
    load = load.cpu()
    saved = layer_cost(load, table, old.num_gpus) - layer_cost(load, target, old.num_gpus)
    worth = saved.double() / slots.clamp(min=1)
    for layer in worth.sort(descending=True, stable=True).indices.tolist():
        if saved[layer] > 0 and slots[layer] <= left:
            table[layer] = target[layer]
            left -= int(slots[layer])
    for layer in worth.sort(descending=True, stable=True).indices.tolist():
        if saved[layer] > 0 and slots[layer] and bool((table[layer] != target[layer]).any()):
            steps = load[:, layer : layer + 1]
            left -= _best_exchanges(steps, table[layer], target[layer], old.num_gpus, left, num_groups)
    return Placement(table, old.num_experts, old.num_gpus)


def _best_exchanges(
    load: Tensor, table: Tensor, target: Tensor, num_gpus: int, left: int, num_groups: int | None
) -> int:
    """Make the best exchanges of a layer in its `table [P]`, in place; return how many slots change."""
    cells = exchanges(table.tolist(), target.tolist(), num_groups)
    still_open = [[slot for cell in cycle for slot in cell] for cycle in cells]
    changed = 0
    while still_open:
        tables = table.repeat(len(still_open), 1, 1)  # [exchanges, 1, P]
        for nth, slots in enumerate(still_open):
            tables[nth, 0, slots] = target[slots]
        cost = layer_cost(load, table[None], num_gpus)
        saved = (cost - layer_cost(load, tables, num_gpus))[:, 0]  # [exchanges]
        size = torch.tensor([len(slots) for slots in still_open], device="cpu")
        worth = (saved.double() / size).masked_fill((saved <= 0) | (size > left - changed), 0)
        best = int(worth.argmax())
        if worth[best] <= 0:
            break
        slots = still_open.pop(best)
        table[slots] = target[slots]
        changed += len(slots)
    return changed
