"""Asynchronous saves that may still read what they write."""

from __future__ import annotations

import time
from typing import Any

from distplb.errors import DistplbError

__all__ = ["AsyncSaves"]

_PAUSE_SECONDS = 0.01  # between two looks at whether a save has ended


class AsyncSaves:
    """The saves of one rank. A move before their end could mix two placements in one checkpoint.

    That the state has been staged does not say that it has been copied: torch 2.6 hands on tensors that are on the CPU
    already, and a stager of the user's own may. So a save counts until it is written, unless the user knows better.
    """

    def __init__(self) -> None:
        self._futures: list[Any] = []

    def add(self, response: Any, until: str) -> None:
        """Take in what `async_save` returned.

        Args:
            response: a future, or an `AsyncSaveResponse`.
            until: "written" or "staged". A plain future does not tell of staging: it is waited for either way.

        Raises:
            DistplbError: if it is neither, or there is no such end.
        """
        if until not in ("written", "staged"):
            raise DistplbError(
                f"until is {until!r}; pass 'written', or 'staged' if the stager copies all that it is given"
            )
        both = [getattr(response, name, None) for name in ("staging_completion", "upload_completion")]
        futures = both if None not in both else [response]
        if not all(callable(getattr(future, "done", None)) for future in futures):
            raise DistplbError(
                f"saving got a {type(response).__name__}; pass what torch.distributed.checkpoint.async_save returned, "
                "or a future that is done when the checkpoint is written; nothing for a save that has ended"
            )
        self._futures.extend(futures if until == "written" else futures[:1])

    def have_ended(self, seconds: float = 0.0) -> bool:
        """Whether all have come to their end, or failed, which is not for us to tell; waits, but not longer."""
        until = time.monotonic() + seconds
        while True:
            self._futures = [future for future in self._futures if not future.done()]
            if not self._futures or time.monotonic() >= until:
                return not self._futures
            time.sleep(_PAUSE_SECONDS)
