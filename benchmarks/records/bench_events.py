"""The cost of rebalance records for the training thread: the hand-over, and iterations while records are written.

    python -m benchmarks.records.bench_events --output benchmarks/results/DATE-events.md

A record of DeepSeek-V3's size (58 layers, 64 GPUs) goes to a file and to TensorBoard. The iterations are short and hold
the interpreter lock all the time, which is the worst case: another thread can run only by taking the lock from them.
Shapes: T steps, L layers, E experts, M GPUs.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils.tensorboard import SummaryWriter

from benchmarks.shared.tables import command_line, header, markdown, progress, publish
from distplb import EventLog, Placement, RebalanceEvent, Topology, plan
from distplb.migrate.transfer import MoveTotals
from distplb.planning.options import PlanOptions
from distplb.planning.plan import PlanResult
from distplb.train.rebalance_event import Account
from distplb.train.stop_loss import Pace

STEPS, LAYERS, EXPERTS, TOPOLOGY = 32, 58, 256, Topology(8, 8)
ITERATION_SECONDS, BETWEEN = 2e-3, 40  # seconds of an iteration; iterations from one record to the next
TEXT = (
    "Milliseconds of the training thread. `handing over` is the call of the log; `making the record` happens in the "
    "log's thread, or in the training thread if there is an `on_event` (three quarters of it are the lower bound). "
    "Turns of iterations with and without a log alternate in one run. `longest` is the longest iteration after a "
    "record, while the log makes and writes it; for turns without a log, the longest of the same iterations. Medians "
    "over the turns, with the range in brackets."
)


def main() -> None:
    """Measure, print, and write the report if requested."""
    options = parsed_options()
    account, work = accounted(), calibrated()
    making = [timed(lambda: account.event(MoveTotals(), "moved", "", {"search": 1.0})) for _ in range(options.repeats)]

    def make() -> RebalanceEvent:
        return account.event(MoveTotals(100, 10**9, 10**9, 4), "moved", "", {"count": 0.1, "search": 1.0, "move": 2.0})

    calls: list[float] = []
    longest: dict[str, list[float]] = {"without": [], "with": []}
    typical: dict[str, list[float]] = {"without": [], "with": []}
    with tempfile.TemporaryDirectory() as folder:
        writer = SummaryWriter(folder)
        log = EventLog(Path(folder) / "events.jsonl", writer)
        for turn in range(options.turns):
            progress(f"turn {turn + 1} of {options.turns}")
            for name in ("without", "with"):
                seconds = iterations(work, make, log if name == "with" else None, calls)
                longest[name].append(max(seconds))
                typical[name].append(statistics.median(seconds))
        log.close()
        writer.close()
    progress("")
    lines = [
        ["handing over a record", *figures(calls)],
        ["making the record", *figures(making)],
        *(
            [f"{what} iteration, {name} a log", *figures(seconds[name])]
            for what, seconds in (("median", typical), ("longest", longest))
            for name in ("without", "with")
        ),
    ]
    arguments = {"--turns": options.turns, "--repeats": options.repeats}
    title = "The cost of records for the training thread"
    top = header(title, TEXT, command_line("records.bench_events", arguments), "cpu")
    size = f"A record takes {len(make().to_json())} bytes as a line."
    publish("\n\n".join([top, markdown(["ms", "median", "range"], lines), size]), options.output)


def parsed_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="The cost of records for the training thread.")
    parser.add_argument("--turns", type=int, default=30, help="number of turns of iterations with a log, and without")
    parser.add_argument("--repeats", type=int, default=20, help="number of records that are made")
    parser.add_argument("--output", type=Path, help="also write the report to this file")
    return parser.parse_args()


def accounted() -> Account:
    """A rebalance of DeepSeek-V3's size, from which the record is made."""
    generator = torch.Generator().manual_seed(0)
    popular = torch.rand(LAYERS, EXPERTS, generator=generator) ** 3 * 1000 + 10
    load = torch.poisson(popular.expand(STEPS, -1, -1), generator=generator).long()
    old = Placement.contiguous(LAYERS, EXPERTS, TOPOLOGY.num_gpus)
    placement = plan(load.sum(0), TOPOLOGY, current=old)
    return Account(
        iteration=500,
        layers=tuple(f"model.layers.{layer}.mlp" for layer in range(LAYERS)),
        topology=TOPOLOGY,
        old=old,
        planned=PlanResult(placement, load, "cpu"),
        target=placement,
        left_alone=(False,) * LAYERS,
        options=PlanOptions(current=old, move_price=1.0),
        model=None,
        pace=Pace(1.0, 0.1, 100),
        steps_until_next=500.0,
        router_ties=(None,) * LAYERS,
        last_applied=500,
    )


def iterations(work: int, make: Callable[[], RebalanceEvent], log: EventLog | None, calls: list[float]) -> list[float]:
    """Seconds of each iteration; the first includes the hand-over of a record, whose seconds also go to `calls`."""
    seconds = []
    for number in range(BETWEEN):
        begin = time.perf_counter()
        if number == 0 and log is not None:
            calls.append(timed(lambda: log.take(make)))
        count = 0
        # The same work in every iteration, whichever thread takes the lock.
        while count < work:
            count += 1
        seconds.append(time.perf_counter() - begin)
    return seconds


def calibrated() -> int:
    """The number of turns of an empty loop that make an iteration."""

    def loop(turns: int) -> None:
        count = 0
        while count < turns:
            count += 1

    rates = [timed(lambda: loop(10**5)) / 10**5 for _ in range(20)]
    return int(ITERATION_SECONDS / min(rates))


def timed(run: Callable[[], object]) -> float:
    """The seconds that a call takes."""
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def figures(seconds: list[float]) -> list[str]:
    """Median and range, in milliseconds."""
    values = [1e3 * one for one in seconds]
    return [f"{statistics.median(values):.3f}", f"[{min(values):.3f}, {max(values):.3f}]"]


if __name__ == "__main__":
    main()
