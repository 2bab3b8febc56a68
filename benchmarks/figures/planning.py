"""The figure of bench_planning: time against imbalance, with every planner and the front."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["MIN_EXCESS", "Panel", "Point", "draw", "front"]

MIN_EXCESS = 1e-5  # lower limit for the logarithmic axis
COLUMNS = 3
MARKERS = "osv^DPX*<>hp"


@dataclass(frozen=True)
class Point:
    """One planner, or one number of candidates of a planner that has any.

    Args:
        planner: what the legend calls it.
        candidates: K; None for planners without candidates.
        milliseconds: median time of a call.
        imbalance: mean over layers and loads.
    """

    planner: str
    candidates: int | None
    milliseconds: float
    imbalance: float


@dataclass(frozen=True)
class Panel:
    """One layout of one data set.

    Args:
        title: title of the panel.
        bound: mean lower bound of the imbalance.
        points: the planners.
    """

    title: str
    bound: float
    points: Sequence[Point]


def front(points: Sequence[Point]) -> list[Point]:
    """The points to which no other is both at least as fast and at least as even, fastest first.

    >>> [point.planner for point in front([Point("a", None, 1, 1.3), Point("b", None, 2, 1.4), Point("c", 1, 3, 1.1)])]
    ['a', 'c']
    """
    found, best = list[Point](), math.inf
    for point in sorted(points, key=lambda point: (point.milliseconds, point.imbalance)):
        if point.imbalance < best:
            found.append(point)
            best = point.imbalance
    return found


def draw(panels: Sequence[Panel], path: Path) -> None:
    """Draw a panel for each layout; a planner has the same colour and marker in all of them.

    Args:
        panels: at least one.
        path: file for the figure; its ending chooses the format.
    """
    import matplotlib.pyplot as plt  # only needed to draw

    columns = min(COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    planners = list(dict.fromkeys(point.planner for panel in panels for point in panel.points))
    styles = {name: style(nth) for nth, name in enumerate(planners)}
    figure, grid = plt.subplots(
        rows, columns, figsize=(4.4 * columns, 3.7 * rows + 0.8), layout="constrained", squeeze=False
    )
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_axis_off()
    for axes, panel in zip(grid.flat, panels, strict=False):
        draw_panel(axes, panel, styles)
    labelled = [pair for axes in grid.flat for pair in zip(*axes.get_legend_handles_labels(), strict=True)]
    handles = {label: handle for handle, label in labelled}
    width = min(4, len(handles))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=width, fontsize="small")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def style(number: int) -> dict[str, str]:
    """Colour and marker of a planner, which are not repeated together."""
    return {"color": f"C{number % 10}", "marker": MARKERS[number % len(MARKERS)]}


def draw_panel(axes: Any, panel: Panel, styles: Mapping[str, dict[str, str]]) -> None:
    """Draw the planners, K beside the points of those that have candidates, the front, and the bound."""
    best = front(panel.points)
    axes.step(
        [point.milliseconds for point in best],
        [excess(point.imbalance) for point in best],
        where="post", color="0.6", lw=1, zorder=1, label="front: nobody is faster and more even",
    )  # fmt: skip
    for name in dict.fromkeys(point.planner for point in panel.points):
        own = [point for point in panel.points if point.planner == name]
        times, uneven = [point.milliseconds for point in own], [excess(point.imbalance) for point in own]
        axes.plot(times, uneven, ls="", ms=6, label=name, **styles[name])
        for nth, (point, x, y) in enumerate(zip(own, times, uneven, strict=True)):
            if point.candidates is not None:  # above and below in turn, because neighbours may be close
                place = (3, -11 if nth % 2 else 5)
                text = f"K={point.candidates}"
                axes.annotate(text, (x, y), xytext=place, textcoords="offset points", fontsize="x-small")
    if panel.bound > 1 + MIN_EXCESS:
        axes.axhline(excess(panel.bound), color="0.3", ls=":", lw=1, label="lower bound")
    axes.set(xscale="log", yscale="log", title=panel.title, xlabel="ms", ylabel="imbalance − 1")
    axes.margins(0.12, 0.15)
    low, high = axes.get_ylim()
    if high < 10 * low:  # such as planners that all end at the bound
        middle = math.sqrt(low * high)
        axes.set_ylim(middle / 5, 5 * middle)
    axes.title.set_fontsize("small")
    axes.grid(alpha=0.3)


def excess(imbalance: float) -> float:
    """Imbalance − 1, at least MIN_EXCESS."""
    return max(imbalance - 1, MIN_EXCESS)
