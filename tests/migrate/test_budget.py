"""A plan that moves too much is cut to the part that saves most: within the budget, in whole cycles, on all ranks.

Shapes: T steps, L layers, E experts, P slots, M GPUs.
"""

from __future__ import annotations

import random
from itertools import combinations
from typing import Any

import pytest
import torch
from jobs import SLOT_BYTES, Job, by_slot, skewed
from ranks import on_ranks
from torch import Tensor

from distplb import Placement, imbalance
from distplb.migrate.budget import within_budget
from distplb.records.events import RebalanceEvent

Table = list[list[int]]  # [L][P]


# --- the pure part --------------------------------------------------------------------------------------------------


def plain_cost(load: Table, row: list[int], num_gpus: int) -> int:
    """The cost of one layer, whose load is `[T][E]`."""
    size = len(row) // num_gpus
    return sum(
        max(sum(step[e] for e in row[gpu * size : (gpu + 1) * size]) for gpu in range(num_gpus)) for step in load
    )


def total(load: Tensor, table: Table, num_gpus: int) -> int:
    return sum(plain_cost(load[:, layer].tolist(), row, num_gpus) for layer, row in enumerate(table))


def plain_cycles(old: list[int], new: list[int]) -> list[set[int]]:
    """Sets of slots that exchange experts among each other, grown until no expert comes from outside."""
    cycles: list[set[int]] = []
    for start in range(len(old)):
        if old[start] == new[start] or any(start in cycle for cycle in cycles):
            continue
        cycle = {start}
        while (sources := {old.index(new[slot]) for slot in cycle}) - cycle:
            cycle |= sources
        cycles.append(cycle)
    return cycles


def with_cycles(old: Table, new: Table, chosen: list[tuple[int, set[int]]]) -> Table:
    table = [list(row) for row in old]
    for layer, cycle in chosen:
        for slot in cycle:
            table[layer][slot] = new[layer][slot]
    return table


def layers_alone(load: Tensor, old: Table, new: Table, num_gpus: int, left: int) -> int:
    """What whole layers save, in descending order of what they save per slot."""
    worth = []
    for layer, (before, after) in enumerate(zip(old, new, strict=True)):
        steps = load[:, layer].tolist()
        saved = plain_cost(steps, before, num_gpus) - plain_cost(steps, after, num_gpus)
        slots = sum(a != b for a, b in zip(before, after, strict=True))
        if saved > 0:
            worth.append((-saved / slots, layer, saved, slots))
    sum_saved = 0
    for _, _, saved, slots in sorted(worth):
        if slots <= left:
            sum_saved, left = sum_saved + saved, left - slots
    return sum_saved


def case(seed: int) -> tuple[Tensor, Placement, Placement]:
    random_ = random.Random(seed)
    layers, gpus, size = random_.choice([(1, 2, 4), (2, 2, 3), (3, 2, 2), (2, 3, 2), (1, 4, 2)])
    experts = gpus * size
    load = torch.tensor(
        [[[random_.choice([1, 5, 40, 90]) for _ in range(experts)] for _ in range(layers)] for _ in range(2)]
    )
    old = Placement(torch.tensor([random_.sample(range(experts), experts) for _ in range(layers)]), experts, gpus)
    tables = []
    for layer in range(layers):  # the best of a few, as a plan would be
        tries = [random_.sample(range(experts), experts) for _ in range(6)]
        tables.append(min(tries, key=lambda row: plain_cost(load[:, layer].tolist(), row, gpus)))
    return load, old, Placement(torch.tensor(tables), experts, gpus)


