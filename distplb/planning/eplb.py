"""The drop-in for DeepSeek's EPLB: same arguments, same three results, same meaning of each.

Shapes: L layers, E experts, P slots, R the most replicas of one expert.
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
    """Placement of replicated experts, in the form of `eplb.rebalance_experts` (deepseek-ai/EPLB).

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
        num_replicas: P, physical experts: replicas of all experts together.
        num_groups: of consecutive experts. If the nodes divide it, groups are pinned to nodes; if not, groups and
            nodes are disregarded, as there.
        num_nodes: N; divides `num_gpus`.
        num_gpus: M; divides `num_replicas`.

    Returns:
        Of int64 on the CPU: physical_to_logical `[L, P]`, the expert of each slot; logical_to_physical `[L, E, R]`,
        the slots of each expert, ascending, −1 where it has fewer than R; and logical_count `[L, E]`, the replicas.

    Raises:
        DistplbError: for weights that are not finite and non-negative, and numbers that do not divide.
    """
    num_replicas, num_groups, num_nodes, num_gpus = (
        whole_number(name, value)
        for name, value in (
            *(("num_replicas", num_replicas), ("num_groups", num_groups)),
            *(("num_nodes", num_nodes), ("num_gpus", num_gpus)),
        )
    )
    if num_nodes < 1 or num_gpus < 1 or num_gpus % num_nodes:
        raise DistplbError(f"{num_gpus} GPUs cannot be spread evenly over {num_nodes} nodes; pass a divisor of them")
    whole = as_whole(weight, ("layer", "expert")).to("cpu")
    options = PlanOptions(num_slots=num_replicas, num_groups=num_groups if num_groups % num_nodes == 0 else None)
    problem = Problem(whole[None], Topology(num_nodes, num_gpus // num_nodes), options)
    plain = torch.zeros(len(whole), dtype=torch.int64, device="cpu")
    placement = Placement(problem.polish(problem.build(plain)), whole.shape[1], num_gpus)
    return placement.expert_of_slot, placement.inverse, placement.replicas
