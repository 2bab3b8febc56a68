"""An independent implementation of the packing core, in plain loops over integers, written from the design alone.

Only the noise comes from the package, because its hash is specific to it. Rows are packed one by one; a packing is a
list of M lists of g items, each list in the order of its positions.
Shapes: X rows, n items, M packs, g = n / M items in each, K candidates.
"""

from __future__ import annotations

from itertools import combinations

import torch

from distplb.packing.noise import noisy_keys

Row = list[int]  # [n], the weight of each item
Packs = list[list[int]]  # [M][g], items

VARIANCE_ROUNDS, MAX_ROUNDS, PAIR_ROUNDS = 10, 50, 20
VARIANCE_TOTAL, ROW_TOTAL = 2**30, 2**40


def balanced_packing(weight: list[Row], num_packs: int, num_candidates: int) -> list[Packs]:
    """Run all seven steps for every row; row x has the noise of layer x and seed 0."""
    return [_best_of_row(row, num_packs, number, num_candidates) for number, row in enumerate(weight)]


def _best_of_row(row: Row, num_packs: int, number: int, num_candidates: int) -> Packs:
    row = shifted(row, ROW_TOTAL)
    packings = [pack(row, num_packs, layer=number, candidate=k) for k in range(num_candidates)]
    return finish(row, min(packings, key=lambda packs: max(loads(row, packs))))  # ties: the first


def pack(row: Row, num_packs: int, *, layer: int, candidate: int, seed: int = 0) -> Packs:
    """Steps 1 to 4."""
    if len(row) == num_packs:
        return [[item] for item in range(num_packs)]
    keys = noisy_keys(torch.tensor([row]), layer=torch.tensor([layer]), candidate=torch.tensor([candidate]), seed=seed)
    return lower_max(row, lower_variance(row, greedy(row, keys[0].tolist(), num_packs)))[0]


def finish(row: Row, packs: Packs) -> Packs:
    """Steps 6 and 7."""
    return lower_max(row, swap_pairs(row, packs))[0]


def greedy(row: Row, key: Row, num_packs: int) -> Packs:
    """Step 2."""
    packs: Packs = [[] for _ in range(num_packs)]
    for item in sorted(range(len(row)), key=lambda item: (-key[item], item)):
        open_packs = [pack for pack in packs if len(pack) < len(row) // num_packs]
        min(open_packs, key=lambda pack: sum(row[i] for i in pack)).append(item)
    return packs


def lower_variance(row: Row, packs: Packs) -> Packs:
    """Step 3."""
    row, packs = shifted(row, VARIANCE_TOTAL), [list(pack) for pack in packs]
    for _ in range(VARIANCE_ROUNDS):
        load, best, swap = loads(row, packs), 0, None
        for (a, i), (b, j) in combinations(positions(packs), 2):
            if a == b:
                continue
            difference = row[packs[a][i]] - row[packs[b][j]]
            change = (load[a] - difference) ** 2 + (load[b] + difference) ** 2 - load[a] ** 2 - load[b] ** 2
            if change < best:
                best, swap = change, (a, i, b, j)
        if swap is None:
            break
        exchange(packs, *swap)
    return packs


def lower_max(row: Row, packs: Packs) -> tuple[Packs, int]:
    """Steps 4 and 7; also returns the number of swaps."""
    packs = [list(pack) for pack in packs]
    for swaps in range(MAX_ROUNDS):
        load = loads(row, packs)
        heavy = load.index(max(load))
        best, swap = load[heavy], None
        for i, item in enumerate(packs[heavy]):
            for b, j in positions(packs):
                if b == heavy:
                    continue
                difference = row[item] - row[packs[b][j]]
                worst = max(load[heavy] - difference, load[b] + difference)
                if worst < best:
                    best, swap = worst, (heavy, i, b, j)
        if swap is None:
            return packs, swaps
        exchange(packs, *swap)
    return packs, MAX_ROUNDS


def swap_pairs(row: Row, packs: Packs) -> Packs:
    """Step 6."""
    packs = [list(pack) for pack in packs]
    if not 2 <= len(packs[0]) <= 16:
        return packs
    pairs = list(combinations(range(len(packs[0])), 2))
    for _ in range(PAIR_ROUNDS):
        load = loads(row, packs)
        heavy, light = load.index(max(load)), load.index(min(load))
        best, swap = load[heavy] - load[light], None
        for i, j in pairs:
            for k, m in pairs:
                difference = sum(row[packs[heavy][x]] for x in (i, j)) - sum(row[packs[light][x]] for x in (k, m))
                remains = abs((load[heavy] - difference) - (load[light] + difference))
                if remains < best:
                    best, swap = remains, (i, j, k, m)
        if swap is None:
            break
        i, j, k, m = swap
        exchange(packs, heavy, i, light, k)
        exchange(packs, heavy, j, light, m)
    return packs


def shifted(row: Row, limit: int) -> Row:
    """Shift all weights right by the smallest number of bits that brings the shifted total to at most `limit`."""
    total, shift = sum(row), 0
    while total >> shift > limit:
        shift += 1
    return [weight >> shift for weight in row]


def loads(row: Row, packs: Packs) -> list[int]:
    """Compute the weight of each pack, `[M]`."""
    return [sum(row[item] for item in pack) for pack in packs]


def positions(packs: Packs) -> list[tuple[int, int]]:
    """List all (pack, position) in flat order."""
    return [(pack, position) for pack in range(len(packs)) for position in range(len(packs[pack]))]


def exchange(packs: Packs, a: int, i: int, b: int, j: int) -> None:
    """Swap the items at two places."""
    packs[a][i], packs[b][j] = packs[b][j], packs[a][i]


def flat(packs: Packs) -> list[int]:
    """Return the item at each flat (pack, position), `[n]`."""
    return [item for pack in packs for item in pack]


def unflat(items: list[int], num_packs: int) -> Packs:
    """Return the packs of a flat packing."""
    size = len(items) // num_packs
    return [items[pack * size : (pack + 1) * size] for pack in range(num_packs)]
