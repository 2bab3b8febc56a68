"""Threads that call torch's library, which must not be inside it when the interpreter ends.

A daemon thread that comes back from C++ then is ended by Python in the middle of it, and C++ aborts the process: a job
that has succeeded ends with SIGABRT. So these threads are told of the end, and the process waits for them, briefly.
"""

from __future__ import annotations

import atexit
import threading
import time
from collections.abc import Callable

__all__ = ["ending", "start_thread"]

_EXIT_SECONDS = 5.0  # how long the process waits for all of them; a call to a host that is gone may never return

ending = threading.Event()  # set when the interpreter begins to end
_lock = threading.Lock()
_running = set[threading.Thread]()


def start_thread(target: Callable[[], object], name: str) -> threading.Thread | None:
    """Start a thread; None, and no thread, when the interpreter is ending.

    Args:
        target: what it runs; it returns soon after `ending` is set, if it can.
        name: for debuggers.
    """

    def run() -> None:
        try:
            target()
        finally:
            with _lock:
                _running.discard(thread)

    thread = threading.Thread(target=run, name=name, daemon=True)
    with _lock:
        if ending.is_set():
            return None
        _running.add(thread)
        thread.start()
    return thread


@atexit.register
def _end() -> None:
    with _lock:
        ending.set()
        running = list(_running)
    until = time.monotonic() + _EXIT_SECONDS
    for thread in running:
        thread.join(max(0.0, until - time.monotonic()))
