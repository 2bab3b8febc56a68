"""The parts of a load that have no tokens, and the sentence by which commands say that they are left out.

Shapes: T steps, L layers, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

__all__ = ["EmptyParts"]

_MAX_NAMES = 8


class EmptyParts(NamedTuple):
    """Steps in which no layer has tokens, layers that have tokens in no step, and the rest.

    Args:
        num_steps: T.
        empty_steps: number of steps without tokens.
        num_layers: L.
        empty_layers: names of the layers without tokens.
        empty_pairs: number of pairs of another step and another layer that have no tokens.
    """

    num_steps: int
    empty_steps: int
    num_layers: int
    empty_layers: tuple[str, ...]
    empty_pairs: int

    @classmethod
    def of(cls, load: Tensor, layers: Sequence[str]) -> EmptyParts:
        """Those of a load `[T, L, E]` with these L names."""
        has_tokens = load.any(2)  # [T, L]
        steps, columns = has_tokens.any(1), has_tokens.any(0)
        names = tuple(name for name, counted in zip(layers, columns.tolist(), strict=True) if not counted)
        pairs = int(steps.sum()) * int(columns.sum()) - int(has_tokens.sum())
        return cls(len(load), int((~steps).sum()), len(layers), names, pairs)

    @property
    def counted_steps(self) -> int:
        """Steps that have tokens."""
        return self.num_steps - self.empty_steps

    def sentence(self, where: str = "") -> str:
        """What is left out, in one line; empty where nothing or everything is.

        >>> EmptyParts(4, 3, 61, ("a", "b"), 0).sentence()
        '3 of 4 steps had no tokens and are left out. 2 of 61 layers had no tokens: a, b; means are of the other 59.'

        Args:
            where: a name of the load, where there are two.
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
                f"{len(self.empty_layers)} of {self.num_layers} layers{of} had no tokens: {names}; means are of the "
                f"other {self.num_layers - len(self.empty_layers)}."
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
