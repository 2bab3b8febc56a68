"""Trial of engine `cuda`: its kernels are compiled, and their results compared, before anything depends on them.

A kernel compiled for a GPU may fail in ways that neither the interpreter nor tests on other machines show. Compiling
also takes tens of seconds, during which other ranks would wait in a collective. So the job's calls are made once
before it starts, with the same block sizes, on a few rows of synthetic load.
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
    """The calls that a job will make to an engine, on other data."""

    def __hash__(self) -> int:
        """Equal trials run once."""

    def run(self, engine: Engine) -> None:
        """Make the calls."""


class ComparedEngine:
    """An engine whose results are compared with another engine's, to the bit; it returns those of the other.

    Args:
        engine: the engine on trial.
        judge: the engine that it must agree with; gets all tensors on the host.

    Raises:
        DistplbError: from any call whose results differ.
    """

    def __init__(self, engine: Engine, judge: Engine) -> None:
        self._engine, self._judge = engine, judge

    def pack(self, weight: Tensor, num_packs: int, **names: Any) -> Tensor:
        """See `Engine`."""
        return self._compared("pack", weight, num_packs, **names)

    def finish(self, weight: Tensor, items: Tensor, num_packs: int) -> Tensor:
        """See `Engine`."""
        return self._compared("finish", weight, items, num_packs)

    def refine(self, weight: Tensor, num_packs: int, num_slots: int, **names: Any) -> Tensor:
        """See `Engine`."""
        return self._compared("refine", weight, num_packs, num_slots, **names)

    def polish(self, weight: Tensor, table: Tensor, num_packs: int) -> Tensor:
        """See `Engine`."""
        return self._compared("polish", weight, table, num_packs)

    def settle(self, terms: Terms, table: Tensor, num_packs: int, **names: Tensor) -> Tensor:
        """See `Engine`."""
        return self._compared("settle", terms, table, num_packs, **names)

    def cost(self, load: Tensor, table: Tensor, num_packs: int, *, layer: Tensor) -> Tensor:
        """See `Engine`; runs no kernel of the engine's own."""
        return self._judge.cost(load.cpu(), table.cpu(), num_packs, layer=layer.cpu()).to(table.device)

    def crowded(self, table: Tensor, num_packs: int) -> Tensor:
        """See `Engine`; runs no kernel of the engine's own."""
        return self._judge.crowded(table.cpu(), num_packs).to(table.device)

    def _compared(self, name: str, *arguments: Any, **keywords: Any) -> Tensor:
        answer: Tensor = getattr(self._engine, name)(*arguments, **keywords)
        on_host = {key: _on_host(value) for key, value in keywords.items()}
        expected: Tensor = getattr(self._judge, name)(*map(_on_host, arguments), **on_host)
        result = answer.cpu()  # checked before it is used: an index out of range would end the process
        if result.shape != expected.shape or result.dtype != expected.dtype:
            raise DistplbError(
                f"{name} returns {result.dtype} of shape {tuple(result.shape)}, "
                f"not {expected.dtype} of shape {tuple(expected.shape)}"
            )
        num_rows = int((result != expected).any(1).sum())
        if num_rows:
            raise DistplbError(f"{name} returns a different table in {num_rows} of {len(result)} rows")
        return expected.to(answer.device)


def engine_after(trial: Trial, name: str | None, device: torch.device) -> tuple[str, Engine]:
    """The engine of that name, or the fastest for data on `device`; `cuda` only if it passes its trial.

    If it fails, this is logged and the fastest other engine is used. Engines agree to the bit, so plans stay the same.

    Raises:
        DistplbError: if the named engine is not available.
    """
    name, engine = engine_named(name, device)
    return (name, engine) if name != "cuda" or _passes(trial) else engine_named(None)


@cache  # once per process
def _passes(trial: Trial) -> bool:
    # Numba's results equal those of the reference, which would take half a minute for 512 experts.
    judge_name, judge = engine_named("cpu" if cpu.is_there() else "reference")
    begin = time.perf_counter()
    try:
        trial.run(ComparedEngine(cuda, judge))
    except Exception as error:  # whatever the compiler, the driver or a kernel raises
        _LOGGER.warning(
            "engine 'cuda' failed its trial (%s: %s); engine %r makes the same plans instead; pass engine=%r to skip "
            "the trial",
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
