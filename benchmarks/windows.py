"""Which steps to plan on: the last window as it is, weighted, several windows, or a forecast.

Run by `bench_replay.py --windows`. A window is what was counted between two rebalances.
Shapes: S steps, T steps of a window, L layers, E experts.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from functools import partial

import torch
from tables import markdown
from torch import Tensor

from distplb import Placement

Windows = Sequence[Tensor]  # all so far, each [T, L, E], the last one last
Prepare = Callable[[Windows], Tensor]  # -> [S, L, E], what is planned on

WEIGHT = 256  # of the last step
FINER = 16  # counts are multiplied by it before they are rescaled to a forecast, so that few tokens do not round away
LAST = "last window"


def choices(every: int) -> dict[str, Prepare]:
    """By name, the simplest first."""
    found: dict[str, Prepare] = {LAST: partial(last_windows, number=1)}
    found |= {f"last {number}": partial(last_windows, number=number) for number in (2, 4)}
    found |= {f"half-life {every // part}": partial(favoured, half_life=every / part) for part in (2, 4, 8)}
    found |= {f"line through {number}": partial(extrapolated, number=number, every=every) for number in (1, 2)}
    return found


def last_windows(windows: Windows, number: int) -> Tensor:
    """Several windows as they are."""
    return torch.cat(list(windows[-number:]))


def favoured(windows: Windows, half_life: float) -> Tensor:
    """The last window, each step times an integer weight that halves with so many steps of age."""
    load = windows[-1]
    return load * weights(len(load), half_life)[:, None, None]


def weights(steps: int, half_life: float) -> Tensor:
    """`[S]` int64, of the last step WEIGHT.

    >>> weights(3, half_life=1).tolist()
    [64, 128, 256]
    """
    age = torch.arange(steps - 1, -1, -1, dtype=torch.float64)
    return (WEIGHT * 0.5 ** (age / half_life)).round().long()


def extrapolated(windows: Windows, number: int, every: int) -> Tensor:
    """The last window, every expert rescaled to its forecast mean, by a line through the last `number` windows."""
    load = windows[-1]
    wanted = forecast(last_windows(windows, number).double(), every)
    factor = wanted / load.double().mean(0).clamp(min=1e-300)
    return (FINER * load * factor).round().long()


def forecast(load: Tensor, every: int) -> Tensor:
    """`[L, E]`: the mean over the next `every` steps, by the straight line of least squares; not below 0.

    >>> forecast(torch.tensor([[[1.0]], [[2.0]], [[3.0]]]), every=1).tolist()
    [[4.0]]
    """
    steps = len(load)
    when = torch.arange(steps, dtype=load.dtype) - (steps - 1) / 2
    slope = torch.einsum("t,tle->le", when, load) / when.square().sum().clamp(min=1)
    return (load.mean(0) + slope * (steps + every) / 2).clamp(min=0)


class Remembering:
    """A planner for `replay` that keeps all windows and plans on what `prepare` makes of them."""

    def __init__(self, prepare: Prepare, planner: Callable[[Tensor, Placement], Placement]) -> None:
        self._prepare, self._planner, self._windows = prepare, planner, list[Tensor]()

    def __call__(self, load: Tensor, current: Placement) -> Placement:
        self._windows.append(load)
        return self._planner(self._prepare(self._windows), current)


def report(excess: dict[str, dict[str, float]], origins: dict[str, str]) -> str:
    """A table and its verdict.

    Args:
        excess: by trace, then by choice.
        origins: of each trace.
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
    """Mean, least and most."""
    return f"{mean(ratios):.3f} [{min(ratios):.2f} – {max(ratios):.2f}]"


def verdict(ratios: dict[str, dict[str, float]], origins: dict[str, str]) -> str:
    """In words: what is best, and the simplest that is better than the last window beyond doubt."""
    names = [name for name in next(iter(ratios.values())) if name != LAST]
    of = {name: [row[name] for row in ratios.values()] for name in names}
    best = min(names, key=lambda name: sum(of[name]))
    text = f"Lowest mean over all {len(ratios)} traces: {best}, {with_error(of[best])} of the last window's excess."
    own = [trace for trace in ratios if origins[trace] == "recorded"]
    if own:
        best = min(names, key=lambda name: sum(ratios[trace][name] for trace in own))
        each = ", ".join(f"{ratios[trace][best]:.3f} on {trace}" for trace in own)
        text += f" On the recorded ones: {best}, {each}."
    winners = [name for name in names if mean(of[name]) + 2 * error(of[name]) < 1]
    rule = "better than the last window by more than two standard errors of the mean over all traces"
    if not winners:
        return f"{text} None is {rule}, so the last window as it is stays."
    return f"{text} The simplest that is {rule}: {winners[0]}, {with_error(of[winners[0]])}."


def mean(values: list[float]) -> float:
    """Of a few."""
    return sum(values) / len(values)


def error(values: list[float]) -> float:
    """Of the mean, one standard deviation; without end where there is one value."""
    if len(values) < 2:
        return float("inf")
    return statistics.stdev(values) / math.sqrt(len(values))


def with_error(values: list[float]) -> str:
    """Mean, and one standard error."""
    return f"{mean(values):.3f} ± {error(values):.3f}"
