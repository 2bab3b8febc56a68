"""Every policy of the planner on 16 experts, the rules that it must keep, and loads and placements to plan from.

Shapes: T steps, L layers, E experts, P slots, M GPUs.
"""

from __future__ import annotations

import random

import torch
from torch import Tensor

from distplb import Placement, Topology
from distplb.planning.options import PlanOptions
from distplb.planning.problem import Problem

__all__ = [
    "CLASSES",
    "POLICIES",
    "SIZES",
    "breaking_rules",
    "keeps_rules",
    "placement_of",
    "random_table",
    "rows_of_every_kind",
    "searched",
    "skewed",
]

SIZES = [(8, 2), (12, 3), (16, 4), (20, 5), (6, 6), (4, 1)]  # (E, M)
CLASSES = torch.tensor([0, 1, 1, 2] * 4)
# Every policy, for 16 experts: the topology and the options.
POLICIES = {
    "flat": (Topology(1, 4), {}),
    "one slot a GPU": (Topology(2, 8), {}),
    "replicas": (Topology(1, 4), {"num_slots": 24}),
    "replicas apart": (Topology(1, 4), {"num_slots": 40, "allow_shared_replicas": False}),
    "more replicas than fit apart": (Topology(1, 2), {"num_slots": 40}),
    "groups on nodes": (Topology(2, 2), {"num_groups": 8}),
    "groups on nodes with replicas": (Topology(2, 4), {"num_groups": 4, "num_slots": 32}),
    "blocks over GPUs": (Topology(1, 8), {"num_groups": 4, "mode": "permute"}),
    "blocks in GPUs": (Topology(2, 1), {"num_groups": 8, "mode": "permute"}),
    "classes": (Topology(1, 4), {"slot_class": CLASSES}),
    "large classes": (Topology(1, 2), {"slot_class": torch.arange(16) % 2}),
}


def skewed(seed: int, *shape: int) -> Tensor:
    """Draw log-normal tokens of any shape."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).mul(1.2).exp().mul(300).long()


def rows_of_every_kind(seed: int, num_experts: int) -> Tensor:
    """Draw rows `[L, E]`: log-normal, Zipf, a few hot experts, equal, many zeros, ties, and no tokens."""
    random_, rows = random.Random(f"{seed} {num_experts}"), []
    for _ in range(12):
        skew, hot = random_.uniform(0.5, 2), random_.sample(range(num_experts), max(1, num_experts // 16))
        zipf = [int(10**5 / rank**skew) for rank in range(1, num_experts + 1)]
        rows += [
            [int(random_.lognormvariate(6, 1.2)) for _ in range(num_experts)],
            random_.sample(zipf, num_experts),
            [random_.randrange(50, 150) * (50 if expert in hot else 1) for expert in range(num_experts)],
            [random_.randrange(1000)] * num_experts,
            [random_.choice([0, 0, 0, random_.randrange(1000)]) for _ in range(num_experts)],
            [random_.randrange(4) for _ in range(num_experts)],
        ]
    return torch.tensor([*rows, [0] * num_experts])


def random_table(random_: random.Random, num_layers: int, num_experts: int, num_slots: int) -> Tensor:
    """Draw a table `[L, P]` that has every expert, some more than once."""
    spare = [random_.choices(range(num_experts), k=num_slots - num_experts) for _ in range(num_layers)]
    return torch.tensor([random_.sample([*range(num_experts), *more], num_slots) for more in spare])


def keeps_rules(policy: str, row: list[int], start: list[int]) -> bool:
    """Whether the policy allows one layer's table, given that it started from `start`."""
    topology, options = POLICIES[policy]
    groups, size = options.get("num_groups"), len(row) // topology.num_gpus
    gpus = [row[at : at + size] for at in range(0, len(row), size)]
    if "slot_class" in options:
        classes = options["slot_class"].tolist()
        return all(classes[row.index(expert)] == classes[start.index(expert)] for expert in range(16))
    if groups and options.get("mode") == "permute":
        size = 16 // groups
        return all(len({e // size for e in row[at : at + size]}) == 1 for at in range(0, 16, size))
    if groups:
        size = len(row) // topology.num_nodes
        nodes = [{e * groups // 16 for e in row[at : at + size]} for at in range(0, len(row), size)]
        return [len(node) for node in nodes] == [groups // topology.num_nodes] * topology.num_nodes
    return options.get("allow_shared_replicas", True) or all(len(set(gpu)) == size for gpu in gpus)


def placement_of(policy: str, load: Tensor) -> Placement:
    """Make a plan that keeps the policy's rules."""
    topology, options = POLICIES[policy]
    table = searched(Problem(load, topology, PlanOptions(**options)), 1)
    return Placement(table, 16, topology.num_gpus)


def breaking_rules(policy: str, seed: int, num_layers: int) -> Placement:
    """Draw a placement regardless of the policy's rules."""
    topology, options = POLICIES[policy]
    table = random_table(random.Random(seed), num_layers, 16, options.get("num_slots", 16))
    return Placement(table, 16, topology.num_gpus)


def searched(problem: Problem, num_candidates: int) -> Tensor:
    """Run stages 2 to 4 on one rank."""
    return problem.polish(problem.build(problem.costs(torch.arange(num_candidates)).argmin(0)))
