"""The imbalance over iterations: as it was, as it would have been without moves, and the lower bound.

Shapes: S steps, I points in chronological order, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from distplb.core.cost import mean_of_known, mean_of_layers
from distplb.records.events import RebalanceEvent
from distplb.report.drawings.base import ReportFigure, refuse_if_lacking
from distplb.report.drawings.style import COLOURS, FONT, GREY, WIDE, dress, empty, is_narrow, legend_below
from distplb.report.formatting import plural
from distplb.report.run import Run

__all__ = ["IMBALANCE_OVER_TIME", "imbalance_over_time"]

Floats = NDArray[np.float64]

_MAX_POINTS = 500  # of a line; an image cannot show more
_MARKS = {  # by decision, each with its own shape
    "moved": ("v", COLOURS["black"]),
    "kept": ("o", "white"),
    "dry run": ("D", "white"),
    "stopped": ("s", COLOURS["black"]),
    "skipped": ("x", COLOURS["black"]),
}
_OTHER = ("*", "white")


class _Line(NamedTuple):
    """Iterations `[I]`, and the imbalance of each layer there, `[I, L]`.

    A layer without tokens is NaN; a point where all layers are NaN is a gap in the line.
    """

    at: Floats
    layers: Floats

    @property
    def mean(self) -> Floats:
        """`[I]`: the mean over the layers that have tokens."""
        return np.asarray(mean_of_known(torch.from_numpy(self.layers), dim=1))


def imbalance_over_time(run: Run, width: float = WIDE) -> Figure:
    """Busiest GPU / mean GPU by iteration: the mean over layers, in a band from the most even layer to the least even.

    With a trace, each step is shown under the placement in force: the raw values, and a line that is smoothed between
    rebalances. If experts moved, a dashed line shows the same steps with the experts where they began. With events
    only, each window is one level. A dotted line is the lower bound, which no placement can beat. The mark of each
    rebalance shows its decision.

    Args:
        run: a run with a trace, or with an event that recorded the load.
        width: width in inches.

    Raises:
        DistplbError: if the run lacks the data.
    """
    refuse_if_lacking(_lacks(run))
    figure = empty(width, 4.0 if is_narrow(width) else 3.9)
    axes = figure.subplots()
    dress(axes, "", "iteration", "busiest GPU / mean GPU")
    handles = [*_draw_lines(axes, run), *_draw_marks(axes, run.events)]
    axes.xaxis.set_major_locator(MaxNLocator(5 if is_narrow(width) else 10, integer=True))
    axes.xaxis.set_major_formatter(lambda number, _: f"{number:,.0f}")
    axes.margins(x=0.01)
    if run.evaluation is None:
        _clip_first_window(axes, run)
    legend_below(figure, handles, width)
    return figure


def _caption(run: Run) -> str:
    evaluation = run.evaluation
    text = (
        "Busiest GPU / mean GPU, in tokens: 1 is even. The line is the mean over layers; the band extends from the "
        "most even layer to the least even one. "
    )
    if evaluation is None:
        following = mean_of_layers(
            mean_of_layers(event.imbalance_next) for event in run.events_with_load if event.imbalance_next
        )
        text += f"The mean was {mean_of_layers(run.events_with_load[0].imbalance_before):.2f} in the first window"
        text += "" if following is None else f" and {following:.2f} in the windows after a rebalance, under its plan"
    elif evaluation.has_moved:
        moved, unmoved = (
            mean_of_known(imbalance[evaluation.since_move])
            for imbalance in (evaluation.imbalance_in_force, evaluation.imbalance_unmoved)
        )
        text += (
            f"After the first move the line averages {moved:.2f}, on steps that no plan had seen; without moves "
            f"(dashed) it would average {unmoved:.2f}"
        )
    else:
        text += f"The line averages {mean_of_known(evaluation.imbalance_in_force):.2f}"
    bound = torch.from_numpy(_bound(run).layers)
    text += f"; no placement could beat {mean_of_known(bound):.2f} (dotted). "
    if run.events:
        text += f"The marks at the top show {plural(len(run.events), 'rebalance')}: a plan lasts as long as the line "
        text += "stays close to the bound after its mark."
    return text


def _lacks(run: Run) -> str:
    if run.events_with_load or run.evaluation:
        return ""
    return "No load was recorded: pass record=Record(folder) to Rebalancer, and let it rebalance once."


def _draw_lines(axes: Axes, run: Run) -> list[Any]:
    line, raw, unmoved, bound = _measured(run), _raw(run), _unmoved(run), _bound(run)
    handles: list[Any] = []
    if raw is not None:
        axes.plot(raw.at, raw.mean, color=COLOURS["sky"], linewidth=0.6, alpha=0.7)
        handles.append(Line2D([], [], color=COLOURS["sky"], linewidth=0.8, label="each iteration"))
    band: dict[str, Any] = {"color": COLOURS["sky"], "alpha": 0.25, "linewidth": 0}
    handles.append(
        axes.fill_between(
            line.at,
            np.fmin.reduce(line.layers, axis=1),
            np.fmax.reduce(line.layers, axis=1),
            label="range over layers",
            **band,
        )
    )
    named = "mean over layers" + (", smoothed" if raw is not None else ", by window")
    handles += axes.plot(line.at, line.mean, color=COLOURS["blue"], linewidth=1.8, label=named)
    if unmoved is not None:
        style: dict[str, Any] = {"color": COLOURS["vermilion"], "linewidth": 1.4, "linestyle": (0, (5, 2))}
        handles += axes.plot(unmoved.at, unmoved.mean, label="without moves", **style)
    handles += axes.plot(
        bound.at, bound.mean, color=COLOURS["green"], linewidth=1.6, linestyle=":", label="lower bound"
    )
    return handles


def _draw_marks(axes: Axes, events: Sequence[RebalanceEvent]) -> list[Any]:
    """Draw a line and a mark for each rebalance; returns handles for the legend."""
    faint = 0.7 if len(events) <= 40 else 0.15
    handles = []
    for row, decision in enumerate(dict.fromkeys(event.decision for event in events)):
        shape, face = _MARKS.get(decision, _OTHER)
        at = [event.iteration for event in events if event.decision == decision]
        for iteration in at:
            line = "-" if decision == "moved" else ":"
            axes.axvline(iteration, color=GREY, linewidth=0.7, linestyle=line, alpha=faint, zorder=0.5)
        style: dict[str, Any] = {
            "color": COLOURS["black"],
            "markerfacecolor": face,
            "markersize": 5 if len(events) <= 60 else 3,
        }
        name = decision if decision in _MARKS else "another decision"
        height = [1.02 + 0.04 * row] * len(at)
        axes.plot(at, height, shape, transform=axes.get_xaxis_transform(), clip_on=False, **style)
        handles.append(
            Line2D([], [], linestyle="", marker=shape, label=f"rebalance: {name}", **style | {"markersize": 5})
        )
    return handles


def _clip_first_window(axes: Axes, run: Run) -> None:
    """Cut off the window before the first rebalance if it would flatten all others."""
    first, *others = run.events_with_load
    level = mean_of_layers(first.imbalance_before) or 1.0
    maximum = max((one for event in others for one in event.imbalance_before if one is not None), default=1.0)
    if others and level - 1 > 3 * (maximum - 1) > 0:
        axes.set_ylim(1 - 0.05 * (maximum - 1), 1 + 1.2 * (maximum - 1))
        at, top = first.iteration, 1 + 1.12 * (maximum - 1)
        axes.annotate(f" ↑ {level:.2f} at first", (at, top), fontsize=FONT, color=COLOURS["black"])


def _measured(run: Run) -> _Line:
    if run.evaluation is None:
        return _windows(run, "imbalance_before")
    trace = run.evaluation.trace
    return _smooth(trace.iteration.numpy(), run.evaluation.imbalance_in_force.numpy(), trace.placement_of_step.numpy())


def _raw(run: Run) -> _Line | None:
    if run.evaluation is None:
        return None
    return _thinned(run.evaluation.trace.iteration.numpy(), run.evaluation.imbalance_in_force.numpy())


def _unmoved(run: Run) -> _Line | None:
    """The imbalance without moves, from the first move on; before that it is the measured line."""
    evaluation = run.evaluation
    if evaluation is None or not evaluation.has_moved:
        return None
    since_move, trace = evaluation.since_move, evaluation.trace
    parts = trace.placement_of_step[since_move].numpy()
    return _smooth(trace.iteration[since_move].numpy(), evaluation.imbalance_unmoved[since_move].numpy(), parts)


def _bound(run: Run) -> _Line:
    if run.events_with_load or run.evaluation is None:
        return _windows(run, "imbalance_bound")
    steps, bound = run.evaluation.bound
    iterations = run.evaluation.trace.iteration[steps].numpy()
    return _smooth(iterations, bound.numpy(), np.zeros(len(steps)))


def _windows(run: Run, field: str) -> _Line:
    """Each window of the events as a level, and the window after the last event if it is known."""
    at, levels = [], []
    numbers = [event.iteration for event in run.events]
    begins = [max(0, numbers[0] - (run.every or numbers[0])), *numbers]
    for event, begin in zip(run.events, begins, strict=False):
        if run.has_load(event):
            at += [begin, event.iteration]
            levels += [getattr(event, field)] * 2
        else:
            at.append(event.iteration)
            levels.append((np.nan,) * len(run.layers))
    last = run.events_with_load[-1]
    if field == "imbalance_before" and last.imbalance_next and last is run.events[-1]:
        at += [last.iteration, last.iteration + (run.every or last.iteration)]
        levels += [last.imbalance_next] * 2
    return _Line(np.array(at, dtype=np.float64), np.array(levels, dtype=np.float64))


def _thinned(iteration: NDArray[Any], values: NDArray[Any]) -> _Line:
    """One point for each iteration, or for several consecutive ones if there are too many."""
    stride = max(1, -(-int(iteration[-1] - iteration[0] + 1) // _MAX_POINTS))
    _, first, place = np.unique((iteration - iteration[0]) // stride, return_index=True, return_inverse=True)
    is_known = ~np.isnan(values)
    sums, counts = np.zeros((2, len(first), values.shape[1]))
    np.add.at(sums, place, np.where(is_known, values, 0))
    np.add.at(counts, place, is_known)
    middle = np.bincount(place, weights=iteration) / np.bincount(place)
    return _Line(middle, _over(sums, counts))


def _smooth(iteration: NDArray[Any], values: NDArray[Any], part: NDArray[Any]) -> _Line:
    """A moving average within each part, so that a jump between parts stays sharp."""
    cuts = [*(np.flatnonzero(np.diff(part)) + 1), len(part)]
    reach = max(1, (int(iteration[-1] - iteration[0]) // 120))
    lines, begin = [], 0
    for end in cuts:
        line = _thinned(iteration[begin:end], values[begin:end])
        lines.append(_Line(line.at, _moving_average(line.layers, reach)))
        begin = end
    gaps = [np.concatenate([line.layers, np.full((1, values.shape[1]), np.nan)]) for line in lines]
    return _Line(np.concatenate([[*line.at, np.nan] for line in lines]), np.concatenate(gaps))


def _moving_average(values: Floats, reach: int) -> Floats:
    """The mean of the known values in each row and up to `reach` rows on both sides of it."""
    is_known = ~np.isnan(values)
    at = np.arange(len(values))
    low, high = np.maximum(at - reach, 0), np.minimum(at + reach + 1, len(values))
    sums, counts = (
        np.concatenate([np.zeros((1, values.shape[1])), one.cumsum(0)])
        for one in (np.where(is_known, values, 0), is_known)
    )
    return _over(sums[high] - sums[low], counts[high] - counts[low])


def _over(sums: Floats, counts: Floats) -> Floats:
    """The quotient; NaN where the count is 0."""
    return np.asarray(np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0))


IMBALANCE_OVER_TIME = ReportFigure("Imbalance over time", imbalance_over_time, _caption, _lacks)
