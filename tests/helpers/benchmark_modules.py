"""The benchmarks as modules, for tests of what they compute."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

__all__ = ["BENCHMARKS", "imported"]

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def imported(name: str) -> ModuleType:
    """A module of the benchmarks, which import each other by their bare names."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(BENCHMARKS))
