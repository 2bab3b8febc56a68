"""The engine `cpu`: the steps of `reference`, compiled by Numba, without the GIL.

Shapes: E experts, M GPUs.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from distplb.core.machine_code import compile_lock, compiled_module, is_there
from distplb.splitting.rules import NO_CURVE, Array, Rules

__all__ = ["is_legal", "is_there", "quotas", "replicas", "warm_up"]

_KERNELS = "distplb.splitting.cpu_split"


def replicas(tokens: Array, home: Array, node: Array, rules: Rules, curve: Array = NO_CURVE) -> tuple[Array, Array]:
    """Same as `reference.replicas`."""
    expert = np.empty((len(node), rules.slots), np.int64)
    part = np.empty_like(expert)
    compiled_module(_KERNELS).place(tokens, home, node, rules, curve, expert, part)
    return expert, part


def quotas(tokens: Array, home: Array, expert: Array, part: Array) -> Array:
    """Same as `reference.quotas`."""
    quota = np.zeros((len(tokens), len(expert)), np.int64)
    compiled_module(_KERNELS).fill(tokens, home, expert, part, quota)
    return quota


def is_legal(counts: Array, home: Array, quota: Array, replica: Array) -> bool:
    """Same as `reference.is_legal`."""
    return bool(compiled_module(_KERNELS).is_legal(counts, home, quota, replica))


@cache
def warm_up() -> None:
    """Compile the kernels, or load what another process on this node compiled. Once per process."""
    with compile_lock(_KERNELS):
        tokens, home = np.array([8, 1, 1]), np.array([0, 1, 1])
        expert, part = replicas(tokens, home, np.array([0, 0]), Rules(slots=1, level=5))
        quota = quotas(tokens, home, expert, part)
        is_legal(quota.T.copy(), home, quota, expert)
