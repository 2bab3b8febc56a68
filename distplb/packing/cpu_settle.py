"""Steps 10 and 11 for Numba, on one row, as `settling` has them. Imported by `cpu_kernels` alone.

Tokens are held in 32 bits, which the vector units take twice as many of: the sum over all steps and packs is at most
2^30. Every sum is cast back, because Numba widens what it adds.
Shapes of one row: T steps, E experts, P slots, M packs, G = P / M slots in each.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from distplb.packing.cpu_steps import NONE, compiled, copy

__all__ = ["Seat", "new_seat", "settle_row"]

_ZERO = np.int32(0)
_SCORE_BITS, _CEILING_BITS = np.int64(30), np.int64(16)


class Seat(NamedTuple):
    """The state of the row at work, and room to work in."""

    table: NDArray[np.int64]  # [P]
    best: NDArray[np.int64]  # [P], the cheapest table of step 10
    share: NDArray[np.int32]  # [E, T], a replica's
    load: NDArray[np.int32]  # [M, T]
    top: NDArray[np.int32]  # [3, T], the fullest packs of each step
    who: NDArray[np.int64]  # [3, T], which they are; -1 where there are no more
    limit: NDArray[np.int32]  # [T]
    mean: NDArray[np.int32]  # [T]
    height: NDArray[np.int64]  # [T]
    rest: NDArray[np.int32]  # [M, T], the fullest pack but for the one at work and this one
    above: NDArray[np.int64]  # [M], how much a pack stands out
    tired: NDArray[np.bool_]  # [M], found nothing since the last exchange
    replicas: NDArray[np.int64]  # [E]
    holds: NDArray[np.int64]  # [E, M], slots of an expert in a pack; only where replicas stay apart
    toll: NDArray[np.int64]  # [E, M]; where moving has a price only


@compiled
def new_seat(num_steps, num_experts, num_slots, num_packs, apart, is_priced):
    """Room for a row of these sizes."""
    apart = apart and num_slots > num_experts
    return Seat(
        np.empty(num_slots, np.int64),
        np.empty(num_slots, np.int64),
        np.empty((num_experts, num_steps), np.int32),
        np.empty((num_packs, num_steps), np.int32),
        np.empty((3, num_steps), np.int32),
        np.empty((3, num_steps), np.int64),
        np.empty(num_steps, np.int32),
        np.empty(num_steps, np.int32),
        np.empty(num_steps, np.int64),
        np.empty((num_packs, num_steps), np.int32),
        np.empty(num_packs, np.int64),
        np.empty(num_packs, np.bool_),
        np.empty(num_experts, np.int64),
        np.zeros((num_experts if apart else 1, num_packs), np.int64),
        np.zeros((num_experts if is_priced else 1, num_packs), np.int64),
    )


@compiled
def settle_row(seat, load, distance, price, region, ceiling):
    """Steps 10 and 11 on `seat.table`; `load [T, E]`, `distance [E, M]`, or [1, 1] where moving is free."""
    is_priced = len(distance) == load.shape[1]
    if is_priced:
        for expert in range(len(distance)):
            for pack in range(distance.shape[1]):
                seat.toll[expert, pack] = price[distance[expert, pack]]
    _share_out(seat, load)
    _gather(seat, seat.table)
    _under_ceilings(seat, region, is_priced, ceiling)
    _gather(seat, seat.table)
    _descend(seat, region, is_priced)


@compiled
def _share_out(seat, load):
    """What a replica of each expert weighs in each step."""
    seat.replicas[:] = 0
    for expert in seat.table:
        seat.replicas[expert] += 1
    for expert in range(len(seat.replicas)):
        count = max(1, seat.replicas[expert])
        for step in range(len(load)):
            seat.share[expert, step] = load[step, expert] if count == 1 else load[step, expert] // count


@compiled
def _gather(seat, table):
    """The load of each pack, and what it holds."""
    size, apart = len(table) // len(seat.load), len(seat.holds) == len(seat.share)
    seat.load[:] = 0
    seat.holds[:] = 0
    for slot in range(len(table)):
        pack = slot // size
        if apart:
            seat.holds[table[slot], pack] += 1
        for step in range(seat.load.shape[1]):
            seat.load[pack, step] = np.int32(seat.load[pack, step] + seat.share[table[slot], step])


@compiled
def _paid(seat, is_priced):
    """The tolls of all slots."""
    paid = np.int64(0)
    if is_priced:
        size = len(seat.table) // len(seat.load)
        for slot in range(len(seat.table)):
            paid += seat.toll[seat.table[slot], slot // size]
    return paid


@compiled
def _fullest(load, into):
    """`[T]`: of each step; their sum."""
    copy(load[0], into)
    for pack in range(1, len(load)):
        for step in range(len(into)):
            into[step] = max(into[step], load[pack, step])
    total = np.int64(0)
    for step in range(len(into)):
        total += into[step]
    return total


@compiled
def _rank_packs(seat):
    """The three fullest packs of each step, the first of equals first."""
    load, top, who = seat.load, seat.top, seat.who
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
        who[0, step], who[1, step], who[2, step] = first, second, third


@compiled
def _may(seat, region, one, other):
    """Whether two slots of different packs may exchange their experts."""
    if region[one] != region[other]:
        return False
    if len(seat.holds) != len(seat.share):
        return seat.table[one] != seat.table[other]
    size = len(seat.table) // len(seat.load)
    here, there = seat.table[one], seat.table[other]
    return seat.holds[here, other // size] == 0 and seat.holds[there, one // size] == 0


@compiled
def _added_toll(seat, one, other):
    """By an exchange of two slots."""
    size = len(seat.table) // len(seat.load)
    here, there, pack, partner = seat.table[one], seat.table[other], one // size, other // size
    toll = seat.toll
    return toll[here, partner] + toll[there, pack] - toll[here, pack] - toll[there, partner]


@compiled
def _exchange(seat, one, other):
    """Two slots of different packs exchange their experts."""
    size = len(seat.table) // len(seat.load)
    here, there, pack, partner = seat.table[one], seat.table[other], one // size, other // size
    for step in range(seat.load.shape[1]):
        lost = np.int32(seat.share[here, step] - seat.share[there, step])
        seat.load[pack, step] = np.int32(seat.load[pack, step] - lost)
        seat.load[partner, step] = np.int32(seat.load[partner, step] + lost)
    seat.table[one], seat.table[other] = there, here
    if len(seat.holds) == len(seat.share):
        seat.holds[here, pack] -= 1
        seat.holds[there, partner] -= 1
        seat.holds[here, partner] += 1
        seat.holds[there, pack] += 1
    seat.tired[pack] = False
    seat.tired[partner] = False


@compiled
def _most(seat):
    """The first pack that stands out most and is not tired; -1 where there is none."""
    found, most = -1, np.int64(0)
    for pack in range(len(seat.above)):
        if seat.above[pack] > most and not seat.tired[pack]:
            found, most = pack, seat.above[pack]
    return found


# --- step 10 ----------------------------------------------------------------------------------------------------


@compiled
def _under_ceilings(seat, region, is_priced, ceiling):
    """Step 10; leaves the cheapest table that it met."""
    load, num_packs = seat.load, len(seat.load)
    least = _fullest(load, seat.limit) + _paid(seat, is_priced)
    copy(seat.table, seat.best)
    for step in range(load.shape[1]):
        total = np.int64(0)
        for pack in range(num_packs):
            total += load[pack, step]
        seat.mean[step] = total // num_packs
        seat.height[step] = seat.limit[step] - seat.mean[step]
    for turn in range(2):
        part = ceiling >> (2 * turn)
        for step in range(load.shape[1]):
            seat.limit[step] = seat.mean[step] + ((seat.height[step] * part) >> _CEILING_BITS)
        seat.tired[:] = False
        for _ in range(64 + 16 * num_packs):
            for pack in range(num_packs):
                seat.above[pack] = _over(load, pack, seat.limit)
            here = _most(seat)
            if here < 0:
                break
            one, other = _best_for_its_toll(seat, region, is_priced, here)
            if one < 0:
                seat.tired[here] = True
                continue
            _exchange(seat, one, other)
            cost = _fullest(load, seat.top[0]) + _paid(seat, is_priced)
            if cost < least:
                least = cost
                copy(seat.table, seat.best)
    copy(seat.best, seat.table)


@compiled
def _over(load, pack, limit):
    """A pack's tokens above the limits, over all steps."""
    total = _ZERO
    for step in range(len(limit)):
        total = np.int32(total + max(np.int32(load[pack, step] - limit[step]), _ZERO))
    return total


