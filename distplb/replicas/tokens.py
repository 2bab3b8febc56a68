"""Which physical slot each token goes to, from the split alone.

GPU m has G own slots and R replica slots: physical slot `m * (G + R) + g` is its own slot g, `m * (G + R) + G + r` its
replica slot r.

Shapes: N tokens of this rank, K experts of each token, P slots, M GPUs, G own and R replica slots of each GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distplb.splitting.rules import EMPTY

__all__ = ["own_slots", "slots_of_tokens"]


def own_slots(expert_of_token: Tensor, num_own: int, num_replicas: int) -> Tensor:
    """`[N, K]` int64, the physical slots of tokens that are all computed at home.

    >>> own_slots(torch.tensor([[0, 3]]), num_own=2, num_replicas=1)
    tensor([[0, 4]])

    Args:
        expert_of_token: `[N, K]`, the slot of each token's experts.
        num_own: G.
        num_replicas: R.
    """
    ids = expert_of_token.to(torch.int64)
    return ids + ids.div(num_own, rounding_mode="floor") * num_replicas


def slots_of_tokens(expert_of_token: Tensor, send: Tensor, replica: Tensor) -> Tensor:
    """`[N, K]` int64, the physical slot of each token: the first tokens of an expert go to its first holder, and so on.

    Three tokens of slot 0, of which GPU 0 computes one and GPU 1, in its replica slot, two:

    >>> send, replica = torch.tensor([[1, 0], [0, 2]]), torch.tensor([[-1], [0]])
    >>> slots_of_tokens(torch.tensor([[0], [0], [0]]), send, replica).flatten()
    tensor([0, 3, 3])

    Args:
        expert_of_token: `[N, K]`, the slot of each token's experts.
        send: `[M, G + R]` on the host, how many tokens go to each physical slot.
        replica: `[M, R]` on the host, the slot whose expert each replica slot holds; -1 for none.
    """
    num_gpus, num_replicas = replica.shape
    num_own = send.shape[1] - num_replicas
    own = torch.arange(num_gpus * num_own, device="cpu").view(num_gpus, num_own)
    held = torch.cat([own, replica], 1).flatten()  # [M * (G + R)], what each physical slot holds
    used = (held != EMPTY).nonzero().flatten()
    by_expert = used[held[used].argsort(stable=True)]  # holders of each expert in the order of GPUs
    device, ids = expert_of_token.device, expert_of_token.flatten()
    physical, tokens = (values.to(device) for values in (by_expert, send.flatten()[by_expert]))
    order = ids.argsort(stable=True)
    return (
        torch.empty_like(order)
        .scatter_(0, order, physical.repeat_interleave(tokens, output_size=len(order)))
        .view(expert_of_token.shape)
    )
