"""Steps 1 to 7 in plain torch against a second, plain implementation, and the properties that each step promises.

Shapes: X rows, n items, M packs, g = n / M items in each.
"""

from __future__ import annotations

import random
from itertools import pairwise

import oracle
import pytest
import torch
from packing_cases import ONLY_PAIRS_HELP, rows_of_every_kind, skewed
from torch import Tensor

from distplb.packing import reference, steps
from distplb.packing.steps import pack_loads

# (M, g). Pair swaps are for 2 ≤ g ≤ 16; 17 is just beyond, 1 is the identity, M = 1 has no pack to swap with.
SHAPES = [(1, 1), (1, 4), (2, 1), (7, 1), (2, 2), (3, 2), (8, 2), (2, 3), (3, 3), (5, 3), (2, 4), (4, 4)]
SHAPES += [(3, 5), (5, 5), (2, 7), (4, 6), (2, 9), (3, 8), (2, 16), (2, 17), (3, 17)]


def shuffled(random_: random.Random, n: int, rows: int) -> list[list[int]]:
    """`[X][n]` packings in random order."""
    return [random_.sample(range(n), n) for _ in range(rows)]


# --- equal to the oracle, to the bit ---------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("num_packs", "size"), SHAPES)
def test_pack_equals_the_plain_implementation(num_packs: int, size: int, seed: int) -> None:
    random_ = random.Random(f"pack {num_packs} {size} {seed}")
    weight = rows_of_every_kind(random_, num_packs * size)
    layers = [random_.randrange(100) for _ in weight]
    candidates = [random_.choice([0, 1, random_.randrange(1, 2**22), 2**22 - 1]) for _ in weight]
    plan_seed = random_.choice([0, random_.randrange(2**62)])
    items = reference.pack(
        torch.tensor(weight),
        num_packs,
        layer=torch.tensor(layers),
        candidate=torch.tensor(candidates),
        seed=plan_seed,
    )
    expected = [
        oracle.flat(oracle.pack(row, num_packs, layer=layer, candidate=candidate, seed=plan_seed))
        for row, layer, candidate in zip(weight, layers, candidates, strict=True)
    ]
    assert items.tolist() == expected


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("num_packs", "size"), SHAPES)
def test_finish_equals_the_plain_implementation_from_any_start(num_packs: int, size: int, seed: int) -> None:
    random_ = random.Random(f"finish {num_packs} {size} {seed}")
    weight = rows_of_every_kind(random_, num_packs * size)
    start = shuffled(random_, num_packs * size, len(weight))
    items = reference.finish(torch.tensor(weight), torch.tensor(start), num_packs)
    expected = [
        oracle.flat(oracle.finish(row, oracle.unflat(packing, num_packs)))
        for row, packing in zip(weight, start, strict=True)
    ]
    assert items.tolist() == expected


@pytest.mark.parametrize("step", ["lower_variance", "lower_max", "swap_pairs"])
@pytest.mark.parametrize(("num_packs", "size"), [(3, 2), (2, 4), (4, 4), (5, 3), (2, 9), (3, 17)])
def test_each_refinement_equals_the_plain_implementation_from_any_start(step: str, num_packs: int, size: int) -> None:
    random_ = random.Random(f"{step} {num_packs} {size}")
    weight = rows_of_every_kind(random_, num_packs * size)
    start = shuffled(random_, num_packs * size, len(weight))
    items = getattr(steps, step)(torch.tensor(weight), torch.tensor(start), num_packs)
    expected = [
        getattr(oracle, step)(row, oracle.unflat(packing, num_packs))
        for row, packing in zip(weight, start, strict=True)
    ]
    assert items.tolist() == [oracle.flat(packs[0] if isinstance(packs, tuple) else packs) for packs in expected]


# --- what the steps promise -------------------------------------------------------------------------------------


