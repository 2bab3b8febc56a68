"""`distplb.plan` compared with other planners: imbalance of their placements, and planning time.

    python -m benchmarks.planning.bench_planning --loads DIR --output benchmarks/results/DATE-planning.md
    python -m benchmarks.planning.bench_planning --presets deepseek-v3 kimi-k2 --candidates 1 8
    python -m benchmarks.planning.bench_planning --loads DIR --planners FOLDER

`--planners` takes a folder of your own planners, one Python file each with a function `rebalance_experts` as in
DeepSeek's EPLB (`shared/user_planners.py`); each is tried on a small load for every layout before anything is measured.
All planners plan on the same loads in the same run, and take turns. Time is of the whole call, from load to placement,
after one untimed call. A placement is judged on the load that it was planned on (seen) and on other loads of the same
experts (unseen): the model's other files, or a second sample of a synthetic load.
Shapes: T steps, L layers, E experts, P slots, M GPUs, K candidates.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import distplb
from benchmarks.figures.planning import Panel, Point, draw
from benchmarks.shared import baselines
from benchmarks.shared.loads import PRESETS, SHAPES, Data, Layout, recorded, synthetic
from benchmarks.shared.tables import command_line, header, markdown, progress, publish, verdict
from benchmarks.shared.user_planners import BadPlannerError, UserPlanner, tried, user_planners
from distplb import Placement, imbalance, lower_bound
from distplb.packing.engines import engine_named

Planner = Callable[[Tensor], Tensor]  # tokens [L, E] -> expert of slot [L, P]
GREEDY = (baselines.greedy_loops, baselines.greedy_numpy)
# Times are compared with these planners.
LOOPS, NUMPY = baselines.greedy_loops.__name__, baselines.greedy_numpy.__name__
OURS, PACKING, CANDIDATES = "distplb.plan", "balanced_packing", ", K = "
OWN = (OURS, PACKING)
MOST_PANELS = 12
NOISE = (
    "Times are of whole calls. Planners take turns (A B C A B C ...), so that a slow moment of the machine affects all "
    "of them. Times are medians of all calls, with quartiles in brackets. `× loops` and `× numpy` show how many times "
    f"faster a planner is than `{LOOPS}` and `{NUMPY}`: the ratio of the medians in the same table."
)
QUALITY = (
    "Imbalance is busiest GPU / mean GPU in tokens; 1 is perfect. `seen` and `unseen` are means over layers and loads, "
    "`÷ bound` is `seen` divided by the mean lower bound. Placements do not depend on the machine."
)


@dataclass(frozen=True)
class Target:
    """A target for `plan` on the recorded deepseek-v3 loads, without groups."""

    nodes: int
    slots: int
    candidates: int
    imbalance: float  # upper limit of imbalance, or of imbalance / lower bound if `of_bound`
    of_bound: bool
    faster: dict[str, float]  # planner: by how many times `plan` must be faster
    milliseconds: float | None = None  # upper limit of the median, on two quiet cores


TARGETS = (
    Target(4, 288, 1, 1.0002, False, {LOOPS: 100, NUMPY: 2}, 4),
    Target(8, 320, 1, 1.0006, False, {LOOPS: 100, NUMPY: 2}, 5),
    Target(4, 256, 1, 1.0005, True, {LOOPS: 100, NUMPY: 2}, 3),
    Target(8, 320, 8, 1.0005, False, {LOOPS: 20}),
    Target(4, 256, 8, 1.001, True, {LOOPS: 20}),
    Target(2, 256, 8, 1.001, True, {LOOPS: 20}),
    Target(1, 256, 8, 1.001, True, {LOOPS: 20}),
)


@dataclass
class Result:
    """One planner on one layout: imbalances, a tensor `[L]` per load, and the seconds of each timed call."""

    seen: list[Tensor] = field(default_factory=list)
    unseen: list[Tensor] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    @property
    def mean(self) -> float:
        """Mean imbalance on the loads that were planned on."""
        return float(torch.cat(self.seen).mean())

    @property
    def median(self) -> float:
        """Median seconds of a call."""
        return float(np.median(self.seconds))


@dataclass(frozen=True)
class Case:
    """The results for one layout of one data set."""

    data: Data
    layout: Layout
    results: dict[str, Result]
    bound: Tensor  # lower bounds of all layers and loads
    left_out: list[str] = field(default_factory=list)  # planners of the user's that failed here, and why


def main() -> None:
    """Measure, print the report, and write it if requested."""
    options = parsed_options()
    engine = engine_named(options.engine)[0]
    layouts = [
        (data, layout)
        for data in data_sets(options)
        for layout in data.layouts
        if layout.groups is None or not options.flat
    ]
    own = user_planners(options.planners) if options.planners else {}
    wanted = ((experts_of(data), layout) for data, layout in layouts)
    tried(own, [(experts, layout) for experts, layout in wanted if takes_users(layout, experts, options)])
    cases = [measured(data, layout, options, engine, own) for data, layout in layouts]
    progress("")
    top = header("Planners compared", f"{QUALITY} {NOISE}", command(options), engine)
    parts = [*figure(cases, options.output), *targets(cases), ahead(cases)]
    publish("\n\n".join([top, *parts, *(f"## {heading(case)}\n\n{table(case)}" for case in cases)]), options.output)


def parsed_options() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description="Compare the quality and speed of planners.")
    parser.add_argument("--loads", type=Path, metavar="DIR", help="folder of .npy files, [L, E] or [T, L, E]")
    parser.add_argument("--presets", nargs="+", choices=PRESETS, metavar="NAME", help=", ".join(PRESETS))
    parser.add_argument("--candidates", type=int, nargs="+", default=[1, 8], metavar="K")
    parser.add_argument("--engine", help="engine of distplb; by default the fastest that is available")
    parser.add_argument("--repeats", type=int, default=5, metavar="R", help="timed calls on each load, 5 or more")
    parser.add_argument("--apart", action="store_true", help="replicas of one expert may not share a GPU")
    parser.add_argument("--flat", action="store_true", help="leave out layouts that keep groups on nodes")
    parser.add_argument("--planners", type=Path, metavar="FOLDER", help="your own planners, one Python file each")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the report (Markdown) and its figure there")
    options = parser.parse_args()
    if options.repeats < 5:
        parser.error(f"--repeats is {options.repeats}; pass 5 or more for a median")
    return options


def command(options: argparse.Namespace) -> str:
    """Return the command line, with the user's paths replaced."""
    names = ("candidates", "presets", "apart", "flat", "engine", "repeats")
    arguments = {"--loads": options.loads and "DIR"} | {f"--{name}": getattr(options, name) for name in names}
    arguments["--planners"] = options.planners and "FOLDER"
    return command_line("planning.bench_planning", arguments)


