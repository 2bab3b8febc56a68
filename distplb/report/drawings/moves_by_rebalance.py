"""The slots and bytes that each rebalance moved."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from distplb.report.drawings.bars import NO_EVENTS, axes_by_rebalance, stack
from distplb.report.drawings.base import ReportFigure
from distplb.report.drawings.style import COLOURS, WIDE, dress, legend_below
from distplb.report.formatting import amount, plural, unit_of
from distplb.report.run import Run

__all__ = ["MOVES_BY_REBALANCE", "moves_by_rebalance"]


def moves_by_rebalance(run: Run, width: float = WIDE) -> Figure:
    """Two bar charts with a bar for each rebalance: slots moved, and bytes moved inside nodes and between nodes.

    Args:
        run: a run with events.
        width: width in inches.

    Raises:
        DistplbError: if there are no events.
    """
    figure, (slots, sizes) = axes_by_rebalance(run, width)
    dress(slots, "Slots that received another expert", "rebalance at iteration", "slots, all layers")
    stack(slots, {"slots": [event.slots_moved for event in run.events]}, {"slots": COLOURS["blue"]})
    slots.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    parts = {
        "inside nodes": [event.bytes_inside for event in run.events],
        "between nodes": [event.bytes_between for event in run.events],
    }
    number, unit = unit_of(max(map(sum, zip(*parts.values(), strict=True))), "B")
    dress(sizes, "Bytes sent from GPU to GPU", "rebalance at iteration", f"{unit}, all GPUs")
    scaled = {where: [size / number for size in values] for where, values in parts.items()}
    handles = stack(sizes, scaled, {"inside nodes": COLOURS["sky"], "between nodes": COLOURS["vermilion"]})
    legend_below(figure, handles, width)
    return figure


def _caption(run: Run) -> str:
    slots = [event.slots_moved for event in run.events]
    inside, between = (sum(getattr(event, f"bytes_{where}") for event in run.events) for where in ("inside", "between"))
    rest = f", {np.mean(slots[1:]):.0f} on average in each later one" if len(slots) > 1 else ""
    return (
        f"{plural(sum(slots), 'slot')} received another expert: {slots[0]:,} in the first rebalance{rest}. GPUs sent "
        f"{amount(inside, 'B')} inside nodes and {amount(between, 'B')} between nodes. If the load is steady, later "
        "rebalances move little; if the bars stay high, the load changes faster than plans can follow."
    )


def _lacks(run: Run) -> str:
    if not run.events:
        return NO_EVENTS
    if any(event.slots_moved for event in run.events):
        return ""
    if any(event.decision == "dry run" for event in run.events):
        return "Nothing was moved, because this was a dry run: leave out dry_run=True."
    return "No rebalance moved anything: the table of all rebalances gives the reasons."


MOVES_BY_REBALANCE = ReportFigure("Moves by rebalance", moves_by_rebalance, _caption, _lacks)
