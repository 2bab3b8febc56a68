"""The loads that planners are measured on, and the clusters that they plan for.

Shapes: T steps, L layers, E experts, P slots, M GPUs, G = P / M slots on each.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from distplb import Topology

GPUS_PER_NODE = 8
# Mean of a synthetic load. The counts of a flat layer then fluctuate by 1.6 % from one sample to the next.
TOKENS_PER_EXPERT = 4096
SHAPES = ("log-normal", "zipf-like", "few-hot")


@dataclass(frozen=True)
class Layout:
    """A cluster of nodes with 8 GPUs, its slots, and the groups whose experts stay on one node, if any."""

    nodes: int
    slots: int
    groups: int | None = None

    @property
    def topology(self) -> Topology:
        """The topology that planners take."""
        return Topology(self.nodes, GPUS_PER_NODE)

    def text(self, experts: int) -> str:
        """Describe the layout, for a heading."""
        nodes = f"{self.topology.num_gpus} GPUs ({self.nodes} {'node' if self.nodes == 1 else 'nodes'})"
        groups = "" if self.groups is None else f", {self.groups} groups kept on nodes"
        return f"{experts} experts, {self.slots} slots, {nodes}{groups}"


@dataclass(frozen=True)
class Preset:
    """The size of a model, and the clusters (nodes, slots) that it could run on."""

    layers: int
    experts: int
    clusters: tuple[tuple[int, int], ...]
    groups: int | None = None


PRESETS = {
    "mixtral": Preset(32, 8, ((1, 8), (1, 16))),
    "olmoe": Preset(16, 64, ((1, 64), (1, 72))),
    "deepseek-v2": Preset(59, 160, ((2, 160), (2, 192)), groups=8),
    "deepseek-v3": Preset(58, 256, ((1, 256), (2, 256), (4, 256), (4, 288), (8, 320)), groups=8),
    "kimi-k2": Preset(60, 384, ((8, 384), (8, 448))),
    "qwen3-30b": Preset(48, 128, ((2, 128), (2, 144))),
    "qwen3-235b": Preset(94, 128, ((4, 128), (4, 160))),
    "qwen3-next": Preset(48, 512, ((8, 512), (8, 576))),
    "gpt-oss-120b": Preset(36, 128, ((2, 128), (2, 144))),
}


@dataclass(frozen=True)
class Data:
    """Loads of one model.

    Args:
        model: name of the model.
        kind: "recorded", or the shape of the synthetic load.
        loads: pairs of the load `[L, E]` that is planned on and other loads of the same experts, which are not.
    """

    model: str
    kind: str
    loads: tuple[tuple[Tensor, list[Tensor]], ...]

    @property
    def layouts(self) -> list[Layout]:
        """The layouts of the model's preset, or one node per 64 experts; without groups, then with groups if any."""
        layers, experts = self.loads[0][0].shape
        nodes = max(1, experts // 64)
        spare = nodes * GPUS_PER_NODE
        preset = PRESETS.get(self.model, Preset(layers, experts, ((nodes, experts), (nodes, experts + spare))))
        flat = [Layout(*cluster) for cluster in preset.clusters]
        # Groups constrain nothing on one node, and are ignored if they cannot be divided evenly over the nodes.
        grouped = [cluster for cluster in preset.clusters if preset.groups and cluster[0] > 1]
        return flat + [Layout(*cluster, preset.groups) for cluster in grouped if preset.groups % cluster[0] == 0]


def recorded(folder: Path) -> list[Data]:
    """Read the `.npy` files of a folder by model; each is planned on, and judged on the model's other files too."""
    return [
        Data(
            model,
            "recorded",
            tuple((load, [other for other in loads if other is not load]) for load in loads),
        )
        for model, loads in real_loads(folder).items()
    ]


def synthetic(name: str, shape: str) -> Data:
    """Draw a preset's load of one shape, and a second sample of the same experts that is not planned on."""
    preset = PRESETS[name]
    generator = np.random.default_rng([preset.layers, preset.experts, SHAPES.index(shape)])
    popularity = popularities(shape, preset.layers, preset.experts, generator)
    seen, unseen = sampled(popularity, generator), sampled(popularity, generator)
    return Data(name, shape, ((seen, [unseen]),))


def popularities(shape: str, layers: int, experts: int, generator: np.random.Generator) -> np.ndarray:
    """Draw each expert's share of a layer's tokens, `[L, E]` float64."""
    if shape == "log-normal":
        popularity = generator.lognormal(0, 0.7, (layers, experts))
    elif shape == "zipf-like":  # the Zipf-Mandelbrot law
        ranks = 1 / (np.arange(experts) + experts / 16)
        popularity = generator.permuted(np.tile(ranks, (layers, 1)), axis=1)
        popularity *= generator.uniform(0.8, 1.2, (layers, experts))
    else:  # one expert in 64 has six times the tokens of the others
        popularity = generator.lognormal(0, 0.2, (layers, experts))
        popularity[:, : max(1, experts // 64)] *= 6
        popularity = generator.permuted(popularity, axis=1)
    return popularity / popularity.sum(1, keepdims=True)


def sampled(popularity: np.ndarray, generator: np.random.Generator) -> Tensor:
    """Draw the tokens of a router with these popularities, `[L, E]` int64."""
    tokens = TOKENS_PER_EXPERT * popularity.shape[1]
    return torch.from_numpy(generator.multinomial(tokens, popularity).astype(np.int64))


def disturbed(load: Tensor, deviation: float, seed: int) -> Tensor:
    """Multiply every count of `load [L, E]` by the exponential of a normal random number."""
    factor = np.exp(np.random.default_rng(seed).normal(0, deviation, load.shape))
    return torch.from_numpy(np.rint(load.numpy() * factor).astype(np.int64))


def wobbling_steps(load: Tensor, steps: int, deviation: float, seed: int) -> Tensor:
    """Draw steps `[T, L, E]` of `load [L, E]`, each with its own disturbed popularities."""
    generator = np.random.default_rng(seed)
    popularity = load.numpy() * np.exp(generator.normal(0, deviation, (steps, *load.shape)))
    popularity /= popularity.sum(2, keepdims=True)
    return torch.from_numpy(generator.multinomial(load.sum(1).numpy() // steps, popularity).astype(np.int64))


def real_loads(folder: Path) -> dict[str, list[Tensor]]:
    """Read the loads `[L, E]` int64, summed over steps, by model (a file's name up to the first underscore)."""
    loads: dict[str, list[Tensor]] = {}
    for path in sorted(folder.glob("*.npy")):
        counts = torch.from_numpy(np.load(path).astype(np.int64))
        load = counts.sum(0) if counts.dim() == 3 else counts
        loads.setdefault(path.stem.split("_")[0], []).append(load)
    if not loads:
        raise SystemExit(f"no .npy files in {folder}; pass a folder of loads")
    return loads
