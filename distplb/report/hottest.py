"""The hottest expert of every layer over time: how much hotter than the mean, and whether it stays the same one.

Shapes: S steps, W windows, L layers, E experts.
"""

from __future__ import annotations

from typing import Any, NamedTuple

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
from distplb.report.run import Run
from distplb.report.style import COLOURS, FONT, GREY, WIDE, dress, empty, is_narrow, mark_each, write_numbers
from distplb.report.texts import differing, label, percent, printable, shortened

__all__ = ["hottest_experts", "hottest_experts_caption", "hottest_experts_lacks"]

_COLOURS = "YlOrBr"
_NOBODY = -1  # the hottest expert where there are no tokens
_MOST_WINDOWS = 24  # that a trace without events is cut into
_CELL = 0.2  # inches, the least that holds a number in height; in width for each of its digits and on both sides
_DIGIT = 0.085


class _Hottest(NamedTuple):
    """Of each window the last iteration `[W]`; of each window and layer `[L, W]` the expert and its tokens.

    Without tokens, the expert is -1 and its tokens are NaN.
    """

    iterations: list[int]
    expert: NDArray[np.int64]
    times_mean: NDArray[np.float64]
    share: NDArray[np.float64]

    @property
    def changed(self) -> NDArray[np.bool_]:
        """`[L, W - 1]`: whether it is another expert than in the window before, of windows that have tokens."""
        return np.asarray(np.diff(self.expert, axis=1) != 0) & self.compared

    @property
    def compared(self) -> NDArray[np.bool_]:
        """`[L, W - 1]`: whether both windows have tokens."""
        has_tokens = self.expert != _NOBODY
        return np.asarray(has_tokens[:, 1:] & has_tokens[:, :-1])


def hottest_experts(run: Run, width: float = WIDE) -> Figure:
    """A map `[L, W]` of the expert with most tokens in each layer and window: its tokens over the mean expert's.

    The expert's number stands in its cell where it fits; a line on a cell's left side says that it is another expert
    than in the window before. Grey cells have no tokens.

    Args:
        run: with events, or else a trace.
        width: inches.
    """
    found = _found(run)
    layers, windows = found.expert.shape
    height = min(max(0.8, 0.26 * layers), max(2.2, 0.095 * layers), 9.0)
    stacked = is_narrow(width)
    figure = empty(width, height + (1.7 if stacked else 1.1))
    axes = figure.subplots()
    pattern, names = differing(run.layers)
    dress(axes, "", "window up to iteration", f"layer ({label(pattern, 30)})" if pattern else "layer", grid="")
    norm = Normalize(1, max(1.5, float(np.nanmax(found.times_mean))))
    colours = ScalarMappable(norm, matplotlib.colormaps[_COLOURS].with_extremes(bad=GREY))
    axes.imshow(found.times_mean, cmap=colours.cmap, norm=norm, aspect="auto", interpolation="none")
    mark_each(axes, "x", [f"{iteration:,}" for iteration in found.iterations], most=4 if stacked else 12)
    mark_each(axes, "y", names, most=max(2, int(height / 0.2)))
    cell = (width - (0.9 if stacked else 1.8)) / windows, height / layers
    if cell[0] >= _DIGIT * (len(str(found.expert.max())) + 2) and cell[1] >= _CELL:
        texts = np.where(found.expert == _NOBODY, "–", found.expert.astype(str))
        write_numbers(axes, found.times_mean, texts, colours)
    _mark_changes(axes, found)
    where: dict[str, Any] = (
        {"location": "bottom", "shrink": 0.9, "aspect": 30} if stacked else {"location": "right", "aspect": 20}
    )
    bar = figure.colorbar(colours, ax=axes, pad=0.02, **where)
    bar.set_label("tokens / mean expert", fontsize=FONT)
    bar.ax.tick_params(labelsize=FONT)
    bar.outline.set_linewidth(0.4)
    return figure


def hottest_experts_caption(run: Run) -> str:
    """What to see in `hottest_experts`, in numbers."""
    found = _found(run)
    layer, window = np.unravel_index(np.nanargmax(found.times_mean), found.times_mean.shape)
    text = (
        "Each cell is the expert that got most tokens of its layer, by its number where it fits; the darker, the "
        f"hotter. The hottest of all was expert {found.expert[layer, window]} of layer "
        f"{shortened(printable(run.layers[layer]))} up to iteration {found.iterations[window]:,}: "
        f"{percent(found.share[layer, window])} of its layer's tokens, {found.times_mean[layer, window]:.1f} times the "
        "mean expert. "
    )
    if found.compared.any():
        stayed = 1 - found.changed.sum() / found.compared.sum()
        text += (
            f"In {percent(stayed)} of the windows a layer's hottest expert was the one of the window before; a line on "
            "the left of a cell marks a change. Experts that stay hot are what a plan can count on."
        )
    return text


def hottest_experts_lacks(run: Run) -> str:
    """What a run needs for `hottest_experts` and does not have; empty where it has."""
    if run.counted is not None or any(_tells(event) for event in run.known):
        return ""
    return "No experts were counted: pass Rebalancer(record=...) a folder, and let it rebalance once."


def _tells(event: RebalanceEvent) -> bool:
    is_told = event.num_experts and any(map(any, event.tokens_of_gpu_before)) and event.hottest_experts
    return bool(is_told) and all(event.hottest_experts)


def _found(run: Run) -> _Hottest:
    events = [event for event in run.known if _tells(event)]
    if not events:
        assert run.counted is not None, "where there are no events there is a trace"
        return _of_trace(run.counted)
    first = np.array([[pairs[0] for pairs in event.hottest_experts] for event in events])  # [W, L, 2]
    tokens = first[..., 1].T.astype(np.float64)
    total = np.array([[sum(row) for row in event.tokens_of_gpu_before] for event in events], dtype=np.float64).T
    share = np.divide(tokens, total, out=np.full_like(tokens, np.nan), where=total > 0)
    experts = np.array([event.num_experts for event in events])
    expert = np.where(np.isnan(share), _NOBODY, first[..., 0].T)
    return _Hottest([event.iteration for event in events], expert, share * experts, share)


def _of_trace(trace: Trace) -> _Hottest:
    """In windows of as many steps each."""
    windows = torch.arange(trace.num_steps, device="cpu").tensor_split(min(_MOST_WINDOWS, trace.num_steps))
    load = torch.stack([trace.load[steps].sum(0) for steps in windows], dim=1)  # [L, W, E]
    share = (load.amax(2).double() / load.sum(2)).numpy()  # NaN of no tokens
    iterations = [int(trace.iteration[steps[-1]]) for steps in windows]
    expert = np.where(np.isnan(share), _NOBODY, load.argmax(2).numpy())
    return _Hottest(iterations, expert, share * trace.num_experts, share)


def _mark_changes(axes: Axes, found: _Hottest) -> None:
    layer, window = found.changed.nonzero()
    for colour, thickness in (("white", 3.4), (COLOURS["black"], 1.6)):  # to be seen on any cell
        axes.vlines(window + 0.5, layer - 0.42, layer + 0.42, color=colour, linewidth=thickness)
