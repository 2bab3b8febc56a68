"""The state of one row in Numba, and what the steps share. Only the `cpu_*` modules import this.

Shapes of one row: E experts, P slots, M packs, G = P / M slots in each, Q pairs of slots in a pack.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

__all__ = [
    "APART",
    "FREE",
    "LIGHTEST",
    "MAX_ROUNDS",
    "NEVER",
    "NONE",
    "ONE",
    "PAIR_ROUNDS",
    "Row",
    "compiled",
    "copy",
    "new_row",
    "parted",
]

NEVER = np.int64(2**63 - 1)
NONE = np.int64(-1)
# Numba would compile a separate version for each literal argument, but not for these.
FREE, APART = np.bool_(False), np.bool_(True)
MAX_ROUNDS, PAIR_ROUNDS, ONE, LIGHTEST = np.int64(50), np.int64(20), np.int64(1), np.int64(0)
compiled = njit(cache=True, nogil=True, error_model="numpy")


class Row(NamedTuple):
    """State of the current row, and scratch space."""

    key: NDArray[np.int64]  # [E]
    replicas: NDArray[np.int64]  # [E]
    share: NDArray[np.int64]  # [E], weight / replicas
    table: NDArray[np.int64]  # [P], the expert of each slot
    own: NDArray[np.int64]  # [P], the share of each slot's expert
    around: NDArray[np.int64]  # [P], the load of the slot's pack
    load: NDArray[np.int64]  # [M]
    holds: NDArray[np.bool_]  # [E, M], whether a pack holds an expert; maintained and read only with `apart`
    order: NDArray[np.int64]  # [P], scratch
    packed: NDArray[np.int64]  # [P], scratch: (value, index) packed into one integer
    filled: NDArray[np.int64]  # [M], scratch
    small: NDArray[np.int64]  # [P], scratch of step 3: `own` shifted right
    small_load: NDArray[np.int64]  # [M], scratch of step 3
    sums: NDArray[np.int64]  # [Q], scratch of step 6
    pairs: NDArray[np.int64]  # [Q], scratch of step 6


@compiled
def new_row(num_experts, num_slots, num_packs, replicated):
    """Allocate a row of these sizes; `holds` only if `replicated`."""
    pairs = min(num_slots // num_packs, 16) ** 2
    held = (num_experts, num_packs) if replicated else (1, 1)
    return Row(
        np.empty(num_experts, np.int64),
        np.ones(num_experts, np.int64),
        np.empty(num_experts, np.int64),
        np.empty(num_slots, np.int64),
        np.empty(num_slots, np.int64),
        np.empty(num_slots, np.int64),
        np.empty(num_packs, np.int64),
        np.empty(held, np.bool_),
        np.empty(num_slots, np.int64),
        np.empty(num_slots, np.int64),
        np.empty(num_packs, np.int64),
        np.empty(num_slots, np.int64),
        np.empty(num_packs, np.int64),
        np.empty(pairs, np.int64),
        np.empty(pairs, np.int64),
    )


@compiled
def copy(source, to):
    """Copy element by element, because Numba takes seconds to compile an assignment to a slice."""
    for place in range(len(to)):
        to[place] = source[place]


@compiled
def parted(value, replicas):
    """Share of one replica; most experts have only one, and a comparison is cheaper than a division."""
    return value if replicas == 1 else value // replicas
