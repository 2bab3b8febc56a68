"""The packing core's steps in Triton, on one row. Only the `cuda_*` modules import this.

Shapes: E experts, P slots, M packs, G = P / M slots in each; N ≥ P and B ≥ E are the powers of two that a row is padded
to; A is the height of a tile: this many positions are tried against all N at once. Without replicas slots are items,
and P = n, G = g. A row's packing is in registers, by position: `item`; `own`, its weight; `load`, the load of its
pack, huge for padding. Swaps are masks, and single elements are picked by masked sums, so that threads hardly ever
read what another one wrote to memory; where they do, there is a barrier.

The rule that replicas of an expert stay apart needs `holds [E, M]` int8 in memory: whether a pack holds an expert. It
is None if there are no replicas, and is not read if `apart` (0 or 1) is 0.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# A kernel's arguments are whatever Triton makes of them, and Triton has no stubs.

from __future__ import annotations

import triton
import triton.language as tl

__all__ = [
    "HUGE",
    "MAX_ROUNDS",
    "NUMBERS",
    "PAIR_ROUNDS",
    "block_of",
    "divide",
    "exchange",
    "first_of",
    "greedy",
    "loads_of",
    "lower_max",
    "mark",
    "nth_giver",
    "order_slots",
    "peak_of",
    "replicas_of",
    "swap_pairs",
]

MAX_ROUNDS = tl.constexpr(50)
PAIR_ROUNDS = tl.constexpr(20)
HUGE = tl.constexpr(1 << 62)  # above every load and every packed key; the value of padding and full packs
_NONE = tl.constexpr((1 << 31) - 1)  # above every flat index, all of which fit into int32
# Integers that change from call to call; Triton would compile a separate version for each that is 1.
NUMBERS = ["num_experts", "num_slots", "num_packs", "num_pairs", "pair_rounds", "attempts", "begin_with", "end_with"]
NUMBERS += ["num_steps", "num_scans", "apart"]


# --- steps 0 to 2 with replicas ---------------------------------------------------------------------------------


@triton.jit
def divide(key, expert, num_experts, num_slots, most, B: tl.constexpr):
    """Step 0: `[B]` int64 replicas of each expert, 0 for padding; each next one goes to the largest key / replicas.

    `key [B]` int64, `expert [B]` counts from 0; no expert gets more than `most`.
    """
    replicas = (expert < num_experts).to(tl.int64)
    # Share and, in the low bits, the expert counted from the end: the largest of these is the first largest share.
    packed = tl.where((replicas > 0) & (most > 1), key * B + (B - 1 - expert), -1)
    for _ in range(num_slots - num_experts):
        is_largest = packed == tl.max(packed, 0)
        replicas += is_largest.to(tl.int64)
        share = key // tl.maximum(replicas, 1)
        packed = tl.where(is_largest, tl.where(replicas < most, share * B + (B - 1 - expert), -1), packed)
    return replicas


@triton.jit
def order_slots(key, replicas, expert, num_experts, order, B: tl.constexpr, A: tl.constexpr):
    """Write to `order [P]` the expert of each slot in descending order of key / replicas; ties in order of experts."""
    share = key // tl.maximum(replicas, 1)
    packed = tl.where(expert < num_experts, share * B + (B - 1 - expert), -1)  # [B], no two the same except padding
    start = expert.to(tl.int64) * 0  # [B], number of slots before the expert's
    for first in range(0, num_experts, A):
        is_before = block_of(packed, first, B, A)[:, None] > packed[None, :]  # [A, B]
        start += tl.sum(tl.where(is_before, block_of(replicas, first, B, A)[:, None], 0), 0)
    for nth in range(tl.max(replicas, 0)):
        tl.store(order + start + nth, expert, mask=nth < replicas)


@triton.jit
def greedy(table, order, share, position, num_slots, size, apart, N: tl.constexpr, M: tl.constexpr):
    """Step 2: put each slot into the lightest pack that is not full and, with `apart`, does not hold the expert.

    Writes `table [P]`; reads `order [P]` and `share [E]`, which other threads may have written: the caller places a
    barrier before and after. M is a power of two, at least the number of packs.
    """
    begin = tl.arange(0, M).to(tl.int64) * size  # [M], each pack's first position
    end = begin + size
    key = tl.where(begin < num_slots, begin, HUGE)  # [M], load and next free position, as in `greedy_kernel`
    # An expert's replicas come one after the other, so one mask records which packs hold the expert.
    held, last = begin < 0, tl.load(order) * 0 - 1
    for step in range(num_slots):
        expert = tl.load(order + step)
        held = held & (expert == last)
        last = expert
        minimum = tl.min(tl.where(held, HUGE, key), 0)
        placed = expert
        if minimum == HUGE:  # every pack with room holds it
            minimum = tl.min(key, 0)
            to = (minimum & (N - 1)) // size * size
            place, placed = _displace(table, share, expert, to, position, num_slots, size)
            held = held | (begin == place // size * size)
        slot = minimum & (N - 1)
        tl.store(table + slot, placed)
        filled = tl.where(slot + 1 == end, HUGE, key + tl.load(share + placed) * N + 1)
        is_chosen = key == minimum
        key = tl.where(is_chosen, filled, key)
        held = held | (is_chosen & (apart > 0))


@triton.jit
def _displace(table, share, expert, to, position, num_slots, size):
    """Put `expert`, which the pack that begins at `to` already holds, in the place of another; returns place and other.

    As in `steps._displace`. The pack that changes is full, or it would have had room, so its load is not needed again.
    """
    tl.debug_barrier()  # a single thread wrote the slots
    is_real = position < num_slots
    begin = position // size * size
    other = tl.load(table + position, mask=is_real, other=-1)  # [N], -1 where a slot is still empty
    is_barred = other < 0
    for index in range(size):
        beside = tl.load(table + begin + index, mask=is_real, other=-1)
        is_barred = is_barred | (beside == expert) | (other == tl.load(table + to + index))
    distance = tl.abs(tl.load(share + tl.maximum(other, 0)) - tl.load(share + expert))
    distance = tl.where(is_barred, HUGE, distance)
    place = first_of(distance == tl.min(distance, 0), position)
    leaves = tl.sum(tl.where(position == place, other, 0), 0)
    tl.debug_barrier()  # another thread may still be reading what is overwritten now
    tl.store(table + place, expert)
    return place, leaves


@triton.jit
def loads_of(table, share, position, num_slots, size):
    """The state of the packing in `table [P]`: item, own weight, pack load; and whether a pack holds an item twice."""
    is_real = position < num_slots
    begin = position // size * size
    item = tl.load(table + position, mask=is_real, other=0)
    own = tl.load(share + item, mask=is_real, other=0)
    load, equal = own * 0, own * 0
    for index in range(size):
        beside = tl.load(table + begin + index, mask=is_real, other=0)
        load += tl.load(share + beside, mask=is_real, other=0)
        equal += (beside == item).to(tl.int64)  # counts itself once
    return item, own, tl.where(is_real, load, HUGE), tl.max(tl.where(is_real, equal, 0), 0) > 1


# --- steps 4, 6, 7 ----------------------------------------------------------------------------------------------


@triton.jit
def lower_max(
    item, own, load, position, num_slots, size, rounds, holds, num_packs, apart, N: tl.constexpr, A: tl.constexpr
):
    """Steps 4 and 7: make the swap with the heaviest pack that minimises the heavier of the two packs."""
    begin = position // size * size
    left = rounds
    while left > 0:
        peak = peak_of(load)
        heavy = first_of(load == peak, position)  # the heaviest pack's first position
        best = tl.full([A, N], 0, tl.int64) + peak
        best_at = tl.full([A, N], 0, tl.int32)
        if holds is not None:  # [N], whether the heaviest pack holds the item of a position
            comes = tl.load(holds + item * num_packs + heavy // size, mask=position < apart * num_slots, other=0)
        for first in range(0, size, A):
            at = first + tl.arange(0, A)  # [A], in the heaviest pack
            # Positions past the pack's last item have weight 0, and giving up 0 never makes the pack lighter.
            own_at = tl.where(at < size, _pick(own, position, heavy + at), 0)
            lost = own_at[:, None] - own[None, :]  # [A, N], what the heaviest pack would lose
            worst = tl.maximum(load[None, :] + lost, peak - lost)
            if holds is not None:
                held = holds + _pick(item, position, heavy + at)[:, None] * num_packs + (position // size)[None, :]
                goes = tl.load(held, mask=(position < apart * num_slots)[None, :], other=0)  # [A, N]
                worst = tl.where((goes | comes[None, :]) != 0, HUGE, worst)
            best_at = tl.where(worst < best, at[:, None], best_at)
            best = tl.minimum(best, worst)
        value = tl.min(tl.min(best, 1), 0)
        if value < peak:
            flat = first_of(best == value, best_at * num_slots + position[None, :])
            here, there = heavy + flat // num_slots, flat % num_slots
            if holds is not None:
                _record_exchange(holds, item, position, size, here, there, num_packs, apart)
            item, own, load = exchange(item, own, load, position, begin, size, here, there)
            left -= 1
        else:
            left = 0
    return item, own, load


@triton.jit
def swap_pairs(
    item, own, load, position, num_slots, size, rounds, partner, pairs, num_pairs, holds, num_packs, apart,
    Q: tl.constexpr, A: tl.constexpr,
):  # fmt: skip
    """Step 6: swap two items of the heaviest pack for the two of the lightest that leave the smallest difference.

    The lightest here is the `partner`-th lightest, counted from 0. Returns item, own, load and the number of swaps.

    Args:
        pairs: `[2, q]` int64, pairs of positions in a pack, first < second, in lexicographic order.
        num_pairs: q.
        Q: a power of two, at least q.
        A: a power of two, at most Q.
    """
    begin = position // size * size
    inside, pair = tl.arange(0, 16), tl.arange(0, Q)
    is_pair = pair < num_pairs
    one = tl.load(pairs + pair, mask=is_pair, other=0)[:, None]  # [Q, 1]
    two = tl.load(pairs + num_pairs + pair, mask=is_pair, other=0)[:, None]
    in_pair = (one == inside[None, :]) | (two == inside[None, :])  # [Q, 16]
    left, num_swaps = rounds, 0
    while left > 0:
        peak = peak_of(load)
        low, light = _nth_lightest(load, begin, partner)
        gap = peak - low
        heavy = first_of(load == peak, position)
        of_heavy, of_light = _pick(own, position, heavy + inside), _pick(own, position, light + inside)  # [16]
        from_heavy = tl.sum(tl.where(in_pair, of_heavy[None, :], 0), 1)  # [Q]
        from_light = tl.sum(tl.where(in_pair, of_light[None, :], 0), 1)
        if holds is not None:  # [Q], whether the other pack already holds one of the two
            goes = _held_pairs(holds, item, position, heavy, light, in_pair, size, num_packs, apart)
            comes = _held_pairs(holds, item, position, light, heavy, in_pair, size, num_packs, apart)
        best = tl.full([A, Q], 0, tl.int64) + gap
        best_at = tl.full([A, Q], 0, tl.int32)
        for first in range(0, num_pairs, A):
            at = first + tl.arange(0, A)  # [A]
            difference = block_of(from_heavy, first, Q, A)[:, None] - from_light[None, :]  # [A, Q]
            remains = tl.where((at < num_pairs)[:, None] & is_pair[None, :], tl.abs(gap - 2 * difference), gap)
            if holds is not None:
                remains = tl.where((block_of(goes, first, Q, A)[:, None] | comes[None, :]) != 0, HUGE, remains)
            best_at = tl.where(remains < best, at[:, None], best_at)
            best = tl.minimum(best, remains)
        value = tl.min(tl.min(best, 1), 0)
        if value < gap:
            flat = first_of(best == value, best_at * num_pairs + pair[None, :])
            mine, other = pairs + flat // num_pairs, pairs + flat % num_pairs
            for nth in range(2):
                here, there = heavy + tl.load(mine + nth * num_pairs), light + tl.load(other + nth * num_pairs)
                if holds is not None:
                    _record_exchange(holds, item, position, size, here, there, num_packs, apart)
                item, own, load = exchange(item, own, load, position, begin, size, here, there)
            left -= 1
            num_swaps += 1
        else:
            left = 0
    return item, own, load, num_swaps


@triton.jit
def _held_pairs(holds, item, position, source, target, in_pair, size, num_packs, apart):
    """`[Q]`: nonzero for each pair in the pack at `source` of which the pack at `target` holds one."""
    inside = tl.arange(0, 16)
    held = holds + _pick(item, position, source + inside) * num_packs + target // size  # [16]
    is_held = tl.load(held, mask=inside < apart * size, other=0).to(tl.int32)
    return tl.max(tl.where(in_pair, is_held[None, :], 0), 1)


@triton.jit
def _nth_lightest(load, begin, nth):
    """Load and first position of the `nth` lightest pack, counted from 0; ties in order of positions."""
    low = tl.min(load, 0)
    light = first_of(load == low, begin)
    for _ in range(nth):
        is_later = (load > low) | ((load == low) & (begin > light))
        low = tl.min(tl.where(is_later, load, HUGE), 0)
        light = first_of(is_later & (load == low), begin)
    return low, light


# --- the rule, and step 8 ---------------------------------------------------------------------------------------


@triton.jit
def mark(holds, item, position, num_slots, size, num_packs, apart, value: tl.constexpr):
    """If `apart`, set `holds [E, M]` to `value` for the packing's items, visible to all threads."""
    tl.debug_barrier()
    tl.store(holds + item * num_packs + position // size, value, mask=position < apart * num_slots)
    tl.debug_barrier()


@triton.jit
def _record_exchange(holds, item, position, size, here, there, num_packs, apart):
    """If `apart`, record in `holds [E, M]` that two positions of different packs exchange their items."""
    if apart > 0:
        leaves = tl.sum(tl.where(position == here, item, 0), 0) * num_packs
        comes = tl.sum(tl.where(position == there, item, 0), 0) * num_packs
        tl.debug_barrier()  # another thread may still be reading what is overwritten now
        tl.store(holds + leaves + here // size, 0)
        tl.store(holds + comes + there // size, 0)
        tl.store(holds + leaves + there // size, 1)
        tl.store(holds + comes + here // size, 1)
        tl.debug_barrier()  # all threads read it next


@triton.jit
def nth_giver(weight, replicas, expert, nth, B: tl.constexpr):
    """The expert whose replicas would weigh the `nth` least, counted from 0, after losing one; must exist."""
    share = weight // tl.maximum(replicas - 1, 1)
    packed = tl.where(replicas > 1, share * B + expert, HUGE)  # [B]
    minimum = tl.min(packed, 0)
    for _ in range(nth):
        minimum = tl.min(tl.where(packed > minimum, packed, HUGE), 0)
    return minimum & (B - 1)


# --- small parts ------------------------------------------------------------------------------------------------


@triton.jit
def peak_of(load):
    """The heaviest pack's load."""
    return tl.max(tl.where(load < HUGE, load, 0), 0)


@triton.jit
def block_of(value, first, N: tl.constexpr, A: tl.constexpr):
    """`[A]`: the elements of `value [N]` at positions `first` and on, where `first` is a multiple of A."""
    tile = tl.reshape(value, (N // A, A))
    return tl.sum(tl.where(tl.arange(0, N // A)[:, None] == first // A, tile, 0), 0)


@triton.jit
def _pick(value, position, at):
    """`[A]`: the elements of `value [N]` at any positions `at [A]`; 0 beyond the last."""
    return tl.sum(tl.where(at[:, None] == position[None, :], value[None, :], 0), 1)


@triton.jit
def replicas_of(item, num_slots, N: tl.constexpr, A: tl.constexpr):
    """`[N]` int64: how many slots have the same `item [N]` as each position; padding has an item of its own."""
    replicas = item * 0
    for first in range(0, num_slots, A):
        is_same = block_of(item, first, N, A)[:, None] == item[None, :]  # [A, N]
        replicas += tl.sum(is_same.to(tl.int64), 0)
    return replicas


@triton.jit
def first_of(is_best, flat):
    """The smallest of the int32 indices `flat`, of any shape, where `is_best`."""
    return tl.min(tl.where(is_best, flat, _NONE))


@triton.jit
def exchange(item, own, load, position, begin, size, here, there):
    """Item, weight and pack load by position `[N]` after two positions of different packs exchange their items."""
    is_here, is_there = position == here, position == there
    lost = tl.sum(tl.where(is_here, own, tl.where(is_there, -own, 0)), 0)
    load -= tl.where(begin == here // size * size, lost, 0)
    load += tl.where(begin == there // size * size, lost, 0)
    own += tl.where(is_there, lost, tl.where(is_here, -lost, 0))
    ahead = tl.sum(tl.where(is_here, item, tl.where(is_there, -item, 0)), 0)
    item += tl.where(is_there, ahead, tl.where(is_here, -ahead, 0))
    return item, own, load
