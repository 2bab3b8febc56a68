"""The reference engine: packing in plain torch, on any device. Slow, short, the specification.

Shapes: X rows, n items, E experts, P slots, M packs, G = P / M slots in each.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distplb.core.cost import layer_cost
from distplb.packing.noise import noisy_keys
from distplb.packing.settle import Terms, settle_row
from distplb.packing.steps import (
    PAIR_ROUNDS,
    crowded,
    divide,
    greedy,
    lower_max,
    lower_variance,
    one_item_a_pack,
    pack_loads,
    rounds_of_step_7,
    swap_pairs,
    tries_of_step_8,
)

__all__ = ["cost", "crowded", "finish", "pack", "polish", "refine", "settle"]

# Step 8 works on rows whose heaviest pack is more than 2^-8 above the mean.
_WORTH_BITS, _GIVERS = 8, 8
_PARTNERS = 4  # number of packs, lightest first, with which step 9 tries pair swaps


def pack(weight: Tensor, num_packs: int, *, layer: Tensor, candidate: Tensor, seed: int = 0) -> Tensor:
    """Steps 1 to 4 of `balanced_packing` for one candidate per row: `items [X, n]`.

    Args:
        weight: `[X, n]` int64, each row's total at most 2^40; n a multiple of `num_packs`.
        num_packs: M.
        layer: `[X]` int64, the row's layer.
        candidate: `[X]` int64, the row's candidate.
        seed: seed of the whole plan.
    """
    if weight.shape[1] == num_packs:
        return one_item_a_pack(weight)
    key = noisy_keys(weight, layer=layer, candidate=candidate, seed=seed)
    items = greedy(weight, key, torch.ones_like(key), num_packs, apart=False)
    return lower_max(weight, lower_variance(weight, items, num_packs), num_packs)


def finish(weight: Tensor, items: Tensor, num_packs: int) -> Tensor:
    """Steps 6 and 7 on the chosen packings: pair swaps, then the min-max refinement again."""
    return lower_max(weight, swap_pairs(weight, items, num_packs), num_packs)


def refine(
    weight: Tensor,
    num_packs: int,
    num_slots: int,
    *,
    layer: Tensor,
    candidate: Tensor,
    seed: int = 0,
    shared: bool = True,
) -> Tensor:
    """The planner's own search for one candidate per row: `table [X, P]`, the expert of each slot.

    Step 0 gives replicas to experts, steps 1 to 7 pack them, and step 8 tries other replica counts if the heaviest
    pack is far above the mean. Without replicas, this is `finish` of `pack` with more rounds of step 7.

    Args:
        weight: `[X, E]` int64, each row's total at most 2^40.
        num_packs: M.
        num_slots: P, at least E; a multiple of `num_packs`.
        layer, candidate, seed: as for `pack`.
        shared: whether replicas of an expert may share a pack, which they do only if that makes the heaviest pack
            lighter. If False, or without replicas, a pack has at most E slots.
    """
    num_experts = weight.shape[1]
    if num_slots == num_experts == num_packs:
        return one_item_a_pack(weight)
    key = noisy_keys(weight, layer=layer, candidate=candidate, seed=seed)
    if num_slots == num_experts:
        return _pack_once(weight, key, torch.ones_like(key), num_packs, apart=False)
    if num_slots > num_packs * num_experts:  # no room to keep replicas apart
        return _search(weight, key, num_packs, num_slots, apart=False)
    table = _search(weight, key, num_packs, num_slots, apart=True)
    if not shared:
        return table
    replicas = divide(key, num_slots, num_slots)
    start = greedy(weight // replicas, key, replicas, num_packs, apart=False)
    rows = crowded(start, num_packs).nonzero()[:, 0]
    if len(rows):
        other = _search(weight[rows], key[rows], num_packs, num_slots, apart=False)
        lighter = _peak(weight[rows], other, num_packs) < _peak(weight[rows], table[rows], num_packs)
        table[rows[lighter]] = other[lighter]
    return table


def polish(weight: Tensor, table: Tensor, num_packs: int) -> Tensor:
    """Step 9 on the chosen packings: swap pairs with the lightest packs, then step 7, as long as that helps.

    Replicas that are apart stay apart.

    Args:
        weight: `[X, E]` int64, as for `refine`.
        table: `[X, P]`, the chosen packings.
        num_packs: M.
    """
    table = table.clone()
    share = weight // _replicas(table, weight.shape[1])
    is_crowded = crowded(table, num_packs)
    for apart in (False, True):
        rows = (is_crowded != apart).nonzero()[:, 0]
        for _ in range(PAIR_ROUNDS):
            helped = [rows[:0]]
            for partner in range(_PARTNERS):
                before = table[rows]
                after = swap_pairs(share[rows], before, num_packs, apart=apart, rounds=1, partner=partner)
                better = (after != before).any(1)
                table[rows] = after
                helped.append(rows[better])
                rows = rows[~better]
            rows = torch.cat(helped)
            if not len(rows):
                break
            rounds = rounds_of_step_7(num_packs)
            table[rows] = lower_max(share[rows], table[rows], num_packs, apart=apart, rounds=rounds)
    return table


def cost(load: Tensor, table: Tensor, num_packs: int, *, layer: Tensor) -> Tensor:
    """`[X]` int64: the heaviest pack's load, summed over the steps; saturates at 2^41 − 1.

    Args:
        load: `[T, L, E]` int64; replicas share an expert's load by integer division.
        table: `[X, P]`, one layer per row.
        num_packs: M.
        layer: `[X]` int64, the row's layer.
    """
    return layer_cost(load[:, layer], table, num_packs)


def settle(terms: Terms, table: Tensor, num_packs: int, *, layer: Tensor, ceiling: Tensor) -> Tensor:
    """Steps 10 and 11: exchanges that lower the planner's cost, which counts each step and the price of moves.

    The cost of a row never rises.

    Args:
        terms: the terms of the cost.
        table: `[X, P]`, the initial packings.
        num_packs: M.
        layer: `[X]` int64, the row's layer in `terms`.
        ceiling: `[X]` int64 in [0, 2^16], the height of the first ceiling of step 10, in units of 1 / 2^16.
    """
    names = zip(table, layer.tolist(), ceiling.tolist(), strict=True)
    rows = [settle_row(terms, row, num_packs, layer=of, ceiling=height) for row, of, height in names]
    return torch.stack(rows) if rows else table.clone()


def _pack_once(weight: Tensor, key: Tensor, replicas: Tensor, num_packs: int, *, apart: bool) -> Tensor:
    """Steps 2 to 7 with given replica counts `[X, E]`; replicas skip step 3, which did not help them."""
    share = weight // replicas
    table = greedy(share, key, replicas, num_packs, apart=apart)
    if table.shape[1] == weight.shape[1]:
        table = lower_variance(share, table, num_packs)
    table = lower_max(share, table, num_packs, apart=apart)
    table = swap_pairs(share, table, num_packs, apart=apart)
    return lower_max(share, table, num_packs, apart=apart, rounds=rounds_of_step_7(num_packs))


def _search(weight: Tensor, key: Tensor, num_packs: int, num_slots: int, *, apart: bool) -> Tensor:
    """Steps 0 to 8; each try of step 8 gives one more replica to an expert of the heaviest pack, one fewer to another.

    Try j of a row gives a replica to the expert at position j mod G of the heaviest pack, and takes it from the expert
    whose replicas would then weigh the (j div G)-th least. A try that helps restarts the count.
    """
    most = num_packs if apart else num_slots
    size = num_slots // num_packs
    replicas = divide(key, num_slots, most)
    table = _pack_once(weight, key, replicas, num_packs, apart=apart)
    peak, mean = _peak(weight, table, num_packs), weight.sum(1) // num_packs  # [X]
    tries = torch.zeros_like(peak)
    for _ in range(tries_of_step_8(num_slots, num_packs)):
        after = torch.where(replicas > 1, weight // (replicas - 1).clamp(min=1), torch.iinfo(torch.int64).max)
        giver = after.sort(dim=1, stable=True).indices  # [X, E]
        givers = (replicas > 1).sum(1).clamp(max=_GIVERS)  # [X]
        rows = ((((peak - mean) << _WORTH_BITS) > mean) & (tries < givers * size)).nonzero()[:, 0]
        if not len(rows):
            break
        heavy = pack_loads(weight[rows] // replicas[rows], table[rows], num_packs).argmax(1)
        taker = table[rows, heavy * size + tries[rows] % size]
        giver = giver[rows, tries[rows] // size]
        tries[rows] += 1
        possible = (giver != taker) & (replicas[rows, taker] < most)
        rows, taker, giver = rows[possible], taker[possible], giver[possible]
        if not len(rows):
            continue
        other = replicas[rows]
        nth = torch.arange(len(rows), device=rows.device)
        other[nth, taker] += 1
        other[nth, giver] -= 1
        tried = _pack_once(weight[rows], key[rows], other, num_packs, apart=apart)
        lower = _peak(weight[rows], tried, num_packs)
        better = lower < peak[rows]
        rows = rows[better]
        table[rows], replicas[rows], peak[rows], tries[rows] = tried[better], other[better], lower[better], 0
    return table


def _replicas(table: Tensor, num_experts: int) -> Tensor:
    """`[X, E]`: number of slots of each expert, at least 1."""
    counts = table.new_zeros(len(table), num_experts)
    # The share of an expert in none of these slots is not used, but must not divide by 0.
    return counts.scatter_add_(1, table, torch.ones_like(table)).clamp_(min=1)


def _peak(weight: Tensor, table: Tensor, num_packs: int) -> Tensor:
    """`[X]`: load of the heaviest pack."""
    return pack_loads(weight // _replicas(table, weight.shape[1]), table, num_packs).amax(1)
