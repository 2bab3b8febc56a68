"""The figure of bench_scaling: seconds against ranks, measured and modelled; and imbalance against candidates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["Panel", "draw"]

MIN_EXCESS = 1e-5  # lower limit for the logarithmic axis


@dataclass(frozen=True)
class Panel:
    """One load, and one way to choose the number of candidates.

    Args:
        title: title of the panel.
        cores: number of cores that the measured ranks shared.
        ranks: the N measured numbers of ranks.
        measured: for each measure, the seconds of all turns at each of the N numbers of ranks.
        here: modelled wall times at these numbers of ranks, on these cores.
        far: the M numbers of ranks that the model is extrapolated to.
        walls: `[M]` modelled wall times, with one core per rank.
        ends: `[2, M]` ends of their intervals.
    """

    title: str
    cores: int
    ranks: Sequence[int]
    measured: Mapping[str, Sequence[Sequence[float]]]
    here: Sequence[float]
    far: Sequence[int]
    walls: Sequence[float]
    ends: np.ndarray


def draw(panels: Sequence[Panel], samples: Mapping[str, Sequence[tuple[int, float, float]]], path: Path) -> None:
    """Draw a column for each load: its two panels, and below them excess imbalance against candidates, if measured.

    Args:
        panels: two for each load.
        samples: K, imbalance and lower bound of each sample, by load.
        path: file for the PNG.
    """
    import matplotlib.pyplot as plt  # only needed to draw

    columns, rows = len(panels) // 2, 3 if samples else 2
    figure, grid = plt.subplots(rows, columns, figsize=(4.6 * columns, 3.6 * rows), layout="constrained", squeeze=False)
    for nth, panel in enumerate(panels):
        draw_panel(grid[nth % 2, nth // 2], panel)
    for axes, (name, sample) in zip(grid[2] if samples else (), samples.items(), strict=False):
        draw_quality(axes, name, sample)
    grid[0, 0].legend(fontsize="x-small")
    for axes in grid.flat:
        axes.title.set_fontsize("medium")
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def draw_panel(axes: Any, panel: Panel) -> None:
    """Draw points with quartiles, hollow where ranks share cores; and the model, dashed for one core per rank."""
    ranks = np.array(panel.ranks)
    for nth, (name, cells) in enumerate(panel.measured.items()):
        low, middle, high = np.array([np.quantile(cell, [0.25, 0.5, 0.75]) for cell in cells]).T
        colour, shared = f"C{nth}", ranks > panel.cores
        axes.errorbar(ranks, middle, [middle - low, high - middle], fmt="none", ecolor=colour, capsize=2)
        axes.plot(ranks[~shared], middle[~shared], "o", color=colour, label=name)
        axes.plot(ranks[shared], middle[shared], "o", color=colour, mfc="white", label=f"{name}, ranks share cores")
    axes.plot(ranks, panel.here, "-", color="C0", lw=1, label=f"modelled wall, {panel.cores} cores")
    axes.plot(panel.far, panel.walls, "--", color="0.2", lw=1, label="modelled wall, one core per rank")
    axes.fill_between(panel.far, *panel.ends, color="0.2", alpha=0.2, lw=0, label="its 95 % interval")
    axes.set(xscale="log", yscale="log", title=panel.title, xlabel="ranks", ylabel="seconds")
    axes.set_xticks([1, 4, 16, 64, 256, 1024], ["1", "4", "16", "64", "256", "1,024"], minor=False)
    axes.minorticks_off()


def draw_quality(axes: Any, name: str, sample: Sequence[tuple[int, float, float]]) -> None:
    """Draw the measured imbalance above the lower bound."""
    candidates, reached, bound = np.array(sample).T
    axes.plot(candidates, np.maximum(reached - bound, MIN_EXCESS), "o-", color="C3", ms=3)
    axes.set(xscale="log", yscale="log", title=name, xlabel="candidates", ylabel="imbalance - lower bound")
