"""Files that earlier commits wrote are still read: traces, records of rebalances, placements."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

from distplb import Placement, Trace, TraceWriter, read_events
from distplb.report.run import Run

DATA = Path(__file__).parent / "data"
sys.path.insert(0, str(DATA))
from write import EVENT, LAYERS, NEXT, TABLES, write  # noqa: E402  # the module is next to its output

COMMITS = sorted(path.name for path in DATA.iterdir() if path.is_dir() and (path / "placement.json").is_file())


def check(folder: Path) -> None:
    placements = tuple(Placement(torch.tensor(table), 4, 2) for table in TABLES)
    trace = Trace.read(folder)
    assert trace.load.tolist() == (torch.arange(64).reshape(8, 2, 4) % 37).tolist()
    assert trace.iteration.tolist() == [1, 1, 2, 2, 3, 3, 4, 4]
    assert trace.placement_of_step.tolist() == [0] * 4 + [1] * 4
    assert (trace.placements, trace.layers, trace.note) == (placements, LAYERS, "a run")
    assert Placement.load(folder / "placement.json", LAYERS) == placements[1]
    if not (folder / "events.jsonl").is_file():
        return
    first, second = read_events(folder / "events.jsonl")
    for name, value in (EVENT | NEXT).items():
        assert getattr(first, name) == value, name
    assert (second.iteration, second.decision, second.imbalance_next) == (4, "kept", None)
    run = Run.read(folder)
    assert (len(run.events), run.every) == (2, 2)


def test_there_are_files_of_several_commits() -> None:
    assert len(COMMITS) >= 3
    assert sum((DATA / commit / "events.jsonl").is_file() for commit in COMMITS) >= 2
    assert all(f"`{commit}`" in (DATA / "README.md").read_text() for commit in COMMITS)


@pytest.mark.parametrize("commit", COMMITS)
def test_what_a_commit_wrote_is_read(commit: str) -> None:
    check(DATA / commit)


def test_what_this_one_writes_is_read_and_is_told_the_same(tmp_path: Path) -> None:
    write(tmp_path)
    check(tmp_path)
    (line, *_) = (tmp_path / "events.jsonl").read_text().splitlines()
    (before, *_) = (DATA / COMMITS[0] / "events.jsonl").read_text().splitlines()
    assert json.loads(before).items() <= json.loads(line).items()


@pytest.mark.parametrize("commit", COMMITS)
def test_a_job_that_was_recorded_by_a_commit_goes_on_in_its_folder(tmp_path: Path, commit: str) -> None:
    shutil.copytree(DATA / commit, tmp_path / "run")
    with TraceWriter(tmp_path / "run", layers=LAYERS) as writer:
        writer.add(torch.full((2, 2, 4), 9), Placement.contiguous(2, 4, 2), [4, 5])
    result = Trace.read(tmp_path / "run")
    assert result.iteration.tolist() == [1, 1, 2, 2, 3, 3, 4, 5]
    assert result.load[-2:].unique().tolist() == [9]
