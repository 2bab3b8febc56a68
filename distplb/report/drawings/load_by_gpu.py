"""The load of each layer on each GPU, before and after, as two heat maps on one scale.

Shapes: L layers, M GPUs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from distplb.records.events import RebalanceEvent
from distplb.report.drawings.base import ReportFigure, refuse_if_lacking
from distplb.report.drawings.heat_maps import colour_bar, write_numbers
from distplb.report.drawings.style import COLOURS, GREY, WIDE, dress, empty, is_narrow, mark_each, two_axes
from distplb.report.formatting import differing, label, printable, shortened
from distplb.report.run import Run

__all__ = ["LOAD_BY_GPU", "load_by_gpu"]

Ratios = NDArray[np.float64]  # [L, M], tokens of a GPU / mean GPU of the layer; NaN without tokens

_COLOURS = "RdBu_r"  # red: above the mean, blue: below, white: the mean; colour-blind readers can tell red from blue
_MIN_SPAN = 0.1  # of the scale, on each side of 1, so that a difference of 0.01 does not look large
_MIN_CELL = 0.36, 0.17  # inches, width and height of a cell that can hold a number


class _Maps(NamedTuple):
    before: Ratios
    after: Ratios
    titles: tuple[str, str]
    source: str  # the steps that are shown, and whether the plan had seen them


def load_by_gpu(run: Run, width: float = WIDE) -> Figure:
    """Two heat maps `[L, M]`: tokens of each GPU / mean GPU of its layer, before and after, on one scale.

    Lines separate nodes. Cells have numbers if they fit. Layers without tokens are grey.

    Args:
        run: a run with a trace, or with an event that recorded the tokens of the GPUs.
        width: width in inches; below 6.5 the maps are stacked.

    Raises:
        DistplbError: if the run lacks the data.
    """
    refuse_if_lacking(_lacks(run))
    maps = _maps(run)
    layers, gpus = maps.before.shape
    height = min(max(1.0, 0.3 * layers), max(2.2, 0.095 * layers), 9.0)
    stacked = is_narrow(width)
    figure = empty(width, 2 * height + 2.1 if stacked else height + 1.6)
    both = two_axes(figure, stacked, sharex=True, sharey=True)
    norm = _norm(maps)
    pattern, names = differing(run.layers)
    for axes, ratios, title in zip(both, maps[:2], maps.titles, strict=True):
        dress(axes, title, "GPU", f"layer ({label(pattern, 30)})" if pattern else "layer", grid="")
        axes.imshow(ratios, cmap=_colours(), norm=norm, aspect="auto", interpolation="none")
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        mark_each(axes, "y", names, max_ticks=max(2, int(height / 0.2)))
        _separate_nodes(axes, run, gpus)
        cell = (width - 1.3) / (1 if stacked else 2) / gpus, height / layers
        if cell[0] >= _MIN_CELL[0] and cell[1] >= _MIN_CELL[1]:
            texts = np.array([["–" if np.isnan(ratio) else f"{ratio:.2f}" for ratio in row] for row in ratios])
            write_numbers(axes, ratios, texts, ScalarMappable(norm, _colours()))
        axes.label_outer()
    _draw_scale(figure, norm, maps, stacked)
    return figure


def _caption(run: Run) -> str:
    maps = _maps(run)
    layer, gpu = np.unravel_index(np.nanargmax(maps.before), maps.before.shape)
    before, after = (ratios[~np.isnan(ratios[:, 0])].max(1) for ratios in maps[:2])  # [L], of those with tokens
    name = shortened(printable(run.layers[layer]))
    return (
        f"Tokens of each GPU / mean GPU of its layer; {maps.source}. White is the mean; blue GPUs have less work and "
        f"wait for the red ones. Averaged over layers, the busiest GPU had {before.mean():.2f} times the mean before "
        f"and {after.mean():.2f} after; in the most uneven layer it had {before.max():.2f} before (GPU {gpu} of layer "
        f"{name}) and {after.max():.2f} after. Tokens are summed over steps here; single steps are less even, as "
        "“Imbalance over time” shows."
    )


def _lacks(run: Run) -> str:
    if any(_has_gpu_load(event) for event in run.events_with_load) or (run.evaluation and run.evaluation.unseen):
        return ""
    return "No load of GPUs was recorded: pass record=Record(folder) to Rebalancer, and let it rebalance once."


def _has_gpu_load(event: RebalanceEvent) -> bool:
    """Whether an event has tokens of GPUs; earlier versions also recorded windows without any."""
    return any(map(any, event.tokens_of_gpu_before)) and any(map(any, event.tokens_of_gpu_after))


def _maps(run: Run) -> _Maps:
    evaluation = run.evaluation
    unseen = None if evaluation is None or (run.events_with_load and not evaluation.has_moved) else evaluation.unseen
    if unseen is not None:
        second = "planned on the steps before" if unseen.is_replayed else "placement in force"
        return _Maps(
            _ratios(unseen.before),
            _ratios(unseen.after),
            ("Before: experts where they began", f"After: {second}"),
            f"both maps show iterations {unseen.first:,} to {unseen.last:,}, which the plan had not seen",
        )
    with_load = [event for event in run.events_with_load if _has_gpu_load(event)]
    event = next((event for event in reversed(with_load) if event.decision == "moved"), with_load[-1])
    return _Maps(
        _ratios(event.tokens_of_gpu_before),
        _ratios(event.tokens_of_gpu_after),
        ("Before the rebalance", "Under its plan"),
        f"both maps show the window up to iteration {event.iteration:,}, from which the plan was made",
    )


def _ratios(tokens: Any) -> Ratios:
    of_gpu = np.asarray(tokens, dtype=np.float64)
    mean = of_gpu.mean(1, keepdims=True)
    return np.asarray(np.divide(of_gpu, mean, out=np.full_like(of_gpu, np.nan), where=mean > 0))


def _colours() -> Colormap:
    return matplotlib.colormaps[_COLOURS].with_extremes(bad=GREY)


def _norm(maps: _Maps) -> Normalize:
    """A scale with 1 in the middle that reaches the largest deviation of both maps on each side."""
    span = max(_MIN_SPAN, *(float(np.nanmax(np.abs(ratios - 1))) for ratios in maps[:2]))
    return Normalize(1 - span, 1 + span)


def _separate_nodes(axes: Axes, run: Run, gpus: int) -> None:
    assert run.topology is not None, "a run with a load of GPUs has a topology"
    for first in range(run.topology.gpus_per_node, gpus, run.topology.gpus_per_node):
        axes.axvline(first - 0.5, color=COLOURS["black"], linewidth=0.8)


def _draw_scale(figure: Figure, norm: Normalize, maps: _Maps, stacked: bool) -> None:
    """Draw only the part of the scale that occurs: there are no negative loads."""
    colours = ScalarMappable(norm, _colours())
    bar = colour_bar(figure, colours, figure.axes, "tokens / mean GPU of the layer", stacked=stacked, aspect=25)
    ends = min(1 - _MIN_SPAN, *(float(np.nanmin(ratios)) for ratios in maps[:2])), float(norm.vmax or 1)
    (bar.ax.set_xlim if stacked else bar.ax.set_ylim)(*ends)


LOAD_BY_GPU = ReportFigure("Load by layer and GPU", load_by_gpu, _caption, _lacks)
