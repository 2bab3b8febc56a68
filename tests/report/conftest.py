"""What several files of these tests begin with."""

from __future__ import annotations

from pathlib import Path

import pytest
from recorded_runs import write_folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """As a `Rebalancer` leaves it."""
    return write_folder(tmp_path / "run")
