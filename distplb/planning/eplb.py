"""A drop-in replacement for DeepSeek's EPLB: same arguments, same three results with the same meaning.

Shapes: L layers, E experts, P slots, R the largest number of replicas of an expert.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distplb.core.arguments import whole_number
from distplb.core.counts import Counts
from distplb.core.placement import Placement
from distplb.core.topology import Topology
from distplb.errors import DistplbError
from distplb.packing.balanced_packing import as_whole
from distplb.planning.options import PlanOptions
from distplb.planning.problem import Problem

__all__ = ["rebalance_experts"]


def rebalance_experts(
    weight: Counts, num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Place replicated experts, with the interface of `eplb.rebalance_experts` (deepseek-ai/EPLB).

    >>> phy2log, log2phy, logcnt = rebalance_experts(torch.tensor([[8.0, 1, 2, 1]]), 6, 1, 1, 2)
    >>> phy2log, logcnt
    (tensor([[0, 1, 2, 0, 2, 3]]), tensor([[2, 1, 2, 1]]))
    >>> log2phy
    tensor([[[ 0,  3],
             [ 1, -1],
             [ 2,  4],
             [ 5, -1]]])

    Args:
        weight: `[L, E]`, load of each expert: tokens, or any non-negative numbers.
        num_replicas: P, the physical experts: the replicas of all experts together.
        num_groups: number of groups of consecutive experts. If it is a multiple of N, groups are pinned to nodes; if
            not, groups and nodes are ignored, as in EPLB.
        num_nodes: N; divides `num_gpus`.
        num_gpus: M; divides `num_replicas`.

    Returns:
        Three int64 tensors on the CPU: physical_to_logical `[L, P]`, the expert of each slot; logical_to_physical
        `[L, E, R]`, the slots of each expert in ascending order, padded with −1; and logical_count `[L, E]`, the
        replicas of each expert.

    Raises:
        DistplbError: if a weight is negative or not finite, or a number does not divide the one that it must divide.
    """
    num_replicas, num_groups, num_nodes, num_gpus = (
        whole_number(name, value)
        for name, value in (
            *(("num_replicas", num_replicas), ("num_groups", num_groups)),
            *(("num_nodes", num_nodes), ("num_gpus", num_gpus)),
        )
    )
    if num_nodes < 1 or num_gpus < 1 or num_gpus % num_nodes:
        raise DistplbError(
            f"{num_gpus} GPU{'s' * (num_gpus != 1)} cannot be spread evenly over "
            f"{num_nodes} node{'s' * (num_nodes != 1)}; pass a num_nodes that divides num_gpus"
        )
    whole = as_whole(weight, ("layer", "expert")).to("cpu")
    options = PlanOptions(num_slots=num_replicas, num_groups=num_groups if num_groups % num_nodes == 0 else None)
    problem = Problem(whole[None], Topology(num_nodes, num_gpus // num_nodes), options)
    plain = torch.zeros(len(whole), dtype=torch.int64, device="cpu")
    placement = Placement(problem.polish(problem.build(plain)), whole.shape[1], num_gpus)
    return placement.expert_of_slot, placement.inverse, placement.replicas
