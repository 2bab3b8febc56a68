"""The wheel contains all that an installed distplb needs; `launch/wheel.sh` installs it into an empty environment."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

import distplb

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(find_spec("build") is None, reason="build is not installed")
def test_the_wheel_is_whole_and_runs_by_itself(tmp_path: Path) -> None:
    sources = tmp_path / "sources"  # not in the repository, which other tests may be reading
    sources.mkdir()
    for name in ("distplb", "setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        (sources / name).symlink_to(ROOT / name)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(sources)]
    built = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = tmp_path.glob("*.whl")
    assert path.name == f"distplb-{distplb.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(path) as wheel:
        names = set(wheel.namelist())
        wheel.extractall(tmp_path / "installed")
    package = {str(one.relative_to(ROOT)) for one in (ROOT / "distplb").rglob("*") if one.is_file()}
    assert {name for name in package if "__pycache__" not in name} <= names
    assert {"distplb/py.typed", "distplb/report/report.html"} <= names
    assert not [name for name in names if not name.startswith("distplb")]
    told = subprocess.run(
        [sys.executable, "-m", "distplb", "--version"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path / "installed")},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert told.stdout == f"distplb, version {distplb.__version__}\n", told.stderr
