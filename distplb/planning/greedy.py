"""Baselines: experts in order, and the greedy algorithm of DeepSeek's expert-parallel load balancer (EPLB).

Greedy is written from its description:

1. Groups of experts, if any, are assigned to nodes: in descending order of load, each goes to the lightest node that
   is not full.
2. Each spare slot of a node goes to the expert with the largest load / replicas.
3. The node's slots are assigned to its GPUs in the same way as groups to nodes.

Without groups, or with groups that cannot be spread evenly over the nodes, all GPUs count as one node and step 1 is
skipped.
Shapes: L layers, E experts, P slots, M GPUs, G = P / M slots on each, X = layers × nodes, n items, m packs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distplb.core.topology import Topology
from distplb.errors import DistplbError

__all__ = ["Pack", "Replicate", "contiguous", "greedy_numpy", "in_three_steps", "pack_numpy", "replicate_numpy"]

# (weight [X, n], slots, most replicas of an expert) -> expert of each slot [X, slots], replicas [X, n]
Replicate = Callable[[Tensor, int, int], tuple[Tensor, Tensor]]
# (load [X, n], kind [X, n] or None, m) -> the item at each place [X, n], pack by pack. Items of one kind do not share
# a pack; if kind is None, all may.
Pack = Callable[[Tensor, Tensor | None, int], Tensor]


def contiguous(weight: Tensor, topology: Topology, num_slots: int) -> Tensor:
    """`[L, P]` int64, the placement that a job starts with: experts in order; if P > E, they are repeated evenly.

    >>> contiguous(torch.ones(1, 4), Topology(num_nodes=1, gpus_per_node=2), num_slots=6)
    tensor([[0, 0, 1, 2, 2, 3]])
    """
    topology.slots_per_gpu(num_slots)
    layers, experts = weight.shape
    return (torch.arange(num_slots, device="cpu") * experts // num_slots).expand(layers, -1).clone()


def greedy_numpy(
    weight: Tensor,
    topology: Topology,
    num_slots: int,
    *,
    num_groups: int | None = None,
    allow_shared_replicas: bool = True,
) -> Tensor:
    """Run greedy on all layers at once; the only loops are over slots.

    >>> greedy_numpy(torch.tensor([[1, 9, 5, 3, 6, 4]]), Topology(num_nodes=1, gpus_per_node=2), 6)
    tensor([[1, 5, 0, 4, 2, 3]])

    Args:
        weight: `[L, E]` tokens of each expert.
        topology: topology of the EP group; its number of GPUs divides the slots.
        num_slots: P.
        num_groups: number of groups of consecutive experts.
        allow_shared_replicas: whether replicas of an expert may share a GPU; the published program allows it.

    Returns:
        `[L, P]` int64, the expert of each slot.

    Raises:
        DistplbError: if the slots cannot be spread evenly, or are too many for replicas on different GPUs.
    """
    return in_three_steps(weight, topology, num_slots, num_groups, allow_shared_replicas, replicate_numpy, pack_numpy)


def in_three_steps(
    weight: Tensor,
    topology: Topology,
    num_slots: int,
    num_groups: int | None,
    allow_shared_replicas: bool,
    replicate: Replicate,
    pack: Pack,
) -> Tensor:
    """Run steps 1 to 3 with these implementations of `Replicate` and `Pack`."""
    topology.slots_per_gpu(num_slots)
    layers, experts = weight.shape
    groups = 1 if num_groups is None or num_groups % topology.num_nodes else num_groups
    nodes = 1 if groups == 1 else topology.num_nodes
    gpus = topology.num_gpus // nodes
    apart = not allow_shared_replicas and num_slots > experts
    if apart and num_slots > experts * gpus:
        raise DistplbError(
            f"{num_slots} slots are too many for {experts} expert{'s' * (experts != 1)} with at most "
            f"{gpus} replica{'s' * (gpus != 1)} each; pass fewer slots"
        )
    weight = weight.double()
    group_at = pack(weight.unflatten(1, (groups, -1)).sum(2), None, nodes)  # [L, groups], node by node
    members = torch.arange(experts // groups, device="cpu")
    expert_at = (group_at[..., None] * len(members) + members).reshape(layers * nodes, -1)  # [X, E / nodes]
    of_node = weight.gather(1, expert_at.view(layers, -1)).view(layers * nodes, -1)  # [X, E / nodes]
    kind, replicas = replicate(of_node, num_slots // nodes, gpus if apart else num_slots)
    load = (of_node / replicas).gather(1, kind)  # [X, P / nodes]
    item_at = pack(load, kind if apart else None, gpus)
    return expert_at.gather(1, kind.gather(1, item_at)).view(layers, -1)


def replicate_numpy(weight: Tensor, num_slots: int, most: int) -> tuple[Tensor, Tensor]:
    """Step 2 as a `Replicate`: all rows at once."""
    tokens = weight.numpy()
    rows, experts = tokens.shape
    row = np.arange(rows)
    kind = np.tile(np.arange(num_slots), (rows, 1))
    share, replicas = tokens.copy(), np.ones((rows, experts), dtype=np.int64)
    for slot in range(experts, num_slots):
        hottest = share.argmax(1)
        kind[:, slot] = hottest
        replicas[row, hottest] += 1
        number = replicas[row, hottest]
        share[row, hottest] = np.where(number < most, tokens[row, hottest] / number, -1)
    return torch.from_numpy(kind), torch.from_numpy(replicas)


def pack_numpy(load: Tensor, kind: Tensor | None, num_packs: int) -> Tensor:
    """Steps 1 and 3 as a `Pack`: all rows at once."""
    rows, items = load.shape
    if items == num_packs:
        return torch.arange(items, device="cpu").repeat(rows, 1)
    size, of_item = items // num_packs, load.numpy()
    row = np.arange(rows)
    pack_load, filled = np.zeros((rows, num_packs)), np.zeros((rows, num_packs), dtype=np.int64)
    content = np.full((rows, num_packs, size), -1)
    kinds = None if kind is None else kind.numpy()
    num_kinds = 0 if kinds is None else kinds.max() + 1
    held = np.zeros((rows, num_packs, num_kinds), dtype=bool)  # which kinds a pack holds
    for item in np.argsort(-of_item, axis=1, kind="stable").T:  # [X]
        room = np.where(filled < size, pack_load, np.inf)  # [X, m], loads of packs that are not full
        if kinds is not None:
            apart = np.where(held[row, :, kinds[row, item]], np.inf, room)
            for stuck in np.flatnonzero(np.isinf(apart.min(1))):
                light = room[stuck].argmin()
                item[stuck] = _exchange(
                    of_item, kinds, content, held, pack_load, int(stuck), int(light), int(item[stuck])
                )
                apart[stuck, light] = 0
            room = apart
            held[row, room.argmin(1), kinds[row, item]] = True
        pack = room.argmin(1)
        content[row, pack, filled[row, pack]] = item
        pack_load[row, pack] += of_item[row, item]
        filled[row, pack] += 1
    return torch.from_numpy(content).flatten(1)


def _exchange(
    of_item: NDArray[Any],  # [X, n]
    kinds: NDArray[Any],  # [X, n]
    content: NDArray[Any],  # [X, m, places], -1 where empty
    held: NDArray[Any],  # [X, m, kinds]
    pack_load: NDArray[Any],  # [X, m]
    row: int,
    light: int,
    item: int,
) -> int:
    """Put the item in the place of another one, and return that one, which must go to pack `light`.

    Every pack that is not full holds the item's kind. The item replaces the one with the nearest load, among those in
    packs without its kind whose own kind pack `light` does not hold.
    """
    inside, kind = content[row], kinds[row]  # [m, size], [n]
    possible = (inside >= 0) & ~held[row, :, kind[item], None] & ~held[row, light, kind[inside]]
    difference = np.where(possible, abs(of_item[row, inside] - of_item[row, item]), np.inf)
    pack, place = np.unravel_index(difference.argmin(), difference.shape)
    other, inside[pack, place] = inside[pack, place], item
    held[row, pack, kind[[other, item]]] = [False, True]
    pack_load[row, pack] = pack_load[row, pack] - of_item[row, other] + of_item[row, item]
    return int(other)
