"""Choose the engine that searches a plan, by name or by speed; `cuda` only after a trial on a small plan.

Shapes: T steps, L layers, E experts, P slots.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from distplb.core.hashing import hashed
from distplb.core.placement import Placement
from distplb.core.topology import Topology
from distplb.packing.cuda_trial import engine_after
from distplb.packing.engines import Engine
from distplb.planning.options import PlanOptions
from distplb.planning.problem import Problem

__all__ = ["engine_for"]

_LAYERS, _CANDIDATES = 3, 4  # a dozen rows
_TOKENS = 1 << 10  # more than any expert gets in a step


def engine_for(
    options: PlanOptions, topology: Topology, shape: tuple[int, int, int], device: torch.device
) -> tuple[str, Engine]:
    """Name and engine that the options request, or else the fastest on `device`; `cuda` only if it passes a trial.

    The trial is a small problem with the same experts, slots, GPUs, groups, classes and steps, so that it compiles the
    kernels that later plans need. It runs once per process and shape.

    Args:
        options: options of the search.
        topology: topology of the EP group.
        shape: (T, L, E) of the load. Kernels are compiled for T rounded up to a power of two.
        device: device of the load, on which the search runs.

    Raises:
        DistplbError: if the engine that the options name is not available.
    """
    num_steps, _, num_experts = shape
    classes = None if options.slot_class is None else tuple(options.slot_class.tolist())
    trial = _PlanTrial(
        num_steps=1 << (num_steps - 1).bit_length(),
        num_experts=num_experts,
        num_slots=options.slots(num_experts),
        topology=topology,
        num_groups=options.num_groups,
        slot_class=classes,
        mode=options.mode,
        allow_shared_replicas=options.allow_shared_replicas,
        has_current=options.current is not None,
        has_price=any(options.prices),
        device=device,
    )
    return engine_after(trial, options.engine, device)


@dataclass(frozen=True, kw_only=True)
class _PlanTrial:
    """Everything that the kernels of a plan are compiled for; see `Trial`."""

    num_steps: int
    num_experts: int
    num_slots: int
    topology: Topology
    num_groups: int | None
    slot_class: tuple[int, ...] | None
    mode: str
    allow_shared_replicas: bool
    has_current: bool
    has_price: bool
    device: torch.device

    def __str__(self) -> str:
        return (
            f"{self.num_experts} expert{'s' * (self.num_experts != 1)} in "
            f"{self.num_slots} slot{'s' * (self.num_slots != 1)} of "
            f"{self.topology.num_gpus} GPU{'s' * (self.topology.num_gpus != 1)}, "
            f"{self.num_steps} step{'s' * (self.num_steps != 1)}"
        )

    def run(self, engine: Engine) -> None:
        """Plan a dozen rows."""
        load = self._load()
        options = PlanOptions(
            num_slots=self.num_slots,
            num_groups=self.num_groups,
            slot_class=None if self.slot_class is None else torch.tensor(self.slot_class, device="cpu"),
            allow_shared_replicas=self.allow_shared_replicas,
            mode=self.mode,
        )
        if self.has_current:
            table = torch.arange(self.num_slots, device="cpu") % self.num_experts
            current = Placement(table.expand(_LAYERS, -1), self.num_experts, self.topology.num_gpus)
            inside = float(load.sum()) / _LAYERS / self.topology.num_gpus * 2.0**-12
            options = replace(options, current=current, move_price=(inside, 2 * inside) if self.has_price else 0.0)
        problem = Problem(load, self.topology, options, ("cuda", engine))
        cost = problem.costs(torch.arange(_CANDIDATES, device=self.device))
        problem.polish(problem.build(cost.argmin(0)))

    def _load(self) -> torch.Tensor:
        """`[T, L, E]`: some experts are hot in all steps, all fluctuate, and the last layer is full of ties."""
        number = torch.arange(self.num_steps * _LAYERS * self.num_experts, device=self.device)
        number = number.view(self.num_steps, _LAYERS, self.num_experts)
        zero = torch.zeros_like(number)
        popular = hashed(zero, number[0]) % 16 + 1  # [T, L, E], the same in every step
        load = popular * (hashed(zero, number) % (_TOKENS // 16))
        load[:, -1] %= 3
        return load
