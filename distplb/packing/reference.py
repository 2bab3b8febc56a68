"""The reference engine: the packing core in plain torch, on any device. Slow, short, the specification.

Shapes: X rows, n items, M packs, g = n / M items in each. A packing is `items [X, n]`: the item at each flat
(pack, position). Positions keep greedy's filling order and swaps exchange in place. Every argmin and argmax takes
the first in flat order, so every engine makes the same choice.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations

import torch
from torch import Tensor

from distplb.packing.candidates import noisy_keys

__all__ = ["finish", "greedy", "lower_max", "lower_variance", "pack", "swap_pairs"]

_VARIANCE_ROUNDS = 10
_MAX_ROUNDS = 50
_PAIR_ROUNDS = 20
_PAIR_ITEMS = range(2, 17)  # packs of this many items try pair swaps
_VARIANCE_BITS = 30  # loads are squared there: 2 × 30 bits and sign stay inside an int64
BestSwap = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
_CHUNK = 1 << 20  # elements of the largest temporary: bounds the memory and stays near the cache


def pack(weight: Tensor, num_packs: int, *, layer: Tensor, candidate: Tensor, seed: int = 0) -> Tensor:
    """Steps 1 to 4 for one candidate a row: `items [X, n]`.

    Args:
        weight: `[X, n]` int64, each row's total at most 2^40; n a multiple of `num_packs`.
        num_packs: M.
        layer: `[X]` int64, the row's layer.
        candidate: `[X]` int64, the row's candidate.
        seed: of the whole plan.
    """
    num_items = weight.shape[1]
    if num_items == num_packs:
        return torch.arange(num_items, device=weight.device).expand_as(weight).clone()
    key = noisy_keys(weight, layer=layer, candidate=candidate, seed=seed)
    items = greedy(weight, key, num_packs)
    items = lower_variance(weight, items, num_packs)
    return lower_max(weight, items, num_packs)


def finish(weight: Tensor, items: Tensor, num_packs: int) -> Tensor:
    """Steps 6 and 7 on the chosen packings: pair swaps, then the min-max refinement once more."""
    return lower_max(weight, swap_pairs(weight, items, num_packs), num_packs)


def greedy(weight: Tensor, key: Tensor, num_packs: int) -> Tensor:
    """Step 2: in descending order of key, each item to the lightest pack that is not full."""
    rows, num_items = weight.shape
    size = num_items // num_packs
    row = torch.arange(rows, device=weight.device)
    order = key.sort(dim=1, descending=True, stable=True).indices
    load = weight.new_zeros(rows, num_packs)
    filled = torch.zeros_like(load)
    items = torch.zeros_like(weight)
    full = torch.iinfo(torch.int64).max
    for item in order.unbind(1):  # [X]
        to = load.masked_fill(filled == size, full).argmin(1)  # [X]
        items[row, to * size + filled[row, to]] = item
        load[row, to] += weight[row, item]
        filled[row, to] += 1
    return items


def lower_variance(weight: Tensor, items: Tensor, num_packs: int) -> Tensor:
    """Step 3: the swap that lowers the sum of squared pack loads most, while there is one."""
    num_items = weight.shape[1]
    small = weight >> _variance_shift(weight)[:, None]

    def best_swap(rows: Tensor, placed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        own = small[rows].gather(1, placed)  # [x, n], weight at each (pack, position)
        rest = own - _pack_load(own, num_packs).repeat_interleave(num_items // num_packs, 1)
        # Swapping a and b changes the sum of squares by 2 (a - b) (rest_a - rest_b): never negative in one pack.
        change = (own[:, :, None] - own[:, None, :]).mul_(rest[:, :, None] - rest[:, None, :]).flatten(1)
        value, best = _first_min(change)
        return value < 0, (best // num_items)[:, None], (best % num_items)[:, None]

    return _while_better(items, best_swap, _VARIANCE_ROUNDS, num_items * num_items)


def lower_max(weight: Tensor, items: Tensor, num_packs: int) -> Tensor:
    """Steps 4 and 7: the swap with the heaviest pack that leaves the smaller maximum of its two packs."""
    num_items = weight.shape[1]
    size = num_items // num_packs
    position = torch.arange(size, device=weight.device)

    def best_swap(rows: Tensor, placed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        own = weight[rows].gather(1, placed)  # [x, n]
        load = _pack_load(own, num_packs)  # [x, M]
        heavy = load.argmax(1, keepdim=True)  # [x, 1]
        peak = load.gather(1, heavy)
        slots = heavy * size + position  # [x, g], the heaviest pack's
        lost = own.gather(1, slots)[:, :, None] - own[:, None, :]  # [x, g, n], what it would lose
        other = load.repeat_interleave(size, 1)[:, None, :] + lost
        worst = torch.maximum(other, peak[:, :, None] - lost).flatten(1)
        value, best = _first_min(worst)
        # Inside the heaviest pack no exchange makes it lighter, so those pairs need no mask.
        return value < peak[:, 0], slots.gather(1, (best // num_items)[:, None]), (best % num_items)[:, None]

    return _while_better(items, best_swap, _MAX_ROUNDS, num_items * size)


def swap_pairs(weight: Tensor, items: Tensor, num_packs: int) -> Tensor:
    """Step 6: two items of the heaviest pack for two of the lightest, the smallest difference that remains."""
    size = weight.shape[1] // num_packs
    if size not in _PAIR_ITEMS or num_packs == 1:
        return items
    pairs = torch.tensor(list(combinations(range(size), 2)), device=weight.device)  # [q, 2]

    def best_swap(rows: Tensor, placed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        own = weight[rows].gather(1, placed).unflatten(1, (num_packs, size))  # [x, M, g]
        load = own.sum(2)
        heavy, light = load.argmax(1), load.argmin(1)  # [x]
        row = torch.arange(len(rows), device=weight.device)
        gap = load[row, heavy] - load[row, light]  # [x]
        from_heavy = own[row, heavy][:, pairs].sum(2)  # [x, q]
        from_light = own[row, light][:, pairs].sum(2)
        remains = (gap[:, None, None] - 2 * (from_heavy[:, :, None] - from_light[:, None, :])).abs().flatten(1)
        value, best = _first_min(remains)
        first = heavy[:, None] * size + pairs[best // len(pairs)]  # [x, 2]
        return value < gap, first, light[:, None] * size + pairs[best % len(pairs)]

    return _while_better(items, best_swap, _PAIR_ROUNDS, len(pairs) ** 2)


def _while_better(items: Tensor, best_swap: BestSwap, rounds: int, row_elements: int) -> Tensor:
    """Apply each row's best swap until it does not help or the rounds are over.

    `best_swap(rows, placed)` answers for some rows, packed as `placed [x, n]`: whether the swap helps `[x]`, and
    the flat positions `[x, 1 or 2]` on either side of the exchange.
    """
    items = items.clone()
    active = torch.arange(len(items), device=items.device)
    for _ in range(rounds):
        helped = []
        for rows in active.split(max(1, _CHUNK // row_elements)):
            helps, one, other = best_swap(rows, items[rows])
            rows, one, other = rows[helps], one[helps], other[helps]
            here, there = items[rows[:, None], one], items[rows[:, None], other]
            items[rows[:, None], one], items[rows[:, None], other] = there, here
            helped.append(rows)
        active = torch.cat(helped) if helped else active[:0]
        if not len(active):
            break
    return items


def _pack_load(own: Tensor, num_packs: int) -> Tensor:
    return own.view(len(own), num_packs, -1).sum(2)  # [x, M]


def _first_min(value: Tensor) -> tuple[Tensor, Tensor]:
    best = value.argmin(1)  # argmin takes the first of equals; min's own index does not promise to
    return value.gather(1, best[:, None])[:, 0], best


def _variance_shift(weight: Tensor) -> Tensor:
    """`[X]`: the smallest shift right after which a row's total is at most 2^30."""
    shifts = torch.arange(63 - _VARIANCE_BITS, device=weight.device)
    return ((weight.sum(1) >> shifts[:, None]) > 1 << _VARIANCE_BITS).sum(0)
