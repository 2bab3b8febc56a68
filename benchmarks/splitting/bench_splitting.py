"""Splits of single steps compared with those of published systems: imbalance, replicas, traffic, and time.

    python -m benchmarks.splitting.bench_splitting --loads DIR --output benchmarks/results/DATE-splitting.md

Shapes: E experts, M GPUs, R replica slots on each GPU.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.shared.loads import GPUS_PER_NODE
from benchmarks.shared.tables import command_line, header, markdown, progress, publish, verdict
from benchmarks.splitting import baselines
from benchmarks.splitting.baselines import Cluster
from benchmarks.splitting.loads import WORKLOADS, Size, Step, log_normal, power_law, recorded, workload
from distplb import Topology
from distplb.splitting import cpu
from distplb.splitting.bound import step_bound
from distplb.splitting.routes import routes
from distplb.splitting.split import split
from distplb.splitting.split_value import EMPTY, Split

Ints = NDArray[np.int64]

DISTPLB, NO_REPLICAS = "distplb", "no replicas"
THRESHOLD, THRESHOLD_FIRST = "threshold search to 1 %", "threshold search, distplb's level first"
WHOLE, LONGEST = "whole receivers", "longest first above 1.1"
EVENLY, FLOW = "EPLB of the step before, shared evenly", "EPLB of the step before, shared by the optimal flow"
TOLERANCE = Fraction(round(0.005 * 2**20), 2**20)  # distplb's default, rounded as `split` does
GAP = 100  # the threshold search to 1 % ends when it knows the threshold to within mean / GAP
REPEATS = 7  # of every timed call; the fastest counts
SIZE, LARGE = Size(), Size(gpus=128, experts=512)
IMBALANCES, MAX_VIOLATIONS = (1.1, 1.5, 2.0, 3.0), (0.2, 1.0, 4.0)
RECORDED_GPUS, RECORDED_SIZES = (8, 16, 32, 64), (8, 32)
MOST_REPLICAS = {1.1: 31, 1.5: 40, 2.0: 44, 3.0: 46}  # with R = 2, by the imbalance of the power law
MOST_IMBALANCE = {1: {1.1: 1.010, 1.5: 1.013, 2.0: 1.015, 3.0: 1.019}, 2: dict.fromkeys(IMBALANCES, 1.005)}  # by R
MOST_RECORDED = 1.008
MOST_MICROSECONDS = {"decision": 50, "public call": 100}
TEXT = (
    "Figures are medians over steps, with quartiles in brackets, of one run. Imbalance is the busiest GPU / the mean; "
    "`bound` is distplb.splitting.bound.step_bound / the mean, which no split with R slots inside nodes can beat. "
    "Sends and receives are replicas, of the GPU that sends or receives most: a method that ignores R shows there how "
    "many slots it takes. Replicas without tokens are not counted. Tokens between GPUs and between nodes are shares "
    "of all tokens, routed by distplb.splitting.routes for every method. µs is the time of a compiled decision, "
    f"fastest of {REPEATS} calls on one core of a machine that others use at the same time; methods without a time are "
    "in NumPy. The methods are written from their published descriptions (benchmarks/splitting/baselines.py); they "
    "are not those systems' programs. The threshold search runs twice: to within 1 % of the lowest threshold, and "
    "with the level that distplb aims at as its first threshold. Homes are contiguous; only EPLB moves them, and puts "
    "an expert's copies on any GPUs of its node. It plans from another draw of the same layer (recorded), from "
    "another draw of the same popularities (power laws, log-normal), or from the step before (workloads); the first "
    "two are the best that a window can tell it. Its replicas lie in their slots from one plan to the next, and its "
    "moves of homes are not counted; the replicas of all others are sent in every step. Recorded steps are sums of "
    "random sequences of DeepSeek-V2-Lite, counts times 16, tokens dealt to random sources, so they say nothing about "
    "tokens that could stay on their GPU. Left out: the same table by prices of an H100 host, because `split` takes "
    "no prices yet."
)


@dataclass(frozen=True)
class Case:
    """Steps and the cluster that they are split for.

    Args:
        name: the heading.
        topology: nodes and GPUs.
        num_experts: E.
        slots: R.
        steps: makes the steps.
        imbalance: the imbalance of a power law, for targets; None for other loads.
    """

    name: str
    topology: Topology
    num_experts: int
    slots: int
    steps: Callable[[], Iterator[Step]]
    imbalance: float | None = None

    @property
    def cluster(self) -> Cluster:
        """The cluster with contiguous homes."""
        gpus, experts = self.topology.num_gpus, self.num_experts
        node = np.arange(gpus) // self.topology.gpus_per_node
        return Cluster(np.arange(experts) * gpus // experts, node, self.slots)

    @property
    def text(self) -> str:
        """The heading with sizes."""
        nodes = self.topology.num_nodes
        where = f"{self.topology.num_gpus} GPUs" + (f" on {nodes} nodes" if nodes > 1 else "")
        return f"{self.name}: {where}, {self.num_experts} experts, R = {self.slots}"


@dataclass(frozen=True)
class Figures:
    """What is told of one split."""

    imbalance: float
    bound: float
    replicas: int
    sends: int
    receives: int
    between_gpus: float
    between_nodes: float
    microseconds: float | None

    def beats(self, other: Figures) -> bool:
        """Whether it has fewer replicas at equal or lower imbalance."""
        return self.imbalance <= other.imbalance and self.replicas < other.replicas

    def is_more_even(self, other: Figures) -> bool:
        """Whether it has lower imbalance with at most as many replicas."""
        return self.imbalance < other.imbalance and self.replicas <= other.replicas

    def sends_less(self, other: Figures) -> bool:
        """Whether its busiest GPU sends fewer replicas, at most as many replicas in all, at most as unevenly."""
        return self.sends < other.sends and self.imbalance <= other.imbalance and self.replicas <= other.replicas


@dataclass(frozen=True)
class Result:
    """A case, the figures of each method step by step, and the level that distplb aims at, as an imbalance."""

    case: Case
    figures: dict[str, list[Figures]]
    levels: list[float]


def main() -> None:
    """Measure, print the report, and write it if requested."""
    options = parsed_options()
    cpu.warm_up()
    cases = all_cases(options.loads, options.steps, options.draws, options.small)
    results = [measured(case) for case in cases]
    sizes = (SMALL,) if options.small else (SIZE, LARGE)
    times = [timed_line(imbalance, size, options.steps) for size in sizes for imbalance in IMBALANCES]
    progress("")
    parts = [
        f"## Targets\n\n{targets(results, times)}",
        f"## Where another method is better\n\n{WHERE_BETTER}\n\n{better(results)}",
        f"## Replicas and imbalance\n\n{summary(results)}",
        f"## Time\n\n{time_table(times)}",
        *(f"## {result.case.text}\n\n{table(result)}" for result in results),
    ]
    text = f"{TEXT} {options.steps} steps of each made load; {options.draws} × all layers of each recorded one."
    top = header("Splits of single steps", text, command(options), "cpu")
    publish("\n\n".join([top, *parts]), options.output)


def parsed_options() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description="Splits of single steps compared with those of published systems.")
    parser.add_argument("--loads", type=Path, required=True, metavar="DIR", help="folder of deepseek-v2-lite_*_steps")
    parser.add_argument("--steps", type=int, default=24, help="steps of each made load")
    parser.add_argument("--draws", type=int, default=2, help="steps of each recorded load, each with all layers")
    parser.add_argument("--small", action="store_true", help="few GPUs and experts, to try the benchmark")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the report (Markdown) there")
    return parser.parse_args()


def command(options: argparse.Namespace) -> str:
    """Return the command line, with the user's paths replaced."""
    names = ("steps", "draws", "small")
    return command_line(
        "splitting.bench_splitting", {"--loads": "DIR"} | {f"--{name}": getattr(options, name) for name in names}
    )


