"""Iteration times with rebalances spread over iterations, with rebalances in one iteration, and without rebalances.

    torchrun --standalone --nproc-per-node 2 -m benchmarks.train.bench_spread --output benchmarks/results/DATE-spread.md

Trains three models of examples/pretrain_moe.py in the same processes, in turns, so that other load on the machine
affects all of them alike. All other options are those of the example.
Shapes: I iterations.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from benchmarks.shared.processes import outside
from benchmarks.shared.tables import command_line, header, markdown, progress, publish, verdict

pretrain_moe = outside("examples", "pretrain_moe")

RUNS = ("static", "spread", "rebalanced")
DEFAULTS = ["--every", "10", "--turn", "5", "--iterations", "130", "--ffn", "1536"]
TARGET = 1.25  # times the 95th percentile of static
MIN_SECONDS = 1e-3  # spent in the rebalancer, for an iteration to count as touched
TEXT = (
    "Seconds of whole iterations, including rebalancing, mean over ranks. Runs take turns of a few iterations; the "
    "first window is left out. `÷ static` is the 95th percentile over that of the static run. `touched` counts the "
    "iterations in which the rebalancer took more than a millisecond, with their median and maximum. A spread "
    "rebalance searches in a background thread; here the thread has no core of its own, so it slows down the "
    "iterations meanwhile, which their times include. Other jobs on the machine affect the percentiles of all runs."
)


def main() -> None:
    """Train, print, and write the result to --output if given."""
    parser = argparse.ArgumentParser(description="Iteration times with spread rebalances.")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the result there, as markdown")
    options, rest = parser.parse_known_args()
    words = rest or DEFAULTS
    sys.argv[1:] = words
    args = pretrain_moe.parse_arguments()
    group, device = pretrain_moe.start(args.device)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    events: dict[str, list[Any]] = defaultdict(list)
    runs = []
    for balance in RUNS:
        # The example's rebalancers pass their events to this function.
        pretrain_moe.report = lambda event, balance=balance: record(events[balance], event)
        runs.append(pretrain_moe.Run(args, "plain", balance, group, device))
    train(args, runs, pretrain_moe.text_of_iterations(args))
    if pretrain_moe.rank() == 0:
        command = command_line("train.bench_spread", {}, ranks=2)
        report = "\n\n".join(
            [
                header("Iterations while experts are rebalanced", TEXT, f"{command} {' '.join(words)}", "cpu"),
                f"{pretrain_moe.SPREAD}.",
                table({run.balance: after_the_first_window(run) for run in runs}, events),
            ]
        )
        publish(report, options.output)
    if group is not None:
        dist.destroy_process_group()


def train(args: argparse.Namespace, runs: list[Any], text: list[Any]) -> None:
    """Train every run's first turn, then every run's second turn, and so on; the run that goes first rotates.

    Turns end between rebalances, not at them: otherwise a background search would fall into another run's time.
    """
    ends = [*range(args.turn // 2, args.iterations, args.turn), args.iterations]
    for turn, (first, last) in enumerate(pairwise([0, *ends])):
        for i in range(len(runs)):
            runs[(turn + i) % len(runs)].train_turn(text, first, last)
        if pretrain_moe.rank() == 0:
            progress(f"iteration {last} of {args.iterations}" if last < args.iterations else "")


def after_the_first_window(run: Any) -> Iterations:
    """All iterations except the warm-up, which ends with the first rebalance."""
    measured = pretrain_moe.Measured.joined(run.turns)
    rebalancing = measured.rebalance_seconds[run.args.every :].numpy()
    return Iterations(measured.seconds[run.args.every :].numpy() + rebalancing, rebalancing)


class Iterations(NamedTuple):
    """Seconds `[I]` of whole iterations, and the part spent in the rebalancer."""

    whole: np.ndarray
    rebalancing: np.ndarray


def record(events: list[Any], event: Any) -> None:
    """Keep an event when it first arrives; it arrives again, completed, one window later."""
    if event.imbalance_next is None:
        events.append(event)


def table(runs: dict[str, Iterations], events: dict[str, list[Any]]) -> str:
    """Table with one row per run."""
    head = ["run", "rebalances", "slots moved", "median s", "95th", "99th", "longest", "÷ static", "touched", "verdict"]
    static = percentiles(runs["static"])[1]
    lines = []
    for balance, measured in runs.items():
        median, high, higher, longest = percentiles(measured)
        touched = measured.whole[measured.rebalancing > MIN_SECONDS]
        about = f"{len(touched)}: {np.median(touched):.2f}, {touched.max():.2f}" if len(touched) else ""
        outcome = verdict(high <= TARGET * static) if balance == "spread" else ""
        lines.append(
            [
                balance,
                str(len(events[balance])),
                str(sum(event.slots_moved for event in events[balance])),
                *(f"{seconds:.3f}" for seconds in (median, high, higher, longest)),
                f"{high / static:.2f}",
                about,
                outcome,
            ]
        )
    return markdown(head, lines)


def percentiles(measured: Iterations) -> tuple[float, ...]:
    """Median, 95th and 99th percentile and maximum, in seconds."""
    return tuple(np.quantile(measured.whole, [0.5, 0.95, 0.99, 1]).tolist())


if __name__ == "__main__":
    main()
