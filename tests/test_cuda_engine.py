"""The engine `cuda` against the reference, to the bit: interpreted on any machine, and compiled where there is a GPU.

Shapes: X rows, n items, M packs, g = n / M items in each.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import distplb
from distplb import DistplbError
from distplb.packing import cuda, reference

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

# (M, g). Pair swaps are for 2 ≤ g ≤ 16; 17 is just beyond, 1 is the identity, M = 1 has nobody to swap with.
SMALL = [(1, 1), (1, 2), (1, 5), (4, 1), (2, 2), (3, 2), (8, 2), (2, 3), (4, 3), (3, 4), (2, 7), (3, 8), (2, 12)]
WIDER = [(2, 16), (2, 17), (17, 2), (4, 11), (8, 8)]
LARGE = [*SMALL, *WIDER, (8, 16), (16, 8), (32, 8), (32, 9), (64, 5), (16, 16), (16, 17), (3, 43), (128, 2), (300, 1)]

KINDS: dict[str, Callable[[random.Random, int], list[int]]] = {
    "ties": lambda r, n: [r.randrange(3) for _ in range(n)],
    "equal": lambda r, n: [r.choice([1, 7, 2**40 // n])] * n,
    "zeros": lambda r, n: [0] * n,
    "mostly zero": lambda r, n: [r.choice([0, 0, r.randrange(50)]) for _ in range(n)],
    "even": lambda r, n: [r.randrange(900, 1000) for _ in range(n)],
    "skewed": lambda r, n: [int(r.lognormvariate(6, 1.5)) for _ in range(n)],
    "one hot": lambda r, n: hot(r, [r.randrange(2) for _ in range(n)], 10**6),
    "one alone": lambda r, n: hot(r, [0] * n, 2**40),
    "full": lambda r, n: [2**40 // n - r.randrange(2**11) for _ in range(n)],
    "wide": lambda r, n: [r.randrange(2**40 // n) for _ in range(n)],
    # Where one bit more is shifted away in the variance phase: the total is 2^30, or another power of two, or one more.
    "shift": lambda r, n: summing_to(r, n, 2 ** r.choice([30, 30, 31, 39]) + r.choice([0, 1])),
}


class Case(NamedTuple):
    """One call: rows of the same n and M."""

    num_packs: int
    weight: Tensor  # [X, n]
    start: Tensor  # [X, n], packings without any order in them
    layer: Tensor  # [X]
    candidate: Tensor  # [X]
    seed: int


# An entry point of an engine on a case; one that is added here is tested by all that follows.
ENTRY_POINTS: dict[str, Callable[..., Tensor]] = {
    "pack": lambda engine, case: engine.pack(
        case.weight, case.num_packs, layer=case.layer, candidate=case.candidate, seed=case.seed
    ),
    "finish": lambda engine, case: engine.finish(case.weight, case.start, case.num_packs),
    # From any start, so that there is more to swap than after the steps before.
    "lower_variance": lambda engine, case: engine.lower_variance(case.weight, case.start, case.num_packs),
    "lower_max": lambda engine, case: engine.lower_max(case.weight, case.start, case.num_packs),
}


def hot(random_: random.Random, row: list[int], weight: int) -> list[int]:
    """`row` with one weight replaced."""
    row[random_.randrange(len(row))] = weight
    return row


def summing_to(random_: random.Random, n: int, total: int) -> list[int]:
    """`[n]` random weights of that total."""
    cuts = sorted(random_.randrange(total + 1) for _ in range(n - 1))
    return [end - begin for begin, end in zip([0, *cuts], [*cuts, total], strict=True)]


def cases(shapes: list[tuple[int, int]], rows: int, seed: int = 0) -> Iterator[Case]:
    """One case for each (M, g), of `rows` rows; the kinds take turns."""
    kinds = list(KINDS.values())
    for number, (num_packs, size) in enumerate(shapes):
        random_ = random.Random(f"{seed} {num_packs} {size}")
        n = num_packs * size
        yield Case(
            num_packs,
            torch.tensor([kinds[(number + row) % len(kinds)](random_, n) for row in range(rows)]),
            torch.tensor([random_.sample(range(n), n) for _ in range(rows)]),
            torch.tensor([random_.randrange(100) for _ in range(rows)]),
            torch.tensor([random_.choice([0, 1, random_.randrange(2**22), 2**22 - 1]) for _ in range(rows)]),
            random_.choice([0, random_.randrange(2**62)]),
        )


def small_cases() -> list[Case]:
    """What the interpreter manages in half a minute."""
    return [*cases(SMALL[:8], rows=2 * len(KINDS)), *cases(SMALL[8:], rows=5), *cases(WIDER, rows=2)]


def at_the_limits() -> list[Case]:
    """More swaps to make than there are rounds: one evens out one heavy pack and one light pack, and half are heavy.

    In packs of two the min-max refinement does so, in packs of three the pair swaps do.
    """
    zero = torch.zeros(1, dtype=torch.int64)
    return [
        Case(num_packs, torch.tensor([row]), torch.arange(len(row))[None], zero, zero, 0)
        for num_packs, row in ((104, [5] * 104 + [1] * 104), (44, [3] * 66 + [1] * 66))
    ]


def at_the_last_bit() -> Case:
    """Two rows that the variance phase improves by their last bit: a total of 2^30 keeps it, 2^30 + 4 does not."""
    rows = [[2**28 + 1, 2**27 + 1, third + 2, 2**28, 2**27, third] for third in (2**27 - 2, 2**27)]
    zero = torch.zeros(2, dtype=torch.int64)
    return Case(2, torch.tensor(rows), torch.arange(6).repeat(2, 1), zero, zero, 0)


def differences(many: list[Case], device: str, entry_points: list[str]) -> list[str]:
    """What the engine answers otherwise than the reference, in words."""
    found = []
    for case in many:
        there = Case(*(value.to(device) if isinstance(value, Tensor) else value for value in case))
        for name in entry_points:
            wanted = ENTRY_POINTS[name](reference, case)  # [X, n]
            answer = ENTRY_POINTS[name](cuda, there)
            assert answer.device == there.weight.device
            for row in (answer.cpu() != wanted).any(1).nonzero()[:, 0].tolist():
                found.append(
                    f"{name} into {case.num_packs} packs, layer {case.layer[row]}, candidate {case.candidate[row]}, "
                    f"seed {case.seed}: weights {case.weight[row].tolist()}, start {case.start[row].tolist()}, "
                    f"gives {answer[row].tolist()} and not {wanted[row].tolist()}"
                )
    return found


def interpreted() -> None:
    """Print the number of rows and the differences; runs in a child, for Triton must not have been imported before."""
    torch.set_num_threads(1)
    many = small_cases()
    found = differences(many, "cpu", ["pack", "finish"]) + differences(at_the_limits(), "cpu", ["finish"])
    found += differences([at_the_last_bit()], "cpu", ["lower_variance"])
    cuda._CELLS = 1  # tiles of a few positions, so that a short row takes several of them as long ones do
    more = list(cases([(2, 7), (2, 12)], rows=len(KINDS), seed=1))
    found += differences(more, "cpu", list(ENTRY_POINTS))
    print(json.dumps([sum(len(case.weight) for case in many + more), found]))


def test_interpreted_kernels_equal_the_reference() -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    path = os.pathsep.join([str(Path(distplb.__file__).parents[1]), str(Path(__file__).parent)])
    run = subprocess.run(
        [sys.executable, "-c", "import test_cuda_engine; test_cuda_engine.interpreted()"],
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    rows, found = json.loads(run.stdout.splitlines()[-1])
    assert rows >= 200
    assert not found, "\n".join(found)


def test_the_cases_swap_in_every_step_and_reach_the_limits() -> None:
    """Else the test above would also pass with kernels that leave steps out."""
    many = small_cases()
    for name in ("lower_variance", "lower_max", "swap_pairs"):
        step = getattr(reference, name)
        changed = [(step(case.weight, case.start, case.num_packs) != case.start).any(1) for case in many]
        assert torch.cat(changed).sum() > 20, name
    for case, step in zip(at_the_limits(), (reference.lower_max, reference.swap_pairs), strict=True):
        once = step(case.weight, case.start, case.num_packs)
        assert not torch.equal(once, step(case.weight, once, case.num_packs))
    case = at_the_last_bit()
    moved = (reference.lower_variance(case.weight, case.start, case.num_packs) != case.start).any(1)
    assert moved.tolist() == [True, False]
    totals = torch.cat([case.weight.sum(1) for case in many]).tolist()
    assert {2**30, 2**30 + 1, 2**40} <= set(totals)
    assert max(totals) == 2**40


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="Triton interprets")
@pytest.mark.parametrize(
    ("kernel", "blocks"),
    [
        ("greedy_kernel", {"N": 64, "M": 8}),
        ("variance_kernel", {"N": 64, "A": 32}),
        ("max_kernel", {"N": 64, "A": 8}),
        ("pairs_kernel", {"N": 64, "Q": 32, "A": 32}),
    ],
)
def test_the_kernels_compile_for_a_gpu_that_is_not_here(
    kernel: str, blocks: dict[str, int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The interpreter runs what the compiler refuses, such as a variable that changes its type in a loop."""
    pytest.importorskip("triton", reason="Triton is not installed")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from distplb.packing import cuda_kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    function = getattr(cuda_kernels, kernel)
    numbers = dict.fromkeys(["num_items", "size", "num_pairs"], "i32") | dict.fromkeys(blocks, "constexpr")
    signature = {name: numbers.get(name, "*i64") for name in function.arg_names}
    source = ASTSource(fn=function, signature=signature, constexprs=blocks)
    compiled = compile(source, target=GPUTarget("cuda", 90, 32), options={"enable_fp_fusion": False})
    assert compiled.asm["cubin"]


