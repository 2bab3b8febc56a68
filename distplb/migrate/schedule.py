"""Split the change from one placement to another into exchanges and commits. Pure.

A change of placement is a set of exchanges: closed cycles of cells, in which each cell receives what the next one
holds. A cell is a slot or, if the router limits its choice to groups, a whole block of slots when another group moves
in, because a block must hold a single group at any time. A commit is one or more exchanges that are staged together and
then written together, so the placement after each commit keeps the rules that hold before and after the move. An
exchange that is too long for the staging budget is split into several shorter ones, each closed.
Shapes: L layers, P slots, M GPUs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice

from distplb.core.placement import Placement

__all__ = ["SlotMove", "commits", "cycles", "exchanges"]

Cell = range  # consecutive slots whose experts move together


@dataclass(frozen=True)
class SlotMove:
    """In one layer, slot `target` receives what slot `source` holds."""

    layer: int
    source: int
    target: int


def cycles(old: Sequence[int], new: Sequence[int]) -> list[list[int]]:
    """Find the closed cycles of slots: each slot receives what the next one holds, the last what the first holds.

    >>> cycles(old=[0, 1, 2, 3], new=[1, 2, 0, 3])
    [[0, 1, 2]]

    Args:
        old: the expert of each slot, each expert once.
        new: the same experts in their new slots.
    """
    slot_of = {expert: slot for slot, expert in enumerate(old)}
    closed, visited = [], [False] * len(old)
    for start in range(len(old)):
        cycle, slot = [], start
        while not visited[slot]:
            visited[slot] = True
            cycle.append(slot)
            slot = slot_of[new[slot]]
        if len(cycle) > 1:
            closed.append(cycle)
    return closed


def exchanges(old: Sequence[int], new: Sequence[int], num_groups: int | None = None) -> list[list[Cell]]:
    """Find the smallest exchanges that keep blocks of routing groups whole and together turn one table into another.

    >>> exchanges(old=[0, 1, 2, 3, 4, 5], new=[4, 5, 3, 2, 0, 1])
    [[range(0, 1), range(4, 5)], [range(1, 2), range(5, 6)], [range(2, 3), range(3, 4)]]
    >>> exchanges(old=[0, 1, 2, 3, 4, 5], new=[4, 5, 3, 2, 0, 1], num_groups=3)
    [[range(0, 2), range(4, 6)], [range(2, 3), range(3, 4)]]

    Args:
        old, new: `[P]`, the expert of each slot, each expert once; with groups, both in whole blocks.
        num_groups: number of routing groups: each block of P / `num_groups` slots holds the experts of one group; None
            without groups.

    Returns:
        Closed cycles of cells: each receives the experts that the next one holds, the last those of the first.
    """
    if num_groups is None:
        return [[range(slot, slot + 1) for slot in cycle] for cycle in cycles(old, new)]
    size = len(old) // num_groups
    blocks = [range(start, start + size) for start in range(0, len(old), size)]
    before, after = ([table[block.start] // size for block in blocks] for table in (old, new))
    closed = [[blocks[number] for number in cycle] for cycle in cycles(before, after)]
    for block, old_group, new_group in zip(blocks, before, after, strict=True):
        if old_group == new_group:
            inside = cycles([old[slot] for slot in block], [new[slot] for slot in block])
            closed += [[range(block[place], block[place] + 1) for place in cycle] for cycle in inside]
    return closed


def commits(
    old: Placement,
    new: Placement,
    gpu_bytes: Sequence[int],
    router_bytes: Sequence[int],
    budget: int,
    max_commits: int | None = None,
    num_groups: int | None = None,
) -> list[list[SlotMove]]:
    """List the moves of each commit; none stages more than `budget` bytes on a rank if a swap of two cells fits.

    Args:
        old: the placement in force; without replicas.
        new: the placement to reach; without replicas.
        gpu_bytes: by layer, the bytes that the GPU of a slot stages when the slot receives an expert.
        router_bytes: by layer, the bytes that every rank stages in addition for each such slot.
        budget: bytes on each rank.
        max_commits: how many commits to return at most; all where None.
        num_groups: number of routing groups, which stay in blocks; see `exchanges`.

    Returns:
        By commit, its moves, in order.
    """
    return list(islice(_all_commits(old, new, gpu_bytes, router_bytes, budget, num_groups), max_commits))


def _all_commits(
    old: Placement,
    new: Placement,
    gpu_bytes: Sequence[int],
    router_bytes: Sequence[int],
    budget: int,
    num_groups: int | None,
) -> Iterator[list[SlotMove]]:
    batch: list[SlotMove] = []
    staged = _StagedBytes(gpu_bytes, router_bytes, old.slots_per_gpu)
    for layer in range(old.num_layers):
        table, target = old.expert_of_slot[layer].tolist(), new.expert_of_slot[layer].tolist()
        for cells in exchanges(table, target, num_groups):
            for part in _split(layer, cells, table, target, staged.empty(), budget):
                slots = [move.target for move in part]
                if batch and staged.peak_with(layer, slots) > budget:
                    yield batch
                    batch, staged = [], staged.empty()
                # Each part of an exchange reads what the part before it writes. Parts never share a commit: an exchange
                # is only cut where one more of its cells would exceed the budget.
                batch += part
                staged.add(layer, slots)
    if batch:
        yield batch


class _StagedBytes:
    """Bytes staged in one commit, updated as slots are added."""

    def __init__(self, gpu_bytes: Sequence[int], router_bytes: Sequence[int], slots_per_gpu: int) -> None:
        self._gpu_bytes, self._router_bytes, self._slots_per_gpu = gpu_bytes, router_bytes, slots_per_gpu
        self._of_gpu: dict[int, int] = {}
        self._busiest = self._everywhere = 0

    def empty(self) -> _StagedBytes:
        """Return the bytes of a commit without slots."""
        return _StagedBytes(self._gpu_bytes, self._router_bytes, self._slots_per_gpu)

    def add(self, layer: int, slots: Iterable[int]) -> None:
        """Add slots that receive an expert."""
        for slot in slots:
            gpu = slot // self._slots_per_gpu
            self._of_gpu[gpu] = self._of_gpu.get(gpu, 0) + self._gpu_bytes[layer]
            self._busiest = max(self._busiest, self._of_gpu[gpu])
            self._everywhere += self._router_bytes[layer]

    def peak_with(self, layer: int, slots: Iterable[int]) -> int:
        """Bytes on the rank that stages most, if these slots were added."""
        more: dict[int, int] = {}
        busiest, everywhere = self._busiest, self._everywhere
        for slot in slots:
            gpu = slot // self._slots_per_gpu
            more[gpu] = more.get(gpu, self._of_gpu.get(gpu, 0)) + self._gpu_bytes[layer]
            busiest = max(busiest, more[gpu])
            everywhere += self._router_bytes[layer]
        return busiest + everywhere


def _split(
    layer: int, cells: list[Cell], table: list[int], target: Sequence[int], empty: _StagedBytes, budget: int
) -> Iterator[list[SlotMove]]:
    """Split an exchange into closed cycles within the budget that together make the same change to `table`."""
    while len(cells) > 1:
        staged, length = empty.empty(), 2
        staged.add(layer, chain(*cells[:length]))
        while length < len(cells) and staged.peak_with(layer, cells[length]) <= budget:
            staged.add(layer, cells[length])
            length += 1
        part = _moves(layer, cells[:length], table, target)
        yield part
        experts = [table[move.source] for move in part]
        for move, expert in zip(part, experts, strict=True):
            table[move.target] = expert
        # The last cell of the part now holds what the first one held, which the rest of the cycle still needs.
        cells = cells[length - 1 :] if length < len(cells) else []


def _moves(layer: int, cells: list[Cell], table: Sequence[int], target: Sequence[int]) -> list[SlotMove]:
    """List the moves into each cell from the next one: experts that stay go to their final slots, others to any."""
    moves = []
    for receiver, source in zip(cells, cells[1:] + cells[:1], strict=True):
        slot_of = {table[slot]: slot for slot in source}
        experts = [target[slot] for slot in receiver]
        if not slot_of.keys() >= set(experts):
            experts = list(slot_of)
        moves += [SlotMove(layer, slot_of[expert], slot) for slot, expert in zip(receiver, experts, strict=True)]
    return moves
