"""`split`: which GPU computes which tokens of one step of one layer.

Shapes: E experts, M GPUs, N nodes, R replica slots on each GPU.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from distplb.core.arguments import plain, refuse_wrong_types, shown, whole_number
from distplb.core.counts import Counts, as_counts, as_integers
from distplb.core.topology import Topology
from distplb.errors import DistplbError
from distplb.splitting.engines import engine_named
from distplb.splitting.split_value import EMPTY, Split

__all__ = ["level_of", "split"]

_SCALE = 1 << 20  # a tolerance is rounded to this fraction, so that all ranks compare integers


def split(
    counts: Counts,
    home: Any,
    *,
    topology: Topology,
    replica_slots: int = 2,
    tolerance: float = 0.005,
    engine: str | None = None,
) -> Split:
    """Lend GPUs replicas of hot experts, as few as bring every GPU to within the tolerance of the mean.

    Equal on all ranks, because it depends on its arguments alone. If R slots do not suffice, the busiest GPU comes as
    near to the mean as the engine finds; it never gets more tokens than without replicas. Replicas stay inside nodes.

    >>> found = split([[6, 1], [4, 1]], [0, 1], topology=Topology(num_nodes=1, gpus_per_node=2))
    >>> found.quota.tolist(), found.replica.tolist(), found.imbalance
    ([[6, 4], [0, 2]], [[-1, -1], [0, -1]], 1.0)

    Args:
        counts: `[M, E]`, the tokens that each GPU's router sends to each expert.
        home: `[E]`, the GPU that owns each expert.
        topology: nodes and GPUs.
        replica_slots: R.
        tolerance: of the busiest GPU above the mean, as a fraction.
        engine: "reference" or "cpu"; None for the faster one that is available. They agree exactly.

    Raises:
        DistplbError: for counts, homes or options that do not fit.
    """
    refuse_wrong_types(
        {
            "topology": (topology, (Topology,), "a Topology, such as Topology.from_env()"),
            "engine": (engine, (str, None), "the name of an engine, or None for the fastest"),
        }
    )
    tokens = as_counts("counts", counts, ("GPU", "expert")).cpu()
    if tokens.dim() != 2 or 0 in tokens.shape or len(tokens) != topology.num_gpus:
        raise DistplbError(
            f"counts has shape {list(tokens.shape)}; pass [GPUs, experts] with the topology's {topology.num_gpus} GPUs"
        )
    home_gpu = _homes(home, *tokens.shape)
    slots = whole_number("replica_slots", replica_slots, minimum=0)
    total, node = tokens.sum(0), [gpu // topology.gpus_per_node for gpu in range(topology.num_gpus)]
    level = level_of(total, home_gpu, topology, _scaled(tolerance))
    found = engine_named(engine).replicas(total.tolist(), home_gpu.tolist(), node, slots, level)
    quota = torch.zeros(len(total), topology.num_gpus, dtype=torch.int64, device="cpu")
    quota[torch.arange(len(total), device="cpu"), home_gpu] = total
    replica = torch.full((topology.num_gpus, slots), EMPTY, dtype=torch.int64, device="cpu")
    used = [0] * topology.num_gpus
    for expert, gpu, part in sorted(found):
        quota[expert, gpu] = part
        quota[expert, home_gpu[expert]] -= part
        replica[gpu, used[gpu]] = expert
        used[gpu] += 1
    return Split(tokens, home_gpu, quota, replica)


def level_of(total: Tensor, home: Tensor, topology: Topology, tolerance: int) -> int:
    """Tokens that no GPU should exceed: step (0) of `reference`.

    Args:
        total: `[E]` int64, of all sources.
        home: `[E]`, the GPU that owns each expert.
        topology: nodes and GPUs.
        tolerance: in units of 2^-20.
    """
    of_node = torch.zeros(topology.num_nodes, dtype=torch.int64, device="cpu")
    of_node.index_add_(0, home // topology.gpus_per_node, total)
    everything, num_gpus = int(total.sum()), topology.num_gpus
    busiest_node = -(-int(of_node.amax()) // topology.gpus_per_node)
    return max(busiest_node, -(-everything // num_gpus), everything * (_SCALE + tolerance) // (num_gpus * _SCALE))


def _homes(home: Any, num_gpus: int, num_experts: int) -> Tensor:
    homes = as_integers("home", home, "the GPU of each expert").cpu()
    if list(homes.shape) != [num_experts]:
        raise DistplbError(f"home has shape {list(homes.shape)}; pass the GPU of each of {num_experts} experts")
    if (homes.lt(0) | homes.ge(num_gpus)).any():
        raise DistplbError(f"home has GPUs {int(homes.amin())} to {int(homes.amax())}; pass GPUs in [0, {num_gpus})")
    return homes


def _scaled(tolerance: float) -> int:
    value = plain(tolerance)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1 or math.isnan(value):
        raise DistplbError(f"tolerance is {shown(tolerance)}; pass a fraction from 0 to 1, such as 0.005")
    return round(value * _SCALE)
