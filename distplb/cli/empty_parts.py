"""The parts of a load that have no tokens, and the sentence in which commands report that they are left out.

Shapes: T steps, L layers, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

__all__ = ["EmptyParts"]

_MAX_NAMES = 8


class EmptyParts(NamedTuple):
    """Steps in which no layer has tokens, layers that have tokens in no step, and other pairs without tokens.

    Args:
        num_steps: T.
        empty_steps: number of steps without tokens.
        num_layers: L.
        empty_layers: names of the layers without tokens.
        empty_pairs: number of (step, layer) pairs without tokens in the other steps and layers.
    """

    num_steps: int
    empty_steps: int
    num_layers: int
    empty_layers: tuple[str, ...]
    empty_pairs: int

    @classmethod
    def of(cls, load: Tensor, layers: Sequence[str]) -> EmptyParts:
        """Find the empty parts of a load `[T, L, E]` whose L layers have these names."""
        has_tokens = load.any(2)  # [T, L]
        steps, columns = has_tokens.any(1), has_tokens.any(0)
        names = tuple(name for name, counted in zip(layers, columns.tolist(), strict=True) if not counted)
        pairs = int(steps.sum()) * int(columns.sum()) - int(has_tokens.sum())
        return cls(len(load), int((~steps).sum()), len(layers), names, pairs)

    @property
    def counted_steps(self) -> int:
        """Number of steps that have tokens."""
        return self.num_steps - self.empty_steps

    def sentence(self, where: str = "") -> str:
        """Say in one line what is left out; empty if that is nothing or everything.

        >>> EmptyParts(4, 3, 61, ("a", "b"), 0).sentence()
        '3 of 4 steps had no tokens and are left out. 2 of 61 layers had no tokens: a, b; means are over the other 59.'

        Args:
            where: a name for the load, if there are two.
        """
        of, parts = f" of {where}" if where else "", []
        if 0 < self.empty_steps < self.num_steps:
            are = "are" if self.empty_steps > 1 else "is"
            parts.append(f"{self.empty_steps} of {self.num_steps} steps{of} had no tokens and {are} left out.")
        if 0 < len(self.empty_layers) < self.num_layers:
            names = ", ".join(self.empty_layers[:_MAX_NAMES])
            more = len(self.empty_layers) - _MAX_NAMES
            names += f" and {more} more" if more > 0 else ""
            parts.append(
                f"{len(self.empty_layers)} of {self.num_layers} layers{of} had no tokens: {names}; means are over the "
                f"other {self.num_layers - len(self.empty_layers)}."
            )
        if self.empty_pairs:
            times = "once" if self.empty_pairs == 1 else f"{self.empty_pairs} times"
            other = "other" if parts else "some"
            parts.append(f"In {other} steps{of}, a layer had no tokens ({times}) and is left out there.")
        return " ".join(parts)

    def as_json(self) -> dict[str, Any]:
        """Fields of a command's JSON object."""
        return {
            "steps_without_tokens": self.empty_steps,
            "layers_without_tokens": list(self.empty_layers),
            "pairs_without_tokens": self.empty_pairs,
        }