@compiled
def _best_for_its_toll(seat, region, is_priced, here):
    """The exchange of pack `here` that takes away most above the limits for its toll: two slots, or -1."""
    table, share, load, limit, room = seat.table, seat.share, seat.load, seat.limit, seat.top[0]
    size, num_steps = len(table) // len(load), len(limit)
    best, one, other = np.int64(0), NONE, NONE
    for slot in range(here * size, (here + 1) * size):
        own = table[slot]
        for step in range(num_steps):
            room[step] = np.int32(np.int32(load[here, step] - limit[step]) - share[own, step])
        for place in range(len(table)):
            pack = place // size
            # No exchange takes away more than what both stand out by.
            most = seat.above[here] + seat.above[pack]
            if pack == here or (most << _SCORE_BITS) <= best:
                continue
            coming, left = table[place], _ZERO
            for step in range(num_steps):
                inside = np.int32(room[step] + share[coming, step])
                lost = np.int32(share[own, step] - share[coming, step])
                outside = np.int32(np.int32(load[pack, step] - limit[step]) + lost)
                left = np.int32(left + np.int32(max(inside, _ZERO) + max(outside, _ZERO)))
            gain = most - left
            if gain <= 0 or (gain << _SCORE_BITS) <= best or not _may(seat, region, slot, place):
                continue
            paid = max(np.int64(0), _added_toll(seat, slot, place)) if is_priced else np.int64(0)
            score = (gain << _SCORE_BITS) // (1 + paid)
            if score > best:
                best, one, other = score, np.int64(slot), np.int64(place)
    return one, other


