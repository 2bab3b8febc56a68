"""The planners that distplb is measured against, written here from their descriptions.

Every planner takes the tokens `weight [L, E]` and returns `expert_of_slot [L, P]`, int64; slot p lives on GPU
`p // G`. "Greedy" is what DeepSeek's expert-parallel load balancer (EPLB) does:

1. Groups of experts, where there are any, go to nodes: in descending order of load, each to the lightest node that
   is not full.
2. Each spare slot of a node goes to the expert with the largest load / replicas.
3. The node's slots go to its GPUs as the groups went to the nodes.

Without groups, or with groups that cannot be spread evenly over the nodes, all GPUs count as one node and step 1 is
void. There are three of it, equal to the bit: `greedy_loops` keeps its numbers in tensors and reads and writes them
one by one, as the published program does; `greedy_lists` is leaner; `greedy_numpy` does all layers at once.
Shapes: L layers, E experts, P slots, M GPUs, G = P / M slots on each, X = layers × nodes, n items, m packs.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from distplb import Topology
from distplb import balanced_packing as searched_packing

# (weight [X, n], slots, most replicas of an expert) -> expert of each slot [X, slots], replicas [X, n]
Replicate = Callable[[Tensor, int, int], tuple[Tensor, Tensor]]
# (load [X, n], kind [X, n] or None, m) -> the item at each place [X, n], pack by pack. Items of one kind do not share
# a pack; with None they may.
Pack = Callable[[Tensor, Tensor | None, int], Tensor]


def contiguous(weight: Tensor, topology: Topology, num_slots: int) -> Tensor:
    """What a job starts with: experts in order; where P > E, spare slots repeat an expert next to it, evenly."""
    topology.slots_per_gpu(num_slots)
    layers, experts = weight.shape
    return (torch.arange(num_slots) * experts // num_slots).expand(layers, -1).clone()


def snake(weight: Tensor, topology: Topology, num_slots: int, *, num_groups: int | None = None) -> Tensor:
    """Slots in descending order of load, dealt over the GPUs forth and back; replicas as in greedy's step 2."""
    return _in_three_steps(weight, topology, num_slots, num_groups, True, _replicate_numpy, _deal)


def greedy_loops(
    weight: Tensor,
    topology: Topology,
    num_slots: int,
    *,
    num_groups: int | None = None,
    allow_shared_replicas: bool = True,
) -> Tensor:
    """Greedy as it is published and run: Python loops over single elements of tensors.

    It differs from the published program in double precision and stable sorts, which cost nothing and let the three
    variants agree.
    """
    return _in_three_steps(
        weight, topology, num_slots, num_groups, allow_shared_replicas, _replicate_torch, _pack_loops
    )


def greedy_lists(
    weight: Tensor,
    topology: Topology,
    num_slots: int,
    *,
    num_groups: int | None = None,
    allow_shared_replicas: bool = True,
) -> Tensor:
    """Greedy on plain Python lists."""
    return _in_three_steps(
        weight, topology, num_slots, num_groups, allow_shared_replicas, _replicate_lists, _pack_lists
    )


def greedy_numpy(
    weight: Tensor,
    topology: Topology,
    num_slots: int,
    *,
    num_groups: int | None = None,
    allow_shared_replicas: bool = True,
) -> Tensor:
    """Greedy on all layers at once: the only loops are over slots."""
    return _in_three_steps(
        weight, topology, num_slots, num_groups, allow_shared_replicas, _replicate_numpy, _pack_numpy
    )


def balanced_packing(weight: Tensor, topology: Topology, num_candidates: int) -> Tensor:
    """distplb's packing core by itself, with K candidates; without replicas and groups."""
    pack, rank = searched_packing(weight, topology.num_gpus, num_candidates=num_candidates)
    place = pack * topology.slots_per_gpu(weight.shape[1]) + rank
    return place.argsort(1)


