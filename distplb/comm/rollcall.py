"""Who is still there, when a collective did not come to its end. Asked through the job's key-value store."""

from __future__ import annotations

import atexit
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

__all__ = ["RollCall", "Store"]

_PAUSE_SECONDS = 0.05  # between two looks at who has answered
_EXIT_SECONDS = 5.0  # that the end of the process waits for a question that has not been answered


class Store(Protocol):
    """What is asked of a store; torch.distributed's all have it."""

    def set(self, key: str, value: str) -> None:
        """Write a key, for all ranks to see."""

    def check(self, keys: list[str]) -> bool:
        """Whether all of them have been written. Does not wait."""


class RollCall:
    """Each rank that loses the others says so and that it is there itself; those who say nothing are missing.

    The store's host may be gone as well, and a question to it never be answered: each is asked in a thread.

    Args:
        connect: opens a connection of our own to a store that the ranks share, for this communicator alone: where
            others of this process wait in the job's, all questions wait behind them. Called when it is first needed.
        rank: of this process.
        size: the number of ranks.
    """

    def __init__(self, connect: Callable[[], Store], rank: int, size: int) -> None:
        self._connect, self._rank, self._size = connect, rank, size
        self._store: Store | None = None
        self._asking: threading.Thread | None = None
        self._silent: list[int] | None = None  # ranks that had not answered when last looked at

    def was_called(self, seconds: float) -> bool:
        """Whether some rank has lost the others; False where the store does not answer in so many seconds."""
        answers: list[bool] = []
        self._ask(seconds, lambda store: answers.append(store.check(["lost"])))
        return any(answers)

    def missing(self, seconds: float) -> list[int] | None:
        """Say that this rank has lost the others, and wait for all to say so too; the ranks that do not.

        Args:
            seconds: to wait; fewer if all answer.

        Returns:
            None where the store does not answer.
        """
        self._silent = None
        until = time.monotonic() + seconds
        self._ask(seconds, lambda store: self._call(store, until))
        return self._silent

    def _call(self, store: Store, until: float) -> None:
        store.set("lost", "1")
        store.set(f"here/{self._rank}", "1")
        while True:
            silent = list(range(self._size)) if self._silent is None else self._silent
            self._silent = [rank for rank in silent if not store.check([f"here/{rank}"])]
            if not self._silent or time.monotonic() >= until:
                return
            time.sleep(_PAUSE_SECONDS)

    def _ask(self, seconds: float, question: Callable[[Store], None]) -> None:
        """Wait for the answer, but not longer; for none where an earlier question still waits for its own."""
        if self._asking is not None:
            self._asking.join(seconds)
            if self._asking.is_alive():
                return

        def run() -> None:
            with suppress(Exception):  # the store's host may be what was lost
                if self._store is None:
                    self._store = self._connect()
                question(self._store)

        self._asking = threading.Thread(target=run, name="distplb-rollcall", daemon=True)
        self._asking.start()
        self._asking.join(seconds)
        if self._asking.is_alive():
            # A thread that is inside the library when the interpreter ends would take the process down with it.
            atexit.register(self._asking.join, _EXIT_SECONDS)
