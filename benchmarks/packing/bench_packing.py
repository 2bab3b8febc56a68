"""What each step of the packing core contributes: an ablation table on random and real loads.

    python -m benchmarks.packing.bench_packing --loads DIR --output benchmarks/results/DATE-packing-ablation.md

Every cell is the mean over rows of the imbalance (heaviest pack / mean pack, 1 is perfect) that remains when the core
stops after the step of that line. With K candidates, steps 1 to 4 show the lightest candidate of each row after that
step; the lightest after step 4 continues to the pair swap and the clean-up. Quality only: nothing is timed.
Shapes: X rows, n items (experts), M packs (GPUs), K candidates, S steps of the core.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.shared.loads import real_loads
from benchmarks.shared.tables import command_line, header, markdown, publish
from distplb import Topology, lower_bound
from distplb.packing import steps
from distplb.packing.balanced_packing import pack_loads
from distplb.packing.noise import noisy_keys

# The lines of the table, with the step numbers of `distplb.balanced_packing`.
SEARCHED = ("greedy (1, 2)", "+ variance (3)", "+ min-max (4)")
FINISHED = ("+ pair swap (6)", "+ clean-up (7)")
TEXT = (
    "Mean over rows of the imbalance (heaviest pack / mean pack, 1 is perfect) after each step. With K candidates, "
    "steps 1 to 4 show the lightest candidate of each row after that step; the lightest after step 4 continues to "
    "the pair swap and the clean-up. The random loads have fixed seeds and the packing is deterministic: the figures "
    "are the same on any machine, without noise."
)


def main() -> None:
    """Measure and print, and write a file if one is given."""
    options = parsed_options()
    data = random_loads(options.rows, options.experts)
    if options.loads:
        data |= real_loads(options.loads)
    gpus = {name: [max(1, load.shape[1] // options.experts_per_gpu) for load in loads] for name, loads in data.items()}
    parts = [settings(data, gpus), *tables(data, gpus, sorted(set(options.candidates)))]
    top = header("Packing core, step by step", TEXT, command(options), "reference")
    publish("\n\n".join([top, *parts]), options.output)


def parsed_options() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description="Ablation of the packing core's steps.")
    parser.add_argument("--loads", type=Path, metavar="DIR", help="folder of .npy files, [L, E] or [T, L, E]")
    parser.add_argument("--experts-per-gpu", type=int, default=8, metavar="G")
    parser.add_argument("--experts", type=int, default=256, metavar="E", help="experts in each random load")
    parser.add_argument("--rows", type=int, default=64, metavar="X", help="rows of each random load")
    parser.add_argument("--candidates", type=int, nargs="+", default=[1, 8, 64], metavar="K")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the result to this file, as markdown")
    return parser.parse_args()


# --- data -------------------------------------------------------------------------------------------------------


def random_loads(rows: int, experts: int) -> dict[str, list[Tensor]]:
    """Three kinds of skew by name, each `[X, n]` int64, the same on every run."""
    generator = np.random.default_rng(0)
    spread = generator.uniform(0.8, 1.2, (rows, experts))
    popularity = 1 / (np.arange(experts) + experts / 16)  # Zipf-Mandelbrot law: few hot experts, many cold ones
    shapes = {
        "uniform": generator.uniform(0, 1, (rows, experts)),
        "lognormal": generator.lognormal(0, 0.7, (rows, experts)),
        "zipf-like": generator.permuted(np.tile(popularity, (rows, 1)), axis=1) * spread,
    }
    return {name: [torch.from_numpy(np.rint(value * 1e6).astype(np.int64))] for name, value in shapes.items()}


# --- measurement ------------------------------------------------------------------------------------------------


def step_imbalances(weight: Tensor, num_packs: int, candidates: list[int]) -> dict[int, Tensor]:
    """By K, `[S, X]` float64: the imbalance after each step of the core, with the first K candidates."""
    rows, layer = len(weight), torch.arange(len(weight))
    lightest: list[Tensor | None] = [None] * len(SEARCHED)  # [X] each, over the candidates so far
    best = torch.empty_like(weight)  # [X, n], of the last searched step
    imbalances = {}
    for candidate in range(max(candidates)):
        key = noisy_keys(weight, layer=layer, candidate=torch.full((rows,), candidate), seed=0)
        items = steps.greedy(weight, key, torch.ones_like(weight), num_packs, apart=False)
        for step, refine in enumerate((unchanged, steps.lower_variance, steps.lower_max)):
            items = refine(weight, items, num_packs)
            heaviest, before = pack_loads(weight, items, num_packs).amax(1), lightest[step]
            better = torch.ones_like(heaviest, dtype=torch.bool) if before is None else heaviest < before
            lightest[step] = heaviest if before is None else torch.minimum(heaviest, before)
        best[better] = items[better]
        if candidate + 1 in candidates:
            paired = steps.swap_pairs(weight, best, num_packs)
            finished = [paired, steps.lower_max(weight, paired, num_packs)]
            after = [pack_loads(weight, packing, num_packs).amax(1) for packing in finished]
            heaviest = torch.stack([*(one for one in lightest if one is not None), *after])  # [S, X]
            imbalances[candidate + 1] = over_mean(heaviest, weight, num_packs)
    return imbalances


def unchanged(_weight: Tensor, items: Tensor, _num_packs: int) -> Tensor:
    """Return the packing as greedy left it."""
    return items


def over_mean(heaviest: Tensor, weight: Tensor, num_packs: int) -> Tensor:
    """`[..., X]` float64: the heaviest packs in units of the mean pack; 1 in rows without weight."""
    mean = weight.sum(1).double() / num_packs
    return torch.where(mean > 0, heaviest / mean.clamp(min=1e-300), 1.0)


def contiguous(weight: Tensor, num_packs: int) -> Tensor:
    """`[X]`: the imbalance without packing."""
    items = torch.arange(weight.shape[1]).expand_as(weight)
    return over_mean(pack_loads(weight, items, num_packs).amax(1), weight, num_packs)


def bound(weight: Tensor, num_packs: int) -> Tensor:
    """`[X]`: the lower bound of the imbalance, which no packing can beat."""
    return lower_bound(weight, Topology(1, num_packs), weight.shape[1])


# --- text -------------------------------------------------------------------------------------------------------


def tables(data: dict[str, list[Tensor]], gpus: dict[str, list[int]], candidates: list[int]) -> list[str]:
    """A table for each K."""

    def mean_of(name: str, measure: Callable[[Tensor, int], Tensor]) -> Tensor:
        parts = [measure(load, num_packs) for load, num_packs in zip(data[name], gpus[name], strict=True)]
        return torch.cat(parts, dim=-1).mean(-1)

    def steps_of(weight: Tensor, num_packs: int) -> Tensor:
        imbalances = step_imbalances(weight, num_packs, candidates)
        return torch.stack([imbalances[number] for number in candidates])  # [K's, S, X]

    means = {name: mean_of(name, steps_of) for name in data}  # [K's, S] each
    first = ["contiguous", *(f"{float(mean_of(name, contiguous)):.5f}" for name in data)]
    last = ["lower bound", *(f"{float(mean_of(name, bound)):.5f}" for name in data)]
    return [
        f"## K = {number} {'candidate' if number == 1 else 'candidates'}\n\n"
        + markdown(
            ["imbalance after", *data],
            [
                first,
                *(
                    [line, *(f"{float(means[name][index, step]):.5f}" for name in data)]
                    for step, line in enumerate(SEARCHED + FINISHED)
                ),
                last,
            ],
        )
        for index, number in enumerate(candidates)
    ]


def settings(data: dict[str, list[Tensor]], gpus: dict[str, list[int]]) -> str:
    """A table of the data sets."""
    lines = []
    for name, loads in data.items():
        rows = sum(len(load) for load in loads)
        sizes = sorted({(load.shape[1], num_packs) for load, num_packs in zip(loads, gpus[name], strict=True)})
        text = ", ".join(f"{experts} on {num_packs}" for experts, num_packs in sizes)
        lines.append([name, str(len(loads)), str(rows), text])
    return "## Data\n\n" + markdown(["data set", "loads", "rows", "experts on GPUs"], lines)


def command(options: argparse.Namespace) -> str:
    """The command line without local paths."""
    arguments = {"--loads": options.loads and "DIR", "--experts-per-gpu": options.experts_per_gpu}
    arguments |= {"--experts": options.experts, "--rows": options.rows, "--candidates": options.candidates}
    return command_line("packing.bench_packing", arguments)


if __name__ == "__main__":
    main()
