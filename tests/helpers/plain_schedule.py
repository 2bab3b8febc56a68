"""The specification of a commit's copies, messages and rounds: all copies of all ranks, one by one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

from distplb.migrate.layout import Layout, Part, Piece, joined
from distplb.migrate.messages import Copy
from distplb.migrate.schedule import SlotMove

__all__ = ["all_copies", "flat_layout", "messages", "plain_rounds"]

Way = tuple[int, int]


def flat_layout(row: int, num_slots: int, held: Iterable[tuple[int, int]]) -> Layout:
    """Build a layout in which each rank holds one range (start, stop) of slot-major elements."""
    return Layout(row, num_slots, tuple(joined([Part(start, stop, 0, row)]) for start, stop in held))


def all_copies(moves: Sequence[SlotMove], tensors: Sequence[Sequence[tuple[int, Layout]]]) -> list[Copy]:
    """List all copies of all ranks, in the order of moves and tensors."""
    return [
        copy
        for move in moves
        for number, layout in tensors[move.layer]
        for target in layout.pieces[move.target]
        for copy in _into(target, layout, move, number)
    ]


def _into(target: Piece, layout: Layout, move: SlotMove, number: int) -> Iterator[Copy]:
    twins = [p.rank for p in layout.pieces[move.target] if (p.start, p.stop) == (target.start, target.stop)]
    at = target.start
    while at < target.stop:
        source = _giving(at, layout.pieces[move.source], target.rank, twins.index(target.rank))
        stop = min(target.stop, source.stop)
        places = source.offset + at - source.start, target.offset + at - target.start
        yield Copy(number, source.rank, places[0], target.rank, places[1], stop - at)
        at = stop


def _giving(element: int, sources: Sequence[Piece], rank: int, nth: int) -> Piece:
    """Choose the source: `rank` itself if it holds the element, otherwise the holders in turn."""
    holders = [piece for piece in sources if piece.start <= element < piece.stop]
    own = [piece for piece in holders if piece.rank == rank]
    return own[0] if own else holders[nth % len(holders)]


def messages(
    copies: Sequence[Copy], layouts: Mapping[int, Layout], is_large: Mapping[Copy, bool]
) -> list[dict[Way, list[list[Copy]]]]:
    """Group copies into messages by way, replicated tensors before others: small copies together, large ones alone."""
    found: list[dict[Way, list[list[Copy]]]] = []
    for are_copied in (True, False):
        ways: dict[Way, list[list[Copy]]] = {}
        for copy in copies:
            way = copy.source_rank, copy.target_rank
            if way[0] == way[1] or is_copied(layouts[copy.tensor]) != are_copied:
                continue
            ways.setdefault(way, [[]])
            if is_large[copy]:
                ways[way].append([copy])
            else:
                ways[way][0].append(copy)
        found.append({way: [message for message in some if message] for way, some in ways.items()})
    return found


def is_copied(layout: Layout) -> bool:
    """Whether any element is on several ranks."""
    holders = Counter(
        (slot, element)
        for slot, pieces in enumerate(layout.pieces)
        for piece in pieces
        for element in range(piece.start, piece.stop)
    )
    return max(holders.values()) > 1


def plain_rounds(counts: Mapping[Way, int], size: int, limit: int) -> list[list[Way]]:
    """Assign messages to rounds by first fit; ways take turns of as many messages as let all ways fit in one round."""
    ways_of = Counter(rank for way in counts for rank in way)
    turn = max(1, limit // max(ways_of.values(), default=1))
    left = {way: counts[way] for way in sorted(counts, key=lambda way: ((way[1] - way[0]) % size, way))}
    queue = []
    while any(left.values()):
        for way in left:
            queue += [way] * min(turn, left[way])
            left[way] -= min(turn, left[way])
    found: list[list[Way]] = []
    for way in queue:
        for some in found:
            used = Counter(rank for other in some for rank in other)
            if max(used[rank] for rank in way) < limit:
                some.append(way)
                break
        else:
            found.append([way])
    return found
