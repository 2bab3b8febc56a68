"""Give other replica counts to a candidate that starts from the placement in force.

Shapes: X rows, E experts, P slots, M GPUs, G slots on each.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["reassign_replicas"]

_MARGIN_BITS = 4  # a replica changes experts only if the taker's share is more than 2^-4 above the giver's new share


def reassign_replicas(weight: Tensor, table: Tensor, region: Tensor, num_gpus: int) -> Tensor:
    """`[X, P]`: pass replicas, one at a time, from the expert that needs them least to the one that needs them most.

    The expert whose replicas have the largest share takes a slot from the one whose replicas would have the smallest
    share with one fewer: its slot on the lightest GPU that does not hold the taker. A row stops when no such slot is
    left, or when the two shares are about equal.

    Args:
        weight: `[X, E]` int64.
        table: `[X, P]`, the table to change; it is copied.
        region: `[P]`; experts and their replicas stay in their region.
        num_gpus: M.
    """
    table = table.clone()
    row, gpu = torch.arange(len(table), device=table.device), _gpus(table, num_gpus)
    active = torch.ones(len(table), dtype=torch.bool, device=table.device)
    home = torch.zeros_like(weight).scatter_(1, table, region.expand_as(table).contiguous())  # [X, E]
    for _ in range(table.shape[1] - weight.shape[1]):
        replicas = torch.zeros_like(weight).scatter_add_(1, table, torch.ones_like(table))
        share = weight // replicas.clamp(min=1)
        taker = share.argmax(1)
        after = torch.where(replicas > 1, weight // (replicas - 1).clamp(min=1), torch.iinfo(torch.int64).max)
        after = after.masked_fill(home != home.gather(1, taker[:, None]), torch.iinfo(torch.int64).max)
        giver = after.argmin(1)
        largest, smallest = share[row, taker], after[row, giver]
        active &= (largest > smallest) & (largest - smallest > smallest >> _MARGIN_BITS)
        load = share.gather(1, table).unflatten(1, (num_gpus, -1)).sum(2)  # [X, M]
        holds = (table == taker[:, None]).unflatten(1, (num_gpus, -1)).any(2)  # [X, M]
        possible = (table == giver[:, None]) & ~holds[:, gpu]
        active &= possible.any(1)
        slot = load[:, gpu].masked_fill(~possible, torch.iinfo(torch.int64).max).argmin(1)
        table[row[active], slot[active]] = taker[active]
        if not bool(active.any()):
            break
    return table


def _gpus(table: Tensor, num_gpus: int) -> Tensor:
    """`[P]`: the GPU of each slot."""
    return torch.arange(table.shape[1], device=table.device) // (table.shape[1] // num_gpus)
