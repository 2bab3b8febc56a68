"""What tables cost and whether they are crowded, in Numba, on one row. Only `cpu_kernels` imports this.

Shapes: T steps, L layers, E experts, P slots, M packs.
"""

from __future__ import annotations

import numpy as np

from distplb.packing.cpu_row import at, compiled, parted

__all__ = ["cost_of_row", "is_crowded"]


@compiled
def cost_of_row(load, layer, table, replicas, share, num_packs):
    """Sum of the loads of each step's heaviest pack: `load [T, L, E]`.

    Scratch: `replicas [E]`, all 1; `share [E]`, of one replica.
    """
    size, cost = len(table) // num_packs, np.int64(0)
    if len(table) > len(replicas):
        replicas[:] = 0
        for slot in range(len(table)):
            replicas[at(table[slot])] += 1
    for step in range(len(load)):
        for expert in range(len(share)):
            share[expert] = parted(load[step, layer, expert], replicas[expert])
        slot, heaviest = at(0), np.int64(0)
        for _ in range(num_packs):
            tokens = np.int64(0)
            for _ in range(size):
                tokens += share[at(table[slot])]
                slot += at(1)
            heaviest = max(heaviest, tokens)
        cost += heaviest
    return cost


@compiled
def is_crowded(table, num_packs, last_pack):
    """Whether a pack holds an expert twice; scratch `last_pack [E]`."""
    size = len(table) // num_packs
    last_pack[:] = -1
    for slot in range(len(table)):
        pack = slot // size
        if last_pack[table[slot]] == pack:
            return True
        last_pack[table[slot]] = pack
    return False
