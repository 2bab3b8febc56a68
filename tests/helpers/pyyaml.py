"""Marks for tests that need PyYAML."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec

import pytest

__all__ = ["needs_pyyaml", "those_of_pyyaml_marked"]

needs_pyyaml = pytest.mark.skipif(find_spec("yaml") is None, reason="PyYAML is not installed")


def those_of_pyyaml_marked(names: Iterable[str]) -> list[object]:
    """Mark names of files for `parametrize`: YAML files are skipped if PyYAML is not installed."""
    return [pytest.param(name, marks=[needs_pyyaml] * name.endswith(("yaml", "yml"))) for name in names]
