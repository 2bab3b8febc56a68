"""The figure of bench_bandwidth: bandwidth of moving / bandwidth of a bare exchange, against the size of a row."""

from __future__ import annotations

import statistics
from pathlib import Path


def draw(points: list[tuple[str, float, list[float]]], path: Path) -> None:
    """Draw points `(where, MiB of a row, ratios of the turns)`: a line for each place, with medians and quartiles."""
    import matplotlib.pyplot as plt  # only needed to draw

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for number, where in enumerate(dict.fromkeys(where for where, _, _ in points)):
        own = [(size, values) for name, size, values in points if name == where]
        middle = [statistics.median(values) for _, values in own]
        quarters = [statistics.quantiles(values, n=4, method="inclusive") for _, values in own]
        apart = [size * (1 + 0.04 * number) for size, _ in own]
        below = [mid - low for mid, (low, _, _) in zip(middle, quarters, strict=True)]
        above = [high - mid for mid, (_, _, high) in zip(middle, quarters, strict=True)]
        axes.errorbar(apart, middle, yerr=[below, above], marker="o", capsize=3, label=where)
    axes.axhline(1, color="grey", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("an expert's row in one tensor, MiB")
    axes.set_ylabel("bandwidth, moving / bare exchange")
    axes.set_ylim(0, None)
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)
