"""Engine `cuda` on trial: its kernels are compiled, and their answers compared, before anything depends on them.

A kernel that is compiled for a GPU may fail in ways that its interpreter and its tests elsewhere do not show. Compiling
also takes tens of seconds, for which other ranks would wait in a collective. So the calls of the job are made once
before it starts, with blocks of the same sizes, on few rows of synthetic load.
"""

from __future__ import annotations

import logging
import time
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor

from distplb.errors import DistplbError
from distplb.packing import cpu, cuda
from distplb.packing.engines import Engine, engine_named
from distplb.packing.settle import Terms

__all__ = ["ComparedEngine", "Trial", "engine_after"]

_LOGGER = logging.getLogger("distplb")


class Trial(Protocol):
    """The calls of an engine that are to come, on other numbers."""

    def __hash__(self) -> int:
        """Equal trials are held once."""

    def run(self, engine: Engine) -> None:
        """Make them."""


class ComparedEngine:
    """An engine whose every answer is compared, to the bit, with another's; what it returns is the other's.

    Args:
        engine: on trial.
        judge: that it has to agree with; it gets all tensors on the host.

    Raises:
        DistplbError: by each call whose answers differ.
    """

    def __init__(self, engine: Engine, judge: Engine) -> None:
        self._engine, self._judge = engine, judge

    def pack(self, weight: Tensor, num_packs: int, **names: Any) -> Tensor:
        """As `Engine`."""
        return self._compared("pack", weight, num_packs, **names)

    def finish(self, weight: Tensor, items: Tensor, num_packs: int) -> Tensor:
        """As `Engine`."""
        return self._compared("finish", weight, items, num_packs)

    def refine(self, weight: Tensor, num_packs: int, num_slots: int, **names: Any) -> Tensor:
        """As `Engine`."""
        return self._compared("refine", weight, num_packs, num_slots, **names)

    def polish(self, weight: Tensor, table: Tensor, num_packs: int) -> Tensor:
        """As `Engine`."""
        return self._compared("polish", weight, table, num_packs)

    def settle(self, terms: Terms, table: Tensor, num_packs: int, **names: Tensor) -> Tensor:
        """As `Engine`."""
        return self._compared("settle", terms, table, num_packs, **names)

    def _compared(self, name: str, *arguments: Any, **keywords: Any) -> Tensor:
        answer: Tensor = getattr(self._engine, name)(*arguments, **keywords)
        on_host = {key: _on_host(value) for key, value in keywords.items()}
        expected: Tensor = getattr(self._judge, name)(*map(_on_host, arguments), **on_host)
        result = answer.cpu()  # looked at here first: an index that is out of range would end the process
        if result.shape != expected.shape or result.dtype != expected.dtype:
            raise DistplbError(
                f"{name} gives {result.dtype} of shape {tuple(result.shape)}, not {tuple(expected.shape)}"
            )
        num_rows = int((result != expected).any(1).sum())
        if num_rows:
            raise DistplbError(f"{name} gives another table in {num_rows} of {len(result)} rows")
        return expected.to(answer.device)


def engine_after(trial: Trial, name: str | None, device: torch.device) -> tuple[str, Engine]:
    """The engine of that name, or the fastest for data on `device`; if that is `cuda`, once it has stood its trial.

    If it has not, which is logged, the fastest of the others: engines agree to the bit, so that a plan is the same.

    Raises:
        DistplbError: if an engine is asked for by name and is not there.
    """
    name, engine = engine_named(name, device)
    return (name, engine) if name != "cuda" or _passes(trial) else engine_named(None)


@cache  # once in a process
def _passes(trial: Trial) -> bool:
    # Numba's answers are the reference's, and the reference would take half a minute for 512 experts.
    judge_name, judge = engine_named("cpu" if cpu.is_there() else "reference")
    begin = time.perf_counter()
    try:
        trial.run(ComparedEngine(cuda, judge))
    except Exception as error:  # whatever the compiler, the driver or a kernel comes up with
        _LOGGER.warning(
            "engine 'cuda' failed its trial (%s: %s); plans are made by %r, and are the same; pass engine=%r to go "
            "without the trial",
            *(type(error).__name__, error, judge_name, judge_name),
        )
        return False
    _LOGGER.info(
        "engine 'cuda' agrees with %r on %s: compiled and compared in %.1f s",
        *(judge_name, trial, time.perf_counter() - begin),
    )
    return True


def _on_host(value: Any) -> Any:
    if isinstance(value, Terms):
        return Terms(*map(_on_host, value))
    return value.cpu() if isinstance(value, Tensor) else value
