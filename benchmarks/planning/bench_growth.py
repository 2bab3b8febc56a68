"""How time, memory and imbalance of planning grow with the cluster, each size in its own process.

    python -m benchmarks.planning.bench_growth --output benchmarks/results/DATE-planning-growth.md

Shapes: L layers, E experts, P slots, M GPUs, K candidates.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from pathlib import Path

import numpy as np
import torch

import distplb
from benchmarks.figures import growth as figure
from benchmarks.shared.loads import GPUS_PER_NODE, Layout, popularities, sampled
from benchmarks.shared.processes import run_alone
from benchmarks.shared.tables import command_line, header, markdown, progress, publish, verdict
from distplb import imbalance, lower_bound
from distplb.packing.engines import engine_named

LAYERS, SLOTS_PER_GPU = 61, 4
SLOTS = [64 << power for power in range(7)]  # 64 to 4,096, on 16 to 1,024 GPUs, for half as many experts
TEXT = (
    f"One log-normal load of {LAYERS} layers for each size, {SLOTS_PER_GPU} slots on each GPU, half as many experts as "
    "slots. Time is of the whole `distplb.plan` call: median of the repeats after one untimed call, quartiles in "
    "brackets. Memory is the peak of a fresh process in its first call of that size, less what it held before the "
    "call, after imports and compilation."
)
# For the largest size: key of the measurement, its name, upper limit.
TARGETS = (("seconds", "time in s", 3.0), ("peak", "memory in GiB", 1.0), ("imbalance", "imbalance", 1.002))


def main() -> None:
    """Measure, print the report, and write it if requested."""
    options = parsed_options()
    if options.size:
        print(json.dumps(measured(options.size, options.candidates, options.engine, options.repeats)))
        return
    engine = engine_named(options.engine)[0]
    sizes = []
    for slots in (slots for slots in SLOTS if slots <= options.slots):
        progress(f"{slots} slots")
        words = {"size": slots, "candidates": options.candidates, "engine": engine, "repeats": options.repeats}
        alone = [word for name, value in words.items() for word in (f"--{name}", str(value))]
        sizes.append(run_alone("benchmarks.planning.bench_growth", *alone))
    progress("")
    arguments = {f"--{name}": getattr(options, name) for name in ("slots", "candidates", "engine", "repeats")}
    title = "Planning time, memory and balance as clusters grow"
    top = header(title, TEXT, command_line("planning.bench_growth", arguments), engine)
    publish("\n\n".join([top, *report(sizes, options)]), options.output)


def parsed_options() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description="Planning time, memory and balance as clusters grow.")
    parser.add_argument("--slots", type=int, default=SLOTS[-1], metavar="P", help="slots of the largest size")
    parser.add_argument("--candidates", type=int, default=1, metavar="K")
    parser.add_argument("--engine", help="engine of distplb; by default the fastest that is available")
    parser.add_argument("--repeats", type=int, default=5, metavar="R", help="timed calls of each size")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the report (Markdown) and a figure there")
    parser.add_argument("--size", type=int, help=argparse.SUPPRESS)  # a single size, in its own process: prints JSON
    return parser.parse_args()


# --- measurement ------------------------------------------------------------------------------------------------


def measured(slots: int, candidates: int, engine: str, repeats: int) -> dict:
    """Measure time, memory and imbalance of one size."""
    device = "cuda" if engine == "cuda" else "cpu"
    options = {"num_candidates": candidates, "engine": engine}
    small = torch.arange(64).view(2, 32).to(device)
    distplb.plan(small, Layout(2, 64).topology, num_slots=64, **options)  # imports and compiles
    layout = Layout(slots // SLOTS_PER_GPU // GPUS_PER_NODE, slots)
    generator = np.random.default_rng(slots)
    load = sampled(popularities("log-normal", LAYERS, slots // 2, generator), generator).to(device)
    before, seconds = resident(), []
    placement = distplb.plan(load, layout.topology, num_slots=slots, **options)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
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
    """Return the bytes of memory that this process holds now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


# --- text -------------------------------------------------------------------------------------------------------


def report(sizes: list[dict], options: argparse.Namespace) -> list[str]:
    """Format table, slope and targets; draw the figure if the report is written."""
    # The fixed cost of a call flattens the line at small sizes, so the slope is fitted to the larger half.
    upper = sizes[len(sizes) // 2 :]
    slope, offset = fitted(upper)
    parts = [f"## Growth, K = {options.candidates}\n\n{table(sizes)}"]
    parts.append(f"From {upper[0]['slots']} slots on, the time grows with the slots to the power of {slope:.2f}.")
    if options.output:
        path = options.output.with_suffix(".png")
        figure.draw(sizes, upper, slope, offset, f"slots, {SLOTS_PER_GPU} on each GPU", path)
        parts.append(f"![Time against slots, on logarithmic axes]({path.name})")
    if sizes[-1]["slots"] == SLOTS[-1]:
        parts.append(f"## Targets at {SLOTS[-1]} slots\n\n{targets(sizes[-1])}")
    return parts


def fitted(sizes: list[dict]) -> tuple[float, float]:
    """Fit slope and offset of log time against log slots."""
    slots, seconds = ([size[name] for size in sizes] for name in ("slots", "seconds"))
    if len(sizes) < 2:
        return float("nan"), float("nan")
    slope, offset = np.polyfit(np.log(slots), np.log(seconds), 1)
    return float(slope), float(offset)


def table(sizes: list[dict]) -> str:
    """Format a row for each size."""
    head = ["experts", "slots", "GPUs", "ms", "[quartiles]", "peak MiB", "imbalance", "worst layer", "lower bound"]
    lines = []
    for size in sizes:
        low, high = (quartile * 1e3 for quartile in size["quartiles"])
        lines.append(
            [
                str(size["experts"]),
                str(size["slots"]),
                str(size["gpus"]),
                f"{size['seconds'] * 1e3:.1f}",
                f"[{low:.1f} – {high:.1f}]",
                f"{size['peak'] * 1024:.0f}",
                *(f"{size[name]:.5f}" for name in ("imbalance", "worst", "bound")),
            ]
        )
    return markdown(head, lines)


def targets(largest: dict) -> str:
    """Format the targets of the largest size."""
    return markdown(
        ["measure", "target", "reached", "verdict"],
        [
            [text, f"≤ {limit:g}", f"{largest[name]:.5g}", verdict(largest[name] <= limit)]
            for name, text, limit in TARGETS
        ],
    )


if __name__ == "__main__":
    main()
