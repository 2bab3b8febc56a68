"""A row's state in memory in steps 10 and 11, in Triton. Only `cuda_settle` imports this; shapes as there.

By step: `share [T, N]`, the weight in a slot, and `load [T, M]`, the load of a pack, in step 10 minus the ceiling. Both
are padded, so that consecutive steps are a constant distance apart. Threads read what other threads wrote, so each
function that writes has a barrier before its first store, because another thread may still be reading the old value,
and one after its last.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# A kernel's arguments are whatever Triton makes of them, and Triton has no stubs.

from __future__ import annotations

import triton
import triton.language as tl

from distplb.packing.cuda_steps import replicas_of

__all__ = [
    "added_toll",
    "copy",
    "excess_of",
    "lead_of",
    "lower_ceilings",
    "set_ceilings",
    "write_exchange",
    "write_holds",
    "write_loads",
    "write_rest",
]

_CEILING_BITS = tl.constexpr(16)
_PADDING = tl.constexpr(-(1 << 30))  # value of padding, below every load minus a ceiling
_NO_PACK = tl.constexpr((1 << 31) - 1)  # above every index of a pack


@triton.jit
def added_toll(distance, price, leaving, coming, here, there, num_packs):
    """Toll added when expert `leaving` of pack `here` and `coming` of `there` are exchanged; int64."""
    mine, other = distance + leaving * num_packs, distance + coming * num_packs
    after = tl.load(price + tl.load(mine + there)) + tl.load(price + tl.load(other + here))
    return after - tl.load(price + tl.load(mine + here)) - tl.load(price + tl.load(other + there))


@triton.jit
def write_exchange(
    table, share, load, holds, distance, price, here, flat, apart, num_steps, num_slots, num_packs,
    N: tl.constexpr, M: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """Make the exchange `flat` of pack `here` in all of the row's state; returns the toll that it adds."""
    size = num_slots // num_packs
    one, other = here * size + flat // num_slots, flat % num_slots
    there = other // size
    leaving, coming = tl.load(table + one), tl.load(table + other)
    paid = leaving * 0
    if distance is not None:
        paid += added_toll(distance, price, leaving, coming, here, there, num_packs)
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
        # If a pack had two replicas of an expert, one is still there.
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


# --- loads of a row ---------------------------------------------------------------------------------------------


@triton.jit
def write_loads(
    table, tokens, share, load, num_steps, num_experts, num_slots, num_packs,
    N: tl.constexpr, M: tl.constexpr, S: tl.constexpr, A: tl.constexpr,
):  # fmt: skip
    """Write `share [T, N]` and `load [T, M]` of the packing in `table [P]`; returns 1 if there are replicas, else 0."""
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
def write_holds(table, holds, position, num_slots, num_packs, apart):
    """If `apart`, write to `holds [E, M]` which packs hold each of the experts in `table [P]`."""
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
def set_ceilings(load, lower, ceiling, num_steps, num_packs, M: tl.constexpr, S: tl.constexpr):
    """Subtract the first ceiling from `load [T, M]`, and write to `lower [T]` how far below it the second is.

    Returns the loads of the heaviest packs, the first ceilings and the second ones, each summed over the steps.
    """
    busiest, highs, lows = ceiling * 0, ceiling * 0, ceiling * 0
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
        busiest += tl.sum(peak, 0)
        highs += tl.sum(high, 0)
        lows += tl.sum(low, 0)
    tl.debug_barrier()
    return busiest, highs, lows


@triton.jit
def lower_ceilings(load, lower, num_steps, num_packs, M: tl.constexpr, S: tl.constexpr):
    """Subtract the second ceiling from `load [T, M]` instead of the first."""
    for first in range(0, num_steps, S):
        step, cell, is_cell = _tile(first, num_steps, num_packs, M, S)
        value = tl.load(load + cell, mask=is_cell, other=0)
        by = tl.load(lower + step, mask=step < num_steps, other=0)
        tl.debug_barrier()
        tl.store(load + cell, value + by[:, None], mask=is_cell)
    tl.debug_barrier()


