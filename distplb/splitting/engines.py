"""Finds an engine that splits, by name. Engines agree exactly, so the default is the faster one that is available."""

from __future__ import annotations

from typing import Protocol, cast

from distplb.errors import OptionError
from distplb.splitting import cpu, reference
from distplb.splitting.rules import NO_CURVE, Array, Rules

__all__ = ["Engine", "engine_named"]


class Engine(Protocol):
    """Decides about one step; arguments and meaning as in `splitting.reference`, which is the specification."""

    def replicas(
        self, tokens: Array, home: Array, node: Array, rules: Rules, curve: Array = NO_CURVE
    ) -> tuple[Array, Array]:
        """Replicas with which no GPU exceeds the rules' level, or the higher level that costs least."""

    def quotas(self, tokens: Array, home: Array, expert: Array, part: Array) -> Array:
        """The quotas `[E, M]` of these replicas."""

    def is_legal(self, counts: Array, home: Array, quota: Array, replica: Array) -> bool:
        """Whether a `Split` of these has nothing to refuse."""


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
