"""Lower bounds of the busiest GPU's load without replicas: (a) to (d) of `distplb.core.bound`.

Shapes: X rows, n items (experts or whole groups), M packs (GPUs or nodes) of G items.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

__all__ = ["heaviest_pack"]


def heaviest_pack(weight: Tensor, num_packs: int) -> Tensor:
    """`[X]`: a lower bound of the heaviest of M packs of G items, for rows `[X, n]`.

    For all valid k and j:

    (a) the mean pack;
    (b) the k heaviest items are in k packs, at best with the lightest others: the mean of these; or two share a pack;
    (c) the k heaviest items are in k packs, one of which has j of the heavier part of the others; or two share a pack;
    (d) of the k + j(M − k) + 1 heaviest, a lighter one joins one of the k heaviest, or j + 1 lighter ones share a pack.

    With two items in each pack, (c) is the optimum.
    """
    size = weight.shape[1] // num_packs
    mean = weight.sum(-1) / num_packs  # (a)
    heavy = weight.sort(-1, descending=True).values  # [X, n]
    if size == 1:
        return torch.maximum(mean, heavy[:, 0])
    # Running totals, [X, n + 1]: of the k heaviest, and of the k lightest.
    top, low = pad(heavy.cumsum(-1), (1, 0)), pad(heavy.flip(-1).cumsum(-1), (1, 0))
    # The rounding error of a difference of totals must not raise the bound.
    lost = weight.shape[1] * 2.0**-52 * top[:, -1]  # [X]
    bounds = [mean, _separate(heavy, top, low, size, lost), _crowded(heavy, top, low, size, lost)]
    return torch.stack(bounds).amax(0)


def _separate(heavy: Tensor, top: Tensor, low: Tensor, size: int, lost: Tensor) -> Tensor:
    """`[X]`: (b) and (c), the largest over k = 1 ... M."""
    k = torch.arange(1, heavy.shape[1] // size + 1, device=heavy.device)
    # A pack with two of the k heaviest has at least the two lightest of these and the lightest G − 2 of all.
    together = heavy[:, k[1:] - 2] + heavy[:, k[1:] - 1] + low[:, size - 2, None]
    together = pad(together, (1, 0), value=math.inf)  # [X, M]; for k = 1 there are no two
    # (b) Otherwise they are in k packs, with k(G − 1) others.
    mean = (top[:, k] + low[:, k * (size - 1)]) / k
    # (c) Without the k(G − j) − 1 lightest, k(j − 1) + 1 of these others are left, so one of the k packs has j of them.
    # It also has one of the k heaviest, and G − 1 − j more.
    j = torch.arange(1, size, device=heavy.device)
    skipped = k[:, None] * (size - j) - 1  # [M, G − 1]
    heavier = low[:, skipped + j] - low[:, skipped] - lost[:, None, None]
    one = heavy[:, k - 1] + (heavier + low[:, None, size - 1 - j]).amax(-1)
    return torch.minimum(torch.maximum(mean, one), together).amax(-1)


def _crowded(heavy: Tensor, top: Tensor, low: Tensor, size: int, lost: Tensor) -> Tensor:
    """`[X]`: (d), the largest over k = 0 ... M − 1 and j = 1 ... G − 1; k = 0 is the pigeonhole principle."""
    num_packs = heavy.shape[1] // size
    k = torch.arange(num_packs, device=heavy.device)[:, None]
    j = torch.arange(1, size, device=heavy.device)
    last = k + j * (num_packs - k) + 1  # [M, G − 1], the number of heaviest items
    # A lighter one joins one of the k heaviest, or two of those share a pack, which weighs no less.
    joined = heavy[:, k[1:] - 1] + heavy[:, last[1:] - 1] + low[:, size - 2, None, None]
    joined = pad(joined, (0, 0, 1, 0), value=math.inf)  # [X, M, G − 1]; for k = 0 there is nothing to join
    # Otherwise all j(M − k) + 1 lighter ones are in the other M − k packs.
    crowd = top[:, last] - top[:, last - j - 1] - lost[:, None, None] + low[:, None, size - 1 - j]
    return torch.minimum(joined, crowd).amax((-2, -1))
