"""Which tests run and in which order: all with --long; the longest files first, so that no worker ends late."""

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
    "test_same_training",
    "test_same_sharded_training",
    "test_checkpoints",
    "test_benchmarks",
    "test_hosts",
    "test_torchtitan_trainer",
    "test_mpi",
    "test_pages",
    "test_gradient_hooks",
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
    """Add --long, which launch/test.sh passes on like all its arguments."""
    parser.addoption("--long", action="store_true", help="also run tests that repeat a case at another size")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """A file's tests stay together, in their order; a long one runs only with --long or if it is named."""
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))
    if config.getoption("long"):
        return
    long = [item for item in items if item.get_closest_marker("long")]
    left_out = {item for item in long if not is_named(item, config.args)}
    config.stash[LEFT_OUT] = len(left_out)
    config.hook.pytest_deselected(items=list(left_out))
    items[:] = [item for item in items if item not in left_out]


def is_named(item: pytest.Item, arguments: list[str]) -> bool:
    """Whether a command-line argument is the test's id, with or without its parameters."""
    return item.nodeid in arguments or item.nodeid.partition("[")[0] in arguments


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Report from an xdist worker to the process that prints, which collects no tests itself."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left out"] = session.config.stash.get(LEFT_OUT, 0)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Take the number from any worker, as all collect the same tests."""
    node.config.stash[LEFT_OUT] = getattr(node, "workeroutput", {}).get("left out", 0)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print how many tests did not run."""
    if number := config.stash.get(LEFT_OUT, 0):
        terminalreporter.write_line(
            f"{number} long test{' was' if number == 1 else 's were'} left out; launch/test.sh --long runs all"
        )