@triton.jit
def excess_of(load, above, num_steps, num_packs, M: tl.constexpr, S: tl.constexpr):
    """Tokens of each pack above the ceilings, `[M]`, also written to `above [M]`; and the heaviest packs minus the
    ceilings. Both are summed over the steps.
    """
    over, busiest = tl.full([M], 0, tl.int32), num_steps * 0
    for first in range(0, num_steps, S):
        step, cell, is_cell = _tile(first, num_steps, num_packs, M, S)
        value = tl.load(load + cell, mask=is_cell, other=_PADDING)
        over += tl.sum(tl.maximum(value, 0), 0)
        busiest += tl.sum(tl.where(step < num_steps, tl.max(value, 1), 0), 0)
    pack = tl.arange(0, M)
    tl.debug_barrier()
    tl.store(above + pack, over, mask=pack < num_packs)
    tl.debug_barrier()
    return over, busiest


@triton.jit
def lead_of(load, num_steps, num_packs, M: tl.constexpr, S: tl.constexpr):
    """`[M]`: how far each pack leads the second-heaviest; and the heaviest packs' loads. Both summed over the steps."""
    over, busiest = tl.full([M], 0, tl.int32), num_steps * 0
    pack = tl.arange(0, M)[None, :]
    for first in range(0, num_steps, S):
        step, cell, is_cell = _tile(first, num_steps, num_packs, M, S)
        value = tl.load(load + cell, mask=is_cell, other=_PADDING)
        top, who = _busiest(value, pack)
        is_first = pack == who[:, None]
        second = tl.max(tl.where(is_first, _PADDING, value), 1)
        over += tl.sum(tl.where(is_first, (top - second)[:, None], 0), 0)
        busiest += tl.sum(tl.where(step < num_steps, top, 0), 0)
    return over, busiest


@triton.jit
def write_rest(load, rest, here, num_steps, num_packs, M: tl.constexpr, S: tl.constexpr):
    """Write to `rest [T, M]`, for each pack, the heaviest load of all but it and `here`; 0 if there is none."""
    pack = tl.arange(0, M)[None, :]
    tl.debug_barrier()
    for first in range(0, num_steps, S):
        _, cell, is_cell = _tile(first, num_steps, num_packs, M, S)
        value = tl.where(pack == here, 0, tl.load(load + cell, mask=is_cell, other=0))
        top, who = _busiest(value, pack)
        is_first = pack == who[:, None]
        second = tl.max(tl.where(is_first, 0, value), 1)
        tl.store(rest + cell, tl.where(is_first, second[:, None], top[:, None]), mask=is_cell)
    tl.debug_barrier()


# --- small parts ------------------------------------------------------------------------------------------------


@triton.jit
def _tile(first, num_steps, num_packs, M: tl.constexpr, S: tl.constexpr):
    """A tile of S steps and all packs: the steps `[S]`, the cells' offsets in `[T, M]`, and which are not padding."""
    step, pack = first + tl.arange(0, S), tl.arange(0, M)
    is_cell = (step < num_steps)[:, None] & (pack < num_packs)[None, :]
    return step, step[:, None] * M + pack[None, :], is_cell


@triton.jit
def _busiest(value, pack):
    """`[S]`: the largest value in each row of `value [S, M]`; and its pack, the first of equals."""
    top = tl.max(value, 1)
    return top, tl.min(tl.where(value == top[:, None], pack, _NO_PACK), 1)


@triton.jit
def copy(source, target, position, num_slots):
    """Write the packing in `source [P]` to `target [P]`."""
    is_real = position < num_slots
    item = tl.load(source + position, mask=is_real, other=0)
    tl.debug_barrier()
    tl.store(target + position, item, mask=is_real)
    tl.debug_barrier()
