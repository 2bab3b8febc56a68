"""Shared parts of figures with a bar for each rebalance.

Shapes: R rebalances.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from distplb.report.drawings.base import refuse_if_lacking
from distplb.report.drawings.style import GREY, empty, is_narrow, mark_each, two_axes
from distplb.report.run import Run

__all__ = ["NO_EVENTS", "axes_by_rebalance", "stack"]

NO_EVENTS = (
    "A trace does not record rebalances: pass the folder of Rebalancer(record=...), which also has their events."
)


def axes_by_rebalance(run: Run, width: float) -> tuple[Figure, Sequence[Axes]]:
    """A figure with two axes that have a place for each rebalance, labelled with its iteration.

    Raises:
        DistplbError: if there are no events.
    """
    refuse_if_lacking("" if run.events else NO_EVENTS)
    stacked = is_narrow(width)
    figure = empty(width, 5.2 if stacked else 3.2)
    both = two_axes(figure, stacked)
    for axes in both:
        mark_each(axes, "x", [f"{event.iteration:,}" for event in run.events], max_ticks=5)
        axes.set_xlim(-0.6, max(4, len(run.events)) - 0.4)
    return figure, both


def stack(axes: Axes, parts: Mapping[str, Sequence[float]], colours: Mapping[str, str]) -> list[Any]:
    """Draw stacked bars, from `[R]` values of each part; returns their handles for the legend."""
    at, floor = np.arange(len(next(iter(parts.values())))), np.zeros(len(next(iter(parts.values()))))
    handles = []
    for name, values in parts.items():
        colour = colours.get(name, GREY)
        handles.append(axes.bar(at, values, width=0.8, bottom=floor, color=colour, label=name, linewidth=0))
        floor = floor + np.asarray(values)
    return handles
