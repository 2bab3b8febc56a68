"""The engine `cuda` against the reference, to the bit: interpreted on any machine, and compiled where there is a GPU.

Shapes: X rows, n items, M packs, g = n / M items in each; with replicas E experts, P slots, G = P / M in each pack;
T steps.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from interpreted import prepare, printed_by
from settle_cases import Settling, settle_cases, woken
from torch import Tensor

from distplb import DistplbError
from distplb.packing import cuda, reference, settling, steps
from distplb.packing.candidates import noisy_keys
from distplb.packing.settling import Terms

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

# (M, g). Pair swaps are for 2 ≤ g ≤ 16; 17 is just beyond, 1 is the identity, M = 1 has nobody to swap with.
SMALL = [(1, 1), (1, 2), (1, 5), (4, 1), (2, 2), (3, 2), (8, 2), (2, 3), (4, 3), (3, 4), (2, 7), (3, 8), (2, 12)]
WIDER = [(2, 16), (2, 17), (17, 2), (4, 11), (8, 8)]
# (E, M, G): replicas, E < M × G. One pack, one slot in each, more of them than experts; then full or nearly full
# packs, where replicas that stay apart get stuck and one must make room.
REPLICATED = [
    (3, 1, 5),
    (5, 7, 1),
    (3, 2, 4),
    (4, 2, 3),
    (6, 4, 2),
    (2, 3, 1),
    (3, 4, 2),
    (3, 3, 3),
    (4, 5, 2),
    (5, 3, 3),
]
STUCK = [(6, 3, 4), (6, 3, 5), (5, 4, 4), (5, 3, 3), (6, 4, 4), (5, 5, 3)]
REPLICATED_LARGE = [
    *REPLICATED, *STUCK, (1, 4, 2), (16, 8, 3), (12, 4, 4), (32, 8, 5), (30, 6, 6), (20, 16, 2), (8, 16, 7), (64, 8, 9),
    (60, 4, 17), (256, 32, 9), (100, 3, 40), (9, 64, 2), (64, 72, 1),
]  # fmt: skip
LARGE = [*SMALL, *WIDER, (8, 16), (16, 8), (32, 8), (32, 9), (64, 5), (16, 16), (16, 17), (3, 43), (128, 2), (300, 1)]

# (E, M, G, T) of steps 10 and 11. Without replicas, all experts or some of them; then with.
SETTLED = [
    (6, 1, 6, 2),
    (6, 2, 3, 1),
    (6, 2, 3, 3),
    (9, 3, 3, 4),
    (10, 5, 2, 3),
    (8, 3, 2, 5),
    (16, 8, 2, 3),
    (8, 8, 1, 3),
    (4, 2, 3, 3),
    (3, 2, 4, 2),
    (6, 3, 3, 2),
    (7, 5, 2, 1),
    (5, 8, 1, 2),
    (12, 8, 2, 2),
]
SETTLED_LARGE = [
    *SETTLED, (12, 4, 3, 6), (16, 8, 3, 9), (64, 8, 9, 8), (30, 6, 6, 5), (60, 4, 17, 3), (256, 32, 9, 4),
    (64, 64, 2, 4), (100, 3, 40, 2), (48, 16, 3, 33), (300, 300, 1, 2), (24, 12, 2, 100),
]  # fmt: skip

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


class Replicated(NamedTuple):
    """One call with replicas, or rather one of each: rows of the same E, M and G."""

    num_packs: int
    num_slots: int
    weight: Tensor  # [X, E]
    start: Tensor  # [X, P], packings without any order in them, of any experts
    layer: Tensor  # [X]
    candidate: Tensor  # [X]
    seed: int
    shared: bool  # whether replicas may be in one pack


# An entry point of an engine on a case; one that is added here is tested by all that follows.
ENTRY_POINTS: dict[str, Callable[..., Tensor]] = {
    "pack": lambda engine, case: engine.pack(
        case.weight, case.num_packs, layer=case.layer, candidate=case.candidate, seed=case.seed
    ),
    "finish": lambda engine, case: engine.finish(case.weight, case.start, case.num_packs),
    "refine": lambda engine, case: engine.refine(
        case.weight,
        case.num_packs,
        getattr(case, "num_slots", case.weight.shape[1]),
        layer=case.layer,
        candidate=case.candidate,
        seed=case.seed,
        shared=getattr(case, "shared", True),
    ),
    # From any start, so that there is more to swap than after the steps before.
    "polish": lambda engine, case: engine.polish(case.weight, case.start, case.num_packs),
    "lower_variance": lambda engine, case: engine.lower_variance(case.weight, case.start, case.num_packs),
    "lower_max": lambda engine, case: engine.lower_max(case.weight, case.start, case.num_packs),
}

WITH_REPLICAS = ["refine", "polish"]


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


def replicated(shapes: list[tuple[int, int, int]], rows: int, seed: int = 0) -> Iterator[Replicated]:
    """One case for each (E, M, G), of `rows` rows; the kinds take turns.

    Half of the starts keep replicas apart where that is possible; some leave experts out, and hold others more often.
    """
    kinds = list(KINDS.values())
    for number, (num_experts, num_packs, size) in enumerate(shapes):
        random_ = random.Random(f"{seed} {num_experts} {num_packs} {size}")
        num_slots = num_packs * size
        weight = [kinds[(number + row) % len(kinds)](random_, num_experts) for row in range(rows)]
        starts = []
        for row in range(rows):
            if row % 2 and size <= num_experts:
                starts.append([e for _ in range(num_packs) for e in random_.sample(range(num_experts), size)])
            else:
                starts.append([random_.randrange(num_experts) for _ in range(num_slots)])
        yield Replicated(
            num_packs,
            num_slots,
            torch.tensor(weight),
            torch.tensor(starts),
            torch.tensor([random_.randrange(100) for _ in range(rows)]),
            torch.tensor([random_.choice([0, random_.randrange(2**22)]) for _ in range(rows)]),
            random_.choice([0, random_.randrange(2**62)]),
            num_slots > num_packs * num_experts or bool((number + seed) % 3),
        )


def small_cases() -> list[Case]:
    """What the interpreter manages in some seconds."""
    return [*cases(SMALL[:8], rows=2 * len(KINDS)), *cases(SMALL[8:], rows=5), *cases(WIDER, rows=2)]


def small_replicated() -> list[Replicated]:
    """What the interpreter manages in half a minute, in both searches."""
    return [*replicated(REPLICATED, rows=6), *replicated(STUCK, rows=3), *replicated(STUCK[:4], rows=3, seed=1)]


def few_experts_of_many() -> Replicated:
    """A node's part of all experts: more of them than slots, with and without replicas."""
    random_ = random.Random(3)
    zero = torch.zeros(4, dtype=torch.int64)
    weight = torch.tensor([[random_.randrange(1000) for _ in range(40)] for _ in zero])
    start = torch.tensor([random_.sample(range(40), 12) for _ in zero])
    start[2:, 3] = start[2:, 0]  # in another pack, and below in the same
    start[3, 1] = start[3, 0]
    return Replicated(4, 12, weight, start, zero, zero, 0, True)


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


