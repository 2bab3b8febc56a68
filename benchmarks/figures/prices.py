"""The figure of bench_prices: imbalance against the share of slots moved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

MIN_EXCESS = 1e-5  # lower limit for the logarithmic axis
MARKERS = {"greedy, afresh": "s", "ours, afresh": "^", "ours, afresh, GPUs renamed": "v", "stays": "x"}


def draw(panels: list[tuple[str, dict, dict, Any]], path: Path) -> None:
    """Draw a panel for each `(title, curves, others, target)` of bench_prices."""
    import matplotlib.pyplot as plt  # only needed to draw

    figure, grid = plt.subplots(2, (len(panels) + 1) // 2, figsize=(11, 8), layout="constrained", squeeze=False)
    for axes, panel in zip(grid.T.flat, panels, strict=True):
        draw_panel(axes, *panel)
    grid[0, 0].legend(fontsize="small")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw_panel(axes: Any, title: str, curves: dict, others: dict, target: Any) -> None:
    """Draw the curve of every K, points for plans from scratch, and the target's area."""
    for candidates, curve in curves.items():
        points = sorted((point.moved, point.imbalance) for point in curve.values())
        moved, uneven = np.array(points).T
        axes.plot(100 * moved, excess(uneven), ".-", label=f"ours at rising prices, K = {candidates}")
    for name, point in others.items():
        axes.plot(100 * point.moved, excess(point.imbalance), MARKERS[name], label=name)
    if target is not None:
        limit = excess(target.imbalance)
        axes.fill_between([0, 100 * target.moved], MIN_EXCESS, limit, color="green", alpha=0.15, label="target")
    axes.set(yscale="log", title=title, xlabel="% of slots moved", ylabel="imbalance - 1")
    axes.title.set_fontsize("medium")
    axes.grid(alpha=0.3)


def excess(uneven: np.ndarray | float) -> np.ndarray:
    """Imbalance - 1, at least MIN_EXCESS."""
    return np.maximum(np.asarray(uneven) - 1, MIN_EXCESS)
