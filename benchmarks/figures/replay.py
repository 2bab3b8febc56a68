"""The figure of bench_replay: imbalance of each step, and cumulative modelled seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

SMOOTH = 8  # steps that a point of the left panels averages


def draw(cases: list[tuple[str, dict, Tensor]], path: Path) -> None:
    """Draw two panels for each `(title, replays by planner, seconds of each step if all GPUs were equally busy)`."""
    import matplotlib.pyplot as plt  # only needed to draw

    rows = (len(cases) + 1) // 2
    figure, grid = plt.subplots(rows, 4, figsize=(16, 2.6 * rows), layout="constrained", squeeze=False)
    for nth, case in enumerate(cases):
        draw_case(grid[nth // 2, nth % 2 * 2], grid[nth // 2, nth % 2 * 2 + 1], *case)
    for axes in grid.flat[2 * len(cases) :]:
        axes.axis("off")
    grid[0, 0].legend(fontsize="x-small")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def draw_case(left: Any, right: Any, title: str, replays: dict, even: Tensor) -> None:
    """Draw the mean imbalance over layers; and seconds beyond an even load's, with moves counted when they happen."""
    for name, (run, seconds) in replays.items():
        mean = run.imbalance.mean(1).numpy()
        steps = np.arange(0, len(mean) - SMOOTH + 1, SMOOTH)
        left.plot(steps + SMOOTH / 2, [mean[step : step + SMOOTH].mean() for step in steps], label=name, lw=1)
        right.plot((seconds - even).cumsum(0).numpy(), label=name, lw=1)
    left.set(title=title, xlabel="step", ylabel="imbalance")
    right.set(xlabel="step", ylabel="modelled s beyond an even load")
    for axes in (left, right):
        axes.title.set_fontsize("small")
        axes.grid(alpha=0.3)
