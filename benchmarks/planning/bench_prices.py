"""Balance against moves: imbalance when only a few slots may change their GPU; and the time of a plan.

    python -m benchmarks.planning.bench_prices --loads DIR --output benchmarks/results/DATE-moves.md
    python -m benchmarks.planning.bench_prices --loads DIR --only-time

A placement that was planned on one load meets another load: the first one disturbed at random, or one of another kind
of work. Plans that start from this placement, at increasing prices of a move, are compared with plans from scratch.
Shapes: T steps, L layers, E experts, P slots, M GPUs, K candidates.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import distplb
from benchmarks.figures import prices as figure
from benchmarks.shared import baselines
from benchmarks.shared.loads import Layout, disturbed, wobbling_steps
from benchmarks.shared.tables import command_line, header, markdown, progress, publish, verdict
from distplb import Placement, imbalance, lower_bound
from distplb.core.price import moved_slots
from distplb.packing.engines import engine_named

Array = np.ndarray
Planner = Callable[[Tensor, Placement], Placement]  # tokens [L, E] and the placement in force -> the next

BASE, BEFORE, AFTER = "prefill_in1024", "prefill_in512", "decode_in1000out1000"
NOISE, WOBBLE = 0.1, 0.3  # standard deviations of logarithms: of a disturbed load, and between steps
# Price of a moved slot, as a share of the mean GPU's tokens.
PRICES = (0.0, 5e-5, 1e-4, 2e-4, 3e-4, 5e-4, 7e-4, 1e-3, 2e-3, 5e-3, 2e-2)
TIMED_STEPS, MAX_SECONDS, TIMED_CORES = 32, 0.6, 2


@dataclass(frozen=True)
class Target:
    """The target for disturbed loads: upper limits of the imbalance and of the share of slots moved."""

    layout: Layout
    imbalance: float
    moved: float


TARGETS = (Target(Layout(4, 288), 1.01, 0.08), Target(Layout(8, 320), 1.02, 0.12))
TEXT = (
    "`moved` is the share of slots whose expert comes from another GPU; `imbalance` is busiest GPU / mean GPU in "
    "tokens, on the load that was planned on; both are means over layers and loads. The price of a moved slot is a "
    f"share of the mean GPU's tokens. Disturbed: {BASE}, every count times exp(x), x normal with standard deviation "
    f"{NOISE}; the placement in force was planned by distplb.plan with K = 16 on the load before the change. "
    "Placements do not depend on the machine."
)


@dataclass(frozen=True)
class Change:
    """A placement in force and the loads that it meets, each `[L, E]`."""

    layout: Layout
    name: str
    current: Placement
    loads: tuple[Tensor, ...]
    target: Target | None = None

    @property
    def title(self) -> str:
        """The heading of its part of the report."""
        return f"{self.layout.slots} slots on {self.layout.topology.num_gpus} GPUs, {self.name}"


@dataclass(frozen=True)
class Point:
    """One planner after a change: share of slots moved and imbalance, means over layers and loads."""

    moved: float
    imbalance: float
    worst: float  # imbalance of the worst layer


def main() -> None:
    """Measure, print the report, and write it if requested."""
    options = parsed_options()
    engine = engine_named(options.engine)[0]
    loads = read_loads(options.loads)
    lines, parts = ([], []) if options.only_time else moves_parts(loads, options, engine)
    times = timed(loads[BASE], options.repeats, engine)
    parts = [f"## Targets\n\n{markdown(TARGET_HEAD, [*lines, time_line(times)])}", *parts, time_part(times, engine)]
    progress("")
    title, text = ("Time of a plan on steps", "") if options.only_time else ("Balance against moves", TEXT)
    publish("\n\n".join([header(title, text, command(options), engine), *parts]), options.output)


def moves_parts(
    loads: dict[str, Tensor], options: argparse.Namespace, engine: str
) -> tuple[list[list[str]], list[str]]:
    """Return rows of the targets and the report's parts; draw the figure if the report is written."""
    lines, parts, panels = [], [], []
    for change in changes(loads, options, engine):
        curves, others = measured(change, options, engine)
        lines += [line for number in options.candidates for line in target_lines(change, curves[number], number)]
        parts.append(f"## {change.title}\n\n{table(change, curves, others)}")
        panels.append((change.title, curves, others, change.target))
    if options.output:
        path = options.output.with_suffix(".png")
        figure.draw(panels, path)
        parts.insert(0, f"![Imbalance against the share of slots moved]({path.name})")
    return lines, parts


