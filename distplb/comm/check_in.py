"""Check-in through the job's key-value store: which ranks still answer when a collective has not ended."""

from __future__ import annotations

import time
from collections.abc import Callable

from distplb.comm.store import Store, StoreClient

__all__ = ["CheckIn"]

_NO_ERROR = "-"
_PAUSE_SECONDS = 0.05  # between two checks of which ranks have answered
_AFTER_ERROR_SECONDS = 1.0  # of waiting for the others once a rank has reported its error, which tells enough


class CheckIn:
    """Ranks that have lost others check in through the job's store; ranks that do not check in are missing.

    Args:
        connect: as for `StoreClient`; opens a store that only the ranks of this communicator use.
        rank: the rank of this process.
        size: the number of ranks.
    """

    def __init__(self, connect: Callable[[], Store], rank: int, size: int) -> None:
        self._client, self._rank, self._size = StoreClient(connect), rank, size
        self._silent: list[int] | None = None  # ranks that had not answered at the last check
        self._errors: dict[int, str] = {}

    def was_called(self, seconds: float) -> bool:
        """Whether some rank has lost others; False if the store does not answer in this many seconds."""
        answers: list[bool] = []
        self._client.ask(seconds, lambda store: answers.append(store.check(["lost"])))
        return any(answers)

    @property
    def errors(self) -> dict[int, str]:
        """The errors that ranks have reported, by rank."""
        return dict(self._errors)

    def report(self, seconds: float, error: str) -> None:
        """Report that this rank has failed and does not wait for others; returns after at most this many seconds."""
        self._client.ask(seconds, lambda store: self._write(store, error))

    def missing(self, seconds: float) -> list[int] | None:
        """Check in because this rank has lost others, and wait for all ranks to check in.

        Args:
            seconds: how long to wait; returns earlier if all ranks answer, or soon after one has reported an error.

        Returns:
            The ranks that have not checked in; None if the store does not answer.
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
            told = {rank: text for rank, text in here.items() if text != _NO_ERROR}
            if told:
                until = min(until, time.monotonic() + _AFTER_ERROR_SECONDS)
            self._errors |= told
            if not self._silent or time.monotonic() >= until:
                return
            time.sleep(_PAUSE_SECONDS)
