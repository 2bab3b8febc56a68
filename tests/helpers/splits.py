"""Random splits, legal but not good ones.

Shapes: E experts, M GPUs, R replica slots.
"""

from __future__ import annotations

import torch

from distplb.splitting.reference import EMPTY
from distplb.splitting.split_value import Split

__all__ = ["random_split"]


def random_split(num_gpus: int, seed: int, *, experts_per_gpu: int = 2, slots: int = 2, tokens: int = 1000) -> Split:
    """A split of skewed counts, some of them 0, with replicas in some slots and quotas drawn at random."""
    generator = torch.Generator().manual_seed(seed)
    num_experts = num_gpus * experts_per_gpu
    popularity = torch.rand(num_experts, generator=generator) ** 3 * tokens
    counts = (torch.rand(num_gpus, num_experts, generator=generator) * popularity).long()  # [M, E]
    home = torch.randperm(num_experts, generator=generator) % num_gpus  # [E]
    replica = torch.full((num_gpus, slots), EMPTY)
    quota = torch.zeros(num_experts, num_gpus, dtype=torch.int64)
    quota[torch.arange(num_experts), home] = counts.sum(0)
    for gpu in range(num_gpus):
        candidates = torch.randperm(num_experts, generator=generator).tolist()
        for slot in range(slots):
            expert = candidates[slot]
            left = int(quota[expert, home[expert]])
            if home[expert] == gpu or left < 1 or torch.rand((), generator=generator) < 0.3:
                continue
            part = int(torch.randint(1, left + 1, (), generator=generator))
            replica[gpu, slot] = expert
            quota[expert, gpu] += part
            quota[expert, home[expert]] -= part
    return Split(counts, home, quota, replica)