def on(device: str, case: Case | Replicated) -> Case | Replicated:
    return type(case)(*(value.to(device) if isinstance(value, Tensor) else value for value in case))


def differences(many: Sequence[Case | Replicated], device: str, entry_points: list[str]) -> list[str]:
    """What the engine answers otherwise than the reference, in words."""
    found = []
    for case in many:
        there = on(device, case)
        for name in entry_points:
            wanted = ENTRY_POINTS[name](reference, case)  # [X, n] or [X, P]
            answer = ENTRY_POINTS[name](cuda, there)
            assert answer.device == there.weight.device
            for row in (answer.cpu() != wanted).any(1).nonzero()[:, 0].tolist():
                shared = f", shared {case.shared}" if isinstance(case, Replicated) else ""
                found.append(
                    f"{name} into {case.num_packs} packs{shared}, layer {case.layer[row]}, "
                    f"candidate {case.candidate[row]}, seed {case.seed}: weights {case.weight[row].tolist()}, "
                    f"start {case.start[row].tolist()}, "
                    f"gives {answer[row].tolist()} and not {wanted[row].tolist()}"
                )
    return found


def settle_differences(many: Sequence[Settling], device: str) -> list[str]:
    """As `differences`, of `settle`."""
    found = []
    for case in many:
        wanted = case.settled(reference)  # [X, P]
        answer = case.on(device).settled(cuda)
        assert answer.device.type == device
        for x in (answer.cpu() != wanted).any(1).nonzero()[:, 0].tolist():
            found.append(f"settle {case.row(x)} gives {answer[x].tolist()} and not {wanted[x].tolist()}")
    return found


