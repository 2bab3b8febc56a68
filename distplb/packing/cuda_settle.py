"""Steps 10 and 11 in Triton, on one row, as `settling` has them. Imported by `cuda_kernels` alone.

Shapes: X rows, T steps, L layers, E experts, P slots, M packs, G = P / M slots in each; N ≥ P and the constexpr M are
the powers of two that a row is padded to. S steps of all packs are a tile, and so are K exchanges: an exchange has the
index `slot of the pack × P + place`, as in the reference, and a thread adds up its own exchanges' steps alone.

Tokens are int32, because their sum over all steps and packs is at most 2^30; scores and tolls are int64. What a row
weighs is in memory, by step: `share [T, N]` what is in a slot, `load [T, M]` what is in a pack, in step 10 less the
ceiling. These are padded, so that a few steps in a row are constant distances apart. A thread reads there what others
wrote, so each function that writes has a barrier before its first store, for nobody may still read the old, and one
after its last.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# A kernel's arguments are whatever Triton makes of them, and Triton has no stubs.

from __future__ import annotations

import triton
import triton.language as tl

from distplb.packing.cuda_steps import NUMBERS, first_of, replicas_of

__all__ = ["settle_kernel"]

_CEILING_BITS, _SCORE_BITS = tl.constexpr(16), tl.constexpr(30)
_NOBODY = tl.constexpr(-(1 << 30))  # below every load less a ceiling: what padding has
_LAST = tl.constexpr((1 << 31) - 1)  # above every pack


@triton.jit(do_not_specialize=NUMBERS)
def settle_kernel(
    items,
    table,
    best,
    share,
    load,
    rest,
    lower,
    above,
    holds,
    tokens,
    region,
    distance,
    price,
    layer,
    ceiling,
    num_steps,
    num_experts,
    num_slots,
    num_packs,
    num_scans,
    apart,
    N: tl.constexpr,
    M: tl.constexpr,
    S: tl.constexpr,
    K: tl.constexpr,
    U: tl.constexpr,
    A: tl.constexpr,
):
    """Steps 10 and 11 on rows of two packs or more.

    Args:
        items: `[X, P]` int64, the packing to begin with.
        table: `[X, P]` int64, written first: the packing at work, and at the end the result.
        best: `[X, P]` int64, room: the cheapest packing of step 10.
        share: `[X, T, N]` int32, room: what the replica in a slot weighs.
        load: `[X, T, M]` int32, room: what a pack weighs, in step 10 less the ceiling.
        rest: `[X, T, M]` int32, room: the fullest pack but for the one at work and this one.
        lower: `[X, T]` int32, room: how far the second ceiling lies below the first.
        above: `[X, M]` int32, room: how much a pack stands out.
        holds: `[X, E, M]` int8, room: whether a pack holds an expert; only where replicas stay apart.
        tokens: `[L, T, E]` int64.
        region: `[P]` int64.
        distance: `[L, E, M]` int8, or None where moving is free.
        price: `[L, 3]` int64, or None as well.
        layer: `[X]` int64.
        ceiling: `[X]` int64.
        num_steps, num_experts, num_slots, num_packs: T, E, P, M.
        num_scans: how often a pack looks for an exchange under each ceiling, and in step 11, at most.
        apart: 1 where no exchange may bring two replicas of an expert into one pack, else 0.
        N: power of two from P up.
        M: power of two from the number of packs up.
        S: steps in a tile; a power of two.
        K: exchanges in a tile; a power of two.
        U: steps that are seen in a row; T is a multiple of it.
        A: height of a tile of slots; a power of two, up to N.
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
    _copied(items, table, position, num_slots)
    _copied(items, best, position, num_slots)
    # An exchange leaves replica counts as they are, so this is said once.
    apart *= _weighed(table, tokens, share, load, num_steps, num_experts, num_slots, num_packs, N, M, S, A)
    _marked(table, holds, position, num_slots, num_packs, apart)

    # Step 10. Tolls count from the start.
    part = tl.load(ceiling + row)
    least, first, second = _ceilings_set(load, lower, part, num_steps, num_packs, M, S)
    paid, limits = least * 0, first
    for turn in range(2):
        least, paid = _exchanged_while_it_helps(
            table,
            best,
            share,
            load,
            None,
            above,
            holds,
            region,
            distance,
            price,
            limits,
            least,
            paid,
            apart,
            num_steps,
            num_slots,
            num_packs,
            num_scans,
            N,
            M,
            S,
            K,
            U,
        )
        if turn == 0:
            _ceilings_lowered(load, lower, num_steps, num_packs, M, S)
        limits = second
    _copied(best, table, position, num_slots)

    # Step 11.
    _weighed(table, tokens, share, load, num_steps, num_experts, num_slots, num_packs, N, M, S, A)
    _marked(table, holds, position, num_slots, num_packs, apart)
    _exchanged_while_it_helps(
        table,
        best,
        share,
        load,
        rest,
        above,
        holds,
        region,
        distance,
        price,
        limits,
        least,
        paid,
        apart,
        num_steps,
        num_slots,
        num_packs,
        num_scans,
        N,
        M,
        S,
        K,
        U,
    )


