"""Steps 10 and 11 in Triton, on one row, as in `settle`. Only `cuda_kernels` imports this.

Shapes: X rows, T steps, L layers, E experts, P slots, M packs, G = P / M slots in each; N ≥ P and the constexpr M are
the powers of two that a row is padded to. A tile is S steps of all packs, or K exchanges. An exchange has the index
`slot in the pack × P + place`, as in the reference, and each thread adds up the steps of its own exchanges.

Tokens are int32, because their sum over all steps and packs is at most 2^30; scores and tolls are int64. A row's state
in memory, and the functions that write it, are in `cuda_settle_state`.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# A kernel's arguments are whatever Triton makes of them, and Triton has no stubs.

from __future__ import annotations

import triton
import triton.language as tl

from distplb.packing.cuda_settle_state import (
    added_toll,
    copy,
    excess_of,
    lead_of,
    lower_ceilings,
    set_ceilings,
    write_exchange,
    write_holds,
    write_loads,
    write_rest,
)
from distplb.packing.cuda_steps import NUMBERS, first_of

__all__ = ["settle_kernel"]

_SCORE_BITS = tl.constexpr(30)


@triton.jit(do_not_specialize=NUMBERS)
def settle_kernel(
    items, table, best, share, load, rest, lower, above, holds, tokens, region, distance, price, layer, ceiling,
    num_steps, num_experts, num_slots, num_packs, num_scans, apart,
    N: tl.constexpr, M: tl.constexpr, S: tl.constexpr, K: tl.constexpr, U: tl.constexpr, A: tl.constexpr,
):  # fmt: skip
    """Steps 10 and 11 on rows of two packs or more.

    Args:
        items: `[X, P]` int64, the initial packing.
        table: `[X, P]` int64, written before it is read: the current packing, and at the end the result.
        best: `[X, P]` int64, scratch: the cheapest packing of step 10.
        share: `[X, T, N]` int32, scratch: the weight of the replica in a slot.
        load: `[X, T, M]` int32, scratch: the load of a pack, in step 10 minus the ceiling.
        rest: `[X, T, M]` int32, scratch: load of the heaviest pack other than the current one and this one.
        lower: `[X, T]` int32, scratch: how far the second ceiling is below the first.
        above: `[X, M]` int32, scratch: tokens of a pack above the ceilings of step 10.
        holds: `[X, E, M]` int8, scratch: whether a pack holds an expert; only if replicas stay apart.
        tokens: `[L, T, E]` int64.
        region: `[P]` int64.
        distance: `[L, E, M]` int8, or None if moving is free.
        price: `[L, 3]` int64, or None if moving is free.
        layer: `[X]` int64.
        ceiling: `[X]` int64.
        num_steps, num_experts, num_slots, num_packs: T, E, P, M.
        num_scans: maximum number of searches for an exchange under each ceiling, and in step 11.
        apart: 1 if no exchange may bring two replicas of an expert into one pack, else 0.
        N: a power of two, at least P.
        M: a power of two, at least the number of packs.
        S: steps in a tile; a power of two.
        K: exchanges in a tile; a power of two.
        U: steps that are added up at a time; divides T.
        A: height of a tile of slots; a power of two, at most N.
    """
    row = tl.program_id(0).to(tl.int64)
    items += row * num_slots
    table += row * num_slots
    best += row * num_slots
    share += row * num_steps * N
    load += row * num_steps * M
    rest += row * num_steps * M
    lower += row * num_steps
    above += row * num_packs
    holds += row * num_experts * num_packs
    nth = tl.load(layer + row)
    tokens += nth * num_steps * num_experts
    if distance is not None:
        distance += nth * num_experts * num_packs
        price += nth * 3
    position = tl.arange(0, N)
    copy(items, table, position, num_slots)
    copy(items, best, position, num_slots)
    # An exchange does not change replica counts, so whether any expert has replicas is computed only once.
    apart *= write_loads(table, tokens, share, load, num_steps, num_experts, num_slots, num_packs, N, M, S, A)
    write_holds(table, holds, position, num_slots, num_packs, apart)

    # Step 10. Tolls are relative to the initial packing.
    part = tl.load(ceiling + row)
    lowest_cost, first, second = set_ceilings(load, lower, part, num_steps, num_packs, M, S)
    paid, limits = lowest_cost * 0, first
    for turn in range(2):
        lowest_cost, paid = _exchange_while_better(
            table, best, share, load, None, above, holds, region, distance, price, limits, lowest_cost, paid, apart,
            num_steps, num_slots, num_packs, num_scans, N, M, S, K, U,
        )  # fmt: skip
        if turn == 0:
            lower_ceilings(load, lower, num_steps, num_packs, M, S)
        limits = second
    copy(best, table, position, num_slots)

    # Step 11.
    write_loads(table, tokens, share, load, num_steps, num_experts, num_slots, num_packs, N, M, S, A)
    write_holds(table, holds, position, num_slots, num_packs, apart)
    _exchange_while_better(
        table, best, share, load, rest, above, holds, region, distance, price, limits, lowest_cost, paid, apart,
        num_steps, num_slots, num_packs, num_scans, N, M, S, K, U,
    )  # fmt: skip


@triton.jit
def _exchange_while_better(
    table, best, share, load, rest, above, holds, region, distance, price, limits, lowest_cost, paid, apart,
    num_steps, num_slots, num_packs, num_scans,
    N: tl.constexpr, M: tl.constexpr, S: tl.constexpr, K: tl.constexpr, U: tl.constexpr,
):  # fmt: skip
    """Make the exchanges of step 10 under one ceiling if `rest` is None, else those of step 11.

    Step 10 writes the cheapest packing to `best [P]` and returns its cost, and `paid` for the last packing.

    Args:
        limits: the ceilings, summed over the steps.
        lowest_cost: cost of the packing in `best`.
        paid: tolls of the packing in `table` minus those of the initial packing.
        apart: 1 if there are replicas and no exchange may bring two of an expert into one pack, else 0.
    """
    size = num_slots // num_packs
    position, pack = tl.arange(0, N), tl.arange(0, M)
    tired = tl.full([M], 0, tl.int32)
    if rest is None:
        over, busiest = excess_of(load, above, num_steps, num_packs, M, S)
    else:
        over, busiest = lead_of(load, num_steps, num_packs, M, S)
    left = num_scans
    while left > 0:
        left -= 1
        most = tl.max(tl.where(tired > 0, 0, over), 0)
        if most > 0:
            here = first_of((over == most) & (tired == 0), pack)
            at_stake = most
            if rest is not None:
                write_rest(load, rest, here, num_steps, num_packs, M, S)
                at_stake = busiest
            score, flat = _best_exchange(
                table, share, load, rest, above, holds, region, distance, price, here, at_stake, apart,
                num_steps, num_slots, num_packs, N, M, K, U,
            )  # fmt: skip
            if score > 0:
                paid += write_exchange(
                    table, share, load, holds, distance, price, here, flat, apart,
                    num_steps, num_slots, num_packs, N, M, S,
                )  # fmt: skip
                if rest is None:
                    tired = tl.where((pack == here) | (pack == flat % num_slots // size), 0, tired)
                    over, busiest = excess_of(load, above, num_steps, num_packs, M, S)
                    cost = limits + busiest + paid
                    if cost < lowest_cost:
                        lowest_cost = cost
                        copy(table, best, position, num_slots)
                else:
                    tired = tl.full([M], 0, tl.int32)
                    over, busiest = lead_of(load, num_steps, num_packs, M, S)
            else:
                tired = tl.where(pack == here, 1, tired)
        else:
            left = 0
    return lowest_cost, paid


@triton.jit
def _best_exchange(
    table, share, load, rest, above, holds, region, distance, price, here, at_stake, apart,
    num_steps, num_slots, num_packs, N: tl.constexpr, M: tl.constexpr, K: tl.constexpr, U: tl.constexpr,
):  # fmt: skip
    """The best exchange of pack `here`, the first of equals: its score, 0 if there is none, and its index.

    Args:
        rest: `[T, M]`, and the score is how much the cost falls; or None, and it is the tokens removed above the
            ceilings for the toll.
        at_stake: the loads of the heaviest packs, summed over the steps; or the tokens of pack `here` above the
            ceilings.
    """
    size = num_slots // num_packs
    best = tl.full([K], 0, tl.int64)  # each cell's best score, over all tiles
    best_at = tl.full([K], 0, tl.int32)  # and the first exchange that has it
    for start in range(0, size * num_slots, K):
        nth = start + tl.arange(0, K)
        flat = tl.minimum(nth, size * num_slots - 1)  # padding reads the last one, so that no load needs a mask
        slot, place = here * size + flat // num_slots, flat % num_slots
        there = place // size
        leaving, coming = tl.load(table + slot), tl.load(table + place)
        is_allowed = (nth == flat) & (there != here) & (leaving != coming)
        is_allowed = is_allowed & (tl.load(region + slot) == tl.load(region + place))
        is_bound = is_allowed & (flat < apart * size * num_slots)
        goes = tl.load(holds + leaving * num_packs + there, mask=is_bound, other=0)
        comes = tl.load(holds + coming * num_packs + here, mask=is_bound, other=0)
        is_allowed = is_allowed & ((goes | comes) == 0)
        # Over all steps: tokens of the two packs above the ceiling, or the heaviest pack.
        after = tl.full([K], 0, tl.int32)
        for first in range(0, num_steps, U):
            shares, loads = share + first * N, load + first * M
            own, other, beside = shares + slot, shares + place, loads + there
            for step in tl.static_range(U):
                lost = tl.load(own + step * N) - tl.load(other + step * N)
                inside = tl.load(loads + here + step * M) - lost
                outside = tl.load(beside + step * M) + lost
                if rest is None:
                    after += tl.maximum(inside, 0) + tl.maximum(outside, 0)
                else:
                    others = tl.load(rest + first * M + there + step * M)
                    after += tl.maximum(tl.maximum(inside, outside), others)
        if rest is None:
            score = (at_stake + tl.load(above + there) - after).to(tl.int64)
            if distance is not None:
                paid = added_toll(distance, price, leaving, coming, here, there, num_packs)
                score = (tl.maximum(score, 0) << _SCORE_BITS) // (1 + tl.maximum(paid, 0))
        else:
            score = (at_stake - after).to(tl.int64)
            if distance is not None:
                score -= added_toll(distance, price, leaving, coming, here, there, num_packs)
        score = tl.where(is_allowed, score, 0)
        best_at = tl.where(score > best, flat, best_at)
        best = tl.maximum(best, score)
    value = tl.max(best, 0)
    return value, first_of(best == value, best_at)