def interpreted() -> None:
    """Print the number of rows and the differences; runs in a child, for Triton must not have been imported before."""
    prepare()
    many = small_cases()
    found = differences(many, "cpu", ["pack", "finish"]) + differences(at_the_limits(), "cpu", ["finish"])
    found += differences([at_the_last_bit()], "cpu", ["lower_variance"])
    found += differences(many[::3], "cpu", ["refine", "polish"])
    with_replicas = [*small_replicated(), few_experts_of_many()]
    found += differences(with_replicas[:-1], "cpu", ["refine"]) + differences(with_replicas, "cpu", ["polish"])
    cuda._CELLS = 1  # tiles of a few positions, so that a short row takes several of them as long ones do
    more = list(cases([(2, 7), (2, 12)], rows=len(KINDS), seed=1))
    found += differences(more, "cpu", list(ENTRY_POINTS))
    more_replicas = list(replicated([(8, 2, 5), (6, 2, 7), (3, 2, 4), (4, 2, 3)], rows=2, seed=2))
    cuda._HELD = 100  # a launch for one row or two
    found += differences(more_replicas, "cpu", WITH_REPLICAS)
    rows = sum(len(case.weight) for case in many + more)
    print(json.dumps([rows, sum(len(case.weight) for case in with_replicas + more_replicas), found]))


def settle_interpreted() -> None:
    """As `interpreted`, of `settle`."""
    prepare()
    many = small_settling()
    found = settle_differences(many, "cpu")
    cuda._CELLS = 1  # tiles of a few exchanges, and of a few steps
    cuda._HELD = 1000  # a launch for one row or two
    more = [*settle_cases([(24, 8, 4, 17), (18, 4, 5, 4)], rows=2, seed=1)]
    found += settle_differences(more, "cpu")
    settling.scans = cuda.scans = lambda num_packs: 2  # type: ignore[assignment]
    more += settle_cases([(12, 4, 3, 3), (12, 4, 4, 3)], rows=6, seed=3)
    found += settle_differences(more[-2:], "cpu")
    print(json.dumps([sum(len(case.table) for case in many + more), found, outside_of_tensors()]))


def outside_of_tensors() -> str:
    """What is raised where a kernel is given less of a tensor than it is told."""
    launch = cuda._launch
    cuda._launch = lambda kernel, tensors, options: launch(kernel, (tensors[0][:, :-1].clone(), *tensors[1:]), options)
    try:
        cuda.pack(torch.arange(12).view(1, 12), 3, layer=torch.zeros(1).long(), candidate=torch.zeros(1).long())
    except Exception as error:
        return repr(error)
    return ""


def small_settling() -> list[Settling]:
    """What the interpreter manages in half a minute."""
    return [*settle_cases(SETTLED, rows=8), *settle_cases(SETTLED, rows=4, seed=2), *woken()]


def test_interpreted_kernels_equal_the_reference() -> None:
    rows, rows_with_replicas, found = printed_by("test_cuda_engine", "interpreted")
    assert rows >= 200
    assert rows_with_replicas >= 100
    assert not found, "\n".join(found)


def test_interpreted_settle_equals_the_reference() -> None:
    rows, found, outside = printed_by("test_cuda_engine", "settle_interpreted")
    assert "addresses are in no tensor of the kernel" in outside  # so the others stayed inside
    assert rows >= 150
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