# --- on a GPU ---------------------------------------------------------------------------------------------------


@needs_cuda
@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("entry_point", ENTRY_POINTS)
def test_compiled_kernels_equal_the_reference(entry_point: str, seed: int) -> None:
    many = [*cases(LARGE, rows=2 * len(KINDS), seed=seed), *at_the_limits(), at_the_last_bit()]
    found = differences(many, "cuda", [entry_point])
    assert not found, "\n".join(found)


@needs_cuda
@pytest.mark.parametrize("shape", [(64, 64), (1, 1000), (1000, 3)])
def test_the_longest_rows_equal_the_reference(shape: tuple[int, int]) -> None:
    found = differences(list(cases([shape], rows=2)), "cuda", list(ENTRY_POINTS))
    assert not found, "\n".join(found)


@needs_cuda
@pytest.mark.parametrize("entry_point", ENTRY_POINTS)
def test_the_host_does_not_wait(entry_point: str) -> None:
    (case,) = cases([(8, 8)], rows=4)
    there = Case(*(value.cuda() if isinstance(value, Tensor) else value for value in case))
    ENTRY_POINTS[entry_point](cuda, there)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        ENTRY_POINTS[entry_point](cuda, there)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_cuda
def test_weights_of_the_cpu_come_back_there() -> None:
    assert not differences(list(cases([(4, 6)], rows=4)), "cpu", ["pack", "finish"])


