"""Choices of experts that follow a pattern instead of a router, to see what rebalancing and replicas make of it.

Every choice depends on (workload, seed, step, layer, rank) alone. `benchmarks/splitting/loads.py` has the same patterns
as counts of large groups, where sources differ in their numbers of tokens.

Shapes: N tokens of this rank, K top-k, E experts, M GPUs.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

HOT, BURST, EVERY = 8.0, 32.0, 4  # how much more popular a hot expert is; bursts, and how often one comes, in steps


@dataclass(frozen=True)
class Place:
    """Where a choice is made: `lasting` draws what all steps share, `step` numbers the steps."""

    experts: int
    gpus: int
    rank: int
    step: int
    lasting: torch.Generator

    @property
    def per_gpu(self) -> int:
        return self.experts // self.gpus

    def order(self, number: int) -> Tensor:
        """A random order that lasts: [number]."""
        return torch.randperm(number, generator=self.lasting)

    def log_normal(self, deviation: float) -> Tensor:
        """Popularities that last: [E]."""
        return (deviation * torch.randn(self.experts, generator=self.lasting)).exp()


def with_hot(place: Place, hot: Tensor) -> Tensor:
    popularity = torch.ones(place.experts)
    popularity[hot] = HOT
    return popularity


def balanced(place: Place) -> Tensor:
    return torch.ones(place.experts)


def some_hot(place: Place) -> Tensor:
    """One expert in 16 is hot, for the tokens of all ranks alike."""
    return with_hot(place, place.order(place.experts)[: max(1, place.experts // 16)])


def one_gpu_hot(place: Place) -> Tensor:
    """All experts of one GPU are hot."""
    gpu = int(place.order(place.gpus)[0])
    return with_hot(place, torch.arange(gpu * place.per_gpu, (gpu + 1) * place.per_gpu))


def hot_spread(place: Place) -> Tensor:
    """As many experts as a GPU has are hot, on different GPUs where there are enough."""
    return with_hot(place, place.per_gpu * place.order(place.gpus)[: place.per_gpu])


def unequal_sources(place: Place) -> Tensor:
    """Every rank's tokens prefer other experts, the first rank's most of all."""
    for _ in range(place.rank + 1):
        popularity = place.log_normal(2.0 / (1 + place.rank))
    return popularity


def without_tokens(place: Place) -> Tensor:
    """A quarter of the experts, and all experts of one GPU, have no tokens."""
    popularity = place.log_normal(0.5)
    popularity[place.order(place.experts)[: place.experts // 4]] = 0
    gpu = int(place.order(place.gpus)[0])
    if place.gpus > 1:
        popularity[gpu * place.per_gpu : (gpu + 1) * place.per_gpu] = 0
    return popularity


def rotating(place: Place) -> Tensor:
    """As many experts as a GPU has are hot, other ones in every step."""
    order = place.order(place.experts)
    return with_hot(place, order[(place.step * place.per_gpu + torch.arange(place.per_gpu)) % place.experts])


def bursts(place: Place) -> Tensor:
    """In every fourth step another expert is 32 times as popular."""
    popularity, order = place.log_normal(0.3), place.order(place.experts)
    if place.step % EVERY == 0:
        popularity[order[place.step // EVERY % place.experts]] *= BURST
    return popularity


WORKLOADS: dict[str, Callable[[Place], Tensor]] = {
    "balanced": balanced,
    "some-hot": some_hot,
    "one-gpu-hot": one_gpu_hot,
    "hot-spread": hot_spread,
    "unequal-sources": unequal_sources,
    "without-tokens": without_tokens,
    "rotating": rotating,
    "bursts": bursts,
}


def choice(name: str, shape: tuple[int, int, int], *, seed: int, step: int, layer: int, rank: int, gpus: int) -> Tensor:
    """Choose K different experts for each token, by popularity: `shape` (N, K, E) -> [N, K]."""
    tokens, top_k, experts = shape
    kind = zlib.crc32(name.encode())
    lasting = torch.Generator().manual_seed(hash((kind, seed, layer)) % 2**63)
    popularity = WORKLOADS[name](Place(experts, gpus, rank, step, lasting))  # [E]
    passing = torch.Generator().manual_seed(hash((kind, seed, layer, step, rank)) % 2**63)
    # The largest of log(popularity) + Gumbel noise are a draw without replacement.
    noise = -(-torch.rand(tokens, experts, generator=passing).clamp(1e-12, 1 - 1e-7).log()).log()
    return (popularity.log() + noise).topk(top_k, dim=1).indices
