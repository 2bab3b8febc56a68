"""How bench_loss_curves judges whether the rebalanced run stands out among the static ones."""

from __future__ import annotations

import numpy as np
import torch
from benchmark_modules import imported

bench_loss_curves = imported("train.bench_loss_curves")


def test_a_curve_that_lies_apart_is_told_from_those_that_do_not() -> None:
    """With three seeds of four runs, a given run is furthest off every time with probability 1/4^3."""
    curves = np.random.default_rng(0).normal(size=(3, 4, 50))
    curves[:, 3] += 10
    odd = bench_loss_curves.oddness(curves)
    assert (odd.argmax(1) == 3).all()
    assert bench_loss_curves.chance(odd, 3) == 1 / 64
    assert bench_loss_curves.chance(odd, int(odd[:, :3].sum(0).argmin())) > 0.5


def test_a_curve_like_the_others_is_called_odd_as_rarely_as_chance_says() -> None:
    curves = np.random.default_rng(1).normal(size=(400, 3, 4, 5))
    called = np.mean([bench_loss_curves.chance(bench_loss_curves.oddness(one), 3) <= 0.05 for one in curves])
    assert called < 0.09  # at most 0.05 expected


def test_smoothed_curves_are_moving_means() -> None:
    losses = np.random.default_rng(2).normal(size=(2, bench_loss_curves.SMOOTH + 3))
    means = bench_loss_curves.smoothed(losses)
    assert means.shape == (2, 4)
    np.testing.assert_allclose(means[:, 3], losses[:, 3:].mean(1))


def test_other_orders_hold_the_same_sequences_and_other_ranks_get_some() -> None:
    crops = torch.arange(2 * bench_loss_curves.BATCH)[:, None]
    orders = [order(crops).flatten().tolist() for order in bench_loss_curves.STATIC.values()]
    assert all(sorted(order) == crops.flatten().tolist() for order in orders)
    assert len(set(map(tuple, orders))) == len(orders)
    halves = [set(order[: bench_loss_curves.BATCH]) for order in orders]
    assert halves[0] == halves[1] != halves[2]
