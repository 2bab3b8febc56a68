"""The steps of packing in plain torch, many rows at a time: slow and short; every engine equals them to the bit.

Shapes: X rows, E experts, P slots, M packs, G = P / M slots in each. A packing is `table [X, P]`: the expert at each
flat (pack, position); `share [X, E]` is the weight of one replica of an expert. Without replicas P = E, and `table` and
`share` are the items and the weights of `balanced_packing`. Greedy fills the positions of a pack in order; swaps
exchange experts in place. Every argmin and argmax takes the first in flat order, so every engine makes the same choice.

With `apart`, no step brings two replicas of one expert into one pack.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations

import torch
from torch import Tensor

__all__ = [
    "MAX_ROUNDS",
    "PAIR_ROUNDS",
    "PAIR_SLOTS",
    "crowded",
    "divide",
    "greedy",
    "lower_max",
    "lower_variance",
    "one_item_a_pack",
    "pack_loads",
    "rounds_of_step_7",
    "swap_pairs",
    "tries_of_step_8",
]

MAX_ROUNDS = 50
PAIR_ROUNDS = 20
PAIR_SLOTS = range(2, 17)  # slots in a pack for which pair swaps are tried
_VARIANCE_ROUNDS = 10
_VARIANCE_BITS = 30  # step 3 squares loads: 2 × 30 bits and a sign fit into an int64
_NEVER = torch.iinfo(torch.int64).max
_CHUNK = 1 << 20  # elements of the largest temporary: bounds the memory and stays close to the cache's size
_TRIES, _TRIED_SLOTS = 64, 1 << 14  # of step 8, which makes fewer tries if there are more slots
BestSwap = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


def one_item_a_pack(weight: Tensor) -> Tensor:
    """`[X, M]`: the packing of as many items as there are packs, which needs no steps."""
    return torch.arange(weight.shape[1], device=weight.device).expand_as(weight).clone()


def rounds_of_step_7(num_packs: int) -> int:
    """Rounds of step 7: enough for every pack to be the heaviest a few times."""
    return MAX_ROUNDS + 4 * num_packs


def tries_of_step_8(num_slots: int, num_packs: int) -> int:
    """Tries of step 8: 0 for packs of one slot, which no other replica counts would make lighter."""
    return max(4, min(_TRIES, _TRIED_SLOTS // num_slots)) if num_slots > num_packs else 0


def divide(key: Tensor, num_slots: int, most: int) -> Tensor:
    """Step 0: `[X, E]` replicas of each expert; each further one goes to the largest key / replicas.

    Args:
        key: `[X, E]` int64.
        num_slots: P, from E to E × `most`.
        most: maximum number of replicas of one expert.
    """
    replicas = torch.ones_like(key)
    share = key if most > 1 else torch.full_like(key, -1)
    row = torch.arange(len(key), device=key.device)
    share = share.clone()
    for _ in range(num_slots - key.shape[1]):
        expert = share.argmax(1)  # [X]
        replicas[row, expert] += 1
        count = replicas[row, expert]
        share[row, expert] = torch.where(count < most, key[row, expert] // count, -1)
    return replicas


def greedy(share: Tensor, key: Tensor, replicas: Tensor, num_packs: int, *, apart: bool) -> Tensor:
    """Step 2: in descending order of key / replicas, put each slot into the lightest pack that is not full.

    With `apart`, into the lightest of those that do not hold the expert. If all of them hold it, it takes the place of
    another expert, which goes into the lightest pack instead.
    """
    rows, num_experts = share.shape
    row = torch.arange(rows, device=share.device)
    order = (key // replicas).sort(dim=1, descending=True, stable=True).indices  # [X, E]
    order = order.flatten().repeat_interleave(replicas.gather(1, order).flatten()).view(rows, -1)  # [X, P]
    size = order.shape[1] // num_packs
    load = share.new_zeros(rows, num_packs)
    filled = torch.zeros_like(load)
    holds = torch.zeros(rows, num_experts, num_packs, dtype=torch.bool, device=share.device)
    table = torch.full_like(order, -1)
    for expert in order.T.contiguous():  # [X]
        full = filled == size
        to = load.masked_fill(full, _NEVER).argmin(1)  # [X]
        if apart:
            barred = full | holds[row, expert]
            to = torch.where(barred.all(1), to, load.masked_fill(barred, _NEVER).argmin(1))
            for x in barred.all(1).nonzero()[:, 0].tolist():
                expert[x] = _displace(table[x], share[x], load[x], holds[x], int(expert[x]), int(to[x]))
            holds[row, expert, to] = True
        table[row, to * size + filled[row, to]] = expert
        load[row, to] += share[row, expert]
        filled[row, to] += 1
    return table


def _displace(table: Tensor, share: Tensor, load: Tensor, holds: Tensor, expert: int, to: int) -> int:
    """Put `expert`, which pack `to` already holds, in the place of another; returns the other, which `to` lacks.

    The other is the one with the nearest share, the first of equals. There always is one: a pack that lacks `expert`
    is full, and pack `to` cannot hold all of its experts. For one row: `share [E]`; `table [P]`, `load [M]` and
    `holds [E, M]` are changed in place.
    """
    pack = torch.arange(len(table), device=table.device) // (len(table) // len(load))  # [P]
    other = table.clamp(min=0)
    barred = (table < 0) | holds[expert, pack] | holds[other, to]
    place = int((share[other] - share[expert]).abs().masked_fill(barred, _NEVER).argmin())
    leaves, where = int(table[place]), int(pack[place])
    table[place] = expert
    load[where] += share[expert] - share[leaves]
    holds[leaves, where], holds[expert, where] = False, True
    return leaves


def lower_variance(share: Tensor, table: Tensor, num_packs: int) -> Tensor:
    """Step 3: make the swap that lowers the sum of squared pack loads most, as long as there is one."""
    num_slots = table.shape[1]
    small = share >> _variance_shift(share, table)[:, None]

    def best_swap(rows: Tensor, placed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        own = small[rows].gather(1, placed)  # [x, P], weight at each (pack, position)
        rest = own - _per_pack(own, num_packs).repeat_interleave(num_slots // num_packs, 1)
        # Swapping a and b changes the sum of squares by 2 (a - b) (rest_a - rest_b): never negative within a pack.
        change = (own[:, :, None] - own[:, None, :]).mul_(rest[:, :, None] - rest[:, None, :]).flatten(1)
        value, best = _first_min(change)
        return value < 0, (best // num_slots)[:, None], (best % num_slots)[:, None]

    return _while_better(table, best_swap, _VARIANCE_ROUNDS, num_slots * num_slots)


def lower_max(share: Tensor, table: Tensor, num_packs: int, *, apart: bool = False, rounds: int = MAX_ROUNDS) -> Tensor:
    """Steps 4 and 7: make the swap with the heaviest pack that minimises the heavier of the two packs."""
    num_slots = table.shape[1]
    size = num_slots // num_packs
    position = torch.arange(size, device=table.device)

    def best_swap(rows: Tensor, placed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        own = share[rows].gather(1, placed)  # [x, P]
        load = _per_pack(own, num_packs)  # [x, M]
        heavy = load.argmax(1, keepdim=True)  # [x, 1]
        peak = load.gather(1, heavy)
        slots = heavy * size + position  # [x, G], of the heaviest pack
        lost = own.gather(1, slots)[:, :, None] - own[:, None, :]  # [x, G, P], what it would lose
        other = load.repeat_interleave(size, 1)[:, None, :] + lost
        worst = torch.maximum(other, peak[:, :, None] - lost)
        if apart:
            worst.masked_fill_(_clashes(placed, slots, heavy, num_packs, share.shape[1]), _NEVER)
        value, best = _first_min(worst.flatten(1))
        # An exchange within the heaviest pack does not make it lighter, so those pairs need no mask.
        return value < peak[:, 0], slots.gather(1, (best // num_slots)[:, None]), (best % num_slots)[:, None]

    return _while_better(table, best_swap, rounds, num_slots * size)


def swap_pairs(
    share: Tensor, table: Tensor, num_packs: int, *, apart: bool = False, rounds: int = PAIR_ROUNDS, partner: int = 0
) -> Tensor:
    """Step 6: swap two items of the heaviest pack for the two of the lightest that leave the smallest difference.

    The lightest here is the `partner`-th lightest, counted from 0.
    """
    size = table.shape[1] // num_packs
    if size not in PAIR_SLOTS or num_packs <= partner + 1:
        return table
    pairs = torch.tensor(list(combinations(range(size), 2)), device=table.device)  # [q, 2]

    def best_swap(rows: Tensor, placed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        own = share[rows].gather(1, placed).unflatten(1, (num_packs, size))  # [x, M, G]
        load = own.sum(2)
        heavy, light = load.argmax(1), load.sort(dim=1, stable=True).indices[:, partner]  # [x]
        row = torch.arange(len(rows), device=table.device)
        gap = load[row, heavy] - load[row, light]  # [x]
        from_heavy = own[row, heavy][:, pairs].sum(2)  # [x, q]
        from_light = own[row, light][:, pairs].sum(2)
        remains = (gap[:, None, None] - 2 * (from_heavy[:, :, None] - from_light[:, None, :])).abs()
        first, second = heavy[:, None] * size + pairs.T[:, None], light[:, None] * size + pairs.T[:, None]  # [2, x, q]
        if apart:
            holds = _holds(placed, num_packs, share.shape[1])
            leaving = holds[row[:, None], placed[row[:, None], first], light[:, None]].any(0)  # [x, q]
            coming = holds[row[:, None], placed[row[:, None], second], heavy[:, None]].any(0)
            remains.masked_fill_(leaving[:, :, None] | coming[:, None, :], _NEVER)
        value, best = _first_min(remains.flatten(1))
        chosen = first[:, row, best // len(pairs)], second[:, row, best % len(pairs)]  # [2, x] each
        return value < gap, chosen[0].T, chosen[1].T

    return _while_better(table, best_swap, rounds, len(pairs) ** 2)


def pack_loads(share: Tensor, table: Tensor, num_packs: int) -> Tensor:
    """`[X, M]`: the total weight of each pack."""
    return _per_pack(share.gather(1, table), num_packs)


def crowded(table: Tensor, num_packs: int) -> Tensor:
    """`[X]` bool: whether a pack holds an expert twice."""
    inside = table.view(len(table), num_packs, -1).sort(dim=2).values
    return (inside[..., 1:] == inside[..., :-1]).any(2).any(1)


def _while_better(table: Tensor, best_swap: BestSwap, rounds: int, row_elements: int) -> Tensor:
    """Apply each row's best swap until it no longer helps or the rounds are used up.

    For some rows, packed as `placed [x, P]`, `best_swap(rows, placed)` returns whether the swap helps `[x]`, and the
    flat positions `[x, 1 or 2]` on either side of the exchange.
    """
    table = table.clone()
    active = torch.arange(len(table), device=table.device)
    for _ in range(rounds):
        helped = []
        for rows in active.split(max(1, _CHUNK // row_elements)):
            helps, one, other = best_swap(rows, table[rows])
            rows, one, other = rows[helps], one[helps], other[helps]
            here, there = table[rows[:, None], one], table[rows[:, None], other]
            table[rows[:, None], one], table[rows[:, None], other] = there, here
            helped.append(rows)
        active = torch.cat(helped) if helped else active[:0]
        if not len(active):
            break
    return table


def _per_pack(own: Tensor, num_packs: int) -> Tensor:
    return own.view(len(own), num_packs, -1).sum(2)  # [x, M]


def _first_min(value: Tensor) -> tuple[Tensor, Tensor]:
    best = value.argmin(1)  # argmin takes the first of equals; the index that min returns need not be
    return value.gather(1, best[:, None])[:, 0], best


def _holds(placed: Tensor, num_packs: int, num_experts: int) -> Tensor:
    """`[x, E, M]` bool: whether a pack holds an expert."""
    pack = torch.arange(placed.shape[1], device=placed.device) // (placed.shape[1] // num_packs)
    holds = torch.zeros(len(placed), num_experts, num_packs, dtype=torch.bool, device=placed.device)
    return holds.index_put_(
        (torch.arange(len(placed), device=placed.device)[:, None], placed, pack),
        torch.ones((), dtype=torch.bool, device=placed.device),
    )


def _clashes(placed: Tensor, slots: Tensor, heavy: Tensor, num_packs: int, num_experts: int) -> Tensor:
    """`[x, G, P]` bool: whether swapping `slots [x, G]` of pack `heavy [x, 1]` brings two replicas together."""
    holds = _holds(placed, num_packs, num_experts)
    row = torch.arange(len(placed), device=placed.device)[:, None]
    there = holds[row, placed.gather(1, slots)]  # [x, G, M], whether a pack holds an expert of the heaviest
    here = holds[row, placed, heavy]  # [x, P], whether the heaviest pack holds the expert
    return there.repeat_interleave(placed.shape[1] // num_packs, 2) | here[:, None, :]


def _variance_shift(share: Tensor, table: Tensor) -> Tensor:
    """`[X]`: the smallest shift right after which a row's total is at most 2^30."""
    shifts = torch.arange(63 - _VARIANCE_BITS, device=share.device)
    return ((share.gather(1, table).sum(1) >> shifts[:, None]) > 1 << _VARIANCE_BITS).sum(0)
