"""Cases that run a command on a load or a trace."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from inputs.case import command

__all__ = ["TWO", "Run", "counts", "file", "run_words"]


Run = Callable[[Path], object]


TWO = ("--gpus-per-node", 2)


def counts(*shape: int) -> np.ndarray:
    """Make skewed counts that differ between steps and layers."""
    return (np.arange(np.prod(shape)) * 2654435761 % 1009).reshape(shape)


def file(folder: Path, *shape: int, name: str = "load.npy") -> Path:
    np.save(folder / name, counts(*shape))
    return folder / name


def run_words(*words: object) -> Run:
    return lambda folder: command(*words)