def test_the_cases_with_replicas_reach_every_branch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the test above would also pass with kernels that leave branches out."""
    displaced, searches = [], []
    put, search = steps._displaced, reference._searched
    monkeypatch.setattr(steps, "_displaced", lambda *args: displaced.append(args[4]) or put(*args))
    monkeypatch.setattr(reference, "_searched", lambda *a, apart: searches.append(apart) or search(*a, apart=apart))
    crowded, moved, tried = [], [], []
    for case in small_replicated():
        table = ENTRY_POINTS["refine"](reference, case)
        crowded.append(steps.crowded(table, case.num_packs))
        moved.append((ENTRY_POINTS["polish"](reference, case) != case.start).any(1))
        key = noisy_keys(case.weight, layer=case.layer, candidate=case.candidate, seed=case.seed)
        most = case.num_packs if case.num_slots <= case.num_packs * case.weight.shape[1] else case.num_slots
        replicas = steps.divide(key, case.num_slots, most)
        tried.append((reference._replicas(table, case.weight.shape[1]) != replicas).any(1))
    assert len(displaced) > 5
    assert searches.count(False) > 5
    for name, happened in {"crowded": crowded, "moved": moved, "tried": tried}.items():
        assert torch.cat(happened).sum() > 5, name
        assert not torch.cat(happened).all(), name


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="Triton interprets")
@pytest.mark.parametrize(
    ("kernel", "blocks"),
    [
        ("greedy_kernel", {"N": 64, "M": 8}),
        ("variance_kernel", {"N": 64, "A": 32}),
        ("max_kernel", {"N": 64, "A": 8}),
        ("pairs_kernel", {"N": 64, "Q": 32, "A": 32}),
        ("refine_kernel", {"B": 32, "M": 8, "N": 64, "Q": 32, "R": 32, "A": 8, "A2": 32}),
        ("polish_kernel", {"N": 64, "Q": 32, "A": 8, "A2": 32}),
        ("settle_kernel", {"N": 64, "M": 8, "S": 32, "K": 512, "U": 4, "A": 32}),
        ("settle_kernel", {"N": 32, "M": 2, "S": 1, "K": 32, "U": 1, "A": 32, "distance": None, "price": None}),
    ],
)
def test_the_kernels_compile_for_a_gpu_that_is_not_here(
    kernel: str, blocks: dict[str, int | None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The interpreter runs what the compiler refuses, such as a variable that changes its type in a loop."""
    triton = pytest.importorskip("triton", reason="Triton is not installed")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from distplb.packing import cuda_kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    function = getattr(cuda_kernels, kernel)
    numbers = ["num_items", "size", "rounds", *cuda_kernels.NUMBERS]
    types = dict.fromkeys(numbers, "i32") | {"holds": "*i8", "distance": "*i8"}
    if kernel == "settle_kernel":
        types |= dict.fromkeys(["share", "load", "rest", "lower", "above"], "*i32")
    types |= dict.fromkeys(blocks, "constexpr")
    signature = {name: types.get(name, "*i64") for name in function.arg_names}
    given = {"constexprs": blocks}
    if triton.__version__.startswith("3.2."):
        signature, given = {name: signature[name] for name in signature if name not in blocks}, {"constants": blocks}
    source = ASTSource(fn=function, signature=signature, **given)
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
@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("entry_point", WITH_REPLICAS)
def test_compiled_kernels_equal_the_reference_with_replicas(entry_point: str, seed: int) -> None:
    many = list(replicated(REPLICATED_LARGE, rows=2 * len(KINDS), seed=seed))
    found = differences(many, "cuda", [entry_point])
    if entry_point == "polish":
        found += differences([few_experts_of_many()], "cuda", [entry_point])
    assert not found, "\n".join(found)


@needs_cuda
@pytest.mark.parametrize("seed", range(10))
def test_compiled_settle_equals_the_reference(seed: int) -> None:
    found = settle_differences([*settle_cases(SETTLED_LARGE, rows=12, seed=seed), *woken()], "cuda")
    assert not found, "\n".join(found)


@needs_cuda
@pytest.mark.parametrize("shape", [(64, 64), (1, 1000), (1000, 3)])
def test_the_longest_rows_equal_the_reference(shape: tuple[int, int]) -> None:
    found = differences(list(cases([shape], rows=2)), "cuda", list(ENTRY_POINTS))
    assert not found, "\n".join(found)


@needs_cuda
@pytest.mark.parametrize("entry_point", ENTRY_POINTS)
def test_the_host_does_not_wait(entry_point: str) -> None:
    many: list[Case | Replicated] = [*cases([(8, 8)], rows=4)]
    if entry_point in WITH_REPLICAS:
        many += replicated([(16, 8, 3), (2, 3, 3)], rows=4)
    for case in many:
        there = on("cuda", case)
        ENTRY_POINTS[entry_point](cuda, there)  # compiles
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            ENTRY_POINTS[entry_point](cuda, there)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@needs_cuda
@pytest.mark.parametrize("seed", range(3))
def test_the_host_does_not_wait_for_settle(seed: int) -> None:
    case = next(settle_cases([(16, 8, 3, 3)], rows=4, seed=seed)).on("cuda")
    case.settled(cuda)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        case.settled(cuda)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_cuda
