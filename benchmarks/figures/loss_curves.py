"""The figure of bench_loss_curves: loss differences within the band of the static runs, and the losses themselves."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np

__all__ = ["draw"]


def draw(curves: np.ndarray, names: Sequence[str], statics: int, smooth: int, path: Path) -> None:
    """Draw each other run minus the static runs, in the band of these, in a panel; and the losses in a last panel.

    Args:
        curves: `[S, R, I]` smoothed losses of S seeds and R runs, the first `statics` of them static.
        names: names of the R runs.
        smooth: number of iterations that each point averages.
        path: file for the PNG.
    """
    import matplotlib.pyplot as plt  # only needed to draw

    iteration = np.arange(curves.shape[-1]) + smooth
    pairs = list(itertools.combinations(range(statics), 2))
    band = np.abs(np.stack([curves[:, i] - curves[:, j] for i, j in pairs], 1)).max((0, 1))  # [I]
    others = list(range(statics, len(names)))
    figure, panels = plt.subplots(1, len(others) + 1, figsize=(5 * len(others) + 5, 4), layout="constrained")
    for axes, run in zip(panels, others, strict=False):
        axes.fill_between(
            iteration, -band, band, color="0.8", label=f"static minus static, widest of {len(curves)} seeds"
        )
        for seed, static in itertools.product(range(len(curves)), range(statics)):
            axes.plot(iteration, curves[seed, run] - curves[seed, static], lw=0.7, color=f"C{seed}")
        axes.set(title=f"{names[run]} minus static", xlabel="iteration", ylabel=f"loss difference, mean of {smooth}")
        axes.legend(fontsize="small", loc="upper left")
    widest = max(np.abs(panel.get_ylim()).max() for panel in panels[:-1])
    for axes in panels[:-1]:
        axes.set_ylim(-widest, widest)
    for run, name in enumerate(names):
        panels[-1].plot(iteration, curves[0, run], lw=0.8, label=name)
    panels[-1].set(title="losses, first seed", xlabel="iteration", ylabel=f"loss, mean of {smooth}")
    panels[-1].legend(fontsize="small")
    for axes in panels:
        axes.grid(alpha=0.3)
        axes.title.set_fontsize("medium")
    figure.savefig(path, dpi=110)
    plt.close(figure)
