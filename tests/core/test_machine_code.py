"""Where machine code is kept, and which changes of sources it depends on."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from distplb import DistplbError
from distplb.core import machine_code

MODULE = "distplb.packing.cpu_kernels"


def test_machine_code_is_not_kept_where_others_can_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    folder = machine_code._folder(MODULE).parent
    assert folder == tmp_path / f"distplb-{os.getuid()}"
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o777)
    with pytest.raises(DistplbError, match=r"not a folder that only you can write to.*set NUMBA_CACHE_DIR"):
        machine_code._folder(MODULE)


def test_a_change_of_any_of_the_modules_makes_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Numba checks only a function's own file, and would keep using machine code of steps that have changed."""
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "code"))
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    for name in ("cpu_these_kernels", "cpu_these_steps", "other"):
        (tmp_path / f"{name}.py").write_text("one = 1\n")
    before = machine_code._folder("cpu_these_kernels")
    assert before.parent == tmp_path / "code"
    (tmp_path / "other.py").write_text("one = 2\n")
    assert machine_code._folder("cpu_these_kernels") == before
    (tmp_path / "cpu_these_steps.py").write_text("one = 2\n")
    assert machine_code._folder("cpu_these_kernels") != before
