"""The commits between two placements are closed, within the budget, and keep routing groups whole.

Shapes: L layers, E experts, P slots, M GPUs.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from simulated_world import WORLDS, World, after, written

from distplb import Placement
from distplb.migrate.schedule import commits, cycles, exchanges


def cycle_of(num_slots: int) -> tuple[list[int], list[int]]:
    """Two orders of the experts that differ by one cycle of all slots."""
    order = random.Random(num_slots).sample(range(num_slots), num_slots)
    expected = [0] * num_slots
    for here, there in zip(order, order[1:] + order[:1], strict=True):
        expected[here] = there
    return list(range(num_slots)), expected


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
    """One GPU, one byte per slot: the budget is the number of slots that a commit may hold, but at least two."""
    old, new = (Placement(torch.tensor([row]), 12, 1) for row in cycle_of(12))
    assert len(cycles(old.expert_of_slot[0].tolist(), new.expert_of_slot[0].tolist())) == 1
    plan = commits(old, new, [1], [0], budget)
    assert max(len(moves) for moves in plan) == most
    # A part of k slots settles k − 1 of them; the last part settles all of its slots.
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
    """8 experts in 4 groups on 2 GPUs: only slots 3 and 4 changed places, and the router chose other experts."""
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
    """Every exchange keeps blocks, whichever others are left out; no part of one does."""
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


def test_the_budget_is_of_the_busiest_rank_and_not_of_all_together() -> None:
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
