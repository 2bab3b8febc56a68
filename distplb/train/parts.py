"""The parts of a rebalancer on this rank, and how far it has come: what one rebalance works with."""

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
    """What `Rebalancer` is made of.

    Args:
        agreed: what it was built from.
        observer: of window and clock.
        pricer: of moves.
        in_force: the placement in force, and the way to another.
        journal: what is told.
        background: what runs beside the training.
        stop_loss: whether rebalancing pays.
        enabled: whether rebalances begin.
        iteration: calls of `step` so far.
        rebalances: that have begun.
        last_applied: iteration at which the last one began that was carried out; 0 where none was in this process.
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
        """Counts, and how the last plan fared: neither is what was planned for."""
        self.observer.clear()
        self.journal.forget()
