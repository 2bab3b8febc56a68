"""Finds an engine that splits, by name. Engines agree exactly, so the default is the faster one that is available."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, cast

from distplb.errors import OptionError
from distplb.splitting import cpu, reference
from distplb.splitting.reference import Replica

__all__ = ["Engine", "engine_named"]


class Engine(Protocol):
    """Decides about one step; arguments and meaning as in `splitting.reference`, which is the specification."""

    def replicas(
        self, tokens: Sequence[int], home: Sequence[int], node: Sequence[int], slots: int, level: int
    ) -> list[Replica]:
        """Replicas with which no GPU exceeds the level, or the lowest higher one that is found; in any order."""


_ENGINES = {"reference": reference, "cpu": cpu}


def engine_named(name: str | None) -> Engine:
    """Return the engine with that name, ready to run; for None, `cpu` if Numba is installed.

    Raises:
        DistplbError: if the name is unknown, or that engine is not available.
    """
    if name is None:
        name = "cpu" if cpu.is_there() else "reference"
    if name not in _ENGINES:
        known = ", ".join(_ENGINES)
        raise OptionError("{engine} {name!r} is unknown; pass one of {known}, or {engine:None}", name=name, known=known)
    if name == "cpu":
        if not cpu.is_there():
            raise OptionError(
                "{engine} 'cpu' is not available: Numba is not installed; pip install 'distplb[fast]', or pass "
                "{engine:None}"
            )
        cpu.warm_up()
    return cast(Engine, _ENGINES[name])