@pytest.mark.parametrize("seed", range(25))
def test_a_part_of_a_plan_against_brute_force(seed: int) -> None:
    load, old, new = case(seed)
    before, after = old.expert_of_slot.tolist(), new.expert_of_slot.tolist()
    cycles = [(layer, cycle) for layer in range(len(before)) for cycle in plain_cycles(before[layer], after[layer])]
    subsets = [some for size in range(len(cycles) + 1) for some in combinations(cycles, size)]
    start = total(load, before, old.num_gpus)
    for max_slots in range(sum(len(cycle) for _, cycle in cycles) + 2):
        part = within_budget(load, old, new, max_slots)  # a Placement checks itself
        table = part.expert_of_slot.tolist()
        moved = sum(a != b for rows in zip(before, table, strict=True) for a, b in zip(*rows, strict=True))
        assert moved <= max_slots
        assert any(table == with_cycles(before, after, list(some)) for some in subsets)
        saved = start - total(load, table, old.num_gpus)
        if max_slots >= sum(len(cycle) for _, cycle in cycles):
            assert part == new
            continue
        fitting = [some for some in subsets if sum(len(cycle) for _, cycle in some) <= max_slots]
        best = max(start - total(load, with_cycles(before, after, list(some)), old.num_gpus) for some in fitting)
        assert layers_alone(load, before, after, old.num_gpus, max_slots) <= saved <= best


def test_most_of_what_could_be_saved_is_saved() -> None:
    """Taking the best return first, compared with the best of all choices of cycles."""
    saved_sum = best_sum = 0
    for seed in range(100, 140):
        load, old, new = case(seed)
        before, after = old.expert_of_slot.tolist(), new.expert_of_slot.tolist()
        cycles = [(layer, cycle) for layer in range(len(before)) for cycle in plain_cycles(before[layer], after[layer])]
        max_slots = sum(len(cycle) for _, cycle in cycles) // 2
        choices = [some for size in range(len(cycles) + 1) for some in combinations(cycles, size)]
        tables = [
            with_cycles(before, after, list(some))
            for some in choices
            if sum(len(cycle) for _, cycle in some) <= max_slots
        ]
        start = total(load, before, old.num_gpus)
        part = within_budget(load, old, new, max_slots).expert_of_slot.tolist()
        saved_sum += start - total(load, part, old.num_gpus)
        best_sum += start - min(total(load, table, old.num_gpus) for table in tables)
    assert saved_sum > 0.8 * best_sum > 0


def test_a_move_that_saves_nothing_is_not_made_though_it_fits() -> None:
    load = torch.tensor([[[9, 9, 1, 1], [1, 1, 1, 1]]])
    old = Placement.contiguous(2, 4, 2)
    new = Placement(torch.tensor([[2, 3, 0, 1], [0, 2, 1, 3]]), 4, 2)  # the first layer renumbers the GPUs
    assert within_budget(load, old, new, max_slots=5) == old


def test_an_exchange_that_pays_only_after_another_is_made_after_it() -> None:
    load = torch.tensor([[[8, 6, 4, 6, 1, 1, 1, 1]]])
    old = Placement.contiguous(1, 8, 4)
    # Swapping 0 and 4 helps the busiest GPU, then 3 and 6 the next one; 5 and 7 help no GPU.
    new = Placement(torch.tensor([[4, 1, 2, 6, 0, 7, 3, 5]]), 8, 4)
    assert within_budget(load, old, new, max_slots=5).expert_of_slot.tolist() == [[4, 1, 2, 6, 0, 5, 3, 7]]
    assert within_budget(load, old, new, max_slots=3).expert_of_slot.tolist() == [[4, 1, 2, 3, 0, 5, 6, 7]]


def test_what_fits_in_the_budget_takes_no_group_apart() -> None:
    """Slots 3 and 4 moved alone. With two slots nothing can move: the smallest exchange of groups needs four."""
    load = torch.tensor([[[9, 9, 9, 9, 1, 1, 1, 1]]])
    old, new = Placement.contiguous(1, 8, 2), Placement(torch.tensor([[0, 1, 4, 5, 2, 3, 6, 7]]), 8, 2)
    parts = [within_budget(load, old, new, max_slots, num_groups=4) for max_slots in range(5)]
    assert parts == [old, old, old, old, new]
    assert within_budget(load, old, new, 2).expert_of_slot.tolist() == [[0, 1, 4, 3, 2, 5, 6, 7]]


