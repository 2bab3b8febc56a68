"""Price the experts that a plan moves: nothing on the same GPU, less inside a node than between nodes.

Shapes: X rows, L layers, E experts, P slots, M GPUs, G slots on each.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from distplb.core.cost import MAX_COST
from distplb.core.placement import Placement
from distplb.core.topology import Topology

__all__ = ["cost_of_moves", "distances", "price_by_distance"]


def distances(current: Placement, topology: Topology) -> Tensor:
    """`[L, E, M]` int8: 0 where a GPU holds an expert, 1 where another GPU of its node does, else 2.

    A GPU that holds an expert can copy it to any number of its slots at distance 0.

    >>> distances(Placement.contiguous(num_layers=1, num_experts=3, num_gpus=3), Topology(3, 1))
    tensor([[[0, 2, 2],
             [2, 0, 2],
             [2, 2, 0]]], dtype=torch.int8)
    """
    table = current.expert_of_slot  # [L, P]
    gpu = torch.arange(table.shape[1], device="cpu") // current.slots_per_gpu
    layer = torch.arange(len(table), device="cpu")[:, None]
    held = torch.zeros(len(table), current.num_experts, topology.num_gpus, dtype=torch.bool, device="cpu")
    held[layer, table, gpu] = True
    near = held.unflatten(2, (topology.num_nodes, -1)).any(3).repeat_interleave(topology.gpus_per_node, 2)
    far: Tensor = 2 - near.to(torch.int8) - held.to(torch.int8)
    return far.contiguous()


def price_by_distance(move_price: tuple[float, float], shift: Tensor) -> Tensor:
    """`[L, 3]` int64: the price of a moved slot at distance 0, 1 and 2, in units of a load shifted left.

    Prices saturate at 2^41 − 1, and a positive price stays at least 1.

    Args:
        move_price: tokens per slot, inside a node and between nodes.
        shift: `[L]`, bits by which the load is shifted left; negative for right.
    """
    rows = [[0, *(_in_units(price, bits) for price in move_price)] for bits in shift.tolist()]
    return torch.tensor(rows, device=shift.device)


def _in_units(price: float, bits: int) -> int:
    if price <= 0:
        return 0
    return MAX_COST if price >= math.ldexp(MAX_COST, -bits) else max(1, round(math.ldexp(price, bits)))


def cost_of_moves(table: Tensor, distance: Tensor, price: Tensor) -> Tensor:
    """`[..., L]` int64: the cost of the moves to a table `[..., L, P]`, summed over its slots.

    Args:
        table: the expert of each slot.
        distance: `[L, E, M]` int8, from `distances`.
        price: `[L, 3]` int64, from `price_by_distance`.
    """
    num_gpus = distance.shape[2]
    gpu = torch.arange(table.shape[-1], device=table.device) // (table.shape[-1] // num_gpus)
    place = table * num_gpus + gpu  # [..., L, P]
    by_slot = distance.flatten(1).expand(*table.shape[:-1], -1).gather(-1, place).long()
    return price.expand(*table.shape[:-1], -1).gather(-1, by_slot).sum(-1)
