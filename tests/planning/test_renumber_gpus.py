"""GPUs are renumbered so that most experts stay: experts of a GPU stay together, and the fewest slots change.

Shapes: L layers, E experts, P slots, M GPUs, G slots on each GPU, N nodes.
"""

from __future__ import annotations

import random
from collections import Counter
from itertools import permutations

import numpy as np
import pytest
import torch
from torch import Tensor

from distplb import Placement, Topology
from distplb.core.price import moved_slots
from distplb.planning.renumber_gpus import relabelled

# (E, P, M)
SIZES = [(8, 8, 2), (12, 12, 3), (16, 16, 4), (20, 20, 5), (10, 10, 5), (30, 30, 3), (4, 4, 1)]
SIZES += [(6, 12, 3), (5, 20, 4), (8, 12, 4), (3, 10, 5), (16, 24, 2)]


def random_placement(random_: random.Random, num_layers: int, num_experts: int, num_slots: int, gpus: int) -> Placement:
    """Every expert, some of them more than once."""
    spare = [random_.choices(range(num_experts), k=num_slots - num_experts) for _ in range(num_layers)]
    table = [random_.sample([*range(num_experts), *more], num_slots) for more in spare]
    return Placement(torch.tensor(table), num_experts, gpus)


def contents(placement: Placement, *cells: int) -> list:
    """By layer, the contents of each cell and of the cells inside it, whatever the order of cells and slots."""

    def inside(row: list[int], sizes: tuple[int, ...]) -> list:
        if not sizes:
            return sorted(row)
        return sorted(inside(row[at : at + sizes[0]], sizes[1:]) for at in range(0, len(row), sizes[0]))

    return [inside(row, cells) for row in placement.expert_of_slot.tolist()]


def moved(placement: Placement, current: Placement) -> Tensor:
    """`[L]`: slots that change their expert."""
    return (placement.expert_of_slot != current.expert_of_slot).sum(1)


def fewest_moves(fresh: list[int], current: list[int], size: int) -> int:
    """Slots that change their expert under the best of all numberings of one layer's cells.

    An expert stays in place as often as both cells hold it.
    """
    parts, held = ([Counter(row[at : at + size]) for at in range(0, len(row), size)] for row in (fresh, current))
    stay = [[(part & before).total() for before in held] for part in parts]  # [cells, cells]
    return len(fresh) - max(
        sum(stay[part][cell] for cell, part in enumerate(order)) for order in permutations(range(len(parts)))
    )


@pytest.mark.parametrize(("num_experts", "num_slots", "num_gpus"), SIZES)
def test_gpus_keep_their_contents_and_as_few_slots_change_as_under_any_names(
    num_experts: int, num_slots: int, num_gpus: int
) -> None:
    random_ = random.Random(f"{num_experts} {num_slots}")
    fresh, current = (random_placement(random_, 30, num_experts, num_slots, num_gpus) for _ in range(2))
    size = num_slots // num_gpus
    named = relabelled(fresh, current, (size,))
    assert contents(named, size) == contents(fresh, size)
    tables = zip(fresh.expert_of_slot.tolist(), current.expert_of_slot.tolist(), strict=True)
    assert moved(named, current).tolist() == [fewest_moves(new, old, size) for new, old in tables]
    assert num_gpus == 1 or (moved(named, current) < moved(fresh, current)).any()


# (E, P, N, M)
@pytest.mark.parametrize("shape", [(16, 16, 2, 8), (12, 24, 3, 6), (8, 32, 4, 16), (24, 24, 2, 4), (9, 18, 3, 9)])
def test_nodes_keep_their_gpus_and_each_is_named_as_well_as_can_be(shape: tuple[int, int, int, int]) -> None:
    """Nodes first, then the GPUs in each."""
    num_experts, num_slots, nodes, num_gpus = shape
    random_ = random.Random(num_slots)
    fresh, current = (random_placement(random_, 20, num_experts, num_slots, num_gpus) for _ in range(2))
    node, gpu = num_slots // nodes, num_slots // num_gpus
    named = relabelled(fresh, current, (node, gpu))
    assert contents(named, node, gpu) == contents(fresh, node, gpu)
    for layer in range(20):
        new, old, unnamed = (each.expert_of_slot[layer].tolist() for each in (named, current, fresh))
        arrived = num_slots - sum(
            (Counter(new[at : at + node]) & Counter(old[at : at + node])).total() for at in range(0, num_slots, node)
        )
        assert arrived == fewest_moves(unnamed, old, node)  # experts that a node did not hold
        for at in range(0, num_slots, node):
            changed = sum(a != b for a, b in zip(new[at : at + node], old[at : at + node], strict=True))
            assert changed == fewest_moves(new[at : at + node], old[at : at + node], gpu)


