"""The command line: what `plan` and `compare` print, and that wrong input is one clear line and the right exit code.

Shapes: T steps, L layers, E experts, P slots.
"""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from rich.console import Console
from torch import Tensor

import distplb
from distplb import Placement, Topology, Trace
from distplb.cli.main import main
from distplb.cli.output import plain, progress, table
from distplb.core.price import moved_slots
from distplb.planning.greedy import contiguous, greedy_numpy

GPUS = ["--gpus-per-node", "2", "--engine", "reference"]
TOPOLOGY = Topology(num_nodes=1, gpus_per_node=2)


def drawn(steps: int = 6, layers: int = 3, experts: int = 8) -> Tensor:
    """`[T, L, E]`, skewed."""
    random = np.random.default_rng(0)
    return torch.from_numpy(random.lognormal(4, 1, (steps, layers, experts)).astype(np.int64) + 1)


def saved(path: Path, load: Tensor | None = None) -> Path:
    np.save(path, (drawn() if load is None else load).numpy())
    return path


def traced(path: Path) -> Path:
    load = drawn()
    steps, layers, experts = load.shape
    placement = Placement.contiguous(layers, experts, 2)
    Trace(load, (placement,), torch.zeros(steps).long(), torch.arange(steps), ("a", "b", "c")).save(path)
    return path


