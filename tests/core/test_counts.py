"""The single entry for counts: the same numbers are the same load in any container, and anything else is refused.

Shapes: T steps, L layers, E experts.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate

from distplb import (
    DistplbError,
    EventLog,
    FlatShard,
    LoadWindow,
    MoELayer,
    MoveModel,
    Placement,
    Spread,
    TimeCurve,
    Topology,
    Trace,
    TraceWriter,
    balanced_packing,
    imbalance,
    lower_bound,
    measured_curve,
    plan,
    read_events,
    rebalance_experts,
    replay,
)
from distplb.comm.base import WorldOfOne
from distplb.core.count_errors import exact_limit
from distplb.core.counts import as_counts, as_tokens, marked, refuse_marked
from distplb.train.measure import measured_bandwidths

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

NUMPY_TYPES = ["u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8", ">i4", ">u2", ">f8", "f2", "f4", "f8"]
TORCH_TYPES = [
    *(torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
]
TOPOLOGY = Topology(1, 2)
START = Placement.contiguous(2, 4, 2)


def small_load(most: int = 127) -> Tensor:
    random_ = random.Random(most)
    values = [random_.randrange(most + 1) for _ in range(3 * 2 * 4)]
    return torch.tensor(values).view(3, 2, 4)


def backwards(array: np.ndarray) -> np.ndarray:
    """The same numbers, with a negative stride."""
    return np.ascontiguousarray(array[..., ::-1])[..., ::-1]


def frozen(array: np.ndarray) -> np.ndarray:
    array.flags.writeable = False
    return array


def held(kind: Any) -> Callable[[Tensor], Any]:
    """A function from int64 to the same numbers in another type or container."""
    if isinstance(kind, torch.dtype):
        return lambda load: load.to(kind)
    return {
        "list": lambda load: load.tolist(),
        "tuple of lists": lambda load: tuple(load.tolist()),
        "list of floats": lambda load: load.double().tolist(),
        "list of tensors": list,
        "list of lists of tensors": lambda load: [list(row) for row in load],
        "list of arrays": lambda load: list(load.numpy().astype("u2")),
        "list of NumPy's numbers": lambda load: [list(row) for row in load.numpy()],
        "a tensor of a graph": lambda load: load.float().requires_grad_() * 1,
        "a tensor with gaps": lambda load: load.repeat_interleave(2, -1)[..., ::2],
        "a negative stride": lambda load: backwards(load.numpy()),
        "not to be written": lambda load: frozen(load.numpy().astype("u2")),
    }.get(kind) or (lambda load: load.numpy().astype(kind))


HELD = [*NUMPY_TYPES, *TORCH_TYPES]
HELD += ["list", "tuple of lists", "list of floats", "list of tensors", "list of lists of tensors", "list of arrays"]
HELD += ["list of NumPy's numbers", "a tensor of a graph", "a tensor with gaps", "a negative stride"]
HELD += ["not to be written"]


# --- the same numbers -------------------------------------------------------------------------------------------


def by_window(load: Any) -> Tensor:
    """A window's load of the first two steps of layer 1."""
    window = LoadWindow(1, 4, 4)
    for step in range(2):
        window.add(0, load[step][1], training=True)
    return window.load()


def by_writer(load: Any, folder: Path) -> Tensor:
    with TraceWriter(folder) as writer:
        writer.add(load, START, [3, 4, 5])
    return Trace.read(folder).load


def by_replay(load: Any) -> Tensor:
    model = MoveModel(1e-6, 8, 1e9, 1e9)
    trace = Trace(load, (START,), [0, 0, 0], [0, 1, 2])
    return replay(trace, lambda past, now: plan(past, TOPOLOGY, current=now), topology=TOPOLOGY, every=1, model=model)


DOORS: dict[str, Callable[[Any, Path], Any]] = {
    "as_tokens": lambda load, _: as_tokens(load),
    "plan": lambda load, _: plan(load, TOPOLOGY, num_candidates=3).expert_of_slot,
    "plan with replicas": lambda load, _: plan(load, TOPOLOGY, num_slots=6, engine="reference").expert_of_slot,
    "imbalance": lambda load, _: imbalance(load, START),
    "lower_bound": lambda load, _: lower_bound(load, TOPOLOGY, 4),
    "LoadWindow.add": lambda load, _: by_window(load),
    "Trace": lambda load, _: Trace(load, (START,), [0, 0, 0], [3, 4, 5]).load,
    "TraceWriter.add": by_writer,
    "replay": lambda load, _: by_replay(load).busiest,
    "balanced_packing": lambda load, _: torch.stack(balanced_packing(load[0], 2, 2)),
    "rebalance_experts": lambda load, _: rebalance_experts(load[1], 6, 1, 1, 2)[1],
    "TimeCurve.time": lambda load, _: TimeCurve((0, 10, 100), (0, 7, 70)).time(load),
}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("kind", HELD, ids=str)
def test_the_same_numbers_are_the_same_load_at_every_door(door: str, kind: Any, tmp_path: Path) -> None:
    """uint16, as in a trace's own file, raised an error of torch in `plan`, and so did lists in `LoadWindow.add`."""
    load = small_load()
    expected, result = DOORS[door](load, tmp_path / "wanted"), DOORS[door](held(kind)(load), tmp_path / "found")
    assert result.dtype == expected.dtype
    assert torch.equal(result, expected)


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("convert", [Tensor.bool, lambda load: load.bool().numpy(), lambda load: load.bool().tolist()])
def test_bools_are_counts_of_one_token(door: str, convert: Callable[[Tensor], Any], tmp_path: Path) -> None:
    load = small_load() % 2
    expected, result = DOORS[door](load, tmp_path / "wanted"), DOORS[door](convert(load), tmp_path / "found")
    assert torch.equal(result, expected)


