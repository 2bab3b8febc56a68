"""What of a load has no tokens, and how commands tell that it is left out.

Shapes: T steps, L layers, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

__all__ = ["Empties"]

_MOST_NAMES = 8


class Empties(NamedTuple):
    """Steps in which no layer has tokens, layers that have tokens in no step, and what else is empty.

    Args:
        steps: that there are.
        empty_steps: that have none.
        layers: L.
        empty_layers: the names of those that have none.
        empty_pairs: of another step and another layer, which has no tokens in it.
    """

    steps: int
    empty_steps: int
    layers: int
    empty_layers: tuple[str, ...]
    empty_pairs: int

    @classmethod
    def of(cls, load: Tensor, layers: Sequence[str]) -> Empties:
        """Of `[T, L, E]` and the L names."""
        has_tokens = load.any(2)  # [T, L]
        steps, columns = has_tokens.any(1), has_tokens.any(0)
        names = tuple(name for name, counted in zip(layers, columns.tolist(), strict=True) if not counted)
        pairs = int(steps.sum()) * int(columns.sum()) - int(has_tokens.sum())
        return cls(len(load), int((~steps).sum()), len(layers), names, pairs)

    @property
    def counted_steps(self) -> int:
        """Steps that have tokens."""
        return self.steps - self.empty_steps

    def told(self, where: str = "") -> str:
        """In one line; empty where nothing is left out, or there is nothing else.

        >>> Empties(4, 3, 61, ("a", "b"), 0).told()
        '3 of 4 steps had no tokens and are left out. 2 of 61 layers had no tokens: a, b; means are of the other 59.'

        Args:
            where: the load, after "of", where there are two.
        """
        of, parts = f" of {where}" if where else "", []
        if 0 < self.empty_steps < self.steps:
            are = "are" if self.empty_steps > 1 else "is"
            parts.append(f"{self.empty_steps} of {self.steps} steps{of} had no tokens and {are} left out.")
        if 0 < len(self.empty_layers) < self.layers:
            names = ", ".join(self.empty_layers[:_MOST_NAMES])
            more = len(self.empty_layers) - _MOST_NAMES
            names += f" and {more} more" if more > 0 else ""
            parts.append(
                f"{len(self.empty_layers)} of {self.layers} layers{of} had no tokens: {names}; means are of the other "
                f"{self.layers - len(self.empty_layers)}."
            )
        if self.empty_pairs:
            times = "once" if self.empty_pairs == 1 else f"{self.empty_pairs} times"
            other = "nother" if parts else ""
            parts.append(f"A{other} step{of} had no tokens in a layer {times}, and is left out there.")
        return " ".join(parts)

    def as_json(self) -> dict[str, Any]:
        """Fields of a command's object."""
        return {
            "steps_without_tokens": self.empty_steps,
            "layers_without_tokens": list(self.empty_layers),
            "pairs_without_tokens": self.empty_pairs,
        }
