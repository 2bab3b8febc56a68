"""Where candidates start: with other replica counts than those in force, and under different ceilings.

Shapes: X rows, E experts, P slots, M GPUs, G slots on each GPU.
"""

from __future__ import annotations

import random
from collections import Counter

import pytest
import torch
from torch import Tensor

from distplb.core.hashing import hashed
from distplb.packing.noise import ceilings
from distplb.planning.warm_start import reassign_replicas

# (E, P, M, regions)
SHAPES = [(6, 12, 3, 1), (5, 20, 4, 1), (8, 12, 4, 2), (16, 24, 4, 1), (16, 32, 8, 4), (3, 10, 5, 1), (8, 8, 2, 1)]


def in_regions(random_: random.Random, num_experts: int, num_slots: int, regions: int) -> list[int]:
    """`[P]`: every expert, with all its replicas in one region."""
    row, experts, size = [], random_.sample(range(num_experts), num_experts), num_slots // regions
    for region in range(regions):
        own = experts[region::regions]
        row += random_.sample([*own, *random_.choices(own, k=size - len(own))], size)
    return row


def rows_of_weights(random_: random.Random, num_experts: int, rows: int) -> list[list[int]]:
    """Skewed, with ties, zeros, and none."""
    draws = [
        lambda: int(random_.lognormvariate(8, 1.5)),
        lambda: random_.randrange(4),
        lambda: random_.choice([0, 0, random_.randrange(2**36)]),
        lambda: 0,
    ]
    return [[draws[row % 9 % 4]() for _ in range(num_experts)] for row in range(rows)]


def plain_reassigned(weight: list[int], table: list[int], region: list[int], num_gpus: int) -> list[int]:
    """One row, one replica at a time, written from the docstring."""
    table, size = list(table), len(table) // num_gpus
    home = {expert: region[slot] for slot, expert in enumerate(table)}
    for _ in range(len(table) - len(weight)):
        count = Counter(table)
        share = {expert: weight[expert] // count[expert] for expert in count}
        taker = max(sorted(share), key=lambda expert: share[expert])
        givers = [expert for expert in sorted(count) if count[expert] > 1 and home[expert] == home[taker]]
        if not givers:
            break
        giver = min(givers, key=lambda expert: weight[expert] // (count[expert] - 1))
        after = weight[giver] // (count[giver] - 1)
        if share[taker] <= after or share[taker] - after <= after >> 4:
            break
        gpus = [table[at : at + size] for at in range(0, len(table), size)]
        slots = [slot for slot, expert in enumerate(table) if expert == giver and taker not in gpus[slot // size]]
        if not slots:
            break
        slot = min(slots, key=lambda slot: (sum(share[expert] for expert in gpus[slot // size]), slot))
        table[slot] = taker
    return table


@pytest.mark.parametrize("shape", SHAPES)
def test_replicas_go_from_those_that_need_them_least_to_those_that_need_them_most(shape: tuple[int, ...]) -> None:
    num_experts, num_slots, num_gpus, regions = shape
    random_ = random.Random(f"{shape}")
    weight = rows_of_weights(random_, num_experts, 45)
    table = [in_regions(random_, num_experts, num_slots, regions) for _ in weight]
    region = torch.arange(regions).repeat_interleave(num_slots // regions)
    start = torch.tensor(table)
    reassigned = reassign_replicas(torch.tensor(weight), start, region, num_gpus)
    assert start.tolist() == table
    expected = [plain_reassigned(w, row, region.tolist(), num_gpus) for w, row in zip(weight, table, strict=True)]
    assert reassigned.tolist() == expected
    assert (expected != table) == (num_slots > num_experts)
    for row, before in zip(reassigned.tolist(), table, strict=True):
        assert set(row) == set(range(num_experts))
        homes = {(expert, region[slot].item()) for slot, expert in enumerate(row)}
        assert homes == {(expert, region[slot].item()) for slot, expert in enumerate(before)}


def test_the_largest_share_is_never_larger_afterwards_and_far_smaller_where_loads_have_shifted() -> None:
    """Measured: 0.48 of it on average."""
    random_ = random.Random(3)
    weight = torch.tensor([[int(random_.lognormvariate(8, 1.2)) for _ in range(16)] for _ in range(200)])
    table = torch.tensor([in_regions(random_, 16, 32, 1) for _ in range(200)])
    reassigned = reassign_replicas(weight, table, torch.zeros(32, dtype=torch.int64), 4)

    def largest_share(table: Tensor) -> Tensor:
        count = torch.zeros_like(weight).scatter_add_(1, table, torch.ones_like(table))
        return (weight // count).amax(1).double()

    before, after = largest_share(table), largest_share(reassigned)
    assert (after <= before).all()
    assert float((after / before).mean()) < 0.52


def test_counts_that_fit_stay_as_they_are() -> None:
    """A replica is worth moving only if shares are a sixteenth apart."""
    region = torch.zeros(8, dtype=torch.int64)
    table = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])

    def alone(weight: list[int]) -> list[int]:
        return reassign_replicas(torch.tensor([weight]), table, region, 4)[0].tolist()

    assert alone([100, 100, 100, 100]) == table[0].tolist()
    # The taker's share is 106, and the giver's would be 100 afterwards; then 107.
    assert alone([212, 200, 200, 100]) == table[0].tolist()
    assert alone([214, 200, 200, 100]) == [0, 1, 2, 0, 0, 1, 2, 3]


def test_the_first_two_candidates_begin_under_an_eighth_and_the_others_anywhere_from_a_32nd_to_a_quarter() -> None:
    layer = torch.arange(500).repeat_interleave(6)
    candidate = torch.arange(6).repeat(500)
    ceiling = ceilings(layer=layer, candidate=candidate, seed=2**40 + 3)
    assert ceiling.dtype == torch.int64
    assert (ceiling[candidate < 2] == 2**13).all()
    assert 2**11 <= ceiling.min() < 2**11 + 100
    assert 2**14 - 100 < ceiling.max() < 2**14
    others = ceiling[candidate >= 2].double()
    assert abs(float(others.mean()) - 9 * 2**10) < 200
    bits = hashed(torch.zeros(1, dtype=torch.int64), 2**40 + 3, 2**8, torch.tensor([7]), torch.tensor([4]))
    assert int(ceiling[(layer == 7) & (candidate == 4)]) == 2**11 + (7 * 2**11 * int(bits) >> 32)
    # Determined by layer, candidate and seed alone, whatever the other rows.
    order = torch.randperm(3000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(ceilings(layer=layer[order], candidate=candidate[order], seed=2**40 + 3), ceiling[order])
    other = ceilings(layer=layer, candidate=candidate, seed=3)
    assert (other != ceiling)[candidate >= 2].double().mean() > 0.99
