"""The engine `cpu`: the steps of `reference` for Numba. Only `cpu` imports this.

Shapes: E experts, M GPUs, N nodes, R replica slots on each GPU; K points of a time curve, B intervals of levels.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

from distplb.splitting.rules import LONGEST as _LONGEST
from distplb.splitting.rules import MOST_TOKENS as _MOST_TOKENS
from distplb.splitting.rules import NEVER as _NEVER
from distplb.splitting.rules import Array

__all__ = ["fill", "is_legal", "place"]

compiled = njit(cache=True, nogil=True, error_model="numpy")
inlined = njit(cache=True, nogil=True, error_model="numpy", inline="always")
_SHARES, _STEPS, _LEVELS, _NONE = np.int64(4), np.int64(64), 64, np.int64(-1)


class _Step(NamedTuple):
    """What is known before a level is tried."""

    tokens: Array  # [E]
    node: Array  # [M]
    load: Array  # [M], times
    start: Array  # [M + 1], where each GPU's experts begin in `owned`
    owned: Array  # [E], the experts by home


class _Attempt(NamedTuple):
    """One attempt at one level: the room, tokens and slots that are left."""

    room: Array  # [M], time; a surplus is below 0
    fits: Array  # [M], tokens of a replica that fit into the room
    left: Array  # [E], tokens at home
    used: Array  # [M], replica slots
    sends: Array  # [M]
    paid: Array  # [2, M], prices of the replicas that each GPU sends, and receives
    replica: Array  # [M, R]
    part: Array  # [M, R]


@compiled
def place(tokens, home, node, rules, curve, replica, part):
    """Fill `replica [M, R]` (-1: empty) and `part [M, R]`, the tokens of each replica; step (10) around `_at`."""
    num_gpus = len(node)
    load = np.zeros(num_gpus, np.int64)
    for expert in range(len(home)):
        load[home[expert]] += _time(tokens[expert], rules.tile, curve)
    low, cost = np.int64(rules.level), load.max()
    replica[:] = -1
    part[:] = 0
    if cost <= low or rules.inside == _NEVER:
        return
    start, owned = _experts_by_gpu(home, num_gpus)
    step = _Step(tokens, node, load, start, owned)
    intervals = np.empty((_LEVELS + 1, 3), np.int64)  # [B, 3]: lower end, upper end, price of the upper end's replicas
    intervals[0, 0], intervals[0, 1], intervals[0, 2] = low, cost, 0
    count, shortest = 1, max(np.int64(1), rules.inside // _STEPS)
    for level in (low, _level_of_nodes(node, load)):
        if level == low or (level > low and rules.between != _NEVER):  # without replicas between nodes, it is `low`
            found, attempt = _at(step, level, rules, curve)
            if found >= 0 and level + found < cost:
                cost = level + found
                replica[:], part[:] = attempt.replica, attempt.part
    for _ in range(_LEVELS):
        best, least = -1, cost
        for one in range(count):
            bound = intervals[one, 0] + intervals[one, 2]
            if intervals[one, 1] - intervals[one, 0] <= shortest or bound > least or bound >= cost:
                continue
            if bound < least or intervals[one, 0] < intervals[best, 0]:
                best, least = one, bound
        if best < 0:
            return
        low, high, price = intervals[best]
        count -= 1
        intervals[best] = intervals[count]
        middle = (low + high) // 2
        found, attempt = _at(step, middle, rules, curve)
        intervals[count, 0], intervals[count, 1], intervals[count, 2] = middle, high, price
        count += 1
        if found >= 0:
            intervals[count, 0], intervals[count, 1], intervals[count, 2] = low, middle, found
            count += 1
            if middle + found < cost:
                cost = middle + found
                replica[:], part[:] = attempt.replica, attempt.part


@compiled
def _level_of_nodes(node, load):
    """ceil(mean) of the busiest node."""
    total, gpus = np.zeros(node[-1] + 1, np.int64), np.zeros(node[-1] + 1, np.int64)
    for gpu in range(len(node)):
        total[node[gpu]] += load[gpu]
        gpus[node[gpu]] += 1
    return (-(-total // gpus)).max()


@compiled
def _experts_by_gpu(home, num_gpus):
    """Where each GPU's experts begin, and the expert ids by home, then by id."""
    start = np.zeros(num_gpus + 1, np.int64)
    for expert in range(len(home)):
        start[home[expert] + 1] += 1
    for gpu in range(num_gpus):
        start[gpu + 1] += start[gpu]
    owned, filled = np.empty(len(home), np.int64), start.copy()
    for expert in range(len(home)):
        owned[filled[home[expert]]] = expert
        filled[home[expert]] += 1
    return start, owned


