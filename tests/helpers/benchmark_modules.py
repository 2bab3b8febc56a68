"""Imports the benchmarks, for tests of their computations."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

__all__ = ["BENCHMARKS", "imported"]

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def imported(name: str) -> ModuleType:
    """Import a module of the benchmarks by its name, such as "planning.bench_steps"."""
    root = str(BENCHMARKS.parent)  # the checkout, which is not on the path when an installed distplb is tested
    sys.path.insert(0, root)
    try:
        return importlib.import_module(f"benchmarks.{name}")
    finally:
        sys.path.remove(root)
