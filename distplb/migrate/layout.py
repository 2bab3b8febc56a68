"""`Layout`: which rank holds which elements of each slot's row.

A tensor with a row for every slot is, over all ranks, one range of P rows. A rank holds parts of it, each contiguous in
memory: the rows of its slots, a flat range that cuts through rows (an optimizer's shard), or the same columns of
several rows (a tensor sharded along its second dim). This covers experts owned by one rank, copies on data-parallel
ranks, and router rows on every rank.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from distplb.errors import DistplbError

__all__ = ["Layout", "Part", "Piece", "Span", "joined"]


class Span(NamedTuple):
    """Elements `start` to `stop` of a slot's row, which begin at element `offset` of the part's memory."""

    slot: int
    start: int
    stop: int
    offset: int


@dataclass(frozen=True)
class Part:
    """Elements `start` to `stop` of the columns `low` to `high` of all slots' rows, counted slot after slot.

    >>> list(Part(4, 12, 0, 8).spans)  # a flat range that cuts through two rows of 8
    [Span(slot=0, start=4, stop=8, offset=0), Span(slot=1, start=0, stop=4, offset=4)]
    >>> list(Part(0, 4, 2, 4).spans)  # two columns of two rows
    [Span(slot=0, start=2, stop=4, offset=0), Span(slot=1, start=2, stop=4, offset=2)]
    """

    start: int
    stop: int
    low: int
    high: int

    @property
    def numel(self) -> int:
        """Number of elements held."""
        return self.stop - self.start

    @property
    def slots(self) -> range:
        """The slots of which the part holds any element."""
        width = self.high - self.low
        return range(self.start // width, -(-self.stop // width)) if self.start < self.stop else range(0)

    @property
    def spans(self) -> Iterator[Span]:
        """The elements held, slot by slot."""
        width = self.high - self.low
        for slot in self.slots:
            first = slot * width
            begin, end = max(self.start, first), min(self.stop, first + width)
            yield Span(slot, begin - first + self.low, end - first + self.low, begin - self.start)


def joined(parts: Iterable[Part]) -> tuple[Part, ...]:
    """Merge the parts of one rank's memory that continue each other, and drop empty ones."""
    merged: list[Part] = []
    for part in parts:
        last = merged[-1] if merged else None
        if last is not None and (last.stop, last.low, last.high) == (part.start, part.low, part.high):
            merged[-1] = Part(last.start, part.stop, part.low, part.high)
        elif part.numel:
            merged.append(part)
    return tuple(merged)


class Piece(NamedTuple):
    """Elements `start` to `stop` of one slot's row, which begin at local element `offset` of `rank`."""

    rank: int
    start: int
    stop: int
    offset: int


@dataclass(frozen=True)
class Layout:
    """Which rank holds which elements of one tensor.

    >>> layout = Layout(row=4, num_slots=2, held=((Part(0, 4, 0, 4),), (Part(4, 8, 0, 4),)))  # one slot on each rank
    >>> layout.pieces[1]
    (Piece(rank=1, start=0, stop=4, offset=0),)

    Args:
        row: number of elements per slot.
        num_slots: P.
        held: by rank, its parts in memory order; empty if it holds nothing.

    Raises:
        DistplbError: if no rank holds some element of a slot, or a part is outside all slots.
    """

    row: int
    num_slots: int
    held: tuple[tuple[Part, ...], ...]

    def __post_init__(self) -> None:
        for rank, parts in enumerate(self.held):
            for part in parts:
                inside = 0 <= part.low < part.high <= self.row
                if not inside or not 0 <= part.start <= part.stop <= (part.high - part.low) * self.num_slots:
                    raise DistplbError(
                        f"rank {rank} holds elements {part.start} to {part.stop} of columns {part.low} to {part.high} "
                        f"of {self.num_slots} slots × {self.row}, which are out of range; check `gpu` and the starts "
                        "of the shards"
                    )
        for slot, pieces in enumerate(() if self.is_everywhere else self.pieces):
            reached = 0
            for piece in pieces:  # by start
                if piece.start > reached:
                    break
                reached = max(reached, piece.stop)
            if reached != self.row:
                raise DistplbError(
                    f"no rank holds element {reached} (of {self.row}) of slot {slot} (slots held by rank: "
                    f"{[list(own) for own in self.slots]}); check `gpu`, the starts "
                    "of the shards, and that the communicator has all ranks that the tensor is sharded over"
                )

    @cached_property
    def is_everywhere(self) -> bool:
        """Whether every rank holds the whole tensor, so that nothing ever crosses ranks."""
        return bool(self.held) and all(
            parts == (Part(0, self.row * self.num_slots, 0, self.row),) for parts in self.held
        )

    @cached_property
    def is_copied(self) -> bool:
        """Whether more than one rank holds some element."""
        held = ([piece.stop - piece.start for piece in self.pieces[slot]] for slot in set(self.shapes))
        return self.is_everywhere or any(sum(counts) > self.row for counts in held)

    @property
    def has_empty_rank(self) -> bool:
        """Whether some rank holds nothing of the tensor."""
        return not all(self.held)

    @cached_property
    def slots(self) -> tuple[tuple[int, ...], ...]:
        """By rank, the slots of which it holds any element, in ascending order."""
        return tuple(tuple(sorted({slot for part in parts for slot in part.slots})) for parts in self.held)

    def is_by_gpu(self, slots_per_gpu: int) -> bool:
        """Whether each rank holds elements of only one GPU's slots."""
        return all(own[0] // slots_per_gpu == own[-1] // slots_per_gpu for own in self.slots if own)

    @cached_property
    def max_row(self) -> int:
        """The most elements of one slot's row that any rank holds."""
        if self.is_everywhere:
            return self.row
        held = Counter[tuple[int, int]]()
        for slot in set(self.shapes):
            for piece in self.pieces[slot]:
                held[slot, piece.rank] += piece.stop - piece.start
        return max(held.values())

    @cached_property
    def shapes(self) -> tuple[int, ...]:
        """For each slot, the first slot that the same ranks hold in the same ranges, at any offset in their memory."""
        if self.is_everywhere:
            return (0,) * self.num_slots
        first: dict[tuple[tuple[int, int, int], ...], int] = {}
        return tuple(
            first.setdefault(tuple(piece[:3] for piece in pieces), slot) for slot, pieces in enumerate(self.pieces)
        )

    @cached_property
    def pieces(self) -> tuple[tuple[Piece, ...], ...]:
        """The pieces of each slot, by start and then by rank. A range held by several ranks appears once for each."""
        by_slot: list[list[Piece]] = [[] for _ in range(self.num_slots)]
        for rank, parts in enumerate(self.held):
            base = 0
            for part in parts:
                for span in part.spans:
                    by_slot[span.slot].append(Piece(rank, span.start, span.stop, base + span.offset))
                base += part.numel
        return tuple(tuple(sorted(slot, key=lambda piece: (piece.start, piece.rank))) for slot in by_slot)
