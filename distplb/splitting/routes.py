"""Which source sends which tokens of a split where, from counts alone: no GPU has to ask another one.

Of each expert, a GPU first keeps its own tokens, then computes those of its node, then those of other nodes, each in
the order of ranks. No other assignment for the same quotas sends fewer tokens to another GPU or to another node.

Shapes: E experts, M GPUs, N nodes of D GPUs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distplb.core.topology import Topology
from distplb.errors import DistplbError
from distplb.splitting.split_value import Split

__all__ = ["routes"]


def routes(split: Split, topology: Topology) -> Tensor:
    """`[M, E, M]` int64: the tokens that each source (first dim) sends of each expert to each GPU (last dim).

    A source's tokens of an expert go to the GPUs in order: its first tokens to the first GPU that gets any.

    >>> split = Split(
    ...     counts=torch.tensor([[6, 1], [4, 1]]),
    ...     home=torch.tensor([0, 1]),
    ...     quota=torch.tensor([[6, 4], [0, 2]]),
    ...     replica=torch.tensor([[-1], [0]]),
    ... )
    >>> routes(split, Topology(num_nodes=1, gpus_per_node=2)).tolist()  # only one token crosses, of expert 1
    [[[6, 0], [0, 1]], [[0, 4], [0, 1]]]

    Args:
        split: the quotas.
        topology: nodes and GPUs.

    Raises:
        DistplbError: if the topology has another number of GPUs.
    """
    num_gpus, num_experts = split.counts.shape
    if topology.num_gpus != num_gpus:
        raise DistplbError(
            f"the split has {num_gpus} GPUs, the topology {topology.num_gpus}; pass the split's topology"
        )
    routed, quota = split.counts.T, split.quota  # [E, M] each
    kept = torch.minimum(routed, quota)
    flow = torch.diag_embed(kept)  # [E, M, M]
    routed, quota = routed - kept, quota - kept
    for size in (topology.gpus_per_node, num_gpus):  # within nodes, then across
        blocks = num_experts, num_gpus // size, size
        parts = _in_order(routed.reshape(blocks), quota.reshape(blocks))  # [E, N, D, D]
        for node in range(num_gpus // size):
            own = slice(node * size, (node + 1) * size)
            flow[:, own, own] += parts[:, node]
        routed, quota = routed - parts.sum(3).flatten(1), quota - parts.sum(2).flatten(1)
    return flow.transpose(0, 1).contiguous()


def _in_order(tokens: Tensor, room: Tensor) -> Tensor:
    """`[..., D, D]`: tokens `[..., D]` put into room `[..., D]`, both in order, until either is used up."""
    token_end, room_end = tokens.cumsum(-1).unsqueeze(-1), room.cumsum(-1).unsqueeze(-2)
    begin = torch.maximum(token_end - tokens.unsqueeze(-1), room_end - room.unsqueeze(-2))
    return (torch.minimum(token_end, room_end) - begin).clamp_(min=0)
