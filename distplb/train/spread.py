"""Over which iterations a rebalance is spread, so that none of them waits for the whole of it."""

from __future__ import annotations

from dataclasses import dataclass

from distplb.core.arguments import plain, refuse_wrong_types, whole_number
from distplb.errors import DistplbError

__all__ = ["Spread"]


@dataclass(frozen=True)
class Spread:
    """A rebalance that begins at iteration k shares its best candidates and its placement some iterations later.

    At k the counts are added up, and the search begins beside the training; at k + `choose_after` the ranks choose the
    best candidates, and the root polishes them beside the training; from k + `share_after` on, when all have the
    placement, experts move, a few at a time. The offsets are counted, not timed, so that all ranks meet at the same
    iterations; a rank whose search takes longer is waited for.

    >>> Spread(choose_after=2, share_after=4)
    Spread(choose_after=2, share_after=4, move_seconds=0.1)

    Args:
        choose_after: iterations that the search has.
        share_after: iterations that search and polishing have together; less than `Rebalancer`'s `every`.
        move_seconds: of an iteration, that moving may take; at least one commit is made in each.

    Raises:
        DistplbError: for negative or falling numbers.
    """

    choose_after: int
    share_after: int
    move_seconds: float = 0.1

    def __post_init__(self) -> None:
        for name in ("choose_after", "share_after"):
            object.__setattr__(self, name, whole_number(f"Spread: {name}", getattr(self, name)))
        object.__setattr__(self, "move_seconds", plain(self.move_seconds))
        refuse_wrong_types({"Spread: move_seconds": (self.move_seconds, (int, float), "seconds")})
        if not 0 <= self.choose_after <= self.share_after or not self.move_seconds >= 0:
            raise DistplbError(
                f"{self}: pass offsets that do not fall, and seconds, none of them negative, such as "
                "Spread(choose_after=2, share_after=4)"
            )
