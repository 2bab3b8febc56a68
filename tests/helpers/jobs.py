"""A minimal job for tests of the training loop: two layers, and an optimizer.

Shapes: L layers, E experts, P slots, G slots on each GPU.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distplb import LoadWindow, MoELayer, MoveModel, Moves, Placement, Rebalancer, Record, Search, Topology
from distplb.comm.torchdist import TorchComm

__all__ = ["DIM", "EXPERTS", "FREE", "LAYERS", "SLOT_BYTES", "Clock", "Job", "by_slot", "in_values", "skewed"]

LAYERS, EXPERTS, DIM = 2, 8, 6
# Moves cost almost nothing. Without a model, layers would be left alone: with the few tokens of tests, chance explains
# their imbalance.
FREE = MoveModel(1.0, 1, 1e12, 1e12)
SLOT_BYTES = 4 * (2 * DIM * DIM) * 4  # weight, gradient and two moments of AdamW


def in_values(options: dict[str, Any]) -> dict[str, Any]:
    """Build the arguments of `Rebalancer` from flat options, putting each into the value that has a field for it."""
    arguments = dict(options)
    for name, kind in (("search", Search), ("moves", Moves), ("record", Record)):
        names = [field.name for field in fields(kind) if field.name in arguments]
        if names:
            arguments[name] = kind(**{field: arguments.pop(field) for field in names})
    return arguments


class Job:
    """A minimal model of two layers of linear experts on each rank, and its training step."""

    def __init__(self, optimizer: Any = torch.optim.AdamW, experts: int = EXPERTS, ranks: int | None = None) -> None:
        ranks = ranks or dist.get_world_size()
        rank = dist.get_rank() if dist.is_initialized() else 0
        slots = max(1, experts // ranks)
        self.weights = [nn.Parameter(torch.randn(slots, DIM, 2 * DIM)) for _ in range(LAYERS)]
        self.routers = [nn.Parameter(torch.randn(experts, DIM)) for _ in range(LAYERS)]
        torch.manual_seed(0)
        for router in self.routers:  # replicated
            router.data.normal_()
        self.optimizer = optimizer([*self.weights, *self.routers])
        self.window = LoadWindow(LAYERS, experts, 4)
        self.topology, self.rank = Topology(1, ranks), rank

    def layers(self, **changed: Any) -> list[MoELayer]:
        return [
            MoELayer(**{"name": f"moe.{layer}", "experts": {"w": weight}, "router": {"weight": router}} | changed)
            for layer, (weight, router) in enumerate(zip(self.weights, self.routers, strict=True))
        ]

    def rebalancer(self, layers: list[MoELayer] | None = None, **options: Any) -> Rebalancer:
        comm = TorchComm() if dist.is_initialized() else None
        options = {"topology": self.topology, "window": self.window, "every": 2, "comm": comm} | options
        return Rebalancer(self.layers() if layers is None else layers, self.optimizer, **in_values(options))

    def backward(self) -> None:
        sum((p**2).sum() for p in (*self.weights, *self.routers)).backward()

    def iterate(self, counts: Tensor | None = None) -> None:
        """Train one iteration, with this rank's counts of slots `[L, P]`."""
        if counts is None:
            counts = torch.arange(1, EXPERTS + 1).expand(LAYERS, -1) * 10
        for layer in range(LAYERS):
            self.window.add(layer, counts[layer])
        self.optimizer.zero_grad()
        self.backward()
        self.optimizer.step()

    def values(self) -> list[Tensor]:
        return [p.detach().clone() for p in (*self.weights, *self.routers)]


class Clock:
    """Replaces the module `time`; stands still unless `now` is set or `tick` is not 0."""

    def __init__(self, tick: float = 0.0) -> None:
        self.now, self.tick = 0.0, tick

    def perf_counter(self) -> float:
        self.now += self.tick
        return self.now


def skewed(hot: tuple[int, ...]) -> Tensor:
    """Make counts `[L, E]` in which the logical experts `hot` have nine times the others' tokens."""
    counts = torch.full((LAYERS, EXPERTS), 10)
    counts[:, list(hot)] = 90
    return counts


def by_slot(counts: Tensor, placement: Placement) -> Tensor:
    """Order the counts of logical experts by slot, as the router's outputs count them."""
    return counts.gather(1, placement.expert_of_slot)
