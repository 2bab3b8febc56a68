"""The gain of a planner and its confidence interval: a block bootstrap over intervals between rebalances.

Shapes: R intervals, B resamples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

__all__ = ["MIN_INTERVALS", "Gain", "estimate_gain"]

MIN_INTERVALS = 4  # needed to estimate a confidence interval
_RESAMPLES, _SEED = 4000, 0
_QUANTILE = 0.975  # the two tails together hold 5 %


class Gain(NamedTuple):
    """The saved share of static seconds, 0 if there are none, and its 95 % interval, None for too few intervals."""

    share: float
    low: float | None
    high: float | None


def estimate_gain(seconds: Sequence[float], static: Sequence[float]) -> Gain:
    """Estimate the share by which `seconds` are fewer than `static`, over all intervals together.

    Neighbouring intervals are alike, because loads drift, so blocks of about √R neighbours are drawn, circularly.
    Blocks are few, so the spread is widened by Student's t for their number. In series with a known share, 4 to 39
    intervals long and 300 of each length, the interval covered it in 93 to 99 % of cases if neighbours correlate by 0
    or 0.3, in 84 to 98 % at 0.6, and in only 67 to 96 % at 0.8.

    >>> estimate_gain([7, 8, 7, 8], [10, 10, 10, 10]).share
    0.25
    >>> estimate_gain([7, 8], [10, 10])
    Gain(share=0.25, low=None, high=None)

    Args:
        seconds: `[R]`, time of each interval between rebalances, moves included.
        static: `[R]`, time of the same steps without rebalancing.
    """
    ours, others = np.asarray(seconds, dtype=np.float64), np.asarray(static, dtype=np.float64)
    number = len(ours)
    if not others.sum():
        return Gain(0.0, None, None)
    share = float(1 - ours.sum() / others.sum())
    if number < MIN_INTERVALS:
        return Gain(share, None, None)
    length = math.isqrt(number)
    begins = np.random.default_rng(_SEED).integers(0, number, (_RESAMPLES, math.ceil(number / length)))
    drawn = (begins[..., None] + np.arange(length)).reshape(_RESAMPLES, -1)[:, :number] % number  # [B, R]
    base = others[drawn].sum(1)
    has_time = base > 0  # some draws may have no time at all
    shares = 1 - ours[drawn].sum(1)[has_time] / base[has_time]
    low, high = share + (np.quantile(shares, (1 - _QUANTILE, _QUANTILE)) - share) * _widening(number / length)
    return Gain(share, float(low), float(high))


def _widening(blocks: float) -> float:
    """The factor that widens a spread from few blocks: Bessel's correction × Student's t / the normal quantile."""
    from scipy.special import ndtri, stdtrit

    free = blocks - 1
    return math.sqrt(blocks / free) * float(stdtrit(free, _QUANTILE) / ndtri(_QUANTILE))