def data_sets(options: argparse.Namespace) -> list[Data]:
    """Return the requested recorded loads and presets; all presets if none are requested."""
    names = options.presets or ([] if options.loads else list(PRESETS))
    real = recorded(options.loads) if options.loads else []
    return real + [synthetic(name, shape) for name in names for shape in SHAPES]


# --- measurement ------------------------------------------------------------------------------------------------


def planners_of(
    layout: Layout, experts: int, options: argparse.Namespace, engine: str, own: dict[Path, Callable[..., Any]]
) -> dict[str, Planner]:
    """Return all planners that support the layout, by name; `own` are the user's."""
    cluster = {"topology": layout.topology, "num_slots": layout.slots}
    rules = {"num_groups": layout.groups, "allow_shared_replicas": not options.apart}
    planners: dict[str, Planner] = {}
    if layout.slots == experts or not options.apart:  # these two cannot keep replicas apart
        planners["contiguous"] = partial(baselines.contiguous, **cluster)
        planners["snake"] = partial(baselines.snake, **cluster, num_groups=layout.groups)
    planners |= {greedy.__name__: partial(greedy, **cluster, **rules) for greedy in GREEDY}
    if layout.slots == experts and layout.groups is None:
        for number in options.candidates:
            packing = partial(baselines.balanced_packing, topology=layout.topology, num_candidates=number)
            planners[f"{PACKING}{CANDIDATES}{number}"] = packing
    for number in options.candidates:
        planners[plan_name(number)] = partial(planned, **cluster, **rules, num_candidates=number, engine=engine)
    if takes_users(layout, experts, options):
        planners |= {path.name: UserPlanner(path, function, layout) for path, function in own.items()}
    return planners


