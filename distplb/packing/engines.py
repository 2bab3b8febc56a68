"""Which engine packs: one contract, found by name. Engines agree to the bit, so the fastest one there is serves."""

from __future__ import annotations

from typing import Protocol, cast

from torch import Tensor

from distplb.errors import DistplbError
from distplb.packing import reference

__all__ = ["Engine", "engine_named"]


class Engine(Protocol):
    """The packing core; shapes and meaning as in `packing.reference`, which is the specification."""

    def pack(self, weight: Tensor, num_packs: int, *, layer: Tensor, candidate: Tensor, seed: int = 0) -> Tensor:
        """Steps 1 to 4: `items [X, n]`, one candidate a row."""

    def finish(self, weight: Tensor, items: Tensor, num_packs: int) -> Tensor:
        """Steps 6 and 7 on chosen packings."""


_ENGINES = {"reference": cast(Engine, reference)}


def engine_named(name: str | None) -> tuple[str, Engine]:
    """The engine of that name, or the fastest that is there for None.

    Raises:
        DistplbError: if an engine is asked for by name and is not there.
    """
    name = "reference" if name is None else name
    if name not in _ENGINES:
        raise DistplbError(f"engine {name!r} is not there; pass one of {', '.join(_ENGINES)}, or None")
    return name, _ENGINES[name]
