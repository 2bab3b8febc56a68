"""`split`: which GPU computes which tokens of one step of one layer.

Shapes: E experts, M GPUs, N nodes, R replica slots on each GPU.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from distplb.core.arguments import plain, refuse_wrong_types, shown
from distplb.core.counts import Counts
from distplb.core.topology import Topology
from distplb.errors import DistplbError
from distplb.splitting.engines import engine_named
from distplb.splitting.inputs import checked_size, checked_slots, checked_step
from distplb.splitting.rules import EMPTY, Array
from distplb.splitting.split_value import Split

__all__ = ["level_of", "split"]

_SCALE = 1 << 20  # a tolerance is rounded to this fraction, so that all ranks compare integers


def split(
    counts: Counts,
    home: Any,
    *,
    topology: Topology,
    replica_slots: int = 2,
    tolerance: float = 0.005,
    min_quota: int = 1,
    tile: int = 1,
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
        min_quota: the fewest tokens that are worth a replica.
        tile: the tokens that a matrix product takes at a time; those of a replica are a multiple of it.
        engine: "reference" or "cpu"; None for the faster one that is available. They agree exactly.

    Raises:
        DistplbError: for counts, homes or options that do not fit.
    """
    refuse_wrong_types({"engine": (engine, (str, None), "the name of an engine, or None for the fastest")})
    tokens, home_gpu = checked_step(counts, home, topology)
    slots = checked_slots(replica_slots, len(home_gpu))
    least, tile = checked_size("min_quota", min_quota), checked_size("tile", tile)
    total, owner = tokens.numpy().sum(0), home_gpu.numpy()
    level = level_of(total, owner, topology, _scaled(tolerance))
    node = np.arange(topology.num_gpus) // topology.gpus_per_node
    expert, part = engine_named(engine).replicas(total, owner, node, slots, level, least, tile)
    quota = np.zeros((len(total), topology.num_gpus), np.int64)
    gpu, slot = (expert != EMPTY).nonzero()
    lent = expert[gpu, slot]
    at_home = total.copy()
    np.subtract.at(at_home, lent, part[gpu, slot])
    quota[np.arange(len(total)), owner] = at_home
    quota[lent, gpu] = part[gpu, slot]
    return Split(tokens, home_gpu, torch.from_numpy(quota), torch.from_numpy(expert))


def level_of(total: Array, home: Array, topology: Topology, tolerance: int) -> int:
    """Tokens that no GPU should exceed: step (0) of `reference`.

    Args:
        total: `[E]` int64, of all sources.
        home: `[E]`, the GPU that owns each expert.
        topology: nodes and GPUs.
        tolerance: in units of 2^-20.
    """
    of_node = np.zeros(topology.num_nodes, np.int64)
    np.add.at(of_node, home // topology.gpus_per_node, total)
    everything, num_gpus = int(total.sum()), topology.num_gpus
    busiest_node = -(-int(of_node.max()) // topology.gpus_per_node)
    return max(busiest_node, -(-everything // num_gpus), everything * (_SCALE + tolerance) // (num_gpus * _SCALE))


def _scaled(tolerance: float) -> int:
    value = plain(tolerance)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1 or math.isnan(value):
        raise DistplbError(f"tolerance is {shown(tolerance)}; pass a fraction from 0 to 1, such as 0.005")
    return round(value * _SCALE)
