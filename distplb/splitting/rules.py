"""`Rules`: what the split of a step must keep, and what its time and its replicas cost. All integers, so ranks agree.

Shapes: K points of a time curve.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["EMPTY", "LONGEST", "MOST_SLOTS", "MOST_TOKENS", "NEVER", "NO_CURVE", "TOLERANCES", "Array", "Rules"]

Array = NDArray[np.int64]
EMPTY = -1  # a replica slot without an expert
LONGEST = 1 << 40  # nanoseconds of one expert; where TimeCurve.time ends
MOST_TOKENS = 1 << 50  # of one step; four times the room of 1,024 GPUs of a node then fits into an int64
MOST_SLOTS = 1024  # R
TOLERANCES = 1 << 20  # to 1: a tolerance is rounded to such a fraction, so that all ranks compare integers
NEVER = 1 << 50  # the price of replicas that are not made; more than any time
NO_CURVE: Array = np.empty((2, 0), np.int64)  # tokens are their own time


class Rules(NamedTuple):
    """Rules of one split, as both engines take them.

    Time is nanoseconds with a curve, and tokens without.

    Args:
        slots: R, the replica slots on each GPU.
        level: time that no GPU should exceed; splits aim at it, or above it where that costs less.
        least: the fewest tokens of a replica, a multiple of `tile`.
        tile: tokens of a replica are a multiple of it.
        inside: the price, in time, of a replica in its home's node.
        between: the price of one in another node.
    """

    slots: int
    level: int
    least: int = 1
    tile: int = 1
    inside: int = 0
    between: int = NEVER