def takes_users(layout: Layout, experts: int, options: argparse.Namespace) -> bool:
    """Whether the interface of the user's planners can express what is asked: it cannot keep replicas apart."""
    return layout.slots == experts or not options.apart


def plan_name(candidates: int) -> str:
    """Name the planner in tables."""
    return f"{OURS}{CANDIDATES}{candidates}"


def planned(load: Tensor, *, engine: str, **options: object) -> Tensor:
    """Plan by distplb; the search runs on the load's device."""
    return distplb.plan(load.to("cuda" if engine == "cuda" else "cpu"), engine=engine, **options).expert_of_slot


def measured(
    data: Data,
    layout: Layout,
    options: argparse.Namespace,
    engine: str,
    own: dict[Path, Callable[..., Any]],
) -> Case:
    """Judge the placement of one untimed call of every planner on every load; then time planners in turns.

    A planner of the user's that fails on one of these loads is left out here, and the others go on.
    """
    experts = experts_of(data)
    runs = planners_of(layout, experts, options, engine, own)
    case = Case(data, layout, {}, bound(data, layout))
    for name, run in list(runs.items()):
        progress(f"{heading(case)}: {name}")
        result = Result()
        try:
            for load, others in data.loads:
                table = run.checked(load) if isinstance(run, UserPlanner) else run(load).cpu()
                placement = Placement(table, experts, layout.topology.num_gpus)
                result.seen.append(imbalance(load, placement)[0])
                result.unseen += [imbalance(other, placement)[0] for other in others]
        except BadPlannerError as error:
            case.left_out.append(f"Left out: {error}.")
            del runs[name]
            continue
        case.results[name] = result
    for repeat in range(options.repeats):
        progress(f"{heading(case)}: repeat {repeat + 1} of {options.repeats}")
        for load, _ in data.loads:
            for name, run in runs.items():
                start = time.perf_counter()
                run(load)
                case.results[name].seconds.append(time.perf_counter() - start)
    return case


def experts_of(data: Data) -> int:
    """E."""
    return data.loads[0][0].shape[1]


def bound(data: Data, layout: Layout) -> Tensor:
    """Return the lower bounds of the imbalance `[L · loads]`."""
    bounds = [lower_bound(load, layout.topology, layout.slots, num_groups=layout.groups) for load, _ in data.loads]
    return torch.cat(bounds)


# --- text -------------------------------------------------------------------------------------------------------


def heading(case: Case) -> str:
    """Name the data set and the layout."""
    return f"{case.data.model}, {case.data.kind}: {case.layout.text(experts_of(case.data))}"


def table(case: Case) -> str:
    """Format a row for each planner."""
    head = ["planner", "seen", "worst layer", "÷ bound", "unseen", "ms", "[quartiles]", "× loops", "× numpy"]
    bound = float(case.bound.mean())
    lines = []
    for name, result in case.results.items():
        low, high = np.quantile(result.seconds, [0.25, 0.75]) * 1e3
        lines.append(
            [
                name,
                f"{result.mean:.5f}",
                f"{float(torch.cat(result.seen).max()):.5f}",
                f"{result.mean / bound:.5f}",
                f"{float(torch.cat(result.unseen).mean()):.5f}" if result.unseen else "–",
                f"{result.median * 1e3:.2f}",
                f"[{low:.2f} – {high:.2f}]",
                *(three_digits(faster(case, name, other)) for other in (LOOPS, NUMPY)),
            ]
        )
    last = ["lower bound", f"{bound:.5f}", f"{float(case.bound.max()):.5f}", "1.00000", *[""] * 5]
    return "\n\n".join([markdown(head, [*lines, last]), *case.left_out])


def faster(case: Case, name: str, other: str) -> float:
    """Return how many times faster the planner `name` is than `other`."""
    return case.results[other].median / case.results[name].median


