"""A cap on the tokens of each GPU, kept wherever some split keeps it.

Shapes: E experts, M GPUs, R replica slots on each GPU.
"""

from __future__ import annotations

import numpy as np

from distplb.errors import DistplbError
from distplb.splitting.bound import lowest_not_excluded
from distplb.splitting.engines import Engine
from distplb.splitting.exact import lowest_level, placement_within
from distplb.splitting.rules import EMPTY, NEVER, Array, Rules

__all__ = ["within_cap"]

Placed = tuple[Array, Array]  # `[M, R]` experts and `[M, R]` tokens of replicas


def within_cap(cap: int, found: Placed, tokens: Array, home: Array, node: Array, rules: Rules, engine: Engine) -> Placed:
    """The replicas found if no GPU exceeds the cap with them, or others with which none does.

    Others are tried in this order: as few as keep the cap, whatever they cost; the same of any size; an exact search.

    Args:
        cap: tokens that no GPU may exceed.
        found: `[M, R]` the expert of each replica slot, and `[M, R]` the tokens that it gets.
        tokens: `[E]`, the tokens of each expert.
        home: `[E]`, the GPU that owns each expert.
        node: `[M]`, the node of each GPU.
        rules: those by which the replicas were found.
        engine: the engine that found them.

    Raises:
        DistplbError: if no split keeps the cap; it names the smallest cap that one keeps.
    """
    if busiest(tokens, home, *found) <= cap:
        return found
    free = 0 if rules.between != NEVER else NEVER
    cheap = rules._replace(level=cap, inside=0, between=free)
    if rules.inside == NEVER:
        cheap = cheap._replace(slots=0)
    for tried in (cheap, cheap._replace(least=1, tile=1)):
        found = engine.replicas(tokens, home, node, tried)
        reached = busiest(tokens, home, *found)
        if reached <= cap:
            return found
    where = node if rules.between == NEVER else np.zeros_like(node)
    bound = lowest_not_excluded(tokens, home, where, tried.slots)
    if bound <= cap:
        exact = placement_within(tokens, home, where, tried.slots, cap)
        if exact.replicas is not None:
            return exact.replicas
    smallest, is_proven = lowest_level(tokens, home, where, tried.slots, bound, reached)
    least = "" if is_proven else f" (no split has fewer than {bound})"
    raise DistplbError(
        f"max_tokens_per_gpu is {cap}; with {tried.slots} replica slots on each GPU, this step needs {smallest}{least}: "
        f"pass at least that, or raise replica_slots"
    )


def busiest(tokens: Array, home: Array, expert: Array, part: Array) -> int:
    """The tokens of the busiest GPU with these replicas."""
    load = np.zeros(len(expert), np.int64)
    np.add.at(load, home, tokens)
    gpu, slot = np.nonzero(expert != EMPTY)
    np.subtract.at(load, home[expert[gpu, slot]], part[gpu, slot])
    np.add.at(load, gpu, part[gpu, slot])
    return int(load.max())
