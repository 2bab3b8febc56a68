"""Simulates all ranks of a job on plain arrays in one process, for tests of schedules and messages.

Every element of every tensor has a unique value, so a missing, doubled or misplaced copy is detected.
Shapes: L layers, P slots, G slots on each GPU.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from plain_schedule import flat_layout

from distplb import Placement
from distplb.migrate.layout import Layout, Part, joined
from distplb.migrate.messages import Copy, MessagePlanner, RankCommit
from distplb.migrate.schedule import SlotMove

__all__ = ["EVERY_KIND", "ITEM_BYTES", "WORLDS", "World", "after", "in_order", "written"]

ITEM_BYTES = 8  # bytes per element of the simulated tensors


class World:
    """All ranks of a job: which rank holds which elements of every tensor, and the elements themselves.

    Args:
        gpus: each rank's GPU in its EP group; ranks with the same GPU hold copies, or shards, of its experts.
        slots_per_gpu: G.
        kinds: the tensors of each layer: a kind ("whole": on each rank of the GPU; "shards": cut anywhere over the
            ranks of the GPU; "everywhere": on all ranks; others as in `layout`) and the elements of one slot.
    """

    def __init__(
        self, gpus: Sequence[int], slots_per_gpu: int, kinds: Sequence[Sequence[tuple[str, int]]], seed: int = 0
    ) -> None:
        self.random = random.Random(seed)
        self.gpus, self.slots_per_gpu, self.kinds = gpus, slots_per_gpu, kinds
        self.num_gpus = max(gpus) + 1
        self.num_slots = self.num_gpus * slots_per_gpu
        self.tensors: list[list[tuple[int, Layout]]] = []  # by layer, (number, layout)
        number = 0
        for layer in kinds:
            self.tensors.append([])
            for kind, row in layer:
                self.tensors[-1].append((number, self.layout(kind, row)))
                number += 1

    def layout(self, kind: str, row: int) -> Layout:
        """Build the layout of a tensor of this kind."""
        each = self.slots_per_gpu * row
        if kind == "everywhere":
            return flat_layout(row, self.num_slots, ((0, self.num_slots * row),) * len(self.gpus))
        if kind == "whole":
            return flat_layout(row, self.num_slots, tuple((gpu * each, (gpu + 1) * each) for gpu in self.gpus))
        if kind == "rows":  # over all ranks, evenly or not
            cuts = [rank * self.num_slots // len(self.gpus) * row for rank in range(len(self.gpus) + 1)]
            return flat_layout(row, self.num_slots, pairwise(cuts))
        if kind in ("columns", "cut one by one"):
            return Layout(row, self.num_slots, self.cut_within_rows(row, in_place=kind == "columns"))
        held = [(0, 0)] * len(self.gpus)
        for gpu in range(self.num_gpus):
            ranks = [rank for rank, of in enumerate(self.gpus) if of == gpu]
            cuts = sorted(self.random.randrange(each + 1) for _ in ranks[1:])  # some shards are empty
            for rank, (start, stop) in zip(ranks, pairwise([0, *cuts, each]), strict=True):
                held[rank] = (gpu * each + start, gpu * each + stop)
        return flat_layout(row, self.num_slots, tuple(held))

    def cut_within_rows(self, row: int, in_place: bool) -> tuple[tuple[Part, ...], ...]:
        """Cut each row over the ranks of its GPU: all rows in the same places, or each in different ones."""
        held: list[list[Part]] = [[] for _ in self.gpus]
        for gpu in range(self.num_gpus):
            ranks = [rank for rank, of in enumerate(self.gpus) if of == gpu]
            cuts = [0, *sorted(self.random.randrange(row + 1) for _ in ranks[1:]), row]
            for slot in range(gpu * self.slots_per_gpu, (gpu + 1) * self.slots_per_gpu):
                for rank, (low, high) in zip(ranks, pairwise(cuts), strict=True):
                    width = high - low
                    columns = Part(slot * width, (slot + 1) * width, low, high)
                    held[rank].append(columns if in_place else Part(slot * row + low, slot * row + high, 0, row))
                if not in_place:
                    cuts = [0, *sorted(self.random.randrange(row + 1) for _ in ranks[1:]), row]
        return tuple(joined(parts) for parts in held)

    def random_placement(self) -> Placement:
        """Draw a permutation of the experts in every layer; some layers stay contiguous."""
        rows = [self.random.sample(range(self.num_slots), self.num_slots) for _ in self.kinds]
        rows = [sorted(row) if self.random.random() < 0.2 else row for row in rows]
        return Placement(torch.tensor(rows), self.num_slots, self.num_gpus)

    def elements(self, placement: Placement) -> dict[tuple[int, int], np.ndarray]:
        """Compute the elements that each rank must hold of each tensor under a placement."""
        elements = {}
        for table, layer in zip(placement.expert_of_slot.numpy(), self.tensors, strict=True):
            for number, layout in layer:
                own = table[:, None] * layout.row + np.arange(layout.row) + number * 10**6  # [P, row]
                for rank, parts in enumerate(layout.held):
                    held = [own[:, part.low : part.high].reshape(-1)[part.start : part.stop] for part in parts]
                    elements[rank, number] = np.concatenate([own.reshape(-1)[:0], *held])
        return elements

    def bytes_of_rows(self) -> tuple[list[int], list[int]]:
        """Compute, by layer, the bytes of a slot's rows that its GPU stages, and those that every rank stages."""
        by_rank = ("everywhere", "rows")
        own = [sum(row for kind, row in layer if kind not in by_rank) * ITEM_BYTES for layer in self.kinds]
        every = [sum(row for kind, row in layer if kind in by_rank) * ITEM_BYTES for layer in self.kinds]
        return own, every

    def swap_bytes(self) -> int:
        """Compute the bytes that the largest swap of two slots on one GPU stages."""
        return 2 * max(own + every for own, every in zip(*self.bytes_of_rows(), strict=True))

    def steps(self, moves: Sequence[SlotMove], limit: int = 32, large_bytes: int = 1 << 20) -> list[RankCommit]:
        """Plan the commit of each rank separately; the first half of the ranks is one node, the second another."""
        items = [ITEM_BYTES] * sum(map(len, self.tensors))
        nodes = [2 * rank // len(self.gpus) for rank in range(len(self.gpus))]
        return [
            MessagePlanner(self.tensors, items, rank, nodes, limit, large_bytes).commit(moves)
            for rank in range(len(self.gpus))
        ]

    def apply(self, copies: list[Copy], held: dict[tuple[int, int], np.ndarray]) -> list[int]:
        """Read everything, then write everything; return the bytes staged on each rank."""
        staged = [0] * len(self.gpus)
        before = {key: array.copy() for key, array in held.items()}
        written: Counter[tuple[int, int, int]] = Counter()
        for copy in copies:
            assert copy.count > 0
            source = before[copy.source_rank, copy.tensor]
            target = held[copy.target_rank, copy.tensor]
            assert 0 <= copy.source_offset <= copy.source_offset + copy.count <= len(source)
            assert 0 <= copy.target_offset <= copy.target_offset + copy.count <= len(target)
            places = range(copy.target_offset, copy.target_offset + copy.count)
            written.update((copy.target_rank, copy.tensor, place) for place in places)
            target[copy.target_offset :][: copy.count] = source[copy.source_offset :][: copy.count]
            staged[copy.target_rank] += copy.count * ITEM_BYTES
        assert max(written.values(), default=1) == 1
        return staged


def written(steps: Sequence[RankCommit]) -> list[Copy]:
    """List the copies that all ranks write."""
    return [copy for step in steps for copy in [*step.local, *in_order(step.receives)]]


def in_order(messages_of: dict[int, list[list[Copy]]]) -> list[Copy]:
    return [copy for some in messages_of.values() for message in some for copy in message]


def after(placement: Placement, moves: list[SlotMove]) -> Placement:
    """Return the placement after all moves together; raises if it is not a permutation."""
    table = placement.expert_of_slot.clone()
    for move in moves:
        table[move.layer, move.target] = placement.expert_of_slot[move.layer, move.source]
    return Placement(table, placement.num_experts, placement.num_gpus)


EVERY_KIND = [("whole", 6), ("shards", 6), ("shards", 1), ("everywhere", 3), ("whole", 5), ("columns", 6), ("rows", 2)]
EVERY_KIND += [("cut one by one", 5)]
WORLDS = {
    "experts owned by one rank": ([0, 1, 2, 3], 3, [[("whole", 4), ("everywhere", 2)], [("whole", 7)]]),
    "a single rank": ([0], 6, [EVERY_KIND]),
    "EP 2 × EDP 2, copies side by side": ([0, 0, 1, 1], 4, [[("whole", 5)], [("everywhere", 2)], EVERY_KIND]),
    "EP 2 × EDP 2, copies in turn": ([0, 1, 0, 1], 3, [EVERY_KIND, [("whole", 2), ("everywhere", 1)]]),
    "EP 2 × EDP 3, shards cut through experts": ([0, 0, 0, 1, 1, 1], 2, [[("shards", 7), ("shards", 4)], EVERY_KIND]),
    "EP 3 × EDP 2, all kinds in three layers": ([2, 0, 1, 1, 2, 0], 2, [EVERY_KIND] * 3),
    "EP 2 × EDP 2, sharded in both ways": ([0, 1, 1, 0], 3, [[("columns", 8), ("rows", 3)], [("cut one by one", 7)]]),
    "nothing but the router": ([0, 1], 3, [[("everywhere", 2)]]),
    "nothing but a sharded router": ([0, 1, 0], 3, [[("rows", 2)]]),
}
