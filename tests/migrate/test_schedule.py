"""From two placements to copies: simulated on plain arrays, for all ranks in one process.

Every element of every tensor is a number of its own, so a copy that is missing, doubled or misplaced shows.
Shapes: L layers, E experts, P slots, M GPUs, G slots on each GPU.
"""

from __future__ import annotations

import random
import sys
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
import torch
from plain_schedule import all_copies, flat_layout, messages, plain_rounds

from distplb import DistplbError, Placement
from distplb.comm.base import WorldOfOne
from distplb.migrate.layout import Layout, Part, Piece, joined
from distplb.migrate.messages import Copy, MessagePlanner, RankCommit, rounds
from distplb.migrate.optimizer_state import Traveller
from distplb.migrate.schedule import SlotMove, commits, cycles, exchanges
from distplb.migrate.slot_routes import peers
from distplb.migrate.staging import StagingMemory
from distplb.migrate.transfer import Transfer

ITEM_BYTES = 8  # of the simulated tensors


class World:
    """All ranks of a job: who holds which elements of every tensor, and the elements themselves.

    Args:
        gpus: by rank, the GPU of its EP group; ranks with the same GPU hold copies, or shards, of its experts.
        slots_per_gpu: G.
        kinds: by layer, the tensors: a kind ("whole": on each rank of the GPU; "shards": cut over the ranks of the
            GPU, anywhere; "everywhere") and the elements of one slot.
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
        """Who holds what of a tensor of that kind."""
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
            cuts = sorted(self.random.randrange(each + 1) for _ in ranks[1:])  # an empty shard now and then
            for rank, (start, stop) in zip(ranks, pairwise([0, *cuts, each]), strict=True):
                held[rank] = (gpu * each + start, gpu * each + stop)
        return flat_layout(row, self.num_slots, tuple(held))

    def cut_within_rows(self, row: int, in_place: bool) -> tuple[tuple[Part, ...], ...]:
        """Each row is cut over the ranks of its GPU: all in the same places, or each in others."""
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
        """A permutation of the experts in every layer; some layers stay contiguous."""
        rows = [self.random.sample(range(self.num_slots), self.num_slots) for _ in self.kinds]
        rows = [sorted(row) if self.random.random() < 0.2 else row for row in rows]
        return Placement(torch.tensor(rows), self.num_slots, self.num_gpus)

    def elements(self, placement: Placement) -> dict[tuple[int, int], np.ndarray]:
        """By rank and tensor, what the rank must hold under a placement."""
        elements = {}
        for table, layer in zip(placement.expert_of_slot.numpy(), self.tensors, strict=True):
            for number, layout in layer:
                own = table[:, None] * layout.row + np.arange(layout.row) + number * 10**6  # [P, row]
                for rank, parts in enumerate(layout.held):
                    held = [own[:, part.low : part.high].reshape(-1)[part.start : part.stop] for part in parts]
                    elements[rank, number] = np.concatenate([own.reshape(-1)[:0], *held])
        return elements

    def bytes_of_rows(self) -> tuple[list[int], list[int]]:
        """By layer, the bytes of a slot's rows that its GPU stages, and those that every rank stages."""
        by_rank = ("everywhere", "rows")
        own = [sum(row for kind, row in layer if kind not in by_rank) * ITEM_BYTES for layer in self.kinds]
        every = [sum(row for kind, row in layer if kind in by_rank) * ITEM_BYTES for layer in self.kinds]
        return own, every

    def swap_bytes(self) -> int:
        """What the dearest swap of two slots stages: both on one GPU."""
        return 2 * max(own + every for own, every in zip(*self.bytes_of_rows(), strict=True))

    def steps(self, moves: Sequence[SlotMove], limit: int = 32, large_bytes: int = 1 << 20) -> list[RankCommit]:
        """Of all ranks, each made for itself; the first half of the ranks is one node."""
        items = [ITEM_BYTES] * sum(map(len, self.tensors))
        nodes = [2 * rank // len(self.gpus) for rank in range(len(self.gpus))]
        return [
            MessagePlanner(self.tensors, items, rank, nodes, limit, large_bytes).commit(moves)
            for rank in range(len(self.gpus))
        ]

    def apply(self, copies: list[Copy], held: dict[tuple[int, int], np.ndarray]) -> list[int]:
        """Read everything, then write everything; gives the bytes staged on each rank."""
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
    """What all ranks write."""
    return [copy for step in steps for copy in [*step.local, *in_order(step.receives)]]


def in_order(messages_of: dict[int, list[list[Copy]]]) -> list[Copy]:
    return [copy for some in messages_of.values() for message in some for copy in message]


def after(placement: Placement, moves: list[SlotMove]) -> Placement:
    """The placement once all moves are done together; raises where it is no permutation."""
    table = placement.expert_of_slot.clone()
    for move in moves:
        table[move.layer, move.target] = placement.expert_of_slot[move.layer, move.source]
    return Placement(table, placement.num_experts, placement.num_gpus)


def cycle_of(num_slots: int) -> tuple[list[int], list[int]]:
    """Two orders of the experts that are one cycle of all slots apart."""
    order = random.Random(num_slots).sample(range(num_slots), num_slots)
    expected = [0] * num_slots
    for here, there in zip(order, order[1:] + order[:1], strict=True):
        expected[here] = there
    return list(range(num_slots)), expected


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


@pytest.mark.parametrize("budget", ["nothing", "one swap", "two swaps", "everything"])
@pytest.mark.parametrize("name", WORLDS)
def test_every_commit_leaves_every_rank_with_a_whole_placement(name: str, budget: str) -> None:
    for seed in range(6):
        world = World(*WORLDS[name], seed=seed)
        limit = {"nothing": 0, "one swap": 1, "two swaps": 2, "everything": 10**6}[budget] * world.swap_bytes()
        old, new = world.random_placement(), world.random_placement()
        placement, held = old, world.elements(old)
        plan = commits(old, new, *world.bytes_of_rows(), limit)
        for moves in plan:
            assert moves
            placement = after(placement, moves)
            staged = world.apply(written(world.steps(moves)), held)
            assert limit == 0 or max(staged) <= limit
            expected = world.elements(placement)
            assert held.keys() == expected.keys()
            assert all(np.array_equal(held[key], expected[key]) for key in expected)
        assert placement == new
        if budget == "everything":
            assert len(plan) == (old != new)


@pytest.mark.parametrize("name", WORLDS)
def test_each_commit_consists_of_closed_cycles(name: str) -> None:
    world = World(*WORLDS[name], seed=9)
    old, new = world.random_placement(), world.random_placement()
    for moves in commits(old, new, *world.bytes_of_rows(), world.swap_bytes()):
        sources = [(move.layer, move.source) for move in moves]
        targets = [(move.layer, move.target) for move in moves]
        assert len(set(targets)) == len(targets)
        assert set(sources) == set(targets)
        assert all(move.source != move.target for move in moves)


# --- cycles and commits -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_slots", [1, 2, 3, 8, 40])
def test_cycles_are_closed_and_hold_every_slot_that_changes_once(num_slots: int) -> None:
    random_ = random.Random(num_slots)
    for _ in range(30):
        old, new = (random_.sample(range(num_slots), num_slots) for _ in range(2))
        closed = cycles(old, new)
        for cycle in closed:
            assert len(cycle) > 1
            for target, source in zip(cycle, cycle[1:] + cycle[:1], strict=True):
                assert new[target] == old[source]
        changed = [slot for slot in range(num_slots) if old[slot] != new[slot]]
        assert sorted(slot for cycle in closed for slot in cycle) == changed


def test_nothing_to_move_is_no_commit() -> None:
    placement = Placement.contiguous(3, 8, 2)
    assert cycles(list(range(8)), list(range(8))) == []
    assert commits(placement, placement, [1] * 3, [1] * 3, 100) == []


@pytest.mark.parametrize(("budget", "most"), [(2, 2), (3, 3), (5, 5), (12, 12), (1, 2), (0, 2)])
def test_a_long_cycle_is_split_where_the_budget_ends(budget: int, most: int) -> None:
    """One GPU, a byte a slot: the budget is the number of slots that a commit may hold, and two at least."""
    old, new = (Placement(torch.tensor([row]), 12, 1) for row in cycle_of(12))
    assert len(cycles(old.expert_of_slot[0].tolist(), new.expert_of_slot[0].tolist())) == 1
    plan = commits(old, new, [1], [0], budget)
    assert max(len(moves) for moves in plan) == most
    # A part of k slots settles k − 1 of them, and the last part settles its last as well.
    assert sum(len(moves) - 1 for moves in plan) == 11
    assert len(plan) == -(-11 // (most - 1))
    placement = old
    for moves in plan:
        placement = after(placement, moves)
    assert placement == new


# --- routing groups ---------------------------------------------------------------------------------------------


def in_blocks(random_: random.Random, num_groups: int, size: int) -> list[int]:
    """A table of one layer whose blocks hold one group each."""
    groups = random_.sample(range(num_groups), num_groups)
    return [group * size + member for group in groups for member in random_.sample(range(size), size)]


def keeps_blocks(table: Sequence[int], size: int) -> bool:
    return all(len({expert // size for expert in table[at : at + size]}) == 1 for at in range(0, len(table), size))


def test_the_first_commit_of_a_move_of_groups_takes_no_group_apart() -> None:
    """8 experts in 4 groups on 2 GPUs: slots 3 and 4 changed places alone, and the router chose other experts."""
    old, new = Placement.contiguous(1, 8, 2), Placement(torch.tensor([[0, 1, 4, 5, 2, 3, 6, 7]]), 8, 2)
    assert len(commits(old, new, [1], [0], 1)) == 2  # by slots
    (moves,) = commits(old, new, [1], [0], 1, num_groups=4)
    assert sorted(move.target for move in moves) == [2, 3, 4, 5]
    assert after(old, moves) == new


@pytest.mark.parametrize(("num_groups", "size", "gpus"), [(4, 2, 2), (6, 4, 3), (2, 6, 4), (5, 1, 5), (8, 3, 2)])
@pytest.mark.parametrize("budget", [0, 3, 9, 10**6])
def test_every_commit_keeps_blocks_whatever_the_budget(num_groups: int, size: int, gpus: int, budget: int) -> None:
    random_ = random.Random(num_groups * size + budget)
    slots = num_groups * size
    for _ in range(20):
        old, new = (
            Placement(torch.tensor([in_blocks(random_, num_groups, size) for _ in range(2)]), slots, gpus)
            for _ in range(2)
        )
        placement = old
        for moves in commits(old, new, [1, 1], [0, 0], budget, num_groups=num_groups):
            placement = after(placement, moves)
            assert all(keeps_blocks(row, size) for row in placement.expert_of_slot.tolist())
        assert placement == new


@pytest.mark.parametrize(("num_groups", "size"), [(4, 2), (6, 4), (2, 6), (5, 1)])
def test_an_exchange_is_the_smallest_that_keeps_blocks(num_groups: int, size: int) -> None:
    """Any of them by itself keeps blocks, whichever others are left out; no part of one does."""
    random_ = random.Random(size)
    for _ in range(20):
        old, new = in_blocks(random_, num_groups, size), in_blocks(random_, num_groups, size)
        table = list(old)
        closed = exchanges(old, new, num_groups)
        for cells in random_.sample(closed, len(closed)):
            for part in range(1, len(cells)):
                partly = list(table)
                for slot in (slot for cell in cells[:part] for slot in cell):
                    partly[slot] = new[slot]
                assert len(set(partly)) < len(partly) or not keeps_blocks(partly, size)
            for slot in (slot for cell in cells for slot in cell):
                table[slot] = new[slot]
            assert sorted(table) == list(range(len(table)))
            assert keeps_blocks(table, size)
        assert table == new


def test_commits_keep_experts_within_their_class_of_slots() -> None:
    """Closed cycles of slots of one class, whole or in parts, never leave it."""
    random_ = random.Random(2)
    classes = [0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2]
    for budget in (0, 2, 3, 100):
        rows = []
        for _ in range(2):
            shuffled = {number: random_.sample(range(number, 12, 3), 4) for number in range(3)}
            rows.append([shuffled[number].pop() for number in classes])
        old, new = (Placement(torch.tensor([row]), 12, 4) for row in rows)
        placement = old
        for moves in commits(old, new, [1], [1], budget):
            placement = after(placement, moves)
            assert [expert % 3 for expert in placement.expert_of_slot[0].tolist()] == classes
        assert placement == new


def test_the_budget_is_of_the_fullest_rank_and_not_of_all_together() -> None:
    """Four GPUs that swap in pairs stage one slot each, and may do so at once."""
    old = Placement(torch.tensor([[0, 1, 2, 3]]), 4, 4)
    new = Placement(torch.tensor([[1, 0, 3, 2]]), 4, 4)
    assert len(commits(old, new, [10], [0], 10)) == 1
    assert len(commits(old, new, [10], [1], 13)) == 2  # router rows are staged for all four slots, on every rank
    assert len(commits(old, new, [10], [1], 14)) == 1


def test_layers_are_counted_at_their_own_size() -> None:
    old = Placement.contiguous(2, 2, 1)
    new = Placement(torch.tensor([[1, 0], [1, 0]]), 2, 1)
    assert len(commits(old, new, [10, 1], [0, 0], 22)) == 1
    assert len(commits(old, new, [10, 1], [0, 0], 21)) == 2


# --- copies -----------------------------------------------------------------------------------------------------


def copies(moves: Sequence[SlotMove], tensors: Sequence[Sequence[tuple[int, Layout]]], rank: int) -> list[Copy]:
    """All that one rank gives or receives: as it stands in its step, and as the specification says."""
    size = len(next(layout for layer in tensors for _, layout in layer).held)
    numbers = [number for layer in tensors for number, _ in layer]
    step = MessagePlanner(tensors, [1] * (max(numbers) + 1), rank, [0] * size, 32, 1 << 20).commit(moves)
    own = [*step.local, *in_order(step.sends), *in_order(step.receives)]
    expected = [copy for copy in all_copies(moves, tensors) if rank in (copy.source_rank, copy.target_rank)]
    assert Counter(own) == Counter(expected)
    return expected


def test_a_rank_that_holds_what_it_needs_asks_nobody() -> None:
    """Slots 0 and 1 of the same GPU change places, and ranks 0 and 1 both hold both."""
    layout = flat_layout(4, 4, ((0, 8), (0, 8), (8, 16), (8, 16)))
    moves = [SlotMove(0, 0, 1), SlotMove(0, 1, 0)]
    for rank in range(4):
        own = copies(moves, [[(0, layout)]], rank)
        assert own == ([Copy(0, rank, 0, rank, 4, 4), Copy(0, rank, 4, rank, 0, 4)] if rank < 2 else [])


def test_a_rank_takes_its_own_copy_also_where_others_hold_other_parts() -> None:
    """Rank 1 holds both slots, ranks 0 and 2 one each."""
    layout = flat_layout(4, 2, ((0, 4), (0, 8), (4, 8)))
    own = copies([SlotMove(0, 0, 1)], [[(0, layout)]], rank=1)
    assert own == [Copy(0, 1, 0, 1, 4, 4), Copy(0, 1, 0, 2, 0, 4)]


def test_copies_of_an_expert_are_each_given_by_another_holder() -> None:
    layout = flat_layout(4, 2, ((0, 4), (0, 4), (4, 8), (4, 8)))
    moves = [SlotMove(0, 0, 1), SlotMove(0, 1, 0)]
    of_all = {copy for rank in range(4) for copy in copies(moves, [[(5, layout)]], rank)}
    assert {(copy.source_rank, copy.target_rank) for copy in of_all} == {(0, 2), (1, 3), (2, 0), (3, 1)}
    assert {copy.tensor for copy in of_all} == {5}


def test_shards_that_are_cut_elsewhere_are_put_together_from_several_ranks() -> None:
    layout = flat_layout(6, 2, ((0, 2), (2, 6), (6, 11), (11, 12)))  # slot 0 on ranks 0 and 1, slot 1 on ranks 2 and 3
    for rank, expected in enumerate(
        [
            [Copy(0, 2, 0, 0, 0, 2)],
            [Copy(0, 2, 2, 1, 0, 3), Copy(0, 3, 0, 1, 3, 1)],
            [Copy(0, 2, 0, 0, 0, 2), Copy(0, 2, 2, 1, 0, 3)],
            [Copy(0, 3, 0, 1, 3, 1)],
        ]
    ):
        assert copies([SlotMove(0, 1, 0)], [[(0, layout)]], rank) == expected


def test_router_rows_never_cross_ranks() -> None:
    layout = flat_layout(3, 4, ((0, 12),) * 3)
    assert layout.is_everywhere
    for rank in range(3):
        step = MessagePlanner([[(1, layout)]], [4, 4], rank, [0, 0, 1], 32, 1).commit(
            [SlotMove(0, 0, 3), SlotMove(0, 3, 0)]
        )
        assert step == RankCommit([Copy(1, rank, 0, rank, 9, 3), Copy(1, rank, 9, rank, 0, 3)], {}, {}, [], (0, 0))


def test_only_the_tensors_of_the_moved_layer_are_copied() -> None:
    layout = flat_layout(1, 2, ((0, 1), (1, 2)))
    own = copies([SlotMove(1, 0, 1), SlotMove(1, 1, 0)], [[(0, layout)], [(1, layout), (2, layout)]], rank=0)
    assert Counter(copy.tensor for copy in own) == {1: 2, 2: 2}


# --- messages ---------------------------------------------------------------------------------------------------


def random_layout(random_: random.Random, ranks: int, slots: int, row: int) -> Layout:
    """Anything that holds every element: each rank some parts, and a few ranks the rest; ranges may overlap."""
    held: list[list[Part]] = [[] for _ in range(ranks)]
    for own in held:
        for _ in range(random_.choice([0, 0, 1, 1, 2])):
            low, high = sorted(random_.sample(range(row + 1), 2))
            start, stop = sorted(random_.choices(range((high - low) * slots + 1), k=2))
            own.append(Part(start, stop, low, high))
    for slot in range(slots):
        cut = random_.randrange(row + 1)
        for start, stop in ((0, cut), (cut, row)):
            held[random_.randrange(ranks)].append(Part(slot * row + start, slot * row + stop, 0, row))
    return Layout(row, slots, tuple(joined(own) for own in held))


def random_world(seed: int) -> World:
    """Of random layouts, or of several kinds in several layers."""
    random_ = random.Random(seed)
    gpus = [gpu for gpu in range(random_.randint(1, 4)) for _ in range(random_.randint(1, 4))]
    random_.shuffle(gpus)
    kinds = [random_.choices(EVERY_KIND, k=random_.randint(1, 4)) for _ in range(random_.randint(1, 3))]
    world = World(gpus, random_.randint(1, 4), kinds, seed)
    if random_.random() < 0.5:
        world.tensors = [
            [(number, random_layout(random_, len(gpus), world.num_slots, layout.row)) for number, layout in layer]
            for layer in world.tensors
        ]
    if random_.random() < 0.5:  # what ranks have agreed on: equal layouts are one object
        shared: dict[Layout, Layout] = {}
        world.tensors = [
            [(number, shared.setdefault(layout, layout)) for number, layout in layer] for layer in world.tensors
        ]
    return world


def check_against_the_specification(world: World, moves: list[SlotMove], limit: int) -> None:
    """Each rank's step is its part of what all ranks copy, in which messages, and in which rounds."""
    everything, ranks = all_copies(moves, world.tensors), range(len(world.gpus))
    layouts = dict(pair for layer in world.tensors for pair in layer)
    steps = world.steps(moves, limit, 4 * ITEM_BYTES)
    parts = messages(everything, layouts, {copy: copy.count >= 4 for copy in everything})
    scheduled = [plain_rounds({way: len(some) for way, some in part.items()}, len(ranks), limit) for part in parts]
    crossing = [0, 0]
    for copy in everything:
        if copy.source_rank != copy.target_rank:
            half = [2 * rank // len(ranks) for rank in (copy.source_rank, copy.target_rank)]
            crossing[half[0] != half[1]] += copy.count * ITEM_BYTES
    for rank, step in enumerate(steps):
        assert Counter(step.local) == Counter(c for c in everything if c.source_rank == c.target_rank == rank)
        for mine, is_sent in ((step.sends, True), (step.receives, False)):
            for peer in ranks:
                way = (rank, peer) if is_sent else (peer, rank)
                expected = [message for part in parts for message in part.get(way, [])] if peer != rank else []
                assert mine.get(peer, []) == expected
        own = [sorted(way for way in one if rank in way) for part in scheduled for one in part]
        assert [sorted(one) for one in step.rounds] == [one for one in own if one]
        assert all(len(one) <= limit for one in step.rounds)
        assert step.crossing == tuple(crossing)


@pytest.mark.parametrize("name", WORLDS)
def test_what_one_rank_sends_is_what_the_other_expects_in_the_same_order(name: str) -> None:
    world = World(*WORLDS[name], seed=3)
    old, new = world.random_placement(), world.random_placement()
    for moves in commits(old, new, *world.bytes_of_rows(), 3 * world.swap_bytes()):
        check_against_the_specification(world, moves, limit=2)


def test_ranks_of_random_layouts_make_their_parts_of_one_schedule() -> None:
    """Each rank made the copies of all ranks: 13 s for EP 8 × 64. Now each makes its own, and all must fit together."""
    for seed in range(60):
        world, limit = random_world(seed), (1, 3, 32)[seed % 3]
        old, new = world.random_placement(), world.random_placement()
        for moves in commits(old, new, *world.bytes_of_rows(), 10**6):
            check_against_the_specification(world, moves, limit)


def test_commits_of_one_move_are_made_one_after_the_other_as_each_by_itself() -> None:
    """What was worked out for one commit is used in the next."""
    for seed in range(6):
        world = random_world(seed)
        old, new = world.random_placement(), world.random_placement()
        plan = commits(old, new, *world.bytes_of_rows(), world.swap_bytes())
        items = [ITEM_BYTES] * sum(map(len, world.tensors))
        nodes = [2 * rank // len(world.gpus) for rank in range(len(world.gpus))]
        for rank in range(len(world.gpus)):
            planner = MessagePlanner(world.tensors, items, rank, nodes, 32, 1 << 20)
            assert [planner.commit(moves) for moves in plan] == [world.steps(moves)[rank] for moves in plan]


@pytest.mark.parametrize("kind", ["copies", "columns"])
def test_what_a_rank_works_out_hardly_grows_with_the_groups_beside_its_own(kind: str) -> None:
    """Made ready, a move of 64 EP groups side by side took each rank 64 times as long as that of one."""
    called = {}
    for groups in (1, 64):
        layout = side_by_side(8, groups, kind)
        comm = WorldOfOne()
        comm.rank, comm.size = 8 * (groups // 2) + 3, 8 * groups  # type: ignore[misc]
        old = Placement.contiguous(1, layout.num_slots, 8)
        new = Placement(old.expert_of_slot.roll(layout.num_slots // 2, 1), layout.num_slots, 8)
        flats = (torch.zeros(layout.held[comm.rank][0].numel),)
        of_rank = [([layout], [Traveller(flats, 0, torch.float32)] * 9)]
        Transfer(old, new, of_rank, comm, [0] * comm.size, StagingMemory())  # looks at the layouts, once for all moves
        calls = Counter[str]()
        sys.setprofile(lambda frame, event, arg, calls=calls: calls.update([event]))
        try:
            transfer = Transfer(old, new, of_rank, comm, [0] * comm.size, StagingMemory())
        finally:
            sys.setprofile(None)
        called[groups] = calls["call"] + calls["c_call"]
        if groups > 1:
            (commit,), group = transfer._rank_commits, range(8 * (groups // 2), 8 * (groups // 2 + 1))
            assert {*commit.sends, *commit.receives} <= set(group)
            assert peers([layout], comm.rank) == [rank for rank in group if rank != comm.rank]
    assert called[64] < 5 * called[1]


def side_by_side(gpus: int, groups: int, kind: str) -> Layout:
    """EP groups of ranks that follow each other, 8 slots on each GPU: copies, or rows that are cut over the groups."""
    row, held = 3 * groups, []
    for n in range(groups):
        whole = [Part(8 * gpu * row, 8 * (gpu + 1) * row, 0, row) for gpu in range(gpus)]
        columns = [Part(24 * gpu, 24 * gpu + 24, 3 * n, 3 * n + 3) for gpu in range(gpus)]
        held += whole if kind == "copies" else columns
    return Layout(row, 8 * gpus, tuple((part,) for part in held))


def test_both_directions_of_a_link_are_used_at_once() -> None:
    """A round was all sends of one rank, and the next one all receives."""
    layout = flat_layout(1, 80, ((0, 40), (40, 80)))
    moves = [SlotMove(0, slot, (slot + 40) % 80) for slot in range(80)]
    for one in MessagePlanner([[(0, layout)]], [4], 0, [0, 0], 32, 1).commit(moves).rounds[:-1]:
        assert Counter(one) == {(0, 1): 16, (1, 0): 16}


def test_peers_are_those_that_some_move_makes_a_rank_exchange_with() -> None:
    quarters = flat_layout(4, 2, ((0, 2), (2, 4), (4, 6), (6, 8), (8, 8)))  # of slots 0 and 1; nothing on rank 4
    assert [peers([quarters], rank) for rank in range(5)] == [[2], [3], [0], [1], []]
    assert peers([flat_layout(3, 4, ((0, 12),) * 3)], 1) == []
    for seed in range(20):
        world = random_world(seed)
        pairs = [(source, target) for source in range(world.num_slots) for target in range(world.num_slots)]
        everything = [
            copy
            for layer in range(len(world.tensors))
            for source, target in pairs
            for copy in all_copies([SlotMove(layer, source, target)], world.tensors)
        ]
        for rank in range(len(world.gpus)):
            ways = [(copy.source_rank, copy.target_rank) for copy in everything]
            expected = {other for way in ways if rank in way for other in way} - {rank}
            assert peers([layout for layer in world.tensors for _, layout in layer], rank) == sorted(expected)


# --- pieces -----------------------------------------------------------------------------------------------------


def test_a_shard_that_cuts_through_experts_is_a_piece_of_each() -> None:
    layout = flat_layout(row=4, num_slots=3, held=((0, 6), (6, 7), (7, 7), (7, 12)))
    assert not layout.is_everywhere
    assert layout.pieces == (
        (Piece(0, 0, 4, 0),),
        (Piece(0, 0, 2, 4), Piece(1, 2, 3, 0), Piece(3, 3, 4, 0)),
        (Piece(3, 0, 4, 1),),
    )


def test_a_range_held_twice_comes_once_for_each_rank() -> None:
    layout = flat_layout(row=2, num_slots=2, held=((2, 4), (0, 2), (2, 4)))
    assert layout.pieces == ((Piece(1, 0, 2, 0),), (Piece(0, 0, 2, 0), Piece(2, 0, 2, 0)))


@pytest.mark.parametrize(
    ("held", "slot", "reached"),
    [
        (((4, 8),), 0, 0),
        (((0, 4),), 1, 0),
        (((0, 3), (5, 8)), 0, 3),
        (((5, 8), (0, 3)), 0, 3),
        (((0, 4), (0, 4)), 1, 0),
        (((0, 0), (8, 8)), 0, 0),
        (((0, 7), (2, 5), (7, 7)), 1, 3),
        ((), 0, 0),
    ],
)
def test_elements_that_no_rank_holds_are_refused(held: tuple[tuple[int, int], ...], slot: int, reached: int) -> None:
    with pytest.raises(DistplbError) as refused:
        flat_layout(row=4, num_slots=2, held=held)
    assert f"element {reached} of the 4 of slot {slot} is held by no rank (slots held by rank: [" in str(refused.value)
    assert "check `gpu`, the starts of the shards, and that the communicator has all ranks" in str(refused.value)


def test_columns_that_no_rank_holds_are_refused() -> None:
    with pytest.raises(DistplbError, match="element 2 of the 4 of slot 0 is held by no rank"):
        Layout(row=4, num_slots=2, held=((Part(0, 4, 0, 2),), (Part(0, 2, 3, 4),)))


@pytest.mark.parametrize("part", [Part(4, 12, 0, 4), Part(-2, 4, 0, 4), Part(0, 8, 2, 5), Part(0, 5, 0, 2)])
def test_a_part_outside_of_all_slots_is_refused(part: Part) -> None:
    """A part that went beyond the last slot was reported as elements that nobody holds."""
    with pytest.raises(DistplbError) as refused:
        Layout(row=4, num_slots=2, held=((Part(0, 8, 0, 4),), (part,)))
    words = f"rank 1 holds elements {part.start} to {part.stop} of columns {part.low} to {part.high} of 2 slots × 4"
    assert words in str(refused.value)


def test_the_most_that_a_rank_holds_of_a_slot_and_whether_ranks_hold_slots_of_one_gpu() -> None:
    columns = Layout(row=4, num_slots=2, held=((Part(0, 2, 0, 1),), (Part(0, 6, 1, 4),)))
    assert columns.max_row == 3
    assert columns.slots == ((0, 1), (0, 1))
    assert columns.is_by_gpu(2)
    assert not columns.is_by_gpu(1)
    assert flat_layout(4, 2, ((0, 4), (4, 8), (5, 5))).is_by_gpu(1)
    assert flat_layout(4, 2, ((0, 4), (4, 8), (5, 5))).has_empty_rank


def test_parts_that_continue_each_other_are_one() -> None:
    parts = [Part(0, 4, 0, 4), Part(4, 6, 0, 4), Part(6, 6, 0, 4), Part(7, 8, 0, 4), Part(8, 9, 0, 2)]
    assert joined(parts) == (Part(0, 6, 0, 4), Part(7, 8, 0, 4), Part(8, 9, 0, 2))


# --- rounds -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [1, 2, 5, 32])
def test_rounds_hold_every_message_once_and_no_rank_beyond_the_limit(limit: int) -> None:
    random_ = random.Random(limit)
    for _ in range(30):
        num_ranks = random_.randrange(2, 20)
        counts = Counter(tuple(random_.sample(range(num_ranks), 2)) for _ in range(random_.randrange(200)))
        planned = rounds(counts, limit)
        assert sum((Counter(one) for one in planned), Counter()) == counts
        assert all(one and min(one.values()) > 0 for one in planned)
        for one in planned:
            operations = Counter(rank for way, number in one.items() for rank in way for _ in range(number))
            assert max(operations.values()) <= limit
        # A message waits only for rounds that are full at one of its two ends.
        busiest = max(Counter(rank for way in counts.elements() for rank in way).values(), default=0)
        assert len(planned) <= max(0, 2 * -(-busiest // limit) - 1)


def test_ways_take_turns_and_messages_that_fit_go_in_one_round() -> None:
    ring = {(2, 0): 1, (0, 1): 1, (1, 2): 1}
    assert rounds(ring, 2) == [ring]
    assert rounds(ring, 1) == [{(2, 0): 1}, {(0, 1): 1}, {(1, 2): 1}]
    assert rounds({(0, 1): 3, (1, 0): 1, (2, 3): 5}, 4) == [
        {(0, 1): 3, (1, 0): 1, (2, 3): 4},
        {(2, 3): 1},
    ]
    assert rounds({}, 32) == []