def stays(fresh: list[int], current: list[int], size: int, gpus_per_node: int) -> list[tuple[int, int]]:
    """For every numbering of one layer's GPUs: the slots that could stay on their GPU, and on their node.

    An expert stays as often as both hold it, counted for one GPU of `fresh` at a time, for nodes too.
    """
    parts, held = ([Counter(row[at : at + size]) for at in range(0, len(row), size)] for row in (fresh, current))
    nodes = [held[at : at + gpus_per_node] for at in range(0, len(held), gpus_per_node)]
    around = [sum(nodes[gpu // gpus_per_node], Counter()) for gpu in range(len(held))]
    on_gpu = [[(part & one).total() for one in held] for part in parts]
    on_node = [[(part & one).total() for one in around] for part in parts]
    return [
        (
            sum(on_gpu[part][gpu] for part, gpu in enumerate(way)),
            sum(on_node[part][gpu] for part, gpu in enumerate(way)),
        )
        for way in permutations(range(len(parts)))
    ]


# (E, P, N, M)
@pytest.mark.parametrize(
    "shape", [(8, 8, 2, 4), (12, 12, 3, 6), (18, 18, 2, 6), (6, 12, 2, 4), (5, 18, 3, 6), (4, 12, 6, 6)]
)
def test_of_equal_ways_to_name_gpus_that_one_is_taken_under_which_most_stay_on_their_node(
    shape: tuple[int, ...],
) -> None:
    num_experts, num_slots, nodes, num_gpus = shape
    random_ = random.Random(num_slots + nodes)
    fresh, current = (random_placement(random_, 20, num_experts, num_slots, num_gpus) for _ in range(2))
    size, gpus = num_slots // num_gpus, num_gpus // nodes
    named, blind = relabelled(fresh, current, (size,), None, gpus), relabelled(fresh, current, (size,))
    assert contents(named, size) == contents(fresh, size)
    assert torch.equal(moved(named, current), moved(blind, current))  # the fewest changes of GPU come first
    better = 0
    for layer in range(20):
        new, old, other = (each.expert_of_slot[layer].tolist() for each in (named, current, blind))
        with_nodes, without = (stays(row, old, size, gpus)[0] for row in (new, other))  # as numbered
        best = max(stays(fresh.expert_of_slot[layer].tolist(), old, size, gpus))
        assert with_nodes == best
        better += without < best
    assert better or size == 2 or nodes == num_gpus
    if num_slots == num_experts:
        crossing = [moved_slots(current, each, Topology(nodes, gpus)) for each in (named, blind)]
        assert torch.equal(*(each.sum(1) for each in crossing))
        assert (crossing[0][:, 1].sum() < crossing[1][:, 1].sum()) == (better > 0)


# (E, M, B, GPUs on a node): blocks of several nodes, of a node, of a part of one, and some that end inside a node
@pytest.mark.parametrize(
    "shape", [(36, 12, 2, 2), (24, 12, 2, 6), (24, 12, 4, 6), (24, 12, 2, 4), (24, 12, 4, 4), (24, 4, 8, 2)]
)
def test_blocks_of_any_size_are_named_on_nodes_of_any_size(shape: tuple[int, int, int, int]) -> None:
    """Blocks larger than a node, but not a multiple of it, ended in a failing reshape."""
    num_experts, num_gpus, groups, gpus = shape
    random_, block, size = random.Random(f"{shape}"), num_experts // groups, num_experts // num_gpus
    cells = tuple(sorted({block, size}, reverse=True))

    def in_blocks() -> Placement:
        parts = [list(range(at, at + block)) for at in range(0, num_experts, block)]
        rows = [[e for part in random_.sample(parts, groups) for e in random_.sample(part, block)] for _ in range(20)]
        return Placement(torch.tensor(rows), num_experts, num_gpus)

    fresh, current = in_blocks(), in_blocks()
    named, blind = relabelled(fresh, current, cells, None, gpus), relabelled(fresh, current, cells)
    assert contents(named, *cells) == contents(fresh, *cells)
    assert torch.equal(moved(named, current), moved(blind, current))
    topology = Topology(num_gpus // gpus, gpus)
    across = [int(moved_slots(current, each, topology)[:, 1].sum()) for each in (named, blind)]
    assert across[0] <= across[1]
    # Where a node's edge runs between the cells of a block, there is a choice.
    if block > size and block // size > gpus and block // size % gpus == 0:
        assert across[0] < across[1]


def test_one_slot_a_gpu_is_the_current_placement_under_other_names() -> None:
    random_ = random.Random(6)
    fresh, current = (random_placement(random_, 30, 6, 6, 6) for _ in range(2))
    assert relabelled(fresh, current, (1,)) == current


def shuffled(random_: random.Random, row: list[int], cells: tuple[int, ...]) -> list[int]:
    """Shuffle the cells of one layer, the cells inside them, and the slots in the smallest."""
    if not cells:
        return random_.sample(row, len(row))
    parts = [shuffled(random_, row[at : at + cells[0]], cells[1:]) for at in range(0, len(row), cells[0])]
    return [expert for part in random_.sample(parts, len(parts)) for expert in part]


@pytest.mark.parametrize("num_experts", [24, 9])
@pytest.mark.parametrize("cells", [(4,), (12, 4), (12,), (12, 6, 2)])
def test_the_same_contents_move_nothing(cells: tuple[int, ...], num_experts: int) -> None:
    random_ = random.Random(9)
    current = random_placement(random_, 10, num_experts, 24, 6)
    table = torch.tensor([shuffled(random_, row, cells) for row in current.expert_of_slot.tolist()])
    assert not torch.equal(table, current.expert_of_slot)
    assert relabelled(Placement(table, num_experts, 6), current, cells) == current


def test_without_cells_nothing_changes_its_name() -> None:
    random_ = random.Random(3)
    fresh, current = (random_placement(random_, 5, 8, 12, 4) for _ in range(2))
    assert relabelled(fresh, current, ()) == fresh


@pytest.mark.parametrize("classes", [[0, 1, 2, 3], [0, 1, 1, 0], [5, 5, -2, 5], [0, 0, 0, 0]])
def test_experts_stay_in_slots_of_their_class(classes: list[int]) -> None:
    """GPUs are swapped as a whole; inside one, an expert moves only to a slot of the same class."""
    slot_class = np.array(classes * 5)
    random_ = random.Random(4)
    start = random_placement(random_, 20, 20, 20, 5)
    shuffled = []
    for row in start.expert_of_slot.tolist():
        for number in set(classes):
            slots = [slot for slot in range(20) if slot_class[slot] == number]
            order = random_.sample(slots, len(slots))
            values = [row[slot] for slot in order]
            for slot, value in zip(slots, values, strict=True):
                row[slot] = value
        shuffled.append(row)
    fresh = Placement(torch.tensor(shuffled), 20, 5)
    named = relabelled(fresh, start, (4,), slot_class)
    assert contents(named, 4) == contents(fresh, 4)
    of_class = [
        np.take_along_axis(np.broadcast_to(slot_class, (20, 20)), each.inverse[..., 0].numpy(), 1)
        for each in (named, start)
    ]
    assert (of_class[0] == of_class[1]).all()
    tables = zip(fresh.expert_of_slot.tolist(), start.expert_of_slot.tolist(), strict=True)
    # An expert on this GPU before and after is in a slot of its class both times, so it can keep its slot.
    assert moved(named, start).tolist() == [fewest_moves(new, old, 4) for new, old in tables]


def test_layers_are_named_independently() -> None:
    random_ = random.Random(5)
    fresh, current = (random_placement(random_, 4, 9, 12, 4) for _ in range(2))
    together = relabelled(fresh, current, (6, 3)).expert_of_slot
    for layer in range(4):
        one, other = (Placement(each.expert_of_slot[layer : layer + 1], 9, 4) for each in (fresh, current))
        assert torch.equal(relabelled(one, other, (6, 3)).expert_of_slot[0], together[layer])
