"""Which steps to plan on: the last window unchanged, weighted, several windows, or a forecast.

    python -m benchmarks.study.bench_windows --loads DIR --output benchmarks/results/DATE-windows.md

A window has the counts between two rebalances; the traces are those of bench_replay.
Shapes: S steps, T steps of a window, L layers, E experts.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import distplb
from benchmarks.shared import traces
from benchmarks.shared.tables import command_line, header, markdown, progress, publish
from benchmarks.shared.traces import UNTIMED, Case
from distplb import Placement, replay
from distplb.packing.engines import engine_named

Windows = Sequence[Tensor]  # all so far, each [T, L, E], in chronological order
Prepare = Callable[[Windows], Tensor]  # -> [S, L, E], the steps that are planned on

WEIGHT = 256  # of the last step
FINER = 16  # counts are multiplied by it before they are rescaled to a forecast, so that small ones do not round to 0
LAST = "last window"
TEXT = (
    "distplb plans on the steps, without a price, of: the last window unchanged; the last two or four windows; the "
    "last window with weights that halve every given number of steps of age; or the last window rescaled to a "
    "forecast, a straight line for every expert through the last window or two. `excess` is the mean imbalance after "
    "the first rebalance, minus 1; the others are ratios to it (below 1 is better than the last window), with their "
    "range over the traces in brackets."
)


def main() -> None:
    """Replay, print, and write the report if requested."""
    options = parsed_options()
    engine = engine_named(options.engine)[0]
    cases = traces.all_cases(options)
    excess = {case.name: excesses(case, options, engine) for case in cases}
    progress("")
    own = {f"--{name}": getattr(options, name) for name in ("every", "candidates", "engine")}
    command = command_line("study.bench_windows", traces.shown_options(options) | own)
    setting = f"A rebalance every {options.every} steps, {options.experts_per_gpu} experts a GPU."
    table = report(excess, {case.name: case.origin for case in cases})
    publish("\n\n".join([header("Which steps to plan on", TEXT, command, engine), setting, table]), options.output)


def parsed_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Which steps to plan on.")
    traces.add_options(parser)
    parser.add_argument("--every", type=int, default=32, metavar="N", help="steps between rebalances")
    parser.add_argument("--candidates", type=int, default=4, metavar="K")
    parser.add_argument("--engine", help="distplb's engine; by default the fastest that is available")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the result to this file as markdown")
    return parser.parse_args()


def excesses(case: Case, options: argparse.Namespace, engine: str) -> dict[str, float]:
    """The mean imbalance minus 1 after the first rebalance, for every choice of steps."""
    planner = partial(planned, topology=case.topology, num_candidates=options.candidates, engine=engine)
    excess = {}
    for name, prepare in choices(options.every).items():
        progress(f"{case.name}: {name}")
        remembering = Remembering(prepare, planner)
        run = replay(case.trace, remembering, topology=case.topology, every=options.every, model=UNTIMED)
        excess[name] = float(run.imbalance[options.every :].mean()) - 1
    return excess


def planned(load: Tensor, current: Placement, **options: object) -> Placement:
    """distplb's plan from the placement in force, without a price."""
    return distplb.plan(load, current=current, **options)


# --- the steps that are planned on ------------------------------------------------------------------------------


def choices(every: int) -> dict[str, Prepare]:
    """The choices by name, the simplest first."""
    prepare: dict[str, Prepare] = {LAST: partial(last_windows, number=1)}
    prepare |= {f"last {number}": partial(last_windows, number=number) for number in (2, 4)}
    prepare |= {f"half-life {every // part}": partial(weighted, half_life=every / part) for part in (2, 4, 8)}
    prepare |= {f"line through {number}": partial(extrapolated, number=number, every=every) for number in (1, 2)}
    return prepare


def last_windows(windows: Windows, number: int) -> Tensor:
    """The last windows, unchanged."""
    return torch.cat(list(windows[-number:]))


def weighted(windows: Windows, half_life: float) -> Tensor:
    """The last window, each step times an integer weight that halves every `half_life` steps of age."""
    load = windows[-1]
    return load * weights(len(load), half_life)[:, None, None]


def weights(steps: int, half_life: float) -> Tensor:
    """`[S]` int64; the last step has WEIGHT.

    >>> weights(3, half_life=1).tolist()
    [64, 128, 256]
    """
    age = torch.arange(steps - 1, -1, -1, dtype=torch.float64)
    return (WEIGHT * 0.5 ** (age / half_life)).round().long()


