"""The hottest expert of each layer over time: how far it is above the mean, and whether it stays the same.

Shapes: S steps, W windows, L layers, E experts.
"""

from __future__ import annotations

from typing import NamedTuple

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from numpy.typing import NDArray

from distplb.records.events import RebalanceEvent
from distplb.records.trace import Trace
from distplb.report.drawings.base import ReportFigure, refuse_if_lacking
from distplb.report.drawings.heat_maps import colour_bar, write_numbers
from distplb.report.drawings.style import COLOURS, GREY, WIDE, dress, empty, is_narrow, mark_each
from distplb.report.formatting import differing, label, percent, printable, shortened
from distplb.report.run import Run

__all__ = ["HOTTEST_EXPERTS", "hottest_experts"]

_COLOURS = "YlOrBr"
_NO_EXPERT = -1  # instead of the hottest expert, if there are no tokens
_MOST_WINDOWS = 24  # into which a trace without events is split
_MIN_HEIGHT = 0.2  # inches of a cell that can hold a number
_DIGIT = 0.085  # inches of its width for each digit, and for the margin on each side


class _Hottest(NamedTuple):
    """The last iteration of each window, `[W]`; the hottest expert of each layer and window and its tokens, `[L, W]`.

    Without tokens, the expert is -1 and its tokens are NaN.
    """

    iterations: list[int]
    expert: NDArray[np.int64]
    times_mean: NDArray[np.float64]
    share: NDArray[np.float64]

    @property
    def changed(self) -> NDArray[np.bool_]:
        """`[L, W - 1]`: whether the expert is another one than in the window before, if both windows have tokens."""
        return np.asarray(np.diff(self.expert, axis=1) != 0) & self.compared

    @property
    def compared(self) -> NDArray[np.bool_]:
        """`[L, W - 1]`: whether both windows have tokens."""
        has_tokens = self.expert != _NO_EXPERT
        return np.asarray(has_tokens[:, 1:] & has_tokens[:, :-1])


def hottest_experts(run: Run, width: float = WIDE) -> Figure:
    """A heat map `[L, W]` of the hottest expert in each layer and window: hottest expert / mean expert, in tokens.

    Cells have the id of the expert if it fits. A line on the left of a cell marks a change from the window before. Grey
    cells have no tokens.

    Args:
        run: a run with events or a trace; events are preferred.
        width: width in inches.

    Raises:
        DistplbError: if the run lacks the data.
    """
    refuse_if_lacking(_lacks(run))
    hottest = _by_window(run)
    layers, windows = hottest.expert.shape
    height = min(max(0.8, 0.26 * layers), max(2.2, 0.095 * layers), 9.0)
    stacked = is_narrow(width)
    figure = empty(width, height + (1.7 if stacked else 1.1))
    axes = figure.subplots()
    pattern, names = differing(run.layers)
    dress(axes, "", "last iteration of the window", f"layer ({label(pattern, 30)})" if pattern else "layer", grid="")
    norm = Normalize(1, max(1.5, float(np.nanmax(hottest.times_mean))))
    colours = ScalarMappable(norm, matplotlib.colormaps[_COLOURS].with_extremes(bad=GREY))
    axes.imshow(hottest.times_mean, cmap=colours.cmap, norm=norm, aspect="auto", interpolation="none")
    mark_each(axes, "x", [f"{iteration:,}" for iteration in hottest.iterations], max_ticks=4 if stacked else 12)
    mark_each(axes, "y", names, max_ticks=max(2, int(height / 0.2)))
    cell = (width - (0.9 if stacked else 1.8)) / windows, height / layers
    if cell[0] >= _DIGIT * (len(str(hottest.expert.max())) + 2) and cell[1] >= _MIN_HEIGHT:
        texts = np.where(hottest.expert == _NO_EXPERT, "–", hottest.expert.astype(str))
        write_numbers(axes, hottest.times_mean, texts, colours)
    _mark_changes(axes, hottest)
    colour_bar(figure, colours, [axes], "tokens / mean expert", stacked=stacked, aspect=20)
    return figure


def _caption(run: Run) -> str:
    hottest = _by_window(run)
    layer, window = np.unravel_index(np.nanargmax(hottest.times_mean), hottest.times_mean.shape)
    text = (
        "Hottest expert / mean expert, in tokens, for each layer and window: the darker, the hotter. The number in a "
        "cell is the id of the expert, shown if it fits. The hottest of all was expert "
        f"{hottest.expert[layer, window]} of layer {shortened(printable(run.layers[layer]))} in the window up to "
        f"iteration {hottest.iterations[window]:,}: {percent(hottest.share[layer, window])} of the layer's tokens, "
        f"{hottest.times_mean[layer, window]:.1f} times the mean expert. "
    )
    if hottest.compared.any():
        stayed = 1 - hottest.changed.sum() / hottest.compared.sum()
        text += (
            f"From one window to the next, a layer's hottest expert stayed the same in {percent(stayed)} of cases; a "
            "line on the left of a cell marks a change. The longer experts stay hot, the longer a plan lasts."
        )
    return text


def _lacks(run: Run) -> str:
    if run.trace_with_tokens is not None or any(_has_hottest(event) for event in run.events_with_load):
        return ""
    return "No load of experts was recorded: pass record=Record(folder) to Rebalancer, and let it rebalance once."


def _has_hottest(event: RebalanceEvent) -> bool:
    has_load = event.num_experts > 0 and any(map(any, event.tokens_of_gpu_before))
    return has_load and bool(event.hottest_experts) and all(event.hottest_experts)


def _by_window(run: Run) -> _Hottest:
    events = [event for event in run.events_with_load if _has_hottest(event)]
    if not events:
        assert run.trace_with_tokens is not None, "a run without events has a trace"
        return _of_trace(run.trace_with_tokens)
    first = np.array([[pairs[0] for pairs in event.hottest_experts] for event in events])  # [W, L, 2]
    tokens = first[..., 1].T.astype(np.float64)
    total = np.array([[sum(row) for row in event.tokens_of_gpu_before] for event in events], dtype=np.float64).T
    share = np.divide(tokens, total, out=np.full_like(tokens, np.nan), where=total > 0)
    experts = np.array([event.num_experts for event in events])
    expert = np.where(np.isnan(share), _NO_EXPERT, first[..., 0].T)
    return _Hottest([event.iteration for event in events], expert, share * experts, share)


def _of_trace(trace: Trace) -> _Hottest:
    """Split the trace into windows with equal numbers of steps."""
    windows = torch.arange(trace.num_steps, device="cpu").tensor_split(min(_MOST_WINDOWS, trace.num_steps))
    load = torch.stack([trace.load[steps].sum(0) for steps in windows], dim=1)  # [L, W, E]
    share = (load.amax(2).double() / load.sum(2)).numpy()  # NaN without tokens
    iterations = [int(trace.iteration[steps[-1]]) for steps in windows]
    expert = np.where(np.isnan(share), _NO_EXPERT, load.argmax(2).numpy())
    return _Hottest(iterations, expert, share * trace.num_experts, share)


def _mark_changes(axes: Axes, hottest: _Hottest) -> None:
    layer, window = hottest.changed.nonzero()
    for colour, thickness in (("white", 3.4), (COLOURS["black"], 1.6)):  # visible on any colour
        axes.vlines(window + 0.5, layer - 0.42, layer + 0.42, color=colour, linewidth=thickness)


HOTTEST_EXPERTS = ReportFigure("Hottest experts", hottest_experts, _caption, _lacks)
