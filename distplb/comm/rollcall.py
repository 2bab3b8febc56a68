"""Who is still there, when a collective did not come to its end. Asked through the job's key-value store."""

from __future__ import annotations

import time
from collections.abc import Callable

from distplb.comm.store import Questions, Store

__all__ = ["RollCall"]

_NOTHING = "-"  # of a rank with which nothing is wrong
_PAUSE_SECONDS = 0.05  # between two looks at who has answered


class RollCall:
    """Each rank that loses the others says so and that it is there itself; those who say nothing are missing.

    Args:
        connect: opens a connection to a store that the ranks share, for this communicator alone, as of `Questions`.
        rank: of this process.
        size: the number of ranks.
    """

    def __init__(self, connect: Callable[[], Store], rank: int, size: int) -> None:
        self._questions, self._rank, self._size = Questions(connect), rank, size
        self._silent: list[int] | None = None  # ranks that had not answered when last looked at
        self._told: dict[int, str] = {}

    def was_called(self, seconds: float) -> bool:
        """Whether some rank has lost the others; False where the store does not answer in so many seconds."""
        answers: list[bool] = []
        self._questions.ask(seconds, lambda store: answers.append(store.check(["lost"])))
        return any(answers)

    @property
    def told(self) -> dict[int, str]:
        """By rank that has answered, what went wrong there, if anything did."""
        return dict(self._told)

    def tell(self, seconds: float, why: str) -> None:
        """Say that this rank waits for nobody any more, and why; waits until that is written, but not longer."""
        self._questions.ask(seconds, lambda store: self._say(store, why))

    def missing(self, seconds: float) -> list[int] | None:
        """Say that this rank has lost the others, and wait for all to say so too; the ranks that do not.

        Args:
            seconds: to wait; fewer if all answer.

        Returns:
            None where the store does not answer.
        """
        self._silent = None
        until = time.monotonic() + seconds
        self._questions.ask(seconds, lambda store: self._call(store, until))
        return self._silent

    def _say(self, store: Store, why: str) -> None:
        store.set(f"here/{self._rank}", why)  # first: who sees that somebody was lost reads this
        store.set("lost", "1")

    def _call(self, store: Store, until: float) -> None:
        self._say(store, _NOTHING)
        while True:
            silent = list(range(self._size)) if self._silent is None else self._silent
            self._silent = [rank for rank in silent if not store.check([f"here/{rank}"])]
            here = {rank: store.get(f"here/{rank}").decode() for rank in silent if rank not in self._silent}
            self._told |= {rank: text for rank, text in here.items() if text != _NOTHING}
            if not self._silent or time.monotonic() >= until:
                return
            time.sleep(_PAUSE_SECONDS)
