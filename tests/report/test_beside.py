"""Runs beside a run: read, named apart, and refused if they are not runs of the same job; the size of a large page."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from recorded_runs import many_steps, step, steps, write_folder

from distplb import DistplbError, EventLog, StepEvent
from distplb.cli.main import main
from distplb.report.beside import with_beside
from distplb.report.page import write_report
from distplb.report.run import Run

MAX_BYTES = 4_000_000


def write_steps(folder: Path, events: tuple[StepEvent, ...]) -> Path:
    log = EventLog(folder / "steps.jsonl")
    for one in events:
        log(one)
    log.close()
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Folders of runs of one job: run, forced, and two that are called static."""
    write_folder(tmp_path / "run")
    write_steps(tmp_path / "forced", steps(imbalance_before=(1.0, 1.0), replicas=((), ())))
    for parent in ("a", "b"):
        write_steps(tmp_path / parent / "static", steps(replicas=((), ())))
    return tmp_path


def names(run: Run) -> list[str]:
    return [other.name for other in run.beside]


def test_runs_are_named_after_their_folders_as_far_as_they_differ(runs: Path) -> None:
    run = Run.read(runs / "run")
    assert names(with_beside(run, [])) == []
    assert names(with_beside(run, [runs / "forced", runs / "a/static"])) == ["forced", "static"]
    assert names(with_beside(run, [runs / "forced/steps.jsonl", runs / "forced"])) == ["forced"]
    same = with_beside(run, [runs / "a/static", runs / "b/static", runs / "forced"])
    assert names(same) == ["a/static", "b/static", f"{runs.name}/forced"]


@pytest.mark.parametrize(
    ("changed", "wording"),
    [
        (
            {"layers": 3},
            "other has layers: 3, slots: 8, GPUs: 4, but run has layers: 2, slots: 8, GPUs: 4; put",
        ),
        ({"gpus": 2}, "other has layers: 2, slots: 8, GPUs: 2, but run has"),
        ({"num_slots": 16}, "other has layers: 2, slots: 16, GPUs: 4, but run has"),
        ({"seconds": {}}, "other has no sampled steps that were timed, which --beside compares; pass on_event="),
    ],
)
def test_a_run_of_another_job_is_refused(changed: dict[str, Any], wording: str, runs: Path) -> None:
    write_steps(runs / "other", (step(1, **changed),))
    with pytest.raises(DistplbError) as refused:
        with_beside(Run.read(runs / "run"), [runs / "other"])
    assert wording in str(refused.value)


# --- the command ------------------------------------------------------------------------------------------------


def report(*arguments: Any) -> Any:
    return CliRunner().invoke(main, ["report", *map(str, arguments)])


def test_the_command_shows_runs_beside_each_other(runs: Path) -> None:
    page = runs / "report.html"
    beside = [word for name in ("forced", "a/static", "b/static") for word in ("--beside", runs / name)]
    done = report(runs / "run", "--output", page, "--json", *beside)
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)["sampled"]
    assert [one["name"] for one in told["beside"]] == [f"{runs.name}/forced", "a/static", "b/static"]
    assert told["beside"][0]["longer"].keys() == {"waiting", "push", "split", "products", "the rest"}
    assert f"Beside {runs.name}/forced, whose step takes 150 ms, this run takes as long." in page.read_text()


def test_the_command_shows_steps_alone(runs: Path) -> None:
    done = report(runs / "forced/steps.jsonl", "--output", runs / "report.html")
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith("In 10 sampled steps no replica was lent: the imbalance was 1.000 on average")


@pytest.mark.parametrize(
    ("arguments", "wording"),
    [
        (["{runs}/run", "--beside", "{runs}/nowhere"], "there is no file or folder"),
        (["{runs}/run", "--beside", "{runs}/empty"], "has no events, no trace and no sampled steps"),
        (["{runs}/run", "--beside", "{runs}/torn"], "torn: the sampled step 1 is damaged (layers: 2, imbalances: 1)"),
        (["{runs}/run", "--beside", "{runs}/noise"], "steps.jsonl, line 1: it is not JSON"),
        (["{runs}/run/events.jsonl", "--beside", "{runs}/forced"], "events.jsonl has no sampled steps that were timed"),
        (["{runs}/run", "--beside", "{runs}/page.html", "--output", "{runs}/page.html"], "would be overwritten"),
    ],
)
def test_wrong_input_is_one_line(
    arguments: list[str], wording: str, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(runs)
    (runs / "empty").mkdir()
    write_steps(runs / "torn", (step(1, imbalance_before=(1.5,)),))
    (runs / "noise").mkdir()
    (runs / "noise/steps.jsonl").write_bytes(b"\x00\xff no record\n")
    (runs / "page.html").write_text("")
    done = report(*(one.format(runs=runs) for one in arguments))
    assert done.exit_code == 2, done.output
    assert wording in done.stderr
    assert len([line for line in done.stderr.splitlines() if line.startswith("Error")]) == 1, done.stderr
    assert not (runs / "report.html").exists()


# --- sizes ------------------------------------------------------------------------------------------------------


def test_a_large_job_makes_a_page_of_a_few_megabytes(tmp_path: Path) -> None:
    """58 layers × 300 samples on 64 GPUs, and one step with 3,000 layers that have long names."""
    large = many_steps(300, layers=58, slots=256, gpus=64, nodes=8)
    odd = tuple(f"{'x' * 2000}.{number}.<b>" for number in range(3000))
    wide = step(1, layers=3000, started=2.0, gpus=64, num_slots=256, num_nodes=8)
    other = Run("y" * 5000, steps=large[:10])
    run = Run("run", steps=(*large, replace(wide, layers=odd)), beside=(other,))
    page = tmp_path / "report.html"
    write_report(run, page)
    assert page.stat().st_size < MAX_BYTES
    assert page.read_text().count("x" * 100) == 0, "long names are shortened"
