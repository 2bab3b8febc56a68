"""The randomness of a candidate, which its integer determines; the same on every machine and device.

Shapes: X rows, n items.
"""

from __future__ import annotations

from typing import TypedDict

import torch
from torch import Tensor

from distplb.core.hashing import hashed

__all__ = ["CANDIDATE_BITS", "Names", "ceilings", "noisy_keys"]

CANDIDATE_BITS = 22
_NOISE_STEPS = 9831  # noise / 2^16 is in {0, ..., 9830} / 2^16, that is in [0, 0.15)
_CEILING, _MIN_CEILING, _CEILINGS = 1 << 13, 1 << 11, 7 << 11  # in units of 1 / 2^16: 1/8; from 1/32 to 1/4


class Names(TypedDict):
    """Arguments of `noisy_keys` and of an engine that determine everything random about X rows."""

    layer: Tensor  # [X] int64
    candidate: Tensor  # [X] int64
    seed: int


def noisy_keys(weight: Tensor, *, layer: Tensor, candidate: Tensor, seed: int) -> Tensor:
    """Step 1: `[X, n]` int64, weight × (1 + u), with u uniform in [0, 0.15) for each item; candidate 0 has u = 0.

    Args:
        weight: `[X, n]` int64, each row's total at most 2^40.
        layer: `[X]` int64, which distinguishes equal candidates of different layers.
        candidate: `[X]` int64 in [0, 2^22).
        seed: seed of the whole plan.
    """
    item = torch.arange(weight.shape[1], device=weight.device)
    bits = hashed(torch.zeros_like(weight), seed, seed >> 32, layer[:, None], candidate[:, None], item)
    noise = (bits * _NOISE_STEPS) >> 32
    return weight + ((weight * noise.masked_fill(candidate[:, None] == 0, 0)) >> 16)


def ceilings(*, layer: Tensor, candidate: Tensor, seed: int) -> Tensor:
    """`[X]` int64: the first ceiling's height in step 10, in 1 / 2^16 of the heaviest pack's height above the mean.

    It is 1/8 for candidates 0 and 1, and between 1/32 and 1/4 for the others. Arguments as for `noisy_keys`.
    """
    bits = hashed(torch.zeros_like(layer), seed, seed >> 32, layer, candidate)
    return torch.where(candidate < 2, _CEILING, _MIN_CEILING + ((bits * _CEILINGS) >> 32))
