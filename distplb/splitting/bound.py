"""A bound for one step: the tokens that the busiest GPU computes at least, whatever split is chosen.

Replicas stay inside nodes, so each node of D GPUs is a problem of its own. The bound is the largest of

(a) ceil(mean) of all GPUs, and of the GPUs of each node, which computes all tokens of its experts;
(b) for each node, the lowest level that no prices exclude.

**Prices.** Let t > 0 be the price of a replica slot and 0 ≤ β ≤ 1 the price of a token, which each GPU may set for
itself. Cut each expert's tokens into pieces p: some of L tokens, and a rest. If no GPU exceeds the level L, then

    sum over GPUs of (sum over pieces p of its experts of min(β p, t)  −  β (L − R t))  ≤  D R t.

Proof. Let a GPU pay β for each token that it computes, and (1 − β) t for each replica that it holds: at most
β L + (1 − β) R t. What is paid for one expert, with β the price at its home? The GPU of a replica of x tokens pays a
weighted mean of x and t, which is at least min(x, t), and so at least min(β x, t). The home pays β x for x tokens. So
at least min(β x, t) is paid for each part x of the expert, and no part exceeds L tokens. As min(β x, t) is concave
in x, no parts add up to less than the pieces. All pieces together cost no more than what the GPUs pay at most.

For example, β = 1 everywhere gives the mean of the node. β = 1 on a set of GPUs and 0 elsewhere gives a cut: the set
computes at least its experts' tokens without the largest pieces, one for each slot outside. R = 0 gives the
load of each GPU, which is exact. No step assumes that a GPU which gives tokens away takes none.

**Which prices to try.** A GPU's term is concave and piecewise linear in β, so it is largest at β = 0 or at β = t / u,
where u is t or a larger piece. With these β, and divided by t, the inequality reads

    sum over GPUs of max(0, max over u of (sum over pieces p of its experts of min(p, u)  −  L + R t) / u)  ≤  D R.

Between two sizes of pieces, the left side is largest at an end, so the sizes of pieces are the only t to try. Raising L
merges pieces and adds room. So if L is excluded, all lower levels are, and bisection finds the lowest that is not.

Shapes: E experts, M GPUs, D GPUs of one node, R replica slots on each GPU; K pieces, Q sizes of pieces.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from distplb.core.arguments import whole_number
from distplb.core.counts import Counts
from distplb.core.topology import Topology
from distplb.splitting.inputs import checked_step

__all__ = ["bound_of", "step_bound"]

_SAFE = 1e-11  # relative; larger than rounding errors, so that these never exclude a level


def step_bound(counts: Counts, home: Any, *, topology: Topology, replica_slots: int = 2) -> int:
    """The tokens that the busiest GPU has at least, whatever split with R slots on each GPU is chosen.

    GPU 0 has 8 experts of 10 tokens each. Three GPUs take one each, and 50 tokens stay, where the mean is 20:

    >>> counts = [[10] * 8, [0] * 8, [0] * 8, [0] * 8]
    >>> step_bound(counts, [0] * 8, topology=Topology(num_nodes=1, gpus_per_node=4), replica_slots=1)
    50

    The largest of (a) and (b) in the module's docstring, where it is proved. Limits of a split other than its slots,
    such as a smallest quota or a tile, can only raise the optimum, so the bound holds for them too.

    Args:
        counts: `[M, E]`, the tokens that each GPU's router sends to each expert.
        home: `[E]`, the GPU that owns each expert.
        topology: nodes and GPUs; replicas stay inside nodes. If they may leave them, pass all GPUs as one node.
        replica_slots: R.

    Raises:
        DistplbError: for counts, homes or slots that do not fit.
    """
    tokens, homes = checked_step(counts, home, topology)
    return bound_of(tokens.sum(0), homes, topology, whole_number("replica_slots", replica_slots, minimum=0))


def bound_of(tokens: Tensor, home: Tensor, topology: Topology, slots: int) -> int:
    """The same from the tokens `[E]` of each expert.

    >>> bound_of(torch.tensor([10] * 8), torch.zeros(8, dtype=torch.int64), Topology(1, 4), slots=1)
    50
    """
    each = topology.gpus_per_node
    level = -(-int(tokens.sum()) // topology.num_gpus)  # (a)
    for node in range(topology.num_nodes):
        here = home // each == node
        level = _lowest(tokens[here], home[here] % each, each, slots, level)
    return level


def _lowest(tokens: Tensor, home: Tensor, num_gpus: int, slots: int, level: int) -> int:
    """The lowest level, from `level` on, that is not excluded for one node: (a) and (b).

    Args:
        tokens: `[E]`, of the node's experts.
        home: `[E]`, their GPUs, in [0, D).
        num_gpus: D.
        slots: R.
        level: where to start.
    """
    tokens, home = tokens[tokens > 0], home[tokens > 0]
    load = torch.zeros(num_gpus, dtype=torch.int64, device="cpu").index_add_(0, home, tokens)  # [D]
    level, kept = max(level, -(-int(load.sum()) // num_gpus)), int(load.amax())  # `kept` needs no replica
    if kept <= level or not slots:
        return max(level, kept)
    if not _is_excluded(tokens, home, num_gpus, slots, level):
        return level
    while level + 1 < kept:  # `level` is excluded
        middle = (level + kept) // 2
        if _is_excluded(tokens, home, num_gpus, slots, middle):
            level = middle
        else:
            kept = middle
    return kept


def _is_excluded(tokens: Tensor, home: Tensor, num_gpus: int, slots: int, level: int) -> bool:
    """Whether (b) is violated for some t, so that no split of the node keeps the level."""
    num_slots = min(slots, len(tokens))  # more are of no use
    gpu, piece = _pieces(tokens, home, level)  # [K] each
    size, nth = piece.double().unique(return_inverse=True)  # [Q], the values of t and u, and [K]
    own = size[nth, None]  # [K, 1]
    within = torch.zeros(num_gpus, len(size), dtype=torch.float64, device="cpu")  # [D, Q], sums of min(p, u)
    over = within.index_add_(0, gpu, torch.minimum(own, size)) - level
    best = (over / size + num_slots).clamp_(min=0)  # [D, Q], with u = t
    at_piece = (over[gpu, nth, None] + num_slots * size) / own  # [K, Q], with u = a piece
    at_piece.masked_fill_(own < size, 0)
    best.scatter_reduce_(0, gpu[:, None].expand_as(at_piece), at_piece, "amax")
    return bool((best.sum(0) > num_gpus * num_slots * (1 + _SAFE)).any())


def _pieces(tokens: Tensor, home: Tensor, level: int) -> tuple[Tensor, Tensor]:
    """`[K]` GPUs and `[K]` sizes of pieces of at most `level` tokens."""
    whole, rest = tokens // level, tokens % level
    gpu = torch.cat([home.repeat_interleave(whole), home[rest > 0]])
    return gpu, torch.cat([torch.full_like(gpu[: int(whole.sum())], level), rest[rest > 0]])
