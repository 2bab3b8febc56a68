"""Loads of single sequences: steps drawn from them, and the load that a perfectly bias-balanced router would have.

Shapes: N sequences, S steps, L layers, E experts.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

__all__ = ["halves", "read_sequences", "rescaled", "steps_of"]

_ROUNDS = 100  # of alternately rescaling experts and steps


def read_sequences(folder: Path, pattern: str = "deepseek-v2-lite_*_steps.npy") -> dict[str, Tensor]:
    """Read the sequences `[N, L, E]` int64 of each text, by the text's name."""
    paths = sorted(folder.glob(pattern))
    if not paths:
        raise SystemExit(f"no {pattern} in {folder}; pass a folder of recorded sequences")
    return {path.stem.split("_")[1]: torch.from_numpy(np.load(path).astype(np.int64)) for path in paths}


def halves(sequences: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Split `[N, L, E]` at random into two parts that share no sequence: one to plan on, one to judge."""
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(sequences)))
    return sequences[order[: len(order) // 2]], sequences[order[len(order) // 2 :]]


def steps_of(sequences: Tensor, steps: int, size: int, seed: int | list[int]) -> Tensor:
    """Draw steps `[S, L, E]`, each the sum of `size` sequences; no step holds a sequence twice."""
    if size > len(sequences):
        raise SystemExit(f"a step of {size} sequences cannot be drawn from a set of {len(sequences)}; pass more")
    generator = np.random.default_rng(seed)
    drawn = np.stack([generator.choice(len(sequences), size, replace=False) for _ in range(steps)])
    return torch.stack([sequences[torch.from_numpy(rows)].sum(0) for rows in drawn])


def rescaled(load: Tensor, *, keep_steps: bool = False) -> Tensor:
    """Scale every expert's counts so that all experts of a layer have the same mean over dim 0: `[S, L, E]`.

    This is the load of a router whose biases balance it perfectly over all of `load`, but not in every step. A layer's
    total does not change, and totals of experts differ by one token at most, because fractions are carried to the next
    step. An expert without tokens has its share spread evenly over the steps.

    >>> rescaled(torch.tensor([[[10, 60]], [[30, 20]]])).tolist()
    [[[15, 45]], [[45, 15]]]

    Args:
        load: tokens `[S, L, E]` int64.
        keep_steps: whether each step also keeps its tokens (up to rounding), as it would under any router; steps and
            experts are then rescaled alternately.
    """
    counts = load.numpy()
    counts = np.where(counts.sum(0) > 0, counts, 1).astype(np.float64)
    total, experts = load.sum((0, 2)).numpy(), load.shape[2]  # total: [L]
    share = total[:, None] // experts + (np.arange(experts) < total[:, None] % experts)  # [L, E]
    for _ in range(_ROUNDS if keep_steps else 0):
        counts *= share / counts.sum(0)
        counts *= (load.numpy().sum(2) / counts.sum(2).clip(min=1e-300))[..., None]
    so_far = np.rint(counts.cumsum(0) * (share / counts.sum(0)))  # [S, L, E]
    return torch.from_numpy(np.diff(so_far, axis=0, prepend=0).astype(np.int64))
