"""How even a load is, as other projects define it; NaN for a load without tokens.

Shapes: T steps, L layers, E experts, M GPUs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from distplb.core.cost import mean_of_known

__all__ = ["balancedness_sglang", "balancedness_vllm", "max_violation"]


def balancedness_vllm(of_gpu: Tensor) -> float:
    """Tokens of the mean GPU over tokens of the busiest GPU, each summed over layers and steps: a ratio of sums.

    If all layers and steps have the same number of tokens, it is 1 / the mean imbalance. vLLM logs it for one step,
    without making the shares of replicas equal. Its source intends "for each layer: mean over ranks / max over ranks";
    releases whose tensor is `[layers, ranks]` reduce the other dim, so they log a different value.

    >>> balancedness_vllm(torch.tensor([[[3, 1], [2, 2]]]))
    0.8

    Args:
        of_gpu: `[T, L, M]`, tokens of each GPU, as returned by `distplb.core.cost.gpu_tokens`.

    Source: `EplbState.step` in vllm/distributed/eplb/eplb_state.py.
    """
    total, busiest = of_gpu.sum().item(), of_gpu.amax(-1).sum().item()
    return total / of_gpu.shape[-1] / busiest if busiest else math.nan


def balancedness_sglang(of_gpu: Tensor) -> float:
    """Mean GPU / busiest GPU, averaged over the layers and steps that have tokens.

    >>> balancedness_sglang(torch.tensor([[[3, 1], [2, 2]]]))
    0.8333333333333333

    Args:
        of_gpu: as for `balancedness_vllm`.

    Source: `compute_utilization_rate` in sglang/srt/eplb/expert_distribution.py, which adds 1e-5 to both terms.
    """
    busiest, mean = of_gpu.amax(-1).double(), of_gpu.double().mean(-1)  # [T, L]
    return float(mean_of_known(torch.where(busiest > 0, mean / busiest.clamp(min=1e-300), math.nan)))


def max_violation(load: Tensor) -> float:
    """MaxVio: hottest expert / mean expert - 1, averaged over the layers and steps that have tokens.

    It measures how well the *router* balances; no placement changes it.

    >>> max_violation(torch.tensor([[[3, 1], [2, 2]]]))
    0.25

    Args:
        load: `[T, L, E]`, tokens of each expert.

    Source: Wang et al. 2024, Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts, arXiv:2408.15664; for
    one step it is their MaxVio of a batch.
    """
    busiest, mean = load.amax(-1).double(), load.double().mean(-1)  # [T, L]
    return float(mean_of_known(torch.where(mean > 0, busiest / mean.clamp(min=1e-300) - 1, math.nan)))
