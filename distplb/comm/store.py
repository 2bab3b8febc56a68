"""The job's key-value store, and calls on it that end in time although its host may be gone."""

from __future__ import annotations

import atexit
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

from distplb.comm.private_names import default_store

__all__ = ["Store", "StoreClient", "job_store"]

_EXIT_SECONDS = 5.0  # that the end of the process waits for a call that has not returned


class Store(Protocol):
    """The methods that are needed of a store; all of torch.distributed's have them."""

    def set(self, key: str, value: str) -> None:
        """Write a key, for all ranks to see."""

    def get(self, key: str) -> bytes:
        """Read a key that has been written."""

    def add(self, key: str, amount: int) -> int:
        """Add to a counter that begins at 0; its value afterwards."""

    def check(self, keys: list[str]) -> bool:
        """Whether all of them have been written. Does not wait."""


def job_store(name: str) -> Callable[[], Store]:
    """Opens a connection of our own to the store that the job has now, under a name of ours."""
    from torch.distributed.distributed_c10d import PrefixStore

    # torchrun may hand the store of a job's former life to the next one, with all that was written there.
    life = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = PrefixStore(f"distplb/{life}/{name}", default_store())
    return getattr(store, "clone", lambda: store)  # torch before 2.7 has one connection for all


class StoreClient:
    """Calls a store, each time in a thread of its own: its host may be gone, and the call never return.

    Args:
        connect: opens a connection of our own, because calls on the job's wait behind all others of the process. Called
            by the first `ask`.
    """

    def __init__(self, connect: Callable[[], Store]) -> None:
        self._connect = connect
        self._store: Store | None = None
        self._thread: threading.Thread | None = None

    def ask(self, seconds: float, call: Callable[[Store], None]) -> bool:
        """Make a call, and wait so many seconds for its end; none is made while an earlier one has not returned.

        Returns:
            Whether the store answered in time.
        """
        if self._thread is not None:
            self._thread.join(seconds)
            if self._thread.is_alive():
                return False
        answers: list[bool] = []

        def run() -> None:
            with suppress(Exception):  # the store's host may be what was lost
                if self._store is None:
                    self._store = self._connect()
                call(self._store)
                answers.append(True)

        self._thread = threading.Thread(target=run, name="distplb-store", daemon=True)
        self._thread.start()
        self._thread.join(seconds)
        if self._thread.is_alive():
            # A thread that is inside the library when the interpreter ends would take the process down with it.
            atexit.register(self._thread.join, _EXIT_SECONDS)
        return bool(answers)
