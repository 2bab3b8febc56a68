"""From the moves of a commit to what one rank copies, sends and receives, and in which rounds. Pure.

A rank makes its own copies only. Which round a message goes in depends on all that its two ends, and those whom they
exchange with, have to send; that is counted, way by way, without making the others' copies. So all ranks come to the
same rounds, each from what it needs of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from distplb.migrate.pieces import Layout
from distplb.migrate.routes import Passage, Routes
from distplb.migrate.schedule import SlotMove

__all__ = ["Copy", "Messages", "RankStep", "rounds"]

Way = tuple[int, int]  # from rank to rank


@dataclass(frozen=True, slots=True)
class Copy:
    """`count` elements of tensor number `tensor`, from one rank's local offset to another's (or its own)."""

    tensor: int
    source_rank: int
    source_offset: int
    target_rank: int
    target_offset: int
    count: int


@dataclass(frozen=True)
class RankStep:
    """One commit as one rank sees it. A message is one or more copies, whose bytes follow each other in it.

    Args:
        local: copies from this rank to itself.
        sends: by target rank, the messages in their order.
        receives: by source rank, likewise.
        rounds: (source rank, target rank) of every message that this rank sends or receives. All ranks number their
            rounds alike, and leave out those that they have no message in.
        crossing: bytes from rank to rank over all ranks, inside nodes and between them.
    """

    local: list[Copy]
    sends: dict[int, list[list[Copy]]]
    receives: dict[int, list[list[Copy]]]
    rounds: list[list[Way]]
    crossing: tuple[int, int]


class _Alike(NamedTuple):
    """Tensors of a layer that are held alike."""

    routes: Routes
    sizes: Mapping[int, int]  # how many of them have elements of so many bytes


Passing = Mapping[tuple[int, int, int], int]  # by number of alike tensors and the shapes of both slots: how many moves


class Messages:
    """Makes the step of one rank for each commit.

    Args:
        tensors: by layer, the number and the layout of each tensor that travels.
        item_bytes: by number of a tensor, the bytes of an element.
        rank: whose steps are wanted.
        node_of_rank: by which bytes inside nodes and between them are told apart.
        limit: operations on one rank in one round.
        large_bytes: of a copy that is a message of its own, which can be sent from where it lies. The smaller ones
            that go the same way are one message, ahead of these.
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
        self._routes = {key: Routes(layout) for key, layout in layouts.items()}
        self._alike: list[_Alike] = []
        self._of_layer: list[list[int]] = []  # the numbers of its alike tensors
        numbers: dict[object, int] = {}
        for of_layer in tensors:
            self._of_layer.append([])
            for key in dict.fromkeys(id(layout) for _, layout in of_layer if not layout.everywhere):
                sizes = Counter(item_bytes[number] for number, layout in of_layer if id(layout) == key)
                number = numbers.setdefault((key, frozenset(sizes.items())), len(numbers))
                self._of_layer[-1].append(number)
                if number == len(self._alike):
                    self._alike.append(_Alike(self._routes[key], sizes))
        self._crosses: dict[Passage, tuple[int, int]] = {}

    def step(self, moves: Sequence[SlotMove]) -> RankStep:
        """What the moves of one commit mean for this rank."""
        step = RankStep([], {}, {}, [], (0, 0))
        for are_copied in (True, False):
            step = self._followed(step, moves, are_copied)
        return step

    def _followed(self, step: RankStep, moves: Sequence[SlotMove], are_copied: bool) -> RankStep:
        """The step, and then the moves of the tensors that are copied, or of those that are not.

        Copies of experts only pass inside an EP group, shards between all ranks. Where these had rounds in common, the
        messages of all groups would have to be counted.
        """
        ways: dict[Way, list[list[Copy]]] = {}
        for copy in self.copies(moves, are_copied):
            if copy.source_rank == copy.target_rank:
                step.local.append(copy)
                continue
            small, *_ = messages = ways.setdefault((copy.source_rank, copy.target_rank), [[]])
            if copy.count * self._item_bytes[copy.tensor] >= self._large_bytes:
                messages.append([copy])
            else:
                small.append(copy)
        for source, target in sorted(ways):
            some = [message for message in ways[source, target] if message]
            end, peer = (step.sends, target) if source == self._rank else (step.receives, source)
            end.setdefault(peer, []).extend(some)
        passing = self._passing(moves, are_copied)
        found = rounds(self._connected(passing), self._limit) if ways else []
        own = ([way for way, number in one.items() for _ in range(number) if self._rank in way] for one in found)
        inside, between = self._crossing(passing)
        return replace(
            step,
            rounds=[*step.rounds, *(one for one in own if one)],
            crossing=(step.crossing[0] + inside, step.crossing[1] + between),
        )

    def copies(self, moves: Sequence[SlotMove], are_copied: bool) -> Iterator[Copy]:
        """All that this rank gives or receives, in the order of moves and tensors."""
        for move in moves:
            for number, layout in self._tensors[move.layer]:
                if layout.is_copied != are_copied:
                    continue
                if layout.everywhere:
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
        found = Counter[tuple[int, int, int]]()
        for move in moves:
            for number in self._of_layer[move.layer]:
                layout = self._alike[number].routes.layout
                if layout.is_copied == are_copied:
                    found[number, layout.shapes[move.source], layout.shapes[move.target]] += 1
        return found

    def _crossing(self, passing: Passing) -> tuple[int, int]:
        """Bytes from rank to rank, over all ranks, inside nodes and between them."""
        inside = between = 0
        for (alike, source, target), moves in passing.items():
            routes, sizes = self._alike[alike]
            passage = routes.passage(source, target)
            if passage not in self._crosses:
                self._crosses[passage] = passage.crossing(self._nodes)
            each = moves * sum(size * number for size, number in sizes.items())
            inside += each * self._crosses[passage][0]
            between += each * self._crosses[passage][1]
        return inside, between

    def _connected(self, passing: Passing) -> dict[Way, int]:
        """The messages of each way between the ranks that this one exchanges with, those that these exchange with,
        and so on: all that have a say in the rounds of this rank."""
        at: dict[tuple[int, int], list[tuple[int, int, int]]] = {}  # what passes, by either of its slots
        for alike, source, target in passing:
            for shape in {source, target}:
                at.setdefault((alike, shape), []).append((alike, source, target))
        small: set[Way] = set()
        large = Counter[Way]()
        reached, waiting = {self._rank}, [self._rank]
        while waiting:
            rank = waiting.pop()
            others: set[int] = set()
            for ends in {ends for place in self._places(rank) for ends in at.get(place, ())}:
                routes, sizes = self._alike[ends[0]]
                for route in routes.passage(*ends[1:]).of(rank):
                    way = route.source_rank, route.target_rank
                    others.update(way)
                    if rank == route.target_rank:  # counted where it comes from
                        continue
                    for size, number in sizes.items():
                        if route.numel * size >= self._large_bytes:
                            large[way] += number * passing[ends]
                        else:
                            small.add(way)
            waiting += others - reached
            reached |= others
        # First all ranks to the next one, then all to the one after that: as many sends as receives on each.
        in_turn = sorted({*small, *large}, key=lambda way: ((way[1] - way[0]) % len(self._nodes), way))
        return {way: large[way] + (way in small) for way in in_turn}

    def _places(self, rank: int) -> Iterator[tuple[int, int]]:
        """Alike tensors, and the shapes of the slots of which the rank holds something of these."""
        for alike, (routes, _) in enumerate(self._alike):
            for shape in routes.shapes_of(rank):
                yield alike, shape


