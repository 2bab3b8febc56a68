"""Steps 10 and 11 in Numba, on one row, as in `settle`. Only `cpu_kernels` imports this.

Tokens are int32, so that vector units process twice as many at once; their sum over all steps and packs is at most
2^30. Every sum is cast back, because Numba widens the operands.
All exchanges of one slot of a pack are evaluated together, two steps of the load at a time.
Shapes of one row: T steps, E experts, P slots, M packs, G = P / M slots in each.
"""

from __future__ import annotations

import numpy as np

from distplb.packing.cpu_row import NONE, compiled, copy, inlined

__all__ = ["settle_row"]

_ZERO, _MOST = np.int32(0), np.int32(2**31 - 1)
_SCORE_BITS, _CEILING_BITS = np.int64(30), np.int64(16)


@compiled
def settle_row(state, load, distance, price, region, ceiling):
    """Steps 10 and 11 on `state.table`; `load [T, E]`; `distance [E, M]`, or `[1, 1]` if moving is free."""
    is_priced = len(distance) == load.shape[1]
    if is_priced:
        for expert in range(len(distance)):
            for pack in range(distance.shape[1]):
                state.toll[expert, pack] = price[distance[expert, pack]]
    _share_out(state, load)
    _gather(state, state.table)
    _under_ceilings(state, region, is_priced, ceiling)
    _gather(state, state.table)
    _descend(state, region, is_priced)


@compiled
def _share_out(state, load):
    """Compute the share of one replica of each expert in each step."""
    state.replicas[:] = 0
    for expert in state.table:
        state.replicas[expert] += 1
    for expert in range(len(state.replicas)):
        count = max(1, state.replicas[expert])
        for step in range(len(load)):
            state.share[expert, step] = load[step, expert] if count == 1 else load[step, expert] // count


@compiled
def _gather(state, table):
    """Compute the load of each pack, and which experts it holds."""
    size, apart = len(table) // len(state.load), len(state.holds) == len(state.share)
    state.load[:] = 0
    state.holds[:] = 0
    for slot in range(len(table)):
        pack = slot // size
        if apart:
            state.holds[table[slot], pack] += 1
        for step in range(state.load.shape[1]):
            state.own[step, slot] = state.share[table[slot], step]
            state.load[pack, step] = np.int32(state.load[pack, step] + state.own[step, slot])
    for pack in range(len(state.load)):
        _renew_others(state, pack)


@inlined
def _renew_others(state, pack):
    """Compute `others` of a pack's slots."""
    size = len(state.table) // len(state.load)
    for step in range(state.load.shape[1]):
        load = state.load[pack, step]
        for slot in range(pack * size, (pack + 1) * size):
            state.others[step, slot] = np.int32(load - state.own[step, slot])


