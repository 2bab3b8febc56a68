"""Give the GPUs of a fresh placement the names under which most experts stay where they are.

Shapes: L layers, P slots, M GPUs, G slots on each.
"""

from __future__ import annotations

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from distplb.placement import Placement

__all__ = ["relabelled"]


def relabelled(fresh: Placement, current: Placement) -> Placement:
    """The same groups of experts as `fresh`, on the GPUs (and in the slots) that leave most experts in place.

    Which experts share a GPU does not change, so neither does the balance. GPUs are matched by optimal assignment
    (scipy); an expert that stays on its GPU keeps its slot. Without replicas.
    """
    tables = [
        _relabelled_layer(new, old, fresh.num_gpus)
        for new, old in zip(fresh.expert_of_slot, current.expert_of_slot, strict=True)
    ]
    return Placement(torch.stack(tables), fresh.num_experts, fresh.num_gpus)


def _relabelled_layer(new: Tensor, old: Tensor, num_gpus: int) -> Tensor:
    gpu = torch.arange(num_gpus).repeat_interleave(len(new) // num_gpus)  # [P]
    old_gpu, new_gpu = torch.empty_like(gpu), torch.empty_like(gpu)  # by expert
    old_gpu[old], new_gpu[new] = gpu, gpu
    shared = torch.zeros(num_gpus, num_gpus, dtype=torch.int64)  # [M, M], experts that both hold
    shared.index_put_((new_gpu, old_gpu), torch.ones_like(gpu), accumulate=True)
    _, takes = linear_sum_assignment(shared.numpy(), maximize=True)
    new_gpu = torch.from_numpy(takes)[new_gpu]
    table = torch.where(new_gpu[old] == gpu, old, -1)  # [P], who stays
    free = (table < 0).nonzero()[:, 0]  # slots in order of their GPU
    movers = (new_gpu != old_gpu).nonzero()[:, 0]
    table[free] = movers[new_gpu[movers].sort(stable=True).indices]
    return table
