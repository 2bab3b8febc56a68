"""The figure of bench_growth: planning time against slots, with the fitted line."""

from __future__ import annotations

from pathlib import Path

import numpy as np


def draw(sizes: list[dict], upper: list[dict], slope: float, offset: float, xlabel: str, path: Path) -> None:
    """Draw time against slots, both on logarithmic axes, with the fitted line."""
    import matplotlib.pyplot as plt  # only needed to draw

    slots = np.array([size["slots"] for size in sizes])
    seconds = np.array([size["seconds"] for size in sizes])
    low, high = np.array([size["quartiles"] for size in sizes]).T
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    axes.errorbar(slots, seconds, [seconds - low, high - seconds], fmt="o", capsize=3, label="distplb.plan")
    ends = np.array([upper[0]["slots"], upper[-1]["slots"]])
    axes.plot(ends, np.exp(offset) * ends**slope, "--", label=f"slots to the power of {slope:.2f}")
    axes.set(xscale="log", yscale="log", xlabel=xlabel, ylabel="seconds")
    axes.set_xticks(slots, [f"{number:,}" for number in slots], minor=False)
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)