def test_no_single_swap_with_the_heaviest_pack_is_left() -> None:
    """Symptom: after an even number of rounds, a row that had been improved was back to its initial packing.

    Cause: each round searched for the best swap in the initial packing of the refinement instead of the current one,
    so it found the same swap, and every second round undid it.
    """
    swaps_made = set()
    for seed in range(60):
        random_ = random.Random(seed)
        num_packs, size = random_.choice([(2, 4), (3, 3), (4, 4), (5, 4), (3, 6)])
        row = [int(random_.lognormvariate(6, 1)) for _ in range(num_packs * size)]
        start = shuffled(random_, len(row), 1)
        items = steps.lower_max(torch.tensor([row]), torch.tensor(start), num_packs)
        _, swaps = oracle.lower_max(row, oracle.unflat(start[0], num_packs))
        swaps_made.add(swaps)
        assert swaps < oracle.MAX_ROUNDS  # otherwise a helpful swap may be left
        assert not helping_swaps(row, oracle.unflat(items[0].tolist(), num_packs))
    assert {2, 3, 4, 5} <= swaps_made  # even and odd numbers, otherwise the cases would show nothing


def helping_swaps(row: list[int], packs: oracle.Packs) -> list[tuple[int, int]]:
    """Pairs of items whose exchange leaves two packs that are both lighter than the heaviest pack is now."""
    load = oracle.loads(row, packs)
    heavy = load.index(max(load))
    return [
        (one, other)
        for one in packs[heavy]
        for b, pack in enumerate(packs)
        for other in pack
        if b != heavy and max(load[heavy] - row[one] + row[other], load[b] + row[one] - row[other]) < load[heavy]
    ]


def test_variance_refinement_goes_on_from_the_packing_that_it_has_reached() -> None:
    """The same cause as above in the other refinement: rounds used the initial packing."""
    weight = skewed(1, rows=6, n=16)  # [X, n]
    start = torch.tensor(shuffled(random.Random(1), 16, 6))
    items, squares = start, [pack_loads(weight, start, 4).square().sum(1)]
    while True:  # round by round, separately
        one_round = torch.stack([one_variance_round(weight[x], items[x]) for x in range(6)])
        if torch.equal(one_round, items) or len(squares) > steps._VARIANCE_ROUNDS:
            break
        items = one_round
        squares.append(pack_loads(weight, items, 4).square().sum(1))
    assert len(squares) > 3
    assert all((after <= before).all() for before, after in pairwise(squares))
    assert torch.equal(steps.lower_variance(weight, start, 4), items)


def one_variance_round(row: Tensor, items: Tensor) -> Tensor:
    """`[n]`: items after the best exchange of two items, found by trying each."""
    best, best_items = int(pack_loads(row[None], items[None], 4).square().sum()), items
    for a in range(len(row)):
        for b in range(a + 1, len(row)):
            tried = items.clone()
            tried[[a, b]] = items[[b, a]]
            cost = int(pack_loads(row[None], tried[None], 4).square().sum())
            if cost < best:
                best, best_items = cost, tried
    return best_items


def test_pair_swap_helps_where_no_single_swap_does() -> None:
    row, packs = ONLY_PAIRS_HELP, [[0, 1, 6, 7], [4, 5, 2, 3]]  # 8 + 3 + 3 + 0 = 14 and 6 + 5 + 1 + 0 = 12
    weight, items = torch.tensor([row]), torch.tensor([oracle.flat(packs)])
    assert not helping_swaps(row, packs)
    assert torch.equal(steps.lower_max(weight, items, 2), items)
    assert torch.equal(steps.lower_variance(weight, items, 2), items)
    finished = reference.finish(weight, items, 2)
    assert pack_loads(weight, finished, 2).tolist() == [[13, 13]]
    # 8 + 3 for 6 + 5 would change nothing; 8 + 0 for 6 + 1 is the first exchange that evens them out.
    assert finished.tolist() == [[4, 1, 6, 2, 0, 5, 7, 3]]


@pytest.mark.parametrize(("size", "swaps"), [(1, False), (3, True), (16, True), (17, False)])
def test_pair_swaps_are_for_packs_of_two_to_sixteen_items(size: int, swaps: bool) -> None:
    row = [5] * size + [1] * size  # the largest possible difference
    items = torch.arange(2 * size)[None]
    assert torch.equal(steps.swap_pairs(torch.tensor([row]), items, 2), items) is not swaps
    # Packs of two items are allowed too, and nothing changes: the two packs would only trade places.
    assert steps.swap_pairs(torch.tensor([[5, 5, 1, 1]]), torch.arange(4)[None], 2).tolist() == [[0, 1, 2, 3]]
