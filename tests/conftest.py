"""The order of the test files: those that take longest begin first, so that none of them ends alone."""

from __future__ import annotations

import pytest

LONGEST = (
    "test_faults",
    "test_training",
    "test_huggingface",
    "test_torchtitan",
    "test_megatron",
    "test_cuda_engine",
    "test_framework_layouts",
    "test_checkpoints",
    "test_example",
    "test_hosts",
    "test_transfers",
    "test_torchtitan_trainer",
    "test_launchers",
    "test_plans_alike",
    "test_mpi",
    "test_grid",
    "test_spread",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A file's tests stay together, in their order."""
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))
