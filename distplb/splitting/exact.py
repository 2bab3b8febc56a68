"""Exact search behind a cap on tokens: replicas with which no GPU exceeds a level, or the proof that there are none.

It is the fallback of the engines, which are fast but may end above the lowest level. Each node is a problem of its own.

(1) Quotas. Which GPUs hold which experts decides everything: tokens flow from GPUs above the level to GPUs below it,
    along paths in which each GPU passes tokens on to the next holder of the same expert. All numbers are integers, so
    this maximum flow is exact. A GPU that stays above the level names the set S of GPUs that its tokens can reach.
(2) The cut. All holders of some experts A lie in S, and A has d > 0 tokens more than level × |S|. A replica of e
    outside S takes at most min(tokens of e, level) of them. So with y[e, m] = 1 if m has a replica of e, else 0, every
    split that keeps the level satisfies

        sum over e in A, m outside S of  min(tokens of e, level, d) × y[e, m]  ≥  d,

    and the replicas of (1) do not: none of theirs is in the sum. If S is the whole node, the level is below its mean.
(3) The search. A mixed-integer program (HiGHS, through scipy) looks for other replicas: y, and x[e, m] tokens of each,

        sum over e of y[e, m]  ≤  R                                       x[e, m]  ≤  min(tokens of e, level) × y[e, m]
        tokens of own experts − x of these + x of m's replicas  ≤  level  sum over m of x[e, m]  ≤  tokens of e

    and all cuts so far. If it has no solution, no split keeps the level. Else (1) again, with y alone.

HiGHS computes in floats, and accepts y = 10^-6 and sums that are 10^-6 too large. So x is not used: what HiGHS accepts
wrongly, (1) finds out, and the cut excludes it by a wide margin, so the loop ends. It refuses nothing for rounding:
coefficients below what it can read are raised, and the errors of all others are far smaller than 10^-6. Cuts without x
would be exact too, but on 8 GPUs × 32 experts a proof that there are none takes a hundred times as long.

Effort is limited by numbers of branch-and-bound nodes, never by time, so that equal input has an equal answer.

Shapes: E experts, M GPUs, D GPUs of one node, R replica slots on each GPU; K pairs of an expert and a GPU that is not
its home; C cuts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from distplb.splitting.rules import EMPTY, Array

__all__ = ["Within", "lowest_level", "replicas_within"]

_MOST_PAIRS = 2048  # K of a node that is searched; 16 GPUs × 128 experts have 1,920. At 4,000, a start takes 3 to 20 s
_EFFORT = 600_000  # pairs × branch-and-bound nodes of one call: about 10 s of one core
_SMALLEST = 1e-8  # coefficient; HiGHS reads those below 1e-9 as 0
_NO_SOLUTION = 2  # scipy's status of an infeasible program
_ROOT = 60  # branch-and-bound nodes that take as long as a program's start


@dataclass(frozen=True)
class Within:
    """What is known about a level: replicas that keep it, the proof that there are none, or neither.

    Args:
        replicas: `[M, R]` the expert of each replica slot, -1 for none, and `[M, R]` the tokens that it gets, as
            `reference.replicas` returns them; None if none were found.
        is_proven: whether None means that there are none; False if the search was given up.
    """

    replicas: tuple[Array, Array] | None
    is_proven: bool = True


def replicas_within(tokens: Array, home: Array, node: Array, slots: int, level: int) -> Within:
    """Replicas with which no GPU exceeds the level, found wherever there are some, unless the problem is too large.

    >>> tokens, home, node = np.array([6, 6, 6, 6, 8]), np.array([0, 0, 0, 0, 1]), np.array([0, 0, 0])
    >>> expert, part = replicas_within(tokens, home, node, slots=1, level=13).replicas
    >>> bool(part.sum() > 0)  # GPU 1 gives tokens to GPU 2, although it has only 8, to take more of GPU 0's
    True
    >>> replicas_within(tokens, home, node, slots=1, level=12)
    Within(replicas=None, is_proven=True)

    It gives up on nodes with more than 2,048 pairs of an expert with tokens and a GPU that is not its home, and after
    about 10 s on one core, counted in steps and not in seconds. Equal on all ranks with the same scipy.

    Args:
        tokens: `[E]`, the tokens of each expert.
        home: `[E]`, the GPU that owns each expert.
        node: `[M]`, the node of each GPU; replicas stay inside a node.
        slots: R, the replica slots on each GPU.
        level: tokens that no GPU may exceed.
    """
    effort = _Effort()
    experts, parts = (np.full((len(node), slots), empty, np.int64) for empty in (EMPTY, 0))
    is_complete = True
    for part in _nodes(tokens, home, node, slots):
        try:
            quotas = part.at(level, effort)
        except _GivenUpError:
            is_complete = False  # another node may still prove that the level is out of reach
            continue
        if quotas is None:
            return Within(None)
        part.write(part.with_fewer_replicas(quotas, level), experts, parts)
    return Within((experts, parts) if is_complete else None, is_proven=is_complete)


def lowest_level(tokens: Array, home: Array, node: Array, slots: int, low: int, high: int) -> tuple[int, bool]:
    """The lowest level that replicas are found for, and whether it is proven that none keep a lower one.

    >>> tokens, home, node = np.array([6, 6, 6, 6, 8]), np.array([0, 0, 0, 0, 1]), np.array([0, 0, 0])
    >>> lowest_level(tokens, home, node, slots=1, low=11, high=24)
    (13, True)

    The limits of `replicas_within` hold for the whole search.

    Args:
        tokens, home, node, slots: as for `replicas_within`.
        low: a level below which nothing is possible, such as the step's bound.
        high: a level that some replicas keep.
    """
    effort, level, is_proven = _Effort(share=2), low, True
    for part in _nodes(tokens, home, node, slots):
        reached, excluded = part.lowest(level, high, effort)
        if reached > level:
            level, is_proven = reached, excluded
    return level, is_proven


class _GivenUpError(Exception):
    """The problem is too large, or the effort is spent."""


class _Effort:
    """What is left of the effort of a call; a search gets a share of it, so that easier ones can follow.

    Args:
        share: one part in so many.
    """

    def __init__(self, share: int = 1) -> None:
        self.left, self.share = _EFFORT, share

    def most_nodes(self, pairs: int) -> int:
        """The branch-and-bound nodes that the next search may visit; 0 for no search."""
        return max(0, self.left // (self.share * pairs) - _ROOT) if pairs <= _MOST_PAIRS else 0

    def spend(self, pairs: int, nodes: int) -> None:
        self.left -= pairs * (nodes + _ROOT)


@dataclass(frozen=True)
class _Cut:
    """Experts A whose holders are all in a set S of GPUs, and their d tokens that must leave it (2)."""

    experts: tuple[int, ...]
    gpus: frozenset[int]
    excess: int


def _nodes(tokens: Array, home: Array, node: Array, slots: int) -> Iterator[_Node]:
    for number in np.unique(node):
        gpus = (node == number).nonzero()[0]
        experts = ((node[home] == number) & (tokens > 0)).nonzero()[0]
        yield _Node(gpus, experts, tokens[experts], np.searchsorted(gpus, home[experts]), slots)


class _Node:
    """One node: its D GPUs, and its experts that have tokens; both are counted from 0 here."""

    def __init__(self, gpus: Array, experts: Array, tokens: Array, home: Array, slots: int) -> None:
        self.gpus, self.experts, self.slots = gpus, experts, min(slots, len(experts))
        self.tokens: list[int] = tokens.tolist()
        self.home: list[int] = home.tolist()
        self.num_pairs = len(home) * (len(gpus) - 1)

    @cached_property
    def pairs(self) -> tuple[Array, Array]:
        """`[K]` experts and `[K]` GPUs that are not their homes."""
        expert, gpu = (np.arange(len(self.gpus)) != np.array(self.home)[:, None]).nonzero()
        return expert, gpu

    def at(self, level: int, effort: _Effort) -> list[dict[int, int]] | None:
        """Of each expert, its tokens on each holder; None if no replicas keep the level."""
        if sum(self.tokens) > level * len(self.gpus):
            return None
        holders, cuts = [[gpu] for gpu in self.home], list[_Cut]()
        while True:
            flow = _Flow(self.tokens, self.home, holders, len(self.gpus), level)
            stuck = flow.stuck()
            if not stuck:
                return flow.quotas
            cuts += [flow.cut(gpus) for gpus in stuck]
            held = self._solution(level, cuts, effort) if self.slots else None
            if held is None:
                return None
            holders = self._holders(held)

    def lowest(self, low: int, high: int, effort: _Effort) -> tuple[int, bool]:
        """The lowest level in [low, high] that replicas are found for, and whether none keep a lower one."""
        below, excluded, reached = low - 1, low - 1, high
        level = low  # most often the answer
        while below + 1 < reached:
            try:
                quotas = self.at(level, effort)
            except _GivenUpError:
                below = level
            else:
                if quotas is None:
                    below = excluded = level
                else:
                    reached = self._lowest_with(quotas, below + 1, level)
            level = (below + reached) // 2
        return reached, excluded == reached - 1

    def with_fewer_replicas(self, quotas: list[dict[int, int]], level: int) -> list[dict[int, int]]:
        """Without replicas that the level does not need; those with few tokens go first."""
        replicas = [
            (count, expert, gpu)
            for expert, quota in enumerate(quotas)
            for gpu, count in quota.items()
            if gpu != self.home[expert]
        ]
        for _, expert, gpu in sorted(replicas):
            holders = [list(quota) for quota in quotas]
            holders[expert].remove(gpu)
            flow = _Flow(self.tokens, self.home, holders, len(self.gpus), level)
            if not flow.stuck():
                quotas = flow.quotas
        return quotas

    def write(self, quotas: list[dict[int, int]], experts: Array, parts: Array) -> None:
        """Write the replicas that have tokens into the slots of this node's GPUs."""
        used = [0] * len(self.gpus)
        for expert, (quota, owner) in enumerate(zip(quotas, self.home, strict=True)):
            for gpu in sorted(quota):
                if gpu != owner and quota[gpu]:
                    slot = (self.gpus[gpu], used[gpu])
                    experts[slot], parts[slot] = self.experts[expert], quota[gpu]
                    used[gpu] += 1

    def _holders(self, held: NDArray[np.bool_]) -> list[list[int]]:
        holders = [[gpu] for gpu in self.home]
        expert_of, gpu_of = self.pairs
        for expert, gpu in zip(expert_of[held].tolist(), gpu_of[held].tolist(), strict=True):
            holders[expert].append(gpu)
        return holders

    def _lowest_with(self, quotas: list[dict[int, int]], low: int, high: int) -> int:
        """The lowest level in [low, high] that the same holders keep."""
        holders = [list(quota) for quota in quotas]
        while low < high:
            middle = (low + high) // 2
            if _Flow(self.tokens, self.home, holders, len(self.gpus), middle).stuck():
                low = middle + 1
            else:
                high = middle
        return high

    def _solution(self, level: int, cuts: list[_Cut], effort: _Effort) -> NDArray[np.bool_] | None:
        """Step (3): `[K]`, which pairs are replicas; None if there is no solution. Tokens are in units of the level."""
        from scipy.optimize import LinearConstraint, milp  # on first use: its import takes a third as long as torch's
        from scipy.sparse import csr_array, diags_array, eye_array, hstack, vstack

        pairs, most_nodes = self.num_pairs, effort.most_nodes(self.num_pairs)
        if not most_nodes:
            raise _GivenUpError
        expert, gpu = self.pairs
        tokens, home = np.array(self.tokens) / level, np.array(self.home)
        every, ones = np.arange(pairs), np.ones(pairs)
        into = csr_array((ones, (gpu, every)), (len(self.gpus), pairs))  # [D, K]
        out_of = csr_array((ones, (home[expert], every)), into.shape)
        of_expert = csr_array((ones, (expert, every)), (len(tokens), pairs))  # [E, K]
        largest = np.clip(tokens, _SMALLEST, 1)[expert]  # [K]
        weights = self._weights(level, cuts)
        rows = vstack(
            [
                hstack([into, 0 * into]),
                hstack([-diags_array(largest), eye_array(pairs)]),
                hstack([0 * into, into - out_of]),
                hstack([0 * of_expert, of_expert]),
                hstack([csr_array(-weights), csr_array(weights.shape)]),
            ]
        )
        own = np.bincount(home, tokens, len(self.gpus))  # [D]
        most = np.concatenate([np.full(len(own), self.slots), np.zeros(pairs), 1 - own, tokens, -np.ones(len(cuts))])
        for presolve in (True, False):  # HiGHS 1.8 calls solvable programs infeasible, but not without its presolve
            result = milp(
                np.zeros(2 * pairs),
                integrality=np.repeat([1, 0], pairs),
                bounds=(0, np.concatenate([ones, largest])),
                constraints=LinearConstraint(rows, ub=most),
                options={"node_limit": most_nodes, "mip_rel_gap": 0, "presolve": presolve},
            )
            effort.spend(pairs, result.mip_node_count or 0)
            if result.x is not None:
                return np.asarray(result.x[:pairs] > 0.5)
            if result.status != _NO_SOLUTION:
                raise _GivenUpError
        return None

    def _weights(self, level: int, cuts: list[_Cut]) -> NDArray[np.float64]:
        """`[C, K]`: of each cut, the parts of the excess that replicas outside the set take at most."""
        expert_of, gpu_of = self.pairs
        weights = np.zeros((len(cuts), self.num_pairs))
        for row, cut in zip(weights, cuts, strict=True):
            largest = np.zeros(len(self.tokens))
            for expert in cut.experts:
                part = min(self.tokens[expert], level, cut.excess) / cut.excess
                largest[expert] = max(_SMALLEST, part)
            row[:] = largest[expert_of]
            row[np.isin(gpu_of, list(cut.gpus))] = 0
        return weights


