"""Which ranks still answer when a collective has not ended. Asked through the job's key-value store."""

from __future__ import annotations

import time
from collections.abc import Callable

from distplb.comm.store import Store, StoreClient

__all__ = ["CheckIn"]

_NO_ERROR = "-"
_PAUSE_SECONDS = 0.05  # between two looks at which ranks have answered


class CheckIn:
    """A rank that has lost others writes this, and that it is there itself; ranks that write nothing are missing.

    Args:
        connect: as of `StoreClient`; opens a store that the ranks of this communicator share with nobody else.
        rank: of this process.
        size: the number of ranks.
    """

    def __init__(self, connect: Callable[[], Store], rank: int, size: int) -> None:
        self._client, self._rank, self._size = StoreClient(connect), rank, size
        self._silent: list[int] | None = None  # ranks that had not answered when last looked at
        self._errors: dict[int, str] = {}

    def was_called(self, seconds: float) -> bool:
        """Whether some rank has lost others; False where the store does not answer in so many seconds."""
        answers: list[bool] = []
        self._client.ask(seconds, lambda store: answers.append(store.check(["lost"])))
        return any(answers)

    @property
    def errors(self) -> dict[int, str]:
        """What went wrong, by rank that has answered so."""
        return dict(self._errors)

    def report(self, seconds: float, error: str) -> None:
        """Write that this rank has failed and waits for no other; returns after so many seconds at the latest."""
        self._client.ask(seconds, lambda store: self._write(store, error))

    def missing(self, seconds: float) -> list[int] | None:
        """Write that this rank has lost others, and wait for all to do so too; the ranks that do not.

        Args:
            seconds: to wait; fewer if all answer.

        Returns:
            None where the store does not answer.
        """
        self._silent = None
        until = time.monotonic() + seconds
        self._client.ask(seconds, lambda store: self._call(store, until))
        return self._silent

    def _write(self, store: Store, error: str) -> None:
        store.set(f"here/{self._rank}", error)  # first: a rank that reads "lost" reads this next
        store.set("lost", "1")

    def _call(self, store: Store, until: float) -> None:
        self._write(store, _NO_ERROR)
        while True:
            silent = list(range(self._size)) if self._silent is None else self._silent
            self._silent = [rank for rank in silent if not store.check([f"here/{rank}"])]
            here = {rank: store.get(f"here/{rank}").decode() for rank in silent if rank not in self._silent}
            self._errors |= {rank: text for rank, text in here.items() if text != _NO_ERROR}
            if not self._silent or time.monotonic() >= until:
                return
            time.sleep(_PAUSE_SECONDS)
