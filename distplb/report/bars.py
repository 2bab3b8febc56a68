"""What rebalances moved, and where their time went: bars, one for each rebalance.

Shapes: R rebalances.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from distplb.report.run import Run
from distplb.report.style import COLOURS, FONT, GREY, WIDE, dress, empty, is_narrow, legend_below, mark_each, panels
from distplb.report.texts import amount, percent, plural, seconds, unit_of

__all__ = [
    "moves_by_rebalance",
    "moves_by_rebalance_caption",
    "moves_by_rebalance_lacks",
    "seconds_by_stage",
    "seconds_by_stage_caption",
    "seconds_by_stage_lacks",
]

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


def moves_by_rebalance(run: Run, width: float = WIDE) -> Figure:
    """Two rows or columns of bars, one for each rebalance: slots moved, and bytes moved inside nodes and between them.

    Args:
        run: with events.
        width: inches.
    """
    figure, (slots, sizes) = _two_panels(run, width)
    dress(slots, "Slots that got another expert", "rebalance at iteration", "slots, all layers")
    _stack(slots, {"slots": [event.slots_moved for event in run.events]}, {"slots": COLOURS["blue"]})
    slots.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    parts = {
        "inside nodes": [event.bytes_inside for event in run.events],
        "between nodes": [event.bytes_between for event in run.events],
    }
    number, unit = unit_of(max(map(sum, zip(*parts.values(), strict=True))), "B")
    dress(sizes, "What crossed from GPU to GPU", "rebalance at iteration", f"{unit}, all GPUs")
    scaled = {where: [size / number for size in values] for where, values in parts.items()}
    handles = _stack(sizes, scaled, {"inside nodes": COLOURS["sky"], "between nodes": COLOURS["vermilion"]})
    legend_below(figure, handles, width)
    return figure


def moves_by_rebalance_caption(run: Run) -> str:
    """What to see in `moves_by_rebalance`, in numbers."""
    slots = [event.slots_moved for event in run.events]
    inside, between = (sum(getattr(event, f"bytes_{where}") for event in run.events) for where in ("inside", "between"))
    rest = f", {np.mean(slots[1:]):.0f} on average by each later one" if len(slots) > 1 else ""
    return (
        f"{plural(sum(slots), 'slot')} got another expert: {slots[0]:,} by the first rebalance{rest}. "
        f"{amount(inside, 'B')} crossed inside nodes, {amount(between, 'B')} between them. Where the load is steady, "
        "later rebalances move little; bars that stay high mean that experts chase a load that does not hold still."
    )


def moves_by_rebalance_lacks(run: Run) -> str:
    """What a run needs for `moves_by_rebalance` and does not have; empty where it has."""
    if not run.events:
        return _NO_EVENTS
    if any(event.slots_moved for event in run.events):
        return ""
    if any(event.decision == "dry run" for event in run.events):
        return "Nothing was moved, because this was asked for: leave out dry_run=True."
    return "No rebalance moved anything: the table at the end has the reasons."


def seconds_by_stage(run: Run, width: float = WIDE) -> Figure:
    """Stacked bars: seconds of each rebalance by stage, on rank 0; and where known the median iteration around it.

    Args:
        run: with events.
        width: inches.
    """
    figure, (stages, iterations) = _two_panels(run, width)
    dress(stages, "A rebalance, by stage", "rebalance at iteration", "seconds")
    handles = _stack(stages, _seconds(run), {stage: COLOURS[colour] for stage, colour in _STAGES.items()})
    _cut_the_first(stages, [sum(event.seconds.values()) for event in run.events])
    dress(iterations, "The median iteration", "rebalance at iteration", "seconds")
    handles += _iterations(iterations, run)
    legend_below(figure, handles, width)
    return figure


def seconds_by_stage_caption(run: Run) -> str:
    """What to see in `seconds_by_stage`, in numbers."""
    totals = [sum(event.seconds.values()) for event in run.events]
    parts = {stage: sum(values) for stage, values in _seconds(run).items()}
    longest = max(parts, key=lambda stage: parts[stage])
    text = (
        f"{plural(len(totals), 'rebalance')} took {seconds(sum(totals))} on rank 0, the median one "
        f"{seconds(float(np.median(totals)))}; {percent(parts[longest] / max(sum(totals), 1e-12))} of it in the stage "
        f"“{longest}”. The first one also compiles and measures what later ones use."
    )
    timed = [event for event in run.events if event.iteration_seconds and event.iteration_seconds_next]
    if timed:
        text += (
            f" The median iteration took {seconds(timed[0].iteration_seconds)} before the first rebalance and "
            f"{seconds(timed[-1].iteration_seconds_next or 0)} after the last one: where filled dots lie below hollow "
            "ones, iterations became faster (that axis does not begin at 0)."
        )
    return text


def seconds_by_stage_lacks(run: Run) -> str:
    """What a run needs for `seconds_by_stage` and does not have; empty where it has."""
    if not run.events:
        return _NO_EVENTS
    return "" if any(event.seconds for event in run.events) else "The events have no seconds by stage."


_NO_EVENTS = "A trace knows no rebalances: report on the folder of Rebalancer(record=...), which has their events too."


def _two_panels(run: Run, width: float) -> tuple[Figure, Sequence[Axes]]:
    stacked = is_narrow(width)
    figure = empty(width, 5.2 if stacked else 3.2)
    both = panels(figure, 2, stacked)
    for axes in both:
        mark_each(axes, "x", [f"{event.iteration:,}" for event in run.events], most=5)
        axes.set_xlim(-0.6, max(4, len(run.events)) - 0.4)
    return figure, both


def _stack(axes: Axes, parts: Mapping[str, Sequence[float]], colours: Mapping[str, str]) -> list[Any]:
    """Bars on top of each other; what the legend has to say of them."""
    at, floor = np.arange(len(next(iter(parts.values())))), np.zeros(len(next(iter(parts.values()))))
    handles = []
    for name, values in parts.items():
        colour = colours.get(name, GREY)
        handles.append(axes.bar(at, values, width=0.8, bottom=floor, color=colour, label=name, linewidth=0))
        floor = floor + np.asarray(values)
    return handles


def _cut_the_first(axes: Axes, totals: Sequence[float]) -> None:
    """Where the first bar alone would make all others flat, it leaves the axes, and its height is written there."""
    later = max(totals[1:], default=0.0)
    if later > 0 and totals[0] > 3 * later:
        axes.set_ylim(0, 1.25 * later)
        axes.annotate(f"↑ {seconds(totals[0])}", (0.55, 1.16 * later), fontsize=FONT, color=COLOURS["black"])


def _seconds(run: Run) -> dict[str, list[float]]:
    """`[R]` by stage, in the order of a rebalance; names that are none of ours together."""
    known = {stage: [event.seconds.get(stage, 0.0) for event in run.events] for stage in _STAGES}
    known["other"] = [sum(value for stage, value in e.seconds.items() if stage not in _STAGES) for e in run.events]
    return {stage: values for stage, values in known.items() if any(values)} or {"count": [0.0] * len(run.events)}


def _iterations(axes: Axes, run: Run) -> list[Any]:
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
    told = [(at, event.iteration_seconds_next) for at, event in timed if event.iteration_seconds_next]
    axes.plot([at for at, _ in told], [after for _, after in told], marker="o", **filled)
    return [
        Line2D([], [], marker="o", label="iteration before", **hollow),
        Line2D([], [], marker="o", label="iteration after", **filled),
    ]
