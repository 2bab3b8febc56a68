"""Fixtures that several test files share."""

from __future__ import annotations

from pathlib import Path

import pytest
from recorded_runs import write_folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder as a `Rebalancer` writes it."""
    return write_folder(tmp_path / "run")
