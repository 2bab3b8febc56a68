"""Wrong input is one clear line, with the right exit code."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from commands import GPUS, assert_refused, drawn, run, saved, traced

from distplb import Placement


def cut(path: Path, write: Callable[[Path], object]) -> None:
    write(path)
    path.write_bytes(path.read_bytes()[:-40])


def pickled(path: Path) -> None:
    np.save(path, np.array([[{}]], dtype=object), allow_pickle=True)


# Files that are not loads: how each is written, and the message.
FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing.npz": (lambda path: None, "there is no file missing.npz; pass"),
    "empty.npz": (Path.touch, "empty.npz is empty; pass"),
    "folder": (Path.mkdir, "folder is a folder without .npz files; pass"),
    "cut.npz": (lambda path: cut(path, traced), "cut.npz cannot be read .*write it again"),
    "pickle.npy": (pickled, "pickle.npy holds Python objects as a pickle, which is refused because"),
    "dims.npy": (lambda path: np.save(path, [1, 2]), r"dims.npy has dtype int64 and shape \(2,\); pass counts as \["),
    "nothing.npy": (lambda path: np.save(path, [[]]), r"nothing.npy has .*shape \(1, 0\); pass .*with no empty dim"),
    "half.npy": (
        lambda path: np.save(path, [[0.5, 1]]),
        r"half.npy has 0.5 at \[0, 0\] .*must be integers: pass tokens",
    ),
    "words.csv": (lambda path: path.write_text("1,2\n3,x\n"), "words.csv, line 2, column 2: 'x' is not a count"),
    "cut.json": (lambda path: path.write_text("[[1,"), "cut.json cannot be read as JSON"),
    "load.pt": (
        lambda path: path.write_text("x"),
        "load.pt is not an archive of torch.save .*; pass a torch.save file of tensors",
    ),
    "huge.npy": (lambda path: np.save(path, [[2**62, 2**62]]), "pass fewer than 2\\^48 tokens per layer"),
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


# Options that do not fit a load of 3 layers of 8 experts, and the message.
OPTIONS: dict[str, str] = {
    "": r"Missing option '--gpus-per-node'\. Try 'distplb \w+ --help'",
    "--gpus-per-node 0": "'--gpus-per-node': 0 is not in the range x>=1",
    "--gpus-per-node two": "'--gpus-per-node': 'two' is not a valid integer",
    "--gpus-per-node 3": "8 slots cannot be spread evenly over 3 GPUs .*; pass --slots 9 \\(1 for replicas\\)",
    "--gpus-per-node 16": "8 slots cannot be spread evenly over 16 GPUs",
    "--gpus-per-node 2 --nodes -1": "'--nodes': -1 is not in the range",
    "--gpus-per-node 2 --slots 6": "--slots is 6 for 8 experts; it .*: pass at least --slots 8, or --slots 14 \\(",
    "--gpus-per-node 2 --slots 9": "9 slots cannot be spread evenly over 2 GPUs",
    "--gpus-per-node 2 --groups 3": "--groups is 3, which does not divide 8 experts; pass",
    "--gpus-per-node 2 --nodes 2 --groups 1": "--groups is 1, which 2 nodes cannot share evenly; pass",
    "--gpus-per-node 2 --mode permute --slots 10": "--mode 'permute' does not support replicas; pass --mode remap, or",
    "--gpus-per-node 2 --mode swap": "'swap' is not one of 'remap', 'permute'",
    "--gpus-per-node 2 --candidates 0": "'--candidates': 0 is not in the range",
    "--gpus-per-node 2 --candidates 9999999": r"--candidates is 9999999; pass 1 to 2\^22",
    "--gpus-per-node 2 --seed 9223372036854775808": r"--seed is 9223372036854775808; pass an integer",
    "--gpus-per-node 2 --engine warp": "--engine 'warp' is unknown; pass one of reference, cpu, cuda, or no --engine",
    "--gpus-per-node 2 --move-price cheap": "'cheap' is not a price; pass tokens, at least 0: one number, or INSIDE",
    "--gpus-per-node 2 --move-price 1,2,3": "'1,2,3' is not a price",
    "--gpus-per-node 2 --move-price nan": "'nan' is not a price",
    "--gpus-per-node 2 --current missing.json": "there is no file missing.json; pass one written by",
    "--gpus-per-node 2 --current empty.json": "empty.json is empty; pass one written by",
    "--gpus-per-node 2 --current deep.json": "deep.json is not a placement file .*recursion.*; pass one written by",
    "--gpus-per-node 2 --current large.json": "large.json is not a placement file .*; pass one written by",
    "--gpus-per-node 2 --current nested.json": "nested.json is not a placement file .*; pass one written by Placement",
    "--gpus-per-node 2 --current other.json": "other.json has num_gpus=4 where 2 is expected; pass the placement",
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
    (
        "plan load.npy --gpus-per-node 2 --output no/folder/placement.json",
        "there is no folder no/folder; create it, or",
    ),
    (
        "compare load.npy --gpus-per-node 2 --unseen other.npy",
        "other.npy has 3 layers of 6 experts, load.npy has 3 of 8",
    ),
    ("compare load.npy --gpus-per-node 2 --unseen missing.csv", "there is no file missing.csv"),
]


@pytest.mark.parametrize(("words", "message"), OTHERS)
def test_other_wrong_commands(words: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    saved(Path("load.npy"))
    saved(Path("other.npy"), drawn(experts=6))
    assert_refused(run(*words.split()), message)


# Commands on traces and runs, and the message.
TRACES = [
    ("replay missing.npz", "Path 'missing.npz' does not exist"),
    ("replay empty.npz", "empty.npz is empty; pass"),
    ("replay folder", "folder is a folder without .npz files; pass"),
    ("replay cut.npz", "cut.npz cannot be read .*; it is damaged or cut off"),
    ("replay pickle.npz", "pickle.npz has array 'load' with dtype object"),
    ("replay rank0.jsonl", "rank0.jsonl.*line 1"),
    ("replay trace.npz --gpus-per-node 3", "3 GPUs"),
    ("replay trace.npz --every 0", "'--every': 0 is not in the range"),
    ("replay", "Missing argument 'TRACE...'"),
    ("report missing.npz", "there is no file or folder missing.npz; pass the folder of Reb"),
    ("report empty.npz", "empty.npz is empty; pass"),
    ("report folder", "folder has no events, no trace and no sampled steps; pass the folder of Rebalancer"),
    ("report cut.npz", "cut.npz cannot be read .*; it is damaged or cut off"),
    ("report pickle.npz", "pickle.npz has array 'load' with dtype object"),
    ("report notes.txt", "notes.txt"),
    ("report trace.npz --gpus-per-node 3 --every 2", "3 GPUs"),
    ("report trace.npz --nodes 2", "--nodes 2 without --gpus-per-node; pass both"),
    ("report", "Missing argument 'RUN'"),
]


@pytest.mark.parametrize(("words", "message"), TRACES)
def test_commands_on_traces_and_runs(words: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    traced(Path("trace.npz"))
    cut(Path("cut.npz"), traced)
    with np.load("trace.npz") as arrays:
        np.savez(Path("pickle.npz"), **{**arrays, "load": np.array([[[{}]]], dtype=object)})
    Path("empty.npz").touch()
    Path("folder").mkdir()
    Path("rank0.jsonl").write_bytes(b'{"caf\xe9": 1}\n')
    Path("notes.txt").write_text("nothing of the kind")
    assert_refused(run(*words.split()), message)
