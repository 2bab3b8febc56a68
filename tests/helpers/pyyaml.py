"""Which tests need PyYAML."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec

import pytest

__all__ = ["needs_pyyaml", "those_of_pyyaml_marked"]

needs_pyyaml = pytest.mark.skipif(find_spec("yaml") is None, reason="PyYAML is not installed")


def those_of_pyyaml_marked(names: Iterable[str]) -> list[object]:
    """Names of files, for `parametrize`: those of YAML are skipped where nothing reads it."""
    return [pytest.param(name, marks=[needs_pyyaml] * name.endswith(("yaml", "yml"))) for name in names]
