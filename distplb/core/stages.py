"""The stages of a rebalance, timed and named in profiles."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Any

from torch.profiler import record_function

from distplb.errors import LostRanksError

__all__ = ["Stages", "current_stage"]

_current: ContextVar[str | None] = ContextVar("distplb_stage", default=None)


def current_stage() -> str | None:
    """The stage that this thread is in; None outside any stage."""
    return _current.get()


class Stages:
    """Seconds by stage; each stage is also a `distplb::<stage>` range in a profile.

    Args:
        in_profile: makes the range of a name.
    """

    def __init__(self, in_profile: Callable[[str], AbstractContextManager[Any]] = record_function) -> None:
        self._in_profile = in_profile
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time of the block to stage `name`. A `LostRanksError` raised inside gets the stage's name."""
        start, outer = time.perf_counter(), _current.set(name)
        try:
            with self._in_profile(f"distplb::{name}"):
                yield
        except LostRanksError as lost:
            lost.stage = lost.stage or name
            raise
        finally:
            _current.reset(outer)
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
