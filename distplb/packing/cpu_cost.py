"""What tables cost and whether they are crowded, in Numba, on one row. Only `cpu_kernels` imports this.

Shapes: T steps, L layers, E experts, P slots, M packs.
"""

from __future__ import annotations

import numpy as np

from distplb.packing.cpu_row import compiled, largest, parted

__all__ = ["cost_of_row", "is_crowded"]


@compiled
def cost_of_row(load, layer, table, replicas, share, heaviness):
    """Sum of the loads of each step's heaviest pack: `load [T, L, E]`.

    Scratch: `replicas [E]`, all 1; `share [E]`, of one replica; `heaviness [M]`, the load of each pack.
    """
    size, cost = len(table) // len(heaviness), np.int64(0)
    if len(table) > len(replicas):
        replicas[:] = 0
        for slot in range(len(table)):
            replicas[table[slot]] += 1
    for step in range(len(load)):
        for expert in range(len(share)):
            share[expert] = parted(load[step, layer, expert], replicas[expert])
        for pack in range(len(heaviness)):
            tokens = np.int64(0)
            for slot in range(pack * size, (pack + 1) * size):
                tokens += share[table[slot]]
            heaviness[pack] = tokens
        cost += largest(heaviness)[0]
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