@compiled
def _paid(state, is_priced):
    """Sum of the tolls of all slots."""
    paid = np.int64(0)
    if is_priced:
        size = len(state.table) // len(state.load)
        for slot in range(len(state.table)):
            paid += state.toll[state.table[slot], slot // size]
    return paid


@compiled
def _busiest(load, into):
    """Write the load of each step's heaviest pack to `into [T]`; returns their sum."""
    copy(load[0], into)
    for pack in range(1, len(load)):
        for step in range(len(into)):
            into[step] = max(into[step], load[pack, step])
    total = np.int64(0)
    for step in range(len(into)):
        total += into[step]
    return total


@compiled
def _rank_packs(state):
    """Find the three heaviest packs of each step; of equal packs, the first comes first."""
    load, top, top_pack = state.load, state.top, state.top_pack
    for step in range(load.shape[1]):
        one, two, three = np.int32(-1), np.int32(-1), np.int32(-1)
        first, second, third = NONE, NONE, NONE
        for pack in range(len(load)):
            value = load[pack, step]
            if value > one:
                three, third, two, second, one, first = two, second, one, first, value, np.int64(pack)
            elif value > two:
                three, third, two, second = two, second, value, np.int64(pack)
            elif value > three:
                three, third = value, np.int64(pack)
        top[0, step], top[1, step], top[2, step] = one, max(two, _ZERO), max(three, _ZERO)
        top_pack[0, step], top_pack[1, step], top_pack[2, step] = first, second, third


@compiled
def _is_allowed(state, region, one, other):
    """Whether two slots of different packs may exchange their experts."""
    if region[one] != region[other]:
        return False
    if len(state.holds) != len(state.share):
        return state.table[one] != state.table[other]
    size = len(state.table) // len(state.load)
    here, there = state.table[one], state.table[other]
    return state.holds[here, other // size] == 0 and state.holds[there, one // size] == 0


@inlined
def _find_added(state, here):
    """Compute `added` for pack `here`."""
    size, toll = len(state.table) // len(state.load), state.toll
    for pack in range(len(state.load)):
        for slot in range(pack * size, (pack + 1) * size):
            expert = state.table[slot]
            state.added[slot] = toll[expert, here] - toll[expert, pack]


@inlined
def _added_toll(state, leaves, here, place, size):
    """Toll that is added if an expert leaves pack `here` for a slot whose expert comes; after `_find_added`."""
    return state.toll[leaves, place // size] - state.toll[leaves, here] + state.added[place]


@compiled
def _exchange(state, one, other):
    """Exchange the experts of two slots of different packs."""
    size = len(state.table) // len(state.load)
    here, there, pack, partner = state.table[one], state.table[other], one // size, other // size
    for step in range(state.load.shape[1]):
        lost = np.int32(state.share[here, step] - state.share[there, step])
        state.load[pack, step] = np.int32(state.load[pack, step] - lost)
        state.load[partner, step] = np.int32(state.load[partner, step] + lost)
        state.own[step, one], state.own[step, other] = state.own[step, other], state.own[step, one]
    _renew_others(state, pack)
    _renew_others(state, partner)
    state.table[one], state.table[other] = there, here
    if len(state.holds) == len(state.share):
        state.holds[here, pack] -= 1
        state.holds[there, partner] -= 1
        state.holds[here, partner] += 1
        state.holds[there, pack] += 1
    state.tired[pack] = False
    state.tired[partner] = False


@compiled
def _next_pack(state):
    """The pack with the largest `above` that is not tired, the first of equals; -1 if there is none."""
    furthest, most = -1, np.int64(0)
    for pack in range(len(state.above)):
        if state.above[pack] > most and not state.tired[pack]:
            furthest, most = pack, state.above[pack]
    return furthest


# --- step 10 ----------------------------------------------------------------------------------------------------


@compiled
def _under_ceilings(state, region, is_priced, ceiling):
    """Step 10; ends with the cheapest table that it has met."""
    load, num_packs = state.load, len(state.load)
    lowest_cost = _busiest(load, state.limit) + _paid(state, is_priced)
    copy(state.table, state.best)
    for step in range(load.shape[1]):
        total = np.int64(0)
        for pack in range(num_packs):
            total += load[pack, step]
        state.mean[step] = total // num_packs
        state.height[step] = state.limit[step] - state.mean[step]
    for turn in range(2):
        part = ceiling >> (2 * turn)
        for step in range(load.shape[1]):
            state.limit[step] = state.mean[step] + ((state.height[step] * part) >> _CEILING_BITS)
        state.tired[:] = False
        for _ in range(64 + 16 * num_packs):
            for pack in range(num_packs):
                state.above[pack] = _over(load, pack, state.limit)
            here = _next_pack(state)
            if here < 0:
                break
            one, other = _best_for_its_toll(state, region, is_priced, here)
            if one < 0:
                state.tired[here] = True
                continue
            _exchange(state, one, other)
            cost = _busiest(load, state.top[0]) + _paid(state, is_priced)
            if cost < lowest_cost:
                lowest_cost = cost
                copy(state.table, state.best)
    copy(state.best, state.table)


@compiled
def _over(load, pack, limit):
    """A pack's tokens above the limits, over all steps."""
    total = _ZERO
    for step in range(len(limit)):
        total = np.int32(total + max(np.int32(load[pack, step] - limit[step]), _ZERO))
    return total


@compiled
def _best_for_its_toll(state, region, is_priced, here):
    """The exchange of pack `here` that removes most tokens above the limits for its toll: two slots, or -1."""
    after, most = state.after, state.most
    size = len(state.table) // len(state.load)
    # An exchange removes at most what both packs have above the limits.
    for place in range(len(state.table)):
        most[place] = np.int32(state.above[here] + state.above[place // size]) if place // size != here else _ZERO
    if is_priced:
        _find_added(state, here)
    best, one, other = np.int64(0), NONE, NONE
    for slot in range(here * size, (here + 1) * size):
        _take_out(state, here, slot, state.limit)
        _sum_above(state)
        largest_gain = _ZERO
        for place in range(len(after)):
            largest_gain = max(largest_gain, np.int32(most[place] - after[place]))
        if (np.int64(largest_gain) << _SCORE_BITS) <= best:
            continue
        leaves = state.table[slot]
        for place in range(len(state.table)):
            gain = np.int64(most[place] - after[place])
            if gain <= 0 or (gain << _SCORE_BITS) <= best:
                continue
            score = gain << _SCORE_BITS
            if is_priced:
                score //= 1 + max(np.int64(0), _added_toll(state, leaves, here, place, size))
            if score > best and _is_allowed(state, region, slot, place):
                best, one, other = score, np.int64(slot), np.int64(place)
    return one, other


@inlined
def _take_out(state, here, slot, floor):
    """Set `inward` and `outward` for a slot of pack `here`, whose expert leaves; loads count from `floor [T]`."""
    expert = state.table[slot]
    for step in range(state.load.shape[1]):
        leaving = np.int32(state.share[expert, step] - floor[step])
        state.outward[step] = leaving
        state.inward[step] = np.int32(state.load[here, step] - state.share[expert, step] - floor[step])


@inlined
def _sum_above(state):
    """Compute `after`: tokens above the limits in both packs after an exchange with each slot."""
    after = state.after
    after[:] = 0
    for step in range(0, len(state.own), 2):
        here, there, own, others = state.inward[step], state.outward[step], state.own[step], state.others[step]
        later_here, later_there = state.inward[step + 1], state.outward[step + 1]
        later_own, later_others = state.own[step + 1], state.others[step + 1]
        for place in range(len(after)):
            one = np.int32(max(np.int32(own[place] + here), _ZERO) + max(np.int32(others[place] + there), _ZERO))
            inside = max(np.int32(later_own[place] + later_here), _ZERO)
            outside = max(np.int32(later_others[place] + later_there), _ZERO)
            after[place] = np.int32(np.int32(after[place] + one) + np.int32(inside + outside))


# --- step 11 ----------------------------------------------------------------------------------------------------


@compiled
def _descend(state, region, is_priced):
    """Step 11."""
    load, top, top_pack = state.load, state.top, state.top_pack
    num_packs, num_steps = len(load), load.shape[1]
    if num_packs == 1:
        return
    state.tired[:] = False
    for _ in range(64 + 16 * num_packs):
        _rank_packs(state)
        cost = np.int64(0)
        state.above[:] = 0
        for step in range(num_steps):
            cost += top[0, step]
            state.above[top_pack[0, step]] += top[0, step] - top[1, step]
        here = _next_pack(state)
        if here < 0:
            break
        one, other = _cheapest(state, region, is_priced, here, cost)
        if one < 0:
            state.tired[here] = True
            continue
        _exchange(state, one, other)
        state.tired[:] = False


@compiled
def _cheapest(state, region, is_priced, here, cost):
    """The exchange of pack `here` that lowers the cost most: two slots, or -1."""
    after = state.after
    size = len(state.table) // len(state.load)
    _find_rest(state, here)
    lowest_added = np.int64(0)
    if is_priced:
        _find_added(state, here)
        for place in range(len(state.table)):
            lowest_added = min(lowest_added, state.added[place])
    best, one, other = cost, NONE, NONE
    for slot in range(here * size, (here + 1) * size):
        _take_out(state, here, slot, state.nothing)
        _sum_busiest(state)
        for place in range(here * size, (here + 1) * size):
            after[place] = _MOST
        least = _MOST
        for place in range(len(state.table)):
            least = min(least, after[place])
        leaves = state.table[slot]
        if least + (lowest_added - state.toll[leaves, here] if is_priced else np.int64(0)) >= best:
            continue
        for place in range(len(state.table)):
            total = np.int64(after[place])
            if is_priced and after[place] < _MOST:
                total += _added_toll(state, leaves, here, place, size)
            if total < best and _is_allowed(state, region, slot, place):
                best, one, other = total, np.int64(slot), np.int64(place)
    return one, other


@inlined
def _find_rest(state, here):
    """Compute `rest` for pack `here`."""
    size = len(state.table) // len(state.load)
    for step in range(len(state.limit)):
        rest = state.rest[step]
        nth = 1 if state.top_pack[0, step] == here else 0
        heaviest, next_heaviest = state.top[nth, step], state.top[nth + 1, step]
        if state.top_pack[nth + 1, step] == here:
            next_heaviest = state.top[2, step]
        for place in range(len(rest)):
            rest[place] = heaviest
        pack = state.top_pack[nth, step]
        for place in range(pack * size, (pack + 1) * size):
            rest[place] = next_heaviest


@inlined
def _sum_busiest(state):
    """Compute `after`: loads of the heaviest packs after an exchange with each slot."""
    after = state.after
    after[:] = 0
    for step in range(0, len(state.own), 2):
        here, there, own, others = state.inward[step], state.outward[step], state.own[step], state.others[step]
        later_here, later_there = state.inward[step + 1], state.outward[step + 1]
        later_own, later_others = state.own[step + 1], state.others[step + 1]
        rest, later_rest = state.rest[step], state.rest[step + 1]
        for place in range(len(after)):
            one = max(max(np.int32(own[place] + here), np.int32(others[place] + there)), rest[place])
            inside, outside = np.int32(later_own[place] + later_here), np.int32(later_others[place] + later_there)
            another = max(max(inside, outside), later_rest[place])
            after[place] = np.int32(np.int32(after[place] + one) + another)
