"""The gate: whether a step surely needs no replica, known from the loads of its GPUs alone.

Shapes: M GPUs.
"""

from __future__ import annotations

import numpy as np

from distplb.splitting.rules import NEVER, TOLERANCES, Array

__all__ = ["is_surely_trivial"]


def is_surely_trivial(load: Array, *, tolerance: int, inside: int, cap: int | None) -> bool:
    """Whether `split` makes no replica for these loads, whatever the experts; if False, it may or may not make some.

    It makes none where the busiest GPU is within the tolerance of the mean, or, with a price, above it by no more than
    a replica costs.

    >>> import numpy as np
    >>> loads = np.array([104, 100, 96])
    >>> [is_surely_trivial(loads, tolerance=0, inside=price, cap=None) for price in (0, 3, 4)]
    [False, False, True]

    Args:
        load: `[M]` int64, the tokens of each GPU with all experts at home.
        tolerance: of the busiest GPU above the mean, in units of 2^-20.
        inside: the price of a replica inside a node, in whole tokens; `rules.NEVER` for no replicas.
        cap: tokens that no GPU may exceed; None for no cap.
    """
    # The ufuncs' own methods, because those of arrays take half as long again, and every step of every layer asks.
    busiest, everything, num_gpus = int(np.maximum.reduce(load)), int(np.add.reduce(load)), len(load)
    if cap is not None and busiest > cap:
        return False
    if inside == NEVER:
        return True
    level = -(-everything // num_gpus)
    if not inside:
        level = max(level, everything * (TOLERANCES + tolerance) // (num_gpus * TOLERANCES))
    return busiest <= level + inside
