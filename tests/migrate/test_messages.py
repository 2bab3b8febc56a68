"""Moves of a commit become copies, messages and rounds; all ranks are simulated in one process.

Shapes: L layers, P slots.
"""

from __future__ import annotations

import random
import sys
from collections import Counter
from collections.abc import Sequence

import pytest
import torch
from plain_schedule import all_copies, flat_layout, messages, plain_rounds
from simulated_world import EVERY_KIND, ITEM_BYTES, WORLDS, World, in_order

from distplb import Placement
from distplb.comm.base import WorldOfOne
from distplb.migrate.layout import Layout, Part, joined
from distplb.migrate.messages import Copy, MessagePlanner, RankCommit, rounds
from distplb.migrate.optimizer_state import Traveller
from distplb.migrate.schedule import SlotMove, commits
from distplb.migrate.slot_routes import peers
from distplb.migrate.staging import StagingMemory
from distplb.migrate.transfer import Transfer

# --- copies -----------------------------------------------------------------------------------------------------


def copies(moves: Sequence[SlotMove], tensors: Sequence[Sequence[tuple[int, Layout]]], rank: int) -> list[Copy]:
    """All copies from or to one rank by the specification, which its own step must match."""
    size = len(next(layout for layer in tensors for _, layout in layer).held)
    numbers = [number for layer in tensors for number, _ in layer]
    step = MessagePlanner(tensors, [1] * (max(numbers) + 1), rank, [0] * size, 32, 1 << 20).commit(moves)
    own = [*step.local, *in_order(step.sends), *in_order(step.receives)]
    expected = [copy for copy in all_copies(moves, tensors) if rank in (copy.source_rank, copy.target_rank)]
    assert Counter(own) == Counter(expected)
    return expected


def test_a_rank_that_holds_what_it_needs_asks_nobody() -> None:
    """Slots 0 and 1 of the same GPU change places, and ranks 0 and 1 each hold both."""
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
    """A random layout that holds every element: each rank has some parts, a few have the rest; ranges may overlap."""
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
    """A world of random layouts, or of several kinds of layouts in several layers."""
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
    if random_.random() < 0.5:  # as after the ranks' agreement: equal layouts are one object
        shared: dict[Layout, Layout] = {}
        world.tensors = [
            [(number, shared.setdefault(layout, layout)) for number, layout in layer] for layer in world.tensors
        ]
    return world


def check_against_the_specification(world: World, moves: list[SlotMove], limit: int) -> None:
    """Check that each rank's step is its part of the copies, messages and rounds of all ranks."""
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
    """Each rank listed the copies of all ranks: 13 s for EP 8 × 64. Now each lists its own, and all must fit."""
    for seed in range(60):
        world, limit = random_world(seed), (1, 3, 32)[seed % 3]
        old, new = world.random_placement(), world.random_placement()
        for moves in commits(old, new, *world.bytes_of_rows(), 10**6):
            check_against_the_specification(world, moves, limit)


def test_commits_of_one_move_are_made_one_after_the_other_as_each_by_itself() -> None:
    """What was computed for one commit is reused in the next."""
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
    """Preparing a move of 64 EP groups with the same experts took each rank 64 times as long as that of one group."""
    called = {}
    for groups in (1, 64):
        layout = side_by_side(8, groups, kind)
        comm = WorldOfOne()
        comm.rank, comm.size = 8 * (groups // 2) + 3, 8 * groups  # type: ignore[misc]
        old = Placement.contiguous(1, layout.num_slots, 8)
        new = Placement(old.expert_of_slot.roll(layout.num_slots // 2, 1), layout.num_slots, 8)
        flats = (torch.zeros(layout.held[comm.rank][0].numel),)
        of_rank = [([layout], [Traveller(flats, 0, torch.float32)] * 9)]
        Transfer(old, new, of_rank, comm, [0] * comm.size, StagingMemory())  # examines the layouts, once for all moves
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
    """EP groups of consecutive ranks, 8 slots on each GPU: with copies, or with rows that are cut over the groups."""
    row, held = 3 * groups, []
    for n in range(groups):
        whole = [Part(8 * gpu * row, 8 * (gpu + 1) * row, 0, row) for gpu in range(gpus)]
        columns = [Part(24 * gpu, 24 * gpu + 24, 3 * n, 3 * n + 3) for gpu in range(gpus)]
        held += whole if kind == "copies" else columns
    return Layout(row, 8 * gpus, tuple((part,) for part in held))


def test_both_directions_of_a_link_are_used_at_once() -> None:
    """A round had only sends of one rank, and the next one only receives."""
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
