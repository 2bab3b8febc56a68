"""The threshold search that splits are compared with, for Numba, in the style of `distplb.splitting.cpu_split`.

Written from its description (UltraEP, arXiv:2606.04101, and the options in its README): a search for the lowest
threshold at which all tokens above it find a place. At one threshold, the busiest GPU gives tokens of its hottest
expert to the GPU with the most room, until no GPU exceeds the threshold. `baselines.threshold_search` calls it.

Shapes: E experts, M GPUs, R replica slots on each GPU.
"""

from __future__ import annotations

import numpy as np
from numba import njit

__all__ = ["search"]

compiled = njit(cache=True, nogil=True, error_model="numpy")


@compiled
def search(tokens, home, node, slots, lowest, gap, replica, part):
    """Fill `replica [M, R]` (-1: empty) and `part [M, R]`; ends when the threshold is known to within `gap` tokens."""
    num_gpus = len(node)
    load = np.zeros(num_gpus, np.int64)
    for expert in range(len(home)):
        load[home[expert]] += tokens[expert]
    start, owned = _experts_by_gpu(home, num_gpus)
    if _place(tokens, node, load, start, owned, slots, lowest, replica, part):
        return
    below, above = lowest, load.max()
    best_replica, best_part = np.full_like(replica, -1), np.zeros_like(part)
    while below + gap < above:
        middle = (below + above) // 2
        if _place(tokens, node, load, start, owned, slots, middle, replica, part):
            above = middle
            best_replica[:], best_part[:] = replica, part
        else:
            below = middle
    replica[:], part[:] = best_replica, best_part


@compiled
def _place(tokens, node, load, start, owned, slots, threshold, replica, part):
    """Whether no GPU exceeds the threshold with the replicas written."""
    num_gpus = len(node)
    replica[:] = -1
    part[:] = 0
    room, left, used = threshold - load, tokens.copy(), np.zeros(num_gpus, np.int64)
    while True:
        giver = 0
        for gpu in range(num_gpus):
            if room[gpu] < room[giver]:
                giver = gpu
        if room[giver] >= 0:
            return True
        expert = owned[start[giver]]
        for nth in range(start[giver], start[giver + 1]):
            if left[owned[nth]] > left[expert]:
                expert = owned[nth]
        taker = -1
        for gpu in range(num_gpus):
            if node[gpu] != node[giver] or room[gpu] <= 0 or used[gpu] == slots or _holds(replica, used, gpu, expert):
                continue
            if taker < 0 or room[gpu] > room[taker]:
                taker = gpu
        if taker < 0 or left[expert] == 0:
            return False
        amount = min(-room[giver], left[expert], room[taker])
        room[taker] -= amount
        room[giver] += amount
        left[expert] -= amount
        replica[taker, used[taker]] = expert
        part[taker, used[taker]] = amount
        used[taker] += 1


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