def run(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def printed(*words: object) -> str:
    result = run(*words)
    assert result.exit_code == 0, result.output
    assert all(line.startswith("Hint: ") for line in result.stderr.splitlines())
    assert "\x1b" not in result.stdout
    return result.stdout


def document(*words: object) -> dict[str, Any]:
    found = json.loads(printed(*words, "--json"))
    assert isinstance(found, dict)
    return found


def assert_refused(result: Result, words: str) -> None:
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1
    assert re.search(words, result.stderr), result.stderr
    assert "Traceback" not in result.stderr
    assert isinstance(result.exception, SystemExit)


# --- wrong input ------------------------------------------------------------------------------------------------


def cut(path: Path, write: Callable[[Path], object]) -> None:
    write(path)
    path.write_bytes(path.read_bytes()[:-40])


def pickled(path: Path) -> None:
    np.save(path, np.array([[{}]], dtype=object), allow_pickle=True)


# A file that is no load: how it is made, and what is said.
FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing.npz": (lambda path: None, "there is no file missing.npz; pass"),
    "empty.npz": (Path.touch, "empty.npz is empty; pass"),
    "folder": (Path.mkdir, "folder is a folder without .npz files; pass"),
    "cut.npz": (lambda path: cut(path, traced), "cut.npz cannot be read .*write it anew"),
    "pickle.npy": (pickled, "pickle.npy holds Python objects as a pickle, which is refused, because"),
    "dims.npy": (lambda path: np.save(path, [1, 2]), r"dims.npy has dtype int64 and shape \(2,\); pass counts, \["),
    "nothing.npy": (lambda path: np.save(path, [[]]), r"nothing.npy has .*shape \(1, 0\); pass .*none empty"),
    "half.npy": (lambda path: np.save(path, [[0.5, 1]]), r"half.npy has 0.5 at \[0, 0\] .*must be whole: pass tokens"),
    "words.csv": (lambda path: path.write_text("1,2\n3,x\n"), "words.csv, line 2, column 2: 'x' is not a count"),
    "cut.json": (lambda path: path.write_text("[[1,"), "cut.json is not JSON that can be read"),
    "load.pt": (
        lambda path: path.write_text("x"),
        "load.pt is no archive of torch.save, .*: pass torch.save of tensors",
    ),
    "huge.npy": (lambda path: np.save(path, [[2**62, 2**62]]), "2\\^48 on each rank is the most"),
    "two\nlines.npy": (lambda path: None, "there is no file two lines.npy"),
    "\x1b[31mred.npy": (lambda path: None, r"there is no file \?\[31mred.npy"),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("command", ["plan", "compare"])
def test_a_file_that_is_no_load(command: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make, words = FILES[name]
    make(Path(name))
    assert_refused(run(command, name, *GPUS), words)


# Options that do not go with a load of 3 layers of 8 experts, and what is said.
OPTIONS: dict[str, str] = {
    "": r"Missing option '--gpus-per-node'\. Try 'distplb \w+ --help'",
    "--gpus-per-node 0": "'--gpus-per-node': 0 is not in the range x>=1",
    "--gpus-per-node two": "'--gpus-per-node': 'two' is not a valid integer",
    "--gpus-per-node 3": "8 slots cannot be spread evenly over 3 GPUs .*; pass --slots 9, 1 more than experts",
    "--gpus-per-node 16": "8 slots cannot be spread evenly over 16 GPUs",
    "--gpus-per-node 2 --nodes -1": "'--nodes': -1 is not in the range",
    "--gpus-per-node 2 --slots 6": "--slots is 6 for 8 experts; it .*: pass at least --slots 8, or --slots 14 for",
    "--gpus-per-node 2 --slots 9": "9 slots cannot be spread evenly over 2 GPUs",
    "--gpus-per-node 2 --groups 3": "--groups is 3, which does not divide 8 experts; pass",
    "--gpus-per-node 2 --nodes 2 --groups 1": "--groups is 1, which 2 nodes cannot share evenly; pass",
    "--gpus-per-node 2 --mode permute --slots 10": "--mode 'permute' knows no replicas; pass --mode remap, or --",
    "--gpus-per-node 2 --mode swap": "'swap' is not one of 'remap', 'permute'",
    "--gpus-per-node 2 --candidates 0": "'--candidates': 0 is not in the range",
    "--gpus-per-node 2 --candidates 9999999": r"--candidates is 9999999; pass 1 to 2\^22",
    "--gpus-per-node 2 --seed 9223372036854775808": r"--seed is 9223372036854775808; pass a whole number",
    "--gpus-per-node 2 --engine warp": "--engine 'warp' is not there; pass one of reference, cpu, cuda, or no --engine",
    "--gpus-per-node 2 --move-price cheap": "'cheap' is no price; pass tokens, at least 0: one number, or INSIDE,BETW",
    "--gpus-per-node 2 --move-price 1,2,3": "'1,2,3' is no price",
    "--gpus-per-node 2 --move-price nan": "'nan' is no price",
    "--gpus-per-node 2 --current missing.json": "there is no file missing.json; pass one written by",
    "--gpus-per-node 2 --current empty.json": "empty.json is empty; pass one written by",
    "--gpus-per-node 2 --current deep.json": "deep.json is not a placement file .*recursion.*; pass one written by",
    "--gpus-per-node 2 --current large.json": "large.json is not a placement file .*; pass one written by",
    "--gpus-per-node 2 --current nested.json": "nested.json is not a placement file .*; pass one written by Placement",
    "--gpus-per-node 2 --current other.json": "other.json is of 4 GPUs, and 2 are asked for; pass the placement",
    "--gpus-per-node 2 --current few.json": "few.json has no layer '2'; it has 0, 1",
    "--gpus-per-node 2 --twice": r"No such option.* '?--twice'?.*Try 'distplb \w+ --help'",
    "--gpus-per-node 2 more.npy": r"unexpected extra argument \(more.npy\)",
}


def write_placements(folder: Path) -> None:
    head = {"format": "distplb.placement", "version": 1, "num_experts": 8, "num_gpus": 2}
    (folder / "empty.json").touch()
    (folder / "deep.json").write_text("[" * 100_000)
    (folder / "large.json").write_text(json.dumps(head | {"expert_of_slot": {"0": [2**70]}}))
    (folder / "nested.json").write_text(json.dumps(head | {"expert_of_slot": {"0": {}}}))
    Placement.contiguous(3, 8, 4).save(folder / "other.json")
    Placement.contiguous(2, 8, 2).save(folder / "few.json")


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("command", ["plan", "compare"])
def test_options_that_do_not_go_together(
    command: str, options: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    saved(Path("load.npy"))
    write_placements(Path())
    assert_refused(run(command, "load.npy", *options.split()), OPTIONS[options])


OTHERS = [
    ("plan", "Missing argument 'LOADS'"),
    ("plam", r"No such command 'plam'\..*Try 'distplb --help'"),
    ("doctor now", r"unexpected extra argument \(now\)"),
    ("doctor --deadline 0", "'--deadline': 0.0 is not in the range"),
    ("--loud plan", r"No such option.* '?--loud'?.*Try 'distplb --help'"),
    ("plan load.npy --gpus-per-node 2 --output no/folder/placement.json", "there is no folder no/folder; make it, or"),
    (
        "compare load.npy --gpus-per-node 2 --unseen other.npy",
        "other.npy has 3 layers of 6 experts, load.npy has 3 of 8",
    ),
    ("compare load.npy --gpus-per-node 2 --unseen missing.csv", "there is no file missing.csv"),
]


@pytest.mark.parametrize(("words", "said"), OTHERS)
def test_other_wrong_commands(words: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    saved(Path("load.npy"))
    saved(Path("other.npy"), drawn(experts=6))
    assert_refused(run(*words.split()), said)


# Commands on traces and runs, and what is said.
TRACES = [
    ("replay missing.npz", "Path 'missing.npz' does not exist"),
    ("replay empty.npz", "empty.npz is empty; pass"),
    ("replay folder", "folder is a folder without .npz files; pass"),
    ("replay cut.npz", "cut.npz cannot be read .*; it is damaged or cut off"),
    ("replay pickle.npz", "pickle.npz has array 'load' of object"),
    ("replay rank0.jsonl", "rank0.jsonl.*line 1"),
    ("replay trace.npz --gpus-per-node 3", "3 GPUs"),
    ("replay trace.npz --every 0", "'--every': 0 is not in the range"),
    ("replay", "Missing argument 'TRACE...'"),
    ("report missing.npz", "there is no missing.npz; pass the folder of Rebalancer"),
    ("report empty.npz", "empty.npz is empty; pass"),
    ("report folder", "folder has neither events nor a trace; pass the folder of Rebalancer"),
    ("report cut.npz", "cut.npz cannot be read .*; it is damaged or cut off"),
    ("report pickle.npz", "pickle.npz has array 'load' of object"),
    ("report notes.txt", "notes.txt"),
    ("report trace.npz --gpus-per-node 3 --every 2", "3 GPUs"),
    ("report trace.npz --nodes 2", "--nodes 2 without --gpus-per-node; pass both"),
    ("report", "Missing argument 'RUN'"),
]


@pytest.mark.parametrize(("words", "said"), TRACES)
def test_commands_on_traces_and_runs(words: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    traced(Path("trace.npz"))
    cut(Path("cut.npz"), traced)
    with np.load("trace.npz") as arrays:
        np.savez(Path("pickle.npz"), **{**arrays, "load": np.array([[[{}]]], dtype=object)})
    Path("empty.npz").touch()
    Path("folder").mkdir()
    Path("rank0.jsonl").write_bytes(b'{"caf\xe9": 1}\n')
    Path("notes.txt").write_text("nothing of the kind")
    assert_refused(run(*words.split()), said)


def test_replay_of_counts_is_that_of_the_same_trace(tmp_path: Path) -> None:
    """Counts were no trace, and a trace could only be made by a job."""
    load = drawn()
    rows = [
        f"{step},{layer},{','.join(map(str, row))}"
        for step, one in enumerate(load.tolist())
        for layer, row in zip("abc", one, strict=True)
    ]
    (tmp_path / "load.csv").write_text("\n".join(["step,layer,0,1,2,3,4,5,6,7", *rows]))
    given = [traced(tmp_path / "trace.npz"), saved(tmp_path / "load.npy"), tmp_path / "load.csv"]
    found = [document("replay", path, *GPUS, "--every", 2) for path in given]
    assert found[0] == found[1] == found[2]
    assert_refused(run("replay", given[1]), "load.npy has counts, and no placement; pass --gpus-per-node")
    assert_refused(run("replay", given[1], "--gpus-per-node", 3), "load.npy has 8 experts, which do not go evenly on 3")


# --- plan -------------------------------------------------------------------------------------------------------


def test_plan_tells_what_imbalance_bound_and_moves_are(tmp_path: Path) -> None:
    load, placement = drawn(), tmp_path / "placement.json"
    found = document("plan", traced(tmp_path / "trace.npz"), *GPUS, "--output", placement)
    planned, start = Placement.load(placement, ["a", "b", "c"]), Placement.contiguous(3, 8, 2)
    assert planned == distplb.plan(load, TOPOLOGY, current=start)
    rows = found["layers"]
    assert [row["layer"] for row in rows] == ["a", "b", "c"]
    assert [row["before"] for row in rows] == pytest.approx(distplb.imbalance(load, start).mean(0).tolist())
    assert [row["after"] for row in rows] == pytest.approx(distplb.imbalance(load, planned).mean(0).tolist())
    assert [row["bound"] for row in rows] == pytest.approx(distplb.lower_bound(load, TOPOLOGY, 8).tolist())
    assert [row["moved_inside"] for row in rows] == moved_slots(start, planned, TOPOLOGY)[:, 0].tolist()
    assert found["all_layers"]["after"] == pytest.approx(sum(row["after"] for row in rows) / 3)
    assert found["output"] == str(placement)


def test_plan_as_a_table(tmp_path: Path) -> None:
    load, placement = saved(tmp_path / "load.npy"), tmp_path / "placement.json"
    found = document("plan", load, *GPUS)
    lines = printed("plan", load, *GPUS, "--output", placement).splitlines()
    assert lines[1].split() == ["layer", "before", "after", "bound", "moved"]
    for line, row in zip(lines[3:6], found["layers"], strict=True):
        numbers = [f"{row[name]:.4f}" for name in ("before", "after", "bound")]
        assert line.split() == [row["layer"], *numbers, str(row["moved_inside"])]
    total = found["all_layers"]
    assert lines[7].split() == ["all", "3", *(f"{total[name]:.4f}" for name in ("before", "after", "bound")), "12"]
    assert lines[8].startswith("Fullest GPU / mean GPU, mean over 6 steps, of the load that was planned on. ")
    assert lines[8].endswith("distplb compare --unseen.")
    assert lines[9:] == [f"Written to {placement}."]


def test_plan_starts_from_the_placement_in_force(tmp_path: Path) -> None:
    load, placement = saved(tmp_path / "load.npy"), tmp_path / "placement.json"
    first = document("plan", load, *GPUS, "--output", placement)
    second = document("plan", load, *GPUS, "--current", placement)
    assert first["all_layers"]["moved_inside"] > 0
    assert second["all_layers"]["before"] == first["all_layers"]["after"]
    priced = document("plan", load, *GPUS, "--move-price", "1e9,1e9")
    assert priced["all_layers"]["moved_inside"] == 0


def test_plan_with_replicas_on_two_nodes_counts_moves_by_link(tmp_path: Path) -> None:
    two = Topology(num_nodes=2, gpus_per_node=2)
    found = document(
        "plan", saved(tmp_path / "load.npy"), "--nodes", 2, *GPUS, "--slots", 12, "--output", tmp_path / "p.json"
    )
    load, planned = drawn(), Placement.load(tmp_path / "p.json")
    start = Placement(contiguous(load[0], two, 12), 8, 4)
    rows = found["layers"]
    assert planned.num_slots == found["slots"] == 12
    assert [row["before"] for row in rows] == pytest.approx(distplb.imbalance(load, start).mean(0).tolist())
    moved = [[row["moved_inside"], row["moved_between"]] for row in rows]
    assert moved == moved_slots(start, planned, two).tolist()


def test_plan_shows_the_most_uneven_of_many_layers(tmp_path: Path) -> None:
    load = saved(tmp_path / "load.npy", drawn(steps=1, layers=30))
    rows = document("plan", load, *GPUS)["layers"]
    assert len(rows) == 30
    uneven = sorted(rows, key=lambda row: -row["before"])
    lines = printed("plan", load, *GPUS).splitlines()
    assert [line.split()[0] for line in lines[3:27]] == [row["layer"] for row in uneven[:24]]
    rest = sum(row["before"] for row in uneven[24:]) / 6
    assert lines[28].split()[:4] == ["6", "more", "(--all)", f"{rest:.4f}"]
    assert [line.split()[0] for line in printed("plan", load, *GPUS, "--all").splitlines()[3:33]] == [
        str(layer) for layer in range(30)
    ]


@pytest.mark.parametrize(
    ("load", "words"),
    [
        ([[0, 0, 0, 0]], "The load has no tokens at all"),
        ([[1, 1, 1, 1]], "meets the bound already: there is nothing to gain"),
        ([[2, 2, 1, 1]], "of the load that was planned on. The plan meets the bound."),
        ([[5, 4, 4, 3, 3, 3, 1, 1]], "GPU of the load that was planned on."),
    ],
)
def test_plan_says_what_there_is_to_gain(load: list[list[int]], words: str, tmp_path: Path) -> None:
    assert words in printed("plan", saved(tmp_path / "load.npy", torch.tensor(load)), *GPUS)


# --- compare ----------------------------------------------------------------------------------------------------


def test_compare_judges_on_the_half_that_no_planner_saw(tmp_path: Path) -> None:
    load = drawn()
    found = document("compare", saved(tmp_path / "load.npy"), *GPUS)
    by_name = {row["planner"]: row for row in found["planners"]}
    assert list(by_name) == [
        *("contiguous", "greedy (EPLB)", "balanced_packing", "plan on the sum", "plan on the steps"),
        *("plan, 16 candidates", "bound"),
    ]
    start = Placement.contiguous(3, 8, 2)
    expected = {
        "contiguous": start,
        "greedy (EPLB)": Placement(greedy_numpy(load[:3].sum(0), TOPOLOGY, 8), 8, 2),
        "plan on the sum": distplb.plan(load[:3].sum(0), TOPOLOGY, current=start),
        "plan on the steps": distplb.plan(load[:3], TOPOLOGY, current=start),
        "plan, 16 candidates": distplb.plan(load[:3], TOPOLOGY, current=start, num_candidates=16),
    }
    for name, placement in expected.items():
        for part, steps in (("in_sample", load[:3]), ("unseen", load[3:])):
            layers = distplb.imbalance(steps, placement).mean(0)
            assert by_name[name][part] == pytest.approx({"mean": float(layers.mean()), "worst": float(layers.max())})
        assert by_name[name]["moved"] == int(moved_slots(start, placement, TOPOLOGY).sum())
    bound = distplb.lower_bound(load[3:], TOPOLOGY, 8)
    assert by_name["bound"]["unseen"] == pytest.approx({"mean": float(bound.mean()), "worst": float(bound.max())})
    assert all(row["seconds"] >= 0 for name, row in by_name.items() if name != "bound")


def test_compare_on_a_second_file(tmp_path: Path) -> None:
    load, other = saved(tmp_path / "load.npy"), saved(tmp_path / "other.npy", drawn(steps=2).flip(2))
    found = document("compare", load, "--unseen", other, *GPUS)
    assert (found["steps_planned_on"], found["steps_unseen"]) == (6, 2)
    seen = distplb.imbalance(drawn(steps=2).flip(2), Placement.contiguous(3, 8, 2)).mean(0)
    assert found["planners"][0]["unseen"]["mean"] == pytest.approx(float(seen.mean()))
    assert f"planned on 6 steps of {load}, unseen are 2 steps of {other}" in " ".join(
        printed("compare", load, "--unseen", other, *GPUS).split()
    )


def test_compare_on_one_step_says_that_it_is_judged_on_itself(tmp_path: Path) -> None:
    load = saved(tmp_path / "load.npy", drawn(steps=1)[0])
    found = document("compare", load, *GPUS)
    assert [row["planner"] for row in found["planners"]][-3:] == ["plan", "plan, 16 candidates", "bound"]
    assert all(row["unseen"] is None for row in found["planners"])
    shown = " ".join(printed("compare", load, *GPUS).split())
    assert "judged on the one step that was planned on, so not what it is worth on others." in shown
    assert "unseen" not in shown


def test_compare_of_a_buffer_that_is_filled_in_part_is_that_of_what_was_filled(tmp_path: Path) -> None:
    """Empty rows were even steps: every planner, and the bound, had nearly 1."""
    filled = drawn(steps=6)
    filled[:, 1] = 0
    buffer = torch.cat([torch.zeros(20, 3, 8, dtype=torch.int64), filled[:4], torch.zeros_like(filled), filled[4:]])
    given, whole = saved(tmp_path / "given.npy", filled), saved(tmp_path / "whole.npy", buffer)
    found, wanted = (document("compare", path, *GPUS) for path in (whole, given))
    for one in (found, wanted):
        for row in one["planners"]:
            del row["seconds"]
    assert found["planners"] == wanted["planners"]
    assert found["judged"] == "planned on the first 3 steps, unseen are the 3 steps after them"
    assert (found["steps_planned_on"], found["steps_unseen"], found["steps_without_tokens"]) == (3, 3, 26)
    assert found["layers_without_tokens"] == wanted["layers_without_tokens"] == ["1"]
    left_out = (
        "26 of 32 steps had no tokens and are left out. 1 of 3 layers had no tokens: 1; means are of the other 2."
    )
    assert left_out in printed("compare", whole, *GPUS)
    shown = printed("compare", given, "--unseen", whole, *GPUS)
    assert f"26 of 32 steps of {whole} had no tokens and are left out." in shown
    assert f"1 of 3 layers of {given} had no tokens: 1;" in shown
    other = document("compare", given, "--unseen", whole, *GPUS)
    assert (other["steps_unseen"], other["unseen_without_tokens"]["steps_without_tokens"]) == (6, 26)


def test_steps_without_tokens_in_some_layer_are_left_out_there(tmp_path: Path) -> None:
    load = drawn(steps=4)
    load[1, 0], load[2:, 1] = 0, 0
    path = saved(tmp_path / "load.npy", load)
    found = document("plan", path, *GPUS)
    means = [
        distplb.imbalance(load[load[:, at].any(1)], Placement.contiguous(3, 8, 2))[:, at].mean() for at in range(3)
    ]
    assert [row["before"] for row in found["layers"]] == pytest.approx([float(mean) for mean in means])
    assert found["all_layers"]["before"] == pytest.approx(float(sum(means)) / 3)
    assert (found["steps"], found["steps_without_tokens"], found["pairs_without_tokens"]) == (4, 0, 3)
    assert "A step had no tokens in a layer 3 times, and is left out there." in printed("plan", path, *GPUS)
    padded = saved(tmp_path / "padded.npy", torch.cat([load[:2], load[:1] * 0]))
    told = (
        "1 of 3 steps had no tokens and is left out. Another step had no tokens in a layer once, and is left out there."
    )
    assert told in printed("plan", padded, *GPUS)


def test_plan_tells_nothing_of_what_has_no_tokens(tmp_path: Path) -> None:
    load = drawn(steps=2)
    load[:, 0] = 0
    path = saved(tmp_path / "load.npy", torch.cat([load, load * 0]))
    found = document("plan", path, *GPUS)
    assert (found["steps"], found["steps_without_tokens"], found["layers_without_tokens"]) == (2, 2, ["0"])
    assert [found["layers"][0][name] for name in ("before", "after", "bound", "moved_inside")] == [None, None, None, 0]
    mean = distplb.imbalance(load[:, 1:], Placement.contiguous(2, 8, 2)).mean()
    assert found["all_layers"]["before"] == pytest.approx(float(mean))
    assert re.search(r"^ ?0 +– +– +– +0", printed("plan", path, *GPUS), re.MULTILINE)
    nothing = document("plan", saved(tmp_path / "nothing.npy", load * 0), *GPUS)
    assert (nothing["steps"], nothing["all_layers"]["before"]) == (0, None)
    assert "nan" not in json.dumps(nothing)


def planners(*words: object) -> list[str]:
    return [row["planner"] for row in document("compare", *words, *GPUS)["planners"]]


def test_compare_has_the_planners_that_go_with_the_options(tmp_path: Path) -> None:
    load = saved(tmp_path / "load.npy", drawn(steps=2))
    document("plan", load, *GPUS, "--output", tmp_path / "p.json")
    assert planners(load, "--current", tmp_path / "p.json")[:3] == ["current", "contiguous", "greedy (EPLB)"]
    assert "balanced_packing" not in planners(load, "--slots", 10)
    assert planners(load, "--groups", 4)[:2] == ["contiguous", "greedy (EPLB)"]
    assert planners(load, "--groups", 4, "--mode", "permute")[:2] == ["contiguous", "plan"]
    assert "plan, 16 candidates" not in planners(load, "--candidates", 16)


# --- the frame --------------------------------------------------------------------------------------------------


def test_help_and_version() -> None:
    assert printed("--version") == f"distplb, version {distplb.__version__}\n"
    assert printed("-h") == printed("--help")
    for name in main.commands:
        assert re.search(rf"\n  Examples?:\n(    .*\n)*    distplb {name}\b", printed(name, "--help")), name


def test_an_interrupt_is_one_line_and_130(monkeypatch: pytest.MonkeyPatch) -> None:
    @click.command()
    def stop() -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setitem(main.commands, "stop", stop)
    result = run("stop")
    assert (result.exit_code, result.stdout, result.stderr) == (130, "", "Interrupted.\n")


def test_a_warning_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    @click.command()
    def careful() -> None:
        warnings.warn("line 3\nis not whole", RuntimeWarning, stacklevel=1)
        click.echo("done")

    monkeypatch.setitem(main.commands, "careful", careful)
    result = run("careful")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "done\n", "Warning: line 3 is not whole\n")


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_a_closed_pipe_is_quiet(options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    load, errors = saved(tmp_path / "load.npy"), io.StringIO()
    monkeypatch.setattr(sys, "stderr", errors)
    with os.fdopen(writer, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        with pytest.raises(SystemExit) as ended:
            main.main(["plan", str(load), *GPUS, *options])
    assert ended.value.code == 141
    assert errors.getvalue() == ""


def test_what_an_encoding_lacks_is_a_question_mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "load.json").write_text('{"schräg": [1, 2, 3, 4], "\\u001b[31m[red]": [1, 2, 3, 4]}')
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    with pytest.raises(SystemExit) as ended:
        main.main(["plan", str(tmp_path / "load.json"), *GPUS])
    assert ended.value.code == 0
    out.flush()
    lines = out.buffer.getvalue().decode("ascii").splitlines()
    assert [line.split()[0] for line in lines[3:5]] == ["schr?g", "?[31m[red]"]


def test_a_table_fits_forty_columns() -> None:
    found = table("planner", "in sample", "unseen", "worst layer", title="Imbalance, fullest GPU / mean GPU; unseen")
    found.add_row(plain("model.layers.11.mlp.experts"), "12.3456", "12.3456", "12.3456")
    out = io.StringIO()
    Console(file=out, width=40).print(found)
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= 40
    assert out.getvalue().count("12.3456") == 3
    assert "…" not in out.getvalue()
    assert "".join(line.split()[0] for line in lines[5:]).startswith("model.layers.11.mlp")


def test_in_a_pipe_there_is_no_bar(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("planning") as told:
        told(1, 2)
    assert capsys.readouterr() == ("", "")


def all_of(terminal: int, process: subprocess.Popen[bytes], seconds: float = 120) -> str:
    """What a process shows on its terminal, which holds little of it at a time, until it ends."""
    shown, until = b"", time.monotonic() + seconds
    try:
        while select.select([terminal], [], [], max(0.0, until - time.monotonic()))[0]:
            shown += os.read(terminal, 1 << 16)
    except OSError:  # how Linux tells that nobody writes any more
        process.wait(30)
    finally:
        process.kill()
        os.close(terminal)
    return shown.decode()


def test_as_a_process_with_a_terminal_for_errors_and_a_pipe_for_results(tmp_path: Path) -> None:
    load, placement = traced(tmp_path / "trace.npz"), tmp_path / "placement.json"
    terminal, end = pty.openpty()
    command = [sys.executable, "-m", "distplb", "plan", load, *GPUS, "--output", placement, "--json"]
    environment = os.environ | {"TERM": "xterm", "OMP_NUM_THREADS": "1"}
    with (tmp_path / "result.json").open("w") as result:
        process = subprocess.Popen(command, stdout=result, stderr=end, env=environment)
    os.close(end)
    shown = all_of(terminal, process)
    assert process.returncode == 0, shown
    assert json.loads((tmp_path / "result.json").read_text())["output"] == str(placement)
    assert "planning" in shown
    assert "━" in shown
    assert shown.endswith("\x1b[2K")  # the bar is gone in the end
    assert Placement.load(placement, ["a", "b", "c"]).num_gpus == 2
