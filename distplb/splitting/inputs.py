"""The counts and homes of one step, checked at the door.

Shapes: E experts, M GPUs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from distplb.core.arguments import refuse_wrong_types, whole_number
from distplb.core.counts import Counts, as_counts, as_integers
from distplb.core.topology import Topology
from distplb.errors import DistplbError

__all__ = ["checked_size", "checked_slots", "checked_step"]

_MOST_TOKENS = 1 << 50  # of one step; four times the room of 1,024 GPUs of a node then fits into an int64


def checked_step(counts: Counts, home: Any, topology: Topology) -> tuple[Tensor, Tensor]:
    """`[M, E]` int64 counts and `[E]` int64 homes, on the CPU.

    >>> checked_step([[6, 1], [4, 1]], [0, 1], Topology(num_nodes=1, gpus_per_node=2))
    (tensor([[6, 1],
            [4, 1]]), tensor([0, 1]))

    Args:
        counts: `[M, E]`, the tokens that each GPU's router sends to each expert, in any exact type.
        home: `[E]`, the GPU that owns each expert.
        topology: nodes and GPUs.

    Raises:
        DistplbError: for counts, homes or a topology that do not fit.
    """
    refuse_wrong_types({"topology": (topology, (Topology,), "a Topology, such as Topology.from_env()")})
    tokens = as_counts("counts", counts, ("GPU", "expert")).cpu()
    if tokens.dim() != 2 or 0 in tokens.shape or len(tokens) != topology.num_gpus:
        raise DistplbError(
            f"counts has shape {list(tokens.shape)}; pass [GPUs, experts] with the topology's {topology.num_gpus} GPUs"
        )
    total = float(tokens.sum(dtype=torch.float64))
    if total >= _MOST_TOKENS:
        raise DistplbError(f"counts add up to {total:.3g} tokens; pass those of one step, fewer than 2^50")
    homes, (num_gpus, num_experts) = as_integers("home", home, "the GPU of each expert").cpu(), tokens.shape
    if list(homes.shape) != [num_experts]:
        raise DistplbError(f"home has shape {list(homes.shape)}; pass the GPU of each of {num_experts} experts")
    if (homes.lt(0) | homes.ge(num_gpus)).any():
        raise DistplbError(f"home has GPUs {int(homes.amin())} to {int(homes.amax())}; pass GPUs in [0, {num_gpus})")
    return tokens.contiguous().clone(), homes.contiguous().clone()  # callers may reuse their buffers


def checked_size(name: str, value: int) -> int:
    """A number of tokens from 1, such as a smallest quota.

    >>> checked_size("tile", 128)
    128

    Raises:
        DistplbError: if it is not an integer, or larger than any step.
    """
    size = whole_number(name, value, minimum=1)
    if size > _MOST_TOKENS:
        raise DistplbError(f"{name} is {size}; pass tokens of one step, at most 2^50")
    return size


def checked_slots(replica_slots: int, num_experts: int) -> int:
    """R, from 0 to one replica of each expert.

    >>> checked_slots(2, num_experts=64)
    2

    Raises:
        DistplbError: if it is not an integer in that range.
    """
    expected = f"an integer of at least 0, and at most the {num_experts} experts"
    slots = whole_number("replica_slots", replica_slots, minimum=0, expected=expected)
    if slots > num_experts:
        raise DistplbError(f"replica_slots is {slots}; pass {expected}")
    return slots
