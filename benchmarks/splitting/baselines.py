"""The ways to split a step that distplb is compared with, each written from its published description.

Every one takes the tokens `[E]` of a step and returns quotas `[E, M]` int64. Replicas stay inside nodes, as in distplb.

- `threshold_search`: UltraEP, arXiv:2606.04101, and the README of github.com/Dots-Infra/UltraEP.
- `whole_receivers`: MoonEP, as its README in github.com/zhumakhan/MoonEP (commit 11713d2) tells: every GPU gets the
  same number of tokens, and experts of at most one other GPU.
- `longest_first`: LLEP (Least-Loaded Expert Parallelism), arXiv:2601.17111.
- `planned_copies` and `shared_evenly`: EPLB, README of github.com/deepseek-ai/EPLB; the greedy algorithm is that of
  `distplb/planning/greedy.py`. It places homes anew too.
- `shared_by_flow`: LPLB, README of github.com/deepseek-ai/LPLB: a linear program shares the tokens of each step among
  copies that were placed before.

Shapes: E experts, M GPUs, R replica slots on each GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linprog
from scipy.sparse import coo_matrix

from distplb import Topology
from distplb.core.machine_code import compiled_module
from distplb.planning.greedy import greedy_numpy

__all__ = [
    "Cluster",
    "at_home",
    "homes_of",
    "longest_first",
    "planned_copies",
    "quotas_of",
    "shared_by_flow",
    "shared_evenly",
    "threshold_replicas",
    "threshold_search",
    "whole_receivers",
]

Ints = NDArray[np.int64]

_KERNELS = "benchmarks.splitting.cpu_threshold"


@dataclass(frozen=True)
class Cluster:
    """Where experts live.

    Args:
        home: `[E]` int64, the GPU of each expert.
        node: `[M]` int64, the node of each GPU.
        slots: R.
    """

    home: Ints
    node: Ints
    slots: int

    @property
    def num_gpus(self) -> int:
        """M."""
        return len(self.node)

    def loads(self, tokens: Ints) -> Ints:
        """`[M]`, the tokens of each GPU when every expert is computed at home."""
        return np.bincount(self.home, tokens, self.num_gpus).astype(np.int64)

    def node_means(self, tokens: Ints) -> list[Fraction]:
        """The mean load of the GPUs of each node."""
        sizes, sums = np.bincount(self.node), np.bincount(self.node, self.loads(tokens))
        return [Fraction(int(total), int(size)) for total, size in zip(sums, sizes, strict=True)]


def at_home(tokens: Ints, cluster: Cluster) -> Ints:
    """No replicas.

    >>> at_home(np.array([10, 2]), Cluster(np.array([0, 1]), np.array([0, 0]), slots=1)).tolist()
    [[10, 0], [0, 2]]
    """
    quota = np.zeros((len(tokens), cluster.num_gpus), np.int64)
    quota[np.arange(len(tokens)), cluster.home] = tokens
    return quota


def quotas_of(tokens: Ints, cluster: Cluster, replica: Ints, part: Ints) -> Ints:
    """Quotas of the replicas `[M, R]` (-1: empty) with the tokens `part [M, R]`; the rest is computed at home."""
    quota = at_home(tokens, cluster)
    for gpu, slot in zip(*np.nonzero(replica >= 0), strict=True):
        _give(quota, cluster, replica[gpu, slot], gpu, part[gpu, slot])
    return quota


def threshold_search(tokens: Ints, cluster: Cluster, *, lowest: int, gap: int) -> Ints:
    """Lowest threshold at which the busiest GPU's hottest expert, given to the roomiest GPU again and again, fits.

    >>> cluster = Cluster(np.array([0, 1]), np.array([0, 0]), slots=1)
    >>> threshold_search(np.array([10, 2]), cluster, lowest=6, gap=1).tolist()
    [[6, 4], [0, 2]]

    Args:
        tokens: `[E]`.
        cluster: homes, nodes and replica slots.
        lowest: the first threshold, which need not be exceeded.
        gap: the search ends when it knows the threshold to within this number of tokens.
    """
    replica, part = threshold_replicas(tokens, cluster.home, cluster.node, cluster.slots, lowest, gap)
    return quotas_of(tokens, cluster, replica, part)


def threshold_replicas(tokens: Ints, home: Ints, node: Ints, slots: int, lowest: int, gap: int) -> tuple[Ints, Ints]:
    """`cpu_threshold.search` called like `distplb.splitting.cpu.replicas`: experts and tokens of slots `[M, R]`."""
    replica = np.empty((len(node), slots), np.int64)
    part = np.empty_like(replica)
    compiled_module(_KERNELS).search(tokens, home, node, slots, lowest, gap, replica, part)
    return replica, part


def whole_receivers(tokens: Ints, cluster: Cluster) -> Ints:
    """Every GPU gets exactly the mean of its node; a receiver is filled whole, by experts of one giver.

    The giver is the busiest GPU, the receiver the one with the most room. A giver may end below the mean and is then
    filled by another one. This takes as many slots on a receiver as it gets experts, at most those of a GPU.

    >>> whole_receivers(np.array([10, 2]), Cluster(np.array([0, 1]), np.array([0, 0]), slots=1)).tolist()
    [[6, 4], [0, 2]]
    """
    quota, load = at_home(tokens, cluster), cluster.loads(tokens)
    room = np.empty(cluster.num_gpus, np.int64)
    for node, mean in enumerate(cluster.node_means(tokens)):
        gpus = np.flatnonzero(cluster.node == node)
        one_more = np.arange(len(gpus)) < int(mean * len(gpus)) % len(gpus)
        room[gpus] = int(mean) + one_more - load[gpus]
    while room.max() > 0:
        inside = cluster.node == cluster.node[room.argmax()]
        receiver, giver = int(room.argmax()), int(np.where(inside, room, 1).argmin())
        for expert in _hottest(quota, cluster, giver):
            amount = min(room[receiver], quota[expert, giver])
            _give(quota, cluster, expert, receiver, amount)
            room[receiver] -= amount
            room[giver] += amount
    return quota


def longest_first(tokens: Ints, cluster: Cluster, *, ceiling: Fraction = Fraction(11, 10)) -> Ints:
    """Experts by descending tokens; what exceeds the ceiling × mean at home goes to the least loaded GPUs.

    Any number of replicas on a GPU, and no smallest part; the published program also leaves a step alone whose
    imbalance is below 1.3.

    >>> longest_first(np.array([10, 2]), Cluster(np.array([0, 1]), np.array([0, 0]), slots=1)).tolist()
    [[7, 3], [0, 2]]
    """
    quota, load = at_home(tokens, cluster), cluster.loads(tokens)
    limit = np.array([-int(-mean * ceiling // 1) for mean in cluster.node_means(tokens)])[cluster.node]
    for expert in np.argsort(-tokens, kind="stable"):
        home = cluster.home[expert]
        inside = np.flatnonzero((cluster.node == cluster.node[home]) & (np.arange(cluster.num_gpus) != home))
        for gpu in inside[np.argsort(load[inside], kind="stable")]:
            amount = min(load[home] - limit[home], limit[gpu] - load[gpu], quota[expert, home])
            if amount <= 0:
                break
            _give(quota, cluster, expert, gpu, amount)
            load[home] -= amount
            load[gpu] += amount
    return quota


def planned_copies(before: Ints, cluster: Cluster) -> NDArray[np.bool_]:
    """`[E, M]`, who holds which expert when EPLB's greedy fills all slots, own and for replicas, from an earlier load.

    An expert stays on its node, where it may move to other GPUs. At most one copy of an expert is on a GPU.

    >>> planned_copies(np.array([10, 2]), Cluster(np.array([0, 1]), np.array([0, 0]), slots=1)).tolist()
    [[True, True], [True, True]]
    """
    nodes, gpus = int(cluster.node.max()) + 1, cluster.num_gpus
    num_slots = len(before) + gpus * cluster.slots
    expert_of_slot = greedy_numpy(
        torch.from_numpy(before)[None],
        Topology(nodes, gpus // nodes),
        num_slots,
        num_groups=nodes if nodes > 1 else None,
        allow_shared_replicas=False,
    )
    held = np.zeros((len(before), gpus), np.bool_)
    held[expert_of_slot[0].numpy(), np.arange(num_slots) * gpus // num_slots] = True
    return held


def homes_of(held: NDArray[np.bool_], home: Ints) -> Ints:
    """`[E]`, the GPU of each expert where `held [E, M]` tells the copies: its home if that has one, or the first.

    >>> homes_of(np.array([[True, True], [False, True]]), np.array([1, 0])).tolist()
    [1, 1]
    """
    stays = held[np.arange(len(home)), home]
    return np.where(stays, home, held.argmax(1))


def shared_evenly(tokens: Ints, held: NDArray[np.bool_]) -> Ints:
    """Every holder of an expert computes as many of its tokens, up to one.

    >>> shared_evenly(np.array([5]), np.array([[True, False, True]])).tolist()
    [[3, 0, 2]]
    """
    copies = held.sum(1)
    nth = held.cumsum(1) - 1
    return np.where(held, (tokens // copies)[:, None] + (nth < (tokens % copies)[:, None]), 0).astype(np.int64)


def shared_by_flow(tokens: Ints, held: NDArray[np.bool_]) -> Ints:
    """The holders share tokens so that the busiest GPU has as few as possible: a linear program, then whole tokens.

    >>> shared_by_flow(np.array([10, 2]), np.array([[True, True], [False, True]])).tolist()
    [[6, 4], [0, 2]]
    """
    expert, gpu = np.nonzero(held)
    count, (num_experts, num_gpus) = len(expert), held.shape
    one, ones = np.arange(count), np.ones(count)
    busiest = (np.full(num_gpus, -1.0), (np.arange(num_gpus), np.full(num_gpus, count)))
    load = coo_matrix(
        (np.r_[ones, busiest[0]], (np.r_[gpu, busiest[1][0]], np.r_[one, busiest[1][1]])), (num_gpus, count + 1)
    )
    whole = coo_matrix((ones, (expert, one)), (num_experts, count + 1))
    scale = max(1, int(tokens.sum())) / num_gpus  # so that the solver's tolerances are relative to the mean
    solved = linprog(np.r_[np.zeros(count), 1.0], load.tocsr(), np.zeros(num_gpus), whole.tocsr(), tokens / scale)
    share = np.zeros(held.shape)
    share[expert, gpu] = solved.x[:count].clip(min=0) * scale
    quota = np.floor(share + 1e-6).astype(np.int64)
    for each in np.flatnonzero(quota.sum(1) != tokens):  # tokens that rounding left, to the largest fractions
        rest = int(tokens[each] - quota[each].sum())
        order = np.argsort(np.where(held[each], quota[each] - share[each], np.inf), kind="stable")[: held[each].sum()]
        step = 1 if rest > 0 else -1
        for nth in range(abs(rest)):
            quota[each, order[nth % len(order)] if step > 0 else quota[each].argmax()] += step
    return quota


def _give(quota: Ints, cluster: Cluster, expert: int, gpu: int, amount: int) -> None:
    """Move tokens of an expert from its home to another GPU."""
    quota[expert, cluster.home[expert]] -= amount
    quota[expert, gpu] += amount


def _hottest(quota: Ints, cluster: Cluster, gpu: int) -> Ints:
    """The experts at home on a GPU, by descending tokens that it computes of them."""
    experts = np.flatnonzero(cluster.home == gpu)
    return experts[np.argsort(-quota[experts, gpu], kind="stable")]
