"""Which source sends which tokens of a split where, from counts alone: no GPU has to ask another one.

Of each expert, a GPU first keeps its own tokens, then computes those of its node, then those of other nodes, each in
the order of ranks. No other assignment for the same quotas sends fewer tokens to another GPU or to another node.

`routes` is the specification, for all sources at once. `exchange_of` is one GPU's part of it, by physical slots and
fast enough for a training step.

Shapes: E experts, M GPUs, N nodes of D GPUs, G own slots and R replica slots on each GPU; K experts with replicas.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from distplb.core.arguments import refuse_wrong_types, whole_number
from distplb.core.machine_code import compile_lock, compiled_module
from distplb.core.topology import Topology
from distplb.errors import DistplbError
from distplb.splitting import reference
from distplb.splitting.engines import engine_named
from distplb.splitting.rules import EMPTY
from distplb.splitting.split_value import Split

__all__ = ["Exchange", "exchange_of", "routes"]

_KERNELS = "distplb.splitting.cpu_routes"


def routes(split: Split, topology: Topology) -> Tensor:
    """`[M, E, M]` int64: the tokens that each source (first dim) sends of each expert to each GPU (last dim).

    A source's tokens of an expert go to the GPUs in order: its first tokens to the first GPU that gets any.

    >>> split = Split(
    ...     counts=torch.tensor([[6, 1], [4, 1]]),
    ...     home=torch.tensor([0, 1]),
    ...     quota=torch.tensor([[6, 4], [0, 2]]),
    ...     replica=torch.tensor([[-1], [0]]),
    ... )
    >>> routes(split, Topology(num_nodes=1, gpus_per_node=2)).tolist()  # only one token crosses, of expert 1
    [[[6, 0], [0, 1]], [[0, 4], [0, 1]]]

    Args:
        split: the quotas.
        topology: nodes and GPUs.

    Raises:
        DistplbError: if the topology has another number of GPUs.
    """
    _refuse_topology(split, topology)
    num_gpus, num_experts = split.counts.shape
    flow = torch.zeros(num_gpus, num_experts, num_gpus, dtype=torch.int64, device="cpu")
    flow[:, torch.arange(num_experts, device="cpu"), split.home] = split.counts
    expert = split.replica[split.replica != EMPTY].unique()  # [K]; all others are computed at home
    routed, quota = split.counts.T[expert], split.quota[expert]  # [K, M] each
    flow_of_expert = torch.zeros(len(expert), num_gpus, num_gpus, dtype=torch.int64, device="cpu")
    for size in sorted({1, topology.gpus_per_node, num_gpus}):  # on a GPU, within nodes, then across
        blocks = len(expert), num_gpus // size, size
        parts = _in_order(routed.reshape(blocks), quota.reshape(blocks))  # [K, blocks, size, size]
        own = flow_of_expert.view(*blocks, *blocks[1:]).diagonal(dim1=1, dim2=3)  # from each block to itself
        own += parts.permute(0, 2, 3, 1)
        routed, quota = routed - parts.sum(3).flatten(1), quota - parts.sum(2).flatten(1)
    flow[:, expert] = flow_of_expert.transpose(0, 1)
    return flow


def _in_order(tokens: Tensor, room: Tensor) -> Tensor:
    """`[..., D, D]`: tokens `[..., D]` put into room `[..., D]`, both in order, until either is used up."""
    token_end, room_end = tokens.cumsum(-1).unsqueeze(-1), room.cumsum(-1).unsqueeze(-2)
    begin = torch.maximum(token_end - tokens.unsqueeze(-1), room_end - room.unsqueeze(-2))
    return (torch.minimum(token_end, room_end) - begin).clamp_(min=0)


@dataclass(frozen=True, eq=False)
class Exchange:
    """What one GPU sends and receives in the dispatch of one step, by physical slots: G own ones, then R for replicas.

    A GPU sorts its tokens by destination and physical slot, which is the order of `send`; within a slot they keep
    their order. They arrive sorted by source and physical slot, the order of `receive`. In the combine the two change
    places.

    >>> exchange = Exchange(send=torch.tensor([[0, 0], [1, 4]]), receive=torch.tensor([[1, 0], [1, 4]]))
    >>> exchange.send_sizes, exchange.receive_sizes, exchange.tokens_of_slot
    ([0, 5], [1, 5], [2, 4])

    Args:
        send: `[M, G + R]` int64, the tokens that this GPU sends to each physical slot of each GPU.
        receive: `[M, G + R]` int64, the tokens that each GPU sends to each physical slot of this one.
    """

    send: Tensor
    receive: Tensor

    @property
    def send_sizes(self) -> list[int]:
        """M numbers: the tokens that this GPU sends to each GPU."""
        return _plain(self.send.sum(1))

    @property
    def receive_sizes(self) -> list[int]:
        """M numbers: the tokens that each GPU sends to this one."""
        return _plain(self.receive.sum(1))

    @property
    def tokens_of_slot(self) -> list[int]:
        """G + R numbers: the tokens that each physical slot of this GPU computes."""
        return _plain(self.receive.sum(0))


def exchange_of(
    split: Split, topology: Topology, gpu: int, slot_expert: Tensor, *, engine: str | None = None
) -> Exchange:
    """One GPU's part of `routes`, by physical slots.

    The exchanges of all GPUs fit each other: what one sends to another is what the other receives from it.

    >>> split = Split(
    ...     counts=torch.tensor([[6, 1], [4, 1]]),
    ...     home=torch.tensor([0, 1]),
    ...     quota=torch.tensor([[6, 4], [0, 2]]),
    ...     replica=torch.tensor([[-1], [0]]),
    ... )
    >>> two = Topology(num_nodes=1, gpus_per_node=2)
    >>> exchange = exchange_of(split, two, gpu=1, slot_expert=torch.tensor([[0], [1]]))
    >>> exchange.send.tolist(), exchange.receive.tolist()  # it keeps 4 tokens of expert 0, in its replica slot
    ([[0, 0], [1, 4]], [[1, 0], [1, 4]])

    Args:
        split: the counts, quotas and replicas.
        topology: nodes and GPUs.
        gpu: the GPU whose part it is, in [0, M).
        slot_expert: `[M, G]` int64, the expert in each own slot of each GPU; -1 for an empty slot, if GPUs own
            different numbers of experts.
        engine: "reference" or "cpu"; None for the faster one that is available. They agree exactly.

    Raises:
        DistplbError: if the topology or the GPU is not of this split, or an expert is not in exactly one own slot, on
            its home.
    """
    _refuse_topology(split, topology)
    gpu = _checked_gpu(split, gpu)
    _refuse_table(split, slot_expert)
    if engine_named(engine) is reference:
        _refuse_slots(split, slot_expert)
        return _gathered(split, topology, gpu, slot_expert)
    _warm_up()
    exchange = _compiled(split, topology, gpu, slot_expert)
    if exchange is None:
        _refuse_slots(split, slot_expert)
        raise AssertionError("own slots that do not fit the homes were not refused")
    return exchange


def _gathered(split: Split, topology: Topology, gpu: int, slot_expert: Tensor) -> Exchange:
    """The specification: `routes`, read at the physical slots."""
    expert = torch.cat([slot_expert, split.replica], 1)  # [M, G + R]
    flow, is_used = routes(split, topology), expert != EMPTY
    every = torch.arange(len(expert), device="cpu").unsqueeze(1)  # [M, 1]
    return Exchange(flow[gpu, expert, every] * is_used, flow[every, expert[gpu], gpu] * is_used[gpu])


def _compiled(split: Split, topology: Topology, gpu: int, slot_expert: Tensor) -> Exchange | None:
    """The same without the routes of all others; None if own slots do not fit the homes."""
    sizes = len(slot_expert), slot_expert.shape[1] + split.replica.shape[1]
    send, receive = np.zeros(sizes, np.int64), np.zeros(sizes, np.int64)
    tensors = split.counts, split.home, split.quota, split.replica, slot_expert
    arrays = [tensor.contiguous().numpy() for tensor in tensors]  # Numba would compile again for other strides
    fits = compiled_module(_KERNELS).exchange(*arrays, send, receive, topology.gpus_per_node, gpu)
    return Exchange(torch.from_numpy(send), torch.from_numpy(receive)) if fits else None


@cache
def _warm_up() -> None:
    """Compile the kernel, or load what another process on this node compiled. Once per process."""
    zero = torch.zeros(1, 1, dtype=torch.int64, device="cpu")
    split = Split(counts=zero, home=zero[0], quota=zero, replica=zero + EMPTY)
    with compile_lock(_KERNELS):
        _compiled(split, Topology(1, 1), 0, zero)


def _plain(numbers: Tensor) -> list[int]:
    plain: list[int] = numbers.tolist()
    return plain


def _refuse_topology(split: Split, topology: Topology) -> None:
    if topology.num_gpus != len(split.counts):
        raise DistplbError(
            f"the split has {len(split.counts)} GPUs, the topology {topology.num_gpus}; pass the split's topology"
        )


def _checked_gpu(split: Split, gpu: int) -> int:
    number, num_gpus = whole_number("gpu", gpu), len(split.counts)
    if not 0 <= number < num_gpus:
        raise DistplbError(f"gpu is {number}; pass a GPU of the split, in [0, {num_gpus})")
    return number


def _refuse_table(split: Split, slot_expert: Tensor) -> None:
    """Check that it is `[M, G]` int64 on the CPU."""
    refuse_wrong_types({"slot_expert": (slot_expert, (Tensor,), "a tensor of int64")})
    shape, num_gpus = list(slot_expert.shape), len(split.counts)
    if slot_expert.dtype != torch.int64 or len(shape) != 2 or shape[0] != num_gpus or not slot_expert.is_cpu:
        raise DistplbError(
            f"slot_expert is {slot_expert.dtype} of shape {shape} on {slot_expert.device}; pass int64 of shape "
            f"[{num_gpus}, own slots] on the CPU"
        )


def _refuse_slots(split: Split, slot_expert: Tensor) -> None:
    """Check that each expert is in exactly one own slot, on its home."""
    home = split.home.tolist()
    found: list[list[int]] = [[] for _ in home]  # the GPUs of each expert's own slots
    for gpu, experts in enumerate(slot_expert.tolist()):
        for expert in experts:
            if not EMPTY <= expert < len(home):
                raise DistplbError(f"slot_expert has {expert}; pass an expert in [0, {len(home)}), or {EMPTY} for none")
            if expert != EMPTY:
                found[expert].append(gpu)
    for expert, gpus in enumerate(found):
        if gpus != [home[expert]]:
            raise DistplbError(
                f"slot_expert has expert {expert} on GPUs {gpus[:8]}; pass it once, on its home, GPU {home[expert]}"
            )
