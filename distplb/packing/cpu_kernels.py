"""Numba kernels that pack row by row without the GIL. Only `packing.cpu` imports them.

Shapes: X rows, n items, E experts, P slots, M packs; `weight [X, E]`, `tables [X, P]`. A kernel writes the rows of
`tables` from `begin` to `end`.
"""

from __future__ import annotations

import numpy as np

from distplb.packing.cpu_cost import cost_of_row, is_crowded
from distplb.packing.cpu_row import (
    APART,
    FREE,
    LIGHTEST,
    MAX_ROUNDS,
    NEVER,
    NONE,
    ONE,
    PAIR_ROUNDS,
    allocating,
    at,
    compiled,
    copy,
    largest,
    new_row,
    parted,
    total,
)
from distplb.packing.cpu_settle import settle_row
from distplb.packing.cpu_settle_state import new_state
from distplb.packing.cpu_steps import divide, greedy, lower_max, lower_variance, noisy_keys, rank_items, swap_pairs

__all__ = ["cost_rows", "crowded_rows", "finish_rows", "pack_rows", "polish_rows", "refine_rows", "settle_rows"]


@compiled
def _weigh(row, apart):
    """Recompute everything that follows from `table` and `share`."""
    size = len(row.table) // len(row.load)
    if apart:
        row.holds[:] = False
    for pack in range(len(row.load)):
        load = np.int64(0)
        for slot in range(at(pack * size), at((pack + 1) * size)):
            load += row.share[at(row.table[slot])]
            if apart:
                row.holds[at(row.table[slot]), pack] = True
        row.load[pack] = load
    row.value[0] = NONE
    rank_items(row)


@compiled
def _begin(weight, row, apart):
    """Steps 0 and 2 of a search; returns whether `apart` affected them."""
    most = len(row.load) if apart else len(row.table)
    divide(row, most)
    kept = _fill(weight, row, apart)
    return kept or (apart and largest(row.replicas)[0] == most)


@compiled
def _fill(weight, row, apart):
    """Step 2; returns the result of `greedy`."""
    for expert in range(len(weight)):
        row.share[expert] = parted(weight[expert], row.replicas[expert])
    return greedy(row, apart)


@compiled
def _improve(row, apart):
    """Steps 3 to 7, after `greedy`."""
    rank_items(row)
    if len(row.table) == len(row.key):
        lower_variance(row)
    lower_max(row, MAX_ROUNDS, apart)
    swap_pairs(row, PAIR_ROUNDS, LIGHTEST, apart)
    lower_max(row, MAX_ROUNDS + 4 * len(row.load), apart)