# --- without one ------------------------------------------------------------------------------------------------

ZERO = torch.zeros(1, dtype=torch.int64)


@pytest.mark.skipif(cuda.is_there(), reason="there is a GPU, or Triton interprets")
def test_an_engine_that_is_not_there_says_why_and_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "find_spec", lambda name: None)
    with pytest.raises(DistplbError, match="engine 'cuda' is not there: Triton is not installed; install triton"):
        cuda.pack(torch.tensor([[1, 2]]), 1, layer=ZERO, candidate=ZERO)
    monkeypatch.undo()
    pytest.importorskip("triton", reason="Triton is not installed")
    with pytest.raises(DistplbError, match=r"cuda.is_available\(\) is False; run where there is a GPU, or set TRITON_"):
        cuda.finish(torch.tensor([[1, 2]]), torch.tensor([[0, 1]]), 1)


def test_an_engine_without_triton_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "find_spec", lambda name: None)
    assert not cuda.is_there()


@pytest.mark.parametrize(
    ("weight", "items", "num_packs", "wording"),
    [
        ([1, 2], [[0, 1]], 1, r"weight is torch.int64 of shape \(2,\); pass int64 of shape \[rows, items\]"),
        ([[1.0, 2.0]], [[0, 1]], 1, r"weight is torch.float32 of shape \(1, 2\); pass int64 of shape"),
        ([[1, 2]], [[0, 1], [0, 1]], 1, r"items is torch.int64 of shape \(2, 2\); pass int64 of shape \(1, 2\)"),
        ([[1, 2]], [[0.0, 1.0]], 1, r"items is torch.float32 of shape \(1, 2\); pass int64 of shape \(1, 2\)"),
        ([[1, 2, 3]], [[0, 1, 2]], 2, "3 items cannot be packed evenly into 2 packs; pass a divisor of 3"),
        ([[1, 2, 3]], [[0, 1, 2]], 0, "3 items cannot be packed evenly into 0 packs"),
        ([[1] * 4097], [[0] * 4097], 1, "a row has 4097 items and engine 'cuda' packs at most 4096; pass engine='ref"),
    ],
)
def test_what_the_kernels_would_read_wrongly_is_refused(
    weight: list, items: list, num_packs: int, wording: str
) -> None:
    with pytest.raises(DistplbError, match=wording):
        cuda.finish(torch.tensor(weight), torch.tensor(items), num_packs)


def test_a_layer_or_candidate_of_another_shape_is_refused() -> None:
    weight = torch.tensor([[1, 2]])
    with pytest.raises(DistplbError, match=r"layer is torch.int64 of shape \(2,\); pass int64 of shape \(1,\)"):
        cuda.pack(weight, 1, layer=torch.tensor([0, 0]), candidate=ZERO)
    with pytest.raises(DistplbError, match=r"candidate is torch.int32 of shape \(1,\); pass int64 of shape \(1,\)"):
        cuda.pack(weight, 1, layer=ZERO, candidate=ZERO.int())
