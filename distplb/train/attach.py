"""Attaches a rebalancer to the optimizers, instead of calling it in the loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch.optim import Optimizer

__all__ = ["Attached"]


class Attached:
    """Calls a rebalancer's step whenever all of its optimizers have stepped.

    Args:
        optimizers: the optimizers, each of which steps once per iteration.
        step: called after the last of them has stepped.
    """

    def __init__(self, optimizers: Sequence[Optimizer], step: Callable[[], None]) -> None:
        self._all, self._stepped, self._step = {id(optimizer) for optimizer in optimizers}, set[int](), step
        self._handles = [optimizer.register_step_post_hook(self._note) for optimizer in optimizers]

    def remove(self) -> None:
        """Stop calling it."""
        for handle in self._handles:
            handle.remove()

    def _note(self, optimizer: Optimizer, *_: Any) -> None:
        self._stepped.add(id(optimizer))
        if self._stepped == self._all:
            self._stepped.clear()
            self._step()
