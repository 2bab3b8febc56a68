"""What only the engine `cpu` has: threads, and cached machine code.

Shapes: X rows, E experts, P slots, M packs, G = P / M slots in each; T steps.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from packing_cases import Case, pack_case, settle_cases
from torch import Tensor

import distplb
from distplb.core import threads
from distplb.core.machine_code import compiled_module
from distplb.packing import cpu
from distplb.packing.engines import engine_named

KERNELS = ["finish_rows", "pack_rows", "polish_rows", "refine_rows", "settle_rows"]
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
    from distplb.packing import cpu
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
    assert [len(getattr(kernels, name).signatures) for name in KERNELS] == [1] * 5
    weight, names = CASE.weight, {"layer": CASE.layer, "candidate": CASE.candidate, "seed": CASE.seed}
    for num_slots, shared in ((60, True), (72, False), (84, True)):
        table = cpu.refine(weight, 12, num_slots, shared=shared, **names)
        cpu.polish(weight.expand(24, 60), table, 12)
    cpu.finish(weight.T.contiguous().T, cpu.pack((weight >> 20).to(torch.int32), 12, **names), 12)
    for case in settle_cases([(6, 2, 3, 1), (4, 2, 3, 3), (16, 8, 2, 3)], rows=2):  # free and priced, with replicas
        case.answer(cpu)
        case._replace(terms=case.terms._replace(apart=not case.terms.apart)).answer(cpu)
    assert [list(function.signatures) for function in functions] == before
