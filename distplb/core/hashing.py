"""Hashes that are the same on every rank, machine and device: of integers, as random numbers, and of bytes."""

from __future__ import annotations

import hashlib

from torch import Tensor

__all__ = ["digest", "hashed"]

_MASK = (1 << 32) - 1


def digest(data: bytes) -> int:
    """A hash of the bytes, in [0, 2^62).

    It and its negative fit into an int64, so that a MIN all-reduce of both compares it across ranks.
    """
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "big") >> 2


def hashed(state: Tensor, *parts: Tensor | int) -> Tensor:
    """Hash a state and `parts`, one after the other, to int64 in [0, 2^32); shapes are broadcast.

    >>> import torch
    >>> hashed(torch.zeros(2, dtype=torch.int64), 7, torch.tensor([0, 1]))
    tensor([2082769736, 3810755467])

    Args:
        state: int64 of any shape: zeros, or an earlier hash to continue.
        parts: int64 or Python integers, of which only the lowest 32 bits count.
    """
    for part in parts:
        state = _mix((state ^ (part & _MASK)) + 0x9E3779B9)
    return state


def _mix(state: Tensor) -> Tensor:
    """Scramble 32 bits held in an int64, masked after each product.

    The finaliser `lowbias32`, constants from C. Wellons, "Prospecting for Hash Functions" (2018, public domain).
    """
    state = state & _MASK
    state = ((state ^ (state >> 16)) * 0x7FEB352D) & _MASK
    state = ((state ^ (state >> 15)) * 0x846CA68B) & _MASK
    return state ^ (state >> 16)
