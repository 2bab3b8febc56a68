"""The figure of bench_replicas: the imbalance of every step, before replicas are lent and with them."""

from __future__ import annotations

from pathlib import Path

import numpy as np


def draw(cases: dict[str, dict[str, list[list[float]]]], path: Path) -> None:
    """Draw a panel for each case, whose methods have [before, after, replicas] for each step."""
    import matplotlib.pyplot as plt  # only needed to draw

    figure, grid = plt.subplots(2, (len(cases) + 1) // 2, figsize=(11, 7), layout="constrained", squeeze=False)
    for axes, (title, methods) in zip(grid.flat, cases.items(), strict=False):
        for number, (name, steps) in enumerate(methods.items()):
            before, after, _ = np.array(steps).T
            count = np.arange(1, len(before) + 1)
            axes.plot(count, before, color=f"C{number}", alpha=0.6, label=f"{name}: before replicas are lent")
            axes.plot(count, after, color=f"C{number}", linewidth=2, label=f"{name}: with replicas")
        axes.set(title=title, xlabel="step", ylabel="busiest GPU / mean GPU", ylim=(0.98, None))
        axes.title.set_fontsize("medium")
        axes.grid(alpha=0.3)
    grid[0, 0].legend(fontsize="small")
    figure.savefig(path, dpi=150)
    plt.close(figure)
