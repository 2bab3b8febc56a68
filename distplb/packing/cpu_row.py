"""The state of one row for Numba, and what its steps share. Imported by the `cpu_*` modules alone.

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
# Literals among the arguments would each get a compiled version of their own; these do not.
FREE, APART = np.bool_(False), np.bool_(True)
MAX_ROUNDS, PAIR_ROUNDS, ONE, LIGHTEST = np.int64(50), np.int64(20), np.int64(1), np.int64(0)
compiled = njit(cache=True, nogil=True, error_model="numpy")


class Row(NamedTuple):
    """The state of the row at work, and room to work in."""

    key: NDArray[np.int64]  # [E]
    replicas: NDArray[np.int64]  # [E]
    share: NDArray[np.int64]  # [E], weight / replicas
    table: NDArray[np.int64]  # [P], the expert of each slot
    own: NDArray[np.int64]  # [P], what it weighs there
    around: NDArray[np.int64]  # [P], the load of the slot's pack
    load: NDArray[np.int64]  # [M]
    holds: NDArray[np.bool_]  # [E, M], whether a pack holds an expert; kept and looked at only with `apart`
    order: NDArray[np.int64]  # [P], room
    packed: NDArray[np.int64]  # [P], room: (value, index) as one number
    filled: NDArray[np.int64]  # [M], room
    small: NDArray[np.int64]  # [P], room: `own` shifted right, in step 3
    small_load: NDArray[np.int64]  # [M], room
    sums: NDArray[np.int64]  # [Q], room, in step 6
    pairs: NDArray[np.int64]  # [Q], room, in step 6


@compiled
def new_row(num_experts, num_slots, num_packs, replicated):
    """Room for a row of these sizes; without `replicated`, none for `holds`."""
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
    """Element by element: Numba's assignment to slices takes seconds to compile."""
    for place in range(len(to)):
        to[place] = source[place]


@compiled
def parted(value, replicas):
    """A replica's part; most experts have one, and a division takes longer than to ask."""
    return value if replicas == 1 else value // replicas
