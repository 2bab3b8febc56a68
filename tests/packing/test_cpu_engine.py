"""What only the engine `cpu` has: threads, and cached machine code.

Shapes: X rows, E experts, P slots, M packs, G = P / M slots in each; T steps.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from packing_cases import Case, pack_case, settle_cases
from torch import Tensor

import distplb
from distplb.core import threads
from distplb.core.cost import MAX_COST
from distplb.core.machine_code import compiled_module
from distplb.packing import cpu, reference
from distplb.packing.engines import engine_named

KERNELS = [
    "cost_rows",
    "crowded_rows",
    "finish_rows",
    "pack_rows",
    "polish_rows",
    "refine_rows",
    "settle_rows",
]
CASE = pack_case(60, 12, 6)


@pytest.mark.parametrize("case", [CASE, next(settle_cases([(12, 8, 2, 2)]))], ids=["refine", "settle"])
def test_a_row_is_packed_alike_with_any_other_rows_and_number_of_threads(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = case.calls[0]
    alone = torch.cat([case.part(slice(x, x + 1)).answer(cpu, call) for x in range(24)])
    monkeypatch.setattr(threads, "_MIN_AMOUNT", 1)
    for number in (1, 2, 4, 100):
        monkeypatch.setattr(threads, "_num_threads", lambda number=number: number)
        assert torch.equal(case.answer(cpu, call), alone)


def test_two_threads_of_a_process_may_pack_at_once() -> None:
    expected = CASE.answer(cpu, "refine")
    answers: list[Tensor] = []
    workers = [threading.Thread(target=lambda: answers.append(CASE.answer(cpu, "refine"))) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert len(answers) == 4
    assert all(torch.equal(answer, expected) for answer in answers)


COMPILED = """
from numba.core import event as events
compiled = []
class Listener(events.Listener):
    def on_start(self, event):
        compiled.append(event.data["dispatcher"].py_func.__name__)
    def on_end(self, event):
        pass
with events.install_listener("numba:compile", Listener()):
    from distplb.packing import cpu, reference
    cpu.warm_up()
print(len(compiled))
"""


def test_a_process_of_another_time_compiles_nothing() -> None:
    cpu.warm_up()
    environment = os.environ | {"PYTHONPATH": str(Path(distplb.__file__).parents[1])}
    command = [sys.executable, "-c", COMPILED]
    run = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    assert int(run.stdout) == 0


@pytest.mark.long
def test_of_two_processes_that_begin_at_once_one_compiles(tmp_path: Path) -> None:
    """The other loads what the first has compiled."""
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


def test_no_plan_pays_for_compiling() -> None:
    """The kernels compiled when an engine is named serve every shape and type that comes later."""
    engine_named("cpu")
    kernels = compiled_module(cpu._KERNELS)
    functions = [value for value in vars(kernels).values() if hasattr(value, "signatures")]
    before = [list(function.signatures) for function in functions]
    assert kernels.__all__ == KERNELS
    assert [len(getattr(kernels, name).signatures) for name in KERNELS] == [1] * len(KERNELS)
    weight, names = CASE.weight, {"layer": CASE.layer, "candidate": CASE.candidate, "seed": CASE.seed}
    for num_slots, shared in ((60, True), (72, False), (84, True)):
        table = cpu.refine(weight, 12, num_slots, shared=shared, **names)
        cpu.polish(weight.expand(24, 60), table, 12)
        cpu.cost(weight.expand(3, 24, 60), table, 12, layer=CASE.layer)
        assert cpu.crowded(table, 12).dtype == torch.bool
    cpu.finish(weight.T.contiguous().T, cpu.pack((weight >> 20).to(torch.int32), 12, **names), 12)
    for case in settle_cases([(6, 2, 3, 1), (4, 2, 3, 3), (16, 8, 2, 3)], rows=2):  # free and priced, with replicas
        case.answer(cpu)
        case._replace(terms=case.terms._replace(apart=not case.terms.apart)).answer(cpu)
    assert [list(function.signatures) for function in functions] == before


def test_this_numba_compiles_without_counting_references() -> None:
    """If not, plans are the same and take twice as long: see `cpu_row`, and look for the option's new name."""
    cpu.warm_up()
    assert compiled_module("distplb.packing.cpu_row")._UNCOUNTED == {"_nrt": False}


# --- costs, as in the reference ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_experts", "num_slots", "num_packs"), [(12, 12, 4), (12, 18, 3), (5, 64, 8), (7, 7, 7)])
@pytest.mark.parametrize("num_steps", [1, 3])
def test_costs_and_crowded_packs_are_those_of_the_reference(
    num_experts: int, num_slots: int, num_packs: int, num_steps: int
) -> None:
    generator = torch.Generator().manual_seed(num_slots)
    load = torch.randint(0, 1 << 33, (num_steps, 4, num_experts), generator=generator)
    load[:, 3] <<= 10  # saturates
    layer = torch.randint(0, 4, (40,), generator=generator)
    spare = torch.randint(0, num_experts, (40, num_slots - num_experts), generator=generator)
    order = torch.rand(40, num_slots, generator=generator).argsort(1)
    table = torch.cat([torch.arange(num_experts).expand(40, -1), spare], 1).gather(1, order)
    expected = reference.cost(load, table, num_packs, layer=layer)
    assert torch.equal(cpu.cost(load, table, num_packs, layer=layer), expected)
    assert (expected == MAX_COST).any()
    assert (expected < MAX_COST).any()
    are_crowded = reference.crowded(table, num_packs)
    assert torch.equal(cpu.crowded(table, num_packs), are_crowded)
    assert bool(are_crowded.any()) == (num_slots > num_experts)


def test_experts_of_one_node_may_have_large_numbers() -> None:
    """The packing of one node of several has fewer slots than the model has experts."""
    table = torch.tensor([[900, 7, 7, 800], [900, 7, 900, 7]])
    assert cpu.crowded(table, 2).tolist() == [False, False]
    assert cpu.crowded(table[:, [1, 2, 0, 3]], 2).tolist() == [True, False]


# --- the order of equal and of unequal values -------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["equal", "one large", "few values", "crowded buckets", "spread", "single"])
def test_values_are_sorted_and_equal_ones_stay_in_order(kind: str) -> None:
    generator = np.random.default_rng(3)
    values = {
        "equal": np.full(100, 7),
        "one large": np.r_[generator.integers(0, 9, 99), 1 << 40],  # all but one share a bucket, so they are merged
        "few values": generator.integers(0, 3, 100),
        "crowded buckets": generator.integers(0, 1 << 20, 300) << np.repeat([0, 20], 150),
        "spread": generator.integers(0, 1 << 41, 257),
        "single": np.array([5]),
    }[kind].astype(np.int64)
    order, ordered, packed = (np.empty(len(values), np.int64) for _ in range(3))
    cpu.warm_up()
    sort_down = compiled_module("distplb.packing.cpu_order").sort_down
    sort_down(values, order, ordered, np.empty(2 * len(values) + 1, np.int64), packed)
    expected = np.argsort(-values, kind="stable")
    assert order.tolist() == expected.tolist()
    assert ordered.tolist() == values[expected].tolist()