@compiled
def _at(step, level, rules, curve):
    """Steps (1) to (9): the price of the replicas with which no GPU exceeds the level, and these; -1 if none."""
    slots = np.int64(rules.slots)
    best, other = _begun(step, level, rules, curve), _begun(step, level, rules, curve)
    is_placed = _place(step, best, rules, curve)
    if _pass_on(step, other, rules, curve, np.int64(0)):
        this = _price(other), other.used.sum(), other.sends.max()
        if not is_placed or this < (_price(best), best.used.sum(), best.sends.max()):
            best = other
        is_placed = True
    relays = np.int64(1)
    while not is_placed:
        best = _begun(step, level, rules, curve)
        is_placed = _pass_on(step, best, rules, curve, relays)
        if relays == slots and not is_placed:
            return _NONE, best
        relays = slots
    price, most = _price(best), np.int64(1)
    while most * rules.inside < price and rules.inside:
        other = _begun(step, level, rules, curve)
        if _spread(step, other, rules, curve, most):
            if _price(other) < price:
                return _price(other), other
            return price, best
        most += 1
    return price, best


@inlined
def _begun(step, level, rules, curve):
    """An attempt without replicas."""
    num_gpus = len(step.node)
    room = level - step.load
    fits = np.empty_like(room)
    for gpu in range(num_gpus):
        fits[gpu] = _fits(room[gpu], rules.tile, curve)
    return _Attempt(
        room,
        fits,
        step.tokens.copy(),
        np.zeros(num_gpus, np.int64),
        np.zeros(num_gpus, np.int64),
        np.zeros((2, num_gpus), np.int64),
        np.full((num_gpus, np.int64(rules.slots)), -1, np.int64),
        np.zeros((num_gpus, np.int64(rules.slots)), np.int64),
    )


@compiled
def _price(attempt):
    """The prices of the replicas that one GPU sends, or receives, whichever GPU pays most."""
    return attempt.paid.max()


