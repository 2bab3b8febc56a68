"""Steps 0 to 7 of packing in Numba, on one row. Each equals its namesake in `steps`.

Only `cpu_kernels` imports this. A first scan, which LLVM can vectorise, computes the best value; a second one finds
where it is.
Shapes of one row: E experts, P slots, M packs, G = P / M slots in each.
"""

from __future__ import annotations

import numpy as np

from distplb.packing.cpu_order import INDEX, INDEX_BITS, leaves_of, plant, replace, sort_down
from distplb.packing.cpu_row import (
    CHUNK,
    FAR,
    FREE,
    NEVER,
    NONE,
    at,
    compiled,
    copy,
    inlined,
    largest,
    parted,
    total,
)

__all__ = ["divide", "greedy", "lower_max", "lower_variance", "noisy_keys", "rank_items", "swap_pairs"]

_MASK = np.int64(2**32 - 1)

# --- steps 0 to 2 -----------------------------------------------------------------------------------------------


@inlined
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
    key, replicas, tree = row.key, row.replicas, row.tree
    leaves = leaves_of(len(key))
    for expert in range(len(key)):
        replicas[expert] = 1
        tree[leaves + expert] = -((key[expert] << INDEX_BITS) | (INDEX - expert)) if most > 1 else NEVER
    plant(tree, leaves, len(key))
    for _ in range(len(row.table) - len(key)):
        expert = INDEX - (-tree[1] & INDEX)
        replicas[at(expert)] += 1
        share = key[at(expert)] // replicas[at(expert)]
        value = -((share << INDEX_BITS) | (INDEX - expert))
        replace(tree, leaves + expert, value if replicas[at(expert)] < most else NEVER)


@compiled
def greedy(row, apart):
    """Step 2; returns whether `apart` kept a slot out of the lightest pack."""
    table, load, filled, tree = row.table, row.load, row.filled, row.tree
    num_packs, kept, displaced, item = len(load), False, False, 0
    leaves = leaves_of(num_packs)
    size = len(table) // num_packs
    for expert in range(len(row.key)):
        row.small[expert] = parted(row.key[expert], row.replicas[expert])
    number = len(row.key)
    sort_down(row.small[:number], row.order[:number], row.value[:number], row.starts, row.packed)
    for pack in range(num_packs):
        tree[leaves + pack], filled[pack], load[pack] = pack, 0, 0
    plant(tree, leaves, num_packs)
    if apart:
        row.holds[:] = False
        table[:] = -1
    for nth in range(number):
        for _ in range(row.replicas[at(row.order[nth])]):
            expert = row.order[nth]
            to = tree[1] & INDEX
            # Only an expert with several replicas can be where it must not be.
            if apart and row.replicas[at(expert)] > 1 and row.holds[at(expert), at(to)]:
                kept = True
                minimum = NEVER
                for pack in range(num_packs):
                    if not row.holds[expert, pack]:
                        minimum = min(minimum, tree[leaves + pack])
                if minimum == NEVER:
                    expert, displaced = _displace(row, expert, to), True
                else:
                    to = minimum & INDEX
            if apart:
                row.holds[at(expert), at(to)] = True
            slot, share = to * size + filled[at(to)], row.share[at(expert)]
            table[at(slot)] = expert
            row.slot[at(item)], row.value[at(item)] = slot, share
            item += 1
            load[at(to)] += share
            filled[at(to)] += 1
            replace(tree, leaves + to, NEVER if filled[at(to)] == size else (load[at(to)] << INDEX_BITS) | to)
    if displaced:
        row.value[0] = NONE  # so that the items are sorted
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
    row.load[where] += share[expert] - share[leaves]
    if row.filled[where] < size:
        replace(row.tree, leaves_of(len(row.load)) + where, (row.load[where] << INDEX_BITS) | where)
    holds[leaves, where] = False
    holds[expert, where] = True
    return leaves


# --- steps 3, 4, 6, 7 -------------------------------------------------------------------------------------------