def parsed_options() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description="Imbalance against slots moved, and the time of a plan.")
    parser.add_argument("--loads", type=Path, required=True, metavar="DIR", help="folder of deepseek-v3_*.npy")
    parser.add_argument("--candidates", type=int, nargs="+", default=[4, 16], metavar="K")
    parser.add_argument("--prices", type=float, nargs="+", default=list(PRICES), help="shares of the mean GPU's tokens")
    parser.add_argument("--seeds", type=int, default=3, help="number of disturbed loads")
    parser.add_argument("--repeats", type=int, default=9, metavar="R", help="number of timed calls")
    parser.add_argument("--only-time", action="store_true", help="leave out the moves, which take ten minutes")
    parser.add_argument("--engine", help="engine of distplb; by default the fastest that is available")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the report (Markdown) there")
    return parser.parse_args()


def command(options: argparse.Namespace) -> str:
    """Return the command line, with the user's paths replaced."""
    prices = None if options.prices == list(PRICES) else options.prices
    arguments: dict[str, object] = {"--loads": "DIR"}
    if options.only_time:
        arguments |= {"--only-time": True}
    else:
        arguments |= {"--candidates": options.candidates, "--prices": prices, "--seeds": options.seeds}
    arguments |= {"--repeats": options.repeats, "--engine": options.engine}
    return command_line("planning.bench_prices", arguments)


# --- loads ------------------------------------------------------------------------------------------------------


def read_loads(folder: Path) -> dict[str, Tensor]:
    """Read the loads `[L, E]` int64, by name."""
    loads = {}
    for name in (BASE, BEFORE, AFTER):
        path = folder / f"deepseek-v3_{name}.npy"
        if not path.exists():
            raise SystemExit(f"no {path.name} in {folder}; pass the folder that has it")
        loads[name] = torch.from_numpy(np.load(path).astype(np.int64))
    return loads


def changes(loads: dict[str, Tensor], options: argparse.Namespace, engine: str) -> Iterator[Change]:
    """Yield the changes on both clusters: disturbed loads, then another kind of work."""
    for target in TARGETS:
        layout = target.layout
        fresh = partial(distplb.plan, topology=layout.topology, num_slots=layout.slots, engine=engine)
        current = fresh(loads[BASE], num_candidates=16)
        noisy = tuple(disturbed(loads[BASE], NOISE, seed) for seed in range(options.seeds))
        yield Change(layout, f"{BASE} disturbed", current, noisy, target)
        current = fresh(loads[BEFORE], num_candidates=16)
        yield Change(layout, f"from {BEFORE} to {AFTER}", current, (loads[AFTER],))


# --- measurement ------------------------------------------------------------------------------------------------


def measured(
    change: Change, options: argparse.Namespace, engine: str
) -> tuple[dict[int, dict[float, Point]], dict[str, Point]]:
    """Measure the curve of every K, by price; and other planners, by name."""
    cluster = {"topology": change.layout.topology, "num_slots": change.layout.slots, "engine": engine}
    curves: dict[int, dict[float, Point]] = {}
    for number in options.candidates:
        curves[number] = {}
        for share in options.prices:
            progress(f"{change.title}: K = {number}, price {share:g}")
            curves[number][share] = judged(change, partial(priced, share=share, num_candidates=number, **cluster))
    others = {}
    for name, planner in other_planners(change.layout, cluster).items():
        progress(f"{change.title}: {name}")
        others[name] = judged(change, planner)
    return curves, others


def other_planners(layout: Layout, cluster: dict[str, object]) -> dict[str, Planner]:
    """Return the planners that keep the placement or plan from scratch, by name."""

    def greedy(load: Tensor, current: Placement) -> Placement:
        table = baselines.greedy_numpy(load, layout.topology, layout.slots)
        return Placement(table, load.shape[1], layout.topology.num_gpus)

    return {
        "stays": lambda load, current: current,
        "greedy, afresh": greedy,
        "ours, afresh": lambda load, current: distplb.plan(load, **cluster),
        "ours, afresh, GPUs renamed": lambda load, current: distplb.plan(
            load, current=current, num_candidates=1, **cluster
        ),
    }


def priced(load: Tensor, current: Placement, *, share: float, **options: object) -> Placement:
    """Plan by distplb from the placement in force; a moved slot costs a share of the mean GPU's tokens."""
    price = share * float(load.sum()) / len(load) / current.num_gpus
    return distplb.plan(load, current=current, move_price=price, **options)


def judged(change: Change, planner: Planner) -> Point:
    """Compute a planner's means over layers and loads."""
    moved, uneven = [], []
    for load in change.loads:
        placement = planner(load, change.current)
        moved.append(moved_slots(change.current, placement, change.layout.topology).sum(1) / placement.num_slots)
        uneven.append(imbalance(load, placement)[0])
    return Point(float(torch.cat(moved).mean()), float(torch.cat(uneven).mean()), float(torch.cat(uneven).max()))


@dataclass(frozen=True)
class Timed:
    """Seconds of whole calls by name, the load average before and after, and imbalances on the steps."""

    seconds: dict[str, list[float]]
    load_average: tuple[float, float]
    imbalance: dict[str, float]


