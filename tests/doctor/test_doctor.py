"""`distplb doctor` in a single process, under torchrun, and with faults."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from ranks import on_ranks

from distplb import Topology
from distplb.cli.main import main
from distplb.comm.torchdist import TorchComm
from distplb.doctor import collective_checks, local_checks
from distplb.doctor.examine import Examination, examine_ranks
from distplb.doctor.finding import Timing, note, ok, wrong

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
LAUNCHED = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "GROUP_WORLD_SIZE": "1"}


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*LAUNCHED, "OMP_NUM_THREADS", "GLOO_SOCKET_IFNAME"):
        monkeypatch.delenv(name, raising=False)


def launched(monkeypatch: pytest.MonkeyPatch, **others: str) -> None:
    for name, value in (LAUNCHED | others).items():
        monkeypatch.setenv(name, value)


def findings_of(what: str) -> list[tuple[str, str]]:
    return [(one.level, one.text) for one in local_checks.findings() if one.what == what]


# --- alone ------------------------------------------------------------------------------------------------------


def test_alone_it_looks_at_this_process_and_says_how_to_look_at_more() -> None:
    result = CliRunner().invoke(main, ["doctor", "--json"])
    assert (result.exit_code, result.stderr) == (0, "")
    document = json.loads(result.stdout)
    lines = {one["what"]: (one["level"], one["text"]) for one in document["findings"]}
    assert not document["wrong"]
    assert document["timings"] == []
    assert lines["torch"][1].startswith(torch.__version__.split("+")[0])  # the package's has no +cu124
    assert lines["launcher"] == ("ok", "none; single process")
    assert "torchrun --nproc-per-node 2 -m distplb doctor" in lines["ranks"][1]
    assert lines["engines"][1].startswith("reference")
    assert "gloo" in lines["backends"][1]
    table = CliRunner().invoke(main, ["doctor"])
    assert table.exit_code == 0
    assert all(text in table.stdout for what in lines.items() for text in (what[0], what[1][0]))


@pytest.mark.parametrize(
    ("installed", "level"),
    [
        ("2.13.0+cpu", "ok"),
        ("2.6", "ok"),
        ("2.5.1", "note"),
        ("2.14.0.dev2026", "note"),
        ("3.0", "note"),
        ("?", "note"),
    ],
)
def test_a_version_is_compared_by_its_numbers(monkeypatch: pytest.MonkeyPatch, installed: str, level: str) -> None:
    monkeypatch.setattr(local_checks, "version", lambda name: installed)
    assert findings_of("torch")[0][0] == level


def test_without_numba_it_says_what_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distplb.packing.cpu.is_there", lambda: False)
    ((level, text),) = findings_of("engine cpu")
    assert level == "note"
    assert "pip install 'distplb[fast]'" in text
    assert "default: reference; plans equal to the reference: 1 of 1" in findings_of("engines")[0][1]


def test_an_engine_that_plans_otherwise_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = local_checks.plan

    def otherwise(load: Any, topology: Topology, **options: Any) -> Any:
        return plan(load.flip(2) if options["engine"] == "cpu" else load, topology, **options)

    monkeypatch.setattr(local_checks, "plan", otherwise)
    ((level, text),) = findings_of("engine cpu")
    assert level == "WRONG"
    assert "engine='reference'" in text


def test_threads_that_the_cores_do_not_have_are_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    launched(monkeypatch, WORLD_SIZE="64", LOCAL_WORLD_SIZE="64")
    assert findings_of("OMP_NUM_THREADS")[0][0] == "note"
    assert "set OMP_NUM_THREADS=" in findings_of("OMP_NUM_THREADS")[0][1]
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert not findings_of("OMP_NUM_THREADS")


def test_fewer_gpus_than_ranks_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    launched(monkeypatch)
    about = type("About", (), {"name": "H100", "total_memory": 80 * 2**30})
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: about)
    assert findings_of("GPU 0") == [("ok", "H100, 80 GiB")]
    assert findings_of("GPUs") == [("WRONG", "1 for 2 ranks on this node; use torchrun --nproc-per-node 1")]


def test_nodes_without_a_named_interface_are_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    launched(monkeypatch, WORLD_SIZE="4", GROUP_WORLD_SIZE="2")
    assert findings_of("launcher") == [("ok", "2 nodes × 2 ranks")]
    assert "GLOO_SOCKET_IFNAME=eth0" in findings_of("GLOO_SOCKET_IFNAME")[0][1]
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    assert not findings_of("GLOO_SOCKET_IFNAME")


def test_a_launcher_that_contradicts_itself_is_wrong_and_nobody_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    launched(monkeypatch, LOCAL_RANK="1")
    began = time.monotonic()
    result = CliRunner().invoke(main, ["doctor", "--deadline", "600"])
    assert result.exit_code == 1
    assert "WRONG  launcher" in result.stdout
    assert "--distribution=block" in result.stdout
    assert time.monotonic() - began < 100


def test_only_rank_0_prints(monkeypatch: pytest.MonkeyPatch) -> None:
    launched(monkeypatch, RANK="1")
    result = CliRunner().invoke(main, ["doctor"])
    assert (result.exit_code, result.stdout) == (1, "")


# --- together ---------------------------------------------------------------------------------------------------


def test_under_torchrun_ranks_exchange_and_move(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "GLOO_SOCKET_IFNAME": "lo"}
    run = subprocess.run(
        [*TORCHRUN, "-m", "distplb", "doctor", "--json"],
        cwd=tmp_path,
        env=environment | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    document = json.loads(run.stdout)
    lines = {one["what"]: (one["level"], one["text"]) for one in document["findings"]}
    assert lines["ranks"] == ("ok", "all 2 exchange, move and lend correctly")
    assert lines["versions"] == ("ok", "the same on 2 ranks")
    assert lines["launcher"] == ("ok", "1 node × 2 ranks")
    timed = {one["what"]: one for one in document["timings"]}
    calls = [f"{name}, {size} MiB" for size in (1, 64) for name in ("sum", "min", "broadcast", "exchange")]
    parts = ["count and split", "push, 6 MiB", "push again, 4 MiB", "bring home, 6 MiB"]
    step = "step of 3 layers with replicas, forward and backward"
    assert list(timed) == [*calls, "move of 24 MiB, with AdamW state", step, *(f"- {part}" for part in parts)]
    assert all(one["seconds"] > 0 for one in timed.values())
    assert [what for what, one in timed.items() if one["bytes"] is None] == [step, "- count and split"]
    assert timed["- push, 6 MiB"]["bytes"] == 6 << 20
    assert lines["replicas"] == ("ok", "6 lent in 3 layers; imbalance 1.74 without them, 1.00 with them")


def _examined(what: str) -> tuple[Examination, float]:
    """Examine two ranks; rank 1 differs in the way that `what` names."""
    comm, own = TorchComm(deadline=2.0 if what == "late" else 60.0), Examination([ok("torch", "2.13")])
    collective_checks._SIZES = (1 << 20,)
    began = time.monotonic()
    if comm.rank == 0:
        local_checks.versions = lambda: {"torch": "2.13.0", "distplb": "0.1.0", "numba": "0.68"}
    elif what == "different":
        local_checks.versions = lambda: {"torch": "2.12.0", "distplb": "0.1.0"}
        own.findings += [wrong("GPUs", "1 for 2 ranks"), note("OMP_NUM_THREADS", "not set"), ok("numpy", "2.4")]
        collective_checks._is_filled = lambda *_: False
    elif what == "refused":
        collective_checks._fill = lambda weights, routers, optimizer, *_: optimizer.state[weights[0]].update(
            odd=weights[0][:2]
        )
    elif what == "late":
        collective_checks.collectives = lambda comm: time.sleep(3) or iter(())
    return examine_ranks(comm, Topology(1, 2), own, 60.0), time.monotonic() - began


def on_both(what: str) -> list[tuple[str, str, str]]:
    """The notes and errors, which must be the same on both ranks."""
    (first, _), (second, _) = on_ranks(2, _examined, what)
    assert first.is_wrong
    assert first.findings == second.findings
    return [one for one in first.findings if one.level != "ok"]


def test_what_is_different_on_another_rank_is_told_on_all() -> None:
    assert on_both("different") == [
        wrong("GPUs", "rank 1: 1 for 2 ranks"),
        note("OMP_NUM_THREADS", "rank 1: not set"),
        wrong("numba", "rank 0 has 0.68, rank 1 has none; install the same version on all nodes"),
        wrong("torch", "rank 0 has 2.13.0, rank 1 has 2.12.0; install the same version on all nodes"),
        wrong("move", "rank 1: experts or their state arrived with wrong values; report this as a bug of distplb"),
    ]


def test_a_move_that_one_rank_refuses_is_wrong_on_all() -> None:
    *_, (level, what, text) = on_both("refused")
    assert (level, what) == ("WRONG", "ranks")
    assert "odd" in text


def test_a_rank_that_does_not_come_is_named() -> None:
    (first, seconds), (second, _) = on_ranks(2, _examined, "late")
    assert first.is_wrong
    assert second.is_wrong
    assert "rank 1 did not answer" in first.findings[-1].text
    assert seconds < 60


def test_a_timing_of_bytes_has_a_rate() -> None:
    assert Timing("sum", 10**9, 0.5).rate == 2e9
    assert Timing("step", None, 0.5).rate is None
