"""One contract, three engines: on every case of the table each returns what the reference returns, to the bit.

The kernels of `cuda` are interpreted on any machine, in a child process, and compiled if there is a GPU.
Shapes: X rows, E experts, P slots, M packs, G = P / M slots in each; T steps.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from interpreted import prepare, printed_by
from packing_cases import TABLE, PackCase, differences

from distplb import DistplbError
from distplb.packing import cpu, cuda, reference, settle, steps
from distplb.packing.engines import engine_named
from distplb.packing.noise import noisy_keys

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
ROWS = {"tiny": 4, "small": 12}  # of a case that the interpreter runs in seconds
# With tiles of a few positions and launches of a row or two, short rows take several of them, as long ones do.
TILED = ["14 in 2x7", "24 in 2x12", "8 in 2x5", "6 in 2x7", "3 in 2x4", "4 in 2x3", "18 in 4x5 over 4"]
TILED_LONG = ["24 in 8x4 over 17"]
STOPPED = ["12 in 4x3 over 3", "12 in 4x4 over 3"]  # where a pack searches for an exchange at most twice


def runs() -> Iterator[Any]:
    """Each engine with each of its cases."""
    for name, entry in TABLE.items():
        if entry.size not in ("large", "longest"):
            yield pytest.param("cpu", name, id=f"cpu-{name}")
        if entry.size in ROWS:
            marks = [pytest.mark.long] if entry.size == "small" else []
            yield pytest.param("interpreted", name, id=f"interpreted-{name}", marks=marks)
        yield pytest.param("compiled", name, id=f"compiled-{name}", marks=needs_cuda)
    for name in TILED + TILED_LONG:
        yield pytest.param("tiled", name, id=f"tiled-{name}", marks=[pytest.mark.long] * (name in TILED_LONG))
    for name in STOPPED:
        yield pytest.param("stopped", name, id=f"stopped-{name}")


@pytest.mark.parametrize(("engine", "name"), list(runs()))
def test_an_engine_equals_the_reference(engine: str, name: str) -> None:
    entry = TABLE[name]
    if engine == "cpu":
        seeds = 1 if entry.size == "medium" else 2
        texts = [text for seed in range(seeds) for text in differences(entry, cpu, seed=seed)]
    elif engine == "compiled":
        rows, seeds = (2, 1) if entry.size == "longest" else (24, 10)
        texts = [t for seed in range(seeds) for t in differences(entry, cuda, rows=rows, seed=seed, device="cuda")]
    else:
        is_long = name in TILED_LONG or (engine == "interpreted" and entry.size == "small")
        texts = interpreted(is_long)[engine][name]
    assert not texts, "\n".join(texts)


@cache
def interpreted(is_long: bool) -> dict[str, dict[str, list[str]]]:
    """Differences of interpreted kernels, by engine and case, from one child process; long cases from another."""
    texts: dict[str, dict[str, list[str]]] = printed_by("test_engines", "interpret", is_long)
    return texts


def interpret(is_long: bool) -> None:
    """In the child process, print the differences."""
    prepare()
    texts: dict[str, dict[str, list[str]]] = {"interpreted": {}}
    size = "small" if is_long else "tiny"
    for name, entry in TABLE.items():
        if entry.size == size:
            texts["interpreted"][name] = differences(entry, cuda, rows=ROWS[size])
    cuda._CELLS, cuda._SCRATCH_BYTES = 1, 40
    names = TILED_LONG if is_long else TILED
    texts["tiled"] = {name: differences(TABLE[name], cuda, rows=2, seed=1) for name in names}
    settle.scans = cuda.scans = lambda num_packs: 2  # type: ignore[assignment]
    texts["stopped"] = {name: differences(TABLE[name], cuda, rows=6, seed=3) for name in STOPPED}
    texts["guard"] = {"outside": outside_of_tensors()}
    print(json.dumps(texts))


def outside_of_tensors() -> list[str]:
    """What is raised if a kernel gets a smaller tensor than its sizes say."""
    launch, zero = cuda._launch, torch.zeros(1, dtype=torch.int64)
    cuda._launch = lambda kernel, tensors, options: launch(kernel, (tensors[0][:, :-1].clone(), *tensors[1:]), options)
    try:
        cuda.pack(torch.arange(12).view(1, 12), 3, layer=zero, candidate=zero)
    except Exception as error:
        return [repr(error)]
    return []


def test_an_interpreted_kernel_that_leaves_its_tensors_is_noticed() -> None:
    """So the kernels in the tests above stayed inside their tensors."""
    assert "addresses are outside the tensors of the kernel" in interpreted(False)["guard"]["outside"][0]


@needs_cuda
def test_tensors_of_the_cpu_come_back_there() -> None:
    for name in ("12 in 4x3", "5 in 3x3", "6 in 3x3 over 2"):
        assert not differences(TABLE[name], cuda)


# --- what the cases reach: otherwise the tests above would also pass for engines that leave something out ----------


def packed(*sizes: str) -> list[PackCase]:
    """The cases of steps 0 to 9, as the interpreter runs them."""
    cases = [entry.case(0).part(slice(ROWS[entry.size])) for entry in TABLE.values() if entry.size in sizes]
    return [case for case in cases if isinstance(case, PackCase)]


@pytest.mark.parametrize(("sizes", "enough"), [(("tiny",), 8), (("tiny", "small"), 20)])
def test_the_cases_swap_in_every_step(sizes: tuple[str, ...], enough: int) -> None:
    plain = [case for case in packed(*sizes) if "pack" in case.calls]
    for name in ("lower_variance", "lower_max", "swap_pairs"):
        step = getattr(steps, name)
        changed = [(step(case.weight, case.start, case.num_packs) != case.start).any(1) for case in plain]
        assert torch.cat(changed).sum() > enough, name


def test_the_cases_reach_the_limits() -> None:
    for packs, step in ((104, steps.lower_max), (44, steps.swap_pairs)):
        case = TABLE[f"at the limit in {packs}"].case(0)
        once = step(case.weight, case.start, packs)
        assert not torch.equal(once, step(case.weight, once, packs))
    case = TABLE["at the last bit"].case(0)
    moved = (steps.lower_variance(case.weight, case.start, case.num_packs) != case.start).any(1)
    assert moved.tolist() == [True, False]
    totals = torch.cat([case.weight.sum(1) for case in packed("tiny", "small")]).tolist()
    assert {2**30, 2**30 + 1, 2**40} <= set(totals)
    assert max(totals) == 2**40


@pytest.mark.parametrize("sizes", [("tiny",), ("tiny", "small")])
def test_the_cases_with_replicas_reach_every_branch(sizes: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    displaced, searches = [], []
    displace, search = steps._displace, reference._search
    monkeypatch.setattr(steps, "_displace", lambda *args: displaced.append(args[4]) or displace(*args))
    monkeypatch.setattr(reference, "_search", lambda *a, apart: searches.append(apart) or search(*a, apart=apart))
    crowded, moved, tried = [], [], []
    for case in packed(*sizes):
        num_experts, num_slots = case.weight.shape[1], case.start.shape[1]
        if num_slots <= num_experts:
            continue
        table = case.answer(reference, "refine")
        crowded.append(steps.crowded(table, case.num_packs))
        moved.append((case.answer(reference, "polish") != case.start).any(1))
        key = noisy_keys(case.weight, layer=case.layer, candidate=case.candidate, seed=case.seed)
        most = case.num_packs if num_slots <= case.num_packs * num_experts else num_slots
        replicas = steps.divide(key, num_slots, most)
        tried.append((reference._replicas(table, num_experts) != replicas).any(1))
    assert len(displaced) > 5
    assert searches.count(False) > 5
    for name, happened in {"crowded": crowded, "moved": moved, "tried": tried}.items():
        assert torch.cat(happened).sum() > 5, name
        assert not torch.cat(happened).all(), name


# --- which engine ----------------------------------------------------------------------------------------------


def test_the_fastest_engine_that_is_there_is_taken() -> None:
    assert engine_named(None)[0] == "cpu"
    assert engine_named("reference") == ("reference", reference)


def test_without_numba_the_reference_serves_and_an_engine_asked_for_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "is_there", lambda: False)
    assert engine_named(None)[0] == "reference"
    with pytest.raises(DistplbError, match=r"engine 'cpu' is not available: Numba is not installed; pip install 'dist"):
        engine_named("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_device_is_refused() -> None:
    with pytest.raises(DistplbError, match="engine 'cuda' is not available: it needs Triton and a CUDA device"):
        engine_named("cuda")


def test_an_engine_that_is_not_there_is_refused_and_none_takes_one_that_is() -> None:
    with pytest.raises(DistplbError, match="engine 'warp' is unknown; pass one of reference"):
        engine_named("warp")
    name, engine = engine_named(None)
    assert engine_named(name) == (name, engine)
