"""Asynchronous saves, which may still be reading the tensors that they save."""

from __future__ import annotations

import time
from typing import Any

from distplb.errors import DistplbError

__all__ = ["AsyncSaves"]

_PAUSE_SECONDS = 0.01  # between two checks whether a save has ended


class AsyncSaves:
    """The saves of one rank. A move before they end could mix two placements in one checkpoint.

    Staged state is not necessarily copied: torch 2.6 passes on tensors that are already on the CPU, and a user's own
    stager may do the same. So a save is under way until it is written, unless the user says that staging copies.
    """

    def __init__(self) -> None:
        self._futures: list[Any] = []

    def add(self, response: Any, until: str) -> None:
        """Add a save by the return value of `async_save`.

        Args:
            response: a future, or an `AsyncSaveResponse`.
            until: "written" or "staged". A plain future does not report staging, so its end counts either way.

        Raises:
            DistplbError: if `response` is neither, or `until` is another value.
        """
        if until not in ("written", "staged"):
            raise DistplbError(
                f"until is {until!r}; pass 'written', or 'staged' if the stager copies everything it is given"
            )
        both = [getattr(response, name, None) for name in ("staging_completion", "upload_completion")]
        futures = both if None not in both else [response]
        if not all(callable(getattr(future, "done", None)) for future in futures):
            raise DistplbError(
                f"saving got a {type(response).__name__}; pass the return value of "
                "torch.distributed.checkpoint.async_save, or a future that is done when the checkpoint is written; do "
                "not call saving for a save that has ended"
            )
        self._futures.extend(futures if until == "written" else futures[:1])

    def have_ended(self, seconds: float = 0.0) -> bool:
        """Whether all saves have ended, or failed, which is the user's to report; waits up to `seconds` for that."""
        until = time.monotonic() + seconds
        while True:
            self._futures = [future for future in self._futures if not future.done()]
            if not self._futures or time.monotonic() >= until:
                return not self._futures
            time.sleep(_PAUSE_SECONDS)