SMALL = Size(gpus=8, experts=16, choices=1024)


def all_cases(loads: Path, steps: int, draws: int, small: bool = False) -> list[Case]:
    """List the loads on one node, then on nodes of eight GPUs."""
    size = SMALL if small else SIZE
    gpus, made = RECORDED_GPUS[: 1 if small else None], partial(_made, steps=steps)
    cases = [_recorded(loads, each, number, draws) for each in gpus for number in RECORDED_SIZES]
    for slots in (2, 1):
        cases += [made(_law(each), partial(power_law, each), size, slots, imbalance=each) for each in IMBALANCES]
    cases += [made(f"log-normal, MaxVio {each:g}", partial(log_normal, each), size) for each in MAX_VIOLATIONS]
    cases += [made(name, partial(workload, name), size) for name in WORKLOADS]
    per_node = GPUS_PER_NODE // 2 if small else GPUS_PER_NODE
    cases.append(_recorded(loads, gpus[-1], RECORDED_SIZES[-1], draws, per_node))
    cases += [made(_law(each), partial(power_law, each), size, per_node=per_node) for each in IMBALANCES]
    return cases + [
        made(name, partial(workload, name), size, per_node=per_node) for name in ("balanced", "unequal sources")
    ]


def _law(imbalance: float) -> str:
    return f"power law, imbalance {imbalance:g}"


