"""Steps 0 to 7 of packing in Numba, on one row. Each equals its namesake in `steps`.

Only `cpu_kernels` imports this. A first scan, which LLVM can vectorise, computes the best value; a second one finds
where it is.
Shapes of one row: E experts, P slots, M packs, G = P / M slots in each.
"""

from __future__ import annotations

import numpy as np

from distplb.packing.cpu_row import FREE, NEVER, NONE, compiled, copy, parted

__all__ = ["divide", "greedy", "lower_max", "lower_variance", "noisy_keys", "swap_pairs"]

_INDEX_BITS = 22  # of the index in a packed (value, index); values are below 2^41
_INDEX = np.int64(2**_INDEX_BITS - 1)
_MASK = np.int64(2**32 - 1)

# --- steps 0 to 2 -----------------------------------------------------------------------------------------------


@compiled
def _mix(state):
    state &= _MASK
    state = ((state ^ (state >> 16)) * np.int64(0x7FEB352D)) & _MASK
    state = ((state ^ (state >> 15)) * np.int64(0x846CA68B)) & _MASK
    return state ^ (state >> 16)


@compiled
def noisy_keys(weight, layer, candidate, seed, key):
    """Step 1, as in `noise.noisy_keys`."""
    if candidate == 0:
        copy(weight, key)
        return
    state = np.int64(0)
    for part in (seed, seed >> 32, layer, candidate):
        state = _mix((state ^ (part & _MASK)) + np.int64(0x9E3779B9))
    for expert in range(len(weight)):
        noise = (_mix((state ^ expert) + np.int64(0x9E3779B9)) * 9831) >> 32
        key[expert] = weight[expert] + ((weight[expert] * noise) >> 16)


@compiled
def divide(row, most):
    """Step 0."""
    key, replicas, packed = row.key, row.replicas, row.packed
    for expert in range(len(key)):
        replicas[expert] = 1
        packed[expert] = (key[expert] << _INDEX_BITS) | (_INDEX - expert) if most > 1 else -1
    for _ in range(len(row.table) - len(key)):
        largest = np.int64(-1)
        for expert in range(len(key)):
            largest = max(largest, packed[expert])
        expert = _INDEX - (largest & _INDEX)
        replicas[expert] += 1
        share = key[expert] // replicas[expert]
        packed[expert] = (share << _INDEX_BITS) | (_INDEX - expert) if replicas[expert] < most else -1


@compiled
def greedy(row, apart):
    """Step 2; returns whether `apart` kept a slot out of the lightest pack."""
    table, own, load, packed, filled = row.table, row.own, row.load, row.packed, row.filled
    num_packs, at, kept = len(load), 0, False
    size = len(table) // num_packs
    for expert in range(len(row.key)):
        value = -((parted(row.key[expert], row.replicas[expert]) << _INDEX_BITS) | (_INDEX - expert))
        for _ in range(row.replicas[expert]):
            row.order[at] = value
            at += 1
    row.order.sort()
    for pack in range(num_packs):
        packed[pack], filled[pack], load[pack] = pack, 0, 0
    if apart:
        row.holds[:] = False
        table[:] = -1
    for value in row.order:
        expert = _INDEX - (-value & _INDEX)
        minimum = NEVER
        for pack in range(num_packs):
            minimum = min(minimum, packed[pack])
        to = minimum & _INDEX
        if apart:
            if row.holds[expert, to]:
                kept = True
                minimum = NEVER
                for pack in range(num_packs):
                    if not row.holds[expert, pack]:
                        minimum = min(minimum, packed[pack])
                if minimum == NEVER:
                    expert = _displace(row, expert, to)
                else:
                    to = minimum & _INDEX
            row.holds[expert, to] = True
        slot = to * size + filled[to]
        table[slot] = expert
        own[slot] = row.share[expert]
        load[to] += row.share[expert]
        filled[to] += 1
        packed[to] = NEVER if filled[to] == size else (load[to] << _INDEX_BITS) | to
    for pack in range(num_packs):
        for slot in range(pack * size, (pack + 1) * size):
            row.around[slot] = load[pack]
    return kept


