"""Questions to the job's key-value store, which may never be answered."""

from __future__ import annotations

import atexit
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

__all__ = ["Questions", "Store"]

_EXIT_SECONDS = 5.0  # that the end of the process waits for a question that has not been answered


class Store(Protocol):
    """What is asked of a store; torch.distributed's all have it."""

    def set(self, key: str, value: str) -> None:
        """Write a key, for all ranks to see."""

    def get(self, key: str) -> bytes:
        """Read a key that has been written."""

    def add(self, key: str, amount: int) -> int:
        """Add to a counter that begins at 0; its value afterwards."""

    def check(self, keys: list[str]) -> bool:
        """Whether all of them have been written. Does not wait."""


class Questions:
    """Asks a store, each question in a thread: its host may be gone, and a question to it never be answered.

    Args:
        connect: opens a connection of our own: where others of this process wait in the job's, all questions wait
            behind them. Called when it is first needed.
    """

    def __init__(self, connect: Callable[[], Store]) -> None:
        self._connect = connect
        self._store: Store | None = None
        self._asking: threading.Thread | None = None

    def ask(self, seconds: float, question: Callable[[Store], None]) -> bool:
        """Wait for the answer, but not longer; for none where an earlier question still waits for its own.

        Returns:
            Whether it was answered.
        """
        if self._asking is not None:
            self._asking.join(seconds)
            if self._asking.is_alive():
                return False
        answered: list[bool] = []

        def run() -> None:
            with suppress(Exception):  # the store's host may be what was lost
                if self._store is None:
                    self._store = self._connect()
                question(self._store)
                answered.append(True)

        self._asking = threading.Thread(target=run, name="distplb-store", daemon=True)
        self._asking.start()
        self._asking.join(seconds)
        if self._asking.is_alive():
            # A thread that is inside the library when the interpreter ends would take the process down with it.
            atexit.register(self._asking.join, _EXIT_SECONDS)
        return bool(answered)
