"""What a replica costs on a host with H100s, in tokens, and what a split costs with it.

A token costs 6 floating-point operations a parameter, forward and backward. A replica costs 8 bytes a parameter: its
weights in bf16 for the forward and again for the backward, and its gradient in fp32. So P parameters cancel out:

    price = 8 P / bandwidth × FLOP/s / 6 P

Shapes: M GPUs.
"""

from __future__ import annotations

import numpy as np

from distplb import Topology
from distplb.splitting.split_value import Split

__all__ = ["BETWEEN", "GRADIENTS_ONLY", "INSIDE", "cost_of", "price_of", "text"]

PARAMETERS = 3 * 7168 * 2048  # of one expert of DeepSeek-V3
OPERATIONS_PER_SECOND = 500e12
INSIDE_BYTES, BETWEEN_BYTES = 350e9, 45e9  # per second
OPERATIONS, BYTES = 6, 8  # of a token, and of a replica, for each parameter
GRADIENTS_ONLY = 0.5  # of the price, for replicas whose weights lie on their GPU already: 4 of 8 bytes


def price_of(bytes_per_second: float) -> float:
    """The tokens that a GPU computes in the time in which it sends one replica.

    >>> round(price_of(INSIDE_BYTES)), round(price_of(BETWEEN_BYTES))
    (1905, 14815)
    """
    return BYTES * PARAMETERS / bytes_per_second * OPERATIONS_PER_SECOND / (OPERATIONS * PARAMETERS)


INSIDE, BETWEEN = price_of(INSIDE_BYTES), price_of(BETWEEN_BYTES)


def cost_of(found: Split, topology: Topology, part: float = 1.0) -> float:
    """The busiest GPU's tokens, and the replicas of the GPU that pays most for what it sends, or receives; per mean.

    Links send and receive at the same time, so of the two the larger one counts.

    Args:
        found: the split.
        topology: nodes and GPUs.
        part: of the price that is paid for a replica.
    """
    tokens = int(found.counts.sum())
    if not tokens:
        return 1.0
    node = np.arange(topology.num_gpus) // topology.gpus_per_node
    price = np.where(node[:, None] == node, INSIDE, BETWEEN).round()  # [M, M], whole tokens, as `split` rounds them
    paid = part * price * found.pushes.numpy()
    return float(int(found.load.amax()) + max(paid.sum(0).max(), paid.sum(1).max())) * topology.num_gpus / tokens


def text() -> str:
    """How the prices are made.

    >>> text().split(".")[0]
    'A replica costs 1,905 tokens inside a node, and 14,815 between nodes'
    """
    return (
        f"A replica costs {INSIDE:,.0f} tokens inside a node, and {BETWEEN:,.0f} between nodes. An expert of "
        f"DeepSeek-V3 has {PARAMETERS:,} parameters. A token takes {OPERATIONS} operations a parameter, on a GPU with "
        f"{OPERATIONS_PER_SECOND / 1e12:g} TFLOP/s. A replica takes {BYTES} bytes a parameter (its weights in bf16 "
        f"twice, its gradient in fp32), over {INSIDE_BYTES / 1e9:g} GB/s inside a node and {BETWEEN_BYTES / 1e9:g} "
        "GB/s between nodes; nothing overlaps. Its price is the time of these bytes over that of one token, so the "
        "parameters cancel out."
    )
