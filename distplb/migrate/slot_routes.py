"""Which rank sends which elements to which rank when one slot receives what another holds. Pure.

Slots that are held alike, such as all slots of a GPU, share their routes, which are computed once.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

from distplb.migrate.layout import Layout, Piece

__all__ = ["LayoutRoutes", "Passage", "Route", "peers"]

_FEW = 8  # routes; up to this many, listing them by rank does not pay off


class Route(NamedTuple):
    """`numel` elements of a row from one rank to another, or to itself.

    Args:
        source_rank, target_rank: the ranks that send and receive.
        source_piece, target_piece: indices of the pieces, among those of the source slot and of the target slot.
        source_start, target_start: the first element, counted from the beginning of each piece.
        numel: number of elements.
    """

    source_rank: int
    target_rank: int
    source_piece: int
    target_piece: int
    source_start: int
    target_start: int
    numel: int


class Passage:
    """All routes from one slot to another, in an order that all ranks share.

    Args:
        routes: the routes, in that order.
    """

    __slots__ = ("_of_rank", "routes")

    def __init__(self, routes: Iterable[Route]) -> None:
        self.routes = tuple(routes)
        self._of_rank: dict[int, list[Route]] | None = None  # None if there are few
        if len(self.routes) > _FEW:
            self._of_rank = {}
            for route in self.routes:
                for rank in {route.source_rank, route.target_rank}:
                    self._of_rank.setdefault(rank, []).append(route)

    def of(self, rank: int) -> list[Route]:
        """The routes on which the rank sends or receives."""
        if self._of_rank is not None:
            return self._of_rank.get(rank, [])
        return [route for route in self.routes if rank in (route.source_rank, route.target_rank)]

    def crossing(self, node_of_rank: Sequence[int]) -> tuple[int, int]:
        """Count the elements sent between ranks: (inside nodes, between nodes)."""
        inside = between = 0
        for route in self.routes:
            if node_of_rank[route.source_rank] != node_of_rank[route.target_rank]:
                between += route.numel
            elif route.source_rank != route.target_rank:
                inside += route.numel
        return inside, between


class LayoutRoutes:
    """The passages of one layout, each computed when it is first needed.

    >>> from distplb.migrate.layout import Part
    >>> routes = LayoutRoutes(Layout(4, 2, ((Part(0, 4, 0, 4),), (Part(4, 6, 0, 4),), (Part(6, 8, 0, 4),))))
    >>> for route in routes.passage(source=0, target=1).routes:
    ...     print(f"rank {route.source_rank} sends {route.numel} to rank {route.target_rank}")
    rank 0 sends 2 to rank 1
    rank 0 sends 2 to rank 2
    """

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self._passages: dict[tuple[int, int], Passage] = {}

    def passage(self, source: int, target: int) -> Passage:
        """The passage from slot `source` to slot `target`; nothing crosses ranks if every rank holds all slots."""
        shapes = self.layout.shapes
        ends = shapes[source], shapes[target]
        if ends not in self._passages:
            self._passages[ends] = Passage(_routes(*(self.layout.pieces[slot] for slot in ends)))
        return self._passages[ends]

    def shapes_of(self, rank: int) -> set[int]:
        """The shapes of the slots of which the rank holds any element."""
        return {self.layout.shapes[slot] for slot in self.layout.slots[rank]}


def peers(layouts: Iterable[Layout], rank: int) -> list[int]:
    """List the ranks that `rank` may exchange with, whichever experts change places; `rank` is also a peer of each.

    Args:
        layouts: layouts of all tensors that travel; equal ones are examined once.
        rank: the rank whose peers to list.
    """
    ranks: set[int] = set()
    for layout in set(layouts):
        if layout.is_everywhere:
            continue
        routes = LayoutRoutes(layout)
        for own in routes.shapes_of(rank):
            for other in set(layout.shapes):
                for passage in (routes.passage(own, other), routes.passage(other, own)):
                    for route in passage.of(rank):
                        ranks |= {route.source_rank, route.target_rank}
    return sorted(ranks - {rank})


def _routes(sources: Sequence[Piece], targets: Sequence[Piece]) -> Iterator[Route]:
    holders = _Holders(sources)
    twins: dict[tuple[int, int], list[int]] = {}  # by range, the ranks that receive it
    for piece in targets:
        twins.setdefault((piece.start, piece.stop), []).append(piece.rank)
    places = {ends: {rank: nth for nth, rank in reversed([*enumerate(ranks)])} for ends, ranks in twins.items()}
    for target_number, target in enumerate(targets):
        nth = places[target.start, target.stop][target.rank]
        at = target.start
        while at < target.stop:
            source_number = holders.source(at, target.rank, nth)
            source = sources[source_number]
            stop = min(target.stop, source.stop)
            starts = at - source.start, at - target.start
            yield Route(source.rank, target.rank, source_number, target_number, *starts, stop - at)
            at = stop


class _Holders:
    """The pieces that an element of a slot's row can come from.

    A receiving rank uses its own piece if it has one. Otherwise the holders take turns, so that none sends to all.
    """

    def __init__(self, pieces: Sequence[Piece]) -> None:
        self._pieces = pieces
        ranges: dict[tuple[int, int], list[int]] = {}
        for number, piece in enumerate(pieces):
            ranges.setdefault((piece.start, piece.stop), []).append(number)
        self._numbers = list(ranges.values())
        self._own = [{pieces[number].rank: number for number in reversed(numbers)} for numbers in self._numbers]
        self._starts = [start for start, _ in ranges]
        self._are_apart = all(one[1] <= other[0] for one, other in pairwise(ranges))

    def source(self, element: int, rank: int, nth: int) -> int:
        """Index of the piece from which `rank`, the `nth` rank to receive this element, gets it."""
        if self._are_apart:
            at = bisect_right(self._starts, element) - 1
            own = self._own[at].get(rank)
            numbers = self._numbers[at]
        else:
            numbers = [number for number, piece in enumerate(self._pieces) if piece.start <= element < piece.stop]
            own = next((number for number in numbers if self._pieces[number].rank == rank), None)
        return numbers[nth % len(numbers)] if own is None else own