@triton.jit
def _exchanged_while_it_helps(
    table,
    best,
    share,
    load,
    rest,
    above,
    holds,
    region,
    distance,
    price,
    limits,
    least,
    paid,
    apart,
    num_steps,
    num_slots,
    num_packs,
    num_scans,
    N: tl.constexpr,
    M: tl.constexpr,
    S: tl.constexpr,
    K: tl.constexpr,
    U: tl.constexpr,
):
    """The exchanges of step 10 under one ceiling, where `rest` is None, or those of step 11.

    Step 10 writes the cheapest packing to `best [P]` and answers what it costs and what the last one's moves do.

    Args:
        limits: the ceilings, added up over the steps.
        least: cost of the packing in `best`.
        paid: tolls of the packing in `table` above those of the first.
        apart: 1 where there are replicas and no exchange may bring two of an expert into one pack, else 0.
    """
    size = num_slots // num_packs
    position, pack = tl.arange(0, N), tl.arange(0, M)
    tired = tl.full([M], 0, tl.int32)
    if rest is None:
        over, fullest = _standing_out(load, above, num_steps, num_packs, M, S)
    else:
        over, fullest = _alone(load, num_steps, num_packs, M, S)
    left = num_scans
    while left > 0:
        left -= 1
        most = tl.max(tl.where(tired > 0, 0, over), 0)
        if most > 0:
            here = first_of((over == most) & (tired == 0), pack)
            at_stake = most
            if rest is not None:
                _rest_written(load, rest, here, num_steps, num_packs, M, S)
                at_stake = fullest
            score, flat = _best_exchange(
                table,
                share,
                load,
                rest,
                above,
                holds,
                region,
                distance,
                price,
                here,
                at_stake,
                apart,
                num_steps,
                num_slots,
                num_packs,
                N,
                M,
                K,
                U,
            )
            if score > 0:
                paid += _exchanged(
                    table,
                    share,
                    load,
                    holds,
                    distance,
                    price,
                    here,
                    flat,
                    apart,
                    num_steps,
                    num_slots,
                    num_packs,
                    N,
                    M,
                    S,
                )
                if rest is None:
                    tired = tl.where((pack == here) | (pack == flat % num_slots // size), 0, tired)
                    over, fullest = _standing_out(load, above, num_steps, num_packs, M, S)
                    cost = limits + fullest + paid
                    if cost < least:
                        least = cost
                        _copied(table, best, position, num_slots)
                else:
                    tired = tl.full([M], 0, tl.int32)
                    over, fullest = _alone(load, num_steps, num_packs, M, S)
            else:
                tired = tl.where(pack == here, 1, tired)
        else:
            left = 0
    return least, paid


@triton.jit
def _best_exchange(
    table,
    share,
    load,
    rest,
    above,
    holds,
    region,
    distance,
    price,
    here,
    at_stake,
    apart,
    num_steps,
    num_slots,
    num_packs,
    N: tl.constexpr,
    M: tl.constexpr,
    K: tl.constexpr,
    U: tl.constexpr,
):
    """The exchange of pack `here` with the highest score, the first of equals: score, not positive for none; index.

    Args:
        rest: `[T, M]`, and the score is by how much the cost falls; or None, and it is what is taken away for its toll.
        at_stake: the fullest packs, added up over the steps; or how much pack `here` stands out.
    """
    size = num_slots // num_packs
    best = tl.full([K], 0, tl.int64)  # each cell's best score, over all tiles
    best_at = tl.full([K], 0, tl.int32)  # and the first exchange that has it
    for start in range(0, size * num_slots, K):
        nth = start + tl.arange(0, K)
        flat = tl.minimum(nth, size * num_slots - 1)  # padding looks at the last one, so that no load needs a mask
        slot, place = here * size + flat // num_slots, flat % num_slots
        there = place // size
        leaving, coming = tl.load(table + slot), tl.load(table + place)
        may = (nth == flat) & (there != here) & (leaving != coming)
        may = may & (tl.load(region + slot) == tl.load(region + place))
        is_bound = may & (flat < apart * size * num_slots)
        goes = tl.load(holds + leaving * num_packs + there, mask=is_bound, other=0)
        comes = tl.load(holds + coming * num_packs + here, mask=is_bound, other=0)
        may = may & ((goes | comes) == 0)
        after = tl.full([K], 0, tl.int32)  # the two packs above the ceiling, or the fullest pack; over all steps
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
                paid = _added_toll(distance, price, leaving, coming, here, there, num_packs)
                score = (tl.maximum(score, 0) << _SCORE_BITS) // (1 + tl.maximum(paid, 0))
        else:
            score = (at_stake - after).to(tl.int64)
            if distance is not None:
                score -= _added_toll(distance, price, leaving, coming, here, there, num_packs)
        score = tl.where(may, score, 0)
        best_at = tl.where(score > best, flat, best_at)
        best = tl.maximum(best, score)
    value = tl.max(best, 0)
    return value, first_of(best == value, best_at)


@triton.jit
def _added_toll(distance, price, leaving, coming, here, there, num_packs):
    """Tolls after less tolls before, where expert `leaving` of pack `here` and `coming` of `there` exchange; int64."""
    mine, other = distance + leaving * num_packs, distance + coming * num_packs
    after = tl.load(price + tl.load(mine + there)) + tl.load(price + tl.load(other + here))
    return after - tl.load(price + tl.load(mine + here)) - tl.load(price + tl.load(other + there))


@triton.jit
def _exchanged(
    table,
    share,
    load,
    holds,
    distance,
    price,
    here,
    flat,
    apart,
    num_steps,
    num_slots,
    num_packs,
    N: tl.constexpr,
    M: tl.constexpr,
    S: tl.constexpr,
):
    """Make the exchange `flat` of pack `here`, in all that is written about the row; the toll that it adds."""
    size = num_slots // num_packs
    one, other = here * size + flat // num_slots, flat % num_slots
    there = other // size
    leaving, coming = tl.load(table + one), tl.load(table + other)
    paid = leaving * 0
    if distance is not None:
        paid += _added_toll(distance, price, leaving, coming, here, there, num_packs)
    tl.debug_barrier()
    tl.store(table + one, coming)
    tl.store(table + other, leaving)
    for first in range(0, num_steps, S):
        step = first + tl.arange(0, S)
        is_step = step < num_steps
        shares, loads = share + step * N, load + step * M
        goes, comes = tl.load(shares + one, mask=is_step, other=0), tl.load(shares + other, mask=is_step, other=0)
        mine, theirs = tl.load(loads + here, mask=is_step, other=0), tl.load(loads + there, mask=is_step, other=0)
        tl.debug_barrier()
        tl.store(shares + one, comes, mask=is_step)
        tl.store(shares + other, goes, mask=is_step)
        tl.store(loads + here, mine - goes + comes, mask=is_step)
        tl.store(loads + there, theirs + goes - comes, mask=is_step)
    tl.debug_barrier()
    if apart > 0:
        # Of two replicas that were in one pack, the other is there still.
        position = tl.arange(0, N)
        item = tl.load(table + position, mask=position < num_slots, other=-1)
        stays = tl.max(((item == leaving) & (position // size == here)).to(tl.int32), 0)
        remains = tl.max(((item == coming) & (position // size == there)).to(tl.int32), 0)
        tl.store(holds + leaving * num_packs + here, stays)
        tl.store(holds + coming * num_packs + there, remains)
        tl.store(holds + leaving * num_packs + there, 1)
        tl.store(holds + coming * num_packs + here, 1)
        tl.debug_barrier()
    return paid


# --- what a row weighs ------------------------------------------------------------------------------------------


@triton.jit
def _weighed(
    table,
    tokens,
    share,
    load,
    num_steps,
    num_experts,
    num_slots,
    num_packs,
    N: tl.constexpr,
    M: tl.constexpr,
    S: tl.constexpr,
    A: tl.constexpr,
):
    """Write `share [T, N]` and `load [T, M]` for the packing in `table [P]`; 1 if an expert has replicas, else 0."""
    position, pack = tl.arange(0, N), tl.arange(0, M)
    is_real = position < num_slots
    item = tl.load(table + position, mask=is_real, other=-1)
    replicas = replicas_of(item, num_slots, N, A).to(tl.int32)
    tl.debug_barrier()
    for one in range(num_steps):
        weight = tl.load(tokens + one * num_experts + item, mask=is_real, other=0).to(tl.int32)
        tl.store(share + one * N + position, weight // tl.maximum(replicas, 1), mask=is_real)
    tl.debug_barrier()
    size = num_slots // num_packs
    for first in range(0, num_steps, S):
        step, cell, is_cell = _tile(first, num_steps, num_packs, M, S)
        total = tl.full([S, M], 0, tl.int32)
        for index in range(size):
            slots = step[:, None] * N + pack[None, :] * size + index
            total += tl.load(share + slots, mask=is_cell, other=0)
        tl.store(load + cell, total, mask=is_cell)
    tl.debug_barrier()
    return tl.where(tl.max(tl.where(is_real, replicas, 0), 0) > 1, 1, 0)


@triton.jit
def _marked(table, holds, position, num_slots, num_packs, apart):
    """Write to `holds [E, M]`, if `apart`, what the packing in `table [P]` holds, of its own experts."""
    size = num_slots // num_packs
    is_bound = position < apart * num_slots
    item = tl.load(table + position, mask=is_bound, other=0)
    tl.debug_barrier()
    for pack in range(apart * num_packs):
        tl.store(holds + item * num_packs + pack, 0, mask=is_bound)
    tl.debug_barrier()
    tl.store(holds + item * num_packs + position // size, 1, mask=is_bound)
    tl.debug_barrier()


@triton.jit
def _ceilings_set(load, lower, ceiling, num_steps, num_packs, M: tl.constexpr, S: tl.constexpr):
    """Take the first ceiling off `load [T, M]`, and write to `lower [T]` how far the second lies below it.

    Answers the fullest packs, the first ceilings and the second ones, each added up over the steps.
    """
    fullest, highs, lows = ceiling * 0, ceiling * 0, ceiling * 0
    for first in range(0, num_steps, S):
        step, cell, is_cell = _tile(first, num_steps, num_packs, M, S)
        value = tl.load(load + cell, mask=is_cell, other=0)
        peak, mean = tl.max(value, 1), tl.sum(value, 1) // num_packs  # [S]
        height = (peak - mean).to(tl.int64)
        high = mean + ((height * ceiling) >> _CEILING_BITS).to(tl.int32)
        low = mean + ((height * (ceiling >> 2)) >> _CEILING_BITS).to(tl.int32)
        tl.debug_barrier()
        tl.store(load + cell, value - high[:, None], mask=is_cell)
        tl.store(lower + step, high - low, mask=step < num_steps)
        fullest += tl.sum(peak, 0)
        highs += tl.sum(high, 0)
        lows += tl.sum(low, 0)
    tl.debug_barrier()
    return fullest, highs, lows


@triton.jit
def _ceilings_lowered(load, lower, num_steps, num_packs, M: tl.constexpr, S: tl.constexpr):
    """Take the second ceiling off `load [T, M]`, where the first was."""
    for first in range(0, num_steps, S):
        step, cell, is_cell = _tile(first, num_steps, num_packs, M, S)
        value = tl.load(load + cell, mask=is_cell, other=0)
        by = tl.load(lower + step, mask=step < num_steps, other=0)
        tl.debug_barrier()
        tl.store(load + cell, value + by[:, None], mask=is_cell)
    tl.debug_barrier()


@triton.jit
def _standing_out(load, above, num_steps, num_packs, M: tl.constexpr, S: tl.constexpr):
    """How much each pack stands out, `[M]`, also written to `above [M]`; and the fullest packs less the ceilings."""
    over, fullest = tl.full([M], 0, tl.int32), num_steps * 0
    for first in range(0, num_steps, S):
        step, cell, is_cell = _tile(first, num_steps, num_packs, M, S)
        value = tl.load(load + cell, mask=is_cell, other=_NOBODY)
        over += tl.sum(tl.maximum(value, 0), 0)
        fullest += tl.sum(tl.where(step < num_steps, tl.max(value, 1), 0), 0)
    pack = tl.arange(0, M)
    tl.debug_barrier()
    tl.store(above + pack, over, mask=pack < num_packs)
    tl.debug_barrier()
    return over, fullest


@triton.jit
def _alone(load, num_steps, num_packs, M: tl.constexpr, S: tl.constexpr):
    """`[M]`, by how much each pack is alone in being the fullest; and the fullest packs, added up over the steps."""
    over, fullest = tl.full([M], 0, tl.int32), num_steps * 0
    pack = tl.arange(0, M)[None, :]
    for first in range(0, num_steps, S):
        step, cell, is_cell = _tile(first, num_steps, num_packs, M, S)
        value = tl.load(load + cell, mask=is_cell, other=_NOBODY)
        top, who = _fullest(value, pack)
        is_first = pack == who[:, None]
        second = tl.max(tl.where(is_first, _NOBODY, value), 1)
        over += tl.sum(tl.where(is_first, (top - second)[:, None], 0), 0)
        fullest += tl.sum(tl.where(step < num_steps, top, 0), 0)
    return over, fullest


@triton.jit
def _rest_written(load, rest, here, num_steps, num_packs, M: tl.constexpr, S: tl.constexpr):
    """Write to `rest [T, M]` the fullest pack but for `here` and each one; 0 where there is none."""
    pack = tl.arange(0, M)[None, :]
    tl.debug_barrier()
    for first in range(0, num_steps, S):
        _, cell, is_cell = _tile(first, num_steps, num_packs, M, S)
        value = tl.where(pack == here, 0, tl.load(load + cell, mask=is_cell, other=0))
        top, who = _fullest(value, pack)
        is_first = pack == who[:, None]
        second = tl.max(tl.where(is_first, 0, value), 1)
        tl.store(rest + cell, tl.where(is_first, second[:, None], top[:, None]), mask=is_cell)
    tl.debug_barrier()


# --- small parts ------------------------------------------------------------------------------------------------


@triton.jit
def _tile(first, num_steps, num_packs, M: tl.constexpr, S: tl.constexpr):
    """Of S steps and all packs: the steps `[S]`, where the cells are in a tensor `[T, M]`, and which are no padding."""
    step, pack = first + tl.arange(0, S), tl.arange(0, M)
    is_cell = (step < num_steps)[:, None] & (pack < num_packs)[None, :]
    return step, step[:, None] * M + pack[None, :], is_cell


@triton.jit
def _fullest(value, pack):
    """`[S]` the largest of each row of `value [S, M]`, and which pack that is, the first of equals."""
    top = tl.max(value, 1)
    return top, tl.min(tl.where(value == top[:, None], pack, _LAST), 1)


@triton.jit
def _copied(source, target, position, num_slots):
    """Write the packing in `source [P]` to `target [P]`."""
    is_real = position < num_slots
    item = tl.load(source + position, mask=is_real, other=0)
    tl.debug_barrier()
    tl.store(target + position, item, mask=is_real)
    tl.debug_barrier()
