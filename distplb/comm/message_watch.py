"""Ends waits for gloo's messages when another rank has reported a failure.

A wait for a collective can be cut into slices, with a look at the job's store between them. A wait for a message
cannot: gloo has no way to ask whether a message has arrived, and closes all connections of the group when a wait times
out. So a thread looks while the training thread waits, and uses that to end the wait.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial

import torch.distributed as dist

from distplb.comm.threads import ending, start_thread

__all__ = ["MessageWatch"]

_AT_ONCE = timedelta(milliseconds=1)  # 0 would mean the group's own timeout


class MessageWatch:
    """Looks after waits that last, from a thread that lives as long as this object.

    Args:
        was_called: asks, for at most so many seconds, whether some rank has failed or has lost others; it must not
            refer to this object.
        seconds: how often.
    """

    def __init__(self, was_called: Callable[[float], bool], seconds: float) -> None:
        self._was_called, self._seconds = was_called, seconds
        self._number = 0  # of waits so far
        self._waiting: tuple[int, Sequence[dist.Work]] | None = None
        self._thread: threading.Thread | None = None

    @contextmanager
    def over(self, works: Sequence[dist.Work]) -> Iterator[None]:
        """Wait for messages in this block: it raises gloo's error soon after another rank has reported a failure."""
        if self._thread is None:
            self._thread = start_thread(partial(_watch, weakref.ref(self), self._seconds), "distplb-watch")
        self._number += 1
        self._waiting = self._number, works
        try:
            yield
        finally:
            self._waiting = None

    def look(self, before: int | None) -> int | None:
        """Look at the store if the training thread is still in the wait of number `before`; returns that of its wait.

        Numbers, because the thread remembers one until it looks again: messages would keep their tensors for so long.
        """
        waiting = self._waiting
        if waiting is None:
            return None
        number, works = waiting
        if number == before and self._was_called(self._seconds) and self._waiting is waiting:
            for work in works:
                with suppress(RuntimeError):
                    work.wait(_AT_ONCE)  # closes the connections, and so ends the wait of the other thread
        return number


def _watch(reference: weakref.ref[MessageWatch], seconds: float) -> None:
    before = None
    while not ending.wait(seconds) and (watch := reference()) is not None:
        before = watch.look(before)
        del watch  # so that it can end while this thread sleeps
