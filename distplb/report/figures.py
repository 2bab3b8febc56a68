"""All figures of a report, in order, and their images.

To add a figure, add a file to `distplb.report.drawings` and a line to `FIGURES`.
"""

from __future__ import annotations

import base64
import io
from typing import NamedTuple

import matplotlib
from matplotlib.figure import Figure

from distplb.report.drawings.every_sampled_step import EVERY_SAMPLED_STEP, every_sampled_step
from distplb.report.drawings.hottest_experts import HOTTEST_EXPERTS, hottest_experts
from distplb.report.drawings.imbalance_over_time import IMBALANCE_OVER_TIME, imbalance_over_time
from distplb.report.drawings.load_by_gpu import LOAD_BY_GPU, load_by_gpu
from distplb.report.drawings.moves_by_rebalance import MOVES_BY_REBALANCE, moves_by_rebalance
from distplb.report.drawings.other_intervals import OTHER_INTERVALS, other_intervals
from distplb.report.drawings.replicas_by_expert import REPLICAS_BY_EXPERT, replicas_by_expert
from distplb.report.drawings.seconds_by_stage import SECONDS_BY_STAGE, seconds_by_stage
from distplb.report.drawings.time_of_a_step import TIME_OF_A_STEP, time_of_a_step

__all__ = [
    "FIGURES",
    "Image",
    "every_sampled_step",
    "hottest_experts",
    "image",
    "imbalance_over_time",
    "load_by_gpu",
    "moves_by_rebalance",
    "other_intervals",
    "replicas_by_expert",
    "seconds_by_stage",
    "time_of_a_step",
]

_MAX_SVG_BYTES = 300_000  # a larger drawing becomes a PNG
_DPI = 192  # of pixels: two for each pixel of the page

FIGURES = (
    IMBALANCE_OVER_TIME,
    LOAD_BY_GPU,
    MOVES_BY_REBALANCE,
    SECONDS_BY_STAGE,
    HOTTEST_EXPERTS,
    EVERY_SAMPLED_STEP,
    REPLICAS_BY_EXPERT,
    TIME_OF_A_STEP,
    OTHER_INTERVALS,
)


class Image(NamedTuple):
    """A figure as a file: its media type, bytes, and size in pixels of the page."""

    media_type: str
    content: bytes
    width: int
    height: int

    @property
    def address(self) -> str:
        """The file as a data URL, for the `src` of an image."""
        return f"data:{self.media_type};base64,{base64.b64encode(self.content).decode()}"


def image(figure: Figure) -> Image:
    """Render a figure as SVG, or as PNG if the SVG would be large; the same figure gives the same bytes."""
    width, height = (round(96 * inches) for inches in figure.get_size_inches())
    content = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "distplb", "svg.fonttype": "path"}):
        figure.savefig(content, format="svg", dpi=_DPI, metadata={"Date": None})
    if content.tell() <= _MAX_SVG_BYTES:
        return Image("image/svg+xml", content.getvalue(), width, height)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=_DPI)
    return Image("image/png", content.getvalue(), width, height)