def timed(load: Tensor, repeats: int, engine: str) -> Timed:
    """Time plans with one candidate for 288 slots on 32 GPUs, on the steps and on their sum in turns."""
    steps = wobbling_steps(load, TIMED_STEPS, WOBBLE, 0)
    layout = TARGETS[0].layout
    run = partial(distplb.plan, topology=layout.topology, num_slots=layout.slots, num_candidates=1, engine=engine)
    inputs = {f"{TIMED_STEPS} steps": steps, "their sum": steps.sum(0)}
    reached = {name: float(imbalance(steps, run(tokens)).mean()) for name, tokens in inputs.items()}  # compiles too
    seconds: dict[str, list[float]] = {name: [] for name in inputs}
    before = os.getloadavg()[0]
    for repeat in range(repeats):
        progress(f"time: {repeat + 1} of {repeats}")
        for name, tokens in inputs.items():
            start = time.perf_counter()
            run(tokens)
            seconds[name].append(time.perf_counter() - start)
    return Timed(seconds, (before, os.getloadavg()[0]), reached)


# --- text -------------------------------------------------------------------------------------------------------


TARGET_HEAD = ["load", "K", "target", "reached", "verdict"]


def table(change: Change, curves: dict[int, dict[float, Point]], others: dict[str, Point]) -> str:
    """Format a row for each planner and price."""
    lines = [[name, "", *numbers(point)] for name, point in others.items()]
    for number, curve in curves.items():
        lines += [[f"ours, priced, K = {number}", f"{share:g}", *numbers(point)] for share, point in curve.items()]
    bounds = [lower_bound(load, change.layout.topology, change.layout.slots) for load in change.loads]
    lines.append(
        ["lower bound", "", "", f"{float(torch.cat(bounds).mean()):.5f}", f"{float(torch.cat(bounds).max()):.5f}"]
    )
    return markdown(["planner", "price", "moved", "imbalance", "worst layer"], lines)


def numbers(point: Point) -> list[str]:
    """Format a point as cells of a table."""
    return [f"{point.moved:.1%}", f"{point.imbalance:.5f}", f"{point.worst:.5f}"]


def target_lines(change: Change, curve: dict[float, Point], candidates: int) -> list[list[str]]:
    """Compare the target with the point of the curve that moves least within the limit of imbalance."""
    target = change.target
    if target is None:
        return []
    enough = [(point.moved, share, point) for share, point in curve.items() if point.imbalance <= target.imbalance]
    goal = f"≤ {target.imbalance} with ≤ {target.moved:.0%} moved"
    if not enough:
        return [[change.title, str(candidates), goal, "not reached at any price", "missed"]]
    moved, share, point = min(enough, key=lambda candidate: candidate[:2])
    reached = f"{point.imbalance:.5f} with {moved:.1%} (price {share:g})"
    return [[change.title, str(candidates), goal, reached, verdict(moved <= target.moved)]]


def time_line(times: Timed) -> list[str]:
    """Format the row of the targets for the time."""
    median = float(np.median(times.seconds[f"{TIMED_STEPS} steps"]))
    limit = f"< {MAX_SECONDS} s on {TIMED_CORES} cores"
    what = f"time of a plan on {TIMED_STEPS} steps"
    return [what, "1", limit, f"{median:.3f} s", verdict(median < MAX_SECONDS)]


def time_part(times: Timed, engine: str) -> str:
    """Format the seconds of a plan, and how busy the machine was."""
    cores = len(os.sched_getaffinity(0))
    threads = {"cpu": min(4, cores), "reference": torch.get_num_threads()}.get(engine)
    lines = []
    for name, seconds in times.seconds.items():
        low, middle, high = np.quantile(seconds, [0.25, 0.5, 0.75])
        lines.append([name, f"{middle:.3f}", f"[{low:.3f} – {high:.3f}]", f"{times.imbalance[name]:.5f}"])
    text = (
        f"Whole `distplb.plan` calls, {TARGETS[0].layout.slots} slots on "
        f"{TARGETS[0].layout.topology.num_gpus} GPUs, K = 1, after one untimed call: median and quartiles of "
        f"{len(next(iter(times.seconds.values())))} calls in turns; {threads or 'no'} thread{'s' * (threads != 1)} on "
        f"{cores} core{'s' * (cores > 1)}. Steps are drawn around {BASE} with popularities that vary log-normally by "
        f"{WOBBLE}. Load average of the last minute: {times.load_average[0]:.1f} before, "
        f"{times.load_average[1]:.1f} after, this process included. If it exceeds {cores}, other processes shared the "
        f"cores, and the seconds are too high."
    )
    head = ["planned on", "seconds", "[quartiles]", "imbalance on the steps"]
    return f"## Time\n\n{text}\n\n{markdown(head, lines)}"


if __name__ == "__main__":
    main()