def rounds(messages: Mapping[Way, int], limit: int) -> list[dict[Way, int]]:
    """Rounds in which no rank has more than `limit` operations, as the number of messages of each way.

    The ways take turns, and each message goes in the first round that has room for it at both ends.

    >>> rounds({(0, 1): 3, (1, 0): 2}, limit=2)
    [{(0, 1): 1, (1, 0): 1}, {(0, 1): 1, (1, 0): 1}, {(0, 1): 1}]

    Args:
        messages: of each way (source rank, target rank), in the order of their turns.
        limit: 2 or more where messages go both ways at once.
    """
    ways_of = Counter(rank for way in messages for rank in way)
    turn = max(1, limit // max(ways_of.values(), default=1))  # messages of one way, so that a round is a turn of all
    found: list[dict[Way, int]] = []
    used: dict[int, list[int]] = {rank: [] for rank in ways_of}  # by round
    full = dict.fromkeys(ways_of, 0)  # rounds before the first with room
    left = dict(messages)
    while left:
        for way in list(left):
            ends = way
            number = min(turn, left[way])
            left[way] -= number
            if not left[way]:
                del left[way]
            at = max(full[rank] for rank in ends)
            while number:
                if at == len(found):
                    found.append({})
                for rank in ends:
                    used[rank] += [0] * (at + 1 - len(used[rank]))
                some = min(number, limit - max(used[rank][at] for rank in ends))
                if some:
                    found[at][way] = found[at].get(way, 0) + some
                    number -= some
                    for rank in ends:
                        used[rank][at] += some
                        while full[rank] < len(used[rank]) and used[rank][full[rank]] == limit:
                            full[rank] += 1
                at += 1
    return found
