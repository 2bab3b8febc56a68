"""The measurements of bench_scaling: cells of a load, ranks and candidates, in one job per number of ranks."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import distplb
from benchmarks.planning.scaling.model import Turn
from benchmarks.planning.scaling.turns import CASES, quality
from benchmarks.shared.processes import on_hosts, on_this_host
from benchmarks.shared.tables import progress

__all__ = ["MIN_QUIET", "Cell", "measured", "more_candidates", "names_of"]

RANK = "benchmarks.planning.scaling.turns"  # module that every rank runs
SECONDS_OF_A_JOB = 900
MIN_QUIET = 5  # with this many quiet turns or more, only quiet turns count


@dataclass(frozen=True)
class Cell:
    """One load at one number of ranks and candidates.

    Args:
        collectives: kind and bytes of each collective.
        turns: the turns that count.
        quiet: number of turns that began on a quiet machine, and number of all turns.
    """

    case: str
    ranks: int
    candidates: int
    collectives: tuple[tuple[str, int], ...]
    imbalance: float
    bound: float
    digest: int
    turns: tuple[Turn, ...]
    quiet: tuple[int, int]

    @classmethod
    def of(cls, result: dict[str, Any]) -> Cell:
        """Build a cell from the result of rank 0 of turns.py."""
        own = {name: result[name] for name in ("case", "ranks", "candidates", "imbalance", "bound", "digest")}
        collectives = tuple((kind, size) for kind, size in result["collectives"])
        turns = tuple(map(Turn.of_marks, result["turns"]))
        quiet = tuple(turn for turn in turns if turn.quiet)
        counted = quiet if len(quiet) >= MIN_QUIET else turns
        return cls(**own, collectives=collectives, turns=counted, quiet=(len(quiet), len(turns)))

    def every(self, figure: Callable[[Turn], float]) -> list[float]:
        """Compute a figure of each turn."""
        return [figure(turn) for turn in self.turns]

    def median(self, figure: Callable[[Turn], float]) -> float:
        """Compute the median of a figure over the turns."""
        return float(np.median(self.every(figure)))


def measured(options: argparse.Namespace) -> list[Cell]:
    """Measure all cells, sorted by load, ranks and candidates."""
    results: list[dict[str, Any]] = []
    for ranks in options.ranks:
        progress(f"{ranks} rank{'s' * (ranks > 1)}")
        counts = {name: sorted({CASES[name].fixed, CASES[name].each * ranks}) for name in options.cases}
        cells = [[name, number, CASES[name].turns] for name, numbers in counts.items() for number in numbers]
        task = {"loads": str(options.loads.resolve()), "cells": cells, "patience": options.patience}
        results += run(options, ranks, task)
    progress("")
    names = list(CASES)
    cells = sorted(map(Cell.of, results), key=lambda cell: (names.index(cell.case), cell.ranks, cell.candidates))
    plans: dict[tuple[str, int], set[int]] = {}
    for cell in cells:
        plans.setdefault((cell.case, cell.candidates), set()).add(cell.digest)
    assert all(len(digests) == 1 for digests in plans.values()), "plans differ between numbers of ranks"
    return cells


def run(options: argparse.Namespace, ranks: int, task: dict[str, Any]) -> list[dict[str, Any]]:
    """Run one job of this many ranks, on this host or spread evenly over several, and return its results."""
    if not options.hosts:
        return on_this_host(ranks, RANK, task, seconds=SECONDS_OF_A_JOB)
    of_host = ranks // options.hosts
    return on_hosts(options.hosts, of_host, RANK, task, megabits=options.megabits, seconds=SECONDS_OF_A_JOB)


def more_candidates(folder: Path, names: Sequence[str]) -> dict[str, list[tuple[int, float, float]]]:
    """Plan each load with more and more candidates K; return K, imbalance and lower bound. Ranks change no plan."""
    samples = {}
    for name in names:
        case = CASES[name]
        load = case.load(folder)
        samples[name] = []
        for candidates in (1 << power for power in range(case.largest.bit_length())):
            progress(f"{name}: {candidates} candidates")
            placement = distplb.plan(load, case.topology, num_slots=case.slots, num_candidates=candidates)
            reached = quality(load, case, placement)
            samples[name].append((candidates, reached["imbalance"], reached["bound"]))
    progress("")
    return samples


def names_of(cells: Sequence[Cell]) -> list[str]:
    """List the names of the loads, each once."""
    return list(dict.fromkeys(cell.case for cell in cells))