@compiled
def _place(step, attempt, rules, curve):
    """Steps (1) to (6): whether every surplus is placed."""
    if not _leave_nodes(step, attempt, rules, curve):
        return False
    node, start, owned, least = step.node, step.start, step.owned, rules.least
    room, fits, left, used = attempt.room, attempt.fits, attempt.left, attempt.used
    sends, paid, replica, part = attempt.sends, attempt.paid, attempt.replica, attempt.part
    slots = rules.slots
    num_gpus, num_nodes = len(node), node[-1] + 1
    spare, waiting = np.zeros(num_nodes, np.int64), np.zeros(num_nodes, np.int64)
    givers, count = np.empty(num_gpus, np.int64), np.int64(0)
    for gpu in range(num_gpus):
        spare[node[gpu]] += room[gpu]
        if room[gpu] < 0:
            waiting[node[gpu]] += 1
            place_in = count
            while place_in > 0 and room[givers[place_in - 1]] < room[gpu]:  # largest room (smallest surplus) first
                givers[place_in] = givers[place_in - 1]
                place_in -= 1
            givers[place_in] = gpu
            count += 1
    order, takers = np.arange(num_gpus), np.empty(num_gpus, np.int64)  # `order`: GPUs, the most room first
    for gpu in range(1, num_gpus):
        _settle(order, room, gpu, gpu + 1)
    for index in range(count):
        giver = givers[index]
        here = node[giver]
        little = _within(_SHARES * max(0, spare[here]) // waiting[here], curve)
        while room[giver] < 0:
            expert = owned[start[giver]]
            for nth in range(start[giver], start[giver + 1]):
                if left[owned[nth]] > left[expert]:
                    expert = owned[nth]
            need = min(_needed(left[expert], -room[giver], rules, curve), _down(left[expert], rules.tile))
            num_takers = 0
            for nth in range(num_gpus):
                gpu = order[nth]
                if fits[gpu] < least:
                    break
                if node[gpu] == here and used[gpu] < slots and not _holds(replica, used, gpu, expert):
                    takers[num_takers] = gpu
                    num_takers += 1
            if num_takers == 0 or need < least:
                return False
            for gpu in _chosen(fits, takers[:num_takers], need, little):
                if gpu < 0:
                    continue
                amount = max(least, min(need, fits[gpu]))
                if amount > left[expert]:
                    return False
                _give(
                    node, room, fits, left, used, sends, paid, replica, part, rules, curve, expert, giver, gpu, amount
                )
                need -= amount
                for moved in (gpu, giver):
                    at = 0
                    while order[at] != moved:
                        at += 1
                    _settle(order, room, at, num_gpus)
        waiting[here] -= 1
    return True


@compiled
def _settle(order, room, at, end):
    """Move the GPU in `order[at]` to its place among the first `end`: by descending room, then by number."""
    gpu = order[at]
    while at > 0 and (room[order[at - 1]] < room[gpu] or (room[order[at - 1]] == room[gpu] and order[at - 1] > gpu)):
        order[at] = order[at - 1]
        at -= 1
    while at + 1 < end and (
        room[order[at + 1]] > room[gpu] or (room[order[at + 1]] == room[gpu] and order[at + 1] < gpu)
    ):
        order[at] = order[at + 1]
        at += 1
    order[at] = gpu


@compiled
def _pass_on(step, attempt, rules, curve, relays):
    """Steps (1) and (7), or (8) with relays: whether every surplus is placed."""
    if not _leave_nodes(step, attempt, rules, curve):
        return False
    node, start, owned = step.node, step.start, step.owned
    room, fits, left, used = attempt.room, attempt.fits, attempt.left, attempt.used
    sends, paid, replica, part = attempt.sends, attempt.paid, attempt.replica, attempt.part
    while True:
        giver = 0
        for gpu in range(len(room)):
            if room[gpu] < room[giver]:
                giver = gpu
        if room[giver] >= 0:
            return True
        expert, taker = _roomiest(node, start, owned, room, fits, left, used, replica, rules, giver, rules.slots)
        if taker < 0:
            return False
        before = left[expert]
        amount = min(_down(before, rules.tile), fits[taker])
        if rules.slots - used[taker] > relays:
            amount = min(amount, _needed(before, -room[giver], rules, curve))
        _give(node, room, fits, left, used, sends, paid, replica, part, rules, curve, expert, giver, taker, amount)


@compiled
def _spread(step, attempt, rules, curve, most):
    """Steps (1) and (9): whether every surplus is placed, with at most so many replicas of each GPU."""
    if not _leave_nodes(step, attempt, rules, curve):
        return False
    node, start, owned = step.node, step.start, step.owned
    room, fits, left, used = attempt.room, attempt.fits, attempt.left, attempt.used
    sends, paid, replica, part = attempt.sends, attempt.paid, attempt.replica, attempt.part
    while True:
        giver, longest = _NONE, _NONE
        for gpu in range(len(room)):
            if room[gpu] < 0:
                if sends[gpu] >= most:
                    return False
                each = -room[gpu] // (most - sends[gpu])
                if each > longest:
                    giver, longest = np.int64(gpu), each
        if giver < 0:
            return True
        expert, taker = _roomiest(node, start, owned, room, fits, left, used, replica, rules, giver, most)
        if taker < 0:
            return False
        before, may_send = left[expert], most - sends[giver]
        need = _needed(before, -room[giver], rules, curve)
        amount = max(fits[taker], _needed(before, -(room[giver] // may_send), rules, curve))
        if may_send == 1 or need > before + _hottest(step, attempt, giver, expert, may_send - 2):
            amount = max(amount, _up(need - _hottest(step, attempt, giver, expert, may_send - 1), rules.tile))
        amount = min(amount, _down(before, rules.tile), need)
        _give(node, room, fits, left, used, sends, paid, replica, part, rules, curve, expert, giver, taker, amount)


@inlined
def _roomiest(node, start, owned, room, fits, left, used, replica, rules, giver, most):
    """The hottest expert of a GPU that fits anywhere in its node, and the GPU there with the most room; -1 if none.

    Only GPUs with fewer than `most` replicas.
    """
    here, least, most = node[giver], rules.least, min(most, rules.slots)
    expert, taker = _next_expert(start, owned, left, giver, _NONE), _NONE
    while expert >= 0 and _down(left[expert], rules.tile) >= least:
        top = _NONE
        for gpu in range(len(room)):
            if room[gpu] <= top or node[gpu] != here or used[gpu] >= most or fits[gpu] < least:
                continue
            if not _holds(replica, used, gpu, expert):
                taker, top = np.int64(gpu), room[gpu]
        if taker >= 0:
            break
        expert = _next_expert(start, owned, left, giver, expert)
    return expert, taker


@inlined
def _next_expert(start, owned, left, giver, last):
    """The expert of a GPU that comes after `last` by descending tokens at home, then by number; -1 for none."""
    found = _NONE
    for nth in range(start[giver], start[giver + 1]):
        one = owned[nth]
        comes_after = last < 0 or left[one] < left[last] or (left[one] == left[last] and one > last)
        if comes_after and (found < 0 or left[one] > left[found]):
            found = one
    return found


@compiled
def _hottest(step, attempt, giver, without, number):
    """The tokens at home of the hottest experts of a GPU, as many as `number`, without one."""
    total, last = np.int64(0), _NONE
    while number > 0:
        last = _next_expert(step.start, step.owned, attempt.left, giver, last)
        if last < 0:
            break
        if last != without:
            total += attempt.left[last]
            number -= 1
    return total


@compiled
def _leave_nodes(step, attempt, rules, curve):
    """Step (1): whether no node is above the level."""
    node, room, fits, left, used = step.node, attempt.room, attempt.fits, attempt.left, attempt.used
    sends, paid, replica, part = attempt.sends, attempt.paid, attempt.replica, attempt.part
    rooms = np.zeros(node[-1] + 1, np.int64)
    for gpu in range(len(node)):
        rooms[node[gpu]] += room[gpu]
    while rooms.min() < 0:
        if rules.between == _NEVER:
            return False
        here, giver = rooms.argmin(), _NONE
        for gpu in range(len(node)):
            if node[gpu] == here and (giver < 0 or room[gpu] < room[giver]):
                giver = np.int64(gpu)
        expert, taker = _next_expert(step.start, step.owned, attempt.left, giver, _NONE), _NONE
        while expert >= 0 and _down(left[expert], rules.tile) >= rules.least:
            for gpu in range(len(node)):
                if used[gpu] == rules.slots or fits[gpu] < rules.least or (taker >= 0 and room[gpu] <= room[taker]):
                    continue
                if _fits(rooms[node[gpu]], rules.tile, curve) < rules.least or _holds(replica, used, gpu, expert):
                    continue
                taker = np.int64(gpu)
            if taker >= 0:
                break
            expert = _next_expert(step.start, step.owned, attempt.left, giver, expert)
        if taker < 0:
            return False
        before, there = left[expert], node[taker]
        amount = min(fits[taker], _fits(rooms[there], rules.tile, curve))
        amount = min(amount, _down(before, rules.tile), _needed(before, -rooms[here], rules, curve))
        rooms[here] -= room[giver]
        rooms[there] -= room[taker]
        _give(node, room, fits, left, used, sends, paid, replica, part, rules, curve, expert, giver, taker, amount)
        rooms[here] += room[giver]
        rooms[there] += room[taker]
    return True


@inlined
def _holds(replica, used, gpu, expert):
    """Whether a GPU has a replica of the expert."""
    for slot in range(used[gpu]):  # noqa: SIM110  # Numba compiles no generator expressions
        if replica[gpu, slot] == expert:
            return True
    return False


@inlined
def _give(node, room, fits, left, used, sends, paid, replica, part, rules, curve, expert, giver, taker, amount):
    """Make a replica."""
    before, slot = left[expert], used[taker]
    room[taker] -= _time(amount, rules.tile, curve)
    room[giver] += _time(before, rules.tile, curve) - _time(before - amount, rules.tile, curve)
    fits[taker] = _fits(room[taker], rules.tile, curve)
    fits[giver] = _fits(room[giver], rules.tile, curve)
    left[expert] = before - amount
    replica[taker, slot] = expert
    part[taker, slot] = amount
    used[taker] += 1
    sends[giver] += 1
    price = rules.inside if node[giver] == node[taker] else rules.between
    paid[0, giver] += price
    paid[1, taker] += price


@inlined
def _chosen(fits, takers, need, little):
    """Steps (4) to (6): one or two of the takers, which are sorted by descending room; -1 for no second one."""
    single = _NONE
    for gpu in takers:
        if fits[gpu] < need:
            break
        single = gpu
    if single >= 0 and fits[single] - need <= little:
        return single, _NONE
    first, second, rest = _NONE, _NONE, little + 1
    one, other = 0, len(takers) - 1
    while one < other:
        over = fits[takers[one]] + fits[takers[other]] - need
        if over < 0:
            other -= 1
        else:
            if over < rest:
                first, second, rest = takers[one], takers[other], over
            one += 1
    if first >= 0:
        return first, second
    return single if single >= 0 else takers[0], _NONE


@inlined
def _fits(room, tile, curve):
    """The tokens of a replica that fit into a room."""
    return _down(_within(room, curve), tile)


@inlined
def _needed(left, surplus, rules, curve):
    """The tokens of a replica that shorten, by a surplus, the time of an expert with `left` tokens at home."""
    part = surplus
    if curve.shape[1]:
        keeps = max(np.int64(0), _within(_time(left, rules.tile, curve) - surplus, curve))
        part = left - _down(keeps, rules.tile)
    return max(rules.least, _up(part, rules.tile))


@inlined
def _time(tokens, tile, curve):
    """What an expert's tokens take on one GPU; products stay below 2^63 as in TimeCurve.time."""
    if not curve.shape[1]:
        return tokens
    tokens = _up(tokens, tile)
    at = min(np.searchsorted(curve[0], tokens, side="right"), curve.shape[1] - 1) - 1
    more, longer = curve[0, at + 1] - curve[0, at], curve[1, at + 1] - curve[1, at]
    beyond = tokens - curve[0, at]
    whole = min(beyond // more, _LONGEST // max(longer, 1) + 1)
    return min(curve[1, at] + whole * longer + beyond % more * longer // more, _LONGEST)


@inlined
def _within(time, curve):
    """The most tokens that take at most this time."""
    if not curve.shape[1] or time < 0:
        return time
    if time < curve[1, 0]:
        return _NONE
    at = min(np.searchsorted(curve[1], time, side="right"), curve.shape[1] - 1) - 1
    more, longer = curve[0, at + 1] - curve[0, at], curve[1, at + 1] - curve[1, at]
    if not longer:
        return _MOST_TOKENS
    beyond = time - curve[1, at]
    whole = beyond // longer
    if whole > _MOST_TOKENS // more:
        return _MOST_TOKENS
    return min(curve[0, at] + whole * more + ((beyond % longer + 1) * more - 1) // longer, _MOST_TOKENS)


@inlined
def _up(tokens, tile):
    """Tokens rounded up to whole tiles."""
    return tokens if tile == 1 else -(-tokens // tile) * tile


@inlined
def _down(tokens, tile):
    """Tokens rounded down to whole tiles."""
    return tokens if tile == 1 else tokens // tile * tile


@compiled
def fill(tokens, home, replica, part, quota):
    """As `reference.quotas`; `quota [E, M]` is 0."""
    for expert in range(len(home)):
        quota[expert, home[expert]] = tokens[expert]
    for gpu in range(len(replica)):
        for slot in range(replica.shape[1]):
            expert = replica[gpu, slot]
            if expert >= 0:
                quota[expert, gpu] = part[gpu, slot]
                quota[expert, home[expert]] -= part[gpu, slot]


@compiled
def is_legal(counts, home, quota, replica):
    """As `reference.is_legal`."""
    num_gpus, num_experts = counts.shape
    away = np.zeros(num_experts, np.int64)  # tokens of each expert's replicas
    for gpu in range(num_gpus):
        for slot in range(replica.shape[1]):
            expert = replica[gpu, slot]
            if expert == -1:
                continue
            if expert < 0 or expert >= num_experts or quota[expert, gpu] <= 0:
                return False
            for earlier in range(slot):
                if replica[gpu, earlier] == expert:
                    return False
            away[expert] += quota[expert, gpu]
    for expert in range(num_experts):
        if home[expert] < 0 or home[expert] >= num_gpus:
            return False
        computed = np.int64(0)
        for gpu in range(num_gpus):
            if quota[expert, gpu] < 0:
                return False
            computed += quota[expert, gpu]
        # A replica on its home would be counted twice here, and so exceed what is computed.
        if computed != away[expert] + quota[expert, home[expert]]:
            return False
        away[expert] = computed
    for gpu in range(num_gpus):
        for expert in range(num_experts):
            if counts[gpu, expert] < 0:
                return False
            away[expert] -= counts[gpu, expert]
    return not away.any()
