"""A plan beside other work: in forked processes, in threads, and call after call."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import distplb
from distplb import Placement, Topology, plan
from distplb.core import threads

TOPOLOGY = Topology(2, 4)
DEADLINE = 60.0  # seconds that a forked process may take


def load_of(num_steps: int) -> Tensor:
    generator = torch.Generator().manual_seed(num_steps)
    popular = torch.rand(1, 40, 64, generator=generator).mul(6).exp()
    return (popular * torch.rand(num_steps, 40, 64, generator=generator).mul(99)).long()


@pytest.fixture(autouse=True)
def two_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Also for torch, whose own threads a forked process waits for without end; the tests' launcher gives it one."""
    monkeypatch.setattr(threads, "_num_threads", lambda: 2)
    monkeypatch.setattr(threads, "_MIN_AMOUNT", 1)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def planned(load: Tensor) -> Placement:
    return plan(load, TOPOLOGY, num_slots=72, num_candidates=3)


@pytest.mark.parametrize("num_steps", [1, 5])
def test_the_number_of_threads_does_not_change_a_plan(num_steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    load, plans = load_of(num_steps), []
    for number in (1, 2, 7):
        monkeypatch.setattr(threads, "_num_threads", lambda number=number: number)
        plans.append(planned(load))
    assert plans[0] == plans[1] == plans[2]


def in_a_fork(work: Callable[[], bool]) -> int:
    """The exit status of a forked process: 0 if `work` returns True; it is killed after the deadline."""
    process = os.fork()
    if process == 0:
        try:
            os._exit(0 if work() else 3)
        except BaseException:
            os._exit(4)
    end = time.monotonic() + DEADLINE
    while time.monotonic() < end:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return -signal.SIGKILL


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_process_plans() -> None:
    """Threads of the parent do not exist in the child; waiting for one of them would never end."""
    one, five = load_of(1), load_of(5)
    expected = planned(one), planned(five)
    assert in_a_fork(lambda: (planned(one), planned(five)) == expected) == 0


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_process_that_is_forked_during_a_plan_plans() -> None:
    load, stop, begun = load_of(5), threading.Event(), threading.Event()
    expected = planned(load)

    def plan_on() -> None:
        while not stop.is_set():
            begun.set()
            planned(load)

    worker = threading.Thread(target=plan_on)
    worker.start()
    try:
        assert begun.wait(60)
        assert [in_a_fork(lambda: planned(load) == expected) for _ in range(4)] == [0] * 4
    finally:
        stop.set()
        worker.join(60)


@pytest.mark.parametrize("num_steps", [1, 5])
def test_nothing_grows_from_plan_to_plan(num_steps: int) -> None:
    load = load_of(num_steps)

    def plans(number: int) -> None:
        for _ in range(number):
            planned(load)
        gc.collect()

    plans(40)
    objects, bytes_, alive = [], [], threading.active_count()
    for _ in range(4):  # the interpreter and the allocator still adapt at first, so the smallest growth counts
        blocks, pages = sys.getallocatedblocks(), resident_pages()
        plans(60)
        objects.append(sys.getallocatedblocks() - blocks)
        bytes_.append((resident_pages() - pages) * os.sysconf("SC_PAGE_SIZE"))
    assert min(objects) < 60  # not one object of Python for each plan
    assert min(bytes_) < 60 * 8192  # the state of one row is more than that, and a plan has 16 parts and more
    assert threading.active_count() == alive


def resident_pages() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1])


COUNTED = """
import os, torch
from distplb import Topology, plan
from distplb.core import threads
threads._num_threads = lambda: 1
torch.set_num_threads(2)
load = torch.arange(58 * 256).view(58, 256) % 97
plan(load[:1], Topology(4, 8), num_slots=288, engine="cpu")
before = len(os.listdir("/proc/self/task"))
plan(load, Topology(4, 8), num_slots=288, engine="cpu")
print(len(os.listdir("/proc/self/task")) - before)
"""


def test_a_plan_of_a_model_does_not_enter_the_thread_pool_of_torch() -> None:
    """Indexing with tensors did, and on busy cores waited up to 50 ms for a thread that the training used."""
    environment = os.environ | {"OMP_NUM_THREADS": "2", "PYTHONPATH": str(Path(distplb.__file__).parents[1])}
    run = subprocess.run([sys.executable, "-c", COUNTED], env=environment, capture_output=True, text=True, timeout=120)
    assert run.stdout == "0\n", run.stderr
