"""The time that each rebalance took, by stage, and the time of iterations before and after it.

Shapes: R rebalances.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from distplb.report.drawings.bars import NO_EVENTS, axes_by_rebalance, stack
from distplb.report.drawings.base import ReportFigure
from distplb.report.drawings.style import COLOURS, FONT, GREY, WIDE, dress, legend_below
from distplb.report.formatting import percent, plural, seconds
from distplb.report.run import Run

__all__ = ["SECONDS_BY_STAGE", "seconds_by_stage"]

_STAGES = {
    "count": "black",
    "search": "blue",
    "choose": "yellow",
    "polish": "sky",
    "share": "orange",
    "wait": "purple",
    "move": "vermilion",
    "verify": "green",
}


def seconds_by_stage(run: Run, width: float = WIDE) -> Figure:
    """Stacked bars of each rebalance's seconds by stage, on rank 0, and the median iteration before and after it.

    Args:
        run: a run with events.
        width: width in inches.

    Raises:
        DistplbError: if there are no events.
    """
    figure, (stages, iterations) = axes_by_rebalance(run, width)
    dress(stages, "Time of a rebalance, by stage", "rebalance at iteration", "seconds")
    handles = stack(stages, _seconds_of_stages(run), {stage: COLOURS[colour] for stage, colour in _STAGES.items()})
    _clip_first_bar(stages, [sum(event.seconds.values()) for event in run.events])
    dress(iterations, "Median iteration", "rebalance at iteration", "seconds")
    handles += _draw_iterations(iterations, run)
    legend_below(figure, handles, width)
    return figure


def _caption(run: Run) -> str:
    totals = [sum(event.seconds.values()) for event in run.events]
    parts = {stage: sum(values) for stage, values in _seconds_of_stages(run).items()}
    longest = max(parts, key=lambda stage: parts[stage])
    text = (
        f"{plural(len(totals), 'rebalance')} took {seconds(sum(totals))} on rank 0, the median one "
        f"{seconds(float(np.median(totals)))}; the longest stage, “{longest}”, took "
        f"{percent(parts[longest] / max(sum(totals), 1e-12))} of the total. The first rebalance also compiles and "
        "measures for the later ones."
    )
    timed = [event for event in run.events if event.iteration_seconds and event.iteration_seconds_next]
    if timed:
        text += (
            f" The median iteration took {seconds(timed[0].iteration_seconds)} before the first rebalance and "
            f"{seconds(timed[-1].iteration_seconds_next or 0)} after the last one. Where a filled dot is below the "
            "hollow one, iterations became faster; the axis of these dots does not start at 0."
        )
    return text


def _lacks(run: Run) -> str:
    if not run.events:
        return NO_EVENTS
    return "" if any(event.seconds for event in run.events) else "The events have no times by stage."


def _clip_first_bar(axes: Axes, totals: Sequence[float]) -> None:
    """Cut off the first bar if it would flatten all others, and write its height next to it."""
    later = max(totals[1:], default=0.0)
    if later > 0 and totals[0] > 3 * later:
        axes.set_ylim(0, 1.25 * later)
        axes.annotate(f"↑ {seconds(totals[0])}", (0.55, 1.16 * later), fontsize=FONT, color=COLOURS["black"])


def _seconds_of_stages(run: Run) -> dict[str, list[float]]:
    """`[R]` seconds by stage, in the order of a rebalance; stages with other names are summed as "other"."""
    parts = {stage: [event.seconds.get(stage, 0.0) for event in run.events] for stage in _STAGES}
    parts["other"] = [sum(value for stage, value in e.seconds.items() if stage not in _STAGES) for e in run.events]
    return {stage: values for stage, values in parts.items() if any(values)} or {"count": [0.0] * len(run.events)}


def _draw_iterations(axes: Axes, run: Run) -> list[Any]:
    timed = [(at, event) for at, event in enumerate(run.events) if event.iteration_seconds]
    if not timed:
        axes.text(0.5, 0.5, "no iteration was timed", transform=axes.transAxes, ha="center", color=GREY)
        return []
    size = 5 if len(timed) <= 60 else 3
    for at, event in timed:
        after = event.iteration_seconds_next
        axes.plot([at, at], [event.iteration_seconds, after or event.iteration_seconds], color=GREY, linewidth=1)
    hollow: dict[str, Any] = {
        "color": COLOURS["black"],
        "markerfacecolor": "white",
        "markersize": size,
        "linestyle": "",
    }
    filled = hollow | {"markerfacecolor": COLOURS["black"]}
    axes.plot([at for at, _ in timed], [event.iteration_seconds for _, event in timed], marker="o", **hollow)
    timed_next = [(at, event.iteration_seconds_next) for at, event in timed if event.iteration_seconds_next]
    axes.plot([at for at, _ in timed_next], [after for _, after in timed_next], marker="o", **filled)
    return [
        Line2D([], [], marker="o", label="iteration before", **hollow),
        Line2D([], [], marker="o", label="iteration after", **filled),
    ]


SECONDS_BY_STAGE = ReportFigure("Time by stage", seconds_by_stage, _caption, _lacks)
