"""What a plan saves, with an interval: a bootstrap over the intervals between rebalances."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

__all__ = ["FEWEST_INTERVALS", "Saving", "saving"]

FEWEST_INTERVALS = 4  # between rebalances, for an interval of the saving
_RESAMPLES = 4000


class Saving(NamedTuple):
    """A share of the other's seconds; `low` and `high` hold 95 % of what chance would make of it, None if unknown."""

    saved: float
    low: float | None
    high: float | None


def saving(ours: Sequence[float], others: Sequence[float], seed: int = 0) -> Saving:
    """The share of the others' seconds that ours are less."""
    mine, theirs = np.asarray(ours, dtype=np.float64), np.asarray(others, dtype=np.float64)
    saved = float(1 - mine.sum() / theirs.sum())
    if len(mine) < FEWEST_INTERVALS:
        return Saving(saved, None, None)
    drawn = np.random.default_rng(seed).integers(0, len(mine), (_RESAMPLES, len(mine)))
    shares = 1 - mine[drawn].sum(1) / theirs[drawn].sum(1)
    low, high = np.quantile(shares, (0.025, 0.975)).tolist()
    return Saving(saved, low, high)