@pytest.mark.parametrize("dtype", ["u2", "u4", "u8"])
def test_what_a_trace_has_written_is_a_load(dtype: str, tmp_path: Path) -> None:
    """Symptom: `plan(np.load("trace.npz")["load"], ...)` raised an error of torch.

    Cause: a trace holds the smallest unsigned integers, and torch has few operations for those beyond uint8.
    """
    load = small_load() << {"u2": 2, "u4": 15, "u8": 35}[dtype]
    Trace(load, (START,), [0, 0, 0], [3, 4, 5]).save(tmp_path / "trace.npz")
    written = np.load(tmp_path / "trace.npz")["load"]
    assert written.dtype == dtype
    for value in (written, torch.from_numpy(written)):
        assert plan(value, TOPOLOGY) == plan(load, TOPOLOGY)
        assert torch.equal(imbalance(value, START), imbalance(load, START))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_floats_are_taken_up_to_what_they_count(dtype: torch.dtype) -> None:
    limit = {torch.float16: 2048, torch.bfloat16: 256, torch.float32: 2**24, torch.float64: 2**53}[dtype]
    assert exact_limit(dtype) == limit
    assert as_counts("load", torch.tensor([limit, 0, 1], dtype=dtype), ("expert",)).tolist() == [limit, 0, 1]
    with pytest.raises(
        DistplbError, match=rf"load has {limit + 2}.0 for expert 1 \(1 such value\); counts must be exact"
    ):
        as_counts("load", torch.tensor([1, limit + 2], dtype=dtype), ("expert",))


@settings(derandomize=True, deadline=None, max_examples=50)
@given(st.lists(st.lists(st.integers(0, 2**40), min_size=3, max_size=3), min_size=1, max_size=4))
def test_whole_numbers_of_any_size_come_through(rows: list[list[int]]) -> None:
    for value in (rows, torch.tensor(rows), np.array(rows, dtype="u8"), [[float(one) for one in row] for row in rows]):
        assert as_tokens(value).tolist() == [rows]


@settings(derandomize=True, deadline=None, max_examples=50)
@given(st.lists(st.floats(width=32) | st.integers(-3, 2**25).map(float), min_size=1, max_size=5))
def test_a_float_is_a_count_or_refused_and_marked_where_nobody_may_wait(values: list[float]) -> None:
    """An accelerator runs `marked`, which must agree with the check on the host on every number."""
    tokens = torch.tensor(values)
    is_count = [one == one and 0 <= one <= 2**24 and one == int(one) for one in tokens.tolist()]
    result = marked(tokens)
    assert [one >= 0 for one in result.tolist()] == is_count
    if all(is_count):
        assert result.tolist() == tokens.tolist() == as_counts("load", tokens, ("expert",)).tolist()
    else:
        with pytest.raises(DistplbError, match=rf"for expert {is_count.index(False)}|such"):
            as_counts("load", tokens, ("expert",))


# --- what is accepted as a load ---------------------------------------------------------------------------------


def test_a_load_becomes_int64_with_a_first_dim_of_steps() -> None:
    assert as_tokens(torch.ones(3, 2, 4)).shape == (3, 2, 4)
    assert as_tokens([[5, 6]]).tolist() == [[[5, 6]]]
    assert as_tokens(torch.zeros(2, 3)).tolist() == [[[0, 0, 0], [0, 0, 0]]]
    assert not as_tokens(torch.ones(1, 2, requires_grad=True)).requires_grad
    assert as_tokens(torch.tensor([[2**48 - 1, 0], [2**48 - 1, 0]])).sum() == 2**49 - 2


LAYOUTS = "pass [layers, experts] or [steps, layers, experts], with no empty dim"
WHOLE = (
    "counts must be whole tokens: multiply frequencies by the number of tokens, and pass sums over steps instead of "
    "means (mean × steps)"
)
FINITE = "counts must be finite: check the counter that produced them"
NON_NEGATIVE = "counts must be non-negative: check the counter that produced them"
BELOW = "counts must be below 2^63: check the counter that produced them"
NUMBERS = "pass a tensor, a NumPy array or nested lists of numbers"
MASKED = np.ma.masked_array([[1, 2]], mask=[[True, False]])

