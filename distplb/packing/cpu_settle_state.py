"""The state of one row in steps 10 and 11 in Numba. Only `cpu_kernels` imports this.

What changes from slot to slot is kept as `[T, places]`, one place for each slot and more up to a multiple of 64, so
that a vector unit takes as many slots of a step as it is wide.
Shapes of one row: T steps, E experts, P slots, M packs.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from distplb.packing.cpu_row import allocating

__all__ = ["State", "aligned_zeros", "new_state"]

_PLACES = 64


class State(NamedTuple):
    """State of the current row, and scratch space."""

    table: NDArray[np.int64]  # [P]
    best: NDArray[np.int64]  # [P], the cheapest table of step 10
    share: NDArray[np.int32]  # [E, T], of one replica
    load: NDArray[np.int32]  # [M, T]
    top: NDArray[np.int32]  # [3, T], loads of the three heaviest packs of each step
    top_pack: NDArray[np.int64]  # [3, T], their indices; -1 if there are fewer packs
    limit: NDArray[np.int32]  # [T]
    mean: NDArray[np.int32]  # [T]
    height: NDArray[np.int64]  # [T]
    # These have T rounded up to even, and are 0 beyond the slots and steps.
    own: NDArray[np.int32]  # [T, places], share of each slot's expert
    others: NDArray[np.int32]  # [T, places], load of the other slots of each slot's pack
    rest: NDArray[np.int32]  # [T, places], load of the heaviest pack other than the current one and each slot's
    after: NDArray[np.int32]  # [places], what an exchange with each slot leaves, summed over the steps
    most: NDArray[np.int32]  # [places], tokens above the limits in both packs before it
    inward: NDArray[np.int32]  # [T], what the current pack's load is above each `own` that comes; T rounded up to even
    outward: NDArray[np.int32]  # [T], what the other pack's load is above each of its `others`; likewise
    nothing: NDArray[np.int32]  # [T], zeros
    above: NDArray[np.int64]  # [M], tokens above the limits in step 10, lead over the second-heaviest pack in step 11
    tired: NDArray[np.bool_]  # [M], has no useful exchange, and is skipped until the packing changes
    replicas: NDArray[np.int64]  # [E]
    holds: NDArray[np.int64]  # [E, M], number of an expert's slots in a pack; only if replicas stay apart
    toll: NDArray[np.int64]  # [E, M]; only if moving has a price
    added: NDArray[np.int64]  # [P], toll added if each slot's expert comes to the current pack; likewise


@allocating
def aligned_zeros(rows, places):
    """`[rows, places]`, each row from the beginning of a cache line on: vector units read whole lines at once."""
    line = 64 // 4
    data = np.zeros(rows * places + line, np.int32)
    begin = -(data.ctypes.data // 4) % line
    return data[begin : begin + rows * places].reshape(rows, places)


@allocating
def new_state(num_steps, num_experts, num_slots, num_packs, apart, is_priced):
    """Allocate a row of these sizes."""
    apart = apart and num_slots > num_experts
    places = -(-num_slots // _PLACES) * _PLACES
    rows = num_steps + num_steps % 2
    return State(
        np.empty(num_slots, np.int64),
        np.empty(num_slots, np.int64),
        np.empty((num_experts, num_steps), np.int32),
        np.empty((num_packs, num_steps), np.int32),
        np.empty((3, num_steps), np.int32),
        np.empty((3, num_steps), np.int64),
        np.empty(num_steps, np.int32),
        np.empty(num_steps, np.int32),
        np.empty(num_steps, np.int64),
        aligned_zeros(rows, places),
        aligned_zeros(rows, places),
        aligned_zeros(rows, places),
        aligned_zeros(1, places)[0],
        aligned_zeros(1, places)[0],
        np.zeros(rows, np.int32),
        np.zeros(rows, np.int32),
        np.zeros(num_steps, np.int32),
        np.empty(num_packs, np.int64),
        np.empty(num_packs, np.bool_),
        np.empty(num_experts, np.int64),
        np.zeros((num_experts if apart else 1, num_packs), np.int64),
        np.zeros((num_experts if is_priced else 1, num_packs), np.int64),
        np.zeros(num_slots, np.int64),
    )
