"""Slots of tokens, against a loop over tokens.

Shapes: N tokens of a rank, K experts of each token, P slots, M ranks, G own and R replica slots.
"""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from distplb import Topology
from distplb.replicas.tokens import own_slots, slots_of_tokens
from distplb.splitting.routes import exchange_of
from distplb.splitting.split import split


def one_by_one(ids: Tensor, send: Tensor, replica: Tensor) -> list[int]:
    """Each token goes to the first GPU, in rank order, that still expects tokens of its expert from here."""
    num_gpus, slots = send.shape
    num_own = slots - replica.shape[1]
    left = send.tolist()
    found = []
    for expert in ids.flatten().tolist():
        for gpu in range(num_gpus):
            held = [gpu * num_own + own for own in range(num_own)] + replica[gpu].tolist()
            slot = held.index(expert) if expert in held else -1
            if slot >= 0 and left[gpu][slot]:
                left[gpu][slot] -= 1
                found.append(gpu * slots + slot)
                break
        else:
            raise AssertionError(f"nobody expects a token of expert {expert}")
    assert not any(map(any, left))
    return found


@pytest.mark.parametrize("seed", range(40))
def test_each_token_goes_where_the_exchange_expects_it(seed: int) -> None:
    rng, gen = random.Random(seed), torch.Generator().manual_seed(seed)
    nodes, gpus = rng.choice([(1, 2), (1, 3), (1, 4), (2, 2), (2, 4)])
    topology, num_own, num_replicas = Topology(nodes, gpus), rng.randint(1, 4), rng.randint(1, 3)
    slots, k = topology.num_gpus * num_own, rng.randint(1, 2)
    popularity = torch.rand(slots, generator=gen) ** 4
    ids = []
    for _ in range(topology.num_gpus):
        tokens = rng.choice([0, 5, 40])
        ids.append((popularity.expand(tokens, -1) * torch.rand(tokens, slots, generator=gen)).topk(k, 1).indices)
    counts = torch.stack([one.flatten().bincount(minlength=slots) for one in ids])
    own = torch.arange(slots).view(-1, num_own)
    found = split(counts, torch.arange(slots) // num_own, topology=topology, replica_slots=num_replicas)
    arrive = torch.zeros(topology.num_gpus, num_own + num_replicas, dtype=torch.int64)
    for gpu, one in enumerate(ids):
        exchange = exchange_of(found, topology, gpu, own)
        slot = slots_of_tokens(one, exchange.send, found.replica)
        assert slot.shape == one.shape
        assert slot.dtype == torch.int64
        assert slot.flatten().tolist() == one_by_one(one, exchange.send, found.replica)
        if found.is_trivial:
            assert torch.equal(slot, own_slots(one, num_own, num_replicas))
        arrive += slot.flatten().bincount(minlength=arrive.numel()).view(arrive.shape)
    assert torch.equal(arrive.sum(1), found.load)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_ids_of_any_integer_dtype(dtype: torch.dtype) -> None:
    send, replica = torch.tensor([[1, 0], [1, 2]]), torch.tensor([[-1], [0]])
    ids = torch.tensor([[0, 1], [0, 0]], dtype=dtype)
    assert slots_of_tokens(ids, send, replica).tolist() == [[0, 2], [3, 3]]
    assert own_slots(ids, 1, 1).tolist() == [[0, 2], [0, 0]]
