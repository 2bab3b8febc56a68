"""The counts and homes of one step, checked at the door.

Shapes: E experts, M GPUs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from distplb.core.arguments import listed, plain, refuse_wrong_types, shown, whole_number
from distplb.core.counts import Counts, as_counts, as_integers
from distplb.core.topology import Topology
from distplb.errors import DistplbError
from distplb.splitting.rules import MOST_SLOTS, MOST_TOKENS, NEVER, TOLERANCES

__all__ = ["checked_prices", "checked_size", "checked_slots", "checked_step", "checked_tolerance"]


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
    at_most = int(tokens.numpy().max()) * tokens.numel()  # added up only if that can be too much
    if at_most >= MOST_TOKENS and (total := float(tokens.sum(dtype=torch.float64))) >= MOST_TOKENS:
        raise DistplbError(f"counts add up to {total:.3g} tokens; pass those of one step, fewer than 2^50")
    homes, (num_gpus, num_experts) = as_integers("home", home, "the GPU of each expert").cpu(), tokens.shape
    if list(homes.shape) != [num_experts]:
        raise DistplbError(f"home has shape {list(homes.shape)}; pass the GPU of each of {num_experts} experts")
    if int(homes.amin()) < 0 or int(homes.amax()) >= num_gpus:
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
    if size > MOST_TOKENS:
        raise DistplbError(f"{name} is {size}; pass tokens of one step, at most 2^50")
    return size


def checked_slots(replica_slots: int) -> int:
    """R, from 0; slots that no expert needs stay empty.

    >>> checked_slots(2)
    2

    Raises:
        DistplbError: if it is not an integer in that range.
    """
    slots = whole_number("replica_slots", replica_slots, minimum=0)
    if slots > MOST_SLOTS:
        raise DistplbError(f"replica_slots is {slots}; pass at most {MOST_SLOTS:,}")
    return slots


def checked_prices(push_price: tuple[float, float], per_token: float = 1.0) -> tuple[int, int]:
    """The prices of a replica inside a node and between nodes, in whole units of time; `NEVER` for infinity.

    >>> checked_prices((100.0, 4000.0), per_token=2.5)
    (250, 10000)

    Args:
        push_price: both prices in tokens.
        per_token: units of time for a token.

    Raises:
        DistplbError: if they are not two numbers of at least 0, the first one not above the second one.
    """
    refuse_wrong_types({"push_price": (push_price, (tuple, list), "two numbers of tokens, such as (2000.0, math.inf)")})
    prices = [plain(price) for price in push_price]
    if len(prices) != 2 or any(isinstance(one, bool) or not isinstance(one, int | float) for one in prices):
        raise DistplbError(
            f"push_price is {listed(push_price)}; pass two numbers of tokens, such as (2000.0, math.inf)"
        )
    if not 0 <= prices[0] <= prices[1]:  # NaN is not
        raise DistplbError(
            f"push_price is ({prices[0]}, {prices[1]}); pass two numbers from 0 to infinity: the price inside a node, "
            "and one at least as high between nodes"
        )
    inside, between = (NEVER if price * per_token >= NEVER else round(price * per_token) for price in prices)
    return inside, between


def checked_tolerance(tolerance: float) -> int:
    """A fraction in units of 2^-20.

    >>> checked_tolerance(0.005)
    5243

    Raises:
        DistplbError: if it is not a number from 0 to 1.
    """
    value = plain(tolerance)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise DistplbError(f"tolerance is {shown(tolerance)}; pass a fraction from 0 to 1, such as 0.005")
    return round(value * TOLERANCES)