class _Flow:
    """Step (1): the quotas of given holders that leave as few tokens above the level as possible."""

    def __init__(
        self, tokens: Sequence[int], home: Sequence[int], holders: Sequence[Sequence[int]], num_gpus: int, level: int
    ) -> None:
        self.level, self.load = level, [0] * num_gpus
        self.quotas = [dict.fromkeys(gpus, 0) for gpus in holders]
        self.held: list[list[int]] = [[] for _ in range(num_gpus)]  # the experts of each GPU, replicas too
        for expert, (count, owner) in enumerate(zip(tokens, home, strict=True)):
            self.quotas[expert][owner] = count
            self.load[owner] += count
            for gpu in holders[expert]:
                self.held[gpu].append(expert)
        for gpu in range(num_gpus):
            while self.load[gpu] > level and self._relieve(gpu):
                pass

    def stuck(self) -> list[frozenset[int]]:
        """Sets of GPUs that have more tokens than level × GPUs, all of experts that no other GPU holds."""
        over = [gpu for gpu, load in enumerate(self.load) if load > self.level]
        return list(dict.fromkeys(frozenset(self._reached(gpu)[0]) for gpu in over))

    def cut(self, gpus: frozenset[int]) -> _Cut:
        """Step (2), for a set of GPUs that are stuck."""
        inside = [expert for expert, quota in enumerate(self.quotas) if quota.keys() <= gpus]
        return _Cut(tuple(inside), gpus, sum(self.load[gpu] for gpu in gpus) - self.level * len(gpus))

    def _relieve(self, giver: int) -> bool:
        """Pass tokens of a GPU above the level on to one below it; whether there is a path."""
        came_from, taker = self._reached(giver)
        if taker is None:
            return False
        path, gpu = [], taker
        while gpu != giver:
            before, expert = came_from[gpu]
            path.append((before, expert, gpu))
            gpu = before
        amount = min(self.load[giver] - self.level, self.level - self.load[taker])
        amount = min(amount, *(self.quotas[expert][before] for before, expert, _ in path))
        for before, expert, gpu in path:
            self.quotas[expert][before] -= amount
            self.quotas[expert][gpu] += amount
        self.load[giver] -= amount
        self.load[taker] += amount
        return True

    def _reached(self, giver: int) -> tuple[dict[int, tuple[int, int]], int | None]:
        """From which GPU, with which expert, tokens of the giver reach others; and the first of these with room."""
        came_from, queue = {giver: (giver, EMPTY)}, [giver]
        for gpu in queue:  # grows: breadth first, so that paths are short
            if self.load[gpu] < self.level:
                return came_from, gpu
            for expert in self.held[gpu]:
                if self.quotas[expert][gpu]:
                    for holder in self.quotas[expert]:
                        if holder not in came_from:
                            came_from[holder] = (gpu, expert)
                            queue.append(holder)
        return came_from, None