def test_any_part_of_a_plan_of_groups_keeps_their_blocks() -> None:
    random_ = random.Random(4)
    met = set()
    for _ in range(200):
        groups, size = random_.choice([(4, 2), (6, 2), (4, 3), (2, 6)])
        rows = []
        for _ in range(4):  # two layers, before and after
            order = random_.sample(range(groups), groups)
            rows.append([group * size + member for group in order for member in random_.sample(range(size), size)])
        slots = groups * size
        old, new = (Placement(torch.tensor(pair), slots, 2) for pair in (rows[:2], rows[2:]))
        load = torch.tensor([[[random_.choice([1, 2, 50]) for _ in range(slots)] for _ in range(2)] for _ in range(2)])
        part = within_budget(load, old, new, random_.randrange(2 * slots), groups)
        met.add((part == old, part == new))
        for row in part.expert_of_slot.tolist():
            assert all(len({expert // size for expert in row[at : at + size]}) == 1 for at in range(0, slots, size))
    assert met == {(True, False), (False, True), (False, False)}


# --- in a job -------------------------------------------------------------------------------------------------------


def with_budget() -> list[dict[str, Any]]:
    results = []
    for slots in (None, 5, 2, 1):
        events: list[RebalanceEvent] = []
        job = Job()
        options = {} if slots is None else {"max_bytes": slots * SLOT_BYTES + SLOT_BYTES // 2}
        rebalancer = job.rebalancer(on_event=events.append, engine="reference", **options)
        old = rebalancer.placement
        for _ in range(2):
            job.iterate(by_slot(heavy(), old))
            rebalancer.step()
        event = events[0]
        names = ("decision", "reason", "slots_moved", "bytes_moved", "left_out", "imbalance_after", "placement_digest")
        names += ("imbalance_before", "tokens_peak_after")
        results.append({name: getattr(event, name) for name in names})
        after = imbalance(heavy()[None], rebalancer.placement).mean(0)
        assert after.tolist() == pytest.approx(list(event.imbalance_after))
    return results


def heavy() -> Tensor:
    """Counts `[L, E]`: four hot experts of layer 0 and two less hot ones of layer 1 are all on GPU 0."""
    counts = skewed((0, 1, 2, 3))
    counts[1] = skewed((0, 1))[1]
    counts[1, 1] = 60
    return counts


def test_a_job_moves_what_its_budget_allows_and_says_what_was_left_out() -> None:
    first, *others = on_ranks(2, with_budget, deadline=60)
    assert all(other == first for other in others)
    free, five, two, one = first
    assert free["left_out"] == ("", "")
    assert free["slots_moved"] > 5
    assert 2 <= five["slots_moved"] <= 5
    assert two["slots_moved"] == 2
    for event in (five, two):
        assert event["decision"] == "moved"
        assert event["bytes_moved"] == event["slots_moved"] * SLOT_BYTES
        assert event["placement_digest"] == free["placement_digest"]  # of the plan, not of what was carried out
        assert any(text.endswith("slots are over the budget") for text in event["left_out"])
        assert sum(event["imbalance_after"]) < sum(event["imbalance_before"])
        missing = sum(int(text.split()[0]) for text in event["left_out"] if text)
        assert missing + event["slots_moved"] == free["slots_moved"]
    assert sum(free["imbalance_after"]) <= sum(five["imbalance_after"]) < sum(two["imbalance_after"])
    assert (one["decision"], one["slots_moved"], one["bytes_moved"]) == ("kept", 0, 0)
    assert one["reason"] == "no move that pays off fits in max_bytes"
    assert one["imbalance_after"] == one["imbalance_before"]