@compiled
def _search(weight, row, best, apart):
    """Steps 3 to 8 after `_begin`, as in `reference._search`; the packing is in the table of `best`.

    Returns the load of its heaviest pack.
    """
    num_slots, num_packs = len(row.table), len(row.load)
    size = num_slots // num_packs
    most = num_packs if apart else num_slots
    _improve(row, apart)
    copy(row.table, best.table)
    copy(row.load, best.load)
    peak, mean, tries = largest(row.load)[0], total(weight) // num_packs, 0
    if size == 1:
        return peak
    for _ in range(max(4, min(64, (1 << 14) // num_slots))):
        if (peak - mean) << 8 <= mean:
            break
        giver = _nth_giver(weight, row.replicas, tries // size)
        if giver < 0:
            break
        taker = best.table[largest(best.load)[1] * size + tries % size]
        tries += 1
        if giver == taker or row.replicas[taker] >= most:
            continue
        row.replicas[taker] += 1
        row.replicas[giver] -= 1
        _fill(weight, row, apart)
        _improve(row, apart)
        lower = largest(row.load)[0]
        if lower < peak:
            copy(row.table, best.table)
            copy(row.load, best.load)
            peak, tries = lower, 0
        else:
            row.replicas[taker] -= 1
            row.replicas[giver] += 1
    return peak


@compiled
def _nth_giver(weight, replicas, nth):
    """The expert whose replicas would weigh the nth least after losing one; -1 if there is none, or nth is above 7."""
    if nth >= 8:
        return -1
    share_before, giver = np.int64(-1), -1
    for _ in range(nth + 1):
        after, after_expert = NEVER, -1
        for expert in range(len(weight)):
            if replicas[expert] > 1:
                share = weight[expert] // (replicas[expert] - 1)
                if (share > share_before or (share == share_before and expert > giver)) and share < after:
                    after, after_expert = share, expert
        if after_expert < 0:
            return -1
        share_before, giver = after, after_expert
    return giver


# --- entry points -----------------------------------------------------------------------------------------------


@allocating
def pack_rows(weight, num_packs, layer, candidate, seed, begin, end, tables):
    """Steps 1 to 4 for the rows from `begin` to `end`; `weight` and `tables` are `[X, n]`."""
    row = new_row(weight.shape[1], weight.shape[1], num_packs, FREE)
    for x in range(begin, end):
        noisy_keys(weight[x], layer[x], candidate[x], seed, row.key)
        copy(weight[x], row.share)
        greedy(row, FREE)
        rank_items(row)
        lower_variance(row)
        lower_max(row, MAX_ROUNDS, FREE)
        copy(row.table, tables[x])


@allocating
def finish_rows(weight, num_packs, begin, end, tables):
    """Steps 6 and 7, in place."""
    row = new_row(weight.shape[1], weight.shape[1], num_packs, FREE)
    for x in range(begin, end):
        copy(weight[x], row.share)
        copy(tables[x], row.table)
        _weigh(row, FREE)
        swap_pairs(row, PAIR_ROUNDS, LIGHTEST, FREE)
        lower_max(row, MAX_ROUNDS, FREE)
        copy(row.table, tables[x])


@allocating
def refine_rows(weight, num_packs, layer, candidate, seed, shared, begin, end, tables):
    """Steps 0 to 8; `weight [X, E]`, `tables [X, P]`."""
    num_experts, num_slots = weight.shape[1], tables.shape[1]
    replicated = num_slots > num_experts
    roomy = num_slots <= num_packs * num_experts
    row = new_row(num_experts, num_slots, num_packs, replicated)
    best = new_row(num_experts, num_slots, num_packs, FREE)
    for x in range(begin, end):
        noisy_keys(weight[x], layer[x], candidate[x], seed, row.key)
        if not replicated:
            _fill(weight[x], row, FREE)
            _improve(row, FREE)
            copy(row.table, tables[x])
            continue
        peak = NEVER
        if roomy:
            mattered = _begin(weight[x], row, APART)
            peak = _search(weight[x], row, best, APART)
            copy(best.table, tables[x])
            if not shared or not mattered:
                continue
        _begin(weight[x], row, FREE)
        if roomy and not is_crowded(row.table, num_packs, row.small):
            continue  # the search would only repeat the one before
        if _search(weight[x], row, best, FREE) < peak:
            copy(best.table, tables[x])


@allocating
def polish_rows(weight, num_packs, begin, end, tables):
    """Step 9, in place."""
    num_experts, num_slots = weight.shape[1], tables.shape[1]
    row = new_row(num_experts, num_slots, num_packs, APART)
    for x in range(begin, end):
        copy(tables[x], row.table)
        row.replicas[:] = 0
        for expert in row.table:
            row.replicas[at(expert)] += 1
        for expert in range(num_experts):
            row.share[expert] = weight[x, expert] // max(1, row.replicas[expert])
        apart = largest(row.replicas)[0] > 1 and not is_crowded(row.table, num_packs, row.key)
        _weigh(row, apart)
        for _ in range(20):
            num_swaps = 0
            for partner in range(4):
                num_swaps = swap_pairs(row, ONE, partner, apart)
                if num_swaps:
                    break
            if not num_swaps:
                break
            lower_max(row, MAX_ROUNDS + 4 * num_packs, apart)
        copy(row.table, tables[x])


@allocating
def settle_rows(load, region, apart, distance, price, num_packs, layer, ceiling, begin, end, tables):
    """Steps 10 and 11, in place; `load [L, T, E]`; `distance [L, E, M]`, or `[L, 1, 1]` if moving is free."""
    is_priced = distance.shape[1] == load.shape[2]
    state = new_state(load.shape[1], load.shape[2], tables.shape[1], num_packs, apart, is_priced)
    for x in range(begin, end):
        copy(tables[x], state.table)
        settle_row(state, load[layer[x]], distance[layer[x]], price[layer[x]], region, ceiling[x])
        copy(state.table, tables[x])


@allocating
def cost_rows(load, table, num_packs, layer, most, begin, end, cost):
    """The cost of each table, at most `most`; `load [T, L, E]`, `table [X, P]`, `cost [X]`."""
    replicas, share = np.ones(load.shape[2], np.int64), np.empty(load.shape[2], np.int64)
    for x in range(begin, end):
        cost[x] = min(most, cost_of_row(load, layer[x], table[x], replicas, share, num_packs))


@allocating
def crowded_rows(table, num_packs, begin, end, crowded):
    """Whether a pack of each table holds an expert twice; `table [X, P]`, `crowded [X]`."""
    last_expert = np.int64(0)
    for x in range(begin, end):
        last_expert = max(last_expert, largest(table[x])[0])
    last_pack = np.empty(last_expert + 1, np.int64)
    for x in range(begin, end):
        crowded[x] = is_crowded(table[x], num_packs, last_pack)
