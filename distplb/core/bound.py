"""Lower bounds of the imbalance, which no placement can beat, each with its proof.

A bound is a load that the busiest GPU must have at least. It is computed for each row of weights: one layer in one
step, or in the mean step. Rows are independent and are processed together. The bound of a row is the largest of

- (a) the mean GPU; (b) to (d), the bounds of `heaviest_pack` without replicas; (e) the largest of these, rounded up,
  as a GPU gets whole tokens;
- (f) to (j), the bounds of `busiest_of_replicas` with replicas;
- (k) with groups that must stay whole on a node: the best way to deal the groups to the nodes, by the bounds above
  inside each node. With more than 128 ways, the bounds above without groups, and (a) to (d) with nodes in place of
  GPUs and groups in place of experts.

Shapes: T steps, L layers, E experts, P slots, M GPUs, N nodes, B groups; X rows; W ways to deal the groups to nodes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import combinations

import torch
from torch import Tensor

from distplb.core.arguments import refuse_wrong_types, whole_number
from distplb.core.bound_with_replicas import busiest_of_replicas
from distplb.core.bound_without_replicas import heaviest_pack
from distplb.core.cost import mean_of_known
from distplb.core.counts import Counts, as_load
from distplb.core.topology import Topology
from distplb.errors import DistplbError

__all__ = ["lower_bound"]

_TINY = 1e-300  # replaces 0 in a denominator
_ROUNDING = 1e-12  # relative; larger than rounding errors, smaller than any difference that matters
_MOST_WAYS = 128  # for (k); 8 groups can be dealt to 4 nodes in 105 ways
_NUMBERS_AT_ONCE = 1 << 18  # in a batch of rows; (i) and (j) may need 16 times as many


def lower_bound(load: Counts, topology: Topology, num_slots: int, num_groups: int | None = None) -> Tensor:
    """A lower bound, for any placement, of the imbalance averaged over the steps.

    >>> lower_bound(torch.tensor([[9, 1, 1, 1]]), Topology(1, 2), num_slots=4)
    tensor([1.6667], dtype=torch.float64)

    The larger of the mean step's bound and the mean of the single steps' bounds, over the steps in which the layer has
    tokens. The bound of one step is the largest of those in the module's docstring.

    Args:
        load: `[T, L, E]` or `[L, E]`, tokens of each expert, in any exact type, or weights with fractions.
        topology: topology of the EP group.
        num_slots: P, a multiple of M and at least E; P > E means replicas, of which a GPU may hold several of one
            expert.
        num_groups: B, if each node holds B / N whole groups of consecutive experts in P / N slots; None for no groups.

    Returns:
        `[L]` float64, each at least 1; NaN for a layer without tokens.

    Raises:
        DistplbError: if `load` is neither token counts nor weights, or slots or groups cannot be spread evenly.
    """
    tokens = as_load(load)
    refuse_wrong_types({"topology": (topology, (Topology,), "a Topology, such as Topology.from_env()")})
    num_slots = whole_number("num_slots", num_slots)
    num_groups = None if num_groups is None else whole_number("num_groups", num_groups)
    num_steps, _, num_experts = tokens.shape
    topology.slots_per_gpu(num_slots)
    _check(num_experts, topology, num_slots, num_groups)
    mean = tokens.sum(-1, keepdim=True).double() / topology.num_gpus  # [T, L, 1]
    share = tokens.double() / mean.clamp(min=_TINY)  # [T, L, E], in units of the mean GPU; 0 without tokens
    is_busy = mean > 0  # [T, L, 1]; a step without tokens does not count
    busy = is_busy.sum(0)  # [L, 1]
    mean_step = share.sum(0, keepdim=True) / busy.clamp(min=1)  # [1, L, E], over the busy steps
    weight = torch.cat([share, mean_step])
    busiest = _busiest(weight.flatten(0, 1), topology, num_slots, num_groups)
    of_step, of_mean = busiest.unflatten(0, weight.shape[:2]).split([num_steps, 1])  # [T, L, W], [1, L, W]
    if num_slots == num_experts:  # (e)
        of_step = (of_step * mean * (1 - _ROUNDING)).ceil() / mean.clamp(min=_TINY)
    of_step = of_step.clamp(min=1).masked_fill(~is_busy, math.nan)
    of_mean = of_mean[0].clamp(min=1).masked_fill(busy == 0, math.nan)
    bound = torch.maximum(mean_of_known(of_step, dim=0), of_mean).amin(-1)  # [L]; one way to deal for all steps
    # Rounding errors of a float sum must not lift the bound above an imbalance that a placement reaches.
    return (bound * (1 - _ROUNDING)).clamp(min=1)


def _check(num_experts: int, topology: Topology, num_slots: int, num_groups: int | None) -> None:
    """Refuse fewer slots than experts, and groups that cannot be spread evenly."""
    if num_slots < num_experts:
        raise DistplbError(
            f"num_slots is {num_slots} for {num_experts} experts, and every expert needs at least one slot; "
            f"pass a num_slots of at least {num_experts} that is a multiple of the number of GPUs, {topology.num_gpus}"
        )
    if num_groups is None:
        return
    if num_groups < 1 or num_experts % num_groups:
        raise DistplbError(
            f"{num_experts} expert{'s' * (num_experts != 1)} cannot be split into {num_groups} equal groups; "
            f"pass a num_groups that divides {num_experts}, or leave it out"
        )
    if num_groups % topology.num_nodes:
        raise DistplbError(
            f"{num_groups} group{'s' * (num_groups != 1)} cannot be dealt evenly to {topology.num_nodes} nodes; "
            f"pass a num_groups that is a multiple of {topology.num_nodes}, or leave it out"
        )


# --- nodes and groups -------------------------------------------------------------------------------------------


def _busiest(weight: Tensor, topology: Topology, num_slots: int, num_groups: int | None) -> Tensor:
    """`[X, W]`: a lower bound of the busiest GPU's load, for rows `[X, E]` and each way to deal groups (1 without)."""
    num_gpus, num_nodes = topology.num_gpus, topology.num_nodes
    if num_groups is None or num_nodes == 1:
        return _on_gpus(weight, num_gpus, num_slots)[:, None]
    by_group = weight.unflatten(-1, (num_groups, -1))  # [X, B, E / B]
    if _num_ways(num_groups, num_nodes) > _MOST_WAYS:
        # A node's busiest GPU has at least the mean of its GPUs, and whole groups pack like experts without replicas.
        of_nodes = heaviest_pack(by_group.sum(-1), num_nodes) / topology.gpus_per_node
        return torch.maximum(of_nodes, _on_gpus(weight, num_gpus, num_slots))[:, None]
    # (k) The experts, slots and GPUs of one node are a separate problem.
    ways = list(_ways(tuple(range(num_groups)), num_groups // num_nodes))
    sets = sorted({groups for way in ways for groups in way})
    inside = by_group[:, torch.tensor(sets, device=weight.device)].flatten(2)  # [X, sets, E / N]
    busiest = _on_gpus(inside.flatten(0, 1), topology.gpus_per_node, num_slots // num_nodes)
    busiest = busiest.unflatten(0, (-1, len(sets)))  # [X, sets]
    nodes = torch.tensor([[sets.index(groups) for groups in way] for way in ways], device=weight.device)  # [W, N]
    result: Tensor = busiest[:, nodes].amax(-1)
    return result


def _num_ways(num_groups: int, num_nodes: int) -> int:
    each = math.factorial(num_groups // num_nodes)
    return math.factorial(num_groups) // (math.factorial(num_nodes) * int(each**num_nodes))


def _ways(groups: tuple[int, ...], size: int) -> Iterator[list[tuple[int, ...]]]:
    """Every way to split the groups into sets of `size`; nodes are interchangeable."""
    if not groups:
        yield []
        return
    for others in combinations(groups[1:], size - 1):
        first = (groups[0], *others)
        for rest in _ways(tuple(group for group in groups if group not in first), size):
            yield [first, *rest]


def _on_gpus(weight: Tensor, num_gpus: int, num_slots: int) -> Tensor:
    """`[X]`: a lower bound of the busiest GPU's load, for rows `[X, E]`."""
    rows = max(1, _NUMBERS_AT_ONCE // weight.shape[1])
    if num_slots == weight.shape[1]:
        return torch.cat([heaviest_pack(part, num_gpus) for part in weight.split(rows)])
    return torch.cat([busiest_of_replicas(part, num_gpus, num_slots) for part in weight.split(rows)])
