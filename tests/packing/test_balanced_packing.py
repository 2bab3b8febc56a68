"""`balanced_packing` against a second, plain implementation, and the properties that it promises.

Shapes: X rows, n items, M packs, g = n / M items in each, K candidates.
"""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import oracle
import pytest
import torch
from packing_cases import ONLY_PAIRS_HELP, rows_of_every_kind, skewed
from torch import Tensor

import distplb
from distplb import DistplbError, balanced_packing
from distplb.packing import balanced_packing as module
from distplb.packing import reference, steps
from distplb.packing.steps import pack_loads


def slot_table(pack_index: Tensor, rank_in_pack: Tensor, num_packs: int) -> Tensor:
    """`[X, n]`: the item in each slot; raises if two items share one."""
    n = pack_index.shape[1]
    table = torch.full_like(pack_index, -1)
    table.scatter_(1, pack_index * (n // num_packs) + rank_in_pack, torch.arange(n).expand_as(table))
    assert (table >= 0).all()
    return table


# --- equal to the oracle, to the bit ---------------------------------------------------------------------------


@pytest.mark.parametrize("num_candidates", [1, 2, 5])
@pytest.mark.parametrize(("num_packs", "size"), [(1, 4), (5, 1), (3, 2), (4, 3), (3, 5), (2, 6)])
def test_balanced_packing_equals_the_plain_implementation(num_packs: int, size: int, num_candidates: int) -> None:
    random_ = random.Random(f"balanced {num_packs} {size}")
    n = num_packs * size
    weight = rows_of_every_kind(random_, n)
    weight += [[random_.randrange(2**50) for _ in range(n)], [2**41 // n + 1] * n, [2**61 // n - 1] * n]
    table = slot_table(*balanced_packing(torch.tensor(weight), num_packs, num_candidates), num_packs)
    expected = oracle.balanced_packing(weight, num_packs, num_candidates)
    assert table.tolist() == [oracle.flat(packs) for packs in expected]


def test_balanced_packing_finishes_with_pair_swaps() -> None:
    """The same row through the public function: steps 1 to 4 stop at 14, so the pair swap leads to 13."""
    weight = torch.tensor([ONLY_PAIRS_HELP])
    zero = torch.zeros(1, dtype=torch.int64)
    assert pack_loads(weight, reference.pack(weight, 2, layer=zero, candidate=zero), 2).amax() == 14
    table = slot_table(*balanced_packing(weight, 2, num_candidates=1), 2)
    assert pack_loads(weight, table, 2).tolist() == [[13, 13]]


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
    monkeypatch.setattr(module, "engine_after", lambda *_: ("reference", reference))
    weight = skewed(4, rows=5, n=24)
    expected = balanced_packing(weight, 4, num_candidates=7)
    monkeypatch.setattr(module, "_BATCH", 300)  # two candidates at a time
    monkeypatch.setattr(steps, "_CHUNK", 1200)  # two rows at a time, one in the variance phase
    answer = balanced_packing(weight, 4, num_candidates=7)
    assert torch.equal(expected[0], answer[0])
    assert torch.equal(expected[1], answer[1])


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
    lightest = heaviest.cummin(0).values
    assert (heaviest.argmin(0) > 0).any()  # otherwise a search that ignores its candidates would pass
    for num_candidates in (1, 2, 5, 16):
        winner = (heaviest[:num_candidates] == lightest[num_candidates - 1]).int().argmax(0)  # [X], the first
        finished = reference.finish(weight, items[winner, layer], 8)
        table = slot_table(*balanced_packing(weight, 8, num_candidates), 8)
        assert torch.equal(table, finished)
        assert (pack_loads(weight, table, 8).amax(1) <= lightest[num_candidates - 1]).all()
    assert (lightest[1:] <= lightest[:-1]).all()


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
    expected = balanced_packing(weight, 4, num_candidates=4)
    answer = balanced_packing(weight.to(dtype), 4, num_candidates=4)
    assert torch.equal(expected[0], answer[0])
    assert torch.equal(expected[1], answer[1])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_small_integer_types_pack_as_int64(dtype: torch.dtype) -> None:
    weight = skewed(9, rows=20, n=32).clamp(max=255 if dtype == torch.uint8 else 32767)
    expected = balanced_packing(weight, 4, num_candidates=4)
    assert torch.equal(expected[0], balanced_packing(weight.to(dtype), 4, num_candidates=4)[0])


@pytest.mark.parametrize("scale", [2**29, 2**35])
def test_large_whole_floats_pack_as_the_integers(scale: int) -> None:
    """Symptom: whole floats with a row total above 2^39 were packed differently from the same integers.

    Cause: they were scaled and rounded like fractions, while integers keep their last bits up to a total of 2^40 and
    lose them to a shift, without rounding, above it.
    """
    weight = skewed(10, rows=30, n=16).clamp(500, 4000) * scale // 8 + torch.arange(16) % 7
    assert weight.sum(1).amin() > 2**39
    expected = balanced_packing(weight, 4, num_candidates=4)
    assert torch.equal(expected[0], balanced_packing(weight.double(), 4, num_candidates=4)[0])


@pytest.mark.parametrize("scale", [2.0**-30, 2.0**-120, 2.0**-1000, 2.0**200, 2.0**1000])
def test_floats_of_any_magnitude_pack_alike(scale: float) -> None:
    """If torch computes 2 to the exponent in float32, it is infinite above 2^127, and every weight was −2^63."""
    weight = skewed(11, rows=10, n=16).double() / 4096 + 1 / 3
    expected = balanced_packing(weight, 4, num_candidates=4)[0]
    assert torch.equal(balanced_packing(weight * scale, 4, num_candidates=4)[0], expected)


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
            r"weight has nan for item 1 of row 0 \(1 such value\); counts must be finite: check the cou",
        ),
        (
            [[1.0, 2.0], [float("inf"), float("-inf")]],
            1,
            r"weight has inf for item 0 of row 1 \(2 such values\); counts",
        ),
        ([[3, -2]], 1, r"weight has -2 for item 1 of row 0 \(1 such value\); counts must be non-negative"),
        ([[3.0, -0.5]], 1, r"weight has -0.5 for item 1 of row 0 \(1 such value\); counts must be non-negative"),
        ([[1, 2, 3]], 2, "3 items cannot be packed evenly into 2 packs; pass a divisor of 3"),
        ([[1, 2, 3]], 0, "3 items cannot be packed evenly into 0 packs"),
        ([[1, 2, 3]], -3, "3 items cannot be packed evenly into -3 packs"),
        ([[1j, 2j]], 1, "weight has dtype torch.complex64; pass counts as integers"),
        ([[]], 1, r"weight has shape \(1, 0\); pass numbers of shape \[rows, items\], with no empty dim"),
        ([], 1, r"weight has shape \(0,\); pass numbers"),
        ([1, 2], 1, r"weight has shape \(2,\); pass numbers"),
        ([[2**62, 1]], 1, "weight has a row whose total is 4.61e[+]18, too large to add up; divide the weights by a"),
    ],
)
def test_bad_weights_are_refused_by_their_value(weight: list, num_packs: int, wording: str) -> None:
    with pytest.raises(DistplbError, match=wording):
        balanced_packing(torch.tensor(weight), num_packs)


def test_floats_whose_total_is_infinite_are_refused() -> None:
    """Each weight is finite, but their total is not, and all weights silently became −2^63."""
    weight = torch.tensor([[1e308, 1.5e308]], dtype=torch.float64)
    with pytest.raises(DistplbError, match="a row whose total is inf, too large to add up; divide the weights by a po"):
        balanced_packing(weight, 2)


@pytest.mark.parametrize("num_candidates", [0, -1, 2**22 + 1])
def test_a_number_of_candidates_out_of_range_is_refused(num_candidates: int) -> None:
    with pytest.raises(DistplbError, match=rf"num_candidates is {num_candidates}; pass 1 to 2\^22"):
        balanced_packing(torch.tensor([[1, 2]]), 1, num_candidates)


# --- memory -----------------------------------------------------------------------------------------------------

# The kernel's high-water mark of this process image. `ru_maxrss` would not do: a child starts with its parent's.
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


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from Linux's /proc")
def test_deepseek_v3_with_64_candidates_stays_under_1_gib() -> None:
    environment = {"PYTHONPATH": str(Path(distplb.__file__).parents[1]), "PATH": ""}
    run = subprocess.run(
        [sys.executable, "-c", MEASURED], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert run.returncode == 0, run.stderr
    grown_kib = int(run.stdout)
    assert 0 < grown_kib < 1 << 20
