"""A cap on the tokens of each GPU, kept wherever some split keeps it, unless the exact search is given up.

Shapes: E experts, M GPUs, R replica slots on each GPU.
"""

from __future__ import annotations

import numpy as np
import torch

from distplb.core.topology import Topology
from distplb.errors import DistplbError
from distplb.splitting.bound import bound_of
from distplb.splitting.engines import Engine
from distplb.splitting.exact import lowest_level, replicas_within
from distplb.splitting.rules import EMPTY, NEVER, Array, Rules

__all__ = ["busiest", "nodes_of", "within_cap"]

Placed = tuple[Array, Array]  # `[M, R]` experts and `[M, R]` tokens of replicas


def within_cap(
    cap: int, found: Placed, tokens: Array, home: Array, topology: Topology, rules: Rules, engine: Engine
) -> Placed:
    """The replicas found if no GPU exceeds the cap with them, or others with which none does.

    Others are tried in this order: as few as keep the cap, whatever their price; the same with any numbers of tokens;
    those of an exact search.

    Args:
        cap: tokens that no GPU may exceed.
        found: `[M, R]` the expert of each replica slot, and `[M, R]` the tokens that it gets.
        tokens: `[E]`, the tokens of each expert.
        home: `[E]`, the GPU that owns each expert.
        topology: nodes and GPUs.
        rules: those by which the replicas were found.
        engine: the engine that found them.

    Raises:
        DistplbError: if no split keeps the cap; it names the smallest cap that one keeps. If the exact search was given
            up, it names the smallest one found, and the bound.
    """
    if busiest(tokens, home, *found) <= cap:
        return found
    slots = 0 if rules.inside == NEVER else rules.slots
    if rules.between != NEVER:
        topology = Topology(num_nodes=1, gpus_per_node=topology.num_gpus)
    node = nodes_of(topology)
    few = Rules(slots, cap, rules.least, rules.tile)
    for tried in (few, few._replace(least=1, tile=1)):
        found = engine.replicas(tokens, home, node, tried)
        reached = busiest(tokens, home, *found)
        if reached <= cap:
            return found
    bound = bound_of(torch.from_numpy(tokens), torch.from_numpy(home), topology, slots)
    if bound <= cap:
        exact = replicas_within(tokens, home, node, slots, cap)
        if exact.replicas is not None:
            return exact.replicas
    smallest, is_proven = lowest_level(tokens, home, node, slots, bound, reached)
    given = f"{slots} replica slots on each GPU" if slots else "no replicas"
    proof = "" if is_proven else f" (found; no split needs fewer than {bound})"
    raise DistplbError(
        f"max_tokens_per_gpu is {cap}, but with {given} this step needs {smallest}{proof}; "
        "pass at least that, or more replica_slots"
    )


def nodes_of(topology: Topology) -> Array:
    """`[M]` int64, the node of each GPU.

    >>> nodes_of(Topology(num_nodes=2, gpus_per_node=2)).tolist()
    [0, 0, 1, 1]
    """
    return np.arange(topology.num_gpus) // topology.gpus_per_node


def busiest(tokens: Array, home: Array, expert: Array, part: Array) -> int:
    """The tokens of the busiest GPU with these replicas."""
    load = np.zeros(len(expert), np.int64)
    np.add.at(load, home, tokens)
    gpu, slot = np.nonzero(expert != EMPTY)
    np.subtract.at(load, home[expert[gpu, slot]], part[gpu, slot])
    np.add.at(load, gpu, part[gpu, slot])
    return int(load.max())
