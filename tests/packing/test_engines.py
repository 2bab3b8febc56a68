"""One contract, several engines: each answers what the reference answers, to the bit. (`cuda`: test_cuda_engine.)

Shapes: X rows, E experts, P slots, M packs, G = P / M slots in each; T steps, L layers.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from settle_cases import Settling, settle_cases, woken
from torch import Tensor

import distplb
from distplb import DistplbError
from distplb.packing import cpu, reference
from distplb.packing.engines import engine_named
from distplb.packing.settling import Terms

ROWS = 24
# (E, M, G): no replicas, a few, many; one pack, one slot a pack, more slots a pack than experts, pairs of all sizes.
SHAPES = [
    (1, 1, 1),
    (6, 1, 6),
    (4, 1, 7),
    (7, 7, 1),
    (5, 7, 1),
    (8, 4, 2),
    (9, 3, 3),
    (12, 4, 3),
    (20, 4, 5),
    (32, 2, 16),
]
SHAPES += [(34, 2, 17), (36, 2, 18), (24, 8, 3), (7, 4, 2), (5, 4, 2), (6, 4, 3), (9, 5, 3), (13, 5, 4), (16, 5, 4)]
SHAPES += [
    (30, 4, 9),
    (3, 3, 3),
    (3, 2, 3),
    (2, 3, 2),
    (2, 2, 5),
    (1, 3, 2),
    (3, 4, 5),
    (10, 4, 10),
    (60, 12, 6),
    (48, 16, 4),
]
# (E, M, G, T) of steps 10 and 11: one pack, one slot in each, experts of which some have no slot, replicas, one step.
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
    (20, 5, 5, 9),
    (32, 8, 4, 17),
]


def rows_of_every_kind(random_: random.Random, num_experts: int) -> list[list[int]]:
    """`[X][E]`, each row's total at most 2^40."""

    def row(kind: int) -> list[int]:
        if kind == 0:
            return [random_.randrange(3) for _ in range(num_experts)]  # ties
        if kind == 1:
            return [random_.choice([0, 7, 2**40 // num_experts])] * num_experts
        if kind == 2:
            return [random_.choice([0, 0, 0, random_.randrange(50)]) for _ in range(num_experts)]
        if kind == 3:
            return [random_.randrange(1000) for _ in range(num_experts)]
        if kind == 4:
            return [int(random_.lognormvariate(6, 1.5)) for _ in range(num_experts)]
        if kind == 5:  # single hot experts
            hot = random_.randrange(num_experts)
            return [10**6 if expert == hot else random_.randrange(3) for expert in range(num_experts)]
        if kind == 6:
            return [random_.randrange(2**40 // num_experts + 1) for _ in range(num_experts)]
        return [10**9 // (rank + 1) for rank in random_.sample(range(num_experts), num_experts)]  # Zipf

    return [row(number % 8) for number in range(ROWS)]


def case(shape: tuple[int, int, int], seed: int) -> tuple[Tensor, dict[str, object]]:
    """Weights `[X, E]`, and the names of their candidates."""
    random_ = random.Random(f"{shape} {seed}")
    weight = torch.tensor(rows_of_every_kind(random_, shape[0]))
    candidate = [random_.choice([0, 0, 1, random_.randrange(2**22), 2**22 - 1]) for _ in weight]
    layer = [random_.randrange(100) for _ in weight]
    names = {"layer": torch.tensor(layer), "candidate": torch.tensor(candidate), "seed": random_.randrange(2**62)}
    return weight, names


@pytest.mark.parametrize("shape", SHAPES)
def test_refine_and_polish_equal_the_reference(shape: tuple[int, int, int]) -> None:
    weight, names = case(shape, 0)
    num_experts, num_packs, size = shape
    for shared in (True, False):
        if not shared and size > num_experts:
            continue
        wanted = reference.refine(weight, num_packs, num_packs * size, shared=shared, **names)
        assert torch.equal(cpu.refine(weight, num_packs, num_packs * size, shared=shared, **names), wanted)
        assert torch.equal(cpu.polish(weight, wanted, num_packs), reference.polish(weight, wanted, num_packs))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape[0] == shape[1] * shape[2]])
def test_pack_and_finish_equal_the_reference(shape: tuple[int, int, int], seed: int) -> None:
    weight, names = case(shape, seed)
    wanted = reference.pack(weight, shape[1], **names)
    assert torch.equal(cpu.pack(weight, shape[1], **names), wanted)
    start = torch.stack([torch.randperm(shape[0], generator=torch.Generator().manual_seed(x)) for x in range(ROWS)])
    for items in (wanted, start):
        assert torch.equal(cpu.finish(weight, items, shape[1]), reference.finish(weight, items, shape[1]))


def test_polish_equals_the_reference_from_any_start() -> None:
    """Also where replicas share a pack, and where a pack holds none of most experts, as one cell of many does."""
    random_ = random.Random(1)
    for _ in range(30):
        num_packs, size = random_.randrange(1, 6), random_.randrange(1, 7)
        num_experts = random_.randrange(1, num_packs * size + 3)
        weight = torch.tensor(rows_of_every_kind(random_, num_experts))
        table = torch.tensor([[random_.randrange(num_experts) for _ in range(num_packs * size)] for _ in weight])
        assert torch.equal(cpu.polish(weight, table, num_packs), reference.polish(weight, table, num_packs))


def test_the_size_of_a_real_model_equals_the_reference() -> None:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(3, 256, generator=generator).mul(0.9).exp().mul(1e8).long()
    names = {"layer": torch.arange(3), "candidate": torch.tensor([0, 5, 9]), "seed": 1}
    for num_packs, num_slots in ((32, 256), (32, 288), (64, 320)):
        wanted = reference.refine(weight, num_packs, num_slots, **names)
        assert torch.equal(cpu.refine(weight, num_packs, num_slots, **names), wanted)
        assert torch.equal(cpu.polish(weight, wanted, num_packs), reference.polish(weight, wanted, num_packs))


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("shape", SETTLED)
def test_settle_equals_the_reference(shape: tuple[int, int, int, int], seed: int) -> None:
    (case,) = settle_cases([shape], rows=ROWS, seed=seed)
    before = case.table.clone()
    assert torch.equal(case.settled(cpu), case.settled(reference))
    assert torch.equal(case.table, before)


def test_settle_equals_the_reference_where_a_pack_looks_again() -> None:
    for case in woken():
        assert torch.equal(case.settled(cpu), case.settled(reference))


@pytest.mark.parametrize("num_slots", [256, 288])
def test_settle_on_the_size_of_a_real_model_equals_the_reference(num_slots: int) -> None:
    """From balanced packings, free, and priced from another packing within nodes."""
    case = real_model(num_slots)
    free = case._replace(
        terms=case.terms._replace(distance=None, price=None, region=torch.zeros_like(case.terms.region))
    )
    for one in (case, free):
        wanted = one.settled(reference)
        assert torch.equal(one.settled(cpu), wanted)
        assert (one.costs(wanted) < one.costs(one.table)).all()


def real_model(num_slots: int) -> Settling:
    """Two layers of 256 experts on 32 GPUs of 4 nodes, 4 steps."""
    generator = torch.Generator().manual_seed(4)
    skew = torch.randn(2, 1, 256, generator=generator).mul(0.9)
    load = (skew + torch.randn(2, 4, 256, generator=generator).mul(0.4)).exp().mul(1e4).long()
    names = {"layer": torch.arange(2), "candidate": torch.tensor([0, 5])}
    table, current = (cpu.refine(load.sum(1), 32, num_slots, seed=seed, **names) for seed in (1, 2))
    distance = torch.full((2, 256, 32), 2, dtype=torch.int8)
    for layer in range(2):
        distance[layer, current[layer], torch.arange(num_slots) // (num_slots // 32)] = 0
    region = torch.arange(num_slots) // (num_slots // 4)
    terms = Terms(load, region, distance=distance, price=torch.tensor([[0, 300, 900], [0, 4000, 4000]]))
    return Settling(32, terms, table, torch.arange(2), torch.tensor([2**14, 2**16]))


def test_rows_are_settled_alike_in_any_company_and_by_any_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    (case,) = settle_cases([(12, 8, 2, 2)], rows=ROWS)
    alone = torch.cat([case.row(x).settled(cpu) for x in range(ROWS)])
    monkeypatch.setattr(cpu, "_ROOM_FOR_THREADS", 1)
    for threads in (1, 2, 4, 100):
        monkeypatch.setattr(cpu, "_threads", lambda threads=threads: threads)
        assert torch.equal(case.settled(cpu), alone)


def test_rows_are_packed_alike_in_any_company_and_by_any_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, names = case((60, 12, 6), 0)
    alone = [
        cpu.refine(weight[x : x + 1], 12, 72, layer=names["layer"][x : x + 1], candidate=names["candidate"][x : x + 1])
        for x in range(ROWS)
    ]
    names["seed"] = 0
    monkeypatch.setattr(cpu, "_ROOM_FOR_THREADS", 1)
    for threads in (1, 2, 4, 100):
        monkeypatch.setattr(cpu, "_threads", lambda threads=threads: threads)
        assert torch.equal(cpu.refine(weight, 12, 72, **names), torch.cat(alone))


def test_two_threads_of_a_process_may_pack_at_once() -> None:
    weight, names = case((60, 12, 6), 1)
    wanted = cpu.refine(weight, 12, 72, **names)
    found: list[Tensor] = []
    threads = [threading.Thread(target=lambda: found.append(cpu.refine(weight, 12, 72, **names))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(found) == 4
    assert all(torch.equal(one, wanted) for one in found)


def test_an_error_in_a_thread_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_threads", lambda: 2)

    def fails(begin: int, end: int) -> None:
        raise MemoryError(f"rows {begin} to {end}")

    with pytest.raises(MemoryError, match=r"rows \d to "):
        cpu._in_threads(fails, torch.empty(8, 1 << 12))


# --- which engine ----------------------------------------------------------------------------------------------


def test_the_fastest_engine_that_is_there_is_taken() -> None:
    assert engine_named(None)[0] == "cpu"
    assert engine_named("reference") == ("reference", reference)


def test_without_numba_the_reference_serves_and_an_engine_asked_for_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "is_there", lambda: False)
    assert engine_named(None)[0] == "reference"
    with pytest.raises(DistplbError, match=r"engine 'cpu' is not there: Numba is not installed; pip install 'distplb"):
        engine_named("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_device_is_refused() -> None:
    with pytest.raises(DistplbError, match="engine 'cuda' is not there: it takes Triton and a CUDA device"):
        engine_named("cuda")


# --- the cache of machine code ---------------------------------------------------------------------------------

COMPILED = """
import numba.core.event as event
compiled = []
class Listener(event.Listener):
    def on_start(self, told):
        compiled.append(told.data["dispatcher"].py_func.__name__)
    def on_end(self, told):
        pass
with event.install_listener("numba:compile", Listener()):
    from distplb.packing import cpu
    cpu.warm_up()
print(len(compiled))
"""


def test_a_process_of_another_time_compiles_nothing() -> None:
    cpu.warm_up()
    environment = os.environ | {"PYTHONPATH": str(Path(distplb.__file__).parents[1])}
    counted = subprocess.run(
        [sys.executable, "-c", COMPILED], env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    assert int(counted.stdout) == 0


@pytest.mark.long
def test_of_two_processes_that_begin_at_once_one_compiles(tmp_path: Path) -> None:
    """Whoever comes first compiles, the other loads."""
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(Path(distplb.__file__).parents[1])}
    command = [sys.executable, "-c", COMPILED]
    both = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    try:
        counts = sorted(int(process.communicate(timeout=500)[0]) for process in both)
    finally:
        for process in both:
            process.kill()
    assert counts[0] == 0
    assert counts[1] > 10


def test_machine_code_is_not_kept_where_others_can_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    folder = cpu._cache_folder().parent
    assert folder == tmp_path / f"distplb-{os.getuid()}"
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o777)
    with pytest.raises(DistplbError, match=r"not a folder that only you can write to.*set NUMBA_CACHE_DIR"):
        cpu._cache_folder()


def test_an_interrupted_call_does_not_wait_for_parts_that_nobody_has_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C took a minute to come through: the other threads went on to take all that was left."""
    monkeypatch.setattr(cpu, "_threads", lambda: 2)
    begun, interrupted = [], threading.Event()

    def rows(begin: int, end: int) -> None:
        begun.append(begin)
        if threading.current_thread() is threading.main_thread():
            interrupted.set()
            raise KeyboardInterrupt
        assert interrupted.wait(60)
        time.sleep(0.2)  # for the main thread to get as far as giving up

    with pytest.raises(KeyboardInterrupt):
        cpu._in_threads(rows, torch.zeros(64, 64), amount=1 << 20)
    assert len(begun) <= 3  # of 8


def test_no_plan_pays_for_compiling() -> None:
    """What is compiled when an engine is named serves every shape and type that comes later."""
    engine_named("cpu")
    from distplb.packing import cpu_kernels

    def versions() -> list[int]:
        kernels = [getattr(cpu_kernels, name) for name in cpu_kernels.__all__]
        return [len(kernel.signatures) for kernel in kernels]

    before = versions()
    assert before == [1, 1, 1, 1, 1]
    weight, names = case((60, 12, 6), 2)
    for num_slots, shared in ((60, True), (72, False), (84, True)):
        table = cpu.refine(weight, 12, num_slots, shared=shared, **names)
        cpu.polish(weight.expand(ROWS, 60), table, 12)
    cpu.finish(weight.T.contiguous().T, cpu.pack((weight >> 20).to(torch.int32), 12, **names), 12)
    for one in settle_cases([(6, 2, 3, 1), (4, 2, 3, 3), (16, 8, 2, 3)], rows=2):  # free and priced, with replicas
        one.settled(cpu)
        one._replace(terms=one.terms._replace(apart=not one.terms.apart)).settled(cpu)
    assert versions() == before
