"""The examples run under torchrun, as users run them, and print and write what they promise."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from distplb import read_steps

EXAMPLE = Path(__file__).parents[2] / "examples" / "pretrain_moe.py"
TINY = ["--iterations=12", "--every=4", "--turn=2", "--ffn=32", "--batch=2", "--sequence=32", "--experts=8"]
FIGURES = {"tokens_per_second", "loss", "imbalance", "worst_imbalance", "replicas"}
FIGURES |= {"expert_share", "wait_share", "rebalance_share"}


def run(*options: str, ranks: int = 2) -> subprocess.CompletedProcess[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    command = [sys.executable, *launcher, str(EXAMPLE), *TINY, *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400, check=False)


def trained(*options: str, ranks: int = 2) -> str:
    done = run(*options, ranks=ranks)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_compare_trains_all_modes_and_writes_the_closing_table(tmp_path: Path) -> None:
    said = trained("--compare", f"--json={tmp_path / 'table.json'}")
    table = json.loads((tmp_path / "table.json").read_text())
    assert set(table) == {"plain", "loss-free"}
    for router, modes in table.items():
        assert set(modes) == {"static", "rebalanced", "replicated", "both", "forced"}
        assert f"router: {router}" in said
        for row in modes.values():
            assert set(row) == FIGURES
        assert modes["forced"]["imbalance"] == pytest.approx(1.0)
        assert modes["static"]["rebalance_share"] == 0 < modes["rebalanced"]["rebalance_share"] < 1
        assert 0 < modes["static"]["wait_share"] < modes["static"]["expert_share"] < 1
        # Moving experts changes no result, except that float32 sums may be taken in another order.
        for balance in ("rebalanced", "replicated", "both"):
            assert modes[balance]["loss"] == pytest.approx(modes["static"]["loss"], rel=1e-3)
            assert f"{balance} over static: " in said
        for balance in ("replicated", "both"):
            assert modes[balance]["worst_imbalance"] < 1.05 < modes["static"]["worst_imbalance"]
            assert 0 < modes[balance]["replicas"] < 4
        assert modes["rebalanced"]["replicas"] == 0
    assert said.count("rebalance after iteration") == 2 * 2 * 3


@pytest.mark.parametrize("workload", ["rotating", pytest.param("bursts", marks=pytest.mark.long)])
def test_a_workload_takes_the_routers_place_in_micro_batches_and_recomputation(workload: str, tmp_path: Path) -> None:
    options = [f"--workload={workload}", "--micro-batches=2", "--recompute", "--batch=4"]
    losses = {}
    for balance in ("static", "both"):
        trained(*options, f"--balance={balance}", f"--json={tmp_path / 'table.json'}")
        row = json.loads((tmp_path / "table.json").read_text())["plain"][balance]
        losses[balance] = row["loss"]
        assert (row["worst_imbalance"] < 1.05) == (balance == "both")
    assert losses["both"] == pytest.approx(losses["static"], rel=1e-3)


def test_a_cap_is_kept_or_refused_with_the_smallest_one() -> None:
    """A step has 2 ranks x 2 sequences x 32 bytes x 2 choices = 256 tokens."""
    assert "replicated" in trained("--balance=replicated", "--max-tokens-per-gpu=130", "--replica-slots=4")
    refused = run("--balance=replicated", "--max-tokens-per-gpu=100")
    assert refused.returncode
    assert "max_tokens_per_gpu is 100, but with 2 replica slots on each GPU this step needs 128" in refused.stderr


def test_reports_show_the_steps_of_a_model_beside_those_of_others(tmp_path: Path) -> None:
    """Models that lend nothing are measured too, so that the distance to a router that is even can be told."""
    trained("--compare", "--iterations=16", f"--report={tmp_path}")
    for router in ("plain", "loss-free"):
        steps = {name: read_steps(tmp_path / f"{router}-{name}" / "steps.jsonl") for name in ("both", "forced")}
        assert [step.step for step in steps["both"]] == [1, 6, 11]  # the last sample is told when the next one begins
        assert all(step.num_replicas for step in steps["both"])
        assert all(step.imbalance_before == (1.0, 1.0) for step in steps["forced"])
        page = (tmp_path / f"{router}-both.html").read_text()
        assert f"{router}-forced" in page
        assert "Time of a step" in page


def test_one_mode_trains_on_own_text_without_a_process_group(tmp_path: Path) -> None:
    (tmp_path / "poem.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 50)
    said = trained("--balance=rebalanced", f"--data={tmp_path}", ranks=1)
    assert "plain     rebalanced iteration   12" in said


def test_experts_are_found_by_a_table_after_the_routers_choice() -> None:
    said = trained("--balance=rebalanced", "--apply=remap")
    moved = re.findall(r"rebalance after iteration.*", said)
    assert len(moved) == 3
    assert "plain     rebalanced iteration   12" in said


@pytest.mark.parametrize("framework", [pytest.param("torchtitan", marks=pytest.mark.long), "megatron"])
def test_the_example_of_a_framework_runs_and_tells_the_imbalance_before_and_after(framework: str) -> None:
    pytest.importorskip(framework)
    example = EXAMPLE.with_name(f"{framework}_moe.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(example)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr
    pairs = [
        (float(before), float(after))
        for before, after in re.findall(r"imbalance (\d\.\d+) -> (\d\.\d+)\b(?! on the next)", done.stdout)
    ]
    assert len(pairs) >= 2
    assert all(after <= before for before, after in pairs), pairs
    assert min(after / before for before, after in pairs) < 0.95


def test_experts_without_tokens_end_neither_training_nor_rebalances() -> None:
    """The first rebalance after an expert had received no tokens ended the job."""
    example = EXAMPLE.with_name("starved_experts.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(example)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr
    rebalances = re.findall(r"iteration +(\d+): moved, +(\d+) slots.*first layer: \[(.*)\]", done.stdout)
    assert [int(iteration) for iteration, *_ in rebalances] == list(range(6, 61, 6))
    assert sum(len(set(steps.split(", "))) > 1 for *_, steps in rebalances) > 5, "step counts must differ"
    (apart,) = re.findall(r"they differ by at most (\S+)", done.stdout)
    assert float(apart) < 1e-9


def losses(said: str) -> list[str]:
    """Read the mean losses of iterations 1 to 4, 5 to 8 and 9 to 12."""
    return re.findall(r"static +iteration +\d+  loss (\S+)", said)


def test_from_the_switch_on_batches_come_from_the_other_text(tmp_path: Path) -> None:
    (tmp_path / "poem.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 50)
    own = ["--balance=static", f"--data={tmp_path}", "--text=prose"]
    kept = trained(*own, ranks=1)
    assert kept.count("text: ") == 1  # at the start only, not with the table
    for switch_at, same in ((8, 1), (9, 2)):
        said = trained(*own, f"--switch-at={switch_at}", ranks=1)
        assert f"\ntext: {tmp_path}, code from iteration {switch_at} on\nMedians over" in said
        pairs = zip(losses(said), losses(kept), strict=True)
        assert [one == other for one, other in pairs] == [i < same for i in range(3)]


@pytest.mark.parametrize("switch_at", [1, 13])
def test_a_switch_outside_the_run_is_refused(switch_at: int) -> None:
    refused = run(f"--switch-at={switch_at}", ranks=1)
    assert refused.returncode == 2
    assert f"--switch-at {switch_at} must be after iteration 1 and at most 12, the last" in refused.stderr


def test_prose_is_english_and_code_is_not() -> None:
    sys.path.insert(0, str(EXAMPLE.parent))
    import texts

    prose, code = (bytes(text().numpy()).decode(errors="replace") for text in (texts.prose, texts.code))
    assert 1e6 < len(prose) < len(code) <= texts.MAX_BYTES

    def per_thousand(text: str, words: str) -> float:
        return 1000 * len(re.findall(words, text)) / len(re.findall(r"\w+", text))

    assert per_thousand(prose, r"\bthe\b") > 30 > 15 > per_thousand(code, r"\bthe\b")
    assert per_thousand(code, r"\bself\b") > 10 > 5 > per_thousand(prose, r"\bself\b")
    assert not re.search(r"^\s*>>>|^[*=~-]+$|``", prose, flags=re.MULTILINE)
