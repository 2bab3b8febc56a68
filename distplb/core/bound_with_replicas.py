"""Lower bounds of the busiest GPU's load if experts have replicas: (f) to (j) of `distplb.core.bound`.

Shapes: X rows, E experts, P slots, M GPUs, G slots on each GPU, K levels.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from distplb.core.bound_without_replicas import heaviest_pack

__all__ = ["busiest_of_replicas"]

_TINY = 1e-300  # replaces 0 in a denominator
_ROUNDING = 1e-12  # relative; larger than rounding errors, smaller than any difference that matters
_SAFE = 1e-11  # a value is called too large only if it is so by this relative margin
_ROUNDS = 20  # of bisection; the bound is short by at most a millionth of the first interval
_LEVELS = 16  # values of τ that (i) and (j) try
_PRICES = (0.25, 0.5, 1, 1.25, 1.5, 2, 2.5, 3, 4, 6)  # of a spare replica in (h) and (j), in slots


def busiest_of_replicas(weight: Tensor, num_gpus: int, num_slots: int) -> Tensor:
    """`[X]`: a lower bound of the busiest GPU's load, for rows `[X, E]` in P > E slots on M GPUs.

    Replicas share their expert's tokens evenly. The bound is the largest of

    (a) the mean GPU;
    (f) the largest share if each further replica goes to the expert with the largest share, which minimises it;

    and any λ that one of these proves too low for the busiest GPU:

    (g) to stay below λ beside the lightest possible slots, the experts need more replicas than there are slots;
    (h) a GPU has room for at most j heavy replicas, and there are more than jM;
    (i) the surplus of the heavy replicas is larger than the deficit of the light ones;
    (j) heavy replicas need light ones beside them, and there are too few.

    With one slot on each GPU, (f) is the optimum.
    """
    mean = weight.sum(-1, keepdim=True) / num_gpus  # (a), [X, 1]
    share, replicas, largest = _smallest_shares(weight, num_slots)
    bound = torch.maximum(mean, largest)  # (f)
    # A proof for any replicas holds for these, so (g) to (j) need not try a λ above (a) to (d) of their shares.
    high = heaviest_pack(_repeated(share, replicas, num_slots), num_gpus)[:, None] * (1 - _SAFE)
    rows = (high > bound * (1 + 1e-9)).nonzero()[:, 0]
    weight, low, high = weight[rows], bound[rows], high[rows]
    middle = high  # tried first: often it is the bound
    for _ in range(_ROUNDS if len(rows) else 0):
        too_low = _too_low(weight, middle, num_gpus, num_slots)[:, None]
        low, high = torch.where(too_low, middle, low), torch.where(too_low, high, middle)
        middle = (low + high) / 2
    return bound.index_copy(0, rows, low)[:, 0]


def _smallest_shares(weight: Tensor, num_slots: int) -> tuple[Tensor, Tensor, Tensor]:
    """(f): shares `[X, E]` whose largest is as small as P slots allow, their replicas, and the largest `[X, 1]`.

    Bisects for the smallest limit whose replicas fit into P slots.
    """
    low, high = weight.sum(-1, keepdim=True) / num_slots, weight.amax(-1, keepdim=True)
    for _ in range(60):  # to the last bit
        middle = (low + high) / 2
        too_low = _replicas(weight, middle).sum(-1, keepdim=True) > num_slots
        low, high = torch.where(too_low, middle, low), torch.where(too_low, high, middle)
    replicas = _replicas(weight, high)
    largest = torch.minimum(high, (weight / replicas).amax(-1, keepdim=True))
    # Replicas are left over if more experts tie for the next ones than there are slots.
    heaviest = (weight / replicas).argsort(-1, descending=True)
    left = torch.arange(weight.shape[1], device=weight.device) < num_slots - replicas.sum(-1, keepdim=True)
    replicas = replicas.scatter_add(-1, heaviest, left.to(replicas))
    return weight / replicas, replicas, largest


def _repeated(share: Tensor, replicas: Tensor, num_slots: int) -> Tensor:
    """`[X, P]`: the share of every slot; 0 for slots without a replica, as in rows without tokens."""
    ends = replicas.cumsum(-1)  # [X, E]
    slot = torch.arange(num_slots, device=share.device, dtype=ends.dtype).expand(len(share), -1).contiguous()
    return pad(share, (0, 1)).gather(-1, torch.searchsorted(ends, slot, right=True))


def _replicas(weight: Tensor, limit: Tensor) -> Tensor:
    """The fewest replicas whose shares are within `limit`; fewer would exceed it by more than a part in 10^11."""
    return (weight / limit.clamp(min=_TINY) * (1 - _SAFE)).ceil().clamp(min=1)


class _Case(NamedTuple):
    """A load λ that no GPU may exceed, for each of some rows, and its consequences."""

    weight: Tensor  # [X, E], sorted by the shares weight / need, lightest first
    need: Tensor  # [X, E], replicas that each expert must have
    spare: Tensor  # [X, 1], replicas left over
    limit: Tensor  # [X, 1], λ
    lightest: Tensor  # [X, G], a lower bound of the total of any 0 ... G − 1 slots

    def of_rows(self, rows: Tensor) -> _Case:
        return _Case(*(part[rows] for part in self))

    def below(self, share: Tensor) -> tuple[Tensor, Tensor]:
        """`[X, K]` each: how many slots have less than `share` `[X, K]`, without spare replicas, and their total."""
        place = torch.searchsorted(self.weight / self.need, share.contiguous())
        slots, total = pad(self.need.cumsum(-1), (1, 0)), pad(self.weight.cumsum(-1), (1, 0))
        return slots.gather(-1, place), total.gather(-1, place)

    def above(self, share: Tensor) -> tuple[Tensor, Tensor]:
        """`[X, K]` each: how many slots have `share` `[X, K]` or more, without spare replicas, and their total."""
        slots, total = self.below(share)
        return self.need.sum(-1, keepdim=True) - slots, self.weight.sum(-1, keepdim=True) - total

    def levels(self, num_gpus: int, each: int) -> Tensor:
        """`[X, K]`: the shares of the k·each-th lightest slots, for k from 1 to M in growing steps."""
        k = torch.linspace(0, math.log2(num_gpus), _LEVELS, device=self.need.device).exp2().round().unique()
        slot = (k * each).to(self.need).expand(len(self.need), -1).contiguous()
        place = torch.searchsorted(self.need.cumsum(-1), slot).clamp(max=self.need.shape[1] - 1)
        return (self.weight / self.need).gather(-1, place)


def _too_low(weight: Tensor, limit: Tensor, num_gpus: int, num_slots: int) -> Tensor:
    """`[X]`: whether some GPU must exceed `limit` `[X, 1]`, by (g), (h), (i) or (j)."""
    need = _replicas(weight, limit)
    # (g) The lightest slots beside an expert's replicas force it to have more, and fewer are left to make slots light.
    for _ in range(3):
        spare = (num_slots - need.sum(-1, keepdim=True)).clamp(min=0)
        lightest = _lightest(weight, need + spare, num_slots // num_gpus - 1)
        need = torch.maximum(need, _replicas(weight, limit - lightest[:, -1:])).clamp(max=num_slots + 1)
    spare = num_slots - need.sum(-1, keepdim=True)
    too_low = spare[:, 0] < 0
    order = (weight / need).argsort(-1)
    case = _Case(weight.gather(-1, order), need.gather(-1, order), spare, limit, lightest)
    for check in (_too_many_heavy, _too_much_excess, _too_few_light):
        rows = (~too_low).nonzero()[:, 0]
        too_low[rows] = check(case.of_rows(rows), num_gpus)
    return too_low


def _lightest(weight: Tensor, replicas: Tensor, most: int) -> Tensor:
    """`[X, most + 1]`: the total of the 0 ... `most` lightest slots, if each expert had its `replicas` `[X, E]`."""
    share, order = (weight / replicas).topk(min(most, weight.shape[1]), largest=False)
    replicas = replicas.gather(-1, order)
    lighter = replicas.cumsum(-1) - replicas  # slots before those of an expert
    count = torch.arange(most + 1, device=weight.device)[:, None]
    taken = torch.minimum((count - lighter[:, None]).clamp(min=0), replicas[:, None])  # [X, most + 1, experts]
    return (taken * share[:, None]).sum(-1)


# (h), (i) and (j) each limit a sum over slots, which is exceeded only if a GPU exceeds λ. The smallest sum that the
# spare replicas allow is bounded by putting a price on each of them: every expert takes as many as pay off,
# independently of the others, and the price of all spare replicas is subtracted. Any price gives a valid bound. The
# sum without spare replicas shows, at little cost, where this is worth trying.


def _too_many_heavy(case: _Case, num_gpus: int) -> Tensor:
    """`[X]`: (h). A GPU has at most j slots above ρ_j, where (j + 1) ρ_j and the lightest other slots add up to λ."""
    size = case.lightest.shape[1]
    too_low = torch.zeros(len(case.limit), dtype=torch.bool, device=case.limit.device)
    for j in range(1, size):
        heavy = (case.limit - case.lightest[:, size - 1 - j, None]) / (j + 1)  # ρ_j
        rows = (case.above(heavy)[0] > j * num_gpus).nonzero()[:, 0]
        some = case.of_rows(rows)
        extra = (_replicas(some.weight, heavy[rows]) - some.need).clamp(min=0)  # with these, no replica is heavy
        for price in _PRICES:
            slots = torch.minimum(some.need, price * extra).sum(-1) - price * some.spare[:, 0]
            too_low[rows] |= slots > j * num_gpus * (1 + _SAFE)
    return too_low


def _too_much_excess(case: _Case, num_gpus: int) -> Tensor:
    """`[X]`: (i). For any τ, the surplus of slots over ρ = λ − (G − 1) τ ≥ τ is at most the deficit of slots below τ.

    This holds on each GPU: h slots above ρ and its other slots have at most λ = ρ + (G − 1) τ together, so the surplus
    of the h slots over ρ, plus (h − 1)(ρ − τ), is at most the deficit of the others below τ.
    """
    size = case.lightest.shape[1]
    light = case.levels(num_gpus, size - 1)  # τ, [X, K]
    heavy = case.limit - (size - 1) * light  # ρ
    (few, few_total), (many, many_total) = case.below(light), case.above(heavy)
    gap = (many_total - heavy * many) - (light * few - few_total)
    is_refuted = (heavy >= light) & (gap > light * case.spare)  # without spare replicas: worth trying
    rows, level = is_refuted.nonzero().unbind(-1)
    some, light, heavy = case.of_rows(rows), light[rows, level][:, None], heavy[rows, level][:, None]
    excess = (some.weight - some.need * heavy).clamp(min=0)
    gap = (excess - (some.need * light - some.weight).clamp(min=0)).sum(-1, keepdim=True)
    # Each further replica takes ρ off its expert's surplus, and the last one the rest; any more add at most τ each to
    # the deficit.
    whole = (excess / heavy.clamp(min=_TINY)).floor()
    rest = excess - whole * heavy
    too_low = torch.zeros_like(gap, dtype=torch.bool)
    for part in (0, 0.1, 0.3):
        price = light + part * (heavy - light)  # from τ to ρ
        paid = (whole * (heavy - price) + (rest - price).clamp(min=0)).sum(-1, keepdim=True)
        too_low |= gap - paid - price * some.spare > _SAFE * some.weight.sum(-1, keepdim=True)
    is_refuted[rows, level] = too_low[:, 0]
    return is_refuted.any(-1)


def _too_few_light(case: _Case, num_gpus: int) -> Tensor:
    """`[X]`: (j). There are at least G − j slots below τ for each slot above ρ_j = λ − jτ − the lightest G − 1 − j.

    A slot above ρ_j shares its GPU with at most j − 1 slots that are not below τ, and so with at least G − j that are.
    This needs a GPU to have no room for two slots above ρ_j.
    """
    size = case.lightest.shape[1]
    too_low = torch.zeros(len(case.limit), dtype=torch.bool, device=case.limit.device)
    for j in range(1, size):
        light = case.levels(num_gpus, size - j)  # τ, [X, K]
        heavy = case.limit - j * light - case.lightest[:, size - 1 - j, None]  # ρ_j
        alone = 2 * heavy + case.lightest[:, size - 2, None] > case.limit
        few_light = (size - j) * case.above(heavy)[0] - case.below(light)[0] > case.spare
        is_refuted = alone & few_light  # without spare replicas: worth trying
        rows, level = is_refuted.nonzero().unbind(-1)
        is_refuted[rows, level] = _outnumbered(case.of_rows(rows), light[rows, level], heavy[rows, level], size - j)
        too_low |= is_refuted.any(-1)
    return too_low


def _outnumbered(case: _Case, light: Tensor, heavy: Tensor, each: int) -> Tensor:
    """`[X]`: whether `each` × the slots above `heavy` `[X]` outnumber those below `light`, wherever the spares go."""
    # Replicas with which an expert is no longer heavy, and with which it is light; a share of exactly τ is not light.
    middling = _replicas(case.weight, heavy[:, None] + 1e-9 * case.limit)
    enough = (case.weight / (light[:, None] * (1 - _ROUNDING)).clamp(min=_TINY)).ceil().clamp(min=1)
    as_it_is = torch.where(middling > case.need, each * case.need, 0)
    to_middling, to_light = (middling - case.need).clamp(min=0), (enough - case.need).clamp(min=0)
    if_light = torch.maximum(enough, case.need)
    result = torch.zeros_like(light, dtype=torch.bool)
    for price in (price for price in _PRICES if price > 1):  # so that a light expert takes no more
        slots = torch.minimum(as_it_is, price * to_middling)
        slots = torch.minimum(slots, price * to_light - if_light).sum(-1)
        result |= slots - price * case.spare[:, 0] > 1e-6
    return result
