"""The figure of bench_loss_curves: loss differences within the band of the static runs, and the losses themselves.

Shapes: S seeds, R runs, I iterations.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["draw"]


def draw(curves: np.ndarray, names: Sequence[str], statics: int, tested: int, smooth: int, path: Path) -> None:
    """Draw the tested runs minus the static ones in a row of panels, the losses beside them, the controls below.

    Each row has one scale, because controls are so far off that the tested runs would be flat lines beside them; the
    band of the static runs, which all panels show, is the same.

    Args:
        curves: `[S, R, I]` smoothed losses: static runs first, then tested ones, then controls.
        names: of the R runs.
        statics: number of static runs.
        tested: number of tested runs.
        smooth: number of iterations that each point averages.
        path: file for the PNG.
    """
    import matplotlib.pyplot as plt  # only needed to draw

    iteration = np.arange(curves.shape[-1]) + smooth
    pairs = list(itertools.combinations(range(statics), 2))
    band = np.abs(np.stack([curves[:, i] - curves[:, j] for i, j in pairs], 1)).max((0, 1))  # [I]
    rows = [range(statics, statics + tested), range(statics + tested, len(names))]
    columns = max(tested + 1, len(rows[1]))
    figure, grid = plt.subplots(2, columns, figsize=(5 * columns, 8), layout="constrained", squeeze=False)
    for panels, runs in zip(grid, rows, strict=True):
        for axes, run in zip(panels, runs, strict=False):
            axes.fill_between(iteration, -band, band, color="0.8", label="static minus static, widest over the seeds")
            _draw_differences(axes, iteration, curves[:, run], curves[:, :statics])
            axes.set(
                title=f"{names[run]} minus static", xlabel="iteration", ylabel=f"loss difference, mean of {smooth}"
            )
            axes.legend(fontsize="small", loc="upper left")
        widest = max((np.abs(axes.get_ylim()).max() for axes in panels[: len(runs)]), default=1.0)
        for axes in panels[: len(runs)]:
            axes.set_ylim(-widest, widest)
    losses = grid[0, tested]
    for run, name in enumerate(names):
        losses.plot(iteration, curves[0, run], lw=0.8, label=name)
    losses.set(title="losses, first seed", ylabel=f"loss, mean of {smooth}")
    losses.legend(fontsize="small")
    for axes in grid.flat:
        axes.set_visible(axes.has_data())
        axes.set_xlabel("iteration")
        axes.grid(alpha=0.3)
        axes.title.set_fontsize("medium")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_differences(axes: Any, iteration: np.ndarray, curves: np.ndarray, static: np.ndarray) -> None:
    """Draw `curves [S, I]` minus each of `static [S, N, I]`, in one colour for each seed."""
    for seed, (curve, others) in enumerate(zip(curves, static, strict=True)):
        for other in others:
            axes.plot(iteration, curve - other, lw=0.7, color=f"C{seed}")
