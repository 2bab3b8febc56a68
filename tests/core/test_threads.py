"""Rows in threads: each is processed once, and errors and interrupts are raised."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

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


def test_no_call_waits_for_a_thread_that_has_no_core(monkeypatch: pytest.MonkeyPatch) -> None:
    """On busy cores the whole call took as long as it took the last thread to get a core, 60 instead of 8 ms."""
    monkeypatch.setattr(threads, "_num_threads", lambda: 2)
    asleep: list[tuple[Callable[..., object], tuple[object, ...]]] = []
    monkeypatch.setattr(threads, "start_new_thread", lambda *call: asleep.append(call))
    rows: list[int] = []
    in_threads(lambda begin, end: rows.extend(range(begin, end)), 64, 1 << 20)
    assert rows == list(range(64))
    ((help_out, arguments),) = asleep
    help_out(*arguments)  # it gets a core after all, and finds nothing to do
    assert len(rows) == 64


def test_a_process_that_may_start_no_thread_works_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threads, "_num_threads", lambda: 4)
    monkeypatch.setattr(threads, "start_new_thread", refuse)
    rows: list[int] = []
    in_threads(lambda begin, end: rows.extend(range(begin, end)), 64, 1 << 20)
    assert rows == list(range(64))


def test_an_error_of_a_helper_is_raised_and_drops_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "_num_threads", lambda: 2)
    failed, begun = threading.Event(), []

    def rows(begin: int, end: int) -> None:
        begun.append(begin)
        if threading.current_thread() is threading.main_thread():
            assert failed.wait(60)
            time.sleep(0.2)  # gives the helper time to drop the remaining parts
            return
        failed.set()
        raise MemoryError("of the helper")

    with pytest.raises(MemoryError, match="of the helper"):
        in_threads(rows, 64, 1 << 20)
    assert len(begun) <= 3  # of 16


def test_a_call_returns_after_its_helpers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a helper would write rows that the caller already reads."""
    monkeypatch.setattr(threads, "_num_threads", lambda: 3)
    done, helping = [], threading.Event()

    def rows(begin: int, end: int) -> None:
        if threading.current_thread() is threading.main_thread():
            assert helping.wait(60)
        else:
            helping.set()
            time.sleep(0.2)
        done.append(begin)

    in_threads(rows, 24, 1 << 20)
    assert sorted(done) == list(range(24))


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
