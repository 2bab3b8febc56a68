"""From two placements to what must be done: closed cycles, commits, copies, messages and rounds. Pure.

A change of placement is a set of exchanges: closed cycles of cells, each of which receives what the next one holds. A
cell is a slot or, where the router limits its choice to groups, a whole block of slots if another group moves in: the
block has to hold one group at any time. A commit is one or more exchanges that are staged together and then written
together, so the placement after each commit keeps the same rules as the ones before and after the move. An exchange
that is too long for the staging budget becomes several shorter ones, each closed.
Shapes: L layers, P slots, M GPUs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from distplb.migrate.pieces import Layout, Piece
from distplb.placement import Placement

__all__ = ["Copy", "RankStep", "SlotMove", "commits", "copies", "cycles", "exchanges", "rank_step", "rounds"]

Cell = range  # consecutive slots whose experts go together


@dataclass(frozen=True)
class SlotMove:
    """In one layer, slot `target` receives what slot `source` holds."""

    layer: int
    source: int
    target: int


@dataclass(frozen=True, slots=True)
class Copy:
    """`count` elements of tensor number `tensor`, from one rank's local offset to another's (or its own)."""

    tensor: int
    source_rank: int
    source_offset: int
    target_rank: int
    target_offset: int
    count: int


def cycles(old: Sequence[int], new: Sequence[int]) -> list[list[int]]:
    """Closed cycles of slots: each slot receives what the next one holds, the last what the first holds.

    >>> cycles(old=[0, 1, 2, 3], new=[1, 2, 0, 3])
    [[0, 1, 2]]

    Args:
        old: the expert of each slot, each expert once.
        new: the same experts, placed anew.
    """
    slot_of = {expert: slot for slot, expert in enumerate(old)}
    found, seen = [], [False] * len(old)
    for start in range(len(old)):
        cycle, slot = [], start
        while not seen[slot]:
            seen[slot] = True
            cycle.append(slot)
            slot = slot_of[new[slot]]
        if len(cycle) > 1:
            found.append(cycle)
    return found


def exchanges(old: Sequence[int], new: Sequence[int], num_groups: int | None = None) -> list[list[Cell]]:
    """The smallest exchanges that keep blocks of routing groups whole, and together lead from one table to another.

    >>> exchanges(old=[0, 1, 2, 3, 4, 5], new=[4, 5, 3, 2, 0, 1])
    [[range(0, 1), range(4, 5)], [range(1, 2), range(5, 6)], [range(2, 3), range(3, 4)]]
    >>> exchanges(old=[0, 1, 2, 3, 4, 5], new=[4, 5, 3, 2, 0, 1], num_groups=3)
    [[range(0, 2), range(4, 6)], [range(2, 3), range(3, 4)]]

    Args:
        old, new: `[P]`, the expert of each slot, each expert once; with groups, both of whole blocks.
        num_groups: blocks of P / `num_groups` slots hold the experts of one group each; no such rule where None.

    Returns:
        Closed cycles of cells: each receives the experts that the next one holds, the last those of the first.
    """
    if num_groups is None:
        return [[range(slot, slot + 1) for slot in cycle] for cycle in cycles(old, new)]
    size = len(old) // num_groups
    blocks = [range(start, start + size) for start in range(0, len(old), size)]
    before, after = ([table[block.start] // size for block in blocks] for table in (old, new))
    found = [[blocks[number] for number in cycle] for cycle in cycles(before, after)]
    for block, group, wanted in zip(blocks, before, after, strict=True):
        if group == wanted:
            inside = cycles([old[slot] for slot in block], [new[slot] for slot in block])
            found += [[range(block[place], block[place] + 1) for place in cycle] for cycle in inside]
    return found


def commits(
    old: Placement,
    new: Placement,
    gpu_bytes: Sequence[int],
    router_bytes: Sequence[int],
    budget: int,
    most: int | None = None,
    num_groups: int | None = None,
) -> list[list[SlotMove]]:
    """The moves of each commit, in order; none stages more than `budget` bytes on any rank if a swap of two cells fits.

    Args:
        old: the placement in force; without replicas.
        new: the placement wanted; without replicas.
        gpu_bytes: by layer, what the GPU of a slot stages when that slot receives an expert.
        router_bytes: by layer, what every rank stages besides for each slot that receives.
        budget: in bytes, on each rank.
        most: commits that are wanted, the first ones; all where None.
        num_groups: of a router whose groups stay in blocks, as of `exchanges`.
    """
    return list(islice(_all_commits(old, new, gpu_bytes, router_bytes, budget, num_groups), most))


def _all_commits(
    old: Placement,
    new: Placement,
    gpu_bytes: Sequence[int],
    router_bytes: Sequence[int],
    budget: int,
    num_groups: int | None,
) -> Iterator[list[SlotMove]]:
    batch: list[SlotMove] = []
    staged = _Staged(gpu_bytes, router_bytes, old)
    for layer in range(old.num_layers):
        table, wanted = old.expert_of_slot[layer].tolist(), new.expert_of_slot[layer].tolist()
        for cells in exchanges(table, wanted, num_groups):
            for part in _split(layer, cells, table, wanted, staged, budget):
                if batch and staged.peak(batch + part) > budget:
                    yield batch
                    batch = []
                # Parts of one exchange read what the one before writes. They never share a commit: an exchange is only
                # cut where one more of its cells would exceed the budget.
                batch = batch + part
    if batch:
        yield batch


@dataclass(frozen=True)
class _Staged:
    gpu_bytes: Sequence[int]
    router_bytes: Sequence[int]
    placement: Placement

    def peak(self, moves: Sequence[SlotMove]) -> int:
        """Bytes staged on the fullest rank."""
        of_gpu: dict[int, int] = {}
        for move in moves:
            gpu = move.target // self.placement.slots_per_gpu
            of_gpu[gpu] = of_gpu.get(gpu, 0) + self.gpu_bytes[move.layer]
        return max(of_gpu.values(), default=0) + sum(self.router_bytes[move.layer] for move in moves)


def _split(
    layer: int, cells: list[Cell], table: list[int], wanted: Sequence[int], staged: _Staged, budget: int
) -> Iterator[list[SlotMove]]:
    """The exchange as closed cycles within the budget, one after the other the same change; made in `table`."""
    while len(cells) > 1:
        length = 2
        while length < len(cells) and staged.peak(_moves(layer, cells[: length + 1], table, wanted)) <= budget:
            length += 1
        part = _moves(layer, cells[:length], table, wanted)
        yield part
        arrived = [table[move.source] for move in part]
        for move, expert in zip(part, arrived, strict=True):
            table[move.target] = expert
        # The last cell of the part now holds what the first held, which the rest of the cycle still waits for.
        cells = cells[length - 1 :] if length < len(cells) else []


def _moves(layer: int, cells: list[Cell], table: Sequence[int], wanted: Sequence[int]) -> list[SlotMove]:
    """Each cell receives from the next one; where that is not yet what it is to hold at last, in the order it comes."""
    found = []
    for target, source in zip(cells, cells[1:] + cells[:1], strict=True):
        slot_of = {table[slot]: slot for slot in source}
        experts = [wanted[slot] for slot in target]
        if not slot_of.keys() >= set(experts):
            experts = list(slot_of)
        found += [SlotMove(layer, slot_of[expert], slot) for slot, expert in zip(target, experts, strict=True)]
    return found


def copies(moves: Sequence[SlotMove], tensors: Sequence[Sequence[tuple[int, Layout]]], rank: int) -> list[Copy]:
    """What the moves mean for every tensor: all copies between ranks, and those inside `rank`.

    Args:
        moves: of one commit.
        tensors: by layer, the number and the layout of each tensor that travels.
        rank: whose local copies are wanted.
    """
    return [
        copy
        for move in moves
        for number, layout in tensors[move.layer]
        for copy in _row_copies(move, number, layout, rank)
        if copy.source_rank != copy.target_rank or copy.target_rank == rank
    ]


def _row_copies(move: SlotMove, number: int, layout: Layout, rank: int) -> Iterator[Copy]:
    sources = layout.pieces[move.source]
    for target in layout.pieces[move.target]:
        if layout.everywhere and target.rank != rank:
            continue
        twins = [p.rank for p in layout.pieces[move.target] if (p.start, p.stop) == (target.start, target.stop)]
        at = target.start
        while at < target.stop:
            source = _source_at(at, sources, target.rank, twins.index(target.rank))
            stop = min(target.stop, source.stop)
            yield Copy(
                number,
                source.rank,
                source.offset + at - source.start,
                target.rank,
                target.offset + at - target.start,
                stop - at,
            )
            at = stop


def _source_at(element: int, sources: Sequence[Piece], rank: int, nth: int) -> Piece:
    """Who gives one element: `rank` itself if it can, else the holders in turn, so that none gives to all."""
    holders = [piece for piece in sources if piece.start <= element < piece.stop]
    own = [piece for piece in holders if piece.rank == rank]
    return own[0] if own else holders[nth % len(holders)]


def rounds(pairs: Sequence[tuple[int, int]], limit: int) -> list[list[tuple[int, int]]]:
    """Messages (source rank, target rank) in rounds in which no rank has more than `limit` operations."""
    found: list[list[tuple[int, int]]] = []
    used: list[dict[int, int]] = []
    for source, target in pairs:
        at = 0
        while at < len(found) and max(used[at].get(source, 0), used[at].get(target, 0)) >= limit:
            at += 1
        if at == len(found):
            found.append([])
            used.append({})
        found[at].append((source, target))
        for rank in (source, target):
            used[at][rank] = used[at].get(rank, 0) + 1
    return found


@dataclass(frozen=True)
class RankStep:
    """One commit as one rank sees it. A message is one or more copies, whose bytes follow each other in it.

    Args:
        local: copies from this rank to itself.
        sends: by target rank, the messages in their order.
        receives: by source rank, likewise.
        rounds: (source rank, target rank) of every message between any two ranks, the same on all ranks.
    """

    local: list[Copy]
    sends: dict[int, list[list[Copy]]]
    receives: dict[int, list[list[Copy]]]
    rounds: list[list[tuple[int, int]]]


def rank_step(wanted: Sequence[Copy], rank: int, limit: int, is_large: Callable[[Copy], bool]) -> RankStep:
    """The copies of a commit, sorted into this rank's messages; at most `limit` operations a rank and round.

    A large copy is a message of its own, which can be sent from where it lies; the others that go the same way are
    one message, ahead of these.
    """
    local: list[Copy] = []
    ways: dict[tuple[int, int], list[list[Copy]]] = {}
    for copy in wanted:
        if copy.source_rank == copy.target_rank:
            local.append(copy)
            continue
        small, *_ = messages = ways.setdefault((copy.source_rank, copy.target_rank), [[]])
        if is_large(copy):
            messages.append([copy])
        else:
            small.append(copy)
    messages_of = {way: [message for message in ways[way] if message] for way in sorted(ways)}
    return RankStep(
        local,
        sends={target: messages for (source, target), messages in messages_of.items() if source == rank},
        receives={source: messages for (source, target), messages in messages_of.items() if target == rank},
        rounds=rounds([way for way, messages in messages_of.items() for _ in messages], limit),
    )
