"""The imbalance of every sampled step and layer, at home and with replicas.

Shapes: S sampled steps, N pairs of a sampled step and a layer, I points of a line.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, MaxNLocator
from numpy.typing import NDArray

from distplb.report.drawings.base import ReportFigure, refuse_if_lacking
from distplb.report.drawings.style import COLOURS, FONT, GREY, WIDE, dress, empty, is_narrow, legend_below
from distplb.report.formatting import plural, printable, shortened
from distplb.report.run import Run
from distplb.report.sampled_steps import SampledSteps, mean_of

__all__ = ["EVERY_SAMPLED_STEP", "NO_STEPS", "every_sampled_step"]

Floats = NDArray[np.float64]

NO_STEPS = 'No single step was recorded: pass on_event=EventLog("run/steps.jsonl") to StepBalancer, on rank 0.'
_EVENEST = 1e-3  # excess at the foot of the axis: what is more even is drawn there
_TICKS = (1.002, 1.005, 1.01, 1.02, 1.05, 1.1, 1.2, 1.5, 2, 3, 5, 10, 20, 50, 100, 1000)
_MAX_POINTS = 240  # of a line; an image cannot show more
_MANY = 1500  # dots, which are drawn as pixels, faint and small


def every_sampled_step(run: Run, width: float = WIDE) -> Figure:
    """Busiest GPU / mean GPU of each layer in each sampled step, at home and with replicas, and its lower bound.

    The axis is logarithmic in the excess above 1, because that is what others wait for. Each dot is one layer in one
    step; the lines are means over layers. Rings mark the worst of each colour. Lines across mark resumed jobs.

    Args:
        run: a run with sampled steps.
        width: width in inches.

    Raises:
        DistplbError: if the run lacks the data.
    """
    refuse_if_lacking(_lacks(run))
    steps = run.sampled
    assert steps is not None, "a run that lacks nothing has steps"
    figure = empty(width, 4.2)
    axes = figure.subplots()
    dress(axes, "", "step", "busiest GPU / mean GPU")
    handles = []
    for name, levels, of_step, colour, mark in _series(steps):
        handles.append(_draw(axes, steps, (levels, of_step), colour, mark))
        handles[-1].set_label(name)
    bound = _line(steps.at, steps.by_step[2])
    style: dict[str, Any] = {"color": COLOURS["green"], "linewidth": 1.8, "linestyle": ":"}
    handles += axes.plot(bound[0], _height(bound[1]), label="lower bound", **style)
    for first in steps.resumed_at:
        axes.axvline(first, color=GREY, linewidth=0.7, zorder=0.5)
    if steps.resumed_at:
        handles.append(Line2D([], [], color=GREY, linewidth=0.7, label="job resumed"))
    _dress_axis(axes, steps, width)
    legend_below(figure, handles, width)
    return figure


def _caption(run: Run) -> str:
    steps = run.sampled
    assert steps is not None, "a run without steps has no caption"
    text = (
        "Busiest GPU / mean GPU, in tokens, of each layer in each sampled step (dots), and the mean over layers "
        "(lines): if every token were computed at home, and with the replicas of this step. All other GPUs wait for "
        "the excess above 1, so the axis stretches it, down to "
        f"{1 + _EVENEST:.3f}; what is more even is drawn there. "
    )
    sentences = []
    for words, levels in (("At home", steps.before), ("With replicas", steps.after)):
        worst = _worst(steps, levels)
        sentences += [f"{words} the mean was {mean_of(levels):.3f} and the worst {worst}. "] if worst else []
    text += "".join(sentences)
    bound = mean_of(steps.bound)
    if bound is not None:
        text += f"No split with these replica slots could beat {bound:.3f} on average (dotted). "
    if steps.resumed_at:
        text += f"The job was resumed {plural(len(steps.resumed_at), 'time')} (grey lines); steps go on counting."
    return text


def _lacks(run: Run) -> str:
    if run.sampled is None:
        return NO_STEPS
    return "" if len(run.sampled.step) else "The sampled steps have no tokens in any layer: train for longer."


def _series(steps: SampledSteps) -> list[tuple[str, Floats, Floats, str, str]]:
    """Name, `[N]` levels, `[S]` means, colour and shape of both series; those that were not recorded are left out."""
    both = [
        ("at home", steps.before, steps.by_step[0], COLOURS["vermilion"], "o"),
        ("with replicas", steps.after, steps.by_step[1], COLOURS["blue"], "s"),
    ]
    return [one for one in both if not np.isnan(one[1]).all()]


def _draw(axes: Axes, steps: SampledSteps, levels: tuple[Floats, Floats], colour: str, mark: str) -> Line2D:
    """Draw dots, mean and worst of one series; returns the handle for the legend."""
    each, of_step = levels
    many = len(each) > _MANY
    faint = min(0.55, max(0.06, 600 / max(1, len(each)))) if many else 0.55
    dots: dict[str, Any] = {"color": colour, "markersize": 1.6 if many else 3.2, "markeredgewidth": 0}
    axes.plot(steps.at[steps.step], _height(each), mark, alpha=faint, rasterized=many, **dots)
    line = _line(steps.at, of_step)
    axes.plot(line[0], _height(line[1]), color="white", linewidth=3.2, alpha=0.8)  # visible above many dots
    axes.plot(line[0], _height(line[1]), color=colour, linewidth=1.6, marker=mark if len(line[0]) == 1 else "")
    worst = int(np.nanargmax(each))
    at = steps.at[steps.step[worst]], _height(each[worst : worst + 1])[0]
    axes.plot(*at, mark, color=colour, markerfacecolor="none", markersize=9, markeredgewidth=1.4)
    axes.annotate(
        f"worst {each[worst]:.3f}",
        at,
        xytext=(0, 8),
        textcoords="offset points",
        fontsize=FONT,
        ha=_side(at[0], steps.at),
        color=COLOURS["black"],
        bbox={"facecolor": "white", "alpha": 0.8, "linewidth": 0, "pad": 0.8},
    )
    return Line2D([], [], color=colour, linewidth=1.6, marker=mark, markersize=4)


def _side(at: float, all_steps: Floats) -> str:
    """Where a text has room: to the right of a mark in the left quarter, to the left in the right quarter."""
    share = (at - all_steps[0]) / max(1.0, float(all_steps[-1] - all_steps[0]))
    return "left" if share < 0.25 else "right" if share > 0.75 else "center"


def _height(levels: Floats) -> Floats:
    """Where an imbalance is drawn: the logarithm of its excess."""
    return np.asarray(np.log10(np.maximum(levels - 1, _EVENEST)))


def _line(at: Floats, means: Floats) -> tuple[Floats, Floats]:
    """A line through the known means, of several steps each if there are many."""
    known = ~np.isnan(means)
    at, means = at[known], means[known]
    parts = min(len(at), _MAX_POINTS)
    if not parts:
        return at, means
    return tuple(np.array([part.mean() for part in np.array_split(one, parts)]) for one in (at, means))  # type: ignore[return-value]


def _dress_axis(axes: Axes, steps: SampledSteps, width: float) -> None:
    """Label the heights with the imbalances that they stand for."""
    top = max(1.1, *(float(np.nanmax(levels)) for _, levels, *_ in _series(steps)))
    ticks = [tick for tick in _TICKS if tick <= top * 1.05]
    heights = _height(np.array([1 + _EVENEST, *ticks]))
    axes.yaxis.set_major_locator(FixedLocator(heights.tolist()))
    axes.set_yticks(heights.tolist(), [f"≤ {1 + _EVENEST:.3f}", *(f"{tick:g}" for tick in ticks)])
    axes.set_ylim(np.log10(_EVENEST) - 0.08, max(np.log10(top - 1) + 0.3, -0.9))
    axes.xaxis.set_major_locator(MaxNLocator(4 if is_narrow(width) else 10, integer=True))
    axes.xaxis.set_major_formatter(lambda number, _: f"{number:,.0f}")
    axes.margins(x=0.02)


def _worst(steps: SampledSteps, levels: Floats) -> str:
    """The worst level with its step and layer, in words; empty if none was recorded."""
    if np.isnan(levels).all():
        return ""
    worst = int(np.nanargmax(levels))
    layer = shortened(printable(steps.layers[steps.layer[worst]]))
    return f"{levels[worst]:.3f} (step {steps.at[steps.step[worst]]:,.0f}, layer {layer})"


EVERY_SAMPLED_STEP = ReportFigure("Every sampled step", every_sampled_step, _caption, _lacks)
