"""Layer names that look like markup, and loads that produce hints."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from inputs.case import Case, command
from inputs.command_cases import TWO, Run, counts, file

__all__ = ["CASES"]


def hinted(load: np.ndarray) -> Run:
    """Run `distplb plan`, and show its hints."""

    def run(folder: Path) -> object:
        np.save(folder / "load.npy", load)
        words = ("plan", folder / "load.npy", *TWO, "--engine", "reference")
        return command(*words, show=lambda out: "a table")

    return run


def judged_on_ranks(folder: Path) -> object:
    """Run `distplb compare` with unseen steps that are counts of single ranks."""
    np.save(folder / "ranks.npy", of_single_ranks())
    words = ("compare", file(folder, 2, 2, 16), "--unseen", folder / "ranks.npy", *TWO, "--engine", "reference")
    return command(*words, show=lambda out: "a table")


def layer_named(name: str) -> Run:
    """Plan a layer with this name, and show the first column of its row."""

    def run(folder: Path) -> object:
        (folder / "load.json").write_text(json.dumps({name: [9, 1, 1, 1], "other": [1, 2, 3, 4]}))
        words = ("plan", folder / "load.json", *TWO, "--engine", "reference")
        return command(*words, show=lambda out: out.splitlines()[3].split()[0])

    return run


def of_single_ranks() -> np.ndarray:
    """Make a load `[4, 2, 16]` in which each step has the four experts of one of four ranks."""
    load, own = np.zeros((4, 2, 16), dtype=np.int64), counts(4, 2, 4) + 100
    for rank in range(4):
        load[rank, :, 4 * rank : 4 * rank + 4] = own[rank]
    return load


def padded(layers: int) -> np.ndarray:
    """Make counts with 20,000 extra tokens on expert 0."""
    load = counts(3, layers, 16)
    load[:, :, 0] += 20_000
    return load


CASES: list[Case] = [
    Case(
        "a layer named `[/red]`",
        "[/red]",
        layer_named("[/red]"),
    ),
    Case(
        "a layer named `:warning:`",
        ":warning:",
        layer_named(":warning:"),
    ),
    Case(
        "counts of four ranks, one per step, each of its own experts",
        "a table [Hint: no expert has tokens in more than one of 4 steps: if each step counts only one "
        "rank's experts, add the steps up]",
        hinted(of_single_ranks()),
    ),
    Case(
        "`compare --unseen ranks.npy`, with these counts",
        "a table [Hint: ranks.npy: no expert has tokens in more than one of 4 steps: if each step counts "
        "only one rank's experts, add the steps up]",
        judged_on_ranks,
    ),
    Case(
        "their sum",
        "a table [Hint: there is one step: the plan is judged on the step it was made from; record more steps]",
        hinted(of_single_ranks().sum(0, keepdims=True)),
    ),
    Case(
        "the same sum as an array without steps",
        "a table",
        hinted(of_single_ranks().sum(0)),
    ),
    Case(
        "20,000 tokens of padding on expert 0 in each of 4 layers",
        "a table [Hint: in every layer expert 0 has at least 58,402 tokens more than the next one, about "
        "equally many in all layers: if this is padding, leave it out of the counts]",
        hinted(padded(4)),
    ),
    Case(
        "the same counts in all 4 layers",
        "a table [Hint: all 4 layers have the same counts: was one layer recorded for all of them?]",
        hinted(np.repeat(counts(3, 1, 8), 4, axis=1)),
    ),
    Case(
        "the same number of tokens on every expert",
        "a table [Hint: the GPUs are already balanced: the busiest has 0.0 % more than the mean, so there "
        "is nothing to gain]",
        hinted(np.full((3, 2, 8), 100)),
    ),
    Case(
        "skewed counts",
        "a table",
        hinted(counts(3, 4, 16)),
    ),
]
