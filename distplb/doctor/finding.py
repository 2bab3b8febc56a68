"""What a check has found, as one line."""

from __future__ import annotations

from typing import Literal, NamedTuple

__all__ = ["Finding", "Timing", "note", "ok", "wrong"]


class Finding(NamedTuple):
    """One line: `what` was looked at, what was found, and what to set where that is not as it should be."""

    level: Literal["ok", "note", "WRONG"]
    what: str
    text: str


class Timing(NamedTuple):
    """Rank 0's median of a few rounds."""

    what: str
    bytes: int
    seconds: float

    @property
    def rate(self) -> float:
        """Bytes per second."""
        return self.bytes / self.seconds


def ok(what: str, text: str) -> Finding:
    """As it should be."""
    return Finding("ok", what, text)


def note(what: str, text: str) -> Finding:
    """Works, and could be better."""
    return Finding("note", what, text)


def wrong(what: str, text: str) -> Finding:
    """Does not work."""
    return Finding("WRONG", what, text)