def extrapolated(windows: Windows, number: int, every: int) -> Tensor:
    """The last window, every expert rescaled to its forecast mean, by a line through the last `number` windows."""
    load = windows[-1]
    mean = forecast(last_windows(windows, number).double(), every)
    factor = mean / load.double().mean(0).clamp(min=1e-300)
    return (FINER * load * factor).round().long()


def forecast(load: Tensor, every: int) -> Tensor:
    """`[L, E]`: the mean over the next `every` steps, by a least-squares line; not below 0.

    >>> forecast(torch.tensor([[[1.0]], [[2.0]], [[3.0]]]), every=1).tolist()
    [[4.0]]
    """
    steps = len(load)
    when = torch.arange(steps, dtype=load.dtype) - (steps - 1) / 2
    slope = torch.einsum("t,tle->le", when, load) / when.square().sum().clamp(min=1)
    return (load.mean(0) + slope * (steps + every) / 2).clamp(min=0)


class Remembering:
    """A planner for `replay` that keeps all windows and plans on the steps that `prepare` returns for them."""

    def __init__(self, prepare: Prepare, planner: Callable[[Tensor, Placement], Placement]) -> None:
        self._prepare, self._planner, self._windows = prepare, planner, list[Tensor]()

    def __call__(self, load: Tensor, current: Placement) -> Placement:
        self._windows.append(load)
        return self._planner(self._prepare(self._windows), current)


# --- text -------------------------------------------------------------------------------------------------------


def report(excess: dict[str, dict[str, float]], origins: dict[str, str]) -> str:
    """A table and its verdict.

    Args:
        excess: the excess by trace, then by choice.
        origins: the origin of each trace.
    """
    names = list(next(iter(excess.values())))
    ratios = {trace: {name: row[name] / row[LAST] for name in names} for trace, row in excess.items()}
    lines = [
        [trace, f"{row[LAST]:.4f}", *(f"{ratios[trace][name]:.3f}" for name in names[1:])]
        for trace, row in excess.items()
    ]
    for origin in dict.fromkeys(origins.values()):
        own = [row for trace, row in ratios.items() if origins[trace] == origin]
        lines.append(
            [f"mean of the {len(own)} {origin}", "", *(spread([row[name] for row in own]) for name in names[1:])]
        )
    table = markdown(["trace", f"{LAST}: excess", *(f"{name}, ÷" for name in names[1:])], lines)
    return f"{table}\n\n{verdict(ratios, origins)}"


def spread(ratios: list[float]) -> str:
    """The mean, with the range in brackets."""
    return f"{statistics.mean(ratios):.3f} [{min(ratios):.2f} – {max(ratios):.2f}]"


def verdict(ratios: dict[str, dict[str, float]], origins: dict[str, str]) -> str:
    """In words: the best choice, and the simplest one that is certainly better than the last window."""
    names = [name for name in next(iter(ratios.values())) if name != LAST]
    of = {name: [row[name] for row in ratios.values()] for name in names}
    best = min(names, key=lambda name: sum(of[name]))
    text = f"Lowest mean over all {len(ratios)} traces: {best}, {with_error(of[best])} of the last window's excess."
    own = [trace for trace in ratios if origins[trace] == "recorded"]
    if own:
        best = min(names, key=lambda name: sum(ratios[trace][name] for trace in own))
        each = ", ".join(f"{ratios[trace][best]:.3f} on {trace}" for trace in own)
        text += f" On the recorded ones: {best}, {each}."
    winners = [name for name in names if statistics.mean(of[name]) + 2 * error(of[name]) < 1]
    rule = "better than the last window by more than two standard errors of the mean over all traces"
    if not winners:
        return f"{text} No choice is {rule}, so the last window stays unchanged."
    return f"{text} The simplest choice that is {rule}: {winners[0]}, {with_error(of[winners[0]])}."


def error(values: list[float]) -> float:
    """The standard error of the mean; infinite for a single value."""
    if len(values) < 2:
        return float("inf")
    return statistics.stdev(values) / math.sqrt(len(values))


def with_error(values: list[float]) -> str:
    """The mean and its standard error."""
    return f"{statistics.mean(values):.3f} ± {error(values):.3f}"


if __name__ == "__main__":
    main()
