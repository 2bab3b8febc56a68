"""The benchmarks as modules, for tests of what they compute."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

__all__ = ["BENCHMARKS", "imported"]

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def imported(name: str) -> ModuleType:
    """A module of the benchmarks by its name below them, such as "planning.bench_steps"."""
    root = str(BENCHMARKS.parent)  # of the checkout, which is not on the path where an installed distplb is tested
    sys.path.insert(0, root)
    try:
        return importlib.import_module(f"benchmarks.{name}")
    finally:
        sys.path.remove(root)
