"""Which tests run, and in which order: all with --long; the files that take longest first, so that none ends alone."""

from __future__ import annotations

from typing import Any

import pytest

LONGEST = (
    "test_cuda_engine",
    "test_huggingface",
    "test_torchtitan",
    "test_example",
    "test_launchers",
    "test_megatron",
    "test_faults",
    "test_training",
    "test_checkpoints",
    "test_benchmarks",
    "test_hosts",
    "test_torchtitan_trainer",
    "test_mpi",
    "test_cuda_trial",
    "test_framework_layouts",
    "test_rebalancer",
    "test_sequences",
    "test_transfers",
    "test_doctor",
    "test_check_in",
    "test_starved",
    "test_refusals",
    "test_figures",
    "test_counts",
    "test_window",
)
LEFT_OUT = pytest.StashKey[int]()  # tests marked `long`, in a run without --long


def pytest_addoption(parser: pytest.Parser) -> None:
    """Handed on by launch/test.sh, as all its arguments are."""
    parser.addoption("--long", action="store_true", help="run what repeats a case at another size, too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """A file's tests stay together, in their order; a long one runs if --long or its own name asks for it."""
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))
    if config.getoption("long"):
        return
    long = [item for item in items if item.get_closest_marker("long")]
    left_out = {item for item in long if not is_named(item, config.args)}
    config.stash[LEFT_OUT] = len(left_out)
    config.hook.pytest_deselected(items=list(left_out))
    items[:] = [item for item in items if item not in left_out]


def is_named(item: pytest.Item, arguments: list[str]) -> bool:
    """Whether an argument of the command line is the test's id, with its parameters or without."""
    return item.nodeid in arguments or item.nodeid.partition("[")[0] in arguments


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker of xdist tells the process that prints, which collects nothing itself."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left out"] = session.config.stash.get(LEFT_OUT, 0)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """All workers collect the same."""
    node.config.stash[LEFT_OUT] = getattr(node, "workeroutput", {}).get("left out", 0)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Says what did not run."""
    if number := config.stash.get(LEFT_OUT, 0):
        terminalreporter.write_line(f"{number} long tests were left out; launch/test.sh --long runs them, too")
