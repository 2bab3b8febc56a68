"""Process rows in threads, for work that releases the GIL.

Numba's own threading is not used, because it aborts when two threads of a process enter it at once.
"""

from __future__ import annotations

import os
from _thread import start_new_thread
from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise
from threading import Condition

__all__ = ["in_threads"]

_MAX_THREADS = 4
_MIN_AMOUNT = 3 << 12  # below this, threads cost more than they save
_PARTS = 8  # for each thread, so that a thread that gets no core for a while delays the call by little


def in_threads(work: Callable[[int, int], None], num_rows: int, amount: int) -> None:
    """Call `work(begin, end)` on parts of the rows, in parallel if there is enough to do.

    The caller works too. It waits for no thread that has not begun a part, such as on busy cores, but does those parts
    itself. Threads end when no part is left, so that a process that forks later has none of them.

    Args:
        work: processes the rows from `begin` to `end`; no other call writes these rows.
        num_rows: the number of rows in total.
        amount: the number of elements to process in total.

    Raises:
        Exception: what `work` raised first.
    """
    count = min(_num_threads(), num_rows) if amount >= _MIN_AMOUNT else 1
    if count == 1:
        work(0, num_rows)
        return
    parts = _Parts(work, num_rows, min(num_rows, _PARTS * count))
    for _ in range(count - 1):
        with suppress(RuntimeError):  # the process may start no more threads
            # Not threading.Thread, whose start waits until the thread has got a core.
            start_new_thread(parts.help, ())
    try:
        parts.work()
    finally:  # also after Ctrl-C, which may come at any point
        parts.end()
    if parts.error is not None:
        raise parts.error


class _Parts:
    """Parts of the rows, which the caller and its helpers take one after the other."""

    def __init__(self, work: Callable[[int, int], None], num_rows: int, number: int) -> None:
        ends = [num_rows * part // number for part in range(number + 1)]
        self._work, self._left = work, list(pairwise(ends))[::-1]
        self._changed, self._begun = Condition(), 0  # parts that helpers have begun
        self.error: BaseException | None = None

    def work(self) -> None:
        """Take parts until none is left."""
        while True:
            with self._changed:
                if not self._left:
                    return
                begin, end = self._left.pop()
            self._work(begin, end)

    def help(self) -> None:
        """Take parts in another thread; the first error of any helper is kept, and drops the rest."""
        while True:
            with self._changed:
                if not self._left:
                    return
                begin, end = self._left.pop()
                self._begun += 1
            error = None
            try:
                self._work(begin, end)
            except BaseException as caught:
                error = caught
            with self._changed:
                self._begun -= 1
                if error is not None:
                    self.error = self.error or error
                    self._left.clear()
                self._changed.notify()

    def end(self) -> None:
        """Drop the parts that no thread has begun, and wait for those that helpers have."""
        with self._changed:
            self._left.clear()
            while self._begun:
                self._changed.wait()


def _num_threads() -> int:
    """This rank's share of the node's cores, at most 4."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(_MAX_THREADS, len(os.sched_getaffinity(0)) // ranks))
