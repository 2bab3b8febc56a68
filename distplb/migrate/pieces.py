"""Layouts: which rank holds which elements of a slot's row.

A tensor with a row for every slot is, seen over all ranks, one flat range of P × row elements. Each rank holds one
contiguous part of it: experts owned by one rank, copies on data-parallel ranks, flat shards of an optimizer that may
cut through an expert, and router rows on every rank are all of this kind.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from distplb.errors import DistplbError

__all__ = ["Layout", "Piece"]


@dataclass(frozen=True)
class Piece:
    """Elements `start` to `stop` of one slot's row, held by `rank` from its local element `offset` on."""

    rank: int
    start: int
    stop: int
    offset: int


@dataclass(frozen=True)
class Layout:
    """Who holds what of one tensor.

    >>> whole = Layout(row=4, num_slots=2, held=((0, 4), (4, 8)))  # a slot on each of two ranks
    >>> whole.pieces[1]
    (Piece(rank=1, start=0, stop=4, offset=0),)

    Args:
        row: elements of one slot.
        num_slots: P.
        held: by rank, the (start, stop) of its part in slot-major elements; equal numbers where it holds none.

    Raises:
        DistplbError: if some element of a slot is held by no rank, or a part lies outside of all slots.
    """

    row: int
    num_slots: int
    held: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        total, reached = self.row * self.num_slots, 0
        for rank, (start, stop) in enumerate(self.held):
            if not 0 <= start <= stop <= total:
                raise DistplbError(
                    f"rank {rank} holds elements {start} to {stop} of {self.num_slots} slots × {self.row}, "
                    f"which end at {total}; check `gpu` and the starts of the shards"
                )
        for start, stop in sorted(self.held):
            if start > reached:
                break
            reached = max(reached, stop)
        if reached != total:
            raise DistplbError(
                f"elements from {reached} on of {self.num_slots} slots × {self.row} are held by no rank "
                f"(held by rank: {list(self.held)}); check `gpu` and the starts of the shards"
            )

    @property
    def everywhere(self) -> bool:
        """Whether every rank holds all of it, so that nothing ever crosses ranks."""
        return all(part == (0, self.row * self.num_slots) for part in self.held)

    @cached_property
    def pieces(self) -> tuple[tuple[Piece, ...], ...]:
        """For each slot its pieces, by start and then by rank. A range held by several ranks comes once for each."""
        found: list[list[Piece]] = [[] for _ in range(self.num_slots)]
        for rank, (start, stop) in enumerate(self.held):
            for slot in range(start // self.row, -(-stop // self.row)):
                first = slot * self.row
                low, high = max(start, first), min(stop, first + self.row)
                if low < high:
                    found[slot].append(Piece(rank, low - first, high - first, low - start))
        return tuple(tuple(sorted(slot, key=lambda piece: (piece.start, piece.rank))) for slot in found)