def _recorded(loads: Path, gpus: int, number: int, draws: int, per_node: int | None = None) -> Case:
    topology = Topology(gpus // (per_node or gpus), per_node or gpus)
    return Case(f"recorded, {number} sequences", topology, 64, 2, partial(recorded, loads, gpus, number, draws))


def _made(
    name: str,
    steps_of: Callable[[Size, int], Iterator[Step]],
    size: Size,
    slots: int = 2,
    *,
    steps: int,
    per_node: int | None = None,
    imbalance: float | None = None,
) -> Case:
    topology = Topology(size.gpus // (per_node or size.gpus), per_node or size.gpus)
    return Case(name, topology, size.experts, slots, partial(steps_of, size, steps), imbalance)


# --- measurement ------------------------------------------------------------------------------------------------


def measured(case: Case) -> Result:
    """Split every step by every method."""
    figures: dict[str, list[Figures]] = {}
    levels = []
    for number, step in enumerate(case.steps()):
        progress(f"{case.text}, step {number + 1}")
        tokens, mean = step.counts.sum(0), int(step.counts.sum()) / case.topology.num_gpus
        levels.append(level(case, tokens) / mean)
        microseconds = times_of(case, tokens)
        bound = step_bound(step.counts, case.cluster.home, topology=case.topology, replica_slots=case.slots)
        for name, found in splits(case, step).items():
            figures.setdefault(name, []).append(figures_of(case, found, bound, microseconds.get(name)))
    return Result(case, figures, levels)


def level(case: Case, tokens: Ints) -> int:
    """The tokens that distplb lets no GPU exceed if R slots suffice: the tolerance above the mean, or the bound."""
    return max(lowest_of(tokens, case), int(Fraction(int(tokens.sum()), case.topology.num_gpus) * (1 + TOLERANCE)))


def gap_of(tokens: Ints, case: Case) -> int:
    """The accuracy of the threshold search to 1 %, in tokens."""
    return max(1, int(tokens.sum()) // (case.topology.num_gpus * GAP))


def lowest_of(tokens: Ints, case: Case) -> int:
    """The tokens that the busiest GPU has at least: ceil(mean of the busiest node)."""
    return max(-int(-mean // 1) for mean in case.cluster.node_means(tokens))


def splits(case: Case, step: Step) -> dict[str, Split]:
    """Every method's split of one step."""
    tokens, cluster = step.counts.sum(0), case.cluster
    held = baselines.planned_copies(step.before, cluster)
    moved = replace(cluster, home=baselines.homes_of(held, cluster.home))
    search = partial(baselines.threshold_search, tokens, cluster)
    quotas = {
        NO_REPLICAS: baselines.at_home(tokens, cluster),
        THRESHOLD: search(lowest=lowest_of(tokens, case), gap=gap_of(tokens, case)),
        THRESHOLD_FIRST: search(lowest=level(case, tokens), gap=1),
        WHOLE: baselines.whole_receivers(tokens, cluster),
        LONGEST: baselines.longest_first(tokens, cluster),
    }
    planned = {EVENLY: baselines.shared_evenly(tokens, held), FLOW: baselines.shared_by_flow(tokens, held)}
    own = split(
        step.counts,
        cluster.home,
        topology=case.topology,
        replica_slots=case.slots,
        engine="cpu",
    )
    return (
        {DISTPLB: own}
        | {name: split_of(step.counts, cluster, quota) for name, quota in quotas.items()}
        | {name: split_of(step.counts, moved, quota) for name, quota in planned.items()}
    )


def split_of(counts: Ints, cluster: Cluster, quota: Ints) -> Split:
    """Build the Split, which checks itself; with more than R slots where a method takes more."""
    away = quota > 0
    away[np.arange(len(quota)), cluster.home] = False
    slots = max(cluster.slots, int(away.sum(0).max()))
    replica = np.full((cluster.num_gpus, slots), EMPTY, np.int64)
    for gpu in range(cluster.num_gpus):
        experts = np.flatnonzero(away[:, gpu])
        replica[gpu, : len(experts)] = experts
    return Split(*(torch.from_numpy(value) for value in (counts, cluster.home, quota, replica)))


def figures_of(case: Case, found: Split, bound: int, microseconds: float | None) -> Figures:
    """Compute the figures of one split."""
    tokens = found.counts.sum(0).numpy()
    total = max(1, int(tokens.sum()))
    flow = routes(found, case.topology).sum(1)  # [M, M]
    nodes = flow.unflatten(0, (case.topology.num_nodes, -1)).unflatten(2, (case.topology.num_nodes, -1)).sum((1, 3))
    pushes = found.pushes
    return Figures(
        found.imbalance,
        bound * case.topology.num_gpus / total,
        found.num_replicas,
        int(pushes.sum(1).amax()),
        int(pushes.sum(0).amax()),
        1 - int(flow.trace()) / total,
        1 - int(nodes.trace()) / total,
        microseconds,
    )


def times_of(case: Case, tokens: Ints) -> dict[str, float]:
    """Microseconds of the compiled methods on one step, from tokens to replicas."""
    same = tokens, case.cluster.home, case.cluster.node, case.slots
    aim, lowest, gap = level(case, tokens), lowest_of(tokens, case), gap_of(tokens, case)
    return {
        DISTPLB: fastest(partial(cpu.replicas, *same, aim)),
        THRESHOLD: fastest(partial(baselines.threshold_replicas, *same, lowest, gap)),
        THRESHOLD_FIRST: fastest(partial(baselines.threshold_replicas, *same, aim, 1)),
    }


def fastest(call: Callable[[], object]) -> float:
    """Microseconds of the fastest of several calls, after one that may compile."""
    call()
    times = []
    for _ in range(REPEATS):
        begin = time.perf_counter_ns()
        call()
        times.append(time.perf_counter_ns() - begin)
    return min(times) / 1000


@dataclass(frozen=True)
class Times:
    """Microseconds of each decision and of the public call on power laws, as medians over steps."""

    imbalance: float
    size: Size
    decision: dict[str, float]
    public: float


def timed_line(imbalance: float, size: Size, steps: int) -> Times:
    """Time the decisions, and `split` with its checks, on a power law with R = 2."""
    case = _made(_law(imbalance), partial(power_law, imbalance), size, steps=min(steps, 8))
    decision: dict[str, list[float]] = {}
    public = []
    for step in case.steps():
        progress(f"time of {case.text}")
        for name, microseconds in times_of(case, step.counts.sum(0)).items():
            decision.setdefault(name, []).append(microseconds)
        counts, home = torch.from_numpy(step.counts), torch.from_numpy(case.cluster.home)
        public.append(fastest(partial(split, counts, home, topology=case.topology, engine="cpu")))
    return Times(
        imbalance, size, {name: float(np.median(each)) for name, each in decision.items()}, float(np.median(public))
    )


# --- text -------------------------------------------------------------------------------------------------------

WHERE_BETTER = """\
`fewer replicas`: steps in which another method has fewer replicas than distplb at equal or lower imbalance.
`more even`: steps in which it is more even with at most as many replicas. distplb stops at its level, 0.5 % above
the mean or the mean of the busiest node, so a method that goes on is often a little more even; `level missed` are
those of these steps in which distplb does not reach its level. `fewer sends`: steps in which its busiest sender sends
fewer replicas, at most as many replicas in all and at most as unevenly. Pairs of load and method without such
steps are left out."""


def spread(values: Sequence[float], digits: int) -> str:
    """Format the median and the quartiles.

    >>> spread([1, 2, 3, 4, 5], digits=0)
    '3 (2–4)'
    """
    low, middle, high = (f"{value:.{digits}f}" for value in np.percentile(values, [25, 50, 75]))
    return middle if low == high == middle else f"{middle} ({low}–{high})"


def table(result: Result) -> str:
    """Format a row for each method."""
    head = ["split", "imbalance", "worst", "bound", "replicas", "sends", "receives"]
    head += ["between GPUs", "between nodes", "µs"]
    lines = []
    for name, each in result.figures.items():
        times = [one.microseconds for one in each if one.microseconds is not None]
        lines.append(
            [
                name,
                spread([one.imbalance for one in each], 4),
                f"{max(one.imbalance for one in each):.4f}",
                spread([one.bound for one in each], 4),
                spread([one.replicas for one in each], 0),
                spread([one.sends for one in each], 0),
                spread([one.receives for one in each], 0),
                f"{np.median([one.between_gpus for one in each]):.1%}",
                f"{np.median([one.between_nodes for one in each]):.1%}",
                spread(times, 0) if times else "–",
            ]
        )
    return markdown(head, lines)


def summary(results: list[Result]) -> str:
    """Format a row for each load: median imbalance and replicas of each method."""
    names = list(results[0].figures)
    lines = []
    for result in results:
        cells = []
        for name in names:
            each = result.figures[name]
            imbalance = np.median([one.imbalance for one in each])
            cells.append(f"{imbalance:.4f}, {np.median([one.replicas for one in each]):.0f}")
        bound = np.median([one.bound for one in result.figures[DISTPLB]])
        lines.append([result.case.text, f"{bound:.4f}", *cells])
    return markdown(["imbalance, replicas", "bound", *names], lines)


def better(results: list[Result]) -> str:
    """Format a row for each load and method that is better than distplb in some step."""
    lines = []
    for result in results:
        own = result.figures[DISTPLB]
        for name, figures in result.figures.items():
            pairs = list(zip(figures, own, result.levels, strict=True))
            fewer = sum(one.beats(mine) for one, mine, _ in pairs)
            even = [(mine, aim) for one, mine, aim in pairs if one.is_more_even(mine)]
            missed = sum(mine.imbalance > aim for mine, aim in even)
            sends = sum(one.sends_less(mine) for one, mine, _ in pairs)
            if fewer or even or sends:
                lines.append([result.case.text, name, *map(str, (len(own), fewer, len(even), missed, sends))])
    head = ["load", "method", "steps", "fewer replicas", "more even", "level missed", "fewer sends"]
    return markdown(head, lines) if lines else "None."


def targets(results: list[Result], times: list[Times]) -> str:
    """Format the targets: worst imbalance and median replicas of power laws, recorded steps, and times."""
    lines = comparison_lines(results)
    for result in results:
        own, slots = result.figures[DISTPLB], result.case.slots
        worst = max(one.imbalance for one in own)
        if result.case.topology.num_nodes > 1:
            continue
        imbalance = result.case.imbalance
        if imbalance is not None:
            most = MOST_IMBALANCE[slots][imbalance]
            # The level of the tolerance is a rounded fraction of the mean; the target is a decimal.
            lines.append(
                [result.case.text, "worst imbalance", f"≤ {most}", f"{worst:.4f}", verdict(worst <= most + 1e-6)]
            )
            if slots == 2:
                replicas, limit = float(np.median([one.replicas for one in own])), MOST_REPLICAS[imbalance]
                lines.append(
                    [result.case.text, "replicas, median", f"≤ {limit}", f"{replicas:g}", verdict(replicas <= limit)]
                )
        elif result.case.name.startswith("recorded"):
            reached = [f"≤ {MOST_RECORDED}", f"{worst:.4f}", verdict(worst <= MOST_RECORDED)]
            lines.append([result.case.text, "worst imbalance", *reached])
    for each in times:
        if each.size.experts <= SIZE.experts:
            ratio = each.decision[DISTPLB] / each.decision[THRESHOLD]
            where = f"{_law(each.imbalance)}: {each.size.gpus} GPUs, {each.size.experts} experts, R = 2"
            lines.append([where, f"decision ÷ {THRESHOLD}", "≤ 1", f"{ratio:.2f}", verdict(ratio <= 1)])
            for name, value in (("decision", each.decision[DISTPLB]), ("public call", each.public)):
                limit = MOST_MICROSECONDS[name]
                lines.append([where, f"{name}, µs", f"≤ {limit}", f"{value:.0f}", verdict(value <= limit)])
    return markdown(["load", "measure", "target", "reached", "verdict"], lines)


def comparison_lines(results: list[Result]) -> list[list[str]]:
    """Format in how many steps another method is better, over all loads and methods."""
    pairs = [
        [(one[number], own) for name, one in result.figures.items() if name != DISTPLB]
        for result in results
        for number, own in enumerate(result.figures[DISTPLB])
    ]
    fewer = sum(any(one.beats(own) for one, own in step) for step in pairs)
    equal = sum(
        any(one.imbalance < own.imbalance and one.replicas == own.replicas for one, own in step) for step in pairs
    )
    return [
        [f"all, {len(pairs)} steps", measure, "0 steps", f"{number} steps", verdict(number == 0)]
        for measure, number in (
            ("another method: fewer replicas, at most as uneven", fewer),
            ("another method: as many replicas, more even", equal),
        )
    ]


def time_table(times: list[Times]) -> str:
    """Format the times of decisions and of the public call."""
    names = (DISTPLB, THRESHOLD, THRESHOLD_FIRST)
    lines = [
        [
            f"{each.size.gpus} × {each.size.experts}, {_law(each.imbalance)}",
            *(f"{each.decision[name]:.0f}" for name in names),
            f"{each.public:.0f}",
        ]
        for each in times
    ]
    return markdown(["µs, R = 2", *names, "split(), with its checks"], lines)


if __name__ == "__main__":
    main()
