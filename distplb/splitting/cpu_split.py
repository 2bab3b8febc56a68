"""The engine `cpu`: the steps of `reference` for Numba. Only `cpu` imports this.

Shapes: E experts, M GPUs, R replica slots on each GPU.
"""

from __future__ import annotations

import numpy as np
from numba import njit

__all__ = ["place"]

compiled = njit(cache=True, nogil=True, error_model="numpy")
_SHARES, _NONE = np.int64(4), np.int64(-1)


@compiled
def place(tokens, home, node, slots, level, least, tile, replica, part):
    """Fill `replica [M, R]` (-1: empty) and `part [M, R]`, the tokens of each replica; step (8) around `_at`."""
    num_gpus = len(node)
    load = np.zeros(num_gpus, np.int64)
    for expert in range(len(home)):
        load[home[expert]] += tokens[expert]
    start, owned = _experts_by_gpu(home, num_gpus)
    if _at(tokens, node, load, start, owned, slots, level, least, tile, replica, part):
        return
    below, above = level, load.max()
    best_replica, best_part = np.full_like(replica, -1), np.zeros_like(part)  # at `above`, no replica is needed
    while below + 1 < above:
        middle = (below + above) // 2
        if _at(tokens, node, load, start, owned, slots, middle, least, tile, replica, part):
            above = middle
            best_replica[:], best_part[:] = replica, part
        else:
            below = middle
    replica[:], part[:] = best_replica, best_part


@compiled
def _at(tokens, node, load, start, owned, slots, level, least, tile, replica, part):
    """Steps (1) to (7): whether no GPU exceeds the level with the replicas written."""
    sent = _place_at(tokens, node, load, start, owned, slots, level, least, tile, replica, part)
    other_replica, other_part = np.empty_like(replica), np.empty_like(part)
    other = _pass_on_at(
        tokens, node, load, start, owned, slots, level, least, tile, other_replica, other_part, np.int64(0)
    )
    if other[0] >= 0 and (sent[0] < 0 or other < sent):
        replica[:], part[:] = other_replica, other_part
        return True
    if sent[0] >= 0:
        return True
    for relays in (np.int64(1), np.int64(slots)):
        sent = _pass_on_at(tokens, node, load, start, owned, slots, level, least, tile, replica, part, relays)
        if sent[0] >= 0:
            return True
    return False


@compiled
def _pass_on_at(tokens, node, load, start, owned, slots, level, least, tile, replica, part, relays):
    """Step (6), or (7) with relays: replicas, and those of the busiest sender; -1 if a surplus is left."""
    num_gpus = len(node)
    replica[:] = -1
    part[:] = 0
    room, left, used = level - load, tokens.copy(), np.zeros(num_gpus, np.int64)
    tried, sends = np.zeros(len(tokens), np.bool_), np.zeros(num_gpus, np.int64)
    while True:
        giver = 0
        for gpu in range(num_gpus):
            if room[gpu] < room[giver]:
                giver = gpu
        if room[giver] >= 0:
            return used.sum(), sends.max()
        for nth in range(start[giver], start[giver + 1]):
            tried[owned[nth]] = False
        taker = -1
        while taker < 0:
            expert = -1
            for nth in range(start[giver], start[giver + 1]):
                if not tried[owned[nth]] and (expert < 0 or left[owned[nth]] > left[expert]):
                    expert = owned[nth]
            if expert < 0 or left[expert] // tile * tile < least:
                return _NONE, _NONE
            tried[expert] = True
            for gpu in range(num_gpus):
                if node[gpu] != node[giver] or room[gpu] // tile * tile < least or used[gpu] == slots:
                    continue
                if (taker < 0 or room[gpu] > room[taker]) and not _holds(replica, used, gpu, expert):
                    taker = gpu
        amount = min(left[expert], room[taker]) // tile * tile
        if slots - used[taker] > relays:
            amount = min(amount, _up(-room[giver], least, tile))
        room[taker] -= amount
        room[giver] += amount
        left[expert] -= amount
        replica[taker, used[taker]] = expert
        part[taker, used[taker]] = amount
        used[taker] += 1
        sends[giver] += 1


@compiled
def _up(surplus, least, tile):
    """A surplus as the tokens of a replica."""
    return max(least, -(-surplus // tile) * tile)


@compiled
def _holds(replica, used, gpu, expert):
    """Whether a GPU has a replica of the expert."""
    for slot in range(used[gpu]):  # noqa: SIM110  # Numba compiles no generator expressions
        if replica[gpu, slot] == expert:
            return True
    return False


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
def _place_at(tokens, node, load, start, owned, slots, level, least, tile, replica, part):
    """Steps (1) to (5); returns the same as `_pass_on_at`."""
    num_gpus, num_nodes = len(node), node.max() + 1
    replica[:] = -1
    part[:] = 0
    room, left, used = level - load, tokens.copy(), np.zeros(num_gpus, np.int64)
    spare, waiting = np.zeros(num_nodes, np.int64), np.zeros(num_nodes, np.int64)
    givers, count = np.empty(num_gpus, np.int64), 0
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
    takers, sends = np.empty(num_gpus, np.int64), np.zeros(num_gpus, np.int64)
    for index in range(count):
        giver = givers[index]
        here = node[giver]
        little = _SHARES * max(0, spare[here]) // waiting[here]
        while room[giver] < 0:
            expert = owned[start[giver]]
            for nth in range(start[giver], start[giver + 1]):
                if left[owned[nth]] > left[expert]:
                    expert = owned[nth]
            need = min(_up(-room[giver], least, tile), left[expert] // tile * tile)
            num_takers = 0
            for gpu in range(num_gpus):
                if node[gpu] != here or room[gpu] // tile * tile < least or used[gpu] == slots:
                    continue
                if _holds(replica, used, gpu, expert):
                    continue
                place_in = num_takers
                while place_in > 0 and room[takers[place_in - 1]] < room[gpu]:
                    takers[place_in] = takers[place_in - 1]
                    place_in -= 1
                takers[place_in] = gpu
                num_takers += 1
            if num_takers == 0 or need < least:
                return _NONE, _NONE
            first, second = _chosen(room, takers, num_takers, need, little, tile)
            for chosen in (first, second):
                if chosen < 0:
                    continue
                gpu = takers[chosen]
                amount = max(least, min(need, room[gpu] // tile * tile))
                if amount > left[expert]:
                    return _NONE, _NONE
                need -= amount
                room[gpu] -= amount
                room[giver] += amount
                left[expert] -= amount
                replica[gpu, used[gpu]] = expert
                part[gpu, used[gpu]] = amount
                used[gpu] += 1
                sends[giver] += 1
        waiting[here] -= 1
    return used.sum(), sends.max()


@compiled
def _chosen(room, takers, num_takers, need, little, tile):
    """Steps (3) to (5): one or two indices into `takers`; -1 for no second one."""
    single = -1
    for index in range(num_takers):
        if room[takers[index]] // tile * tile < need:
            break
        single = index
    if single >= 0 and room[takers[single]] // tile * tile - need <= little:
        return single, -1
    first, second, rest = -1, -1, little + 1
    one, other = 0, num_takers - 1
    while one < other:
        over = room[takers[one]] // tile * tile + room[takers[other]] // tile * tile - need
        if over < 0:
            other -= 1
        else:
            if over < rest:
                first, second, rest = one, other, over
            one += 1
    if first >= 0:
        return first, second
    return max(single, 0), -1