# --- step 11 ----------------------------------------------------------------------------------------------------


@compiled
def _descend(seat, region, is_priced):
    """Step 11."""
    load, top, who = seat.load, seat.top, seat.who
    num_packs, num_steps = len(load), load.shape[1]
    if num_packs == 1:
        return
    seat.tired[:] = False
    for _ in range(64 + 16 * num_packs):
        _rank_packs(seat)
        cost = np.int64(0)
        seat.above[:] = 0
        for step in range(num_steps):
            cost += top[0, step]
            seat.above[who[0, step]] += top[0, step] - top[1, step]
        here = _most(seat)
        if here < 0:
            break
        one, other = _cheapest(seat, region, is_priced, here, cost)
        if one < 0:
            seat.tired[here] = True
            continue
        _exchange(seat, one, other)
        seat.tired[:] = False


@compiled
def _cheapest(seat, region, is_priced, here, cost):
    """The exchange of pack `here` that lowers the cost most: two slots, or -1."""
    table, share, load, rest = seat.table, seat.share, seat.load, seat.rest
    size, num_steps = len(table) // len(load), load.shape[1]
    for step in range(num_steps):
        for pack in range(len(load)):
            nth = 0
            while seat.who[nth, step] == here or seat.who[nth, step] == pack:
                nth += 1
                if nth == 2:
                    break
            rest[pack, step] = seat.top[nth, step]
    best, one, other, room = cost, NONE, NONE, seat.limit
    for slot in range(here * size, (here + 1) * size):
        own = table[slot]
        for step in range(num_steps):
            room[step] = np.int32(load[here, step] - share[own, step])
        for place in range(len(table)):
            pack = place // size
            if pack == here:
                continue
            coming, fullest = table[place], _ZERO
            for step in range(num_steps):
                inside = np.int32(room[step] + share[coming, step])
                outside = np.int32(load[pack, step] + np.int32(share[own, step] - share[coming, step]))
                fullest = np.int32(fullest + max(max(inside, outside), rest[pack, step]))
            after = np.int64(fullest)
            if is_priced:
                after += _added_toll(seat, slot, place)
            if after < best and _may(seat, region, slot, place):
                best, one, other = after, np.int64(slot), np.int64(place)
    return one, other