@compiled
def rank_items(row):
    """Number the items of the slots, the heaviest first; where `slot` and `value` are in order, they are kept."""
    out_of_order = row.value[0] < 0
    for item in range(1, len(row.slot)):
        out_of_order |= row.value[item - 1] < row.value[item]
    if out_of_order:
        for slot in range(len(row.table)):
            row.small[slot] = row.share[at(row.table[slot])]
        sort_down(row.small, row.slot, row.value[: len(row.slot)], row.starts, row.packed)
    size = len(row.slot) // len(row.load)
    for item in range(len(row.slot)):
        row.item[at(row.slot[item])] = item
        row.around[item] = row.load[at(row.slot[item] // size)]


@inlined
def _exchange(row, one, other, apart):
    """Exchange the contents of two slots of different packs."""
    table, item, load = row.table, row.item, row.load
    size = len(table) // len(load)
    here, there = at(one // size), at(other // size)
    one, other = at(one), at(other)
    lost = row.value[at(item[one])] - row.value[at(item[other])]
    table[one], table[other] = table[other], table[one]
    item[one], item[other] = item[other], item[one]
    row.slot[at(item[one])], row.slot[at(item[other])] = one, other
    load[here] -= lost
    load[there] += lost
    for position in range(at(size)):
        row.around[at(item[here * at(size) + position])] = load[here]
        row.around[at(item[there * at(size) + position])] = load[there]
    if apart:
        row.holds[at(table[one]), there] = False
        row.holds[at(table[other]), here] = False
        row.holds[at(table[one]), here] = True
        row.holds[at(table[other]), there] = True


@compiled
def lower_variance(row):
    """Step 3.

    A swap between two packs whose loads differ by D changes the reference's measure by -D^2 / 4 at best, so packs are
    taken from the heaviest and from the lightest on, until no pair can reach the best swap so far. What is known of a
    pair is kept until one of its packs changes.
    """
    small, small_load, order, nearest = row.small, row.small_load, row.order, row.nearest
    num_packs = len(small_load)
    is_kept = len(nearest) == num_packs
    nearest[:] = NONE
    size = len(small) // num_packs
    everything, shift = total(row.load), 0
    while (everything >> shift) > 1 << 30:
        shift += 1
    for slot in range(len(small)):
        small[slot] = row.value[at(row.item[slot])] >> shift
    for pack in range(num_packs):
        load = np.int64(0)
        for slot in range(at(pack * size), at((pack + 1) * size)):
            load += small[slot]
        small_load[pack] = load
        order[pack] = pack
    for _ in range(10):
        for nth in range(1, num_packs):  # sorts what an exchange has put out of order
            pack, place = order[nth], nth
            while place > 0 and small_load[at(order[at(place - 1)])] < small_load[at(pack)]:
                order[at(place)] = order[at(place - 1)]
                place -= 1
            order[at(place)] = pack
        best, one, other = np.int64(0), NONE, NONE
        for nth in range(num_packs):
            heavy = order[nth]
            for place in range(num_packs - 1, nth, -1):
                light = order[at(place)]
                gap = small_load[at(heavy)] - small_load[at(light)]
                if gap * gap < -4 * best:
                    break
                distance = nearest[at(heavy), at(light)] if is_kept else NONE
                if distance < 0:
                    distance = _distance(small, size, heavy, light, gap)
                if is_kept:
                    nearest[at(heavy), at(light)], nearest[at(light), at(heavy)] = distance, distance
                # A difference d changes the measure by d × (d − gap) = ((2 d − gap)^2 − gap^2) / 4.
                change = (distance - gap) * (distance + gap) // 4 if distance < gap else np.int64(0)
                if change < best or (change == best and change < 0):
                    first, second = _first_with(small, size, heavy, light, gap, distance)
                    if change < best or first < one or (first == one and second < other):
                        best, one, other = change, first, second
        if best == 0:
            return
        _exchange(row, one, other, FREE)
        difference = small[one] - small[other]
        small[one], small[other] = small[other], small[one]
        here, there = one // size, other // size
        small_load[here] -= difference
        small_load[there] += difference
        if is_kept:
            for pack in range(num_packs):
                nearest[here, pack], nearest[pack, here] = NONE, NONE
                nearest[there, pack], nearest[pack, there] = NONE, NONE


@inlined
def _distance(small, size, heavy, light, gap):
    """The smallest |2 d − gap| of any difference d between an item of one pack and one of another."""
    distance = NEVER
    for slot in range(at(heavy * size), at((heavy + 1) * size)):
        rest = 2 * small[slot] - gap
        for place in range(at(light * size), at((light + 1) * size)):
            distance = min(distance, abs(rest - 2 * small[place]))
    return distance


@inlined
def _first_with(small, size, heavy, light, gap, distance):
    """The first two slots of two packs, in the order of slots, that have this `_distance`."""
    one, other = NEVER, NEVER
    for slot in range(heavy * size, (heavy + 1) * size):
        rest = 2 * small[at(slot)] - gap
        for place in range(light * size, (light + 1) * size):
            if abs(rest - 2 * small[at(place)]) == distance:
                first, second = np.int64(min(slot, place)), np.int64(max(slot, place))
                if first < one or (first == one and second < other):
                    one, other = first, second
    return one, other


@compiled
def lower_max(row, rounds, apart):
    """Steps 4 and 7.

    Only an item that is lighter than one of the heaviest pack, by less than the gap to the lightest, can take its
    place; and as the best exchange so far improves, that range narrows.
    """
    load, value, around = row.load, row.value, row.around
    size = len(row.table) // len(load)
    for _ in range(rounds):
        peak, heavy = largest(load)
        low = peak
        for pack in range(len(load)):
            low = min(low, load[pack])
        best, one = peak, NONE
        for slot in range(heavy * size, (heavy + 1) * size):
            first = at(row.item[at(slot)] + 1)
            weight = value[first - at(1)]
            rest = peak - weight
            while low + weight - value[first] < best:
                minimum = NEVER
                for nth in range(first, first + at(CHUNK)):
                    minimum = min(minimum, max(rest + value[nth], around[nth] + (weight - value[nth])))
                if minimum < best:
                    best, one = minimum, np.int64(slot)
                first += at(CHUNK)
        if one < 0:
            return
        other = _other_slot(row, one, peak, low, best)
        if apart and _clash(row, one, other):
            one, other = _best_apart(row, heavy, peak, low)
            if one < 0:
                return
        _exchange(row, one, other, apart)


@inlined
def _other_slot(row, one, peak, low, best):
    """The first slot whose exchange with slot `one` of the heaviest pack leaves `best` in the heavier of the two."""
    other, lighter = len(row.table), at(row.item[at(one)] + 1)
    weight = row.value[lighter - at(1)]
    while low + weight - row.value[lighter] <= best:
        lost = weight - row.value[lighter]
        if max(peak - lost, row.around[lighter] + lost) == best:
            other = min(other, row.slot[lighter])
        lighter += at(1)
    return other


@inlined
def _clash(row, one, other):
    """Whether exchanging two slots brings replicas together."""
    size = len(row.table) // len(row.load)
    one_there = row.holds[at(row.table[at(one)]), at(other // size)]
    return one_there or row.holds[at(row.table[at(other)]), at(one // size)]


@compiled
def _best_apart(row, heavy, peak, low):
    """The exchange for `lower_max` if the best one overall would bring replicas together."""
    value = row.value
    size = len(row.table) // len(row.load)
    best, one, other = peak, NONE, NONE
    for slot in range(heavy * size, (heavy + 1) * size):
        lighter = at(row.item[at(slot)] + 1)
        weight = value[lighter - at(1)]
        while low + weight - value[lighter] <= best:
            lost, place = weight - value[lighter], row.slot[lighter]
            worst = max(peak - lost, row.around[lighter] + lost)
            lighter += at(1)
            if worst > best or (worst == best and (one < slot or other < place)) or _clash(row, slot, place):
                continue
            best, one, other = worst, np.int64(slot), place
    return one, other


@compiled
def swap_pairs(row, rounds, partner, apart):
    """Step 6; returns the number of pair swaps."""
    num_packs, num_slots = len(row.load), len(row.table)
    size = num_slots // num_packs
    if size < 2 or size > 16 or num_packs <= partner + 1:
        return 0
    for num_swaps in range(rounds):
        heavy, light = largest(row.load)[1], _nth_lightest(row.load, partner)
        one, two, pair = _best_pair(row, heavy, light, apart)
        if one < 0:
            return num_swaps
        _exchange(row, one, pair // num_slots, apart)
        _exchange(row, two, pair % num_slots, apart)
    return rounds


@compiled
def _best_pair(row, heavy, light, apart):
    """Two slots of the heavy pack, and two of the light one packed into one integer; -1 if no exchange helps."""
    sums, pairs = row.sums, row.pairs
    num_slots = len(row.table)
    gap = row.load[heavy] - row.load[light]
    number = _movable(row, light, heavy, apart, 0)
    count = 0
    for i in range(number):
        for j in range(i + 1, number):
            sums[at(count)] = row.packed[i] + row.packed[j]
            pairs[at(count)] = row.order[i] * num_slots + row.order[j]
            count += 1
    filled = -(-count // CHUNK) * CHUNK
    for nth in range(count, filled):
        sums[nth] = FAR
    best, first, second, pair = gap, NONE, NONE, NONE
    end = number + _movable(row, heavy, light, apart, number)
    for i in range(number, end):
        for j in range(i + 1, end):
            rest, minimum = gap - row.packed[at(i)] - row.packed[at(j)], NEVER
            for nth in range(filled):
                minimum = min(minimum, abs(rest + sums[nth]))
            if minimum < best:
                best, first, second = minimum, np.int64(i), np.int64(j)
    if first < 0:
        return NONE, NONE, NONE
    rest, pair = gap - row.packed[first] - row.packed[second], np.int64(0)
    while abs(rest + sums[pair]) != best:
        pair += 1
    return row.order[first], row.order[second], pairs[pair]


@inlined
def _movable(row, pack, to, apart, begin):
    """List the slots of a pack that may go to pack `to` in `order`, twice their shares in `packed`; their number."""
    size, place = len(row.table) // len(row.load), begin
    for slot in range(pack * size, (pack + 1) * size):
        if not (apart and row.holds[at(row.table[at(slot)]), at(to)]):
            row.order[at(place)], row.packed[at(place)] = slot, 2 * row.value[at(row.item[at(slot)])]
            place += 1
    return place - begin


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
