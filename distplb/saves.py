"""Asynchronous saves that are still staging what they write."""

from __future__ import annotations

from concurrent import futures
from typing import Any

from distplb.errors import DistplbError

__all__ = ["Saves"]

_STAGING_SECONDS = 1800.0  # that a save may take to stage what it writes


class Saves:
    """The saves of one rank. A move in the middle of their staging would mix two placements in one checkpoint."""

    def __init__(self) -> None:
        self._staging: list[Any] = []

    def add(self, response: Any) -> None:
        """Take in what `async_save` returned; where that is a plain future, nothing is left to stage."""
        staging = getattr(response, "staging_completion", None)
        if staging is not None:
            self._staging.append(staging)

    def wait(self) -> None:
        """Until all have staged; whether a save succeeds is not for us to say.

        Raises:
            DistplbError: if one takes longer than half an hour.
        """
        while self._staging:
            try:
                self._staging[0].exception(timeout=_STAGING_SECONDS)
            except futures.CancelledError:
                pass
            except futures.TimeoutError as late:
                raise DistplbError(
                    f"an asynchronous save has not staged its state in {_STAGING_SECONDS:.0f} s, and nothing may move "
                    "before it has; look for what holds it up"
                ) from late
            self._staging.pop(0)
