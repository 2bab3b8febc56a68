"""The state of one row in Numba, and what the steps share. Only the `cpu_*` modules import this.

Shapes of one row: E experts, P slots, M packs, G = P / M slots in each, Q pairs of slots in a pack.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import njit
from numba.core.options import DefaultOptions
from numpy.typing import NDArray

__all__ = [
    "APART",
    "CHUNK",
    "FAR",
    "FREE",
    "LIGHTEST",
    "MAX_ROUNDS",
    "NEVER",
    "NONE",
    "ONE",
    "PAIR_ROUNDS",
    "Row",
    "allocating",
    "at",
    "compiled",
    "copy",
    "inlined",
    "largest",
    "new_row",
    "parted",
    "total",
]

NEVER = np.int64(2**63 - 1)
NONE = np.int64(-1)
# Numba would compile a separate version for each literal argument, but not for these.
FREE, APART = np.bool_(False), np.bool_(True)
FAR = np.int64(2**61)  # beyond every load, and so far from the end of the range that sums do not overflow
# Marks an index as unsigned. For others, Numba first checks whether they count from the end of the array, which took
# about a sixth of the time of a search.
at = np.uint64
# Values that are looked at together, and to whose multiple others are padded. LLVM unrolls loops over fewer, instead of
# using vector units for them.
CHUNK = 32
MAX_ROUNDS, PAIR_ROUNDS, ONE, LIGHTEST = np.int64(50), np.int64(20), np.int64(1), np.int64(0)
_HOW: dict[str, Any] = {"cache": True, "nogil": True, "error_model": "numpy"}
# Numba counts references to every array of a row in every call, atomically, which takes longer than most steps. Only
# functions that allocate need that. The option is private: a Numba without it makes the same code, with the counts.
_UNCOUNTED: dict[str, Any] = {"_nrt": False} if hasattr(DefaultOptions, "_nrt") else {}
allocating = njit(**_HOW)
compiled = njit(**_HOW, **_UNCOUNTED)
inlined = njit(**_HOW, **_UNCOUNTED, forceinline=True)


class Row(NamedTuple):
    """State of the current row, and scratch space. An item is the share in a slot, numbered from the heaviest."""

    key: NDArray[np.int64]  # [E]
    replicas: NDArray[np.int64]  # [E]
    share: NDArray[np.int64]  # [E], weight / replicas
    table: NDArray[np.int64]  # [P], the expert of each slot
    item: NDArray[np.int64]  # [P], the item in each slot
    slot: NDArray[np.int64]  # [P], the slot of each item
    value: NDArray[np.int64]  # [P + CHUNK], the share of each item, in descending order; far below 0 after the last
    around: NDArray[np.int64]  # [P + CHUNK], the load of each item's pack
    load: NDArray[np.int64]  # [M]
    holds: NDArray[np.bool_]  # [E, M], whether a pack holds an expert; maintained and read only with `apart`
    filled: NDArray[np.int64]  # [M], scratch
    order: NDArray[np.int64]  # [P], scratch: indices in descending order of what was sorted
    starts: NDArray[np.int64]  # [buckets + 1], scratch of sorting
    packed: NDArray[np.int64]  # [P], scratch: (value, index) packed into one integer
    tree: NDArray[np.int64]  # [2 × leaves], scratch: the minimum of each subtree; the leaves come last
    small: NDArray[np.int64]  # [P], scratch of step 3: shares shifted right
    small_load: NDArray[np.int64]  # [M], scratch of step 3
    nearest: NDArray[np.int64]  # [M, M], scratch of step 3; [1, 1] if there are replicas, or very many packs
    sums: NDArray[np.int64]  # [Q], scratch of step 6
    pairs: NDArray[np.int64]  # [Q], scratch of step 6


@allocating
def new_row(num_experts, num_slots, num_packs, replicated):
    """Allocate a row of these sizes; `holds` only if `replicated`."""
    leaves = 1
    while leaves < max(num_packs, num_experts if replicated else 1):
        leaves *= 2
    held = (num_experts, num_packs) if replicated else (1, 1)
    kept = 1 if replicated or num_packs > 256 else num_packs
    # Step 6 sums pairs of at most 16 slots.
    pairs = -(-(min(num_slots // num_packs, 16) ** 2) // CHUNK) * CHUNK
    return Row(
        np.empty(num_experts, np.int64),
        np.ones(num_experts, np.int64),
        np.empty(num_experts, np.int64),
        np.empty(num_slots, np.int64),
        np.empty(num_slots, np.int64),
        np.empty(num_slots, np.int64),
        np.full(num_slots + CHUNK, -FAR),
        np.zeros(num_slots + CHUNK, np.int64),
        np.empty(num_packs, np.int64),
        np.empty(held, np.bool_),
        np.empty(num_packs, np.int64),
        np.empty(num_slots, np.int64),
        np.empty(2 * num_slots + 1, np.int64),
        np.empty(num_slots, np.int64),
        np.empty(2 * leaves, np.int64),
        np.empty(num_slots, np.int64),
        np.empty(num_packs, np.int64),
        np.empty((kept, kept), np.int64),
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


@inlined
def largest(values):
    """The largest value, and the first place where it is."""
    place, value = 0, values[0]
    for nth in range(1, len(values)):
        value = max(value, values[nth])
    while values[place] != value:
        place += 1
    return value, place


@inlined
def total(values):
    """The sum of the values."""
    result = np.int64(0)
    for nth in range(len(values)):
        result += values[nth]
    return result
