"""`bench_idle`: what it finds in calls that keep something, its tables, and a small run; the package of a commit."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmark_modules import imported

bench_idle, earlier = imported("train.bench_idle"), imported("shared.earlier")


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_idle, "FEW", 5)
    monkeypatch.setattr(bench_idle, "MANY", 100)


@pytest.mark.usefixtures("few")
def test_what_a_call_keeps_and_allocates_is_found() -> None:
    kept: list[Any] = []
    found = {
        "nothing": bench_idle.allocations(bench_idle.Case(lambda: None)),
        "a block": bench_idle.allocations(bench_idle.Case(lambda: kept.append(bytes(100)))),
        "a tensor": bench_idle.allocations(bench_idle.Case(lambda: kept.append(torch.zeros(3)))),
        "two for a moment": bench_idle.allocations(bench_idle.Case(lambda: torch.zeros(3).clone())),
    }
    assert found["nothing"]["kept_blocks"] < bench_idle.KEPT
    assert found["nothing"]["tensors"] == found["nothing"]["kept_tensors"] == 0
    assert found["a block"]["kept_blocks"] > 0.9
    assert found["a block"]["peak_bytes"] >= 100
    assert found["a tensor"]["kept_tensors"] == 1
    assert found["two for a moment"]["tensors"] == 2
    assert found["two for a moment"]["kept_tensors"] == 0
    one = {"seconds": [1e-5], **found["a block"]}
    assert "Missed: a call on 1 rank." in bench_idle.growth({1: {"distplb: a call": one, "by hand": one}, 2: {}})
    assert "Met." in bench_idle.growth({2: {"distplb: a call": one | found["nothing"], "by hand": one}})


def test_the_table_has_both_versions_side_by_side() -> None:
    def row(seconds: float) -> dict[str, Any]:
        return {"seconds": [seconds] * 3, "peak_bytes": 10, "tensors": 2, "kept_blocks": 0.0, "kept_tensors": 0.0}

    calls = (bench_idle.DISPATCH, bench_idle.STEP_BALANCED)
    rows = {bench_idle.EXCHANGE: row(1e-5), bench_idle.STEP_PLAIN: row(3e-5)}
    rows |= {f"{bench_idle.EARLIER}: {name}": row(9e-5) for name in calls}
    rows |= {f"distplb: {name}": row(4e-5) for name in calls}
    text = bench_idle.part(2, rows)
    assert "90.0 [90.0] |   40.0 [40.0]" in text or "90.0 [90.0] | 40.0 [40.0]" in text
    assert "`dispatch` adds 30 µs to that by hand (before: 80)" in text
    assert "A step adds 10 µs to that by hand (before: 60)" in text


def test_the_package_of_a_commit_is_imported_beside_this_one(tmp_path: Path) -> None:
    root, package = tmp_path / "checkout", tmp_path / "checkout" / "distplb"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("from distplb.part import VALUE\n")
    (package / "part.py").write_text('VALUE = "of distplb"\n')
    for words in ("init -q", "add .", "-c user.name=A -c user.email=a@b.c commit -qm one"):
        subprocess.run(["git", *words.split()], cwd=root, check=True)
    (package / "part.py").write_text('VALUE = "changed"\n')
    earlier.put_earlier("HEAD", tmp_path / "there", root)
    program = f"import {earlier.EARLIER}, sys; print({earlier.EARLIER}.VALUE, 'distplb' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path / "there", capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["of", earlier.EARLIER, "False"]
    with pytest.raises(SystemExit, match=r"--against no-such-commit: .*pass a commit of this checkout"):
        earlier.put_earlier("no-such-commit", tmp_path / "there", root)


def test_a_small_run_on_one_rank(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(bench_idle, "RANKS", (1,))
    output = tmp_path / "idle.md"
    monkeypatch.setattr(sys, "argv", ["bench_idle", "--rounds", "2", "--quick", "--output", str(output)])
    bench_idle.main()
    text = output.read_text()
    for name in ("`Rebalancer.step()`, after an optimizer step", "`LoadWindow.add`, 58 layers", bench_idle.DISPATCH):
        assert f"\n| {name} " in text
    assert "`dispatch` adds " in text
