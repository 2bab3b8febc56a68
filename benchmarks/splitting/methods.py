"""Every method's split of one step: distplb's, without and with prices, and those that it is compared with.

Shapes: E experts, M GPUs, R replica slots on each GPU.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.splitting import baselines, prices
from benchmarks.splitting.baselines import Cluster
from benchmarks.splitting.cases import Case
from benchmarks.splitting.loads import Step
from distplb.splitting.inputs import checked_tolerance
from distplb.splitting.split import level_of, split
from distplb.splitting.split_value import EMPTY, Split

__all__ = ["gap_of", "level", "lowest_of", "split_of", "splits"]

Ints = NDArray[np.int64]

DISTPLB, LEAVING = "distplb", "distplb, between nodes too"
PRICED, PRICED_LEAVING = "distplb, priced", "distplb, priced, between nodes too"
NO_REPLICAS = "no replicas"
THRESHOLD, THRESHOLD_FIRST = "threshold search to 1 %", "threshold search, distplb's level first"
WHOLE, LONGEST = "whole receivers", "longest first above 1.1"
EVENLY, FLOW = "EPLB of the step before, shared evenly", "EPLB of the step before, shared by the optimal flow"
PLANNED = (EVENLY, FLOW)  # with homes and replicas of an earlier step
OWN = (DISTPLB, LEAVING, PRICED, PRICED_LEAVING)
TOLERANCE = 0.005  # distplb's default
GAP = 100  # the threshold search to 1 % ends when it knows the threshold to within mean / GAP


def level(case: Case, tokens: Ints) -> int:
    """The tokens that distplb lets no GPU exceed if R slots suffice: the tolerance above the mean, or the bound."""
    return level_of(tokens, case.cluster.home, case.topology, checked_tolerance(TOLERANCE))


def gap_of(tokens: Ints, case: Case) -> int:
    """The accuracy of the threshold search to 1 %, in tokens."""
    return max(1, int(tokens.sum()) // (case.topology.num_gpus * GAP))


def lowest_of(tokens: Ints, case: Case) -> int:
    """The tokens that the busiest GPU has at least: ceil(mean of the busiest node)."""
    return max(-int(-mean // 1) for mean in case.cluster.node_means(tokens))


def splits(case: Case, step: Step) -> dict[str, Split]:
    """Every method's split of one step."""
    tokens, cluster = step.counts.sum(0), case.cluster
    held = baselines.planned_copies(step.before, cluster)
    moved = replace(cluster, home=baselines.homes_of(held, cluster.home))
    search = partial(baselines.threshold_search, tokens, cluster)
    quotas = {
        NO_REPLICAS: baselines.at_home(tokens, cluster),
        THRESHOLD: search(lowest=lowest_of(tokens, case), gap=gap_of(tokens, case)),
        THRESHOLD_FIRST: search(lowest=level(case, tokens), gap=1),
        WHOLE: baselines.whole_receivers(tokens, cluster),
        LONGEST: baselines.longest_first(tokens, cluster),
    }
    planned = {EVENLY: baselines.shared_evenly(tokens, held), FLOW: baselines.shared_by_flow(tokens, held)}
    return (
        _own(case, step)
        | {name: split_of(step.counts, cluster, quota) for name, quota in quotas.items()}
        | {name: split_of(step.counts, moved, quota) for name, quota in planned.items()}
    )


def _own(case: Case, step: Step) -> dict[str, Split]:
    """distplb's splits: on several nodes also with replicas that leave their node."""
    price = {DISTPLB: (0.0, math.inf), PRICED: (prices.INSIDE, math.inf)}
    if case.topology.num_nodes > 1:
        price |= {LEAVING: (0.0, 0.0), PRICED_LEAVING: (prices.INSIDE, prices.BETWEEN)}
    made = partial(split, step.counts, case.cluster.home, topology=case.topology, replica_slots=case.slots)
    return {name: made(push_price=price[name], engine="cpu") for name in OWN if name in price}


def split_of(counts: Ints, cluster: Cluster, quota: Ints) -> Split:
    """Build the Split, which checks itself; with more than R slots where a method takes more."""
    away = quota > 0
    away[np.arange(len(quota)), cluster.home] = False
    slots = max(cluster.slots, int(away.sum(0).max()))
    replica = np.full((cluster.num_gpus, slots), EMPTY, np.int64)
    for gpu in range(cluster.num_gpus):
        experts = np.flatnonzero(away[:, gpu])
        replica[gpu, : len(experts)] = experts
    return Split(*(torch.from_numpy(value) for value in (counts, cluster.home, quota, replica)))
