"""Planners on traces: how long a job would have waited for the busiest GPU, and for its experts to move.

    python -m benchmarks.study.bench_replay --loads DIR --output benchmarks/results/DATE-replay.md
    python -m benchmarks.study.bench_replay --traces FILE FOLDER --every 100 --no-made

Every step is judged under a plan that had not seen it. The traces come from benchmarks/traces, from the generators in
troubles.py, and from steps drawn from the recorded sequences of --loads; each is used unchanged, and with every expert
rescaled to the same mean over the trace.
Shapes: S steps, L layers.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path
from typing import Any

import torch

from benchmarks.figures import replay as figure
from benchmarks.shared import traces
from benchmarks.shared.tables import command_line, header, progress, publish
from benchmarks.study.replay import report
from benchmarks.study.replay.measure import Result, replayed
from distplb.packing.engines import engine_named


def main() -> None:
    """Replay, print, and write the report, figure and steps if requested."""
    options = parsed_options()
    engine = engine_named(options.engine)[0]
    cases = traces.all_cases(options)
    balanced = [case.rescaled() for case in cases]
    following = [case.rescaled(options.every) for case in cases]
    results = [replayed(case, options, engine) for case in (*cases, *balanced)]
    parts = report.report_parts(results, [replayed(case, options, engine) for case in following], options)
    progress("")
    top = header("Planners on traces", report.TEXT, command(options), engine)
    publish("\n\n".join([top, report.assumptions(options), *parts]), options.output)
    if options.output:
        draw(results, options.output.with_suffix(".png"))
    if options.csv:
        with options.csv.open("w", newline="") as file:
            write_steps(results, csv.writer(file))


def parsed_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Planners on traces.")
    traces.add_options(parser)
    parser.add_argument(
        "--every", type=int, default=32, metavar="N", help="steps between rebalances; plans use all of them"
    )
    parser.add_argument("--candidates", type=int, default=4, metavar="K")
    parser.add_argument(
        "--dearer", type=float, nargs="*", default=[0.5, 2.0], help="also at these multiples of the price"
    )
    parser.add_argument("--engine", help="distplb's engine; by default the fastest that is available")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="write the result to this file as markdown, and a figure next to it"
    )
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write every step's numbers to this file")
    return parser.parse_args()


def command(options: argparse.Namespace) -> str:
    """The command line without local paths."""
    own = {f"--{name}": getattr(options, name) for name in ("every", "candidates", "dearer", "engine")}
    return command_line("study.bench_replay", traces.shown_options(options) | own)


def draw(results: list[Result], path: Path) -> None:
    """Draw the figure, with each trace next to its rescaled copy."""
    panels = []
    for result in results:
        runs = {name: (run, result.seconds(name)) for name, run in result.replays.items()}
        title = f"{result.case.name}, rescaled" if result.case.balanced else result.case.name
        panels.append((title, runs, result.even))
    half = len(panels) // 2
    pairs = zip(panels[:half], panels[half:], strict=True)
    figure.draw([panel for pair in pairs for panel in pair], path)


def write_steps(results: list[Result], writer: Any) -> None:
    """Write a line for each trace, planner and step: mean imbalance of layers, slots moved before, modelled seconds."""
    writer.writerow(["trace", "planner", "step", "imbalance", "moved", "seconds"])
    for result in results:
        for name, run in result.replays.items():
            moved = torch.zeros(result.case.trace.num_steps, dtype=torch.int64)
            moved[list(run.rebalance_steps)] = run.moved.sum(1)
            columns = run.imbalance.mean(1).tolist(), moved.tolist(), result.seconds(name).tolist()
            for step, values in enumerate(zip(*columns, strict=True)):
                writer.writerow([result.case.title, name, step, *values])


if __name__ == "__main__":
    main()