REFUSED: dict[str, tuple[Any, str]] = {
    "one dim": (torch.ones(3), f"load has shape (3,); {LAYOUTS}"),
    "four dims": (torch.ones(1, 1, 1, 2), f"load has shape (1, 1, 1, 2); {LAYOUTS}"),
    "no steps": (torch.ones(0, 2, 2), f"load has shape (0, 2, 2); {LAYOUTS}"),
    "no experts": (torch.ones(2, 0), f"load has shape (2, 0); {LAYOUTS}"),
    "an empty list": ([], f"load has shape (0,); {LAYOUTS}"),
    "complex": (torch.ones(1, 2, dtype=torch.complex64), "load has dtype torch.complex64; pass counts as integers"),
    "complex of NumPy": (np.ones((1, 2), dtype="c8"), "load has dtype complex64; pass counts as integers"),
    "a float of 128 bits": (
        np.ones((1, 2), dtype=np.longdouble),
        f"load has dtype {np.dtype(np.longdouble)}; pass counts as integers",
    ),
    "float8": (
        torch.ones(1, 2).to(torch.float8_e4m3fn),
        "load has dtype torch.float8_e4m3fn; pass counts as integers",
    ),
    "dates": (np.zeros((1, 2), dtype="M8[s]"), "load has dtype datetime64[s]; pass counts as integers"),
    "texts": ([["7", "8"]], "load holds text, such as '7'; pass counts as integers"),
    "a text among numbers": ([[1, "x"]], "load holds text, such as '1'; pass counts as integers"),
    "bytes": (np.array([[b"7"]]), "load holds text, such as \"b'7'\"; pass counts as integers"),
    "None": (None, f"load is None; {NUMBERS}"),
    "None in a list": ([[1, None]], "load is an array of objects, None at [0, 1]; pass counts as integers"),
    "objects": (
        np.array([[1, {}]], dtype=object),
        "load is an array of objects, a dict at [0, 1]; pass counts as integers",
    ),
    "objects that are numbers": (
        np.array([[1, 2]], dtype=object),
        "load is an array of objects; pass counts as integers",
    ),
    "a number of 70 bits": (
        [[2**70, 1]],
        "load is an array of objects, a number outside the range of int64 at [0, 0]; pass counts as integers",
    ),
    "rows of different lengths": (
        [[1, 2], [3]],
        "load[0] is a list of length 2, load[1] is a list of length 1; pass lists of equal length",
    ),
    "steps of different lengths": (
        [[[1, 2], [3, 4]], [[1, 2], [3]]],
        "load[1][0] is a list of length 2, load[1][1] is a list of length 1; pass lists of equal length",
    ),
    "a number beside a row": (
        [[1, 2], 3],
        "load[0] is a list of length 2, load[1] is not a list; pass lists of equal length",
    ),
    "tensors of different lengths": (
        [torch.ones(2), torch.ones(3)],
        "load[0] is torch.float32 of shape (2,) on cpu, load[1] is torch.float32 of shape (3,) on cpu; "
        "pass parts of equal dtype, shape and device",
    ),
    "a masked array": (MASKED, "load is masked in 1 of 2 places; pass load.filled(0)"),
    "one number": (5, f"load is 5; {NUMBERS}"),
    "a name": ("load.npy", f"load is 'load.npy'; {NUMBERS}"),
    "a dict": ({"moe.0": [1, 2]}, f"load is a dict; {NUMBERS}"),
    "meta": (
        torch.ones(1, 2, device="meta"),
        "load is on the meta device, which holds no values; pass real counts",
    ),
    "sparse": (torch.eye(2).to_sparse(), "load has the layout torch.sparse_coo; pass load.to_dense()"),
    "NaN": ([[1.0, float("nan")]], f"load has nan for expert 1 of layer 0 (1 such value); {FINITE}"),
    "infinite": (
        torch.tensor([[[1.0]], [[float("inf")]]]),
        f"load has inf for expert 0 of layer 0 in step 1 (1 such value); {FINITE}",
    ),
    "minus infinite": (
        torch.tensor([[-float("inf")]], dtype=torch.float16),
        f"load has -inf for expert 0 of layer 0 (1 such value); {FINITE}",
    ),
    "negative": ([[4, -1, -2]], f"load has -1 for expert 1 of layer 0 (2 such values); {NON_NEGATIVE}"),
    "a negative float": ([[4.0, -1.0]], f"load has -1.0 for expert 1 of layer 0 (1 such value); {NON_NEGATIVE}"),
    "an overflowed counter": (
        [[4, 2_200_000_000 - 2**32]],
        "load has -2094967296 for expert 1 of layer 0 (1 such value); counts must be non-negative: an overflowed "
        "32-bit counter shows this for 2200000000; count in int64",
    ),
    "an overflowed counter of 16 bits": (
        np.array([[40_000 - 2**16, 1]], dtype="i2"),
        "load has -25536 for expert 0 of layer 0 (1 such value); counts must be non-negative: an overflowed 16-bit "
        "counter shows this for 40000; count in int64",
    ),
    "unsigned beyond int64": (
        np.array([[1, 2**63 + 5]], dtype="u8"),
        f"load has 9223372036854775813 for expert 1 of layer 0 (1 such value); {BELOW}",
    ),
    "unsigned beyond int64, of torch": (
        torch.from_numpy(np.array([[2**64 - 1, 1]], dtype="u8")),
        f"load has 18446744073709551615 for expert 0 of layer 0 (1 such value); {BELOW}",
    ),
    "frequencies": ([[0.7, 0.1, 0.1, 0.1]], f"load has 0.7 for expert 0 of layer 0 (4 such values); {WHOLE}"),
    "means": ([[1.0, 2.5, 3.5]], f"load has 2.5 for expert 1 of layer 0 (2 such values); {WHOLE}"),
    "bfloat16 beyond 256": (
        torch.tensor([[3.0, 300.0]], dtype=torch.bfloat16),
        "load has 300.0 for expert 1 of layer 0 (1 such value); counts must be exact: torch.bfloat16 represents every "
        "integer only up to 256, and may round larger ones; count in int64",
    ),
    "float16 beyond 2,048": (
        np.array([[2050.0, 1]], dtype="f2"),
        "load has 2050.0 for expert 0 of layer 0 (1 such value); counts must be exact: torch.float16 represents every "
        "integer only up to 2048, and may round larger ones; count in int64",
    ),
    "float32 beyond 2^24": (
        torch.tensor([[2.0**24 + 2]]),
        "load has 16777218.0 for expert 0 of layer 0 (1 such value); counts must be exact: torch.float32 represents "
        "every integer only up to 16777216, and may round larger ones; count in int64",
    ),
    "float64 beyond 2^53": (
        [[1e300, 0.0]],
        "load has 1e+300 for expert 0 of layer 0 (1 such value); counts must be exact: torch.float64 represents every "
        "integer only up to 9007199254740992, and may round larger ones; count in int64",
    ),
    "too many tokens of a layer": (
        [[2**47, 2**47], [0, 1]],
        "load has 2.81e+14 tokens in layer 0; pass fewer than 2^48 tokens per layer on each rank",
    ),
    "too many tokens of steps": (
        [[[1], [2**47]], [[1], [2**47]]],
        "load has 2.81e+14 tokens in layer 1; pass fewer than 2^48 tokens per layer on each rank",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_a_load_is_refused_by_its_place_and_value(case: str) -> None:
    value, words = REFUSED[case]
    with pytest.raises(DistplbError) as refused:
        as_tokens(value)
    assert str(refused.value) == words


@pytest.mark.filterwarnings("ignore")  # torch warns about these kinds of tensors
def test_tensors_whose_numbers_cannot_be_read_are_refused() -> None:
    ragged = torch.nested.nested_tensor([torch.ones(1), torch.ones(2)])
    rounded = torch.quantize_per_tensor(torch.ones(1, 2), 0.1, 0, torch.quint8)
    for value, words in (
        (torch.eye(2).to_sparse_csr(), "load has the layout torch.sparse_csr; pass load.to_dense()"),
        (ragged, "load is a nested tensor; pass rows of equal length"),
        (rounded, "load is quantized (torch.quint8), which rounds counts; pass exact counts"),
    ):
        with pytest.raises(DistplbError) as refused:
            as_tokens(value)
        assert str(refused.value) == words
        for door in doors_of(value):
            with pytest.raises(DistplbError):
                door()


def doors_of(value: Any) -> Iterator[Callable[[], object]]:
    """Calls of everything that takes a load `[L, E]` or counts `[E]`."""
    yield lambda: plan(value, TOPOLOGY)
    yield lambda: imbalance(value, Placement.contiguous(1, 2, 2))
    yield lambda: lower_bound(value, TOPOLOGY, 2)
    yield lambda: Trace([value] if isinstance(value, list) else value, (START,), [0], [0])
    yield lambda: balanced_packing(value, 2)
    yield lambda: rebalance_experts(value, 2, 1, 1, 2)
    yield lambda: LoadWindow(1, 2, 1).add(0, value, training=True)
    yield lambda: TimeCurve.linear(1.0).time(value)


@pytest.mark.parametrize("case", REFUSED)
def test_no_door_lets_an_error_of_numpy_or_torch_through(case: str) -> None:
    for door in doors_of(REFUSED[case][0]):
        with suppress(DistplbError):  # some accept more: weights may be fractions, and a window takes one dim
            door()


FRACTIONS = {"frequencies", "means", "bfloat16 beyond 256", "float16 beyond 2,048", "float32 beyond 2^24"}
FRACTIONS |= {"float64 beyond 2^53", "too many tokens of a layer", "too many tokens of steps"}


@pytest.mark.parametrize("case", [name for name in REFUSED if name not in FRACTIONS])
def test_weights_may_be_fractions_and_are_refused_alike_otherwise(case: str) -> None:
    for pack in (balanced_packing, lambda weight, gpus: rebalance_experts(weight, 4, 1, 1, gpus)):
        with pytest.raises(DistplbError):
            pack(REFUSED[case][0], 1)


def test_fractions_are_weights_where_nobody_adds_up() -> None:
    """The imbalance was 2.0 here, because each half was rounded to an even number."""
    start = Placement.contiguous(1, 4, 2)
    assert imbalance([[0.5, 0.5, 0.5, 1.5]], start).item() == 4 / 3
    assert lower_bound([[0.5, 0.5, 0.5, 1.5]], TOPOLOGY, 4).item() == pytest.approx(4 / 3)
    with pytest.raises(
        DistplbError, match=r"load has 0\.5 for expert 0 of layer 0 \(3 such values\); counts must be whole"
    ):
        plan([[0.5, 0.5, 0.5, 2]], TOPOLOGY, time_curve=TimeCurve.linear(1.0))


@settings(deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 10**6), min_size=4, max_size=4), min_size=1, max_size=3).filter(
        lambda steps: any(map(sum, steps))
    ),
    st.sampled_from([2.0**-20, 2.0**-3, 2.0**-60]),
)
def test_weights_are_judged_as_the_counts_that_they_are_in_proportion_to(steps: list[list[int]], part: float) -> None:
    load = torch.tensor(steps)[:, None]
    weights = load * part
    start = Placement.contiguous(1, 4, 2)
    assert torch.equal(imbalance(weights, start).nan_to_num(), imbalance(load, start).nan_to_num())
    assert torch.allclose(lower_bound(weights, TOPOLOGY, 4), lower_bound(load, TOPOLOGY, 4), atol=1e-5)
    table = plan(weights, TOPOLOGY, engine="reference")
    assert torch.equal(imbalance(weights, table).nan_to_num(), imbalance(load, table).nan_to_num())


