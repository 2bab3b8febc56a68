"""The result of a check, as one line."""

from __future__ import annotations

from typing import Literal, NamedTuple

__all__ = ["Finding", "Timing", "note", "ok", "wrong"]


class Finding(NamedTuple):
    """One line: `what` was checked, and in `text` the result, with the remedy if something is wrong."""

    level: Literal["ok", "note", "WRONG"]
    what: str
    text: str


class Timing(NamedTuple):
    """A timed call: rank 0's median of a few rounds. `bytes` is None if it does more than carry data."""

    what: str
    bytes: int | None
    seconds: float

    @property
    def rate(self) -> float | None:
        """Bytes per second."""
        return None if self.bytes is None else self.bytes / self.seconds


def ok(what: str, text: str) -> Finding:
    """A finding that all is well."""
    return Finding("ok", what, text)


def note(what: str, text: str) -> Finding:
    """A finding of something that works but could be better."""
    return Finding("note", what, text)


def wrong(what: str, text: str) -> Finding:
    """A finding of something that does not work."""
    return Finding("WRONG", what, text)
