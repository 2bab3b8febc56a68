"""What only the engine `cuda` has: kernels to compile, launches without waiting, and inputs that it refuses.

Shapes: X rows, E experts, P slots, M packs, G = P / M slots in each; T steps.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from packing_cases import TABLE, SettleCase

from distplb import DistplbError
from distplb.packing import cuda
from distplb.packing.settle import Terms

ZERO = torch.zeros(1, dtype=torch.int64)


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
    """The interpreter accepts code that the compiler refuses, such as a variable that changes its type in a loop."""
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
    constants = {"constexprs": blocks}
    if triton.__version__.startswith("3.2."):
        signature, constants = (
            {name: signature[name] for name in signature if name not in blocks},
            {"constants": blocks},
        )
    source = ASTSource(fn=function, signature=signature, **constants)
    compiled = compile(source, target=GPUTarget("cuda", 90, 32), options={"enable_fp_fusion": False})
    assert compiled.asm["cubin"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", ["64 in 8x8", "16 in 8x3", "3 in 4x5", "16 in 8x2 over 3", "12 in 4x3 over 3"])
def test_the_host_does_not_wait(name: str) -> None:
    for seed in range(3):
        case = TABLE[name].case(seed).part(slice(4)).on("cuda")
        for call in case.calls:
            case.answer(cuda, call)  # compiles
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
            try:
                case.answer(cuda, call)
            finally:
                torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(cuda.is_there(), reason="there is a GPU, or Triton interprets")
def test_an_engine_that_is_not_there_says_why_and_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "find_spec", lambda name: None)
    with pytest.raises(DistplbError, match="engine 'cuda' is not available: Triton is not installed; install triton"):
        cuda.pack(torch.tensor([[1, 2]]), 1, layer=ZERO, candidate=ZERO)
    monkeypatch.undo()
    pytest.importorskip("triton", reason="Triton is not installed")
    with pytest.raises(DistplbError, match=r"cuda.is_available\(\) is False; run on a machine with a GPU, or set "):
        cuda.finish(torch.tensor([[1, 2]]), torch.tensor([[0, 1]]), 1)


def test_an_engine_without_triton_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "find_spec", lambda name: None)
    assert not cuda.is_there()


@pytest.mark.parametrize("rows", [1, 7, 40])
@pytest.mark.parametrize("at_once", [1, 2, 3, 6, 100])
def test_slices_hold_all_rows_and_begin_at_16_bytes(rows: int, at_once: int) -> None:
    """Slices of int64. For others a kernel would be compiled again, in the middle of a rebalance."""
    slices = list(cuda._slices(rows, cuda._SCRATCH_BYTES // at_once))
    assert [row for part in slices for row in range(part.start, part.stop)] == list(range(rows))
    assert at_once == 1 or not any(part.start % 2 for part in slices)


@pytest.mark.parametrize(
    ("weight", "items", "num_packs", "wording"),
    [
        ([1, 2], [[0, 1]], 1, r"weight is torch.int64 of shape \(2,\); pass int64 of shape \[rows, items\]"),
        ([[1.0, 2.0]], [[0, 1]], 1, r"weight is torch.float32 of shape \(1, 2\); pass int64 of shape"),
        ([[1, 2]], [[0, 1], [0, 1]], 1, r"items is torch.int64 of shape \(2, 2\); pass int64 of shape \(1, 2\)"),
        ([[1, 2]], [[0.0, 1.0]], 1, r"items is torch.float32 of shape \(1, 2\); pass int64 of shape \(1, 2\)"),
        ([[1, 2, 3]], [[0, 1, 2]], 2, "3 items cannot be packed evenly into 2 packs; pass a divisor of 3"),
        ([[1, 2, 3]], [[0, 1, 2]], 0, "3 items cannot be packed evenly into 0 packs"),
        ([[1] * 4097], [[0] * 4097], 1, "a row has 4097 items and engine 'cuda' packs at most 4096; pass engine='cpu"),
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
        (2, 2, "3 experts cannot fit into 2 slots; pass 3 slots or more"),
        (2, 4098, "a row has 4098 items and engine 'cuda' packs at most 4096; pass engine='cpu'"),
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
        ("distance", None, "only distance is None; pass both distance and price, or neither"),
        ("price", None, "only price is None; pass both distance and price, or neither"),
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
    case = SettleCase(2, terms, torch.arange(4)[None], ZERO, ZERO)
    if name in Terms._fields:
        case = case._replace(terms=terms._replace(**{name: value}))
    else:
        case = case._replace(**{name: value})
    with pytest.raises(DistplbError, match=wording):
        case.answer(cuda)
