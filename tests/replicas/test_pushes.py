"""What each GPU sends and receives, against a plain double loop; and the memory that replicas share.

Shapes: M GPUs, G own and R replica slots on each GPU.
"""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from distplb.replicas.buffer import Buffer
from distplb.replicas.pushes import Copy, Pushes


def drawn(seed: int) -> tuple[Tensor, int]:
    """`[M, R]` with at most one replica of an expert on a GPU, none at home; and G."""
    rng = random.Random(seed)
    gpus, own, slots = rng.randint(2, 6), rng.randint(1, 4), rng.randint(1, 3)
    hot = rng.sample(range(gpus * own), rng.randint(1, gpus * own))
    rows = []
    for gpu in range(gpus):
        away = [expert for expert in hot if expert // own != gpu]
        held = rng.sample(away, min(len(away), rng.randint(0, slots)))
        rows.append(held + [-1] * (slots - len(held)))
    return torch.tensor(rows), own


@pytest.mark.parametrize("seed", range(30))
def test_both_ends_of_each_replica_agree(seed: int) -> None:
    replica, own = drawn(seed)
    gpus, slots = replica.shape
    parts = [Pushes.of(replica, own, gpu) for gpu in range(gpus)]
    for home in range(gpus):
        copies = [
            (int(replica[holder, slot]) - home * own, slot, holder)
            for holder in range(gpus)
            for slot in range(slots)
            if replica[holder, slot] >= 0 and int(replica[holder, slot]) // own == home
        ]
        assert parts[home].sends == tuple(Copy(*one, nth) for nth, one in enumerate(copies))
        for holder in range(gpus):
            to = [(one.own, one.slot, one.nth) for one in parts[home].sends if one.peer == holder]
            at = [(one.own, one.slot, one.nth) for one in parts[holder].receives if one.peer == home]
            assert to == at  # in this order: messages of two ranks go in order
    most = max(len(part.sends) for part in parts)
    assert {part.num_rounds for part in parts} == {-(-most // slots)}
    assert sum(len(part.receives) for part in parts) == int(replica.ge(0).sum())


def test_without_replicas_there_is_nothing_to_do() -> None:
    assert Pushes.of(torch.full((3, 2), -1), 2, 1) == Pushes((), (), 0)


def test_the_buffer_is_as_large_as_the_largest_layer() -> None:
    buffer = Buffer()
    small = [torch.zeros(4, 3, dtype=torch.bfloat16), torch.zeros(4, 5, 2)]
    large = [torch.zeros(4, 100)]
    first = buffer.rows(2, small)
    assert [(one.shape, one.dtype) for one in first] == [((2, 3), torch.bfloat16), ((2, 5, 2), torch.float32)]
    assert buffer.num_bytes == 512  # each tensor begins at a multiple of 256 bytes
    for one in first:
        one.fill_(7)
    grown = buffer.rows(2, large)
    assert buffer.num_bytes == 1024
    grown[0].fill_(1)
    assert all(bool(one.eq(7).all()) for one in first)  # what was handed out keeps its own memory
    for _ in range(5):
        for like in (small, large):
            buffer.rows(2, like)
    assert buffer.num_bytes == 1024


def test_tensors_do_not_overlap_and_filling_one_again_is_not_noticed() -> None:
    buffer = Buffer()
    like = [torch.zeros(1, 3, dtype=dtype) for dtype in (torch.bfloat16, torch.float64, torch.float32)]
    rows = buffer.rows(3, like)
    for number, one in enumerate(rows):
        one.fill_(number)
    assert [one.unique().tolist() for one in rows] == [[0], [1], [2]]
    weight = Buffer.alias(rows[1]).requires_grad_()
    out = weight.square().sum()
    rows[1].fill_(5)  # pushed again
    out.backward()
    assert weight.grad is not None
    assert weight.grad.unique().tolist() == [10.0]


def test_no_rows() -> None:
    assert Buffer().rows(2, []) == []
    assert [one.shape for one in Buffer().rows(0, [torch.zeros(4, 3)])] == [(0, 3)]