def _in_three_steps(
    weight: Tensor,
    topology: Topology,
    num_slots: int,
    num_groups: int | None,
    allow_shared_replicas: bool,
    replicate: Replicate,
    pack: Pack,
) -> Tensor:
    """Steps 1 to 3, with two functions that do the work."""
    topology.slots_per_gpu(num_slots)
    layers, experts = weight.shape
    grouped = num_groups is not None and num_groups % topology.num_nodes == 0
    nodes, groups = (topology.num_nodes, num_groups) if grouped else (1, 1)
    gpus = topology.num_gpus // nodes
    apart = not allow_shared_replicas and num_slots > experts
    if apart and num_slots > experts * gpus:
        raise ValueError(f"{num_slots} slots: {experts} experts have at most {gpus} replicas each; pass fewer slots")
    weight = weight.double()
    group_at = pack(weight.unflatten(1, (groups, -1)).sum(2), None, nodes)  # [L, groups], node by node
    members = torch.arange(experts // groups)
    expert_at = (group_at[..., None] * len(members) + members).reshape(layers * nodes, -1)  # [X, E / nodes]
    of_node = weight.gather(1, expert_at.view(layers, -1)).view(layers * nodes, -1)  # [X, E / nodes]
    kind, replicas = replicate(of_node, num_slots // nodes, gpus if apart else num_slots)
    load = (of_node / replicas).gather(1, kind)  # [X, P / nodes]
    item_at = pack(load, kind if apart else None, gpus)
    return expert_at.gather(1, kind.gather(1, item_at)).view(layers, -1)


# --- replicas ---------------------------------------------------------------------------------------------------


def _replicate_torch(weight: Tensor, num_slots: int, most: int) -> tuple[Tensor, Tensor]:
    rows, experts = weight.shape
    row = torch.arange(rows)
    kind = torch.arange(num_slots).repeat(rows, 1)
    replicas = torch.ones(rows, experts, dtype=torch.int64)
    for slot in range(experts, num_slots):
        share = weight / replicas
        if most < num_slots:
            share[replicas >= most] = -1
        hottest = share.argmax(1)
        kind[:, slot] = hottest
        replicas[row, hottest] += 1
    return kind, replicas


def _replicate_lists(weight: Tensor, num_slots: int, most: int) -> tuple[Tensor, Tensor]:
    kinds, counts = [], []
    for of_expert in weight.tolist():
        share, replicas = list(of_expert), [1] * len(of_expert)
        kind = list(range(len(of_expert)))
        while len(kind) < num_slots:
            hottest = share.index(max(share))
            kind.append(hottest)
            replicas[hottest] += 1
            share[hottest] = of_expert[hottest] / replicas[hottest] if replicas[hottest] < most else -1.0
        kinds.append(kind)
        counts.append(replicas)
    return torch.tensor(kinds), torch.tensor(counts)


def _replicate_numpy(weight: Tensor, num_slots: int, most: int) -> tuple[Tensor, Tensor]:
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


def _pack_lists(load: Tensor, kind: Tensor | None, num_packs: int) -> Tensor:
    rows, items = load.shape
    if items == num_packs:
        return torch.arange(items).repeat(rows, 1)
    orders = load.sort(dim=1, descending=True, stable=True).indices.tolist()
    if kind is not None:
        rows_of_lists = zip(load.tolist(), kind.tolist(), orders, strict=True)
        return torch.tensor([_apart(*row, num_packs) for row in rows_of_lists]).flatten(1)
    size, packed = items // num_packs, []
    for of_item, order in zip(load.tolist(), orders, strict=True):
        pack_load = [0.0] * num_packs
        content = [[] for _ in range(num_packs)]
        for item in order:
            pack = min([p for p in range(num_packs) if len(content[p]) < size], key=pack_load.__getitem__)
            content[pack].append(item)
            pack_load[pack] += of_item[item]
        packed.append(content)
    return torch.tensor(packed).flatten(1)


def _pack_numpy(load: Tensor, kind: Tensor | None, num_packs: int) -> Tensor:
    rows, items = load.shape
    if items == num_packs:
        return torch.arange(items).repeat(rows, 1)
    size, of_item = items // num_packs, load.numpy()
    row = np.arange(rows)
    pack_load, filled = np.zeros((rows, num_packs)), np.zeros((rows, num_packs), dtype=np.int64)
    content = np.full((rows, num_packs, size), -1)
    kinds = None if kind is None else kind.numpy()
    num_kinds = 0 if kinds is None else kinds.max() + 1
    held = np.zeros((rows, num_packs, num_kinds), dtype=bool)  # which kinds a pack holds
    for item in np.argsort(-of_item, axis=1, kind="stable").T:  # [X]
        least = np.where(filled < size, pack_load, np.inf)  # [X, m]
        if kinds is not None:
            apart = np.where(held[row, :, kinds[row, item]], np.inf, least)
            for stuck in np.flatnonzero(np.isinf(apart.min(1))):
                light = least[stuck].argmin()
                item[stuck] = _exchange_numpy(of_item, kinds, content, held, pack_load, stuck, light, item[stuck])
                apart[stuck, light] = 0
            least = apart
            held[row, least.argmin(1), kinds[row, item]] = True
        pack = least.argmin(1)
        content[row, pack, filled[row, pack]] = item
        pack_load[row, pack] += of_item[row, item]
        filled[row, pack] += 1
    return torch.from_numpy(content).flatten(1)


# --- replicas of one expert on different GPUs -------------------------------------------------------------------


def _apart(load: list[float] | Tensor, kind: list[int], order: list[int] | Tensor, num_packs: int) -> list[list[int]]:
    """The items of each pack, for one row, where items of one kind do not share a pack.

    Each item goes to the lightest pack that is not full and does not hold its kind. If all that are not full hold it,
    a placed item goes to the lightest of them and leaves its place to the new one: that of nearest load, among those
    whose pack does not hold the new one's kind and whose own kind the lightest pack does not hold.
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
    load: list[float] | Tensor,
    kind: list[int],
    content: list[list[int]],
    held: list[set[int]],
    pack_load: list[float],
    light: int,
    item: int,
) -> int:
    """Put the item in the place of another, which is returned: it is to go to the pack `light`."""
    others = (
        (abs(load[other] - load[item]), pack, place)
        for pack, inside in enumerate(content)
        if kind[item] not in held[pack]
        for place, other in enumerate(inside)
        if kind[other] not in held[light]
    )
    _, pack, place = min(others)  # the first in flat (pack, place) order of equals
    other, content[pack][place] = content[pack][place], item
    held[pack] ^= {kind[other], kind[item]}
    pack_load[pack] = pack_load[pack] - load[other] + load[item]  # in this order everywhere: floats
    return other


def _exchange_numpy(
    of_item: np.ndarray,  # [X, n]
    kinds: np.ndarray,  # [X, n]
    content: np.ndarray,  # [X, m, places], -1 where empty
    held: np.ndarray,  # [X, m, kinds]
    pack_load: np.ndarray,  # [X, m]
    row: int,
    light: int,
    item: int,
) -> int:
    """The same for one of the rows that are packed together."""
    inside, kind = content[row], kinds[row]  # [m, size], [n]
    possible = (inside >= 0) & ~held[row, :, kind[item], None] & ~held[row, light, kind[inside]]
    difference = np.where(possible, abs(of_item[row, inside] - of_item[row, item]), np.inf)
    pack, place = np.unravel_index(difference.argmin(), difference.shape)
    other, inside[pack, place] = inside[pack, place], item
    held[row, pack, kind[[other, item]]] = [False, True]
    pack_load[row, pack] = pack_load[row, pack] - of_item[row, other] + of_item[row, item]
    return other
