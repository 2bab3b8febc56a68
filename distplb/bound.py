"""How even the GPUs could be at best: bounds of the imbalance that no placement can beat, with their proofs.

A bound is the least load that the fullest GPU can have, found for one row of weights at a time: one layer in one step,
or in the mean step. Rows are independent and are worked on together.

Shapes: T steps, L layers, E experts, P slots, M GPUs, G slots on each GPU, N nodes, B groups; X rows, n items that
are experts or whole groups, W ways to deal the groups to the nodes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from distplb.errors import DistplbError
from distplb.load import as_tokens
from distplb.topology import Topology

__all__ = ["lower_bound"]

_TINY = 1e-300
_ROUNDING = 1e-12  # more than the last digits of a result, less than anybody reads
_SAFE = 1e-11  # a load is only called too low if it is by this much
_MOST_WAYS = 128  # 8 groups can be dealt to 4 nodes in 105
_PRICES = (0.25, 0.5, 1, 1.25, 1.5, 2, 2.5, 3, 4, 6)  # of a spare replica, in (h) and (j)
_ROUNDS = 20
_NUM_LEVELS = 16  # values of τ that (i) and (j) try
_NUMBERS_AT_ONCE = 1 << 18  # (i) takes 16 times as many


def lower_bound(load: Tensor, topology: Topology, num_slots: int, num_groups: int | None = None) -> Tensor:
    """What no placement can beat: a bound of the imbalance's mean over the steps.

    >>> lower_bound(torch.tensor([[9, 1, 1, 1]]), Topology(1, 2), num_slots=4)
    tensor([1.6667], dtype=torch.float64)

    The larger of the bound of the mean step and the mean of the steps' own bounds, where a step without tokens counts
    as even. The bound of one step is the largest of these. Always:

    (a) the mean GPU.

    Without replicas:

    (b) the k heaviest experts, on k GPUs: the mean of these, with the lightest company; or two of them on one GPU;
    (c) the k heaviest experts, on k GPUs: one of these has j of the heavier part of their company; or two on one GPU;
    (d) of the k + j(M − k) + 1 heaviest, one of the lighter joins one of the k heaviest, or j + 1 share a GPU;
    (e) all of it rounded up: a GPU holds whole tokens.

    With replicas, which share their expert's tokens evenly:

    (f) the largest share, if each further replica goes to the expert with the largest: no other way leaves it less;
    (g) a load at which the experts need more replicas than there are, next to the lightest company;
    (h) a load at which j or fewer heavy replicas fit on a GPU, and there are more than jM;
    (i) a load at which what heavy replicas exceed is more than what light ones leave.

    With groups:

    (j) the best way to deal whole groups to the nodes, by the bounds above inside each node. Where there are more than
        128 ways: (a) to (d) of nodes and groups, and the bounds above of GPUs and experts.

    Args:
        load: `[T, L, E]` or `[L, E]`, tokens of each expert.
        topology: of the EP group.
        num_slots: P, at least E. More than E means replicas, of which a GPU may hold several of one expert.
        num_groups: B, where every node holds B / N whole groups of consecutive experts, in P / N slots.

    Returns:
        `[L]` float64, each at least 1.

    Raises:
        DistplbError: if the load is not one of tokens, or slots or groups cannot be spread evenly.
    """
    tokens = as_tokens(load)
    num_steps, _, num_experts = tokens.shape
    topology.slots_per_gpu(num_slots)
    _check(num_experts, topology, num_slots, num_groups)
    mean = tokens.sum(-1, keepdim=True).double() / topology.num_gpus  # [T, L, 1]
    share = tokens.double() / mean.clamp(min=_TINY)  # [T, L, E], in mean GPUs; 0 without tokens
    busy = (mean > 0).sum(0)  # [L, 1], steps that have tokens
    mean_step = share.sum(0) / busy.clamp(min=1)  # [L, E], of those
    fullest = _fullest(share.flatten(0, 1), topology, num_slots, num_groups).unflatten(0, (num_steps, -1))  # [T, L, W]
    if num_slots == num_experts:  # (e)
        fullest = (fullest * mean * (1 - _ROUNDING)).ceil() / mean.clamp(min=_TINY)
    of_steps = fullest.clamp(min=1).mean(0)  # [L, W]
    of_mean = _fullest(mean_step, topology, num_slots, num_groups).clamp(min=1)
    of_mean = (of_mean * busy + (num_steps - busy)) / num_steps
    bound = torch.maximum(of_steps, of_mean).amin(-1)  # one way for all steps
    # The last digits of a float sum must not lift the bound above what a placement reaches.
    return (bound * (1 - _ROUNDING)).clamp(min=1)


def _check(num_experts: int, topology: Topology, num_slots: int, num_groups: int | None) -> None:
    """Refuse fewer slots than experts, and groups that cannot be spread evenly."""
    if num_slots < num_experts:
        raise DistplbError(
            f"{num_slots} slots for {num_experts} experts: every expert needs one; "
            f"make num_slots a multiple of {topology.num_gpus} that is at least {num_experts}"
        )
    if num_groups is None:
        return
    if num_groups < 1 or num_experts % num_groups:
        raise DistplbError(
            f"{num_experts} experts cannot be split into {num_groups} equal groups; "
            f"pass a num_groups that divides {num_experts}, or leave it out"
        )
    if num_groups % topology.num_nodes:
        raise DistplbError(
            f"{num_groups} groups cannot be dealt evenly to {topology.num_nodes} nodes; "
            f"pass a num_groups that is a multiple of {topology.num_nodes}, or leave it out"
        )


# --- nodes and groups -------------------------------------------------------------------------------------------


def _fullest(weight: Tensor, topology: Topology, num_slots: int, num_groups: int | None) -> Tensor:
    """`[X, W]`: what the fullest GPU has at least, of rows `[X, E]`, for each way to deal the groups (1 without)."""
    num_gpus, num_nodes = topology.num_gpus, topology.num_nodes
    if num_groups is None or num_nodes == 1:
        return _on_gpus(weight, num_gpus, num_slots)[:, None]
    by_group = weight.unflatten(-1, (num_groups, -1))  # [X, B, E / B]
    if _num_ways(num_groups, num_nodes) > _MOST_WAYS:
        # A node's fullest GPU has at least the node's mean, and whole groups are items like experts without replicas.
        of_nodes = _packed(by_group.sum(-1), num_nodes) / topology.gpus_per_node
        return torch.maximum(of_nodes, _on_gpus(weight, num_gpus, num_slots))[:, None]
    # (j) Inside a node, its experts, slots and GPUs are a problem of their own.
    ways = list(_ways(tuple(range(num_groups)), num_groups // num_nodes))
    inside = {
        groups: _on_gpus(by_group[:, list(groups)].flatten(1), num_gpus // num_nodes, num_slots // num_nodes)
        for groups in sorted({groups for way in ways for groups in way})
    }
    return torch.stack([torch.stack([inside[groups] for groups in way]).amax(0) for way in ways], -1)


def _num_ways(num_groups: int, num_nodes: int) -> int:
    each = math.factorial(num_groups // num_nodes)
    return math.factorial(num_groups) // (each**num_nodes * math.factorial(num_nodes))


def _ways(groups: tuple[int, ...], size: int) -> Iterator[list[tuple[int, ...]]]:
    """Every way to split the groups into sets of `size`; nodes have no names here."""
    if not groups:
        yield []
        return
    for company in combinations(groups[1:], size - 1):
        first = (groups[0], *company)
        for rest in _ways(tuple(group for group in groups if group not in first), size):
            yield [first, *rest]


def _on_gpus(weight: Tensor, num_gpus: int, num_slots: int) -> Tensor:
    """`[X]`: what the fullest GPU has at least, of rows `[X, E]`."""
    rows = max(1, _NUMBERS_AT_ONCE // weight.shape[1])
    if num_slots == weight.shape[1]:
        return torch.cat([_packed(part, num_gpus) for part in weight.split(rows)])
    return torch.cat([_replicated(part, num_gpus, num_slots) for part in weight.split(rows)])


# --- without replicas -------------------------------------------------------------------------------------------


def _packed(weight: Tensor, num_packs: int) -> Tensor:
    """`[X]`: what the fullest of M packs of G items has at least, of rows `[X, n]`: (a) to (d)."""
    size = weight.shape[1] // num_packs
    mean = weight.sum(-1) / num_packs  # (a)
    heavy = weight.sort(-1, descending=True).values  # [X, n]
    if size == 1:
        return torch.maximum(mean, heavy[:, 0])
    # Running totals, [X, n + 1]: of the k heaviest, and of the k lightest.
    top, low = pad(heavy.cumsum(-1), (1, 0)), pad(heavy.flip(-1).cumsum(-1), (1, 0))
    # A difference of two totals loses digits that the bound must not gain.
    lost = weight.shape[1] * 2.0**-52 * top[:, -1]  # [X]
    found = [_separate(heavy, top, low, size, lost), _crowded(heavy, top, low, size, lost)]
    return torch.stack([mean, *found]).amax(0)


def _separate(heavy: Tensor, top: Tensor, low: Tensor, size: int, lost: Tensor) -> Tensor:
    """`[X]`: (b) and (c), the largest over k = 1 ... M."""
    k = torch.arange(1, heavy.shape[1] // size + 1, device=heavy.device)
    # Two of the k heaviest in one pack: at least the two lightest of them with the lightest G − 2 of all.
    together = heavy[:, k[1:] - 2] + heavy[:, k[1:] - 1] + low[:, size - 2, None]
    together = pad(together, (1, 0), value=math.inf)  # [X, M]; one alone cannot be two
    # (b) Else they are in k packs, with k(G − 1) others.
    mean = (top[:, k] + low[:, k * (size - 1)]) / k
    # (c) Of those others, all but the k(G − j) − 1 lightest are k(j − 1) + 1: one of the k packs has j of them. It has
    # one of the k heaviest too, and G − 1 − j more.
    j = torch.arange(1, size, device=heavy.device)
    skipped = k[:, None] * (size - j) - 1  # [M, G − 1]
    heavier = low[:, skipped + j] - low[:, skipped] - lost[:, None, None]
    one = heavy[:, k - 1] + (heavier + low[:, None, size - 1 - j]).amax(-1)
    return torch.minimum(torch.maximum(mean, one), together).amax(-1)


def _crowded(heavy: Tensor, top: Tensor, low: Tensor, size: int, lost: Tensor) -> Tensor:
    """`[X]`: (d), the largest over k = 0 ... M − 1 and j = 1 ... G − 1; pigeonholes where k = 0."""
    num_packs = heavy.shape[1] // size
    k = torch.arange(num_packs, device=heavy.device)[:, None]
    j = torch.arange(1, size, device=heavy.device)
    last = k + j * (num_packs - k) + 1  # [M, G − 1], how many of the heaviest
    # One of the lighter joins one of the k heaviest, or two of those are together, which is no less.
    joined = heavy[:, k[1:] - 1] + heavy[:, last[1:] - 1] + low[:, size - 2, None, None]
    joined = pad(joined, (0, 0, 1, 0), value=math.inf)  # [X, M, G − 1]; of none, none joins
    # Else the lighter, j(M − k) + 1 of them, are all in the other M − k packs.
    crowd = top[:, last] - top[:, last - j - 1] - lost[:, None, None] + low[:, None, size - 1 - j]
    return torch.minimum(joined, crowd).amax((-2, -1))


# --- with replicas ----------------------------------------------------------------------------------------------


def _replicated(weight: Tensor, num_gpus: int, num_slots: int) -> Tensor:
    """`[X]`: what the fullest of M GPUs has at least, of rows `[X, E]` in P > E slots: (a) and (f) to (j)."""
    mean = weight.sum(-1, keepdim=True) / num_gpus  # (a), [X, 1]
    share, replicas = _least_shares(weight, num_slots)
    bound = torch.maximum(mean, share.amax(-1, keepdim=True))  # (f)
    # What follows for any replicas follows for these: (g) to (j) need not look higher than (a) to (d) of their shares.
    high = _packed(_repeated(share, replicas, num_slots), num_gpus)[:, None]
    rows = (high > bound * (1 + 1e-9)).nonzero()[:, 0]
    weight, low, high = weight[rows], bound[rows], high[rows]
    for _ in range(_ROUNDS if len(rows) else 0):
        middle = (low + high) / 2
        too_low = _too_low(weight, middle, num_gpus, num_slots)[:, None]
        low, high = torch.where(too_low, middle, low), torch.where(too_low, high, middle)
    return bound.index_copy(0, rows, low)[:, 0]


def _least_shares(weight: Tensor, num_slots: int) -> tuple[Tensor, Tensor]:
    """`[X, E]` twice: shares of which the largest is as small as P slots allow, and their replicas, of P or less."""
    low, high = weight.sum(-1, keepdim=True) / num_slots, weight.amax(-1, keepdim=True)
    for _ in range(50):
        middle = (low + high) / 2
        too_low = _replicas(weight, middle).sum(-1, keepdim=True) > num_slots
        low, high = torch.where(too_low, middle, low), torch.where(too_low, high, middle)
    replicas = _replicas(weight, high)
    # Where experts tie for the next replica, there may be some left, for fewer than tie.
    first = (weight / replicas).argsort(-1, descending=True)
    left = torch.arange(weight.shape[1], device=weight.device) < num_slots - replicas.sum(-1, keepdim=True)
    replicas = replicas.scatter_add(-1, first, left.to(replicas))
    return weight / replicas, replicas


def _repeated(share: Tensor, replicas: Tensor, num_slots: int) -> Tensor:
    """`[X, P]`: the share of every slot; what replicas there are too few, no weight."""
    ends = replicas.cumsum(-1)  # [X, E]
    slot = torch.arange(num_slots, device=share.device, dtype=ends.dtype).expand(len(share), -1).contiguous()
    return pad(share, (0, 1)).gather(-1, torch.searchsorted(ends, slot, right=True))


def _replicas(weight: Tensor, limit: Tensor) -> Tensor:
    """The fewest replicas whose shares are within `limit`; with fewer, the shares exceed it by a part in 10^11."""
    return (weight / limit.clamp(min=_TINY) * (1 - _SAFE)).ceil().clamp(min=1)


class _Limit(NamedTuple):
    """Rows, a limit λ that no GPU is to exceed, and what follows for the replicas."""

    weight: Tensor  # [X, E]
    limit: Tensor  # [X, 1], λ
    need: Tensor  # [X, E], replicas that each expert must have
    spare: Tensor  # [X, 1], replicas left over
    lightest: Tensor  # [X, G], at least the weight of any 0 ... G − 1 slots


def _too_low(weight: Tensor, limit: Tensor, num_gpus: int, num_slots: int) -> Tensor:
    """`[X]`: whether some GPU must exceed `limit` `[X, 1]`, by (g), (h), (i) or (j)."""
    need = _replicas(weight, limit)
    for _ in range(3):  # (g) the lightest company demands more replicas, and these leave fewer to make it light
        spare = (num_slots - need.sum(-1, keepdim=True)).clamp(min=0)
        lightest = _lightest(weight, need + spare, num_slots // num_gpus - 1)
        need = torch.maximum(need, _replicas(weight, limit - lightest[:, -1:])).clamp(max=num_slots + 1)
    case = _Limit(weight, limit, need, num_slots - need.sum(-1, keepdim=True), lightest)
    too_low = case.spare[:, 0] < 0
    for check in (_too_many_heavy, _too_much_excess, _too_few_light):
        rows = (~too_low).nonzero()[:, 0]
        too_low[rows] = check(_Limit(*(part[rows] for part in case)), num_gpus)
    return too_low


def _lightest(weight: Tensor, replicas: Tensor, most: int) -> Tensor:
    """`[X, most + 1]`: the total of the 0 ... `most` lightest slots, if experts had as many replicas, `[X, E]`."""
    share, order = (weight / replicas).topk(min(most, weight.shape[1]), largest=False)
    replicas = replicas.gather(-1, order)
    lighter = replicas.cumsum(-1) - replicas  # slots before those of an expert
    count = torch.arange(most + 1, device=weight.device)[:, None]
    taken = torch.minimum((count - lighter[:, None]).clamp(min=0), replicas[:, None])  # [X, most + 1, experts]
    return (taken * share[:, None]).sum(-1)


# (h), (i) and (j) each have a sum over slots that is at most 0 where no GPU exceeds λ. The spare replicas make the sum
# as small as they can. At a price for each of them, every expert by itself takes as many as pay; the price of all
# spare ones comes off. That is never more than the sum's least value, whatever the price.


def _too_many_heavy(case: _Limit, num_gpus: int) -> Tensor:
    """`[X]`: (h). Of slots above ρ_j, where (j + 1) ρ_j and the lightest company make λ, a GPU has at most j."""
    size = case.lightest.shape[1]
    too_low = torch.zeros_like(case.limit, dtype=torch.bool)
    for j in range(1, size):
        heavy = (case.limit - case.lightest[:, size - 1 - j, None]) / (j + 1)  # ρ_j
        extra = (_replicas(case.weight, heavy) - case.need).clamp(min=0)  # that would make an expert light
        for price in _PRICES:
            count = torch.minimum(case.need, price * extra).sum(-1, keepdim=True) - price * case.spare
            too_low |= count > j * num_gpus * (1 + _SAFE)
    return too_low[:, 0]


def _too_much_excess(case: _Limit, num_gpus: int) -> Tensor:
    """`[X]`: (i). Slots exceed ρ = λ − (G − 1) τ ≥ τ by no more than slots of less than τ leave, for any τ.

    On one GPU: with h slots above ρ, their excess, h ρ and the others make at most λ = ρ + (G − 1) τ, so that the
    excess and (h − 1)(ρ − τ) are at most what the others leave below τ.
    """
    size = case.lightest.shape[1]
    light = _levels(case, num_gpus, size - 1)  # τ, [X, levels, 1]
    heavy = case.limit[..., None] - (size - 1) * light  # ρ
    weight, need = case.weight[:, None], case.need[:, None]  # [X, 1, E]
    excess = (weight - need * heavy).clamp(min=0)  # [X, levels, E]
    gap = (excess - (need * light - weight).clamp(min=0)).sum(-1, keepdim=True)
    # A further replica lowers the excess by ρ as long as there is so much, then by the rest; else the gap by up to τ.
    full = (excess / heavy.clamp(min=_TINY)).floor()
    rest = excess - full * heavy
    too_low = torch.zeros_like(gap, dtype=torch.bool)
    for part in (0, 0.1, 0.3):
        price = light + part * (heavy - light)  # in [τ, ρ], so that light experts take none
        paid = (full * (heavy - price) + (rest - price).clamp(min=0)).sum(-1, keepdim=True)
        too_low |= gap - paid - price * case.spare[..., None] > _SAFE * weight.sum(-1, keepdim=True)
    return (too_low & (heavy >= light)).any(1)[:, 0]


def _too_few_light(case: _Limit, num_gpus: int) -> Tensor:
    """`[X]`: (j). A slot above ρ_j = λ − j τ − the lightest G − 1 − j has G − j with it that are below τ, for any τ.

    Else j of its company are not, and its GPU exceeds λ. There are then G − j times as many light slots as heavy ones,
    if no two heavy ones can be on one GPU.
    """
    size = case.lightest.shape[1]
    weight, need, spare = case.weight[:, None], case.need[:, None], case.spare[..., None]
    limit, lightest = case.limit[..., None], case.lightest[..., None, None]  # [X, 1, 1], [X, G, 1, 1]
    too_low = torch.zeros_like(limit, dtype=torch.bool)
    for j in range(1, size):
        light = _levels(case, num_gpus, size - j)  # τ, [X, levels, 1]
        heavy = limit - j * light - lightest[:, size - 1 - j]  # ρ_j
        alone = 2 * heavy + lightest[:, size - 2] > limit
        # Replicas that make an expert neither, and that make it light; a slot at τ is not light, one at ρ_j not heavy.
        middling = _replicas(weight, heavy + 1e-9 * limit)  # [X, levels, E]
        enough = (weight / (light * (1 - _ROUNDING)).clamp(min=_TINY)).ceil().clamp(min=1)
        as_it_is = torch.where(middling > need, (size - j) * need, 0)
        for price in (price for price in _PRICES if price >= 1):  # light experts take no more
            to_middling = price * (middling - need).clamp(min=0)
            to_light = price * (enough - need).clamp(min=0) - torch.maximum(enough, need)
            count = torch.minimum(torch.minimum(as_it_is, to_middling), to_light).sum(-1, keepdim=True)
            too_low |= ((count - price * spare > 1e-6) & alone).any(1, keepdim=True)
    return too_low[:, 0, 0]


def _levels(case: _Limit, num_gpus: int, each: int) -> Tensor:
    """`[X, levels, 1]`: the shares of the k·each-th lightest slots, for k from 1 to M in growing steps."""
    share, order = (case.weight / case.need).sort(-1)
    slots = case.need.gather(-1, order).cumsum(-1)  # [X, E]
    k = torch.linspace(0, math.log2(num_gpus), _NUM_LEVELS, device=share.device).exp2().round().unique()
    place = torch.searchsorted(slots, (k * each).to(slots).expand(len(slots), -1).contiguous())
    return share.gather(-1, place.clamp(max=share.shape[1] - 1))[..., None]