@compiled
def _displace(row, expert, to):
    """Put `expert` in the place of another, as in `steps._displace`; returns the other."""
    table, share, holds = row.table, row.share, row.holds
    size = len(table) // len(row.load)
    minimum, place = NEVER, NONE
    for slot in range(len(table)):
        other = table[slot]
        if other < 0 or holds[expert, slot // size] or holds[other, to]:
            continue
        distance = abs(share[other] - share[expert])
        if distance < minimum:
            minimum, place = distance, np.int64(slot)
    leaves, where = table[place], place // size
    table[place] = expert
    row.own[place] = share[expert]
    row.load[where] += share[expert] - share[leaves]
    if row.packed[where] != NEVER:
        row.packed[where] = (row.load[where] << _INDEX_BITS) | where
    holds[leaves, where] = False
    holds[expert, where] = True
    return leaves


# --- steps 3, 4, 6, 7 -------------------------------------------------------------------------------------------


@compiled
def _exchange(row, one, other, apart):
    """Exchange the contents of two slots of different packs."""
    table, own, load = row.table, row.own, row.load
    size = len(table) // len(load)
    here, there = one // size, other // size
    lost = own[one] - own[other]
    table[one], table[other] = table[other], table[one]
    own[one], own[other] = own[other], own[one]
    load[here] -= lost
    load[there] += lost
    for position in range(size):
        row.around[here * size + position] = load[here]
        row.around[there * size + position] = load[there]
    if apart:
        row.holds[table[one], there] = False
        row.holds[table[other], here] = False
        row.holds[table[one], here] = True
        row.holds[table[other], there] = True


@compiled
def lower_variance(row):
    """Step 3.

    A swap between two packs whose loads differ by D changes the reference's measure by -D^2 / 4 at best, so pairs of
    packs that cannot reach the best swap so far are skipped. The heaviest and the lightest pack are tried first.
    """
    small, small_load = row.small, row.small_load
    num_packs = len(small_load)
    size = len(small) // num_packs
    total, shift = row.own.sum(), 0
    while (total >> shift) > 1 << 30:
        shift += 1
    for slot in range(len(small)):
        small[slot] = row.own[slot] >> shift
    for pack in range(num_packs):
        load = np.int64(0)
        for slot in range(pack * size, (pack + 1) * size):
            load += small[slot]
        small_load[pack] = load
    for _ in range(10):
        heavy, light = np.argmax(small_load), np.argmin(small_load)
        highest, lowest = small_load[heavy], small_load[light]
        swap = (np.int64(0), NONE, NONE)
        swap = _best_between(row, min(heavy, light), max(heavy, light), swap)
        for first in range(num_packs):
            reach = max(highest - small_load[first], small_load[first] - lowest)
            if reach * reach < -4 * swap[0]:
                continue
            for second in range(first + 1, num_packs):
                gap = small_load[first] - small_load[second]
                if gap * gap >= -4 * swap[0]:
                    swap = _best_between(row, first, second, swap)
        change, one, other = swap
        if change == 0:
            return
        _exchange(row, one, other, FREE)
        difference = small[one] - small[other]
        small[one], small[other] = small[other], small[one]
        small_load[one // size] -= difference
        small_load[other // size] += difference


@compiled
def _best_between(row, first, second, swap):
    """The best (change, slot, slot) between two packs if better than `swap`, or equal and earlier; else `swap`."""
    small = row.small
    size = len(small) // len(row.load)
    gap = row.small_load[first] - row.small_load[second]
    best, one, other = swap
    for slot in range(first * size, (first + 1) * size):
        for place in range(second * size, (second + 1) * size):
            difference = small[slot] - small[place]
            change = difference * (difference - gap)
            if change < best:
                best, one, other = change, slot, place
            elif change == best and best < 0 and (slot < one or (slot == one and place < other)):
                one, other = slot, place
    return best, one, other


@compiled
def lower_max(row, rounds, apart):
    """Steps 4 and 7."""
    own, around, load = row.own, row.around, row.load
    size = len(own) // len(load)
    for _ in range(rounds):
        peak = np.int64(-1)
        for pack in range(len(load)):
            peak = max(peak, load[pack])
        heavy = 0
        while load[heavy] != peak:
            heavy += 1
        best, one = peak, NONE
        for slot in range(heavy * size, (heavy + 1) * size):
            weight, rest = own[slot], peak - own[slot]
            minimum = NEVER
            for place in range(len(own)):
                minimum = min(minimum, max(rest + own[place], around[place] + weight - own[place]))
            if minimum < best:
                best, one = minimum, np.int64(slot)
        if one < 0:
            return
        weight, rest, other = own[one], peak - own[one], np.int64(0)
        while max(rest + own[other], around[other] + weight - own[other]) != best:
            other += 1
        if apart and (row.holds[row.table[one], other // size] or row.holds[row.table[other], heavy]):
            one, other = _best_apart(row, heavy, peak)
            if one < 0:
                return
        _exchange(row, one, other, apart)


@compiled
def _best_apart(row, heavy, peak):
    """The exchange for `lower_max` if the best one overall would bring replicas together."""
    table, own, load = row.table, row.own, row.load
    size = len(table) // len(load)
    best, one, other = peak, NONE, NONE
    for slot in range(heavy * size, (heavy + 1) * size):
        weight, rest = own[slot], peak - own[slot]
        for pack in range(len(load)):
            if row.holds[table[slot], pack]:
                continue
            for place in range(pack * size, (pack + 1) * size):
                worst = max(rest + own[place], load[pack] + weight - own[place])
                if worst < best and not row.holds[table[place], heavy]:
                    best, one, other = worst, np.int64(slot), np.int64(place)
    return one, other


@compiled
def swap_pairs(row, rounds, partner, apart):
    """Step 6; returns the number of pair swaps."""
    num_packs, num_slots = len(row.load), len(row.table)
    size = num_slots // num_packs
    if size < 2 or size > 16 or num_packs <= partner + 1:
        return 0
    for num_swaps in range(rounds):
        heavy, light = np.argmax(row.load), _nth_lightest(row.load, partner)
        one, two, pair = _best_pair(row, heavy, light, apart)
        if one < 0:
            return num_swaps
        _exchange(row, one, pair // num_slots, apart)
        _exchange(row, two, pair % num_slots, apart)
    return rounds


@compiled
def _best_pair(row, heavy, light, apart):
    """Two slots of the heavy pack, and two of the light one packed into one integer; -1 if no exchange helps."""
    own, table, sums = row.own, row.table, row.sums
    size = len(table) // len(row.load)
    gap = row.load[heavy] - row.load[light]
    count = 0
    for i in range(light * size, (light + 1) * size):
        for j in range(i + 1, (light + 1) * size):
            if not (apart and (row.holds[table[i], heavy] or row.holds[table[j], heavy])):
                sums[count] = 2 * (own[i] + own[j])
                row.pairs[count] = i * len(table) + j
                count += 1
    best, one, two, pair = gap, NONE, NONE, NONE
    for i in range(heavy * size, (heavy + 1) * size):
        for j in range(i + 1, (heavy + 1) * size):
            if apart and (row.holds[table[i], light] or row.holds[table[j], light]):
                continue
            rest, minimum = gap - 2 * (own[i] + own[j]), NEVER
            for nth in range(count):
                minimum = min(minimum, abs(rest + sums[nth]))
            if minimum < best:
                best, one, two = minimum, np.int64(i), np.int64(j)
    if one >= 0:
        rest, pair = gap - 2 * (own[one] + own[two]), np.int64(0)
        while abs(rest + sums[pair]) != best:
            pair += 1
    return one, two, row.pairs[pair]


@compiled
def _nth_lightest(load, nth):
    """The `nth` lightest pack, counted from 0 in the order of a stable sort."""
    load_before, nth_pack = np.int64(-1), -1
    for _ in range(nth + 1):
        after, after_pack = NEVER, -1
        for pack in range(len(load)):
            later = load[pack] > load_before or (load[pack] == load_before and pack > nth_pack)
            if later and load[pack] < after:
                after, after_pack = load[pack], pack
        load_before, nth_pack = after, after_pack
    return nth_pack
