"""Shares of replicas, and even loads."""

from __future__ import annotations

from typing import Any

import torch

from distplb import (
    Placement,
    TimeCurve,
    Topology,
    plan,
)
from distplb.core.cost import gpu_tokens
from inputs.case import Case
from inputs.empty_parts import FOUR, TWO, cost_of, replayed

__all__ = ["CASES"]


ONES = torch.ones(1, 1, 8, dtype=torch.int64)


HALVES = Placement(torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7] * 2]), num_experts=8, num_gpus=4)  # two replicas of each


def planned(load: list[int] | list[list[int]], topology: Topology, **options: Any) -> list[int]:
    """Plan one layer, and return the expert of each slot."""
    rows = torch.tensor(load)
    rows = rows[None] if rows.dim() == 1 else rows[:, None]
    return plan(rows, topology, engine="reference", **options).expert_of_slot[0].tolist()


CASES: list[Case] = [
    Case(
        "`gpu_tokens` of 8 experts with one token and two replicas each, on 4 GPUs",
        "[2.0, 2.0, 2.0, 2.0]",
        lambda _: gpu_tokens(ONES, HALVES.expert_of_slot, 4)[0, 0].tolist(),
    ),
    Case(
        "`replay` of the same",
        "busiest 2.0, imbalance 1.0000, 2.0 s",
        lambda _: cost_of(replayed(ONES, HALVES)),
    ),
    Case(
        "`replay` of the same with a time curve of 10 ns per token: nanoseconds of the busiest GPU",
        "20.0",
        lambda _: float(replayed(ONES, HALVES, TimeCurve((0, 1), (0, 10))).busiest),
    ),
    Case(
        "`gpu_tokens` of an expert with 5 tokens in 3 slots and one with 4 tokens in one slot, on 2 GPUs",
        "[3.3333, 5.6667]",
        lambda _: [
            round(one, 4)
            for one in gpu_tokens(torch.tensor([[[5, 4]]]), torch.tensor([[0, 0, 0, 1]]), 2)[0, 0].tolist()
        ],
    ),
    Case(
        "the same without replicas: integers",
        "[5, 4]",
        lambda _: gpu_tokens(torch.tensor([[[5, 4]]]), torch.tensor([[0, 1]]), 2)[0, 0].tolist(),
    ),
    Case(
        "`plan` of 8 experts with 5 tokens each, on 4 GPUs",
        "[0, 1, 2, 3, 4, 5, 6, 7]",
        lambda _: planned([5] * 8, FOUR),
    ),
    Case("`plan` of counts that are all 0", "[0, 1, 2, 3, 4, 5, 6, 7]", lambda _: planned([0] * 8, FOUR)),
    Case("`plan` of [7, 1, 4, 2] on one GPU", "[0, 1, 2, 3]", lambda _: planned([7, 1, 4, 2], Topology(1, 1))),
    Case("`plan` of [7, 1, 4, 2] on 4 GPUs, one expert each", "[0, 1, 2, 3]", lambda _: planned([7, 1, 4, 2], FOUR)),
    Case(
        "`plan` of one hot expert, [90, 1, 1, 1] on 2 GPUs: no placement helps",
        "[0, 1, 2, 3]",
        lambda _: planned([90, 1, 1, 1], TWO),
    ),
    Case(
        "`plan` of 4 even experts in 8 slots",
        "[0, 0, 1, 1, 2, 2, 3, 3]",
        lambda _: planned([5] * 4, TWO, num_slots=8),
    ),
    Case(
        "`plan` of the same with replicas on different GPUs",
        "True",
        lambda _: sorted(planned([5] * 4, TWO, num_slots=8, allow_shared_replicas=False)[:4]) == [0, 1, 2, 3],
    ),
    Case(
        "`plan` of 8 even experts in 4 groups on 2 nodes of 2 GPUs",
        "[0, 1, 2, 3, 4, 5, 6, 7]",
        lambda _: planned([5] * 8, Topology(2, 2), num_groups=4),
    ),
    Case(
        "`plan` of [9, 9, 1, 1] and two empty steps, the same as for the one step",
        "[0, 2, 1, 3]",
        lambda _: planned([[9, 9, 1, 1], [0] * 4, [0] * 4], TWO),
    ),
]
