"""All figures of a report, in its order, and what images they become."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import NamedTuple

import matplotlib
from matplotlib.figure import Figure

from distplb.report.bars import (
    moves_by_rebalance,
    moves_by_rebalance_caption,
    moves_by_rebalance_lacks,
    seconds_by_stage,
    seconds_by_stage_caption,
    seconds_by_stage_lacks,
)
from distplb.report.gpu_load import load_by_gpu, load_by_gpu_caption, load_by_gpu_lacks
from distplb.report.history import imbalance_over_time, imbalance_over_time_caption, imbalance_over_time_lacks
from distplb.report.hottest import hottest_experts, hottest_experts_caption, hottest_experts_lacks
from distplb.report.intervals import other_intervals, other_intervals_caption, other_intervals_lacks
from distplb.report.run import Run

__all__ = [
    "PANELS",
    "Image",
    "Panel",
    "hottest_experts",
    "image",
    "imbalance_over_time",
    "load_by_gpu",
    "moves_by_rebalance",
    "other_intervals",
    "seconds_by_stage",
]

_MOST_SVG_BYTES = 300_000  # a drawing that is larger is sent as pixels
_DPI = 192  # of those: two for each pixel of a page


class Panel(NamedTuple):
    """One figure of a report.

    Args:
        title: its heading.
        draw: from a run and a width in inches to a figure.
        caption: what to see in it, in numbers.
        lacks: what the run needs and does not have, in one sentence; empty where the figure can be drawn.
    """

    title: str
    draw: Callable[[Run, float], Figure]
    caption: Callable[[Run], str]
    lacks: Callable[[Run], str]

    @property
    def name(self) -> str:
        """In files and addresses."""
        return self.draw.__name__.replace("_", "-")


PANELS = (
    Panel("Imbalance over time", imbalance_over_time, imbalance_over_time_caption, imbalance_over_time_lacks),
    Panel("Load by layer and GPU", load_by_gpu, load_by_gpu_caption, load_by_gpu_lacks),
    Panel("What was moved", moves_by_rebalance, moves_by_rebalance_caption, moves_by_rebalance_lacks),
    Panel("Where the time went", seconds_by_stage, seconds_by_stage_caption, seconds_by_stage_lacks),
    Panel("Hottest experts", hottest_experts, hottest_experts_caption, hottest_experts_lacks),
    Panel("Other intervals", other_intervals, other_intervals_caption, other_intervals_lacks),
)


class Image(NamedTuple):
    """A figure as a file: its media type, bytes, and size in pixels of a page."""

    media_type: str
    content: bytes
    width: int
    height: int


def image(figure: Figure) -> Image:
    """The figure as SVG, or as PNG where that would be large; the same figure gives the same bytes."""
    width, height = (round(96 * inches) for inches in figure.get_size_inches())
    content = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "distplb", "svg.fonttype": "path"}):
        figure.savefig(content, format="svg", metadata={"Date": None})
    if content.tell() <= _MOST_SVG_BYTES:
        return Image("image/svg+xml", content.getvalue(), width, height)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=_DPI)
    return Image("image/png", content.getvalue(), width, height)
