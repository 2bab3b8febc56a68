"""Which experts had replicas, and on which GPUs.

Shapes: X experts that are shown, M GPUs, G slots on a GPU.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from distplb.records.step_event import StepEvent
from distplb.report.drawings.base import ReportFigure, refuse_if_lacking
from distplb.report.drawings.every_sampled_step import NO_STEPS
from distplb.report.drawings.heat_maps import colour_bar, write_numbers
from distplb.report.drawings.style import COLOURS, WIDE, dress, empty, is_narrow, legend_below, mark_each
from distplb.report.formatting import differing, label, percent, plural, printable, shortened
from distplb.report.run import Run
from distplb.report.step_checks import num_gpus

__all__ = ["REPLICAS_BY_EXPERT", "replicas_by_expert"]

_MOST_EXPERTS = 40  # that a figure shows with legible names
_ROW = 0.2  # inches of a row
_MIN_CELL = 0.36  # inches of the width of a cell that can hold a number


class _Map(NamedTuple):
    """Experts by layer and slot, those with most replicas first.

    Args:
        experts: `[X]`, the name of the layer and the slot.
        share: `[X, M]`, in which share of the sampled steps of this layer each GPU held a replica.
        tokens: `[X]`, the share of the tokens of the layer that replicas of the expert computed.
        home: `[X]`, the GPU of the slot.
        gpus_per_node: GPUs on a node.
        num_experts: experts that ever had a replica, also those that are not shown.
        steps: sampled steps that count, and those that ran on another number of GPUs or slots.
    """

    experts: list[tuple[str, int]]
    share: NDArray[np.float64]
    tokens: list[float]
    home: list[int]
    gpus_per_node: int
    num_experts: int
    steps: tuple[int, int]


def replicas_by_expert(run: Run, width: float = WIDE) -> Figure:
    """A heat map `[X, M]`: in which share of the sampled steps each GPU held a replica of each expert.

    Rows are experts, by layer and slot, in this order if all fit, else the 40 with most replicas, hottest first. A dot
    marks the home of an expert. Lines separate nodes. Cells have numbers if they fit, in per cent.

    Args:
        run: a run with sampled steps that had replicas.
        width: width in inches.

    Raises:
        DistplbError: if the run lacks the data.
    """
    refuse_if_lacking(_lacks(run))
    shown = _map(run)
    rows, gpus = shown.share.shape
    stacked = is_narrow(width)
    figure = empty(width, max(1.2, _ROW * rows) + (2.1 if stacked else 1.3))
    axes = figure.subplots()
    pattern, layers = differing(list(dict.fromkeys(layer for layer, _ in shown.experts)))
    names = dict(zip(dict.fromkeys(layer for layer, _ in shown.experts), layers, strict=True))
    where = f" (layer {label(pattern, 30)})" if pattern else ""
    dress(axes, "", "GPU", f"layer · slot{where if rows > 20 else ''}", grid="")
    norm = Normalize(0, max(0.01, float(shown.share.max())))
    colours = ScalarMappable(norm, matplotlib.colormaps["Blues"])
    axes.imshow(shown.share, cmap=colours.cmap, norm=norm, aspect="auto", interpolation="none")
    axes.xaxis.set_major_locator(MaxNLocator(6 if stacked else 16, integer=True))
    mark_each(axes, "y", [f"{shortened(names[layer], 8)} · {slot}" for layer, slot in shown.experts], rows)
    if (width - 1.6) / gpus >= _MIN_CELL:
        texts = np.where(shown.share > 0, np.vectorize(lambda one: f"{100 * one:.0f}")(shown.share), "")
        write_numbers(axes, shown.share, texts, colours)
    home = _mark_homes(axes, shown)
    for first in range(shown.gpus_per_node, gpus, shown.gpus_per_node):
        axes.axvline(first - 0.5, color=COLOURS["black"], linewidth=0.8)
    bar = colour_bar(figure, colours, [axes], "share of the sampled steps", stacked=stacked, aspect=20)
    bar.formatter = lambda share, _: f"{100 * share:.3g} %"  # type: ignore[assignment]
    bar.update_ticks()
    legend_below(figure, [home], width)
    return figure


def _caption(run: Run) -> str:
    shown = _map(run)
    hottest = int(np.argmax(shown.tokens))
    layer, slot = shown.experts[hottest]
    used, unused = shown.steps
    order = "all experts that had replicas"
    if shown.num_experts > len(shown.experts):
        order = f"the {len(shown.experts)} with most replicas, of {shown.num_experts:,} that had any"
    text = (
        "In which share of the sampled steps each GPU computed tokens of an expert as a replica: the darker, the more "
        f"often. An expert is a slot of a layer; a dot marks the GPU that owns it. Rows are {order}. Replicas computed "
        f"most for slot {slot} of layer {shortened(printable(layer))}, whose home is GPU {shown.home[hottest]}: "
        f"{percent(shown.tokens[hottest])} of the layer's tokens in {plural(used, 'sampled step')}. An expert that has "
        "replicas in almost every step stays hot, and a rebalance of homes would spare its pushes. Many pale rows mean "
        "that other experts are hot in each step, which only replicas even out."
    )
    if unused:
        text += f" Left out: {plural(unused, 'step')} on another number of GPUs or slots."
    return text


def _lacks(run: Run) -> str:
    if run.sampled is None:
        return NO_STEPS
    if _counted(run)[1]:
        return ""
    return "No sampled step of the last start had a replica: the layers were even, or no replica paid."


def _counted(run: Run) -> tuple[list[StepEvent], bool]:
    """The steps with the slots and GPUs of the last one, and whether any has a replica."""
    assert run.sampled is not None, "a run that lacks nothing has steps"
    last = run.sampled.events[-1]
    same = [one for one in run.sampled.events if (one.num_slots, num_gpus(one)) == (last.num_slots, num_gpus(last))]
    return same, any(event.num_replicas for event in same)


def _map(run: Run) -> _Map:
    events, _ = _counted(run)
    last = events[-1]
    gpus = num_gpus(last) or 1
    held, tokens = _held(events, gpus)
    of_layer, samples = Counter[str](), Counter[str]()
    for event in events:
        for number, layer in enumerate(event.layers):
            samples[layer] += 1
            of_layer[layer] += sum(event.tokens_of_gpu_before[number]) if event.tokens_of_gpu_before else 0
    order = {layer: number for number, layer in enumerate(samples)}
    ranked = sorted(held, key=lambda one: (-held[one].sum() / samples[one[0]], order[one[0]], one[1]))
    shown = ranked[:_MOST_EXPERTS]
    if len(ranked) <= _MOST_EXPERTS:
        shown.sort(key=lambda one: (order[one[0]], one[1]))
    return _Map(
        experts=shown,
        share=np.array([held[one] / samples[one[0]] for one in shown]),
        tokens=[tokens[one] / max(1, of_layer[one[0]]) for one in shown],
        home=[slot // (last.num_slots // gpus) for _, slot in shown],
        gpus_per_node=gpus // last.num_nodes,
        num_experts=len(ranked),
        steps=(len(events), len(run.steps) - len(events)),
    )


def _held(
    events: Sequence[StepEvent], gpus: int
) -> tuple[dict[tuple[str, int], NDArray[np.float64]], Counter[tuple[str, int]]]:
    """By layer and slot: in how many steps each GPU held a replica, `[M]`, and how many tokens replicas computed."""
    held: dict[tuple[str, int], NDArray[np.float64]] = {}
    tokens = Counter[tuple[str, int]]()
    for event in events:
        for layer, replicas in zip(event.layers, event.replicas, strict=False):
            for slot, gpu, computed in replicas:
                expert = layer, slot
                if expert not in held:
                    held[expert] = np.zeros(gpus)
                held[expert][gpu] += 1
                tokens[expert] += computed
    return held, tokens


def _mark_homes(axes: Axes, shown: _Map) -> Line2D:
    """Draw a dot at each expert's home; returns the handle for the legend."""
    size = 4.5 if shown.share.shape[1] <= 32 else 2.6
    style = {"color": COLOURS["vermilion"], "linestyle": "", "marker": "o", "label": "home of the expert"}
    axes.plot(shown.home, range(len(shown.home)), markersize=size, **style)  # type: ignore[arg-type]
    return Line2D([], [], markersize=4.5, **style)  # type: ignore[arg-type]


REPLICAS_BY_EXPERT = ReportFigure("Replicas by expert and GPU", replicas_by_expert, _caption, _lacks)
