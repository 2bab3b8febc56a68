"""Long tests run with --long or when named, and the files that take longest start first."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

CONFTEST = Path(__file__).parents[1] / "conftest.py"
SETTINGS = "[pytest]\nmarkers =\n    long: as in setup.cfg\n"
TESTS = """
import pytest

@pytest.mark.parametrize("size", [1, pytest.param(2, marks=pytest.mark.long), pytest.param(3, marks=pytest.mark.long)])
def test_one(size):
    pass
"""


@pytest.mark.parametrize(
    ("arguments", "passed", "left_out"),
    [
        (["-p", "xdist", "-n", "2"], 1, 2),
        (["--long"], 3, 0),
        (["test_it.py::test_one[3]"], 1, 0),
    ],
)
def test_long_tests_run_where_they_are_asked_for(
    arguments: list[str], passed: int, left_out: int, tmp_path: Path
) -> None:
    (tmp_path / "conftest.py").write_text(CONFTEST.read_text())
    (tmp_path / "pytest.ini").write_text(SETTINGS)
    (tmp_path / "test_it.py").write_text(TESTS)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # they take seconds to import
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments]
    run = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert f"{passed} passed" in run.stdout
    message = f"{left_out} long tests were left out; launch/test.sh --long runs all"
    assert (message in run.stdout) == (left_out > 0)


def test_the_files_that_begin_first_are_there() -> None:
    longest = re.findall(r'^    "(test_\w+)",$', CONFTEST.read_text(), re.MULTILINE)
    assert len(longest) > 5
    assert set(longest) <= {path.stem for path in CONFTEST.parent.rglob("test_*.py")}
