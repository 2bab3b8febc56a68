"""What a placement costs, and how uneven it leaves the GPUs.

Shapes: T steps, L layers, E experts, P slots, M GPUs, G slots on each GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distplb.arguments import refuse_wrong_types
from distplb.counts import Counts, as_tokens
from distplb.errors import DistplbError
from distplb.placement import Placement

__all__ = ["COST_BITS", "MAX_COST", "gpu_tokens", "imbalance", "layer_cost"]

COST_BITS = 41
MAX_COST = (1 << COST_BITS) - 1


def layer_cost(load: Tensor, expert_of_slot: Tensor, num_gpus: int, moving: Tensor | None = None) -> Tensor:
    """`[..., L]` int64: the fullest GPU's tokens, added up over the steps, and moving; saturates at 2^41 − 1.

    Args:
        load: `[T, L, E]` int64; replicas share an expert's tokens by integer division.
        expert_of_slot: `[..., L, P]`.
        num_gpus: M.
        moving: `[..., L]` int64, what the moves to this placement cost, in tokens; nothing where None.
    """
    shape, replicas = expert_of_slot.shape, _replicas(load.shape[-1], expert_of_slot)
    cost = torch.zeros(shape[:-1], dtype=torch.int64, device=load.device) if moving is None else moving.clone()
    for step in load:  # [L, E]; a step at a time: the whole would be T times as large
        cost += _of_gpus(step, expert_of_slot, replicas, num_gpus).amax(-1)
    return cost.clamp_(max=MAX_COST)


def gpu_tokens(load: Tensor, expert_of_slot: Tensor, num_gpus: int) -> Tensor:
    """`[T, L, M]` int64: the tokens of each GPU.

    Args:
        load: `[T, L, E]` int64; replicas share an expert's tokens by integer division.
        expert_of_slot: `[L, P]`.
        num_gpus: M.
    """
    replicas = _replicas(load.shape[-1], expert_of_slot)
    return torch.stack([_of_gpus(step, expert_of_slot, replicas, num_gpus) for step in load])


def _replicas(num_experts: int, table: Tensor) -> Tensor | None:
    """`[..., L, P]`: replicas of the expert of each slot of a table `[..., L, P]`; None where there are none."""
    if table.shape[-1] == num_experts:
        return None
    counts = torch.zeros((*table.shape[:-1], num_experts), dtype=torch.int64, device=table.device)
    counts.scatter_add_(-1, table, torch.ones_like(table))
    return counts.gather(-1, table)


def _of_gpus(step: Tensor, table: Tensor, replicas: Tensor | None, num_gpus: int) -> Tensor:
    """`[..., L, M]`: the tokens of each GPU in one step `[L, E]`."""
    of_slot = step.expand(*table.shape[:-1], -1).gather(-1, table)  # [..., L, P]
    share: Tensor = of_slot if replicas is None else of_slot // replicas
    of_gpu: Tensor = share.unflatten(-1, (num_gpus, -1)).sum(-1)
    return of_gpu


def imbalance(load: Counts, placement: Placement) -> Tensor:
    """Fullest GPU over mean GPU, at least 1; 1 where there are no tokens.

    >>> load = torch.tensor([[6, 2, 1, 3]])
    >>> imbalance(load, Placement.contiguous(num_layers=1, num_experts=4, num_gpus=2))
    tensor([[1.3333]], dtype=torch.float64)

    Args:
        load: `[T, L, E]` or `[L, E]`, tokens of each expert, of any type that is exact; replicas share
            them evenly.
        placement: of the same layers and experts.

    Returns:
        `[T, L]` float64.

    Raises:
        DistplbError: if the load is not one of tokens or its shape is not the placement's.
    """
    tokens = as_tokens(load)
    refuse_wrong_types({"placement": (placement, (Placement,), "a Placement")})
    if tuple(tokens.shape[1:]) != (placement.num_layers, placement.num_experts):
        raise DistplbError(
            f"load has {tokens.shape[1]} layers of {tokens.shape[2]} experts, the placement "
            f"{placement.num_layers} of {placement.num_experts}; pass the load of the same model"
        )
    share = tokens.double() / placement.replicas.to(tokens.device)  # [T, L, E]
    slots = placement.expert_of_slot.to(tokens.device).expand(len(tokens), -1, -1)
    gpu_load = share.gather(-1, slots).unflatten(-1, (placement.num_gpus, -1)).sum(-1)  # [T, L, M]
    mean = tokens.sum(-1).double() / placement.num_gpus  # [T, L]
    return torch.where(mean > 0, gpu_load.amax(-1) / mean.clamp(min=1e-300), 1.0).clamp(min=1.0)
