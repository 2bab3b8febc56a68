"""Whether GPUs are uneven at all, or only by the chance that is in any window of finite counts. Pure, in integers.

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

_BITS = 31  # of a layer's total times M: the squares of what GPUs have above the mean, added up, then fit an int64
_FROM_BEFORE = 3  # for each GPU but one: what an earlier window's chance and the price of moves leave


def even_by_chance(load: Tensor, placement: Placement) -> Tensor:
    """`[L]` bool: layers whose GPUs differ by no more than if every token went to any GPU with the same chance.

    The placement is to be one that was there before the load was counted. A search on such a layer finds the experts
    that chance has favoured: what it saves on this window, it does not save on those to come.

    >>> load = torch.tensor([[[115, 105, 95, 85], [400, 300, 200, 100]]])
    >>> even_by_chance(load, Placement.contiguous(num_layers=2, num_experts=4, num_gpus=2))
    tensor([ True, False])

    Two of Pearson's sums have to be small, over the GPUs of (tokens − mean)² / mean: of all steps together, which
    tells whether a GPU has more than others for good, and step by step, which tells whether steps differ by more than
    chance, as texts do. With equal chances and d degrees of freedom, M − 1 in each step, such a sum has a χ²
    distribution, and exceeds d + 2 √(d x) + 2 x with a chance of at most e^−x. Here x is 9, where it is in fact about
    one in a million. A placement that was planned on an earlier window has that one's chance in it, which adds
    M − 1, and the price of moves keeps it from evening out the rest: 3 (M − 1) are allowed for both.

    Steps of unlike totals count as the number of equal ones that have the same mean and variance (Satterthwaite); those
    without tokens as none. A layer without any tokens does not differ at all.

    Args:
        load: `[T, L, E]` int64 tokens.
        placement: that was in force while they were counted.

    Source: of the bound, Laurent and Massart 2000, Adaptive estimation of a quadratic functional by model selection,
    lemma 1.
    """
    num_gpus = placement.num_gpus
    load = scaled(load)
    # Replicas share in units of 2^-k tokens: whole tokens would lose what a few of them are.
    fine = spare_bits(load) if placement.has_replicas else torch.zeros_like(load[0, :, 0])  # [L], k
    units = load << fine[:, None]
    of_gpu = gpu_units(units, placement.expert_of_slot.to(load.device), num_gpus)  # [T, L, M]
    totals = load.sum(2)  # [T, L]
    above = of_gpu * num_gpus - units.sum(2)[:, :, None]  # [T, L, M], M times what a GPU has above the mean
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
    """Whether a sum of squares, of M times what is above the mean, shifted right, is one of chance; exact.

    The squares are of units of 2^-`fine` tokens, the steps of tokens.
    """
    total, square = sum(steps), sum(tokens**2 for tokens in steps)
    freedom = (num_gpus - 1) * (total**2 // max(1, square))
    limit = freedom + 6 * isqrt(freedom) + 18 + _FROM_BEFORE * (num_gpus - 1)
    return (squares << 2 * shift) * total <= (num_gpus * square * limit) << 2 * fine
