"""The time that other intervals between rebalances would have saved on the trace, and the slots moved."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from distplb.report.drawings.base import ReportFigure
from distplb.report.drawings.style import COLOURS, FONT, GREY, WIDE, dress, empty, is_narrow, two_axes
from distplb.report.formatting import percent, plural
from distplb.report.run import Run
from distplb.study.what_if import WhatIf

__all__ = ["OTHER_INTERVALS", "other_intervals"]


def other_intervals(run: Run, width: float = WIDE) -> Figure:
    """Two charts by interval in iterations: the modelled time saved, and the slots moved.

    The time saved is a share of the time without rebalancing, with its 95 % confidence interval; a hollow dot means
    that there are too few rebalances for one.

    Args:
        run: a run with `what_if`.
        width: width in inches.
    """
    stacked = is_narrow(width)
    figure = empty(width, 5.0 if stacked else 3.0)
    saved, moved = two_axes(figure, stacked)
    names = [f"{one.every:,}" + ("\n(as run)" if one.every == run.every else "") for one in run.what_if]
    dress(
        saved,
        "Modelled time saved, moves included",
        "iterations between rebalances",
        "relative to no rebalancing",
    )
    _draw_saved(saved, run.what_if)
    dress(moved, "Slots that would have moved", "iterations between rebalances", "slots, all layers")
    bars = moved.bar(range(len(names)), [one.slots_moved for one in run.what_if], width=0.6, color=COLOURS["blue"])
    moved.bar_label(bars, [f"{one.slots_moved:,}" for one in run.what_if], fontsize=FONT, padding=1)
    moved.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    moved.margins(y=0.12)
    for axes in (saved, moved):
        axes.set_xticks(range(len(names)), names)
        axes.set_xlim(-0.6, max(3, len(names)) - 0.4)
    return figure


def _caption(run: Run) -> str:
    best = max(run.what_if, key=lambda one: one.saved)
    text = (
        "The recorded steps, rebalanced at other intervals, compared with experts that stay in contiguous order. Each "
        "plan is judged on steps that it had not seen, by modelled seconds of the busiest GPU and of the moves. "
        "Vertical lines are 95 % confidence intervals; a hollow dot has too few rebalances for one. "
    )
    text += f"Costs: {run.costs}. " if run.costs else ""
    if best.saved <= 0:
        return text + "No interval that was tried saves time: leave the experts where they begin."
    text += f"Rebalancing every {plural(best.every, 'iteration')} saves most, {percent(best.saved)}, "
    text += f"with {plural(best.slots_moved, 'slot')} moved and an imbalance of {best.imbalance:.2f}. "
    if best.low is None or best.high is None:
        return text + "There are too few rebalances to rule out chance."
    text += f"The 95 % confidence interval is {percent(best.low)} to {percent(best.high)}"
    return text + (", so this may be chance." if best.low <= 0 else ".")


def _lacks(run: Run) -> str:
    if run.what_if:
        return ""
    if run.trace is None:
        return (
            "Other intervals are tried on recorded steps: pass record=Record(folder) to Rebalancer, and report on it."
        )
    return (
        "Other intervals were not tried: the trace has too few iterations or no tokens, or its experts cannot be "
        "spread evenly over the GPUs. Record for longer, or pass the topology."
    )


def _draw_saved(axes: Axes, trials: Sequence[WhatIf]) -> None:
    """Draw a dot with its interval, or a hollow dot if there are too few rebalances for an interval."""
    axes.axhline(0, color=GREY, linewidth=1)
    for at, one in enumerate(trials):
        face = "white"
        if one.low is not None and one.high is not None:
            face = COLOURS["blue"]
            axes.plot([at, at], [one.low, one.high], color=COLOURS["blue"], linewidth=2.2, solid_capstyle="round")
        axes.plot(at, one.saved, "o", color=COLOURS["blue"], markerfacecolor=face, markersize=7)
        top = one.saved if one.high is None else one.high
        axes.annotate(
            percent(one.saved), (at, top), xytext=(0, 6), textcoords="offset points", ha="center", fontsize=FONT
        )
    axes.yaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
    axes.margins(y=0.15)


OTHER_INTERVALS = ReportFigure("Other intervals", other_intervals, _caption, _lacks)