def test_weights_that_have_no_proportion_are_refused() -> None:
    doors: list[Callable[[Any], object]] = [
        lambda load: imbalance(load, Placement.contiguous(1, 2, 2)),
        lambda load: plan(load, TOPOLOGY),
        lambda load: lower_bound(load, TOPOLOGY, 2),
    ]
    for wrong in ([[0.5, float("nan")]], [[0.5, -1.0]], [[0.5, float("inf")]], [[0.5, 2.0**48]]):
        for door in doors:
            with pytest.raises(DistplbError, match=r"^load has |in stage count: load has "):
                door(wrong)


def test_a_layer_is_named_where_its_name_is_known() -> None:
    with pytest.raises(DistplbError, match=r"load has -5 for expert 1 of layer 'moe\.1' \(1 such value\)"):
        as_tokens([[1, 2], [3, -5]], layers=("moe.0", "moe.1"))
    with pytest.raises(DistplbError, match=r"Trace: load has 0\.5 for expert 0 of layer 'moe' in step 1"):
        Trace([[[1.0, 1.0]], [[0.5, 1.0]]], (Placement.contiguous(1, 2, 1),), [0, 0], [0, 1], ("moe",))
    with pytest.raises(DistplbError, match=r"load has 2\.81e\+14 tokens in layer 'moe\.1'"):
        as_tokens([[1], [2**48]], layers=("moe.0", "moe.1"))


