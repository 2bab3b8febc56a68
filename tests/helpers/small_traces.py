"""Traces so small that savings can be computed manually. Shapes: S steps, L layers, E experts."""

from __future__ import annotations

import torch
from torch import Tensor

from distplb import MoveModel, Placement, Topology, Trace

TOPOLOGY = Topology(num_nodes=1, gpus_per_node=2)
MODEL = MoveModel(seconds_per_token=1e-3, bytes_per_slot=10, bandwidth_inside=1000.0, bandwidth_between=100.0)


def trace_of(load: Tensor, iteration: Tensor | None = None, num_gpus: int = 2) -> Trace:
    steps = len(load)
    placement = Placement.contiguous(load.shape[1], load.shape[2], num_gpus)
    return Trace(
        load,
        (placement,),
        torch.zeros(steps, dtype=torch.int64),
        torch.arange(steps) if iteration is None else iteration,
    )


def skewed(steps: int) -> Tensor:
    """Make a load `[S, 1, 4]` with two hot experts on the first of two GPUs; on one GPU each, both GPUs are even."""
    return torch.tensor([[[6, 6, 1, 1]]]).expand(steps, -1, -1).clone()


def noise(steps: int, tokens: float = 20.0, experts: int = 32) -> Tensor:
    """Draw a load `[S, 2, E]` of equally likely experts, independently in each step."""
    mean = torch.full((steps, 2, experts), tokens)
    return torch.poisson(mean, generator=torch.Generator().manual_seed(0)).long()


def ring(filled: Tensor, rows: int, first: int = 0) -> Tensor:
    """Make a buffer `[S, L, E]` of `rows` rows, whose rows from `first` on are `filled`."""
    load = torch.zeros(rows, *filled.shape[1:], dtype=torch.int64)
    load[first : first + len(filled)] = filled
    return load
