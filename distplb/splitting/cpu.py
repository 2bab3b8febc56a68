"""The engine `cpu`: the steps of `reference`, compiled by Numba, without the GIL.

Shapes: E experts, M GPUs.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from distplb.core.machine_code import compile_lock, compiled_module, is_there
from distplb.splitting.reference import Array

__all__ = ["is_there", "replicas", "warm_up"]

_KERNELS = "distplb.splitting.cpu_split"


def replicas(
    tokens: Array, home: Array, node: Array, slots: int, level: int, least: int = 1, tile: int = 1
) -> tuple[Array, Array]:
    """Same as `reference.replicas`."""
    expert = np.empty((len(node), slots), np.int64)
    part = np.empty_like(expert)
    least = -(-least // tile) * tile
    compiled_module(_KERNELS).place(tokens, home, node, slots, level, least, tile, expert, part)
    return expert, part


@cache
def warm_up() -> None:
    """Compile the kernel, or load what another process on this node compiled. Once per process."""
    with compile_lock(_KERNELS):
        replicas(np.array([8, 1, 1]), np.array([0, 1, 1]), np.array([0, 0]), 1, 5)
