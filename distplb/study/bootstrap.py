"""What a planner saves, and how far chance may have made it so: a block bootstrap over intervals between rebalances.

Shapes: R intervals, B resamples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

__all__ = ["FEWEST_INTERVALS", "Saving", "saving"]

FEWEST_INTERVALS = 4  # of which an interval of the saving can be told
_RESAMPLES = 4000
_SURE = 0.975  # both sides together leave 5 % out


class Saving(NamedTuple):
    """A share of static seconds, 0 of none, and its 95 % interval; None where too little is there to tell one from."""

    saved: float
    low: float | None
    high: float | None


def saving(seconds: Sequence[float], static: Sequence[float], seed: int = 0) -> Saving:
    """The share by which the one takes less than the other, over all intervals together.

    Neighbouring intervals resemble each other, because loads drift; so blocks of about √R neighbours are drawn, round
    the end to the beginning, and the spread is widened by Student's t of the blocks' number, as there are few. Tried on
    series of a known share, 4 to 39 long, 300 of each: it lay within in 93 to 99 % of cases where neighbours correlate
    by 0 or 0.3, in 84 to 98 % at 0.6, and in only 67 to 96 % at 0.8.

    >>> saving([7, 8, 7, 8], [10, 10, 10, 10]).saved
    0.25
    >>> saving([7, 8], [10, 10])
    Saving(saved=0.25, low=None, high=None)

    Args:
        seconds: `[R]`, of each interval between rebalances, moves included.
        static: `[R]`, of the same steps without any.
        seed: of the resamples.
    """
    ours, others = np.asarray(seconds, dtype=np.float64), np.asarray(static, dtype=np.float64)
    number = len(ours)
    if not others.sum():
        return Saving(0.0, None, None)
    saved = float(1 - ours.sum() / others.sum())
    if number < FEWEST_INTERVALS:
        return Saving(saved, None, None)
    length = math.isqrt(number)
    begins = np.random.default_rng(seed).integers(0, number, (_RESAMPLES, math.ceil(number / length)))
    drawn = (begins[..., None] + np.arange(length)).reshape(_RESAMPLES, -1)[:, :number] % number  # [B, R]
    base = others[drawn].sum(1)
    having = base > 0  # some blocks may have no time at all
    shares = 1 - ours[drawn].sum(1)[having] / base[having]
    low, high = saved + (np.quantile(shares, (1 - _SURE, _SURE)) - saved) * _widening(number / length)
    return Saving(saved, float(low), float(high))


def _widening(blocks: float) -> float:
    """Of a spread that was found from so few blocks: that of a sample's mean, and Student's t over the normal's."""
    from scipy.special import ndtri, stdtrit

    free = blocks - 1
    return math.sqrt(blocks / free) * float(stdtrit(free, _SURE) / ndtri(_SURE))
