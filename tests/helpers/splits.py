"""Random splits, the best of all splits of small cases, and power laws.

Shapes: E experts, M GPUs, R replica slots.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from distplb.splitting.rules import EMPTY, Array
from distplb.splitting.split_value import Split

__all__ = ["best_of_all", "cheapest_of_all", "power_law", "random_split"]


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


def best_of_all(tokens: Array, home: Array, num_gpus: int, slots: int) -> dict[int, int]:
    """The lowest level that each number of replicas can reach, over all placements of replicas on one node.

    Args:
        tokens: `[E]`, the tokens of each expert.
        home: `[E]`, the GPU that owns each expert.
        num_gpus: M.
        slots: R.
    """
    best: dict[int, int] = {}
    for number, _, level in _all_placements(tokens, home, num_gpus, slots):
        best[number] = min(best.get(number, 1 << 62), level)
    return best


def cheapest_of_all(tokens: Array, home: Array, num_gpus: int, slots: int, price: int, lowest: int) -> int:
    """The lowest cost of a split: its level, at least `lowest`, and `price` for each replica that one GPU sends, or
    receives, at most; arguments as for `best_of_all`."""
    placements = _all_placements(tokens, home, num_gpus, slots)
    return min(max(level, lowest) + price * most for _, most, level in placements)


def _all_placements(tokens: Array, home: Array, num_gpus: int, slots: int) -> Iterator[tuple[int, int, int]]:
    """Of each placement of replicas: their number, how many one GPU sends or receives at most, the lowest level."""
    experts, owner, counts = range(len(home)), home.tolist(), tokens.tolist()
    options = [
        [chosen for size in range(slots + 1) for chosen in itertools.combinations(away, size)]
        for away in ([expert for expert in experts if owner[expert] != gpu] for gpu in range(num_gpus))
    ]
    for placed in itertools.product(*options):
        holders, sends = [1 << gpu for gpu in owner], [0] * num_gpus
        for gpu, chosen in enumerate(placed):
            for expert in chosen:
                holders[expert] |= 1 << gpu
                sends[owner[expert]] += 1
        yield sum(sends), max(*sends, *map(len, placed)), _lowest_level(counts, holders, num_gpus)


def _lowest_level(tokens: list[int], holders: list[int], num_gpus: int) -> int:
    """The busiest GPU of the best quotas: tokens that only some GPUs can compute, over these GPUs (Hall's theorem).

    Args:
        tokens: of each expert.
        holders: of each expert, the GPUs that hold it, as bits.
    """
    return max(
        -(-sum(count for count, held in zip(tokens, holders, strict=True) if held & ~gpus == 0) // gpus.bit_count())
        for gpus in range(1, 1 << num_gpus)
    )


def power_law(imbalance: float, seed: int) -> Any:
    """Tokens of 256 experts whose popularity falls as a power of their rank, so that 64 GPUs have this imbalance."""
    random = np.random.default_rng(seed)
    order, rank = random.permutation(256), np.arange(1.0, 257.0)
    low, high = 0.0, 5.0
    for _ in range(60):
        middle = (low + high) / 2
        popularity = (rank**-middle / (rank**-middle).sum())[order]
        low, high = (middle, high) if popularity.reshape(64, 4).sum(1).max() * 64 < imbalance else (low, middle)
    return random.multinomial(64 * 8192 * 8, popularity)
