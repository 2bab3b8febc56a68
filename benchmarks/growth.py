"""How planning grows with the cluster: time, memory and imbalance, each size in a process of its own.

Run by `bench_planning.py --growth`; alone, it measures one size and prints it as JSON.
Shapes: L layers, E experts, P slots, M GPUs, K candidates.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from cases import GPUS_PER_NODE, Layout, popularities, sampled
from tables import markdown, progress

import distplb
from distplb import imbalance, lower_bound

LAYERS, SLOTS_PER_GPU = 61, 4
SLOTS = [64 << power for power in range(7)]  # 64 to 4,096, on 16 to 1,024 GPUs, for half as many experts
TEXT = (
    f"One log-normal load of {LAYERS} layers for each size, {SLOTS_PER_GPU} slots on each GPU, half as many experts as "
    "slots. The time is that of the whole `distplb.plan` call: median of the repeats after one call that is not "
    "timed, quartiles in brackets. Memory is the peak of a fresh process in its first call of that size less what it "
    "held before, when everything was imported and compiled."
)
# Of the largest size: column of the measurement, what it is, at most.
TARGETS = (("seconds", "time in s", 3.0), ("peak", "memory in GiB", 1.0), ("imbalance", "imbalance", 1.002))


def report(largest: int, candidates: int, engine: str, repeats: int, figure: Path | None) -> list[str]:
    """Measure all sizes up to `largest` slots; the parts of a report, and a figure where a path is given."""
    found = []
    for slots in (slots for slots in SLOTS if slots <= largest):
        progress(f"growth: {slots} slots")
        found.append(measured_alone(slots, candidates, engine, repeats))
    # The fixed cost of a call bends the line down among the small sizes; the slope is that of the larger half.
    upper = found[len(found) // 2 :]
    slope, offset = fitted(upper)
    parts = [f"## Growth, K = {candidates}\n\n{table(found)}"]
    parts.append(f"From {upper[0]['slots']} slots on, the time grows with the slots to the power of {slope:.2f}.")
    if figure is not None:
        draw(found, upper, slope, offset, figure)
        parts.append(f"![Time against slots, on logarithmic axes]({figure.name})")
    if found[-1]["slots"] == SLOTS[-1]:
        parts.append(f"## Targets at {SLOTS[-1]} slots\n\n{targets(found[-1])}")
    return parts


def measured_alone(slots: int, candidates: int, engine: str, repeats: int) -> dict:
    """What `measured` returns, from a fresh process."""
    command = [sys.executable, __file__, *map(str, (slots, candidates, engine, repeats))]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)


def measured(slots: int, candidates: int, engine: str, repeats: int) -> dict:
    """Time, memory and imbalance of one size."""
    device = "cuda" if engine == "cuda" else "cpu"
    options = {"num_candidates": candidates, "engine": engine}
    small = torch.arange(64).view(2, 32).to(device)
    distplb.plan(small, Layout(2, 64).topology, num_slots=64, **options)  # imports and compiles what is needed
    layout = Layout(slots // SLOTS_PER_GPU // GPUS_PER_NODE, slots)
    generator = np.random.default_rng(slots)
    load = sampled(popularities("log-normal", LAYERS, slots // 2, generator), generator).to(device)
    held, seconds = resident(), []
    placement = distplb.plan(load, layout.topology, num_slots=slots, **options)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - held
    for _ in range(repeats):
        start = time.perf_counter()
        distplb.plan(load, layout.topology, num_slots=slots, **options)
        seconds.append(time.perf_counter() - start)
    reached = imbalance(load, placement)[0]
    return {
        "slots": slots,
        "experts": load.shape[1],
        "gpus": layout.topology.num_gpus,
        "seconds": float(np.median(seconds)),
        "quartiles": np.quantile(seconds, [0.25, 0.75]).tolist(),
        "peak": max(0, peak) / (1 << 30),
        "imbalance": float(reached.mean()),
        "worst": float(reached.max()),
        "bound": float(lower_bound(load, layout.topology, slots).mean()),
    }


def resident() -> int:
    """Bytes of memory that this process holds now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def fitted(found: list[dict]) -> tuple[float, float]:
    """Slope and offset of log time against log slots."""
    slots, seconds = ([one[name] for one in found] for name in ("slots", "seconds"))
    if len(found) < 2:
        return float("nan"), float("nan")
    slope, offset = np.polyfit(np.log(slots), np.log(seconds), 1)
    return float(slope), float(offset)


def table(found: list[dict]) -> str:
    """A line for each size."""
    head = ["experts", "slots", "GPUs", "ms", "[quartiles]", "peak MiB", "imbalance", "worst layer", "lower bound"]
    lines = []
    for one in found:
        low, high = (quartile * 1e3 for quartile in one["quartiles"])
        lines.append(
            [
                str(one["experts"]),
                str(one["slots"]),
                str(one["gpus"]),
                f"{one['seconds'] * 1e3:.1f}",
                f"[{low:.1f} – {high:.1f}]",
                f"{one['peak'] * 1024:.0f}",
                *(f"{one[name]:.5f}" for name in ("imbalance", "worst", "bound")),
            ]
        )
    return markdown(head, lines)


def targets(largest: dict) -> str:
    """What is asked of the largest size."""
    return markdown(
        ["measure", "asked", "reached", "verdict"],
        [
            [text, f"≤ {most:g}", f"{largest[name]:.5g}", "met" if largest[name] <= most else "missed"]
            for name, text, most in TARGETS
        ],
    )


def draw(found: list[dict], upper: list[dict], slope: float, offset: float, path: Path) -> None:
    """Time against slots, both on logarithmic axes, with the fitted line."""
    import matplotlib.pyplot as plt  # where a figure is asked for; nothing else needs it

    slots = np.array([one["slots"] for one in found])
    seconds = np.array([one["seconds"] for one in found])
    low, high = np.array([one["quartiles"] for one in found]).T
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    axes.errorbar(slots, seconds, [seconds - low, high - seconds], fmt="o", capsize=3, label="distplb.plan")
    ends = np.array([upper[0]["slots"], upper[-1]["slots"]])
    axes.plot(ends, np.exp(offset) * ends**slope, "--", label=f"slots to the power of {slope:.2f}")
    axes.set(xscale="log", yscale="log", xlabel=f"slots, {SLOTS_PER_GPU} on each GPU", ylabel="seconds")
    axes.set_xticks(slots, [f"{number:,}" for number in slots], minor=False)
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    """One size, for `measured_alone`."""
    parser = argparse.ArgumentParser(description="Time, memory and imbalance of one size, as JSON.")
    parser.add_argument("slots", type=int)
    parser.add_argument("candidates", type=int)
    parser.add_argument("engine")
    parser.add_argument("repeats", type=int)
    print(json.dumps(measured(**vars(parser.parse_args()))))


if __name__ == "__main__":
    main()
