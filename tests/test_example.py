"""The example runs under torchrun as its users run it, and writes what it says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parent.parent / "examples" / "pretrain_moe.py"
TINY = ["--iterations=12", "--every=4", "--turn=2", "--ffn=32", "--batch=2", "--sequence=32", "--experts=8"]
FIGURES = {"tokens_per_second", "loss", "imbalance", "expert_share", "wait_share", "rebalance_share"}


def trained(*options: str, ranks: int = 2) -> str:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    command = [sys.executable, *launcher, str(EXAMPLE), *TINY, *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_compare_trains_all_modes_and_writes_the_closing_table(tmp_path: Path) -> None:
    said = trained("--compare", f"--json={tmp_path / 'table.json'}")
    table = json.loads((tmp_path / "table.json").read_text())
    assert set(table) == {"plain", "loss-free"}
    for router, modes in table.items():
        assert set(modes) == {"static", "rebalanced", "forced"}
        assert f"router: {router}" in said
        for row in modes.values():
            assert set(row) == FIGURES
        assert modes["forced"]["imbalance"] == pytest.approx(1.0)
        assert modes["static"]["rebalance_share"] == 0 < modes["rebalanced"]["rebalance_share"] < 1
        assert 0 < modes["static"]["wait_share"] < modes["static"]["expert_share"] < 1
        # Moving experts changes no result; float32 sums may take another order.
        assert modes["rebalanced"]["loss"] == pytest.approx(modes["static"]["loss"], rel=1e-3)
    assert said.count("rebalance after iteration") == 2 * 3


def test_one_mode_trains_on_own_text_without_a_process_group(tmp_path: Path) -> None:
    (tmp_path / "poem.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 50)
    said = trained("--balance=rebalanced", f"--data={tmp_path}", ranks=1)
    assert "plain     rebalanced iteration   12" in said
