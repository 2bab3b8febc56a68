"""The model of bench_scaling on generated data, and the figures computed from the ranks' marks."""

from __future__ import annotations

import doctest
from types import ModuleType

import numpy as np
import pytest
import torch
from benchmark_modules import imported

model, turns = imported("planning.scaling.model"), imported("planning.scaling.turns")

RANKS, BYTES = (2, 3, 4, 6, 8), (300, 20_000, 4_000_000)
TRUTH = np.array([40e-6, 25e-6, 60e-6, 1 / 2e9])  # seconds a call, a message in a ring and in a tree, a byte


def turns_of(truth: np.ndarray, rows: np.ndarray, noise: float, number: int, seed: int) -> list[np.ndarray]:
    """Draw turns of each cell, scattered around the model's value."""
    generator = np.random.default_rng(seed)
    return [seconds * generator.lognormal(0, noise, number) for seconds in rows @ truth]


def collective_rows(cores: float = 2) -> np.ndarray:
    kinds = ("sum", "broadcast")
    return np.array(
        [model.collective_row(kind, size, ranks, cores) for kind in kinds for size in BYTES for ranks in RANKS]
    )


@pytest.mark.parametrize("module", [model, turns], ids=lambda module: module.__name__)
def test_examples_print_what_they_say(module: ModuleType) -> None:
    results = doctest.testmod(module)
    assert results.attempted
    assert not results.failed


def test_known_parameters_are_found_exactly_where_nothing_is_noisy() -> None:
    rows = collective_rows()
    fit = model.fitted(rows, turns_of(TRUTH, rows, 0.0, 3, 0), draws=5)
    np.testing.assert_allclose(fit.parameters, TRUTH, rtol=1e-9)
    np.testing.assert_allclose(fit.draws, np.tile(TRUTH, (5, 1)), rtol=1e-9)


def test_known_parameters_are_found_in_noise() -> None:
    rows = collective_rows()
    fit = model.fitted(rows, turns_of(TRUTH, rows, 0.3, 25, 1), draws=5)
    np.testing.assert_allclose(fit.parameters, TRUTH, rtol=0.15)


def test_the_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    rows = collective_rows()
    at = [model.collective_row("sum", 4_000_000, 1024)]
    truth, held, widths = (at @ TRUTH)[0], 0, []
    for seed in range(60):
        _, draws = model.fitted(rows, turns_of(TRUTH, rows, 0.3, 21, seed), draws=100, seed=seed).at(at)
        low, high = (end[0] for end in model.interval(draws))
        held += low <= truth <= high
        widths.append((high - low) / truth)
    assert held >= 51, held  # 57 expected
    assert np.median(widths) < 0.25  # not because the intervals are wide


def test_a_narrower_interval_lies_inside() -> None:
    draws = np.random.default_rng(0).normal(size=(1000, 2))
    (low, high), (lower, higher) = model.interval(draws, 0.5), model.interval(draws)
    assert (lower < low).all()
    assert (high < higher).all()
    np.testing.assert_allclose(higher, 1.96, atol=0.25)


def test_no_parameter_is_negative() -> None:
    rows = np.array([[1.0, 1.0], [1.0, 2.0], [1.0, 3.0]])
    fit = model.fitted(rows, [[3.0], [2.0], [1.5]], draws=3)  # decreasing, so a free slope would be negative
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
    """Of two ranks, the second begins, searches and ends later; only the root polishes."""
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
    stages = turns.TimedStages()
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
