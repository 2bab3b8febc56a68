"""Stop-loss: compares iteration seconds before and after each rebalance with the seconds that it took."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Pace", "StopLoss"]

_SIGMAS = 2.0  # a rebalance counts as a loss only if it misses break-even by more standard errors than this


@dataclass(frozen=True)
class Pace:
    """How long iterations took between two rebalances.

    >>> Pace.of([1.0, 1.0, 1.0, 1.0, 9.0])
    Pace(median=1.0, error=0.0, iterations=5)

    Args:
        median: median seconds per iteration.
        error: standard error of the median, from the median absolute deviation of the iterations.
        iterations: how many iterations were timed.
    """

    median: float
    error: float
    iterations: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Pace:
        """Compute the pace of at least one iteration. One alone shows no spread, so its error is set to its seconds."""
        median = statistics.median(seconds)
        if len(seconds) == 1:
            return cls(median, median, 1)
        # For a normal distribution: sigma is 1.4826 · MAD, and the error of the median 1.2533 · sigma / sqrt(n).
        deviation = 1.4826 * statistics.median(abs(value - median) for value in seconds)
        return cls(median, 1.2533 * deviation / math.sqrt(len(seconds)), len(seconds))


class StopLoss:
    """Counts rebalances in a row that did not pay off.

    >>> stop_loss = StopLoss(patience=2)
    >>> fast, slow = Pace(1.0, 0.0, 100), Pace(1.1, 0.0, 100)
    >>> stop_loss.repaid(slow, fast, cost=5.0)  # 10 s saved for 5 s
    True
    >>> [stop_loss.repaid(fast, fast, cost=5.0) for _ in range(2)], stop_loss.is_over
    ([False, False], True)

    Args:
        patience: this many in a row end rebalancing; 0 for never.
    """

    def __init__(self, patience: int) -> None:
        self.patience, self.strikes = patience, 0

    @property
    def is_over(self) -> bool:
        """Whether rebalancing should end."""
        return 0 < self.patience <= self.strikes

    def repaid(self, before: Pace, after: Pace, cost: float) -> bool:
        """Return whether iterations saved at least the time that the rebalance cost; count it as a loss if not.

        A rebalance less than two standard errors short of break-even is not a loss. Otherwise noise alone would turn
        rebalancing off sooner or later: a coin thrown often enough shows the same side three times in a row.

        Args:
            before: the iterations before the rebalance.
            after: the iterations after it.
            cost: seconds of the rebalance itself.
        """
        saved = (before.median - after.median) * after.iterations
        doubt = _SIGMAS * math.hypot(before.error, after.error) * after.iterations
        repaid = saved + doubt >= cost
        self.strikes = 0 if repaid else self.strikes + 1
        return repaid
