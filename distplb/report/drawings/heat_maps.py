"""Shared parts of figures with a cell for each layer and GPU, or each layer and window."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colorbar import Colorbar
from matplotlib.figure import Figure
from numpy.typing import NDArray

from distplb.report.drawings.style import COLOURS, FONT

__all__ = ["colour_bar", "write_numbers"]


def colour_bar(
    figure: Figure, colours: ScalarMappable, axes: Sequence[Axes], label: str, *, stacked: bool, aspect: float
) -> Colorbar:
    """Add the colour scale: below the maps if they are stacked, else to their right with this aspect ratio."""
    place: dict[str, Any] = (
        {"location": "bottom", "shrink": 0.9, "aspect": 30} if stacked else {"location": "right", "aspect": aspect}
    )
    bar = figure.colorbar(colours, ax=axes, pad=0.02, **place)
    bar.set_label(label, fontsize=FONT)
    bar.ax.tick_params(labelsize=FONT)
    bar.outline.set_linewidth(0.4)
    return bar


def write_numbers(axes: Axes, values: NDArray[np.float64], texts: NDArray[Any], colours: ScalarMappable) -> None:
    """Write a text in each cell of a map, in black or white, whichever is easier to read on the cell's colour."""
    for (row, column), text in np.ndenumerate(texts):
        red, green, blue, _ = colours.to_rgba(values[row, column])
        is_dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
        colour = "white" if is_dark else COLOURS["black"]
        axes.text(column, row, str(text), ha="center", va="center", fontsize=FONT, color=colour)