# --- DTensors ---------------------------------------------------------------------------------------------------


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[Any]:
    """A mesh of only this process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()


def test_dtensors_are_refused_at_every_door(alone: Any) -> None:
    part = DTensor.from_local(torch.ones(1, 2, dtype=torch.int64), alone, [Partial()])
    whole = DTensor.from_local(torch.ones(1, 2, dtype=torch.int64), alone, [Replicate()])
    for value, remedy in ((part, r"\.to_local\(\), this rank's own counts"), (whole, r"\.full_tensor\(\), the counts")):
        for door in doors_of(value):
            with pytest.raises(DistplbError, match=rf"is a DTensor with placements .*; pass .*{remedy}"):
                door()
    for door in (
        lambda: Placement(whole, 2, 1),
        lambda: Trace([[[1, 2]]], (Placement.contiguous(1, 2, 1),), whole, [0]),
        lambda: plan([[1, 2]], TOPOLOGY, slot_class=whole),
        lambda: LoadWindow(1, 2, 1).rename(whole),
    ):
        with pytest.raises(DistplbError, match="is a DTensor with placements"):
            door()
    row = DTensor.from_local(torch.ones(2, dtype=torch.int64), alone, [Replicate()])
    for full in (False, True):
        add = torch.compile(LoadWindow(1, 2, 1).add, backend="eager", fullgraph=full)
        with pytest.raises((DistplbError, torch._dynamo.exc.Unsupported), match="is a DTensor with placements"):
            add(0, row, training=True)


# --- a window ---------------------------------------------------------------------------------------------------

BAD = {
    "NaN": (torch.tensor([1.0, float("nan")]), "finite"),
    "infinite": (torch.tensor([1.0, float("inf")]), "finite"),
    "minus infinite": (torch.tensor([1.0, -float("inf")], dtype=torch.float16), "finite"),
    "a fraction": (torch.tensor([1.0, 0.5]), "whole tokens"),
    "negative": (torch.tensor([1.0, -1.0]), "non-negative"),
    "a negative integer": (torch.tensor([1, -7]), "non-negative"),
    "a negative int32": (torch.tensor([1, -7], dtype=torch.int32), "non-negative"),
    "too large for bfloat16": (torch.tensor([1.0, 258.0], dtype=torch.bfloat16), "exact"),
    "too large for float16": (torch.tensor([1.0, 2050.0], dtype=torch.float16), "exact"),
    "too large for float32": (torch.tensor([1.0, 2.0**24 + 2]), "exact"),
    "too large for float64": (torch.tensor([1.0, 2.0**53 + 2], dtype=torch.float64), "exact"),
    "larger than any integer": (torch.tensor([1.0, 1e30]), "exact"),
    "the least integer as a float": (torch.tensor([1.0, -(2.0**63)]), "non-negative"),
    "unsigned beyond int64": (torch.from_numpy(np.array([1, 2**63], dtype="u8")), "below 2"),
}


@pytest.mark.parametrize(
    ("case", "how"),
    [*((case, "eager") for case in BAD), ("NaN", "compiled"), ("a negative integer", "compiled")],
)
def test_on_the_host_what_is_no_count_is_refused_when_it_is_added(case: str, how: str) -> None:
    """NaN became −2^63 and a fraction became 0, which went unnoticed until a plan used it, or for good."""
    counts, must_be = BAD[case]
    window = LoadWindow(2, 2, 2)
    torch._dynamo.reset()
    add = window.add if how == "eager" else torch.compile(window.add, backend="eager", fullgraph=True)
    with pytest.raises(
        DistplbError, match=rf"LoadWindow.add: layer 1 has .* for expert 1 \(1 such value\); counts must be {must_be}"
    ):
        add(1, counts, training=True)
    assert window._written.tolist() == [0, 0]


@pytest.mark.parametrize("case", BAD)
def test_where_nobody_waits_the_window_names_layer_step_and_expert(case: str) -> None:
    """`add` runs `marked` on an accelerator. −2^63 did not show where it came from."""
    window = LoadWindow(2, 2, 4)
    for step in range(3):
        for layer in range(2):
            window.add(layer, torch.tensor([step, 5]), training=True)
    counts, must_be = BAD[case]
    window._counts[2, 1] = marked(counts)
    window.name_layers(["moe.0", "moe.1"])
    with pytest.raises(DistplbError) as refused:
        window.load()
    text = str(refused.value)
    assert text.startswith("LoadWindow: layer 'moe.1' has ")
    assert "for expert 1 in step 2 (1 such value); counts must be " in text
    assert "-9223372036854775" not in text
    if counts.is_floating_point():
        limit = exact_limit(counts.dtype)
        assert f"a {counts.dtype} value that is not an integer from 0 to {limit}" in text
    else:
        assert f"counts must be {must_be}" in text
    window.clear()
    assert window.load().shape == (0, 2, 2)


def test_an_overflowed_counter_is_told_from_a_wrong_one() -> None:
    load = torch.tensor([[[5, 3_000_000_000 - 2**32]]])
    with pytest.raises(DistplbError, match="an overflowed 32-bit counter shows this for 3000000000; count in int64"):
        refuse_marked(load, torch.tensor([7]), ("0",))


@pytest.mark.parametrize("dtype", TORCH_TYPES, ids=str)
def test_marking_leaves_counts_as_they_are(dtype: torch.dtype) -> None:
    tokens = torch.tensor([0, 1, 2, 127]).to(dtype)
    before = tokens.clone()
    assert marked(tokens).tolist() == [0, 1, 2, 127]
    assert marked(tokens).dtype == torch.int64
    assert tokens.tolist() == before.tolist()
    if dtype.is_floating_point:
        limit = exact_limit(dtype)
        assert marked(torch.tensor([limit - 1, limit], dtype=dtype)).tolist() == [limit - 1, limit]


def test_an_evaluation_of_wrong_counts_is_none_of_the_windows() -> None:
    window = LoadWindow(1, 2, 2)
    window.add(0, torch.tensor([float("nan"), 1.0]), training=False)
    with torch.no_grad():
        window.add(0, torch.tensor([float("nan"), 1.0]))
    assert window.seen == 0


@pytest.mark.parametrize("counts", [torch.ones(1, 2), torch.ones(2, 1), [[1, 2]], torch.tensor(1), [1, 2, 3], [], 7])
def test_a_window_takes_one_dim_of_an_entry_for_each_output(counts: Any) -> None:
    with pytest.raises(DistplbError, match=r"LoadWindow.add: counts (has shape|is 7)"):
        LoadWindow(1, 2, 2).add(0, counts, training=True)


def test_counts_without_values_are_refused_in_training() -> None:
    """The window moved to the meta device with them, and everything in it was lost."""
    window = LoadWindow(1, 2, 2)
    with pytest.raises(DistplbError, match="counts are on the device meta, which keeps no values"):
        window.add(0, torch.ones(2, device="meta"), training=True)
    window.add(0, torch.tensor([1, 2]), training=True)
    assert window.load().tolist() == [[[1, 2]]]


@needs_cuda
@pytest.mark.parametrize("case", BAD)
def test_on_a_gpu_nothing_is_waited_for_and_the_window_tells(case: str) -> None:
    window = LoadWindow(1, 2, 2, device="cuda")
    counts = BAD[case][0].cuda()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        window.add(0, counts, training=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    with pytest.raises(DistplbError, match=r"LoadWindow: layer 0 has .* for expert 1 in step 0 \(1 such value\)"):
        window.load()


# --- options ----------------------------------------------------------------------------------------------------

LOAD = torch.tensor([[6, 2, 1, 3], [1, 1, 1, 5]])
SCALARS = [np.int64, np.uint8, np.int32, torch.tensor, np.array]
MODEL = MoveModel(1e-6, 8, 1e9, 1e9)
TRACE = Trace(LOAD.expand(4, 2, 4), (START,), [0] * 4, range(4))


def whole_numbers(of: Callable[[int], Any]) -> list[Any]:
    """The result of every call that takes integers, which `of` converts."""
    groups = plan(LOAD, TOPOLOGY, num_slots=of(4), num_groups=of(2), num_candidates=of(2), seed=of(3))
    window = LoadWindow(of(1), of(2), of(3), seed=of(5), max_bytes=of(100))
    window.add(of(0), torch.tensor([1, 2]), training=True)
    return [
        Topology(of(1), of(2)),
        Topology.of_ranks([of(0), of(1)], of(2)),
        Topology(1, 2).slots_per_gpu(of(4)),
        Placement.contiguous(of(2), of(4), of(2)),
        groups,
        lower_bound(LOAD, TOPOLOGY, of(4), of(2)).tolist(),
        [one.tolist() for one in balanced_packing(LOAD, of(2), of(3))],
        [one.tolist() for one in rebalance_experts(LOAD, of(6), of(1), of(1), of(2))],
        window.load().tolist(),
        window.shape,
        Spread(of(1), of(2)),
        TimeCurve((of(0), of(5)), (of(0), of(7))),
        MoveModel(1e-6, of(8), 1e9, 1e9).price(of(4), of(2)),
        FlatShard(torch.zeros(1), of(0)).start,
        replay(TRACE, lambda _, now: now, topology=TOPOLOGY, every=of(2), window=of(1), model=MODEL).busiest.tolist(),
        measured_curve(lambda _: None, [of(4)]).tokens,
        [type(one) for one in (groups.num_experts, groups.num_gpus, Topology(of(1), of(2)).gpus_per_node)],
    ]


@pytest.mark.parametrize("of", SCALARS)
def test_whole_numbers_of_numpy_and_torch_are_whole_numbers(of: Callable[[int], Any]) -> None:
    """`Topology(np.int64(1), 8)` was refused, and other numbers were put into tables unconverted."""
    assert whole_numbers(of) == whole_numbers(int)


@pytest.mark.parametrize("price", [np.float32(0.5), np.float64(0.5), torch.tensor(0.5), (np.float32(0.5), 0.5)])
def test_prices_of_numpy_and_torch_are_prices(price: Any) -> None:
    assert plan(LOAD, TOPOLOGY, current=START, move_price=price) == plan(LOAD, TOPOLOGY, current=START, move_price=0.5)


# Valid arguments of every public function.
CALLS: dict[str, tuple[Callable[..., object], dict[str, Any]]] = {
    "plan": (
        plan,
        {
            "load": LOAD,
            "topology": TOPOLOGY,
            "comm": None,
            "num_slots": 4,
            "num_groups": None,
            "slot_class": None,
            "current": START,
            "move_price": 0.0,
            "time_curve": None,
            "num_candidates": 1,
            "seed": 0,
            "engine": "reference",
            "allow_shared_replicas": True,
            "mode": "remap",
        },
    ),
    "imbalance": (imbalance, {"load": LOAD, "placement": START}),
    "lower_bound": (lower_bound, {"load": LOAD, "topology": TOPOLOGY, "num_slots": 4, "num_groups": None}),
    "balanced_packing": (balanced_packing, {"weight": LOAD, "num_packs": 2, "num_candidates": 1}),
    "rebalance_experts": (
        rebalance_experts,
        {"weight": LOAD, "num_replicas": 4, "num_groups": 1, "num_nodes": 1, "num_gpus": 2},
    ),
    "LoadWindow": (
        LoadWindow,
        {"num_layers": 1, "num_experts": 2, "num_steps": 1, "device": None, "seed": 0, "max_bytes": 99},
    ),
    "LoadWindow.add": (LoadWindow(1, 2, 1).add, {"layer": 0, "counts": [1, 2], "training": True}),
    "LoadWindow.rename": (LoadWindow(1, 2, 1).rename, {"source": [[1, 0]]}),
    "Trace": (
        Trace,
        {
            "load": [[[1, 2]]],
            "placements": (Placement.contiguous(1, 2, 1),),
            "placement_of_step": [0],
            "iteration": [0],
            "layers": ("moe",),
        },
    ),
    "replay": (
        replay,
        {
            "trace": TRACE,
            "planner": lambda _, now: now,
            "topology": TOPOLOGY,
            "every": 2,
            "model": MODEL,
            "curve": None,
            "window": None,
            "start": None,
            "progress": None,
        },
    ),
    "Topology": (Topology, {"num_nodes": 1, "gpus_per_node": 2}),
    "Topology.of_ranks": (Topology.of_ranks, {"ranks": [0, 1], "gpus_per_node": 2}),
    "Topology.from_mesh": (Topology.from_mesh, {"mesh": None}),
    "Topology.slots_per_gpu": (TOPOLOGY.slots_per_gpu, {"num_slots": 4}),
    "Placement": (Placement, {"expert_of_slot": [[0, 1]], "num_experts": 2, "num_gpus": 1}),
    "Placement.contiguous": (Placement.contiguous, {"num_layers": 1, "num_experts": 2, "num_gpus": 1}),
    "Placement.save": (START.save, {"path": None}),
    "Placement.load": (Placement.load, {"path": None}),
    "Trace.save": (TRACE.save, {"path": None}),
    "Trace.read": (Trace.read, {"path": None}),
    "TraceWriter": (TraceWriter, {"folder": "never written", "layers": (), "note": ""}),
    "EventLog": (EventLog, {"path": None}),
    "read_events": (read_events, {"path": None}),
    "TimeCurve": (TimeCurve, {"tokens": (0, 1), "nanoseconds": (0, 1)}),
    "TimeCurve.linear": (TimeCurve.linear, {"nanoseconds_per_token": 1.0}),
    "TimeCurve.through": (TimeCurve.through, {"tokens": [1], "seconds": [1.0]}),
    "TimeCurve.time": (TimeCurve.linear(1.0).time, {"load": LOAD}),
    "MoveModel": (
        MoveModel,
        {
            "seconds_per_token": 1.0,
            "bytes_per_slot": 1,
            "bandwidth_inside": 1.0,
            "bandwidth_between": 1.0,
            "trust": 0.5,
        },
    ),
    "MoveModel.price": (MODEL.price, {"window_steps": 1, "steps_until_next": 1}),
    "Spread": (Spread, {"choose_after": 1, "share_after": 2, "move_seconds": 0.1}),
    "measured_curve": (measured_curve, {"run": lambda _: None, "tokens": [1], "comm": None}),
    "measured_bandwidths": (
        measured_bandwidths,
        {"comm": WorldOfOne(), "topology": Topology(1, 1), "peers": [0], "gpu": 0},
    ),
    "FlatShard": (FlatShard, {"values": torch.zeros(1), "start": 0}),
    "MoELayer": (
        MoELayer,
        {
            "name": "moe",
            "experts": {},
            "router": {},
            "shards": {},
            "num_groups": None,
            "slot_of_expert": None,
            "counts": None,
            "invalidate": None,
        },
    ),
}
# Arguments that may be text or fractions.
TEXTS = {"path", "folder", "note", "name", "layers"}
FRACTIONAL = {"move_price", "nanoseconds_per_token", "seconds_per_token", "bandwidth_inside", "bandwidth_between"}
FRACTIONAL |= {"steps_until_next", "window_steps", "bytes_per_slot", "move_seconds"}
ARGUMENTS = [(call, name) for call, (_, arguments) in CALLS.items() for name in arguments]


@pytest.mark.parametrize(("call", "argument"), ARGUMENTS)
def test_an_argument_of_a_wrong_type_is_refused_by_its_name(call: str, argument: str) -> None:
    """Many raised an AttributeError or a TypeError from inside torch, NumPy or Numba."""
    function, arguments = CALLS[call]
    wrong: list[Any] = [object(), {"a": 1}] if argument not in ("experts", "router", "shards") else [object(), 7]
    wrong += [] if argument in TEXTS else ["nonsense"]
    wrong += [] if argument in FRACTIONAL else [1.5]
    for value in wrong:
        with pytest.raises(DistplbError) as refused:
            function(**arguments | {argument: value})
        assert argument in str(refused.value), (value, str(refused.value))


WHOLE_NUMBERS = {
    *("num_slots", "num_groups", "num_candidates", "seed", "num_packs", "num_replicas", "num_nodes", "num_gpus"),
    *("num_layers", "num_experts", "num_steps", "max_bytes", "layer", "every", "window", "gpus_per_node", "start"),
    *("choose_after", "share_after"),
}


@pytest.mark.parametrize(
    ("call", "argument"),
    [
        (call, name)
        for call, name in ARGUMENTS
        if name in WHOLE_NUMBERS and (call, name) not in (("replay", "start"), ("LoadWindow", "device"))
    ],
)
def test_neither_a_float_nor_a_bool_is_a_whole_number(call: str, argument: str) -> None:
    function, arguments = CALLS[call]
    for value in (4.0, True, np.float64(4.0), np.bool_(True), torch.tensor(4.0), torch.tensor(True)):
        with pytest.raises(DistplbError, match=rf"{argument} is (4\.0|True); pass"):
            function(**arguments | {argument: value})


@pytest.mark.parametrize("comm", ["nccl", object(), WorldOfOne, 0])
def test_what_is_no_communicator_is_refused_with_what_to_pass(comm: Any) -> None:
    words = (
        r"comm is .*; pass a communicator, such as TorchComm\(group\) from distplb\.comm\.torchdist, or None for this"
    )
    for call in (
        lambda: plan(LOAD, TOPOLOGY, comm=comm),
        lambda: measured_curve(lambda _: None, [1], comm=comm),
        lambda: measured_bandwidths(comm, TOPOLOGY, [0, 1], 0),
    ):
        with pytest.raises(DistplbError, match=words):
            call()


def test_a_process_group_is_no_communicator(alone: Any) -> None:
    for comm in (alone.get_group(), alone):
        with pytest.raises(DistplbError, match=r"comm is a \w+; pass a communicator, such as TorchComm\(group\)"):
            plan(LOAD, TOPOLOGY, comm=comm)


def test_paths_may_be_of_any_kind(tmp_path: Path) -> None:
    for path in (tmp_path / "placement.json", os.fspath(tmp_path / "placement.json")):
        START.save(path)
        assert Placement.load(path) == START
