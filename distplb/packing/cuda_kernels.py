"""The packing core's kernels in Triton: one program packs one row. Imported only if the engine `cuda` is used.

Shapes: X rows, n items, M packs, g = n / M items in each; with replicas E experts, P slots, G = P / M slots in each.
N ≥ n or P and B ≥ E are the powers of two that a row is padded to; A is the height of a tile: this many positions are
tried against all N at once. A row's packing stays in registers from its load to its store; the functions that change
it are in `cuda_steps`. The steps make the same choices as `packing.reference`, to the bit. Steps 10 and 11 are in
`cuda_settle`.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# A kernel's arguments are whatever Triton makes of them, and Triton has no stubs.

from __future__ import annotations

import triton
import triton.language as tl

from distplb.packing.cuda_settle import settle_kernel
from distplb.packing.cuda_steps import (
    HUGE,
    MAX_ROUNDS,
    NUMBERS,
    PAIR_ROUNDS,
    block_of,
    divide,
    exchange,
    first_of,
    greedy,
    loads_of,
    lower_max,
    mark,
    nth_giver,
    order_slots,
    peak_of,
    replicas_of,
    swap_pairs,
)

__all__ = [
    "INTERPRETED",
    "NUMBERS",
    "greedy_kernel",
    "max_kernel",
    "pairs_kernel",
    "polish_kernel",
    "refine_kernel",
    "settle_kernel",
    "variance_kernel",
]

_VARIANCE_ROUNDS = tl.constexpr(10)
_VARIANCE_TOTAL = tl.constexpr(1 << 30)
_PARTNERS = tl.constexpr(4)  # number of packs, lightest first, with which step 9 tries pair swaps
# Step 8 works on rows whose heaviest pack is more than 2^-8 above the mean.
_WORTH_BITS, _GIVERS = tl.constexpr(8), tl.constexpr(8)


@triton.jit
def greedy_kernel(weight, order, items, num_items, size, N: tl.constexpr, M: tl.constexpr):
    """Step 2: put each item into the lightest pack that is not full.

    Args:
        weight: `[X, n]` int64, in descending order of key.
        order: `[X, n]` int64, the item that each weight belongs to.
        items: `[X, n]` int64, written only.
        num_items: n.
        size: g.
        N: a power of two, at least n.
        M: a power of two, at least the number of packs.
    """
    row = tl.program_id(0).to(tl.int64) * num_items
    begin = tl.arange(0, M).to(tl.int64) * size  # [M], each pack's first position
    end = begin + size
    # A pack's load and, in the low bits, its next free position: one reduction finds the first lightest pack and the
    # place in it. 40 bits of load, 12 bits of position.
    key = tl.where(begin < num_items, begin, HUGE)  # [M]
    for step in range(num_items):
        item = tl.load(order + row + step)
        gained = tl.load(weight + row + step)
        lightest = tl.min(key, 0)
        place = lightest & (N - 1)
        tl.store(items + row + place, item)
        filled = tl.where(place + 1 == end, HUGE, key + gained * N + 1)
        key = tl.where(key == lightest, filled, key)


@triton.jit
def variance_kernel(weight, items, result, num_items, size, N: tl.constexpr, A: tl.constexpr):
    """Step 3: make the swap that lowers the sum of squared pack loads most, as long as there is one.

    Args:
        weight: `[X, n]` int64.
        items: `[X, n]` int64, the initial packing.
        result: `[X, n]` int64, written only.
        num_items: n.
        size: g.
        N: a power of two, at least n.
        A: a power of two, at most N.
    """
    row, position, is_real, begin, item, own = _row(weight, items, num_items, size, N)
    shift = _variance_shift(tl.sum(own, 0))
    # All of these are at most 2^30 in magnitude, so int32 holds them and their differences; products need int64.
    load = _pack_load(weight + row, items + row, begin, size, is_real, shift).to(tl.int32)  # [N]
    own = (own >> shift).to(tl.int32)
    left = _VARIANCE_ROUNDS
    while left > 0:
        # Padding has own 0 and the smallest possible rest, with which no change is negative.
        rest = tl.where(is_real, own - load, -_VARIANCE_TOTAL)  # [N]
        best = tl.full([A, N], 0, tl.int64)  # each cell's best change, over all tiles
        best_at = tl.full([A, N], 0, tl.int32)  # and the first position on the other side that makes it
        for first in range(0, num_items, A):
            own_at, rest_at = block_of(own, first, N, A), block_of(rest, first, N, A)  # [A]
            difference, apart = own_at[:, None] - own[None, :], rest_at[:, None] - rest[None, :]  # [A, N]
            change = difference.to(tl.int64) * apart.to(tl.int64)
            best_at = tl.where(change < best, first + tl.arange(0, A)[:, None], best_at)
            best = tl.minimum(best, change)
        value = tl.min(tl.min(best, 1), 0)
        if value < 0:
            flat = first_of(best == value, best_at * num_items + position[None, :])
            here, there = flat // num_items, flat % num_items
            item, own, load = exchange(item, own, load, position, begin, size, here, there)
            left -= 1
        else:
            left = 0
    tl.store(result + row + position, item, mask=is_real)


@triton.jit
def max_kernel(weight, items, result, num_items, size, rounds, N: tl.constexpr, A: tl.constexpr):
    """Steps 4 and 7: make the swap with the heaviest pack that minimises the heavier of the two packs.

    Arguments as for `variance_kernel`, and:
        rounds: maximum number of swaps.
    """
    row, position, is_real, begin, item, own = _row(weight, items, num_items, size, N)
    load = _pack_load(weight + row, items + row, begin, size, is_real, 0)  # [N]; huge for padding: never a partner
    item, own, load = lower_max(item, own, load, position, num_items, size, rounds, None, 1, 0, N, A)
    tl.store(result + row + position, item, mask=is_real)


@triton.jit
def pairs_kernel(
    weight, items, result, pairs, num_items, size, num_pairs, N: tl.constexpr, Q: tl.constexpr, A: tl.constexpr
):
    """Step 6: swap two items of the heaviest pack for the two of the lightest that leave the smallest difference.

    Arguments as for `variance_kernel`, and:
        pairs: `[2, q]` int64, pairs of positions in a pack, first < second, in lexicographic order.
        num_pairs: q.
        Q: a power of two, at least q.
        A: a power of two, at most Q.
    """
    row, position, is_real, begin, item, own = _row(weight, items, num_items, size, N)
    load = _pack_load(weight + row, items + row, begin, size, is_real, 0)  # [N], huge for padding
    item, own, load, _ = swap_pairs(
        item, own, load, position, num_items, size, PAIR_ROUNDS, 0, pairs, num_pairs, None, 1, 0, Q, A
    )
    tl.store(result + row + position, item, mask=is_real)


@triton.jit(do_not_specialize=NUMBERS)
def refine_kernel(
    weight, key, result, table, best, order, share, holds, pairs,
    num_experts, num_slots, num_packs, num_pairs, pair_rounds, attempts, begin_with, end_with,
    B: tl.constexpr, M: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, R: tl.constexpr, A: tl.constexpr,
    A2: tl.constexpr,
):  # fmt: skip
    """Steps 0 to 8 with replicas: the search that keeps them apart, then the free search if it can differ.

    Args:
        weight: `[X, E]` int64.
        key: `[X, E]` int64.
        result: `[X, P]` int64, written only.
        table: `[X, P]` int64, scratch: the packing after step 2.
        best: `[X, P]` int64, scratch: the best packing of a search.
        order: `[X, P]` int64, scratch.
        share: `[X, E]` int64, scratch: the weight of one replica.
        holds: `[X, E, M]` int8, scratch: all 0 before and after.
        pairs: as for `pairs_kernel`.
        num_experts: E.
        num_slots: P.
        num_packs: M.
        num_pairs: q.
        pair_rounds: rounds of step 6; 0 if packs are too small or too large for it, or there is only one.
        attempts: maximum number of tries of step 8; 0 if packs have one slot.
        begin_with: 0, or 1 to skip the first search because there is no room to keep replicas apart.
        end_with: 2, or 1 to skip the second search because replicas must stay apart.
        B: a power of two, at least E.
        M: a power of two, at least the number of packs.
        N: a power of two, at least P.
        Q: a power of two, at least q.
        R, A, A2: heights of tiles when ordering slots, in steps 4 and 7, and in step 6; powers of two, at most B, N
            and Q.
    """
    row = tl.program_id(0).to(tl.int64)
    weight += row * num_experts
    key += row * num_experts
    share += row * num_experts
    result += row * num_slots
    table += row * num_slots
    best += row * num_slots
    order += row * num_slots
    holds += row * num_experts * num_packs
    size = num_slots // num_packs
    expert, position = tl.arange(0, B), tl.arange(0, N)
    is_expert, is_real = expert < num_experts, position < num_slots
    value = tl.load(weight + expert, mask=is_expert, other=0)  # [B]
    noisy = tl.load(key + expert, mask=is_expert, other=0)  # [B]
    mean = tl.sum(value, 0) // num_packs
    lightest = tl.sum(value, 0) * 0 + HUGE  # load of the heaviest pack in the better search
    for search in range(begin_with, end_with):
        apart = 1 - search
        most = tl.where(apart > 0, num_packs, num_slots)
        replicas = divide(noisy, expert, num_experts, num_slots, most, B)  # [B], of the best packing
        tried = replicas
        peak, heavy = lightest * 0 + HUGE, num_slots * 0  # of the best packing's heaviest pack: load and first position
        # If the free start puts no expert twice into a pack, the second search ends there.
        is_needed = tl.where((search > 0) & (begin_with == 0), 0, 1)
        left, tries, is_tried = attempts, 0, 1
        while is_tried > 0:
            item, load, goes_on = _pack_once(
                value, noisy, tried, expert, position, table, order, share, holds, pairs,
                num_experts, num_slots, num_packs, num_pairs, pair_rounds, apart, is_needed, B, M, N, Q, R, A, A2,
            )  # fmt: skip
            is_needed = 1
            lower = tl.where(goes_on > 0, peak_of(load), HUGE)
            left = left * goes_on
            if lower < peak:
                tl.store(best + position, item, mask=is_real)
                tl.debug_barrier()
                peak, heavy, replicas, tries = lower, first_of(load == lower, position), tried, 0
            tried, is_tried, left, tries = _next_try(
                value, expert, replicas, best + heavy, peak, mean, most, size, left, tries, B
            )
        if peak < lightest:
            lightest = peak
            tl.store(result + position, tl.load(best + position, mask=is_real, other=0), mask=is_real)
        tl.debug_barrier()


@triton.jit
def _pack_once(
    value, noisy, replicas, expert, position, table, order, share, holds, pairs,
    num_experts, num_slots, num_packs, num_pairs, pair_rounds, apart, is_needed,
    B: tl.constexpr, M: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, R: tl.constexpr, A: tl.constexpr,
    A2: tl.constexpr,
):  # fmt: skip
    """Steps 2 to 7 with the counts `replicas [B]`; returns item and pack load by position, and if it passed step 2.

    If `is_needed` is 0, only a packing that has an expert twice in a pack goes beyond step 2.
    """
    size = num_slots // num_packs
    tl.debug_barrier()  # another thread may still be reading what is overwritten now
    tl.store(share + expert, value // tl.maximum(replicas, 1), mask=expert < num_experts)
    order_slots(noisy, replicas, expert, num_experts, order, B, R)
    tl.store(table + position, -1, mask=position < num_slots)
    tl.debug_barrier()
    greedy(table, order, share, position, num_slots, size, apart, N, M)
    tl.debug_barrier()
    item, own, load, is_crowded = loads_of(table, share, position, num_slots, size)
    mark(holds, item, position, num_slots, size, num_packs, apart, 1)
    goes_on = tl.where(is_crowded, 1, is_needed)
    for again in range(2 * goes_on):
        rounds = MAX_ROUNDS + again * 4 * num_packs
        item, own, load = lower_max(item, own, load, position, num_slots, size, rounds, holds, num_packs, apart, N, A)
        rounds = (1 - again) * pair_rounds
        item, own, load, _ = swap_pairs(
            item, own, load, position, num_slots, size, rounds, 0, pairs, num_pairs, holds, num_packs, apart, Q, A2
        )
    mark(holds, item, position, num_slots, size, num_packs, apart, 0)
    return item, load, goes_on


@triton.jit
def _next_try(value, expert, replicas, heaviest, peak, mean, most, size, left, tries, B: tl.constexpr):
    """Step 8: the replica counts to try next, whether there are any, the attempts left and the tries made.

    Try j gives a replica to the expert at position j mod G of the heaviest pack, which begins at `heaviest`, and takes
    it from giver j div G.
    """
    givers = tl.minimum(tl.sum((replicas > 1).to(tl.int32), 0), _GIVERS)
    tried, is_tried = replicas, 0
    while (left > 0) & (is_tried == 0):
        left -= 1
        if (((peak - mean) << _WORTH_BITS) > mean) & (tries < givers * size):
            taker = tl.load(heaviest + tries % size)
            giver = nth_giver(value, replicas, expert, tries // size, B)
            tries += 1
            count = tl.sum(tl.where(expert == taker, replicas, 0), 0)
            if (giver != taker) & (count < most):
                is_tried = 1
                tried = replicas + (expert == taker).to(tl.int64) - (expert == giver).to(tl.int64)
        else:
            left = 0
    return tried, is_tried, left, tries


@triton.jit(do_not_specialize=NUMBERS)
def polish_kernel(
    weight, items, result, share, holds, pairs, num_experts, num_slots, num_packs, num_pairs, pair_rounds,
    N: tl.constexpr, Q: tl.constexpr, A: tl.constexpr, A2: tl.constexpr,
):  # fmt: skip
    """Step 9: swap pairs with each of the lightest packs, with step 7 after each swap, as long as that helps.

    Args:
        weight: `[X, E]` int64.
        items: `[X, P]` int64, the initial packing.
        result: `[X, P]` int64, written only.
        share: `[X, E]` int64, scratch: the weight of one replica, for the experts in the packing.
        holds: `[X, E, M]` int8, all 0.
        pair_rounds: 0 if packs are too small or too large for pair swaps, or there is only one.
        others: as for `refine_kernel`.
    """
    row = tl.program_id(0).to(tl.int64)
    weight += row * num_experts
    share += row * num_experts
    items += row * num_slots
    result += row * num_slots
    holds += row * num_experts * num_packs
    size = num_slots // num_packs
    position = tl.arange(0, N)
    is_real = position < num_slots
    item = tl.load(items + position, mask=is_real, other=-1)
    replicas = replicas_of(item, num_slots, N, A)
    value = tl.load(weight + item, mask=is_real, other=0)
    tl.store(share + item, value // tl.maximum(replicas, 1), mask=is_real)
    tl.debug_barrier()
    item, own, load, is_crowded = loads_of(items, share, position, num_slots, size)
    # The rule applies to rows that have replicas, all of them apart.
    apart = tl.where((is_crowded == 0) & (tl.max(tl.where(is_real, replicas, 0), 0) > 1), 1, 0)
    mark(holds, item, position, num_slots, size, num_packs, apart, 1)
    partners = tl.minimum(_PARTNERS, num_packs - 1)
    rounds = MAX_ROUNDS + 4 * num_packs
    left = pair_rounds
    while left > 0:
        left -= 1
        partner, num_swaps = 0, 0
        while (partner < partners) & (num_swaps == 0):
            item, own, load, num_swaps = swap_pairs(
                item, own, load, position, num_slots, size, 1, partner, pairs, num_pairs, holds, num_packs, apart, Q, A2
            )
            partner += 1
        if num_swaps > 0:
            item, own, load = lower_max(
                item, own, load, position, num_slots, size, rounds, holds, num_packs, apart, N, A
            )
        else:
            left = 0
    tl.store(result + position, item, mask=is_real)


@triton.jit
def _row(weight, items, num_items, size, N: tl.constexpr):
    """The start of this program's row; and by position `[N]`: the position, whether it is real, the first position of
    its pack, its item and the item's weight.
    """
    row = tl.program_id(0).to(tl.int64) * num_items
    position = tl.arange(0, N)
    is_real = position < num_items
    item = tl.load(items + row + position, mask=is_real, other=0)
    own = tl.load(weight + row + item, mask=is_real, other=0)
    return row, position, is_real, position // size * size, item, own


@triton.jit
def _pack_load(weight, items, begin, size, is_real, shift):
    """`[N]` int64: the load of each position's pack, with weights shifted right; huge for padding."""
    load = begin.to(tl.int64) * 0
    for index in range(size):
        item = tl.load(items + begin + index, mask=is_real, other=0)
        load += tl.load(weight + item, mask=is_real, other=0) >> shift
    return tl.where(is_real, load, HUGE)


@triton.jit
def _variance_shift(total):
    """The smallest shift right after which `total` is at most 2^30."""
    return tl.sum(((total >> tl.arange(0, 64)) > _VARIANCE_TOTAL).to(tl.int32), 0)


INTERPRETED = not isinstance(greedy_kernel, triton.JITFunction)  # TRITON_INTERPRET=1 was set when this was imported
