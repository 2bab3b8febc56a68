"""Rows in threads: each is processed once, and errors and interrupts are raised."""

from __future__ import annotations

import threading
import time

import pytest

from distplb.core import threads
from distplb.core.threads import in_threads


@pytest.mark.parametrize("number", [1, 2, 3, 100])
@pytest.mark.parametrize("num_rows", [1, 2, 7, 64])
def test_each_row_is_worked_on_once(number: int, num_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "_num_threads", lambda: number)
    rows: list[int] = []
    in_threads(lambda begin, end: rows.extend(range(begin, end)), num_rows, 1 << 20)
    assert sorted(rows) == list(range(num_rows))


def test_little_work_is_done_by_the_caller_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "_num_threads", lambda: 4)
    calls: list[tuple[int, int, threading.Thread]] = []
    in_threads(lambda begin, end: calls.append((begin, end, threading.current_thread())), 8, 100)
    assert calls == [(0, 8, threading.current_thread())]


def test_a_rank_has_its_share_of_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(12)))
    for ranks, number in ((None, 4), ("4", 3), ("8", 1), ("24", 1)):
        if ranks is not None:
            monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
        else:
            monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
        assert threads._num_threads() == number


def test_an_error_in_a_thread_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "_num_threads", lambda: 2)

    def fails(begin: int, end: int) -> None:
        raise MemoryError(f"rows {begin} to {end}")

    with pytest.raises(MemoryError, match=r"rows \d to "):
        in_threads(fails, 8, 1 << 20)


def test_an_interrupted_call_does_not_wait_for_parts_that_no_thread_has_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C took a minute to take effect, because the other threads continued with all parts that were left."""
    monkeypatch.setattr(threads, "_num_threads", lambda: 2)
    begun, interrupted = [], threading.Event()

    def rows(begin: int, end: int) -> None:
        begun.append(begin)
        if threading.current_thread() is threading.main_thread():
            interrupted.set()
            raise KeyboardInterrupt
        assert interrupted.wait(60)
        time.sleep(0.2)  # gives the main thread time to drop the remaining parts

    with pytest.raises(KeyboardInterrupt):
        in_threads(rows, 64, 1 << 20)
    assert len(begun) <= 3  # of 8
