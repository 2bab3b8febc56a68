"""Who is still there, when a collective did not come to its end. Asked through the job's key-value store."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

__all__ = ["RollCall", "Store"]

_PAUSE_SECONDS = 0.05  # between two looks at who has answered


class Store(Protocol):
    """What is asked of a store; torch.distributed's all have it."""

    def set(self, key: str, value: str) -> None:
        """Write a key, for all ranks to see."""

    def check(self, keys: list[str]) -> bool:
        """Whether all of them have been written. Does not wait."""


class RollCall:
    """Each rank that loses the others says so and that it is there itself; those who say nothing are missing.

    The store's host may be gone as well: whoever asks it waits in a thread of its own, which is left behind then.

    Args:
        store: shared by the ranks, for this communicator alone.
        rank: of this process.
        size: the number of ranks.
    """

    def __init__(self, store: Store, rank: int, size: int) -> None:
        self._store, self._rank, self._size = store, rank, size
        self._silent: list[int] | None = None  # ranks that had not answered when last looked at

    def was_called(self, seconds: float) -> bool:
        """Whether some rank has lost the others; False where the store does not answer in so many seconds."""
        answers: list[bool] = []
        _within(seconds, lambda: answers.append(self._store.check(["lost"])))
        return any(answers)

    def missing(self, seconds: float) -> list[int] | None:
        """Say that this rank has lost the others, and wait for all to say so too; the ranks that do not.

        Args:
            seconds: to wait; fewer if all answer.

        Returns:
            None where the store does not answer.
        """
        self._silent = None
        _within(seconds, lambda: self._call(time.monotonic() + seconds))
        return self._silent

    def _call(self, until: float) -> None:
        self._store.set("lost", "1")
        self._store.set(f"here/{self._rank}", "1")
        while True:
            silent = list(range(self._size)) if self._silent is None else self._silent
            self._silent = [rank for rank in silent if not self._store.check([f"here/{rank}"])]
            if not self._silent or time.monotonic() >= until:
                return
            time.sleep(_PAUSE_SECONDS)


def _within(seconds: float, ask: Callable[[], None]) -> None:
    """Wait for it, but not longer."""

    def run() -> None:
        # The store's host may be what was lost.
        with suppress(Exception):
            ask()

    thread = threading.Thread(target=run, name="distplb-rollcall", daemon=True)
    thread.start()
    thread.join(seconds)
