"""The packing core's kernels in Triton: one program packs one row. Imported only where the engine `cuda` is used.

Shapes: X rows, n items, M packs, g = n / M items in each, N ≥ n the power of two that a row is padded to, A a tile's
height: that many positions are tried against all N at once. A row's packing stays in registers from its load to its
store, so that no thread ever waits for what another one wrote to memory: swaps are masks, and single elements are
picked by masked sums. Steps and choices are `packing.reference`'s, to the bit.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# A kernel's arguments are whatever Triton makes of them, and Triton has no stubs.

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["INTERPRETED", "greedy_kernel", "max_kernel", "pairs_kernel", "variance_kernel"]

_VARIANCE_ROUNDS = tl.constexpr(10)
_MAX_ROUNDS = tl.constexpr(50)
_PAIR_ROUNDS = tl.constexpr(20)
_VARIANCE_TOTAL = tl.constexpr(1 << 30)
_HUGE = tl.constexpr(1 << 62)  # above every load and every greedy key: what padding and full packs have
_NONE = tl.constexpr((1 << 31) - 1)  # above every flat index, which stay in int32


@triton.jit
def greedy_kernel(weight, order, items, num_items, size, N: tl.constexpr, M: tl.constexpr):
    """Step 2: each item to the lightest pack that is not full.

    Args:
        weight: `[X, n]` int64, in descending order of key.
        order: `[X, n]` int64, the item of each of them.
        items: `[X, n]` int64, written only.
        num_items: n.
        size: g.
        N: power of two from n up.
        M: power of two from the number of packs up.
    """
    row = tl.program_id(0).to(tl.int64) * num_items
    begin = tl.arange(0, M).to(tl.int64) * size  # [M], each pack's first position
    end = begin + size
    # A pack's load and, in the low bits, its next free position: the least of these numbers is the first lightest
    # pack, with the place in it, by one reduction. 40 bits of load and 12 of position.
    key = tl.where(begin < num_items, begin, _HUGE)  # [M]
    for step in range(num_items):
        item = tl.load(order + row + step)
        gained = tl.load(weight + row + step)
        lightest = tl.min(key, 0)
        place = lightest & (N - 1)
        tl.store(items + row + place, item)
        filled = tl.where(place + 1 == end, _HUGE, key + gained * N + 1)
        key = tl.where(key == lightest, filled, key)


@triton.jit
def variance_kernel(weight, items, result, num_items, size, N: tl.constexpr, A: tl.constexpr):
    """Step 3: the swap that lowers the sum of squared pack loads most, while there is one.

    Args:
        weight: `[X, n]` int64.
        items: `[X, n]` int64, the packing to begin with.
        result: `[X, n]` int64, written only.
        num_items: n.
        size: g.
        N: power of two from n up.
        A: power of two, up to N.
    """
    row, position, is_real, begin, item, own = _row(weight, items, num_items, size, N)
    shift = _variance_shift(tl.sum(own, 0))
    # All of these are at most 2^30 in size, so int32 holds them and their differences; products take int64.
    load = _pack_load(weight + row, items + row, begin, size, is_real, shift).to(tl.int32)  # [N]
    own = (own >> shift).to(tl.int32)
    left = _VARIANCE_ROUNDS
    while left > 0:
        # What padding has, own 0 and the least rest there can be, makes no change negative.
        rest = tl.where(is_real, own - load, -_VARIANCE_TOTAL)  # [N]
        best = tl.full([A, N], 0, tl.int64)  # each cell's best change, over all tiles
        best_at = tl.full([A, N], 0, tl.int32)  # and the first position on the other side that makes it
        for first in range(0, num_items, A):
            own_at, rest_at = _block(own, first, N, A), _block(rest, first, N, A)  # [A]
            given, apart = own_at[:, None] - own[None, :], rest_at[:, None] - rest[None, :]  # [A, N]
            change = given.to(tl.int64) * apart.to(tl.int64)
            best_at = tl.where(change < best, first + tl.arange(0, A)[:, None], best_at)
            best = tl.minimum(best, change)
        value = tl.min(tl.min(best, 1), 0)
        if value < 0:
            flat = _first(best == value, best_at * num_items + position[None, :])
            here, there = flat // num_items, flat % num_items
            item, own, load = _exchanged(item, own, load, position, begin, size, here, there)
            left -= 1
        else:
            left = 0
    tl.store(result + row + position, item, mask=is_real)


@triton.jit
def max_kernel(weight, items, result, num_items, size, N: tl.constexpr, A: tl.constexpr):
    """Steps 4 and 7: the swap with the heaviest pack that leaves the smaller maximum of its two packs.

    Arguments as for `variance_kernel`.
    """
    row, position, is_real, begin, item, own = _row(weight, items, num_items, size, N)
    load = _pack_load(weight + row, items + row, begin, size, is_real, 0)  # [N]; padding's is huge: no partner
    left = _MAX_ROUNDS
    while left > 0:
        peak = tl.max(tl.where(is_real, load, 0), 0)
        heavy = _first(load == peak, position)  # the heaviest pack's first position
        best = tl.full([A, N], 0, tl.int64) + peak
        best_at = tl.full([A, N], 0, tl.int32)
        for first in range(0, size, A):
            at = first + tl.arange(0, A)  # [A], in the heaviest pack
            # Past the pack's last item it would give weight 0, which never makes it lighter.
            own_at = tl.where(at < size, _pick(own, position, heavy + at), 0)
            lost = own_at[:, None] - own[None, :]  # [A, N], what the heaviest pack would lose
            worst = tl.maximum(load[None, :] + lost, peak - lost)
            best_at = tl.where(worst < best, at[:, None], best_at)
            best = tl.minimum(best, worst)
        value = tl.min(tl.min(best, 1), 0)
        if value < peak:
            flat = _first(best == value, best_at * num_items + position[None, :])
            here, there = heavy + flat // num_items, flat % num_items
            item, own, load = _exchanged(item, own, load, position, begin, size, here, there)
            left -= 1
        else:
            left = 0
    tl.store(result + row + position, item, mask=is_real)


@triton.jit
def pairs_kernel(
    weight, items, result, pairs, num_items, size, num_pairs, N: tl.constexpr, Q: tl.constexpr, A: tl.constexpr
):
    """Step 6: two items of the heaviest pack for two of the lightest, the smallest difference that remains.

    Arguments as for `variance_kernel`, and:
        pairs: `[2, q]` int64, two positions in a pack, first < second, in lexicographic order.
        num_pairs: q.
        Q: power of two from q up.
        A: power of two, up to Q.
    """
    row, position, is_real, begin, item, own = _row(weight, items, num_items, size, N)
    load = _pack_load(weight + row, items + row, begin, size, is_real, 0)  # [N], huge for padding
    inside, pair = tl.arange(0, 16), tl.arange(0, Q)
    is_pair = pair < num_pairs
    one = tl.load(pairs + pair, mask=is_pair, other=0)[:, None]  # [Q, 1]
    two = tl.load(pairs + num_pairs + pair, mask=is_pair, other=0)[:, None]
    in_pair = (one == inside[None, :]) | (two == inside[None, :])  # [Q, 16]
    left = _PAIR_ROUNDS
    while left > 0:
        peak, low = tl.max(tl.where(is_real, load, 0), 0), tl.min(load, 0)
        gap = peak - low
        heavy, light = _first(load == peak, position), _first(load == low, position)  # the packs' first positions
        of_heavy, of_light = _pick(own, position, heavy + inside), _pick(own, position, light + inside)  # [16]
        from_heavy = tl.sum(tl.where(in_pair, of_heavy[None, :], 0), 1)  # [Q]
        from_light = tl.sum(tl.where(in_pair, of_light[None, :], 0), 1)
        best = tl.full([A, Q], 0, tl.int64) + gap
        best_at = tl.full([A, Q], 0, tl.int32)
        for first in range(0, num_pairs, A):
            at = first + tl.arange(0, A)  # [A]
            given = _block(from_heavy, first, Q, A)[:, None] - from_light[None, :]  # [A, Q]
            remains = tl.where((at < num_pairs)[:, None] & is_pair[None, :], tl.abs(gap - 2 * given), gap)
            best_at = tl.where(remains < best, at[:, None], best_at)
            best = tl.minimum(best, remains)
        value = tl.min(tl.min(best, 1), 0)
        if value < gap:
            flat = _first(best == value, best_at * num_pairs + pair[None, :])
            mine, other = pairs + flat // num_pairs, pairs + flat % num_pairs
            here, there = heavy + tl.load(mine), light + tl.load(other)
            item, own, load = _exchanged(item, own, load, position, begin, size, here, there)
            here, there = heavy + tl.load(mine + num_pairs), light + tl.load(other + num_pairs)
            item, own, load = _exchanged(item, own, load, position, begin, size, here, there)
            left -= 1
        else:
            left = 0
    tl.store(result + row + position, item, mask=is_real)


@triton.jit
def _row(weight, items, num_items, size, N: tl.constexpr):
    """Where this program's row begins, and by position `[N]`: itself, whether it is no padding, its pack's first
    position, its item and that one's weight.
    """
    row = tl.program_id(0).to(tl.int64) * num_items
    position = tl.arange(0, N)
    is_real = position < num_items
    item = tl.load(items + row + position, mask=is_real, other=0)
    own = tl.load(weight + row + item, mask=is_real, other=0)
    return row, position, is_real, position // size * size, item, own


@triton.jit
def _pack_load(weight, items, begin, size, is_real, shift):
    """`[N]` int64, by position the load of its pack, of weights shifted right; huge for padding."""
    load = begin.to(tl.int64) * 0
    for index in range(size):
        item = tl.load(items + begin + index, mask=is_real, other=0)
        load += tl.load(weight + item, mask=is_real, other=0) >> shift
    return tl.where(is_real, load, _HUGE)


@triton.jit
def _variance_shift(total):
    """The smallest shift right after which `total` is at most 2^30."""
    return tl.sum(((total >> tl.arange(0, 64)) > _VARIANCE_TOTAL).to(tl.int32), 0)


@triton.jit
def _block(value, first, N: tl.constexpr, A: tl.constexpr):
    """`[A]`: the elements of `value [N]` at positions `first` and on, where `first` is a multiple of A."""
    tile = tl.reshape(value, (N // A, A))
    return tl.sum(tl.where(tl.arange(0, N // A)[:, None] == first // A, tile, 0), 0)


@triton.jit
def _pick(value, position, at):
    """`[A]`: the elements of `value [N]` at any positions `at [A]`; 0 beyond the last."""
    return tl.sum(tl.where(at[:, None] == position[None, :], value[None, :], 0), 1)


@triton.jit
def _first(is_best, flat):
    """The least of the int32 numbers `flat`, of any shape, where `is_best`."""
    return tl.min(tl.where(is_best, flat, _NONE))


@triton.jit
def _exchanged(item, own, load, position, begin, size, here, there):
    """Item, weight and pack load by position `[N]`, once two positions of different packs exchange theirs."""
    is_here, is_there = position == here, position == there
    lost = tl.sum(tl.where(is_here, own, tl.where(is_there, -own, 0)), 0)
    load -= tl.where(begin == here // size * size, lost, 0)
    load += tl.where(begin == there // size * size, lost, 0)
    own += tl.where(is_there, lost, tl.where(is_here, -lost, 0))
    ahead = tl.sum(tl.where(is_here, item, tl.where(is_there, -item, 0)), 0)
    item += tl.where(is_there, ahead, tl.where(is_here, -ahead, 0))
    return item, own, load


INTERPRETED = not isinstance(greedy_kernel, triton.JITFunction)  # TRITON_INTERPRET=1 was set when this was imported
