"""The model of bench_scaling.py on made data, what is read from marks of ranks, and how bench_same.py judges curves."""

from __future__ import annotations

import doctest
from types import ModuleType

import numpy as np
import pytest
import torch
from benchmark_modules import imported

model, turns, same = imported("scaling_model"), imported("scaling_turns"), imported("bench_same")

RANKS, BYTES = (2, 3, 4, 6, 8), (300, 20_000, 4_000_000)
TRUTH = np.array([40e-6, 25e-6, 60e-6, 1 / 2e9])  # seconds a call, a message in a ring and in a tree, a byte


def made(truth: np.ndarray, rows: np.ndarray, noise: float, number: int, seed: int) -> list[np.ndarray]:
    """Turns of each cell, around what the model says; some are late, none is early."""
    generator = np.random.default_rng(seed)
    return [seconds * generator.lognormal(0, noise, number) for seconds in rows @ truth]


def collective_rows(cores: float = 2) -> np.ndarray:
    kinds = ("sum", "broadcast")
    return np.array(
        [model.collective_row(kind, size, ranks, cores) for kind in kinds for size in BYTES for ranks in RANKS]
    )


@pytest.mark.parametrize("module", [model, turns], ids=lambda module: module.__name__)
def test_examples_print_what_they_say(module: ModuleType) -> None:
    found = doctest.testmod(module)
    assert found.attempted
    assert not found.failed


def test_known_parameters_are_found_exactly_where_nothing_is_noisy() -> None:
    rows = collective_rows()
    fit = model.fitted(rows, made(TRUTH, rows, 0.0, 3, 0), draws=5)
    np.testing.assert_allclose(fit.parameters, TRUTH, rtol=1e-9)
    np.testing.assert_allclose(fit.draws, np.tile(TRUTH, (5, 1)), rtol=1e-9)


def test_known_parameters_are_found_in_noise() -> None:
    rows = collective_rows()
    fit = model.fitted(rows, made(TRUTH, rows, 0.3, 25, 1), draws=5)
    np.testing.assert_allclose(fit.parameters, TRUTH, rtol=0.15)


def test_the_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    rows = collective_rows()
    at = [model.collective_row("sum", 4_000_000, 1024)]
    truth, held, widths = (at @ TRUTH)[0], 0, []
    for seed in range(60):
        _, draws = model.fitted(rows, made(TRUTH, rows, 0.3, 21, seed), draws=100, seed=seed).at(at)
        low, high = (end[0] for end in model.interval(draws))
        held += low <= truth <= high
        widths.append((high - low) / truth)
    assert held >= 51, held  # 57 expected
    assert np.median(widths) < 0.25  # and not because it holds everything


def test_a_narrower_interval_lies_inside() -> None:
    draws = np.random.default_rng(0).normal(size=(1000, 2))
    (low, high), (lower, higher) = model.interval(draws, 0.5), model.interval(draws)
    assert (lower < low).all()
    assert (high < higher).all()
    np.testing.assert_allclose(higher, 1.96, atol=0.25)


def test_no_parameter_is_negative() -> None:
    rows = np.array([[1.0, 1.0], [1.0, 2.0], [1.0, 3.0]])
    fit = model.fitted(rows, [[3.0], [2.0], [1.5]], draws=3)  # falls: the slope would be negative
    assert fit.parameters[1] == 0
    assert 1.5 < fit.parameters[0] < 3
    assert model.fitted(rows, [[1.0], [2.0], [3.0]], draws=3).parameters == pytest.approx([0, 1])


@pytest.mark.parametrize(
    ("candidates", "ranks", "most", "unmet"), [(64, 1, 64, 0), (64, 4, 16, 0.75), (10, 4, 3, 0.7), (3, 8, 1, 2 / 3)]
)
def test_candidates_of_the_slowest_rank_and_of_the_root(candidates: int, ranks: int, most: int, unmet: float) -> None:
    assert model.search_row(candidates, ranks) == [1, most]
    assert most == max(len(range(rank, candidates, ranks)) for rank in range(ranks))
    assert model.polish_row(candidates, ranks)[1] == pytest.approx(unmet)


@pytest.mark.parametrize(("ranks", "rounds"), [(1, 0), (2, 1), (3, 2), (4, 2), (5, 3), (8, 3), (1024, 10)])
def test_messages_of_a_tree_and_of_a_ring(ranks: int, rounds: int) -> None:
    assert model.collective_row("broadcast", 10, ranks) == [1, 0, rounds, 10 * rounds]
    assert model.collective_row("min", 10, ranks) == pytest.approx([1, 2 * (ranks - 1), 0, 20 * (ranks - 1) / ranks])


