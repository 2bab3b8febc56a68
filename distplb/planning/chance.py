"""Decide whether GPUs are really uneven, or only by chance, as in any window of finite counts. Pure, in integers.

Shapes: T steps, L layers, E experts, M GPUs.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isqrt

import torch
from torch import Tensor

from distplb.core.cost import gpu_units
from distplb.core.fixed_point import scaled, spare_bits
from distplb.core.placement import Placement

__all__ = ["even_by_chance"]

_BITS = 31  # kept of M × a layer's total: the squared excesses over the mean, summed, then fit an int64
_FROM_BEFORE = 3  # per degree of freedom: allowed for chance in an earlier window, and for moves that cost too much


def even_by_chance(load: Tensor, placement: Placement) -> Tensor:
    """`[L]` bool: layers whose GPUs differ by no more than if each token chose its GPU uniformly at random.

    The placement must have been in force before the load was counted. On such a layer a search only finds the experts
    that chance favoured: it saves time on this window, but not on later ones.

    >>> load = torch.tensor([[[115, 105, 95, 85], [400, 300, 200, 100]]])
    >>> even_by_chance(load, Placement.contiguous(num_layers=2, num_experts=4, num_gpus=2))
    tensor([ True, False])

    Two Pearson sums, Σ (tokens − mean)² / mean over the GPUs, must be small: one of all steps together, which is large
    if some GPU always gets more than others, and one taken step by step, which is large if steps differ by more than
    chance, as texts do. If all GPUs are equally likely, such a sum with d degrees of freedom (M − 1 per step) has a χ²
    distribution and exceeds d + 2 √(d x) + 2 x with probability at most e^−x. Here x is 9, where the actual
    probability is about one in a million. A placement planned on an earlier window has adapted to the chance in that
    window, which adds M − 1, and the price of moves leaves some unevenness in place: 3 (M − 1) is allowed for both.

    Steps with unequal totals count as the number of equal steps with the same mean and variance (Satterthwaite); steps
    without tokens do not count. A layer without tokens is even.

    Args:
        load: `[T, L, E]` int64 tokens.
        placement: the placement in force while they were counted.

    Source of the bound: Laurent and Massart 2000, Adaptive estimation of a quadratic functional by model selection,
    lemma 1.
    """
    num_gpus = placement.num_gpus
    load = scaled(load)
    # Replicas divide tokens in units of 2^-k: in whole tokens, small counts would lose too much to rounding.
    fine = spare_bits(load) if placement.has_replicas else torch.zeros_like(load[0, :, 0])  # [L], k
    units = load << fine[:, None]
    of_gpu = gpu_units(units, placement.expert_of_slot.to(load.device), num_gpus)  # [T, L, M]
    totals = load.sum(2)  # [T, L]
    above = of_gpu * num_gpus - units.sum(2)[:, :, None]  # [T, L, M], M times a GPU's excess over the mean
    shift = [max(0, (num_gpus * total).bit_length() - _BITS) for total in units.sum((0, 2)).tolist()]
    bits = torch.tensor(shift, device=load.device)[:, None]
    by_step = (above >> bits).square().sum((0, 2)).tolist()
    together = (above.sum(0) >> bits).square().sum(1).tolist()
    is_even, fine_bits = [], fine.tolist()
    for layer, steps in enumerate(totals.T.tolist()):
        parts = (together[layer], [sum(steps)]), (by_step[layer], steps)
        is_even.append(all(_is_small(squares, of, num_gpus, shift[layer], fine_bits[layer]) for squares, of in parts))
    return torch.tensor(is_even, device="cpu")


def _is_small(squares: int, steps: Sequence[int], num_gpus: int, shift: int, fine: int) -> bool:
    """Whether chance explains a sum of squares of M × (tokens − mean), each shifted right by `shift`; exact.

    The squared values are in units of 2^-`fine` tokens, `steps` in tokens.
    """
    total, square = sum(steps), sum(tokens**2 for tokens in steps)
    freedom = (num_gpus - 1) * (total**2 // max(1, square))
    limit = freedom + 6 * isqrt(freedom) + 18 + _FROM_BEFORE * (num_gpus - 1)
    return (squares << 2 * shift) * total <= (num_gpus * square * limit) << 2 * fine
