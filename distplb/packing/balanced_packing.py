"""`balanced_packing`: pack items into packs of equal count so that the heaviest pack is as light as possible.

Shapes: X rows, n items, M packs, K candidates.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from distplb.core.arguments import whole_number
from distplb.core.counts import Counts, as_weights
from distplb.core.fixed_point import fixed_point, scaled
from distplb.core.hashing import hashed
from distplb.errors import DistplbError
from distplb.packing.cuda_trial import engine_after
from distplb.packing.engines import Engine
from distplb.packing.noise import CANDIDATE_BITS
from distplb.packing.steps import pack_loads

__all__ = ["as_whole", "balanced_packing"]

_MAX_TOTAL = 2.0**62
_TRIED_ROWS = 12
_BATCH = 1 << 20  # weights packed at a time; bounds the memory


def balanced_packing(weight: Counts, num_packs: int, num_candidates: int = 64) -> tuple[Tensor, Tensor]:
    """Pack n weighted items into packs of exactly n / `num_packs` items; rows are independent.

    Seven steps: (1) noisy keys, (2) greedy, (3) variance refinement, (4) min-max refinement, (5) choose the best
    candidate of each row, (6) pair swaps on it, (7) min-max refinement again.

    >>> pack_index, rank_in_pack = balanced_packing(torch.tensor([[9, 1, 5, 5]]), num_packs=2)
    >>> pack_index, rank_in_pack
    (tensor([[0, 0, 1, 1]]), tensor([[0, 1, 0, 1]]))

    Args:
        weight: `[X, n]` non-negative numbers, of any type and on any device.
        num_packs: M; divides n.
        num_candidates: K, the randomised starts for each row; the first is plain longest-first.

    Returns:
        pack_index `[X, n]` int64, the pack of each item, and rank_in_pack `[X, n]` int64, its position in that pack.

    Raises:
        DistplbError: if `weight` has another shape, NaN, infinite or negative values, or too large a row total, or if
            `num_packs` or `num_candidates` is out of range.
    """
    whole = as_whole(weight)
    rows, num_items = whole.shape
    num_packs, num_candidates = whole_number("num_packs", num_packs), whole_number("num_candidates", num_candidates)
    if num_packs < 1 or num_items % num_packs:
        raise DistplbError(
            f"{num_items} item{'s' * (num_items != 1)} cannot be packed evenly into {num_packs} packs; "
            f"pass a divisor of {num_items}"
        )
    if not 1 <= num_candidates <= 1 << CANDIDATE_BITS:
        raise DistplbError(f"num_candidates is {num_candidates}; pass 1 to 2^{CANDIDATE_BITS}")
    _, engine = engine_after(_PackTrial(num_items, num_packs, whole.device), None, whole.device)
    row = torch.arange(rows, device=whole.device)
    chosen = torch.empty_like(whole)
    lightest = torch.full((rows,), torch.iinfo(torch.int64).max, device=whole.device)
    for candidates in torch.arange(num_candidates, device="cpu").split(max(1, _BATCH // whole.numel())):
        many = whole.repeat(len(candidates), 1)  # [k·X, n], candidate by candidate
        of_row = candidates.to(whole.device).repeat_interleave(rows)
        items = engine.pack(many, num_packs, layer=row.repeat(len(candidates)), candidate=of_row)
        heaviest, best = pack_loads(many, items, num_packs).amax(1).view(-1, rows).sort(dim=0, stable=True)
        better = heaviest[0] < lightest  # ties stay with the lowest candidate
        chosen[better] = items.view(-1, rows, num_items)[best[0], row][better]
        lightest = torch.minimum(lightest, heaviest[0])
    chosen = engine.finish(whole, chosen, num_packs)
    slot = torch.empty_like(chosen)
    slot.scatter_(1, chosen, torch.arange(num_items, device=chosen.device).expand_as(chosen))
    size = num_items // num_packs
    return slot // size, slot % size


def as_whole(weight: Counts, dims: tuple[str, str] = ("row", "item")) -> Tensor:
    """Convert weights of any type and size to `[X, n]` int64 with row totals of at most 2^40.

    Args:
        weight: `[X, n]` non-negative numbers.
        dims: what messages call its rows and items.
    """
    weights = as_weights("weight", weight, dims)
    total = weights.double().sum(1)  # [X]
    if float(total.max()) >= (math.inf if weights.is_floating_point() else _MAX_TOTAL):
        raise DistplbError(
            f"weight has a row whose total is {float(total.max()):.3g}, too large to add up; "
            "divide the weights by a power of two"
        )
    return scaled((fixed_point(weights) if weights.is_floating_point() else weights)[None])[0]


@dataclass(frozen=True)
class _PackTrial:
    """The calls that `balanced_packing` makes; see `Trial`."""

    num_items: int
    num_packs: int
    device: torch.device

    def __str__(self) -> str:
        return f"{self.num_items} items in {self.num_packs} packs"

    def run(self, engine: Engine) -> None:
        """Pack a dozen rows."""
        row = torch.arange(_TRIED_ROWS, device=self.device)
        item = torch.arange(self.num_items, device=self.device)
        weight = hashed(torch.zeros_like(row[:, None] + item), row[:, None], item) % (1 << (row + 1))[:, None]
        items = engine.pack(weight, self.num_packs, layer=row, candidate=row // 2)
        engine.finish(weight, items, self.num_packs)
