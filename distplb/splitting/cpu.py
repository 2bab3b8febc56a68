"""The engine `cpu`: the steps of `reference`, compiled by Numba, without the GIL.

Shapes: E experts, M GPUs.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray

from distplb.core.machine_code import compile_lock, compiled_module, is_there
from distplb.splitting.reference import Replica

__all__ = ["is_there", "replicas", "warm_up"]

_KERNELS = "distplb.splitting.cpu_split"


def replicas(tokens: Sequence[int], home: Sequence[int], node: Sequence[int], slots: int, level: int) -> list[Replica]:
    """Same as `reference.replicas`, in the order of GPUs."""
    expert = np.empty((len(node), slots), np.int64)
    part = np.empty_like(expert)
    place = compiled_module(_KERNELS).place
    place(_array(tokens), _array(home), _array(node), np.int64(slots), np.int64(level), expert, part)
    return [Replica(int(expert[at]), int(at[0]), int(part[at])) for at in zip(*np.nonzero(expert >= 0), strict=True)]


@cache
def warm_up() -> None:
    """Compile the kernel, or load what another process on this node compiled. Once per process."""
    with compile_lock(_KERNELS):
        replicas([8, 1, 1], [0, 1, 1], [0, 0], 1, 5)


def _array(values: Sequence[int]) -> NDArray[np.int64]:
    return np.asarray(values, np.int64)
