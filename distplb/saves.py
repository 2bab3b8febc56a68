"""Asynchronous saves that may still read what they write."""

from __future__ import annotations

import time
from typing import Any

from distplb.errors import DistplbError

__all__ = ["Saves"]

_PAUSE_SECONDS = 0.01  # between two looks at whether a save has ended


class Saves:
    """The saves of one rank. A move before their end could mix two placements in one checkpoint.

    That the state has been staged does not say that it has been copied: torch 2.6 hands on tensors that are on the CPU
    already, and a stager of the user's own may. So a save counts until it is written.
    """

    def __init__(self) -> None:
        self._futures: list[Any] = []

    def add(self, response: Any) -> None:
        """Take in what `async_save` returned.

        Raises:
            DistplbError: if that is neither a future nor an `AsyncSaveResponse`.
        """
        both = [getattr(response, name, None) for name in ("staging_completion", "upload_completion")]
        futures = both if None not in both else [response]
        if not all(callable(getattr(future, "done", None)) for future in futures):
            raise DistplbError(
                f"saving got a {type(response).__name__}; pass what torch.distributed.checkpoint.async_save returned, "
                "or a future that is done when the checkpoint is written; nothing for a save that has ended"
            )
        self._futures.extend(futures)

    def have_ended(self, seconds: float = 0.0) -> bool:
        """Whether all are written, or have failed, which is not for us to tell; waits for that, but not longer."""
        until = time.monotonic() + seconds
        while True:
            self._futures = [future for future in self._futures if not future.done()]
            if not self._futures or time.monotonic() >= until:
                return not self._futures
            time.sleep(_PAUSE_SECONDS)
