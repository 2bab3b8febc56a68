"""Loads and weights as integers small enough for packing: shifted, or scaled by a power of two and rounded.

Shapes: T steps, L layers, E experts; X rows of n weights.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["excess_bits", "fixed_point", "scaled", "spare_bits"]

# Packing multiplies a weight by a 14-bit noise and the packed key holds 41 bits of cost: 2^40 leaves room for both.
_MAX_TOTAL_BITS = 40
# Weights are scaled to a total of just under 2^39, so that rounding up cannot carry it beyond 2^40.
_WEIGHT_BITS, _MAX_WHOLE = 39, 2.0**62


def excess_bits(load: Tensor, bits: int = _MAX_TOTAL_BITS) -> Tensor:
    """`[L]`: how far each layer of `[T, L, E]` int64 must be shifted right for its total to be at most 2^`bits`."""
    shifts = torch.arange(63 - bits, device=load.device)
    most = ((1 << bits) + 1 << shifts) - 1  # the largest total for which each shift is enough
    return torch.bucketize(load.sum((0, 2)), most)


def spare_bits(load: Tensor) -> Tensor:
    """`[L]`: how far each layer of `[T, L, E]` int64 can be shifted left while its total stays at most 2^40."""
    total = load.sum((0, 2))  # [L]
    shifts = torch.arange(_MAX_TOTAL_BITS + 1, device=load.device)
    spare = _MAX_TOTAL_BITS - torch.bucketize(total, 1 << shifts)  # 2^shift is the smallest power not below the total
    return spare * (total > 0)


def scaled(load: Tensor) -> Tensor:
    """Shift each layer of `[T, L, E]` int64 right until its total over the window is at most 2^40."""
    return load >> excess_bits(load)[:, None]


def fixed_point(weights: Tensor) -> Tensor:
    """`[X, n]` int64: each row of float64, scaled by a power of two to a total just under 2^39, and rounded.

    Rows of integers with a total below 2^62 keep their scale, so that they pack like the same integers in int64.
    """
    total = weights.sum(1)  # [X]
    whole = (weights == weights.round()).all(1) & (total < _MAX_WHOLE)
    exponent = (_WEIGHT_BITS - torch.frexp(total).exponent).masked_fill(whole, 0)  # [X]
    half = exponent // 2  # in two steps, because 2^exponent may be out of a float's range
    scaled = weights * _power_of_two(half)[:, None] * _power_of_two(exponent - half)[:, None]
    return scaled.round().to(torch.int64)


def _power_of_two(exponent: Tensor) -> Tensor:
    """float64 from 2^-1022 to 2^1023, exact on every device and torch, which `pow` and `ldexp` do not guarantee."""
    return ((exponent.to(torch.int64) + 1023) << 52).view(torch.float64)
