"""Engines behind one protocol, chosen by name. They agree to the bit, so the fastest one available is the default."""

from __future__ import annotations

from typing import Protocol, cast

import torch
from torch import Tensor

from distplb.errors import OptionError
from distplb.packing import cpu, cuda, reference
from distplb.packing.settle import Terms

__all__ = ["Engine", "engine_named"]


class Engine(Protocol):
    """Packing; shapes and meaning as in `packing.reference`, which is the specification.

    `balanced_packing` calls `pack` and `finish`; the planner calls all others.
    """

    def pack(self, weight: Tensor, num_packs: int, *, layer: Tensor, candidate: Tensor, seed: int = 0) -> Tensor:
        """Steps 1 to 4: `items [X, n]`, one candidate per row."""

    def finish(self, weight: Tensor, items: Tensor, num_packs: int) -> Tensor:
        """Steps 6 and 7 on chosen packings."""

    def refine(
        self,
        weight: Tensor,
        num_packs: int,
        num_slots: int,
        *,
        layer: Tensor,
        candidate: Tensor,
        seed: int = 0,
        shared: bool = True,
    ) -> Tensor:
        """Steps 0 to 8: `table [X, P]`, one candidate per row."""

    def polish(self, weight: Tensor, table: Tensor, num_packs: int) -> Tensor:
        """Step 9 on chosen packings."""

    def settle(self, terms: Terms, table: Tensor, num_packs: int, *, layer: Tensor, ceiling: Tensor) -> Tensor:
        """Steps 10 and 11 on packings, which use every step of the load and the price of moves."""

    def cost(self, load: Tensor, table: Tensor, num_packs: int, *, layer: Tensor) -> Tensor:
        """`[X]`: the heaviest pack of each step, summed over the steps."""

    def crowded(self, table: Tensor, num_packs: int) -> Tensor:
        """`[X]` bool: whether a pack holds an expert twice."""


_ENGINES = {"reference": reference, "cpu": cpu, "cuda": cuda}
_MISSING = {
    "cpu": "Numba is not installed; pip install 'distplb[fast]'",
    "cuda": "it needs Triton and a CUDA device; install torch's CUDA build on a machine with a GPU",
}


def engine_named(name: str | None, device: torch.device | str = "cpu") -> tuple[str, Engine]:
    """The engine of that name, ready to run; for None, the fastest one available for data on `device`.

    Raises:
        DistplbError: if the name is unknown, or that engine is not available.
    """
    if name is None:
        name = "cpu" if cpu.is_there() else "reference"
        if torch.device(device).type == "cuda" and cuda.is_there():
            name = "cuda"
    if name not in _ENGINES:
        known = ", ".join(_ENGINES)
        raise OptionError("{engine} {name!r} is unknown; pass one of {known}, or {engine:None}", name=name, known=known)
    if (name == "cpu" and not cpu.is_there()) or (name == "cuda" and not cuda.is_there()):
        raise OptionError(
            "{engine} {name!r} is not available: {missing}, or pass {engine:None}", name=name, missing=_MISSING[name]
        )
    if name == "cpu":
        cpu.warm_up()
    return name, cast(Engine, _ENGINES[name])