def test_weights_of_the_cpu_come_back_there() -> None:
    assert not differences(list(cases([(4, 6)], rows=4)), "cpu", ["pack", "finish", "refine", "polish"])
    assert not differences(list(replicated([(6, 4, 3)], rows=4)), "cpu", WITH_REPLICAS)
    assert not settle_differences(list(settle_cases([(6, 4, 3, 2)], rows=4)), "cpu")


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


@pytest.mark.parametrize("rows", [1, 7, 40])
@pytest.mark.parametrize("at_once", [1, 2, 3, 6, 100])
def test_slices_hold_all_rows_and_begin_at_16_bytes(rows: int, at_once: int) -> None:
    """Of int64; a kernel is compiled once more for what does not, in the middle of a rebalance."""
    found = list(cuda._slices(rows, cuda._HELD // at_once))
    assert [row for part in found for row in range(part.start, part.stop)] == list(range(rows))
    assert at_once == 1 or not any(part.start % 2 for part in found)


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


@pytest.mark.parametrize(
    ("num_packs", "num_slots", "wording"),
    [
        (2, 5, "5 items cannot be packed evenly into 2 packs; pass a divisor of 5"),
        (2, 2, "3 experts cannot have 2 slots; pass 3 or more"),
        (2, 4098, "a row has 4098 items and engine 'cuda' packs at most 4096; pass engine='reference'"),
    ],
)
def test_slots_that_cannot_be_are_refused(num_packs: int, num_slots: int, wording: str) -> None:
    weight = torch.tensor([[1, 2, 3]])
    with pytest.raises(DistplbError, match=wording):
        cuda.refine(weight, num_packs, num_slots, layer=ZERO, candidate=ZERO)


def test_a_table_of_another_shape_is_refused() -> None:
    with pytest.raises(DistplbError, match=r"table is torch.int32 of shape \(1, 2\); pass int64 of shape \(1, 2\)"):
        cuda.polish(torch.tensor([[1, 2]]), torch.tensor([[0, 1]]).int(), 1)
    with pytest.raises(DistplbError, match=r"table is torch.int64 of shape \(2, 2\); pass int64 of shape \(1, 2\)"):
        cuda.polish(torch.tensor([[1, 2]]), torch.tensor([[0, 1], [0, 1]]), 1)


@pytest.mark.parametrize(
    ("name", "value", "wording"),
    [
        ("load", ZERO, r"load is torch.int64 of shape \(1,\); pass int64 of shape \[layers, steps, experts\]"),
        ("load", torch.zeros(1, 1, 4), r"load is torch.float32 of shape \(1, 1, 4\); pass int64 of shape"),
        ("region", ZERO, r"region is torch.int64 of shape \(1,\); pass int64 of shape \(4,\)"),
        (
            "distance",
            torch.zeros(1, 4, 2),
            r"distance is torch.float32 of shape \(1, 4, 2\); pass int8 of shape \(1, 4",
        ),
        ("distance", None, "distance is None alone; pass distance and price, or neither"),
        ("price", None, "price is None alone; pass distance and price, or neither"),
        ("price", ZERO, r"price is torch.int64 of shape \(1,\); pass int64 of shape \(1, 3\)"),
        ("table", ZERO, r"table is torch.int64 of shape \(1,\); pass int64 of shape \[rows, slots\]"),
        ("layer", ZERO.int(), r"layer is torch.int32 of shape \(1,\); pass int64 of shape \(1,\)"),
        ("ceiling", ZERO[:0], r"ceiling is torch.int64 of shape \(0,\); pass int64 of shape \(1,\)"),
        ("num_packs", 3, "4 items cannot be packed evenly into 3 packs; pass a divisor of 4"),
    ],
)
def test_what_settle_would_read_wrongly_is_refused(name: str, value: object, wording: str) -> None:
    whole = torch.zeros(1, 1, 4, dtype=torch.int64)
    distance, price = torch.zeros(1, 4, 2, dtype=torch.int8), torch.zeros(1, 3, dtype=torch.int64)
    terms = Terms(whole, whole[0, 0], distance=distance, price=price)
    case = Settling(2, terms, torch.arange(4)[None], ZERO, ZERO)
    if name in Terms._fields:
        case = case._replace(terms=terms._replace(**{name: value}))
    else:
        case = case._replace(**{name: value})
    with pytest.raises(DistplbError, match=wording):
        case.settled(cuda)
