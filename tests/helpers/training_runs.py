"""Shared by runs of the example's model: batches, and the difference between two runs."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["EXPERTS", "SEQUENCE", "batch", "furthest"]

EXPERTS, BATCH, SEQUENCE = 8, 8, 24


def batch(iteration: int) -> tuple[Tensor, Tensor]:
    """Draw this rank's rows of a global batch of skewed, repetitive bytes."""
    generator = torch.Generator().manual_seed(iteration)
    rows = (torch.randn(BATCH, SEQUENCE + 1, generator=generator) * 20).long().remainder(256)
    rows[:, 1::2] = rows[:, :-1:2] // 2 + 3  # something to learn
    mine = rows.chunk(dist.get_world_size())[dist.get_rank()]
    return mine[:, :-1], mine[:, 1:]


def furthest(one: dict[str, Tensor], other: dict[str, Tensor]) -> tuple[float, str]:
    """Return the largest difference, relative to the tensor's largest value, and the tensor's name."""
    assert one.keys() == other.keys()
    return max(
        (float((one[name] - other[name]).abs().max() / one[name].abs().max().clamp(min=1e-30)), name) for name in one
    )
