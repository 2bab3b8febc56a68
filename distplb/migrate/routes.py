"""Who gives which elements to whom when one slot receives what another holds. Pure.

Many slots are held alike, such as all slots of a GPU; what passes between two of them is worked out once.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

from distplb.migrate.pieces import Layout, Piece

__all__ = ["Passage", "Route", "Routes", "peers"]

_FEW = 8  # routes


class Route(NamedTuple):
    """`numel` elements of a row from one rank to another, or to itself.

    Args:
        source_rank, target_rank: who gives and who receives.
        source_piece, target_piece: numbers of the pieces, among those of the slot that gives and that receives.
        source_start, target_start: the first element, counted from the beginning of each piece.
        numel: of elements.
    """

    source_rank: int
    target_rank: int
    source_piece: int
    target_piece: int
    source_start: int
    target_start: int
    numel: int


class Passage:
    """All that passes from one slot to another; each rank's part of it in the order that all ranks share.

    Args:
        routes: in that order.
    """

    __slots__ = ("_of_rank", "routes")

    def __init__(self, routes: Iterable[Route]) -> None:
        self.routes = tuple(routes)
        self._of_rank: dict[int, list[Route]] | None = None  # only where looking at all of them takes longer
        if len(self.routes) > _FEW:
            self._of_rank = {}
            for route in self.routes:
                for rank in {route.source_rank, route.target_rank}:
                    self._of_rank.setdefault(rank, []).append(route)

    def of(self, rank: int) -> list[Route]:
        """What the rank gives or receives."""
        if self._of_rank is not None:
            return self._of_rank.get(rank, [])
        return [route for route in self.routes if rank in (route.source_rank, route.target_rank)]

    def crossing(self, node_of_rank: Sequence[int]) -> tuple[int, int]:
        """Elements that pass from rank to rank, inside nodes and between them."""
        found = [0, 0]
        for route in self.routes:
            if route.source_rank != route.target_rank:
                found[node_of_rank[route.source_rank] != node_of_rank[route.target_rank]] += route.numel
        return found[0], found[1]


class Routes:
    """The passages of one layout, each made when it is first asked for.

    >>> routes = Routes(Layout.flat(row=4, num_slots=2, held=((0, 4), (4, 6), (6, 8))))
    >>> for route in routes.passage(source=0, target=1).routes:
    ...     print(f"rank {route.source_rank} gives {route.numel} to rank {route.target_rank}")
    rank 0 gives 2 to rank 1
    rank 0 gives 2 to rank 2
    """

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self._made: dict[tuple[int, int], Passage] = {}

    def passage(self, source: int, target: int) -> Passage:
        """From slot `source` to slot `target`; nothing passes where every rank holds all slots."""
        shapes = self.layout.shapes
        ends = shapes[source], shapes[target]
        if ends not in self._made:
            self._made[ends] = Passage(_routes(*(self.layout.pieces[slot] for slot in ends)))
        return self._made[ends]

    def shapes_of(self, rank: int) -> set[int]:
        """Those of the slots of which the rank holds something."""
        return {self.layout.shapes[slot] for slot in self.layout.slots[rank]}


def peers(layouts: Iterable[Layout], rank: int) -> list[int]:
    """The other ranks that `rank` may exchange with, whichever experts change places; it is one of theirs.

    Args:
        layouts: of all tensors that travel; equal ones are looked at once.
        rank: whose peers are wanted.
    """
    found: set[int] = set()
    for layout in set(layouts):
        if layout.everywhere:
            continue
        routes = Routes(layout)
        for own in routes.shapes_of(rank):
            for other in set(layout.shapes):
                for passage in (routes.passage(own, other), routes.passage(other, own)):
                    for route in passage.of(rank):
                        found |= {route.source_rank, route.target_rank}
    return sorted(found - {rank})


def _routes(sources: Sequence[Piece], targets: Sequence[Piece]) -> Iterator[Route]:
    holders = _Holders(sources)
    twins: dict[tuple[int, int], list[int]] = {}  # of each range, the ranks that receive it
    for piece in targets:
        twins.setdefault((piece.start, piece.stop), []).append(piece.rank)
    places = {ends: {rank: nth for nth, rank in reversed([*enumerate(ranks)])} for ends, ranks in twins.items()}
    for number, target in enumerate(targets):
        nth = places[target.start, target.stop][target.rank]
        at = target.start
        while at < target.stop:
            giving = holders.giving(at, target.rank, nth)
            source = sources[giving]
            stop = min(target.stop, source.stop)
            yield Route(source.rank, target.rank, giving, number, at - source.start, at - target.start, stop - at)
            at = stop


class _Holders:
    """Who gives one element of a slot's row: the receiving rank itself if it can, else the holders in turn, so that
    none gives to all."""

    def __init__(self, pieces: Sequence[Piece]) -> None:
        self._pieces = pieces
        ranges: dict[tuple[int, int], list[int]] = {}
        for number, piece in enumerate(pieces):
            ranges.setdefault((piece.start, piece.stop), []).append(number)
        self._numbers = list(ranges.values())
        self._own = [{pieces[number].rank: number for number in reversed(numbers)} for numbers in self._numbers]
        self._starts = [start for start, _ in ranges]
        self._are_apart = all(one[1] <= other[0] for one, other in pairwise(ranges))

    def giving(self, element: int, rank: int, nth: int) -> int:
        """The number of the piece that the `nth` rank to receive this element, `rank`, has it from."""
        if self._are_apart:
            at = bisect_right(self._starts, element) - 1
            own = self._own[at].get(rank)
            numbers = self._numbers[at]
        else:
            numbers = [number for number, piece in enumerate(self._pieces) if piece.start <= element < piece.stop]
            own = next((number for number in numbers if self._pieces[number].rank == rank), None)
        return numbers[nth % len(numbers)] if own is None else own
