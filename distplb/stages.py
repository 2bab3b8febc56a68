"""The stages of a rebalance, timed and named in profiles."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from torch.profiler import record_function

from distplb.errors import LostRanksError

__all__ = ["Stages"]


class Stages:
    """Seconds by stage; each stage is also a `distplb::<stage>` range in a profile."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time what runs inside under `name`; the same name adds up. Who is lost inside is told with the name."""
        start = time.perf_counter()
        try:
            with record_function(f"distplb::{name}"):
                yield
        except LostRanksError as lost:
            lost.stage = lost.stage or name
            raise
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
