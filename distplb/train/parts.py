"""The components of a rebalancer on this rank and its counters, which each rebalance works with."""

from __future__ import annotations

from dataclasses import dataclass, field

from distplb.train.agreed_options import Agreed
from distplb.train.background import Background
from distplb.train.journal import Journal
from distplb.train.observer import Observer
from distplb.train.placement_in_force import InForce
from distplb.train.pricing import Pricer
from distplb.train.stop_loss import StopLoss

__all__ = ["Parts"]

_VERIFIED_BY_DEFAULT = 3  # rebalances


@dataclass(kw_only=True, eq=False)
class Parts:
    """The components and counters of a `Rebalancer`.

    Args:
        agreed: the options.
        observer: reads window and clock.
        pricer: prices moves.
        in_force: holds the placement in force and changes it.
        journal: reports and records.
        background: runs work in the background.
        stop_loss: tracks whether rebalancing pays off.
        enabled: whether rebalances begin.
        iteration: calls of `step` so far.
        rebalances: rebalances begun so far.
        last_applied: the iteration at which the last completed rebalance began; 0 if none in this process.
    """

    agreed: Agreed
    observer: Observer
    pricer: Pricer
    in_force: InForce
    journal: Journal
    background: Background
    stop_loss: StopLoss = field(init=False)
    enabled: bool = True
    iteration: int = 0
    rebalances: int = 0
    last_applied: int = 0

    def __post_init__(self) -> None:
        self.stop_loss = StopLoss(self.agreed.moves.stop_loss)

    @property
    def verifies(self) -> bool:
        """Whether the next move compares checksums."""
        verify = self.agreed.moves.verify
        return verify == "digest" or (verify == "first" and self.rebalances <= _VERIFIED_BY_DEFAULT)

    def forget_counts(self) -> None:
        """Clear the counts, and drop the open event of the last plan: neither belongs to the placement in force."""
        self.observer.clear()
        self.journal.forget()
