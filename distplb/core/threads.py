"""Process rows in threads, for work that releases the GIL.

Numba's own threading is not used, because it aborts when two threads of a process enter it at once.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

__all__ = ["in_threads"]

_MAX_THREADS = 4
_MIN_AMOUNT = 1 << 12  # below this, threads cost more than they save


def in_threads(work: Callable[[int, int], None], num_rows: int, amount: int) -> None:
    """Call `work(begin, end)` on parts of the rows, in parallel if there is enough to do.

    The threads end with the call, so that a process that forks later has none of them.

    Args:
        work: processes the rows from `begin` to `end`; no other call writes these rows.
        num_rows: the number of rows in total.
        amount: the number of elements to process in total.
    """
    count = min(_num_threads(), num_rows) if amount >= _MIN_AMOUNT else 1
    if count == 1:
        work(0, num_rows)
        return
    ends = [num_rows * part // (4 * count) for part in range(4 * count + 1)]
    parts = iter(list(pairwise(ends)))

    def work_on_parts() -> None:
        for begin, end in parts:  # the next free thread takes the next part
            work(begin, end)

    with ThreadPoolExecutor(count - 1) as pool:
        helpers = [pool.submit(work_on_parts) for _ in range(count - 1)]
        try:
            work_on_parts()
        except BaseException:  # such as Ctrl-C: parts that no thread has begun are dropped
            list(parts)
            raise
        for helper in helpers:
            helper.result()


def _num_threads() -> int:
    """This rank's share of the node's cores, at most 4."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(_MAX_THREADS, len(os.sched_getaffinity(0)) // ranks))
