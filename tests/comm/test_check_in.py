"""Check-ins through a real store, whose host keeps running, stops, or is gone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist

from distplb.comm.check_in import CheckIn

HOST = """
import sys, torch.distributed as dist
store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
print(store.port, flush=True)
sys.stdin.read()
"""
ENDING = """
import sys, time, torch.distributed as dist
from distplb.comm.check_in import CheckIn
port = int(sys.argv[1])
roll = CheckIn(lambda: dist.TCPStore("127.0.0.1", port, is_master=False), 0, 2)
print(roll.was_called(5), flush=True)
sys.stdin.readline()  # until the host is stopped
print(roll.was_called(0.2), roll.missing(0.2), flush=True)
"""


@pytest.fixture
def host() -> Iterator[tuple[int, subprocess.Popen[str]]]:
    process = subprocess.Popen([sys.executable, "-c", HOST], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    yield int(process.stdout.readline()), process
    process.kill()
    process.communicate(timeout=30)


def stop(process: subprocess.Popen[str]) -> None:
    os.kill(process.pid, signal.SIGSTOP)
    os.waitpid(process.pid, os.WUNTRACED)  # it may run on for a while if cores are busy


def roll_of(port: int, rank: int, size: int) -> CheckIn:
    return CheckIn(lambda: dist.TCPStore("127.0.0.1", port, is_master=False), rank, size)


def test_who_answers_is_there_and_who_does_not_is_missing(host: tuple[int, subprocess.Popen[str]]) -> None:
    first, second = roll_of(host[0], 0, 3), roll_of(host[0], 1, 3)
    assert not first.was_called(5)
    assert second.missing(0.2) == [0, 2]
    assert first.was_called(5)
    assert first.missing(0.2) == [2]
    assert roll_of(host[0], 2, 3).missing(5) == []


def test_a_store_that_stands_still_keeps_nobody(host: tuple[int, subprocess.Popen[str]]) -> None:
    port, process = host
    roll = roll_of(port, 0, 2)
    assert not roll.was_called(5)
    stop(process)
    began = time.monotonic()
    assert not roll.was_called(0.2)
    assert roll.missing(0.2) is None
    assert time.monotonic() - began < 5


def test_a_process_ends_in_order_while_a_question_waits(host: tuple[int, subprocess.Popen[str]]) -> None:
    """A thread inside the library when the interpreter ended crashed the process or kept it alive for ever."""
    port, process = host
    root = str(Path(__file__).parents[2])
    asker = subprocess.Popen(
        [sys.executable, "-c", ENDING, str(port)],
        env=os.environ | {"PYTHONPATH": root},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert asker.stdin is not None
    assert asker.stdout is not None
    assert asker.stdout.readline() == "False\n"
    stop(process)
    asker.stdin.write("\n")
    asker.stdin.flush()
    assert asker.stdout.readline() == "False None\n"
    time.sleep(0.5)  # it is exiting, and waits for the answer
    os.kill(process.pid, signal.SIGCONT)
    assert asker.wait(60) == 0


BUSY = """
import sys, threading, time, torch.distributed as dist
from distplb.comm.store import StoreClient
client = StoreClient(lambda: dist.TCPStore("127.0.0.1", int(sys.argv[1]), is_master=False))
asked = threading.Event()

def look(store):  # until the store is gone: each call goes into the library and comes back
    while True:
        store.check(["a key"])
        asked.set()
        if sys.argv[2] == "once" or distplb.comm.threads.ending.is_set():
            break

import distplb.comm.threads
ask = lambda: [client.ask(60, look) for _ in range(10 ** 6)]
threading.Thread(target=ask, daemon=True).start()
assert asked.wait(60)
"""


@pytest.mark.parametrize("calls", ["once", "for ever"])
def test_a_process_ends_in_order_while_another_thread_asks(host: tuple[int, subprocess.Popen[str]], calls: str) -> None:
    """The thread of a call that was not late yet was not waited for, so a job that had succeeded ended with SIGABRT."""
    root = str(Path(__file__).parents[2])
    command = [sys.executable, "-c", BUSY, str(host[0]), calls]
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": root}, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
