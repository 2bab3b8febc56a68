"""Differences between equally likely experts are recognised as chance, and no other differences are.

Shapes: T steps, L layers, E experts, M GPUs.
"""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch import Tensor

from distplb import Placement, Topology, plan
from distplb.core.price import moved_slots
from distplb.planning.chance import even_by_chance


def drawn(seed: int, steps: int, layers: int, experts: int, tokens: float, popular: Tensor | None = None) -> Tensor:
    """`[T, L, E]`: on average `tokens` per step and expert, drawn independently."""
    mean = torch.full((layers, experts), tokens) * (1.0 if popular is None else popular)
    return torch.poisson(mean.expand(steps, -1, -1), generator=torch.Generator().manual_seed(seed)).long()


def shuffled(seed: int, layers: int, experts: int, gpus: int) -> Placement:
    random_ = random.Random(seed)
    return Placement(torch.tensor([random_.sample(range(experts), experts) for _ in range(layers)]), experts, gpus)


def plain(load: Tensor, placement: Placement) -> list[bool]:
    """The same in floats, layer by layer."""
    is_even_by_layer, size, gpus = [], placement.slots_per_gpu, placement.num_gpus
    for layer, table in enumerate(placement.expert_of_slot.tolist()):
        steps = load[:, layer].tolist()
        of_gpu = [[sum(row[e] for e in table[at : at + size]) for at in range(0, len(table), size)] for row in steps]
        whole = [sum(column) for column in zip(*of_gpu, strict=True)]
        is_even = True
        for rows in (of_gpu, [whole]):
            totals = [sum(row) for row in rows]
            squares = sum((tokens - sum(row) / gpus) ** 2 for row in rows for tokens in row)
            weight = sum(total**2 for total in totals) / max(1, sum(totals))  # of the mean token's step
            freedom = (gpus - 1) * int(sum(totals) ** 2 / max(1, sum(total**2 for total in totals)))
            limit = freedom + 6 * math.isqrt(freedom) + 18 + 3 * (gpus - 1)
            is_even &= squares <= limit * weight / gpus
        is_even_by_layer.append(is_even)
    return is_even_by_layer


@pytest.mark.parametrize("steps", [1, 3, 20])
@pytest.mark.parametrize("gpus", [1, 2, 6])
def test_the_rule_is_pearsons_sum_in_plain_python(gpus: int, steps: int) -> None:
    """Near the limit: popularities differ by a few standard deviations of a window's tokens."""
    layers, experts, is_even = 40, 12, []
    for tokens in (3.0, 200.0, 5000.0):
        generator = torch.Generator().manual_seed(steps)
        noise = torch.randn(layers, experts, generator=generator) * torch.linspace(0, 9, layers)[:, None]
        popular = (1 + noise / (tokens * steps) ** 0.5).clamp(min=0)
        load = drawn(gpus, steps, layers, experts, tokens, popular)
        load[: steps // 2] //= 3  # steps with unequal totals
        placement = shuffled(gpus, layers, experts, gpus)
        is_even += even_by_chance(load, placement).tolist()
        assert is_even[-layers:] == plain(load, placement)
    assert all(is_even) if gpus == 1 else 10 < sum(is_even) < 3 * layers - 10


@pytest.mark.parametrize("gpus", [2, 8, 64])
def test_what_chance_makes_of_equally_likely_experts_is_even(gpus: int) -> None:
    for steps, tokens in ((1, 16.0), (4, 2000.0), (32, 4.0), (64, 100.0)):
        load = drawn(gpus, steps, 200, 2 * gpus, tokens)
        assert even_by_chance(load, shuffled(1, 200, 2 * gpus, gpus)).all()


@pytest.mark.parametrize(("gpus", "experts"), [(8, 64), (8, 256), (32, 64)])
def test_a_search_finds_moves_in_an_even_load_and_none_is_worth_it(gpus: int, experts: int) -> None:
    """Each rebalance moved up to half of the slots, and later steps were as uneven as before."""
    placement, topology = Placement.contiguous(4, experts, gpus), Topology(1, gpus)
    for seed in range(3):
        load = drawn(seed, 8, 4, experts, 2048 * gpus / experts)
        planned = plan(load, topology, current=placement, move_price=8 * 2048 * 2.0**-13, num_candidates=4)
        assert moved_slots(placement, planned, topology).sum(1).min() > 4
        assert even_by_chance(load, placement).all()


def test_what_differs_for_good_and_what_differs_from_step_to_step_is_not_even() -> None:
    gpus, experts, steps = 8, 64, 32
    placement = Placement.contiguous(4, experts, gpus)
    popular = torch.ones(4, experts)
    popular[1, :8] = 1.04  # one GPU has 4 % more in every step, of 4,096 tokens: two standard deviations of a step
    load = drawn(3, steps, 4, experts, 512.0, popular)
    # In every eighth step, a GPU gets half as much again, so that all have the same after eight steps.
    for step in range(steps):
        at = step % gpus * 8
        load[step, 2, at : at + 8] = load[step, 2, at : at + 8] * 3 // 2
    assert even_by_chance(load, placement).tolist() == [True, False, False, True]


def test_a_plan_has_the_chance_of_its_own_window_in_it() -> None:
    """A plan evens out experts that differ; on the next window, it is as even as chance allows."""
    gpus, experts = 8, 64
    popular = torch.randn(8, experts, generator=torch.Generator().manual_seed(0)).mul(0.7).exp().clamp(max=2)
    current, topology = Placement.contiguous(8, experts, gpus), Topology(1, gpus)
    first, second = (drawn(seed, 32, 8, experts, 512.0, popular) for seed in (1, 2))
    assert not even_by_chance(first, current).any()
    price = int(first.sum()) / 8 / gpus * 2.0**-13
    planned = plan(first, topology, current=current, move_price=price, num_candidates=8)
    assert even_by_chance(second, planned).all()


def test_counts_of_any_size_are_judged_exactly() -> None:
    placement = Placement.contiguous(4, 4, 2)
    even, uneven = [2**37 + 10**5, 2**37, 2**37, 2**37 - 10**5], [2**37 + 10**7, 2**37, 2**37, 2**37]
    load = torch.tensor([[even, uneven, [0] * 4, [1, 0, 0, 0]]])
    assert even_by_chance(load, placement).tolist() == [True, False, True, True]
    assert even_by_chance(load[:, :3] * 2**9, Placement.contiguous(3, 4, 2)).tolist() == [True, False, True]


def test_steps_without_tokens_are_none() -> None:
    load = drawn(5, 8, 6, 32, 64.0, torch.ones(6, 32))
    load[:, 3, :4] *= 4
    placement = Placement.contiguous(6, 32, 8)
    padded = torch.cat([load[:3], torch.zeros_like(load), load[3:]])
    assert even_by_chance(padded, placement).tolist() == even_by_chance(load, placement).tolist()
    assert even_by_chance(load, placement).tolist() == [True, True, True, False, True, True]


@pytest.mark.parametrize("factor", [1, 10**6])
def test_few_tokens_of_replicas_are_not_lost(factor: int) -> None:
    """Shares were whole tokens, so one token of two replicas was on no GPU, and even GPUs looked far from even."""
    halves = Placement(torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7] * 2]), 8, 4)
    load = torch.ones(200, 1, 8, dtype=torch.int64) * factor
    assert even_by_chance(load, halves).tolist() == [True]
    load[:, :, :4] *= 9  # GPUs 0 and 2 then have nine times as much as 1 and 3
    assert even_by_chance(load, halves).tolist() == [False]
