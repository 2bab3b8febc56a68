"""The planners that distplb is compared with, implemented from their descriptions.

Every planner takes the tokens `weight [L, E]` and returns `expert_of_slot [L, P]`, int64; slot p is on GPU `p // G`.
"Greedy" is the algorithm of DeepSeek's expert-parallel load balancer (EPLB), in the steps that `planning/greedy.py`
numbers. It has two variants with identical results: `greedy_loops` reads and writes single elements of tensors, as the
published program does; `greedy_numpy`, which is part of the package, computes all layers at once.
Shapes: L layers, E experts, P slots, M GPUs, G = P / M slots on each, X = layers × nodes, n items, m packs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distplb import Topology
from distplb import balanced_packing as searched_packing
from distplb.planning.greedy import contiguous, greedy_numpy, in_three_steps, replicate_numpy

__all__ = ["balanced_packing", "contiguous", "greedy_loops", "greedy_numpy", "snake"]


def snake(weight: Tensor, topology: Topology, num_slots: int, *, num_groups: int | None = None) -> Tensor:
    """Deal slots in descending order of load over the GPUs, forth and back; replicas as in greedy's step 2."""
    return in_three_steps(weight, topology, num_slots, num_groups, True, replicate_numpy, _deal)


def greedy_loops(
    weight: Tensor,
    topology: Topology,
    num_slots: int,
    *,
    num_groups: int | None = None,
    allow_shared_replicas: bool = True,
) -> Tensor:
    """Plan greedily in Python loops over single elements of tensors, as the published program does.

    Unlike the published program it uses double precision and stable sorts, which cost no time and make both variants
    agree.
    """
    return in_three_steps(weight, topology, num_slots, num_groups, allow_shared_replicas, _replicate_loops, _pack_loops)


def balanced_packing(weight: Tensor, topology: Topology, num_candidates: int) -> Tensor:
    """Plan by distplb's packing core alone, with K candidates; without replicas and groups."""
    pack, rank = searched_packing(weight, topology.num_gpus, num_candidates=num_candidates)
    place = pack * topology.slots_per_gpu(weight.shape[1]) + rank
    return place.argsort(1)


# --- replicas ---------------------------------------------------------------------------------------------------


def _replicate_loops(weight: Tensor, num_slots: int, max_replicas: int) -> tuple[Tensor, Tensor]:
    rows, experts = weight.shape
    row = torch.arange(rows)
    kind = torch.arange(num_slots).repeat(rows, 1)
    replicas = torch.ones(rows, experts, dtype=torch.int64)
    for slot in range(experts, num_slots):
        share = weight / replicas
        if max_replicas < num_slots:
            share[replicas >= max_replicas] = -1
        hottest = share.argmax(1)
        kind[:, slot] = hottest
        replicas[row, hottest] += 1
    return kind, replicas


# --- packing ----------------------------------------------------------------------------------------------------


def _deal(load: Tensor, _kind: Tensor | None, num_packs: int) -> Tensor:
    order = load.sort(dim=1, descending=True, stable=True).indices.unflatten(1, (-1, num_packs))  # [X, rounds, m]
    order[:, 1::2] = order[:, 1::2].flip(2)
    return order.mT.flatten(1)


def _pack_loops(load: Tensor, kind: Tensor | None, num_packs: int) -> Tensor:
    rows, items = load.shape
    if items == num_packs:
        return torch.arange(items).repeat(rows, 1)
    size = items // num_packs
    order = load.sort(dim=1, descending=True, stable=True).indices
    if kind is not None:
        packed = [_apart(load[row], kind[row].tolist(), order[row], num_packs) for row in range(rows)]
        return torch.tensor(packed).flatten(1)
    pack_of, rank_of = torch.full((rows, items), -1), torch.full((rows, items), -1)
    for row in range(rows):
        pack_load, filled = [0] * num_packs, [0] * num_packs
        for item in order[row]:
            open_packs = (pack for pack in range(num_packs) if filled[pack] < size)
            pack = min(open_packs, key=pack_load.__getitem__)
            pack_of[row, item] = pack
            rank_of[row, item] = filled[pack]
            pack_load[pack] += load[row, item]
            filled[pack] += 1
    return (pack_of * size + rank_of).argsort(1)


# --- replicas of one expert on different GPUs -------------------------------------------------------------------


def _apart(load: Tensor, kind: list[int], order: Tensor, num_packs: int) -> list[list[int]]:
    """Pack the items of one row so that items of one kind do not share a pack; return the items of each pack.

    Each item goes to the lightest pack that is not full and does not hold its kind. If all packs with room hold its
    kind, the item takes the place of an item in a full pack, which moves to the lightest pack with room: the one with
    the nearest load, among items whose pack does not hold the new item's kind and whose kind the lightest pack does
    not hold.
    """
    size = len(kind) // num_packs
    pack_load = [0.0] * num_packs
    content: list[list[int]] = [[] for _ in range(num_packs)]
    held: list[set[int]] = [set() for _ in range(num_packs)]
    for item in map(int, order):
        open_packs = [pack for pack in range(num_packs) if len(content[pack]) < size]
        apart = [pack for pack in open_packs if kind[item] not in held[pack]]
        pack = min(apart or open_packs, key=pack_load.__getitem__)
        if not apart:
            item = _exchange(load, kind, content, held, pack_load, pack, item)
        content[pack].append(item)
        held[pack].add(kind[item])
        pack_load[pack] = pack_load[pack] + load[item]
    return content


def _exchange(
    load: Tensor,
    kind: list[int],
    content: list[list[int]],
    held: list[set[int]],
    pack_load: list[float],
    light: int,
    item: int,
) -> int:
    """Put the item in the place of another, and return the other, which goes to the pack `light`."""
    others = (
        (abs(load[other] - load[item]), pack, place)
        for pack, inside in enumerate(content)
        if kind[item] not in held[pack]
        for place, other in enumerate(inside)
        if kind[other] not in held[light]
    )
    _, pack, place = min(others)  # ties: the first in (pack, place) order
    other, content[pack][place] = content[pack][place], item
    held[pack] ^= {kind[other], kind[item]}
    pack_load[pack] = pack_load[pack] - load[other] + load[item]  # the same order everywhere, because floats round
    return other
