"""The look of all figures: sizes, colours that colour-blind readers can tell apart, and the frame of the axes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator

from distplb.report.formatting import label

__all__ = [
    "COLOURS",
    "FONT",
    "GREY",
    "NARROW",
    "WIDE",
    "dress",
    "empty",
    "is_narrow",
    "legend_below",
    "mark_each",
    "two_axes",
]

WIDE, NARROW = 10.0, 3.75  # inches: a laptop's column and a phone's, at 96 pixels an inch
FONT = 8.6  # points: 11.5 pixels on a screen
# Okabe and Ito, Color Universal Design, 2008.
COLOURS = {
    "blue": "#0072B2",
    "orange": "#E69F00",
    "green": "#009E73",
    "vermilion": "#D55E00",
    "sky": "#56B4E9",
    "purple": "#CC79A7",
    "yellow": "#F0E442",
    "black": "#222222",
}
GREY = "#767676"
_LINES = "#dddddd"


def is_narrow(width: float) -> bool:
    """Whether a figure is too narrow for two axes side by side."""
    return width < 6.5


def empty(width: float, height: float) -> Figure:
    """A figure without axes, with its size in inches, not registered with pyplot."""
    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def two_axes(figure: Figure, stacked: bool, **options: Any) -> list[Axes]:
    """Two axes, side by side or stacked."""
    shape = (2, 1) if stacked else (1, 2)
    return list(figure.subplots(*shape, squeeze=False, **options).flat)


def dress(axes: Axes, title: str = "", x: str = "", y: str = "", grid: str = "y") -> None:
    """Set title, labels and grid lines in the report's sizes and colours."""
    axes.set_title(title, fontsize=FONT + 0.6, fontweight="bold", loc="left", color=COLOURS["black"])
    axes.set_xlabel(x, fontsize=FONT, color=COLOURS["black"])
    axes.set_ylabel(y, fontsize=FONT, color=COLOURS["black"])
    axes.tick_params(labelsize=FONT, colors=COLOURS["black"], width=0.6, length=3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set(linewidth=0.6, color=GREY)
    if grid:
        axes.grid(axis=grid, color=_LINES, linewidth=0.6)  # type: ignore[arg-type]
    axes.set_axisbelow(True)


def legend_below(figure: Figure, handles: Sequence[Any], width: float) -> None:
    """Add one legend for the whole figure, below it."""
    rows = -(-len(handles) // (2 if is_narrow(width) else 6))
    figure.legend(
        handles=list(handles),
        loc="outside lower center",
        ncols=-(-len(handles) // rows),
        fontsize=FONT,
        frameon=False,
        handlelength=1.6,
        columnspacing=0.9 if is_narrow(width) else 1.4,
        borderpad=0,
    )


def mark_each(axes: Axes, along: str, names: Sequence[str], max_ticks: int) -> None:
    """Set ticks 0, 1, ... with names, thinned evenly to at most `max_ticks`."""
    axis = axes.xaxis if along == "x" else axes.yaxis
    if len(names) <= max_ticks:
        places = list(range(len(names)))
    else:
        places = [int(place) for place in MaxNLocator(max_ticks, integer=True).tick_values(0, len(names) - 1)]
        places = [place for place in places if 0 <= place < len(names)]
    axis.set_major_locator(FixedLocator(places))
    axis.set_ticks(places, [label(names[place], 14) for place in places])
