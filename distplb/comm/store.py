"""The job's key-value store, and calls to it that end in time even if its host is gone."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

from distplb.comm.private_names import default_store
from distplb.comm.threads import start_thread

__all__ = ["Store", "StoreClient", "job_store"]


class Store(Protocol):
    """The store methods that distplb needs; every store of torch.distributed has them."""

    def set(self, key: str, value: str) -> None:
        """Write a key that all ranks can read."""

    def get(self, key: str) -> bytes:
        """Read a key that has been written."""

    def add(self, key: str, amount: int) -> int:
        """Add to a counter that begins at 0; returns its new value."""

    def check(self, keys: list[str]) -> bool:
        """Whether all these keys have been written. Does not wait."""


def job_store(name: str) -> Callable[[], Store]:
    """A function that opens a separate connection to the job's current store, under distplb's own prefix."""
    from torch.distributed.distributed_c10d import PrefixStore

    # After a restart, torchrun may hand the job the same store, with everything that the last run wrote.
    life = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = PrefixStore(f"distplb/{life}/{name}", default_store())
    return getattr(store, "clone", lambda: store)  # torch before 2.7 has one connection for everything


class StoreClient:
    """Calls a store, each time in a separate thread: if its host is gone, the call may never return.

    Args:
        connect: opens a separate connection, because calls on the job's own wait behind all others of the process. The
            first `ask` calls it.
    """

    def __init__(self, connect: Callable[[], Store]) -> None:
        self._connect = connect
        self._store: Store | None = None
        self._thread: threading.Thread | None = None

    def ask(self, seconds: float, call: Callable[[Store], None]) -> bool:
        """Make a call and wait at most this many seconds for it; none is made while an earlier one has not returned.

        Returns:
            Whether the store answered in time; False also when the interpreter is ending.
        """
        if self._thread is not None:
            self._thread.join(seconds)
            if self._thread.is_alive():
                return False
        answers: list[bool] = []

        def run() -> None:
            with suppress(Exception):  # the lost rank may be the store's host
                if self._store is None:
                    self._store = self._connect()
                call(self._store)
                answers.append(True)

        self._thread = start_thread(run, "distplb-store")
        if self._thread is not None:
            self._thread.join(seconds)
        return bool(answers)