def test_a_turn_is_read_from_marks_of_all_ranks() -> None:
    """Two ranks: the second begins and searches later, and ends last; the root alone polishes."""
    root = {
        "plan": {
            "count": [0.0, 1.0, 0.1],
            "search": [1.0, 3.0, 2.0],
            "choose": [3.0, 6.5, 0.1],
            "polish": [6.5, 8.5, 1.9],
            "share": [8.5, 9.0, 0.1],
            "whole": [0.0, 9.0, 4.2],
        },
        "bare": [20.0, 21.0, 23.0],
        "quiet": True,
    }
    other = {
        "plan": {
            "count": [0.25, 2.0, 0.1],
            "search": [2.0, 6.0, 3.0],
            "choose": [6.0, 6.25, 0.1],
            "share": [6.25, 9.25, 0.1],
            "whole": [0.25, 9.5, 3.4],
        },
        "bare": [20.5, 21.5, 22.0],
        "quiet": True,
    }
    turn = model.Turn.of_marks([root, other])
    assert turn.wall == 9.5
    assert turn.stages == (1.0, 5.0, 0.5, 2.0, 1.0)
    assert sum(turn.stages) == turn.wall
    assert turn.slowest == 4.0
    assert turn.overhead == 9.5 - 4.0 - 2.0
    assert turn.collectives == (1.5, 1.5)
    assert turn.bare == 3.0
    assert (turn.search_cpu, turn.polish_cpu) == (3.0, 1.9)
    assert turn.cpu == pytest.approx(3.8)
    assert turn.quiet


def test_counts_dealt_to_ranks_add_up_and_are_not_all_on_one() -> None:
    load = torch.arange(60).view(2, 3, 10)
    for size in (1, 3, 8):
        parts = [turns.dealt(load, rank, size) for rank in range(size)]
        assert torch.equal(torch.stack(parts).sum(0), load)
        assert all(part.sum() > 0 for part in parts)


def test_a_stage_in_two_parts_keeps_its_first_begin_and_all_its_cpu_seconds() -> None:
    stages = turns.Clocked()
    with stages.stage("count"):
        sum(range(200_000))
    begin, end, cpu = stages.marks["count"]
    assert begin < end
    assert cpu > 0
    with stages.stage("count"):
        sum(range(200_000))
    assert stages.marks["count"][0] == begin
    assert stages.marks["count"][1] > end
    assert stages.marks["count"][2] > cpu


# --- bench_same: is the rebalanced run the odd one among the static ones? -------------------------------------------


def test_a_curve_that_lies_apart_is_told_from_those_that_do_not() -> None:
    """Three seeds of four runs: one run that is always furthest off is chance once in 4^3 ways to pick."""
    curves = np.random.default_rng(0).normal(size=(3, 4, 50))
    curves[:, 3] += 10
    odd = same.oddness(curves)
    assert (odd.argmax(1) == 3).all()
    assert same.chance(odd, 3) == 1 / 64
    assert same.chance(odd, int(odd[:, :3].sum(0).argmin())) > 0.5


def test_a_curve_like_the_others_is_called_odd_as_rarely_as_chance_says() -> None:
    curves = np.random.default_rng(1).normal(size=(400, 3, 4, 5))
    called = np.mean([same.chance(same.oddness(one), 3) <= 0.05 for one in curves])
    assert called < 0.09  # at most 0.05 expected


def test_smoothed_curves_are_moving_means() -> None:
    losses = np.random.default_rng(2).normal(size=(2, same.SMOOTH + 3))
    found = same.smoothed(losses)
    assert found.shape == (2, 4)
    np.testing.assert_allclose(found[:, 3], losses[:, 3:].mean(1))


def test_other_orders_hold_the_same_sequences_and_other_ranks_get_some() -> None:
    crops = torch.arange(2 * same.BATCH)[:, None]
    orders = [order(crops).flatten().tolist() for order in same.STATIC.values()]
    assert all(sorted(order) == crops.flatten().tolist() for order in orders)
    assert len(set(map(tuple, orders))) == len(orders)
    halves = [set(order[: same.BATCH]) for order in orders]
    assert halves[0] == halves[1] != halves[2]
