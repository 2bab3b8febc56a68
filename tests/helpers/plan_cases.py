"""Plans of every kind, by name, from the same counts; ranks, communicators and engines must agree on them.

Shapes: T steps, L layers, E experts, P slots.
"""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor

from distplb import Placement, Topology, plan
from distplb.comm.base import Comm
from distplb.core.price import TimeCurve

__all__ = [
    *("CURVE", "EXPERTS", "LAYERS", "PLANS", "SELECTION", "STEPS"),
    *("planned", "random_placement", "selected_plans", "skewed_load"),
]

STEPS, LAYERS, EXPERTS = 3, 5, 32


def skewed_load(seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    hot = torch.randn(1, LAYERS, EXPERTS, generator=generator).mul(1.2).exp()  # [1, L, E]
    wobble = torch.randn(STEPS, LAYERS, EXPERTS, generator=generator).mul(0.5).exp()
    return (1000 * hot * wobble).long()


def random_placement(num_slots: int) -> Placement:
    """Draw a placement on 8 GPUs that has every expert, some more than once."""
    random_ = random.Random(num_slots)
    spare = [random_.choices(range(EXPERTS), k=num_slots - EXPERTS) for _ in range(LAYERS)]
    return Placement(torch.tensor([random_.sample([*range(EXPERTS), *more], num_slots) for more in spare]), EXPERTS, 8)


CURVE = TimeCurve((0, 200, 400, 4000), (0, 900, 1000, 30000))
PLANS: dict[str, dict[str, Any]] = {
    "plain": {"num_candidates": 1},
    "fewer candidates than ranks": {"num_candidates": 3},
    "many candidates": {"num_candidates": 64},
    "current": {"num_candidates": 8, "current": Placement.contiguous(LAYERS, EXPERTS, 8)},
    "replicas": {"num_candidates": 6, "num_slots": 48},
    "replicas apart": {"num_candidates": 6, "num_slots": 80, "allow_shared_replicas": False},
    "current with replicas": {"num_candidates": 6, "num_slots": 48, "current": random_placement(48)},
    "groups": {"num_candidates": 6, "num_groups": 8},
    "groups with replicas": {"num_candidates": 6, "num_groups": 4, "num_slots": 64},
    "current with groups": {"num_candidates": 6, "num_groups": 4, "num_slots": 48, "current": random_placement(48)},
    "permute": {"num_candidates": 6, "mode": "permute"},
    "blocks over GPUs": {"num_candidates": 6, "mode": "permute", "num_groups": 4},
    "blocks in GPUs": {"num_candidates": 6, "mode": "permute", "num_groups": 16},
    "classes": {"num_candidates": 6, "slot_class": torch.tensor([0, 1, 2, 3] * 8)},
    "two slots of a class": {"num_candidates": 6, "slot_class": torch.tensor([0, 1, 1, 2] * 8)},
    "uneven classes": {"num_candidates": 6, "slot_class": torch.arange(32) % 3, "current": random_placement(32)},
    "a price": {"num_candidates": 6, "current": random_placement(32), "move_price": 120.5},
    "a pair of prices": {"current": random_placement(32), "move_price": (0.25, 400.0)},
    "a price with replicas": {"num_slots": 48, "current": random_placement(48), "move_price": (10.0, 90.0)},
    "a price with groups": {"num_groups": 4, "num_slots": 48, "current": random_placement(48), "move_price": 50.0},
    "a price with classes": {"slot_class": torch.arange(32) % 3, "current": random_placement(32), "move_price": 50.0},
    "a curve": {"num_candidates": 3, "time_curve": CURVE},
    "a curve with replicas and a price": {
        "num_slots": 48,
        "current": random_placement(48),
        "move_price": (2.0, 30.0),
        "time_curve": CURVE,
        "num_candidates": 7,
    },
    "one step": {"steps": 1, "num_candidates": 6},
    "one step with a price": {"steps": 1, "current": random_placement(32), "move_price": 60.0},
    "one step from replicas": {"steps": 1, "num_slots": 48, "current": random_placement(48)},
    "even": {"load": torch.ones_like},
    "even, with replicas and groups": {"load": torch.ones_like, "num_slots": 64, "num_groups": 4},
    "no tokens": {"load": torch.zeros_like},
    "some steps have no tokens": {"load": lambda load: load * (torch.arange(len(load)) % 2)[:, None, None]},
}
SELECTION = [
    "many candidates",
    "replicas",
    "current with groups",
    "blocks over GPUs",
    "a price with classes",
    "a curve",
]


def planned(whole: Tensor, name: str, comm: Comm | None = None) -> Placement:
    """Make one of the plans above from this rank's counts."""
    options = {option: value for option, value in PLANS[name].items() if option not in ("steps", "load")}
    load = PLANS[name].get("load", lambda load: load)(whole[: PLANS[name].get("steps")])
    return plan(load, Topology(2, 4), comm=comm, seed=7, **options)


def selected_plans(comm: Comm) -> dict[str, list[list[int]]]:
    """Make the selected plans, from counts that are spread unevenly over the ranks."""
    whole = skewed_load()
    mine = whole // comm.size if comm.rank else whole - (comm.size - 1) * (whole // comm.size)
    return {name: planned(mine, name, comm).expert_of_slot.tolist() for name in SELECTION}