def three_digits(ratio: float) -> str:
    """Format with three significant digits, and no exponent for large numbers."""
    return f"{ratio:.0f}" if ratio >= 100 else f"{ratio:.3g}"


# --- time and imbalance together --------------------------------------------------------------------------------


def figure(cases: list[Case], output: Path | None) -> list[str]:
    """Draw the first cases beside the report, if it is written; return the part that shows the figure."""
    if output is None:
        return []
    path = output.with_suffix(".png")
    draw([panel(case) for case in cases[:MOST_PANELS]], path)
    left = len(cases) - MOST_PANELS
    rest = f" The other {left} layouts are only in the tables." if left > 0 else ""
    return [
        f"![Time against imbalance of all planners, a panel for each layout]({path.name})\n\n"
        f"Nobody on the grey line is beaten in both time and imbalance.{rest}"
    ]


def panel(case: Case) -> Panel:
    """A case as a panel of the figure."""
    points = []
    for name, result in case.results.items():
        planner, _, candidates = name.partition(CANDIDATES)
        points.append(Point(planner, int(candidates) if candidates else None, 1e3 * result.median, result.mean))
    title = heading(case).replace(": ", "\n")
    return Panel(title, float(case.bound.mean()), points)


def ahead(cases: list[Case]) -> str:
    """Say whether any planner is both faster and more even than `plan`, at any number of candidates."""
    lines = []
    for case in cases:
        ours = {name: result for name, result in case.results.items() if name.startswith(OURS)}
        others = {name: result for name, result in case.results.items() if not name.startswith(OWN)}
        for name, result in others.items():
            for own, plan in ours.items():
                if result.median < plan.median and result.mean < plan.mean:
                    reached = [f"{1e3 * one.median:.2f} ms, {one.mean:.5f}" for one in (result, plan)]
                    lines.append([heading(case), name, reached[0], own, reached[1]])
    text = (
        "Target: no planner of the benchmark is both faster (median) and more even (mean of `seen`) than "
        "`distplb.plan`, at any number of candidates. `balanced_packing` is distplb's own search, and left out. "
        f"{verdict(not lines).capitalize()}."
    )
    head = ["layout", "planner", "time, imbalance", "than", "time, imbalance"]
    return "\n\n".join(["## Both faster and more even", text, *([markdown(head, lines)] if lines else [])])


# --- targets ----------------------------------------------------------------------------------------------------


def targets(cases: list[Case]) -> list[str]:
    """Format the targets on the recorded deepseek-v3 loads, if those were measured."""
    recorded_cases = {
        (case.layout.nodes, case.layout.slots): case
        for case in cases
        if (case.data.model, case.data.kind, case.layout.groups) == ("deepseek-v3", "recorded", None)
    }
    lines = []
    for target in TARGETS:
        case, name = recorded_cases.get((target.nodes, target.slots)), plan_name(target.candidates)
        if case is not None and name in case.results:
            lines += target_lines(target, case, name)
    if not lines:
        return []
    return ["## Targets on the recorded deepseek-v3 loads\n\n" + markdown(TARGET_HEAD, lines)]


TARGET_HEAD = ["slots on GPUs", "K", "measure", "target", "reached", "verdict"]


def target_lines(target: Target, case: Case, name: str) -> list[list[str]]:
    """Format a row for each measure."""
    first = [f"{target.slots} on {case.layout.topology.num_gpus}", str(target.candidates)]
    reached = case.results[name].mean / (float(case.bound.mean()) if target.of_bound else 1)
    measure = "imbalance ÷ bound" if target.of_bound else "imbalance"
    lines = [[*first, measure, f"≤ {target.imbalance}", f"{reached:.5f}", verdict(reached <= target.imbalance)]]
    if target.milliseconds is not None:
        taken = 1e3 * case.results[name].median
        lines.append([*first, "ms", f"≤ {target.milliseconds}", f"{taken:.2f}", verdict(taken <= target.milliseconds)])
    for other, factor in target.faster.items():
        ratio = faster(case, name, other)
        lines.append(
            [*first, f"times faster than {other}", f"≥ {factor}", three_digits(ratio), verdict(ratio >= factor)]
        )
    return lines


if __name__ == "__main__":
    main()
