"""`split`: which GPU computes which tokens of one step of one layer.

Shapes: E experts, M GPUs, N nodes, R replica slots on each GPU.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from distplb.core.arguments import refuse_wrong_types
from distplb.core.counts import Counts
from distplb.core.price import TimeCurve
from distplb.core.topology import Topology
from distplb.splitting.caps import nodes_of, within_cap
from distplb.splitting.engines import engine_named
from distplb.splitting.inputs import checked_prices, checked_size, checked_slots, checked_step, checked_tolerance
from distplb.splitting.rules import NEVER, NO_CURVE, TOLERANCES, Array, Rules
from distplb.splitting.split_value import Split

__all__ = ["level_of", "split"]


def split(
    counts: Counts,
    home: Any,
    *,
    topology: Topology,
    replica_slots: int = 2,
    tolerance: float = 0.005,
    push_price: tuple[float, float] = (0.0, math.inf),
    min_quota: int = 1,
    max_tokens_per_gpu: int | None = None,
    tile: int = 1,
    time_curve: TimeCurve | None = None,
    engine: str | None = None,
) -> Split:
    """Lend GPUs replicas of hot experts, as few as bring every GPU to within the tolerance of the mean.

    Equal on all ranks, because it depends on its arguments alone. If R slots do not suffice, the busiest GPU comes as
    near to the mean as the engine finds; it never gets more tokens than without replicas.

    With prices, a split costs the busiest GPU's tokens and the prices of the replicas that one GPU sends, or receives,
    whichever GPU pays most. The cheapest split is taken: it has no replicas if none pay.

    >>> found = split([[6, 1], [4, 1]], [0, 1], topology=Topology(num_nodes=1, gpus_per_node=2))
    >>> found.quota.tolist(), found.replica.tolist(), found.imbalance
    ([[6, 4], [0, 2]], [[-1, -1], [0, -1]], 1.0)

    Args:
        counts: `[M, E]`, the tokens that each GPU's router sends to each expert.
        home: `[E]`, the GPU that owns each expert.
        topology: nodes and GPUs.
        replica_slots: R, from 0 to 1,024.
        tolerance: how far the busiest GPU may stay above the mean, as a fraction from 0 to 1.
        push_price: the price of a replica in its home's node, and of one in another node, in tokens, rounded to whole
            ones; infinity for no such replicas.
        min_quota: the fewest tokens that are worth a replica.
        max_tokens_per_gpu: no GPU computes more tokens, whatever that costs: prices, `min_quota`, `tile` and
            `time_curve` count only where this is kept.
        tile: the tokens that a matrix product takes at a time; those of a replica are a multiple of it.
        time_curve: maps an expert's tokens on a GPU, in whole tiles, to its time, which is then evened out instead of
            tokens; prices stay in tokens, converted at the curve's last point.
        engine: "reference" or "cpu"; None for the faster one that is available. They agree exactly.

    Raises:
        DistplbError: for counts, homes or options that do not fit, and if no split keeps `max_tokens_per_gpu`, or none
            is found before the exact search is given up (`exact.replicas_within`).
    """
    refuse_wrong_types(
        {
            "engine": (engine, (str, None), "the name of an engine, or None for the fastest"),
            "time_curve": (time_curve, (TimeCurve, None), "a TimeCurve, such as measured_curve returns"),
        }
    )
    tokens, home_gpu = checked_step(counts, home, topology)
    slots, tile, least = checked_slots(replica_slots), checked_size("tile", tile), checked_size("min_quota", min_quota)
    inside, between = checked_prices(push_price, 1.0 if time_curve is None else time_curve.nanoseconds_per_token)
    total, owner = tokens.numpy().sum(0), home_gpu.numpy()
    time, curve = total, NO_CURVE
    if time_curve is not None:
        time = time_curve.time(torch.from_numpy(-(-total // tile) * tile)).numpy()
        curve = np.array([time_curve.tokens, time_curve.nanoseconds], np.int64)
    allowed = checked_tolerance(tolerance)
    where = topology if inside < between else Topology(num_nodes=1, gpus_per_node=topology.num_gpus)
    level = level_of(time, owner, where, 0 if inside else allowed, between != NEVER)
    node, chosen = nodes_of(where), engine_named(engine)
    rules = Rules(slots, level, -(-least // tile) * tile, tile, inside, between)
    found = chosen.replicas(total, owner, node, rules, curve)
    if max_tokens_per_gpu is not None:
        cap = checked_size("max_tokens_per_gpu", max_tokens_per_gpu)
        found = within_cap(cap, found, total, owner, where, rules, chosen)
    expert, part = found
    quota = chosen.quotas(total, owner, expert, part)
    return Split(tokens, home_gpu, torch.from_numpy(quota), torch.from_numpy(expert))


def level_of(time: Array, home: Array, topology: Topology, tolerance: int, leaves_nodes: bool = False) -> int:
    """The time that no GPU should exceed: step (0) of `reference`.

    Args:
        time: `[E]` int64, of all tokens of each expert, at home.
        home: `[E]`, the GPU that owns each expert.
        topology: nodes and GPUs.
        tolerance: in units of 2^-20.
        leaves_nodes: whether replicas may be made in other nodes.
    """
    num_gpus, everything = topology.num_gpus, int(time.sum())
    level = max(-(-everything // num_gpus), everything * (TOLERANCES + tolerance) // (num_gpus * TOLERANCES))
    if leaves_nodes or topology.num_nodes == 1:
        return level
    of_node = np.zeros(topology.num_nodes, np.int64)
    np.add.at(of_node, home // topology.gpus_per_node, time)
    return max(level, -(-int(of_node.max()) // topology.gpus_per_node))
