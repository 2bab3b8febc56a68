"""Turn the moves of a commit into the copies, messages and rounds of one rank. Pure.

A rank lists only its own copies. The round of a message depends on all messages of its two ranks, on those of the ranks
that these exchange with, and so on. Such messages are counted for each pair of ranks, without listing other ranks'
copies, so all ranks compute the same rounds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from distplb.migrate.layout import Layout
from distplb.migrate.schedule import SlotMove
from distplb.migrate.slot_routes import LayoutRoutes, Passage

__all__ = ["Copy", "MessagePlanner", "RankCommit", "rounds"]

Way = tuple[int, int]  # (source rank, target rank)


@dataclass(frozen=True, slots=True)
class Copy:
    """`count` elements of tensor `tensor`, from a local offset on one rank to a local offset on another or the same."""

    tensor: int
    source_rank: int
    source_offset: int
    target_rank: int
    target_offset: int
    count: int


@dataclass(frozen=True)
class RankCommit:
    """One commit as one rank sees it. A message is one or more copies, whose bytes are consecutive.

    Args:
        local: copies from this rank to itself.
        sends: by target rank, the messages in order.
        receives: by source rank, the messages in order.
        rounds: by round, (source rank, target rank) of every message that this rank sends or receives. All ranks order
            their rounds alike; each omits the rounds in which it has no message.
        crossing: bytes sent between ranks, over all ranks: (inside nodes, between nodes).
    """

    local: list[Copy]
    sends: dict[int, list[list[Copy]]]
    receives: dict[int, list[list[Copy]]]
    rounds: list[list[Way]]
    crossing: tuple[int, int]


class _SameLayout(NamedTuple):
    """Tensors of a layer that have the same layout."""

    routes: LayoutRoutes
    sizes: Mapping[int, int]  # number of tensors, by bytes of an element


Passing = Mapping[tuple[int, int, int], int]  # number of moves, by index of `_SameLayout` and the shapes of both slots


class MessagePlanner:
    """Plans the copies and messages of one rank, commit by commit.

    Args:
        tensors: by layer, the index and layout of each tensor that travels.
        item_bytes: by index of a tensor, the bytes of an element.
        rank: the rank to plan for.
        node_of_rank: node of each rank of the communicator, to count bytes inside nodes and between them.
        limit: maximum number of operations of one rank in one round.
        large_bytes: a copy of at least this size is a message of its own, sent in place. The smaller copies between the
            same two ranks are packed into one message, which goes first.
    """

    def __init__(
        self,
        tensors: Sequence[Sequence[tuple[int, Layout]]],
        item_bytes: Sequence[int],
        rank: int,
        node_of_rank: Sequence[int],
        limit: int,
        large_bytes: int,
    ) -> None:
        self._rank, self._nodes, self._limit, self._large_bytes = rank, node_of_rank, limit, large_bytes
        self._tensors, self._item_bytes = tensors, item_bytes
        layouts = {id(layout): layout for of_layer in tensors for _, layout in of_layer}
        self._routes = {key: LayoutRoutes(layout) for key, layout in layouts.items()}
        self._same_layout: list[_SameLayout] = []
        self._of_layer: list[list[int]] = []  # by layer, indices into `_same_layout`
        numbers: dict[object, int] = {}
        for of_layer in tensors:
            self._of_layer.append([])
            for key in dict.fromkeys(id(layout) for _, layout in of_layer if not layout.is_everywhere):
                sizes = Counter(item_bytes[number] for number, layout in of_layer if id(layout) == key)
                number = numbers.setdefault((key, frozenset(sizes.items())), len(numbers))
                self._of_layer[-1].append(number)
                if number == len(self._same_layout):
                    self._same_layout.append(_SameLayout(self._routes[key], sizes))
        self._crosses: dict[Passage, tuple[int, int]] = {}

    def commit(self, moves: Sequence[SlotMove]) -> RankCommit:
        """Plan the moves of one commit for this rank."""
        commit = RankCommit([], {}, {}, [], (0, 0))
        for are_copied in (True, False):
            commit = self._extended(commit, moves, are_copied)
        return commit

    def _extended(self, commit: RankCommit, moves: Sequence[SlotMove], are_copied: bool) -> RankCommit:
        """Extend the commit with the moves of tensors that have copies on several ranks, or with those of all others.

        Copies of experts travel only inside an EP group, shards between all ranks. If they shared rounds, every rank
        would have to count the messages of all groups.
        """
        ways: dict[Way, list[list[Copy]]] = {}
        for copy in self.copies(moves, are_copied):
            if copy.source_rank == copy.target_rank:
                commit.local.append(copy)
                continue
            small, *_ = messages = ways.setdefault((copy.source_rank, copy.target_rank), [[]])
            if copy.count * self._item_bytes[copy.tensor] >= self._large_bytes:
                messages.append([copy])
            else:
                small.append(copy)
        for source, target in sorted(ways):
            end, peer = (commit.sends, target) if source == self._rank else (commit.receives, source)
            end.setdefault(peer, []).extend(message for message in ways[source, target] if message)
        passing = self._passing(moves, are_copied)
        of_all = rounds(self._connected(passing), self._limit) if ways else []
        own = ([way for way, number in one.items() for _ in range(number) if self._rank in way] for one in of_all)
        inside, between = self._crossing(passing)
        return replace(
            commit,
            rounds=[*commit.rounds, *(one for one in own if one)],
            crossing=(commit.crossing[0] + inside, commit.crossing[1] + between),
        )

    def copies(self, moves: Sequence[SlotMove], are_copied: bool) -> Iterator[Copy]:
        """Yield all copies from or to this rank, in the order of moves and tensors."""
        for move in moves:
            for number, layout in self._tensors[move.layer]:
                if layout.is_copied != are_copied:
                    continue
                if layout.is_everywhere:
                    starts = move.source * layout.row, move.target * layout.row
                    yield Copy(number, self._rank, starts[0], self._rank, starts[1], layout.row)
                    continue
                sources, targets = layout.pieces[move.source], layout.pieces[move.target]
                for route in self._routes[id(layout)].passage(move.source, move.target).of(self._rank):
                    yield Copy(
                        number,
                        route.source_rank,
                        sources[route.source_piece].offset + route.source_start,
                        route.target_rank,
                        targets[route.target_piece].offset + route.target_start,
                        route.numel,
                    )

    def _passing(self, moves: Sequence[SlotMove], are_copied: bool) -> Passing:
        passing = Counter[tuple[int, int, int]]()
        for move in moves:
            for number in self._of_layer[move.layer]:
                layout = self._same_layout[number].routes.layout
                if layout.is_copied == are_copied:
                    passing[number, layout.shapes[move.source], layout.shapes[move.target]] += 1
        return passing

    def _crossing(self, passing: Passing) -> tuple[int, int]:
        """Count the bytes sent between ranks, over all ranks: (inside nodes, between nodes)."""
        inside = between = 0
        for (number, source, target), moves in passing.items():
            routes, sizes = self._same_layout[number]
            passage = routes.passage(source, target)
            if passage not in self._crosses:
                self._crosses[passage] = passage.crossing(self._nodes)
            each = moves * sum(size * tensors for size, tensors in sizes.items())
            inside += each * self._crosses[passage][0]
            between += each * self._crosses[passage][1]
        return inside, between

    def _connected(self, passing: Passing) -> dict[Way, int]:
        """Count the messages that this rank's rounds depend on, by way.

        These are the messages between the ranks that it exchanges with, the ranks that those exchange with, and so on.
        """
        at: dict[tuple[int, int], list[tuple[int, int, int]]] = {}  # keys of `passing`, by the shape of either slot
        for number, source, target in passing:
            for shape in {source, target}:
                at.setdefault((number, shape), []).append((number, source, target))
        small: set[Way] = set()
        large = Counter[Way]()
        reached, waiting = {self._rank}, [self._rank]
        while waiting:
            rank = waiting.pop()
            others: set[int] = set()
            for ends in {ends for place in self._places(rank) for ends in at.get(place, ())}:
                routes, sizes = self._same_layout[ends[0]]
                for route in routes.passage(*ends[1:]).of(rank):
                    way = route.source_rank, route.target_rank
                    others.update(way)
                    if rank == route.target_rank:  # counted at its source
                        continue
                    for size, tensors in sizes.items():
                        if route.numel * size >= self._large_bytes:
                            large[way] += tensors * passing[ends]
                        else:
                            small.add(way)
            waiting += others - reached
            reached |= others
        # First every rank sends to the next one, then to the one after that: each sends as often as it receives.
        in_turn = sorted({*small, *large}, key=lambda way: ((way[1] - way[0]) % len(self._nodes), way))
        return {way: large[way] + (way in small) for way in in_turn}

    def _places(self, rank: int) -> Iterator[tuple[int, int]]:
        """Yield (index of `_SameLayout`, shape of a slot) for everything that the rank holds."""
        for number, (routes, _) in enumerate(self._same_layout):
            for shape in routes.shapes_of(rank):
                yield number, shape


def rounds(messages: Mapping[Way, int], limit: int) -> list[dict[Way, int]]:
    """Divide messages into rounds in which no rank has more than `limit` operations.

    A round gives the number of messages of each way. The ways take turns, and each message goes into the first round
    that has room for it at both ends.

    >>> rounds({(0, 1): 3, (1, 0): 2}, limit=2)
    [{(0, 1): 1, (1, 0): 1}, {(0, 1): 1, (1, 0): 1}, {(0, 1): 1}]

    Args:
        messages: number of messages of each way (source rank, target rank), in the order in which the ways take turns.
        limit: operations per rank and round; 2 or more if a rank is to send and receive in the same round.
    """
    ways_of = Counter(rank for way in messages for rank in way)
    turn = max(1, limit // max(ways_of.values(), default=1))  # messages per way, so that one turn of all fits a round
    planned: list[dict[Way, int]] = []
    used: dict[int, list[int]] = {rank: [] for rank in ways_of}  # operations of each rank, by round
    full = dict.fromkeys(ways_of, 0)  # index of each rank's first round with room
    left = dict(messages)
    while left:
        for way in list(left):
            number = min(turn, left[way])
            left[way] -= number
            if not left[way]:
                del left[way]
            at = max(full[rank] for rank in way)
            while number:
                if at == len(planned):
                    planned.append({})
                for rank in way:
                    used[rank] += [0] * (at + 1 - len(used[rank]))
                part = min(number, limit - max(used[rank][at] for rank in way))
                if part:
                    planned[at][way] = planned[at].get(way, 0) + part
                    number -= part
                    for rank in way:
                        used[rank][at] += part
                        while full[rank] < len(used[rank]) and used[rank][full[rank]] == limit:
                            full[rank] += 1
                at += 1
    return planned
