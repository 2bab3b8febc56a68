"""How even the GPUs could be at best: bounds that no placement can beat, each with its proof.

A bound is the least load that the fullest GPU can have, found for one row of weights at a time: one layer in one step,
or in the mean step. Rows are independent and are worked on together.

Shapes: T steps, L layers, E experts, P slots, M GPUs, G slots on each GPU, N nodes, B groups; X rows; n items, which
are experts or whole groups; W ways to deal the groups to the nodes; K levels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from distplb.core.arguments import refuse_wrong_types, whole_number
from distplb.core.cost import mean_of_known
from distplb.core.counts import Counts, as_load
from distplb.core.topology import Topology
from distplb.errors import DistplbError

__all__ = ["lower_bound"]

_TINY = 1e-300  # stands for 0 below a fraction's line
_ROUNDING = 1e-12  # more than the last digits of a result, less than anybody reads
_SAFE = 1e-11  # what is called too large is so by this part at least
_MOST_WAYS = 128  # of (k); 8 groups can be dealt to 4 nodes in 105
_NUMBERS_AT_ONCE = 1 << 18  # of a batch of rows; (i) and (j) may need 16 times as many
_ROUNDS = 20  # of halving, with replicas: what is lost is a millionth of what there is to find
_LEVELS = 16  # values of τ that (i) and (j) try
_PRICES = (0.25, 0.5, 1, 1.25, 1.5, 2, 2.5, 3, 4, 6)  # of a spare replica, in (h) and (j), in slots


def lower_bound(load: Counts, topology: Topology, num_slots: int, num_groups: int | None = None) -> Tensor:
    """What no placement can beat: a bound of the imbalance's mean over the steps.

    >>> lower_bound(torch.tensor([[9, 1, 1, 1]]), Topology(1, 2), num_slots=4)
    tensor([1.6667], dtype=torch.float64)

    The larger of the bound of the mean step and the mean of the steps' own bounds, over the steps in which the layer
    has tokens. The bound of one step is the largest of several, which are proved where they are computed. In every
    case:

    (a) the mean GPU.

    Without replicas, for every k and j that make sense:

    (b) the k heaviest experts are on k GPUs, with at least the lightest company: their mean; or two are on one GPU;
    (c) the k heaviest experts are on k GPUs, and one has j of the heavier part of their company; or two are on one;
    (d) of the k + j(M − k) + 1 heaviest, one of the lighter ones joins one of the k heaviest, or j + 1 are on one GPU;
    (e) all that, rounded up: a GPU holds whole tokens.

    With replicas, which share their expert's tokens evenly:

    (f) the largest share, where each further replica goes to the expert with the largest: no other way leaves less.

    With replicas, any load λ of the fullest GPU that these refute:

    (g) below λ, next to the lightest company that there can be, the experts need more replicas than there are slots;
    (h) a GPU has room for j of the heavy replicas, and there are more than jM;
    (i) what heavy replicas have too much is more than what light ones have too little;
    (j) a heavy replica needs light company, and there is too little of it.

    With groups, whole nodes hold whole groups:

    (k) the best way to deal the groups to nodes, by the bounds above inside each node. Where there are more than 128
        ways, the bounds above without groups, and (a) to (d) with nodes for GPUs and groups for experts.

    Without replicas two slots a GPU are decided by (c), and with replicas one slot a GPU by (f): these are optima.

    Args:
        load: `[T, L, E]` or `[L, E]`, tokens of each expert, of any type that is exact, or weights with fractions.
        topology: of the EP group.
        num_slots: P, a multiple of M and at least E; more than E means replicas, also several of one on a GPU.
        num_groups: B, if each node holds B / N whole groups of consecutive experts, in P / N slots; none where None.

    Returns:
        `[L]` float64, each at least 1; NaN for a layer without any tokens.

    Raises:
        DistplbError: if the load is not one of tokens, or slots or groups cannot be spread evenly.
    """
    tokens = as_load(load)
    refuse_wrong_types({"topology": (topology, (Topology,), "a Topology, such as Topology.from_env()")})
    num_slots = whole_number("num_slots", num_slots)
    num_groups = None if num_groups is None else whole_number("num_groups", num_groups)
    num_steps, _, num_experts = tokens.shape
    topology.slots_per_gpu(num_slots)
    _check(num_experts, topology, num_slots, num_groups)
    mean = tokens.sum(-1, keepdim=True).double() / topology.num_gpus  # [T, L, 1]
    share = tokens.double() / mean.clamp(min=_TINY)  # [T, L, E], in mean GPUs; 0 without tokens
    is_busy = mean > 0  # [T, L, 1]; a step without tokens is no step
    busy = is_busy.sum(0)  # [L, 1]
    mean_step = share.sum(0, keepdim=True) / busy.clamp(min=1)  # [1, L, E], of those
    weight = torch.cat([share, mean_step])
    fullest = _fullest(weight.flatten(0, 1), topology, num_slots, num_groups)
    of_step, of_mean = fullest.unflatten(0, weight.shape[:2]).split([num_steps, 1])  # [T, L, W], [1, L, W]
    if num_slots == num_experts:  # (e)
        of_step = (of_step * mean * (1 - _ROUNDING)).ceil() / mean.clamp(min=_TINY)
    of_step = of_step.clamp(min=1).masked_fill(~is_busy, math.nan)
    of_mean = of_mean[0].clamp(min=1).masked_fill(busy == 0, math.nan)
    bound = torch.maximum(mean_of_known(of_step, dim=0), of_mean).amin(-1)  # [L]; one way for all steps
    # The last digits of a float sum must not lift the bound above what a placement reaches.
    return (bound * (1 - _ROUNDING)).clamp(min=1)


def _check(num_experts: int, topology: Topology, num_slots: int, num_groups: int | None) -> None:
    """Refuse fewer slots than experts, and groups that cannot be spread evenly."""
    if num_slots < num_experts:
        raise DistplbError(
            f"{num_slots} slots for {num_experts} experts: every expert needs at least one; "
            f"pass num_slots of {num_experts} or more, a multiple of {topology.num_gpus} GPUs"
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
    # (k) Inside a node, its experts, slots and GPUs are a problem of their own.
    ways = list(_ways(tuple(range(num_groups)), num_groups // num_nodes))
    sets = sorted({groups for way in ways for groups in way})
    inside = by_group[:, torch.tensor(sets, device=weight.device)].flatten(2)  # [X, sets, E / N]
    fullest = _on_gpus(inside.flatten(0, 1), topology.gpus_per_node, num_slots // num_nodes)
    fullest = fullest.unflatten(0, (-1, len(sets)))  # [X, sets]
    nodes = torch.tensor([[sets.index(groups) for groups in way] for way in ways], device=weight.device)  # [W, N]
    result: Tensor = fullest[:, nodes].amax(-1)
    return result


def _num_ways(num_groups: int, num_nodes: int) -> int:
    each = math.factorial(num_groups // num_nodes)
    return math.factorial(num_groups) // (math.factorial(num_nodes) * int(each**num_nodes))


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
    share, replicas, largest = _least_shares(weight, num_slots)
    bound = torch.maximum(mean, largest)  # (f)
    # What follows for any replicas follows for these: (g) to (j) need not look higher than (a) to (d) of their shares.
    high = _packed(_repeated(share, replicas, num_slots), num_gpus)[:, None] * (1 - _SAFE)
    rows = (high > bound * (1 + 1e-9)).nonzero()[:, 0]
    weight, low, high = weight[rows], bound[rows], high[rows]
    middle = high  # often nothing is lost
    for _ in range(_ROUNDS if len(rows) else 0):
        too_low = _too_low(weight, middle, num_gpus, num_slots)[:, None]
        low, high = torch.where(too_low, middle, low), torch.where(too_low, high, middle)
        middle = (low + high) / 2
    return bound.index_copy(0, rows, low)[:, 0]


def _least_shares(weight: Tensor, num_slots: int) -> tuple[Tensor, Tensor, Tensor]:
    """(f): shares `[X, E]` of which the largest is as small as P slots allow, their replicas, and the largest `[X, 1]`.

    It is found as the least limit for whose replicas there are slots.
    """
    low, high = weight.sum(-1, keepdim=True) / num_slots, weight.amax(-1, keepdim=True)
    for _ in range(60):  # to the last bit
        middle = (low + high) / 2
        too_low = _replicas(weight, middle).sum(-1, keepdim=True) > num_slots
        low, high = torch.where(too_low, middle, low), torch.where(too_low, high, middle)
    replicas = _replicas(weight, high)
    largest = torch.minimum(high, (weight / replicas).amax(-1, keepdim=True))
    # Replicas are left over where more experts tie for the next ones.
    heaviest = (weight / replicas).argsort(-1, descending=True)
    left = torch.arange(weight.shape[1], device=weight.device) < num_slots - replicas.sum(-1, keepdim=True)
    replicas = replicas.scatter_add(-1, heaviest, left.to(replicas))
    return weight / replicas, replicas, largest


def _repeated(share: Tensor, replicas: Tensor, num_slots: int) -> Tensor:
    """`[X, P]`: the share of every slot; 0 where replicas are too few, as in rows without tokens."""
    ends = replicas.cumsum(-1)  # [X, E]
    slot = torch.arange(num_slots, device=share.device, dtype=ends.dtype).expand(len(share), -1).contiguous()
    return pad(share, (0, 1)).gather(-1, torch.searchsorted(ends, slot, right=True))


def _replicas(weight: Tensor, limit: Tensor) -> Tensor:
    """The fewest replicas whose shares are within `limit`; with fewer, the shares exceed it by a part in 10^11."""
    return (weight / limit.clamp(min=_TINY) * (1 - _SAFE)).ceil().clamp(min=1)


class _Case(NamedTuple):
    """A load λ that no GPU is to exceed, for each of some rows, and what follows."""

    weight: Tensor  # [X, E], in the order of the shares weight / need, lightest first
    need: Tensor  # [X, E], replicas that each expert must have
    spare: Tensor  # [X, 1], replicas left over
    limit: Tensor  # [X, 1], λ
    lightest: Tensor  # [X, G], at most the total of any 0 ... G − 1 slots

    def of_rows(self, rows: Tensor) -> _Case:
        return _Case(*(part[rows] for part in self))

    def below(self, share: Tensor) -> tuple[Tensor, Tensor]:
        """`[X, K]` twice: how many slots have less than `share` `[X, K]`, without spare replicas, and their total."""
        place = torch.searchsorted(self.weight / self.need, share.contiguous())
        slots, total = pad(self.need.cumsum(-1), (1, 0)), pad(self.weight.cumsum(-1), (1, 0))
        return slots.gather(-1, place), total.gather(-1, place)

    def above(self, share: Tensor) -> tuple[Tensor, Tensor]:
        """`[X, K]` twice: how many slots have `share` `[X, K]` or more, without spare replicas, and their total."""
        slots, total = self.below(share)
        return self.need.sum(-1, keepdim=True) - slots, self.weight.sum(-1, keepdim=True) - total

    def levels(self, num_gpus: int, each: int) -> Tensor:
        """`[X, K]`: the shares of the k·each-th lightest slots, for k from 1 to M in growing steps."""
        k = torch.linspace(0, math.log2(num_gpus), _LEVELS, device=self.need.device).exp2().round().unique()
        slot = (k * each).to(self.need).expand(len(self.need), -1).contiguous()
        place = torch.searchsorted(self.need.cumsum(-1), slot).clamp(max=self.need.shape[1] - 1)
        return (self.weight / self.need).gather(-1, place)


def _too_low(weight: Tensor, limit: Tensor, num_gpus: int, num_slots: int) -> Tensor:
    """`[X]`: whether some GPU must exceed `limit` `[X, 1]`, by (g), (h), (i) or (j)."""
    need = _replicas(weight, limit)
    for _ in range(3):  # (g) the lightest company demands more replicas, and these leave fewer to make it light
        spare = (num_slots - need.sum(-1, keepdim=True)).clamp(min=0)
        lightest = _lightest(weight, need + spare, num_slots // num_gpus - 1)
        need = torch.maximum(need, _replicas(weight, limit - lightest[:, -1:])).clamp(max=num_slots + 1)
    spare = num_slots - need.sum(-1, keepdim=True)
    too_low = spare[:, 0] < 0
    order = (weight / need).argsort(-1)
    case = _Case(weight.gather(-1, order), need.gather(-1, order), spare, limit, lightest)
    for check in (_too_many_heavy, _too_much_excess, _too_few_light):
        rows = (~too_low).nonzero()[:, 0]
        too_low[rows] = check(case.of_rows(rows), num_gpus)
    return too_low


def _lightest(weight: Tensor, replicas: Tensor, most: int) -> Tensor:
    """`[X, most + 1]`: the total of the 0 ... `most` lightest slots, if experts had all of `replicas` `[X, E]`."""
    share, order = (weight / replicas).topk(min(most, weight.shape[1]), largest=False)
    replicas = replicas.gather(-1, order)
    lighter = replicas.cumsum(-1) - replicas  # slots before those of an expert
    count = torch.arange(most + 1, device=weight.device)[:, None]
    taken = torch.minimum((count - lighter[:, None]).clamp(min=0), replicas[:, None])  # [X, most + 1, experts]
    return (taken * share[:, None]).sum(-1)


# (h), (i) and (j) are each a sum over slots that is not above some number unless a GPU exceeds λ. The least sum that
# the spare replicas allow is bounded by putting a price on each of them: every expert takes as many as pay, whatever
# the others do, and the price of all spare ones comes off. Any price gives a valid bound. The sum without spare
# replicas says, at little cost, where that is worth trying.


def _too_many_heavy(case: _Case, num_gpus: int) -> Tensor:
    """`[X]`: (h). Of slots above ρ_j, where (j + 1) ρ_j and the lightest company make λ, a GPU has at most j."""
    size = case.lightest.shape[1]
    too_low = torch.zeros(len(case.limit), dtype=torch.bool, device=case.limit.device)
    for j in range(1, size):
        heavy = (case.limit - case.lightest[:, size - 1 - j, None]) / (j + 1)  # ρ_j
        rows = (case.above(heavy)[0] > j * num_gpus).nonzero()[:, 0]
        some = case.of_rows(rows)
        extra = (_replicas(some.weight, heavy[rows]) - some.need).clamp(min=0)  # with these, none is heavy
        for price in _PRICES:
            slots = torch.minimum(some.need, price * extra).sum(-1) - price * some.spare[:, 0]
            too_low[rows] |= slots > j * num_gpus * (1 + _SAFE)
    return too_low


def _too_much_excess(case: _Case, num_gpus: int) -> Tensor:
    """`[X]`: (i). All that slots have above ρ = λ − (G − 1) τ ≥ τ is not more than all that slots lack to τ, for any τ.

    It is so on each GPU. With h slots above ρ, these and the others have at most λ = ρ + (G − 1) τ together; so what
    the h have above ρ, and (h − 1)(ρ − τ) besides, is not more than what the others lack to τ.
    """
    size = case.lightest.shape[1]
    light = case.levels(num_gpus, size - 1)  # τ, [X, K]
    heavy = case.limit - (size - 1) * light  # ρ
    (few, few_total), (many, many_total) = case.below(light), case.above(heavy)
    gap = (many_total - heavy * many) - (light * few - few_total)
    found = (heavy >= light) & (gap > light * case.spare)  # worth trying
    rows, level = found.nonzero().unbind(-1)
    some, light, heavy = case.of_rows(rows), light[rows, level][:, None], heavy[rows, level][:, None]
    excess = (some.weight - some.need * heavy).clamp(min=0)
    gap = (excess - (some.need * light - some.weight).clamp(min=0)).sum(-1, keepdim=True)
    # Replicas of an expert take ρ each off its excess, the next one the rest; the others add to what lacks, τ at most.
    whole = (excess / heavy.clamp(min=_TINY)).floor()
    rest = excess - whole * heavy
    too_low = torch.zeros_like(gap, dtype=torch.bool)
    for part in (0, 0.1, 0.3):
        price = light + part * (heavy - light)  # from τ to ρ
        paid = (whole * (heavy - price) + (rest - price).clamp(min=0)).sum(-1, keepdim=True)
        too_low |= gap - paid - price * some.spare > _SAFE * some.weight.sum(-1, keepdim=True)
    found[rows, level] = too_low[:, 0]
    return found.any(-1)


def _too_few_light(case: _Case, num_gpus: int) -> Tensor:
    """`[X]`: (j). Slots below τ are G − j times as many as slots above ρ_j = λ − jτ − the lightest G − 1 − j, or more.

    A slot above ρ_j has at most j − 1 with it that are not below τ, so it has G − j that are. This counts if a GPU has
    no room for two above ρ_j.
    """
    size = case.lightest.shape[1]
    too_low = torch.zeros(len(case.limit), dtype=torch.bool, device=case.limit.device)
    for j in range(1, size):
        light = case.levels(num_gpus, size - j)  # τ, [X, K]
        heavy = case.limit - j * light - case.lightest[:, size - 1 - j, None]  # ρ_j
        alone = 2 * heavy + case.lightest[:, size - 2, None] > case.limit
        found = alone & ((size - j) * case.above(heavy)[0] - case.below(light)[0] > case.spare)  # worth trying
        rows, level = found.nonzero().unbind(-1)
        found[rows, level] = _outnumbered(case.of_rows(rows), light[rows, level], heavy[rows, level], size - j)
        too_low |= found.any(-1)
    return too_low


def _outnumbered(case: _Case, light: Tensor, heavy: Tensor, each: int) -> Tensor:
    """`[X]`: whether slots above `heavy` `[X]`, `each` times, are more than those below `light`, in spite of spares."""
    # Replicas with which an expert is not heavy any more, and with which it is light, which a share of τ is not yet.
    middling = _replicas(case.weight, heavy[:, None] + 1e-9 * case.limit)
    enough = (case.weight / (light[:, None] * (1 - _ROUNDING)).clamp(min=_TINY)).ceil().clamp(min=1)
    as_it_is = torch.where(middling > case.need, each * case.need, 0)
    to_middling, to_light = (middling - case.need).clamp(min=0), (enough - case.need).clamp(min=0)
    if_light = torch.maximum(enough, case.need)
    result = torch.zeros_like(light, dtype=torch.bool)
    for price in (price for price in _PRICES if price > 1):  # what is light takes no more
        slots = torch.minimum(as_it_is, price * to_middling)
        slots = torch.minimum(slots, price * to_light - if_light).sum(-1)
        result |= slots - price * case.spare[:, 0] > 1e-6
    return result
