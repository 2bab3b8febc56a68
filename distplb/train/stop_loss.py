"""Does rebalancing pay? Iteration seconds before and after each rebalance, against what it took."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Pace", "StopLoss"]

_SIGMAS = 2.0  # by how many standard errors a rebalance must have failed to repay itself


@dataclass(frozen=True)
class Pace:
    """How long iterations took between two rebalances.

    >>> Pace.of([1.0, 1.0, 1.0, 1.0, 9.0])
    Pace(median=1.0, error=0.0, iterations=5)

    Args:
        median: seconds.
        error: of the median, one standard deviation, from the median absolute deviation of the iterations.
        iterations: how many.
    """

    median: float
    error: float
    iterations: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Pace:
        """Of single iterations, at least one. One alone does not tell its error, which may be as large as itself."""
        median = statistics.median(seconds)
        if len(seconds) == 1:
            return cls(median, median, 1)
        # 1.4826 and 1.2533: from the median absolute deviation to sigma, and to the median's error, of a normal law.
        deviation = 1.4826 * statistics.median(abs(value - median) for value in seconds)
        return cls(median, 1.2533 * deviation / math.sqrt(len(seconds)), len(seconds))


class StopLoss:
    """Counts rebalances in a row that did not repay themselves.

    >>> stop_loss = StopLoss(patience=2)
    >>> fast, slow = Pace(1.0, 0.0, 100), Pace(1.1, 0.0, 100)
    >>> stop_loss.repaid(slow, fast, cost=5.0)  # 10 s saved for 5 s
    True
    >>> [stop_loss.repaid(fast, fast, cost=5.0) for _ in range(2)], stop_loss.is_over
    ([False, False], True)

    Args:
        patience: so many in a row end it; 0 for never.
    """

    def __init__(self, patience: int) -> None:
        self.patience, self.strikes = patience, 0

    @property
    def is_over(self) -> bool:
        """Whether rebalancing should end."""
        return 0 < self.patience <= self.strikes

    def repaid(self, before: Pace, after: Pace, cost: float) -> bool:
        """Whether iterations became faster by as much as the rebalance cost; counts it if not.

        In doubt it did: what is less than two standard errors away from repaying is not counted against it, because
        a coin thrown often enough shows the same side three times in a row.

        Args:
            before: the iterations before the rebalance.
            after: those after it.
            cost: seconds of the rebalance itself.
        """
        saved = (before.median - after.median) * after.iterations
        doubt = _SIGMAS * math.hypot(before.error, after.error) * after.iterations
        repaid = saved + doubt >= cost
        self.strikes = 0 if repaid else self.strikes + 1
        return repaid
