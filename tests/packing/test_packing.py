"""The packing core against a second, plain implementation, and what it promises by itself.

Shapes: X rows, n items, M packs, g = n / M items in each, K candidates.
"""

from __future__ import annotations

import random
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import oracle
import pytest
import torch
from torch import Tensor

import distplb
from distplb import DistplbError, balanced_packing
from distplb.packing import balanced, reference, steps
from distplb.packing.candidates import noisy_keys
from distplb.packing.engines import engine_named
from distplb.packing.steps import pack_loads

# (M, g). Pair swaps are for 2 ≤ g ≤ 16; 17 is just beyond, 1 is the identity, M = 1 has nobody to swap with.
SHAPES = [(1, 1), (1, 4), (2, 1), (7, 1), (2, 2), (3, 2), (8, 2), (2, 3), (3, 3), (5, 3), (2, 4), (4, 4)]
SHAPES += [(3, 5), (5, 5), (2, 7), (4, 6), (2, 9), (3, 8), (2, 16), (2, 17), (3, 17)]
# No single swap brings the two packs of this row nearer than 14 and 12, and an exchange of pairs makes both 13.
ONLY_PAIRS_HELP = [8, 3, 1, 0, 6, 5, 3, 0]


def rows_of_every_kind(random_: random.Random, n: int) -> list[list[int]]:
    """`[X][n]`, each row's total at most 2^40."""
    hot = random_.randrange(n)
    # Nearly equal, so that it shows how many bits the variance phase shifts away. Of `odd`, shifted by one bit, the
    # total is still above 2^30, and what is left of the parts no longer adds up to that.
    even = [2**38 // n + random_.randrange(2**11) for _ in range(n)]
    odd = [2**30 // n * 2 - 15 + 2 * random_.randrange(8) for _ in range(n)]
    odd[hot] += 2**31 + 2 - sum(odd)
    return [
        [random_.randrange(3) for _ in range(n)],  # ties
        [7] * n,
        [0] * n,
        [random_.choice([0, 0, random_.randrange(50)]) for _ in range(n)],
        [random_.randrange(1000) for _ in range(n)],
        [int(random_.lognormvariate(6, 1.5)) for _ in range(n)],
        [10**6 if item == hot else random_.randrange(2) for item in range(n)],
        [random_.randrange(2**40 // n) for _ in range(n)],
        even,
        odd,
    ]


def shuffled(random_: random.Random, n: int, rows: int) -> list[list[int]]:
    """`[X][n]` packings without any order in them."""
    return [random_.sample(range(n), n) for _ in range(rows)]


def skewed(seed: int, rows: int, n: int) -> Tensor:
    """`[X, n]` lognormal weights."""
    return torch.randn(rows, n, generator=torch.Generator().manual_seed(seed)).mul(1.2).exp().mul(1000).long()


def slot_table(pack_index: Tensor, rank_in_pack: Tensor, num_packs: int) -> Tensor:
    """`[X, n]`: the item in each slot; raises where two items share one."""
    n = pack_index.shape[1]
    table = torch.full_like(pack_index, -1)
    table.scatter_(1, pack_index * (n // num_packs) + rank_in_pack, torch.arange(n).expand_as(table))
    assert (table >= 0).all()
    return table


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
    wanted = [
        oracle.flat(oracle.pack(row, num_packs, layer=layer, candidate=candidate, seed=plan_seed))
        for row, layer, candidate in zip(weight, layers, candidates, strict=True)
    ]
    assert items.tolist() == wanted


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("num_packs", "size"), SHAPES)
def test_finish_equals_the_plain_implementation_from_any_start(num_packs: int, size: int, seed: int) -> None:
    random_ = random.Random(f"finish {num_packs} {size} {seed}")
    weight = rows_of_every_kind(random_, num_packs * size)
    start = shuffled(random_, num_packs * size, len(weight))
    items = reference.finish(torch.tensor(weight), torch.tensor(start), num_packs)
    wanted = [
        oracle.flat(oracle.finish(row, oracle.unflat(packing, num_packs)))
        for row, packing in zip(weight, start, strict=True)
    ]
    assert items.tolist() == wanted


@pytest.mark.parametrize("step", ["lower_variance", "lower_max", "swap_pairs"])
@pytest.mark.parametrize(("num_packs", "size"), [(3, 2), (2, 4), (4, 4), (5, 3), (2, 9), (3, 17)])
def test_each_refinement_equals_the_plain_implementation_from_any_start(step: str, num_packs: int, size: int) -> None:
    random_ = random.Random(f"{step} {num_packs} {size}")
    weight = rows_of_every_kind(random_, num_packs * size)
    start = shuffled(random_, num_packs * size, len(weight))
    items = getattr(steps, step)(torch.tensor(weight), torch.tensor(start), num_packs)
    wanted = [
        getattr(oracle, step)(row, oracle.unflat(packing, num_packs))
        for row, packing in zip(weight, start, strict=True)
    ]
    assert items.tolist() == [oracle.flat(packs[0] if isinstance(packs, tuple) else packs) for packs in wanted]


@pytest.mark.parametrize("num_candidates", [1, 2, 5])
@pytest.mark.parametrize(("num_packs", "size"), [(1, 4), (5, 1), (3, 2), (4, 3), (3, 5), (2, 6)])
def test_balanced_packing_equals_the_plain_implementation(num_packs: int, size: int, num_candidates: int) -> None:
    random_ = random.Random(f"balanced {num_packs} {size}")
    n = num_packs * size
    weight = rows_of_every_kind(random_, n)
    weight += [[random_.randrange(2**50) for _ in range(n)], [2**41 // n + 1] * n, [2**61 // n - 1] * n]
    table = slot_table(*balanced_packing(torch.tensor(weight), num_packs, num_candidates), num_packs)
    wanted = oracle.balanced_packing(weight, num_packs, num_candidates)
    assert table.tolist() == [oracle.flat(packs) for packs in wanted]


# --- what the steps promise -------------------------------------------------------------------------------------


def test_no_single_swap_with_the_heaviest_pack_is_left() -> None:
    """Symptom: a row that had been improved came out as it went in, after every even number of rounds.

    Cause: the best swap was looked for on the packing that the refinement started from instead of the current one,
    so each round found the same swap, and every second one undid it.
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
        assert swaps < oracle.MAX_ROUNDS  # else a swap may well be left
        assert not helping_swaps(row, oracle.unflat(items[0].tolist(), num_packs))
    assert {2, 3, 4, 5} <= swaps_made  # even numbers and odd ones, or the cases would show nothing


def helping_swaps(row: list[int], packs: oracle.Packs) -> list[tuple[int, int]]:
    """Pairs of items whose exchange leaves two packs that are both lighter than the heaviest is now."""
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
    """The same cause as above in the other refinement: rounds looked at the packing of the start."""
    weight = skewed(1, rows=6, n=16)  # [X, n]
    start = torch.tensor(shuffled(random.Random(1), 16, 6))
    items, squares = start, [pack_loads(weight, start, 4).square().sum(1)]
    while True:  # round after round by hand
        one_round = torch.stack([one_variance_round(weight[x], items[x]) for x in range(6)])
        if torch.equal(one_round, items) or len(squares) > steps._VARIANCE_ROUNDS:
            break
        items = one_round
        squares.append(pack_loads(weight, items, 4).square().sum(1))
    assert len(squares) > 3
    assert all((after <= before).all() for before, after in pairwise(squares))
    assert torch.equal(steps.lower_variance(weight, start, 4), items)


def one_variance_round(row: Tensor, items: Tensor) -> Tensor:
    """`[n]`: the best of all exchanges of two items, each tried out."""
    best, found = int(pack_loads(row[None], items[None], 4).square().sum()), items
    for a in range(len(row)):
        for b in range(a + 1, len(row)):
            tried = items.clone()
            tried[[a, b]] = items[[b, a]]
            cost = int(pack_loads(row[None], tried[None], 4).square().sum())
            if cost < best:
                best, found = cost, tried
    return found


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


def test_balanced_packing_finishes_with_pair_swaps() -> None:
    """The same row from the front door: steps 1 to 4 stop at 14, so 13 is the pair swap's doing."""
    weight = torch.tensor([ONLY_PAIRS_HELP])
    zero = torch.zeros(1, dtype=torch.int64)
    assert pack_loads(weight, reference.pack(weight, 2, layer=zero, candidate=zero), 2).amax() == 14
    table = slot_table(*balanced_packing(weight, 2, num_candidates=1), 2)
    assert pack_loads(weight, table, 2).tolist() == [[13, 13]]


@pytest.mark.parametrize(("size", "swaps"), [(1, False), (3, True), (16, True), (17, False)])
def test_pair_swaps_are_for_packs_of_two_to_sixteen_items(size: int, swaps: bool) -> None:
    row = [5] * size + [1] * size  # the greatest difference there can be
    items = torch.arange(2 * size)[None]
    assert torch.equal(steps.swap_pairs(torch.tensor([row]), items, 2), items) is not swaps
    # Two items a pack are allowed as well, and change nothing: the two packs would trade places.
    assert steps.swap_pairs(torch.tensor([[5, 5, 1, 1]]), torch.arange(4)[None], 2).tolist() == [[0, 1, 2, 3]]


# --- what comes out ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_packs", "size"), [(1, 6), (6, 1), (4, 9), (9, 4), (2, 17)])
def test_every_item_gets_a_place_of_its_own_and_every_pack_is_full(num_packs: int, size: int) -> None:
    n = num_packs * size
    weight = torch.tensor(rows_of_every_kind(random.Random(n), n))
    pack_index, rank_in_pack = balanced_packing(weight, num_packs, num_candidates=3)
    assert pack_index.dtype == rank_in_pack.dtype == torch.int64
    assert pack_index.shape == rank_in_pack.shape == weight.shape
    for packs, ranks in zip(pack_index.tolist(), rank_in_pack.tolist(), strict=True):
        places = sorted(zip(packs, ranks, strict=True))
        assert places == [(pack, rank) for pack in range(num_packs) for rank in range(size)]


def test_one_item_a_pack_is_the_identity() -> None:
    pack_index, rank_in_pack = balanced_packing(torch.tensor([[3, 9, 0, 5]]), num_packs=4)
    assert pack_index.tolist() == [[0, 1, 2, 3]]
    assert rank_in_pack.tolist() == [[0, 0, 0, 0]]


def test_rows_packed_together_or_one_by_one_are_equal() -> None:
    weight = torch.cat([skewed(2, rows=5, n=24), torch.tensor(rows_of_every_kind(random.Random(2), 24))])
    layer, candidate = torch.arange(len(weight)), torch.arange(len(weight)) % 4
    together = reference.pack(weight, 4, layer=layer, candidate=candidate)
    alone = [
        reference.pack(weight[x : x + 1], 4, layer=layer[x : x + 1], candidate=candidate[x : x + 1])
        for x in range(len(weight))
    ]
    assert torch.equal(together, torch.cat(alone))
    together = reference.finish(weight, layer_start := torch.arange(24).expand(len(weight), -1), 4)
    alone = [reference.finish(weight[x : x + 1], layer_start[x : x + 1], 4) for x in range(len(weight))]
    assert torch.equal(together, torch.cat(alone))


def test_a_row_does_not_depend_on_the_rows_after_it() -> None:
    weight = skewed(3, rows=6, n=32)
    first = balanced_packing(weight[:2], 4, num_candidates=8)[0]
    assert torch.equal(first, balanced_packing(weight, 4, num_candidates=8)[0][:2])


def test_batch_sizes_change_the_memory_and_not_the_packing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(balanced, "engine_after", lambda *_: ("reference", reference))
    weight = skewed(4, rows=5, n=24)
    wanted = balanced_packing(weight, 4, num_candidates=7)
    monkeypatch.setattr(balanced, "_BATCH", 300)  # two candidates at a time
    monkeypatch.setattr(steps, "_CHUNK", 1200)  # two rows at a time, one in the variance phase
    found = balanced_packing(weight, 4, num_candidates=7)
    assert torch.equal(wanted[0], found[0])
    assert torch.equal(wanted[1], found[1])


def test_neither_argument_is_written_to() -> None:
    weight, items = skewed(5, rows=3, n=16), torch.arange(16).repeat(3, 1)
    before = weight.clone(), items.clone()
    balanced_packing(weight, 4, num_candidates=3)
    reference.finish(weight, items, 4)
    assert torch.equal(weight, before[0])
    assert torch.equal(items, before[1])


def test_the_chosen_candidate_is_the_lightest_of_those_asked_for_and_ties_go_to_the_lowest() -> None:
    weight = torch.cat([skewed(6, rows=12, n=40), torch.tensor(rows_of_every_kind(random.Random(6), 40))])
    rows, layer = len(weight), torch.arange(len(weight))
    items = torch.stack(  # [K, X, n]
        [reference.pack(weight, 8, layer=layer, candidate=torch.full((rows,), k)) for k in range(16)]
    )
    heaviest = torch.stack([pack_loads(weight, packing, 8).amax(1) for packing in items])  # [K, X]
    least = heaviest.cummin(0).values
    assert (heaviest.argmin(0) > 0).any()  # else all of this would hold for a search that ignores its candidates
    for num_candidates in (1, 2, 5, 16):
        winner = (heaviest[:num_candidates] == least[num_candidates - 1]).int().argmax(0)  # [X], the first
        finished = reference.finish(weight, items[winner, layer], 8)
        table = slot_table(*balanced_packing(weight, 8, num_candidates), 8)
        assert torch.equal(table, finished)
        assert (pack_loads(weight, table, 8).amax(1) <= least[num_candidates - 1]).all()
    assert (least[1:] <= least[:-1]).all()


def test_the_result_is_never_heavier_than_longest_first() -> None:
    weight = torch.cat([skewed(7, rows=40, n=36), torch.tensor(rows_of_every_kind(random.Random(7), 36))])
    weight = weight[weight.sum(1) <= 2**30]
    greedy = steps.greedy(weight, weight, torch.ones_like(weight), 6, apart=False)
    for num_candidates in (1, 4):
        table = slot_table(*balanced_packing(weight, 6, num_candidates), 6)
        assert (pack_loads(weight, table, 6).amax(1) <= pack_loads(weight, greedy, 6).amax(1)).all()


def test_totals_above_2_to_the_30_may_lose_the_bits_that_the_variance_phase_does_not_see_and_no_more() -> None:
    """The variance phase shifts such rows right, and may prefer a packing that is heavier by what was shifted out."""
    row = [1431656633, 1431656528, 1431656100, 1431655856, 1431656375, 1431656198]
    row += [1431656656, 1431655794, 1431656059, 1431656164, 1431655878, 1431656137]
    weight = torch.tensor([row])
    table = slot_table(*balanced_packing(weight, 3, num_candidates=1), 3)
    greedy = steps.greedy(weight, weight, torch.ones_like(weight), 3, apart=False)
    lost = int(pack_loads(weight, table, 3).amax() - pack_loads(weight, greedy, 3).amax())
    assert lost <= 4 << 5  # g items, each without its last five bits: the total is just above 2^34


# --- numbers of every type --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_floats_that_are_whole_numbers_pack_as_the_integers(dtype: torch.dtype) -> None:
    weight = skewed(8, rows=20, n=32).clamp(max=255)  # exact in every one of the types
    wanted = balanced_packing(weight, 4, num_candidates=4)
    found = balanced_packing(weight.to(dtype), 4, num_candidates=4)
    assert torch.equal(wanted[0], found[0])
    assert torch.equal(wanted[1], found[1])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_small_integer_types_pack_as_int64(dtype: torch.dtype) -> None:
    weight = skewed(9, rows=20, n=32).clamp(max=255 if dtype == torch.uint8 else 32767)
    wanted = balanced_packing(weight, 4, num_candidates=4)
    assert torch.equal(wanted[0], balanced_packing(weight.to(dtype), 4, num_candidates=4)[0])


@pytest.mark.parametrize("scale", [2**29, 2**35])
def test_large_whole_floats_pack_as_the_integers(scale: int) -> None:
    """Symptom: whole floats with a row total above 2^39 packed otherwise than the same integers.

    Cause: they were scaled and rounded like fractions, while integers keep their last bits up to a total of 2^40 and
    lose them to a shift, without rounding, above it.
    """
    weight = skewed(10, rows=30, n=16).clamp(500, 4000) * scale // 8 + torch.arange(16) % 7
    assert weight.sum(1).amin() > 2**39
    wanted = balanced_packing(weight, 4, num_candidates=4)
    assert torch.equal(wanted[0], balanced_packing(weight.double(), 4, num_candidates=4)[0])


@pytest.mark.parametrize("scale", [2.0**-30, 2.0**-120, 2.0**-1000, 2.0**200, 2.0**1000])
def test_floats_of_any_magnitude_pack_alike(scale: float) -> None:
    """Where torch works out 2 to the exponent in float32, it is infinite above 2^127, and every weight was −2^63."""
    weight = skewed(11, rows=10, n=16).double() / 4096 + 1 / 3
    wanted = balanced_packing(weight, 4, num_candidates=4)[0]
    assert torch.equal(balanced_packing(weight * scale, 4, num_candidates=4)[0], wanted)


def test_tiny_floats_still_balance() -> None:
    weight = skewed(12, rows=10, n=64).double() * 1e-9 / 3
    table = slot_table(*balanced_packing(weight, 8, num_candidates=4), 8)
    load = pack_loads(weight, table, 8)  # [X, M]
    lightest_heaviest = torch.maximum(load.mean(1), weight.amax(1) + weight.sort(1).values[:, :7].sum(1))
    assert (load.amax(1) / lightest_heaviest).mean() < 1.005


# --- refusals ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weight", "num_packs", "wording"),
    [
        (
            [[1.0, float("nan")]],
            1,
            r"weight has nan for item 1 of row 0 \(1 such\); counts must be finite: check the cou",
        ),
        ([[1.0, 2.0], [float("inf"), float("-inf")]], 1, r"weight has inf for item 0 of row 1 \(2 such\); counts"),
        ([[3, -2]], 1, r"weight has -2 for item 1 of row 0 \(1 such\); counts must be non-negative"),
        ([[3.0, -0.5]], 1, r"weight has -0.5 for item 1 of row 0 \(1 such\); counts must be non-negative"),
        ([[1, 2, 3]], 2, "3 items cannot be packed evenly into 2 packs; pass a divisor of 3"),
        ([[1, 2, 3]], 0, "3 items cannot be packed evenly into 0 packs"),
        ([[1, 2, 3]], -3, "3 items cannot be packed evenly into -3 packs"),
        ([[1j, 2j]], 1, "weight has dtype torch.complex64; pass counts as integers"),
        ([[]], 1, r"weight has shape \(1, 0\); pass numbers of shape \[rows, items\], none empty"),
        ([], 1, r"weight has shape \(0,\); pass numbers"),
        ([1, 2], 1, r"weight has shape \(2,\); pass numbers"),
        ([[2**62, 1]], 1, "weight has a row whose total is 4.61e[+]18, too large to add up; divide the weights by a"),
    ],
)
def test_bad_weights_are_refused_by_their_value(weight: list, num_packs: int, wording: str) -> None:
    with pytest.raises(DistplbError, match=wording):
        balanced_packing(torch.tensor(weight), num_packs)


def test_floats_whose_total_is_infinite_are_refused() -> None:
    """Each weight is finite, their total is not, and all weights became −2^63 without a word."""
    weight = torch.tensor([[1e308, 1.5e308]], dtype=torch.float64)
    with pytest.raises(DistplbError, match="a row whose total is inf, too large to add up; divide the weights by a po"):
        balanced_packing(weight, 2)


@pytest.mark.parametrize("num_candidates", [0, -1, 2**22 + 1])
def test_a_number_of_candidates_out_of_range_is_refused(num_candidates: int) -> None:
    with pytest.raises(DistplbError, match=rf"num_candidates is {num_candidates}; pass 1 to 2\^22"):
        balanced_packing(torch.tensor([[1, 2]]), 1, num_candidates)


def test_an_engine_that_is_not_there_is_refused_and_none_takes_one_that_is() -> None:
    with pytest.raises(DistplbError, match="engine 'warp' is not there; pass one of reference"):
        engine_named("warp")
    name, engine = engine_named(None)
    assert engine_named(name) == (name, engine)


# --- memory -----------------------------------------------------------------------------------------------------

# The kernel's own high-water mark of this process image. `ru_maxrss` will not do: a child starts with its parent's.
MEASURED = """
import re, torch
from distplb import balanced_packing
torch.set_num_threads(1)
def kib(name):
    return int(re.search(name + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1])
weight = torch.randn(58, 288, generator=torch.Generator().manual_seed(0)).exp().mul(1000).long()
balanced_packing(weight[:1, :4], 2, 1)
start = kib("VmRSS")
balanced_packing(weight, 32, num_candidates=64)
print(kib("VmHWM") - start)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak memory is read from Linux's /proc")
def test_deepseek_v3_with_64_candidates_stays_under_1_gib() -> None:
    environment = {"PYTHONPATH": str(Path(distplb.__file__).parents[1]), "PATH": ""}
    run = subprocess.run(
        [sys.executable, "-c", MEASURED], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert run.returncode == 0, run.stderr
    grown_kib = int(run.stdout)
    assert 0 < grown_kib < 1 << 20


# --- step 1: noise ----------------------------------------------------------------------------------------------


def noise(items: int, *, layer: int = 0, candidate: int = 1, seed: int = 0) -> Tensor:
    """`[n]`: the noise of each item in 2^-16, as it comes out on equal weights of 2^16."""
    weight = torch.full((1, items), 1 << 16)
    keys = noisy_keys(weight, layer=torch.tensor([layer]), candidate=torch.tensor([candidate]), seed=seed)
    return (keys - weight)[0]


def test_candidate_0_is_noiseless() -> None:
    weight = skewed(13, rows=3, n=50)
    keys = noisy_keys(weight, layer=torch.arange(3), candidate=torch.tensor([0, 5, 0]), seed=9)
    assert torch.equal(keys[::2], weight[::2])
    assert not torch.equal(keys[1], weight[1])


def test_noise_is_at_least_zero_and_below_15_percent() -> None:
    many = noise(1 << 20)
    assert many.min() == 0
    assert many.max() == 9830  # the largest below 0.15 × 2^16 = 9830.4
    heavy = torch.full((1, 1000), 2**40)
    keys = noisy_keys(heavy, layer=torch.tensor([0]), candidate=torch.tensor([1]), seed=0)
    assert ((keys >= heavy) & (keys < heavy * 1.15)).all()


def test_noise_is_spread_evenly() -> None:
    """Chi-square of 64 equal bins: 63 on average, its standard deviation 11; the bound is six of them away."""
    for candidate, layer, seed in [(1, 0, 0), (2, 0, 0), (2**22 - 1, 57, 2**40)]:
        counts = (noise(64 * 1000, candidate=candidate, layer=layer, seed=seed) * 64 // 9831).bincount(minlength=64)
        assert len(counts) == 64
        assert float(((counts - 1000.0) ** 2 / 1000).sum()) < 130


def test_noise_differs_by_item_candidate_layer_and_both_halves_of_the_seed() -> None:
    plain = noise(1000)
    others = [
        noise(1001)[1:],  # the next item's
        noise(1000, candidate=2),
        noise(1000, layer=1),
        noise(1000, seed=1),
        noise(1000, seed=1 << 32),
        noise(1000, candidate=1, layer=2),
        noise(1000, candidate=2, layer=1),
    ]
    for number, one in enumerate([plain, *others]):
        for other in others[number:]:
            assert (one == other).sum() < 10
            together = torch.stack([one, other]).double()
            assert abs(float(torch.corrcoef(together)[0, 1])) < 0.15  # five standard deviations of 1000 samples


def test_the_noise_is_what_it_was_when_it_was_first_pinned() -> None:
    """Plans are replayed from a seed and a candidate: a change of the hash would change every one of them."""
    assert noise(8, layer=3, candidate=5, seed=7).tolist() == [892, 8458, 7126, 4091, 6952, 3594, 1894, 154]
    weight = torch.tensor([[100_000, 2**40 - 10**7, 3, 0]])
    keys = noisy_keys(weight, layer=torch.tensor([3]), candidate=torch.tensor([5]), seed=7)
    assert keys.tolist() == [[101361, 1241402030115, 3, 0]]
