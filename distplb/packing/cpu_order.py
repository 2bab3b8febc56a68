"""Order in Numba: a sort, and a tree that knows the minimum of values that change. Only `cpu_steps` imports this.

Shapes: n values.
"""

from __future__ import annotations

import numpy as np

from distplb.packing.cpu_row import NEVER, at, compiled, copy, inlined

__all__ = ["INDEX", "INDEX_BITS", "leaves_of", "plant", "replace", "sort_down"]

INDEX_BITS = 22  # of the index in a packed (value, index); values are below 2^41
INDEX = np.int64(2**INDEX_BITS - 1)
_MOST_IN_A_BUCKET = 32  # beyond this, inserting would take longer than merging


@compiled
def _merge_sort(values, other):
    """Sort `values [n]`, with `other [n]` as scratch space."""
    number, length = len(values), 1
    while length < number:
        for begin in range(0, number, 2 * length):
            middle, end = min(begin + length, number), min(begin + 2 * length, number)
            left, right = begin, middle
            for place in range(begin, end):
                if right >= end or (left < middle and values[left] <= values[right]):
                    other[place] = values[left]
                    left += 1
                else:
                    other[place] = values[right]
                    right += 1
        copy(other, values)
        length *= 2


@compiled
def sort_down(keys, order, ordered, starts, packed):
    """Sort `keys [n]`: their indices to `order [n]`, their values to `ordered [n]`, the largest first, ties in order.

    Keys go into buckets of equal width, and then, as few are in each, are inserted into what precedes them.
    """
    number, buckets = len(keys), len(starts) - 1
    low, high = keys[0], keys[0]
    for nth in range(number):
        low, high = min(low, keys[nth]), max(high, keys[nth])
    shift = np.int64(0)
    while (high - low) >> shift >= buckets:
        shift += 1
    starts[:] = 0
    for nth in range(number):
        starts[at(((high - keys[nth]) >> shift) + 1)] += 1
    most = np.int64(0)
    for bucket in range(1, buckets + 1):
        most = max(most, starts[bucket])
        starts[bucket] += starts[bucket - 1]
    if most > _MOST_IN_A_BUCKET and shift:
        for nth in range(number):
            packed[nth] = -((keys[nth] << INDEX_BITS) | (INDEX - nth))
        _merge_sort(packed[:number], order)
        for place in range(number):
            order[place] = INDEX - (-packed[place] & INDEX)
            ordered[place] = keys[order[place]]
        return
    for nth in range(number):
        bucket = at((high - keys[nth]) >> shift)
        place = at(starts[bucket])
        order[place], ordered[place] = nth, keys[nth]
        starts[bucket] += 1
    for nth in range(at(1), at(number)):
        value, index, place = ordered[nth], order[nth], nth
        while place > at(0) and ordered[place - at(1)] < value:
            ordered[place], order[place] = ordered[place - at(1)], order[place - at(1)]
            place -= at(1)
        ordered[place], order[place] = value, index


@inlined
def leaves_of(number):
    """The leaves of a tree for so many values: the next power of two."""
    leaves = np.int64(1)
    while leaves < number:
        leaves *= 2
    return leaves


@inlined
def plant(tree, leaves, number):
    """Compute the minimum of each subtree from the first `number` leaves."""
    for leaf in range(leaves + number, 2 * leaves):
        tree[leaf] = NEVER
    for node in range(leaves - 1, 0, -1):
        tree[node] = min(tree[2 * node], tree[2 * node + 1])


@inlined
def replace(tree, node, value):
    """Change a leaf, and the minima above it."""
    place = at(node)
    tree[place] = value
    while place > at(1):
        value = min(value, tree[place ^ at(1)])
        place >>= at(1)
        tree[place] = value
