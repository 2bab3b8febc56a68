"""The cost of a placement, and the imbalance that it leaves.

Shapes: T steps, L layers, E experts, P slots, M GPUs, G slots on each GPU.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from distplb.core.arguments import refuse_wrong_types
from distplb.core.counts import Counts, as_load
from distplb.core.placement import Placement
from distplb.core.price import TimeCurve
from distplb.errors import DistplbError

__all__ = [
    "COST_BITS",
    "MAX_COST",
    "busiest_gpu",
    "gpu_tokens",
    "gpu_units",
    "imbalance",
    "layer_cost",
    "mean_of_known",
    "mean_of_layers",
    "nan_to_none",
    "over_mean",
    "steps_with_tokens",
]

COST_BITS = 41
MAX_COST = (1 << COST_BITS) - 1


def layer_cost(load: Tensor, expert_of_slot: Tensor, num_gpus: int) -> Tensor:
    """`[..., L]` int64: the busiest GPU's tokens, summed over the steps; saturates at 2^41 − 1.

    Args:
        load: `[T, L, E]` int64; replicas share an expert's tokens by integer division.
        expert_of_slot: `[..., L, P]`.
        num_gpus: M.
    """
    shape, replicas = expert_of_slot.shape, _replicas(load.shape[-1], expert_of_slot)
    cost = torch.zeros(shape[:-1], dtype=torch.int64, device=load.device)
    for step in load:  # [L, E]; one step at a time, as all at once would take T times the memory
        cost += _of_gpus(step, expert_of_slot, replicas, num_gpus).amax(-1)
    return cost.clamp_(max=MAX_COST)


def gpu_units(load: Tensor, expert_of_slot: Tensor, num_gpus: int) -> Tensor:
    """`[T, L, M]` int64: the load of each GPU, in units so small that the remainders of shares are negligible.

    Integer arithmetic gives all ranks the same result; `gpu_tokens` is for display.

    Args:
        load: `[T, L, E]` int64; replicas share their expert's load by integer division.
        expert_of_slot: `[L, P]`.
        num_gpus: M.
    """
    replicas = _replicas(load.shape[-1], expert_of_slot)
    return torch.stack([_of_gpus(step, expert_of_slot, replicas, num_gpus) for step in load])


def gpu_tokens(load: Tensor, expert_of_slot: Tensor, num_gpus: int) -> Tensor:
    """`[T, L, M]`: the tokens of each GPU; int64 without replicas, else float64, as shares may be fractions.

    >>> gpu_tokens(torch.tensor([[[5, 4]]]), torch.tensor([[0, 1]]), num_gpus=2)
    tensor([[[5, 4]]])
    >>> gpu_tokens(torch.tensor([[[5, 4]]]), torch.tensor([[0, 0, 0, 1]]), num_gpus=2)
    tensor([[[3.3333, 5.6667]]], dtype=torch.float64)

    Args:
        load: `[T, L, E]` int64; replicas share an expert's tokens evenly.
        expert_of_slot: `[L, P]`.
        num_gpus: M.
    """
    replicas = _replicas(load.shape[-1], expert_of_slot)
    of_slot = load.gather(-1, expert_of_slot.expand(len(load), -1, -1))  # [T, L, P]
    share = of_slot if replicas is None else of_slot.double() / replicas
    of_gpu: Tensor = share.unflatten(-1, (num_gpus, -1)).sum(-1)
    return of_gpu


def _replicas(num_experts: int, table: Tensor) -> Tensor | None:
    """`[..., L, P]`: for each slot of a table `[..., L, P]`, how many slots hold its expert; None without replicas."""
    if table.shape[-1] == num_experts:
        return None
    counts = torch.zeros((*table.shape[:-1], num_experts), dtype=torch.int64, device=table.device)
    counts.scatter_add_(-1, table, torch.ones_like(table))
    return counts.gather(-1, table)


def _of_gpus(step: Tensor, table: Tensor, replicas: Tensor | None, num_gpus: int) -> Tensor:
    """`[..., L, M]`: the tokens of each GPU in one step `[L, E]`."""
    of_slot = step.expand(*table.shape[:-1], -1).gather(-1, table)  # [..., L, P]
    share: Tensor = of_slot if replicas is None else of_slot // replicas
    of_gpu: Tensor = share.unflatten(-1, (num_gpus, -1)).sum(-1)
    return of_gpu


def imbalance(load: Counts, placement: Placement) -> Tensor:
    """Busiest GPU over mean GPU, at least 1; NaN where a step has no tokens in a layer.

    >>> load = torch.tensor([[[6, 2, 1, 3]], [[0, 0, 0, 0]]])
    >>> of_step = imbalance(load, Placement.contiguous(num_layers=1, num_experts=4, num_gpus=2))
    >>> of_step
    tensor([[1.3333],
            [   nan]], dtype=torch.float64)
    >>> of_step.nanmean()
    tensor(1.3333, dtype=torch.float64)

    Args:
        load: `[T, L, E]` or `[L, E]`, tokens of each expert, in any exact type, or weights with fractions; replicas
            share them evenly.
        placement: a placement of the same layers and experts.

    Returns:
        `[T, L]` float64. A step without tokens does not count: `nanmean` is the mean of the others.

    Raises:
        DistplbError: if `load` is neither token counts nor weights, or its shape does not match the placement.
    """
    tokens = as_load(load)
    refuse_wrong_types({"placement": (placement, (Placement,), "a Placement")})
    if tuple(tokens.shape[1:]) != (placement.num_layers, placement.num_experts):
        raise DistplbError(
            f"load has [layers, experts] = {list(tokens.shape[1:])}, but the placement has "
            f"{[placement.num_layers, placement.num_experts]}; pass the load of the same model"
        )
    busiest = gpu_tokens(tokens, placement.expert_of_slot.to(tokens.device), placement.num_gpus).amax(-1)  # [T, L]
    return over_mean(busiest, tokens.sum(-1).double() / placement.num_gpus)


def busiest_gpu(load: Tensor, placement: Placement, curve: TimeCurve | None) -> tuple[Tensor, Tensor]:
    """`[T, L]` each: the busiest GPU's tokens or nanoseconds, and their ratio to the mean; 0 and NaN without tokens.

    Args:
        load: `[T, L, E]` int64 tokens.
        placement: a placement of the same layers and experts.
        curve: an expert's time for its tokens; None to count tokens. Replicas share tokens evenly, and the time of a
            fractional share is interpolated between whole tokens.
    """
    total = load.sum(2)  # [T, L]
    if curve is None:
        of_gpu, mean = gpu_tokens(load, placement.expert_of_slot, placement.num_gpus), total.double()
    else:
        of_gpu = _gpu_times(load, placement, curve).masked_fill((total == 0)[..., None], 0)  # no tokens, no time
        mean = of_gpu.sum(2).double()
    busiest = of_gpu.amax(2)
    return busiest, over_mean(busiest, mean / placement.num_gpus)


def _gpu_times(load: Tensor, placement: Placement, curve: TimeCurve) -> Tensor:
    """`[T, L, M]`: nanoseconds of each GPU; int64 without replicas, else float64."""
    if placement.has_replicas:
        whole, rest = load // placement.replicas, load % placement.replicas  # [T, L, E]
        time = curve.time(whole).double()
        time = time + (curve.time(whole + 1) - time) * rest / placement.replicas
    else:
        time = curve.time(load)
    of_slot = time.gather(2, placement.expert_of_slot.expand(len(load), -1, -1))  # [T, L, P]
    of_gpu: Tensor = of_slot.unflatten(2, (placement.num_gpus, -1)).sum(3)
    return of_gpu


def over_mean(busiest: Tensor, mean: Tensor) -> Tensor:
    """Busiest over mean, float64 and at least 1; NaN where the mean is 0."""
    return torch.where(mean > 0, (busiest / mean.clamp(min=1e-300)).clamp(min=1.0), math.nan)


# --- steps and layers without tokens ----------------------------------------------------------------------------


def steps_with_tokens(load: Tensor) -> Tensor:
    """`[T', L, E]`: the steps of `[T, L, E]` in which some layer has tokens.

    >>> steps_with_tokens(torch.tensor([[[1, 2]], [[0, 0]], [[3, 0]]])).tolist()
    [[[1, 2]], [[3, 0]]]
    """
    has_tokens = load.flatten(1).amax(1) != 0  # counts are not negative
    return load.index_select(0, has_tokens.nonzero()[:, 0])


def mean_of_known(values: Tensor, dim: int | None = None) -> Tensor:
    """The mean over steps, layers or both, without those that are NaN for lack of tokens; NaN if all are.

    >>> mean_of_known(torch.tensor([[1.0, torch.nan], [2.0, torch.nan]]), dim=0)
    tensor([1.5000,    nan])

    Args:
        values: a float tensor of any shape.
        dim: the dim to reduce; None for all.
    """
    is_known, filled = ~values.isnan(), values.nan_to_num(nan=0.0)
    if dim is None:
        return filled.sum() / is_known.sum()
    return filled.sum(dim) / is_known.sum(dim)


def nan_to_none(values: Tensor) -> tuple[float | None, ...]:
    """`[L]` as a tuple, with None for NaN, as in events and JSON."""
    return tuple(None if math.isnan(value) else value for value in values.tolist())


def mean_of_layers(values: Iterable[float | None]) -> float | None:
    """The mean over the layers that have tokens; None if no layer has any.

    >>> mean_of_layers((1.0, None, 2.0))
    1.5
    """
    counted = [value for value in values if value is not None]
    return sum(counted) / len(counted) if counted else None
