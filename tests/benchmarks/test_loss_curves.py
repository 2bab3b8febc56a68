"""How bench_loss_curves judges whether a run stands out among the static ones, and what its runs and controls do.

Shapes: S seeds, R runs, I iterations, L layers.
"""

from __future__ import annotations

import argparse
import doctest
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from benchmark_modules import imported
from ranks import on_ranks

bench_loss_curves, judgement = imported("train.bench_loss_curves"), imported("train.judgement")
figure = imported("figures.loss_curves")
RUNS, STATIC, TESTED, CONTROLS = (getattr(bench_loss_curves, name) for name in ("RUNS", "STATIC", "TESTED", "CONTROLS"))
ITERATIONS, EVERY = 12, 4


def test_examples_print_what_they_say() -> None:
    results = doctest.testmod(judgement)
    assert results.attempted
    assert not results.failed


def test_a_curve_that_lies_apart_is_told_from_those_that_do_not() -> None:
    """With three seeds of four runs, a given run is furthest off every time with probability 1/4^3."""
    curves = np.random.default_rng(0).normal(size=(3, 4, 50))
    curves[:, 3] += 10
    odd = judgement.oddness(curves)
    assert (odd.argmax(1) == 3).all()
    assert judgement.chance(odd, 3) == judgement.smallest_chance(*odd.shape) == 1 / 64
    assert judgement.judged(odd, 3) == "told apart"
    nearest = int(odd[:, :3].sum(0).argmin())
    assert judgement.chance(odd, nearest) > 0.5
    assert judgement.judged(odd, nearest) == "within"


@pytest.mark.parametrize(("seeds", "can_tell"), [(1, False), (2, False), (3, True)])
def test_seeds_that_can_tell_nothing_apart_are_not_called_within(seeds: int, can_tell: bool) -> None:
    """Two seeds of four runs have p >= 1/16: `within` would be the verdict on any run, however far off."""
    for run in (0, 3):
        verdict = judgement.judged(np.array([[1.0, 2.0, 3.0, 9.0]] * seeds), run)
        assert (verdict != "too few seeds") == can_tell
    assert ("too much to tell anything apart" in bench_loss_curves.judged_how(seeds)) != can_tell


def test_the_report_says_how_often_runs_that_are_no_different_are_told_apart() -> None:
    text = bench_loss_curves.judged_how(3)
    assert "64 picks, so p is at least 0.016" in text
    assert "at most 0.047" in text  # 3 of 64 picks have p <= 0.05
    assert "at most 0.14" in text  # one of three runs


def test_a_curve_like_the_others_is_called_odd_as_rarely_as_chance_says() -> None:
    curves = np.random.default_rng(1).normal(size=(400, 3, 4, 5))
    called = np.mean([judgement.chance(judgement.oddness(one), 3) <= 0.05 for one in curves])
    assert called < 0.09  # at most 0.05 expected


def test_smoothed_curves_are_moving_means() -> None:
    losses = np.random.default_rng(2).normal(size=(2, bench_loss_curves.SMOOTH + 3))
    means = bench_loss_curves.smoothed(losses)
    assert means.shape == (2, 4)
    np.testing.assert_allclose(means[:, 3], losses[:, 3:].mean(1))


def test_other_orders_hold_the_same_sequences_and_other_ranks_get_some() -> None:
    crops = torch.arange(2 * bench_loss_curves.BATCH)[:, None]
    orders = [run.order(crops).flatten().tolist() for run in STATIC.values()]
    assert all(sorted(order) == crops.flatten().tolist() for order in orders)
    assert len(set(map(tuple, orders))) == len(orders)
    halves = [set(order[: bench_loss_curves.BATCH]) for order in orders]
    assert halves[0] == halves[1] != halves[2]


# --- what runs and controls do ----------------------------------------------------------------------------------


def trained_runs() -> dict[str, Any]:
    """A few iterations of every run, on this rank."""
    torch.set_num_threads(1)
    text = torch.randint(256, (5000,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return {name: bench_loss_curves.trained(run, 0, text, ITERATIONS, EVERY) for name, run in RUNS.items()}


@pytest.fixture(scope="module")
def trained() -> dict[str, Any]:
    first, second = on_ranks(2, trained_runs)
    for name, one in first.items():  # ranks tell the same
        np.testing.assert_array_equal(one.losses, second[name].losses)
        np.testing.assert_array_equal(one.after, second[name].after)
    return first


def furthest(trained: dict[str, Any], name: str) -> np.ndarray:
    """`[I]`: the difference from the static run."""
    return np.abs(trained[name].losses - trained["static"].losses)


def test_static_and_tested_runs_differ_by_rounding_alone(trained: dict[str, Any]) -> None:
    for name in STATIC | TESTED:
        assert furthest(trained, name).max() < 1e-5, name
    for name, until_it_moves in (("rebalanced", "static"), ("both", "replicated")):  # as the report says
        np.testing.assert_array_equal(trained[name].losses[:EVERY], trained[until_it_moves].losses[:EVERY])


def test_runs_move_homes_and_lend_replicas_as_their_names_say(trained: dict[str, Any]) -> None:
    for name, run in RUNS.items():
        one = trained[name]
        assert one.losses.shape == (ITERATIONS,)
        assert one.replicas.shape == one.before.shape == one.after.shape == (ITERATIONS, 1)
        assert (one.moved > 0) == run.rebalances, name
        if run.balancer is None:
            assert not one.replicas.any(), name
            np.testing.assert_array_equal(one.before, one.after)
        else:
            assert (one.replicas > 0).mean() > 0.5, name
            assert one.after.max() < 1.01 < one.before.mean(), name
            assert (one.after[one.replicas > 0] < one.before[one.replicas > 0]).all(), name


EQUAL = {  # iterations that a control trains as the static run
    "rebalanced, moments left behind": EVERY,  # until homes have moved
    "replicated, gradients left behind": 1,  # until the optimizer has stepped
    "replicated, weights too late": 1,  # the first push finds nothing older in the slots
}


@pytest.mark.parametrize("control", CONTROLS)
def test_a_control_trains_as_static_until_its_bug_has_an_effect(trained: dict[str, Any], control: str) -> None:
    """Otherwise the control would be told apart, or not, for another reason than the one that the report gives."""
    difference, equal = furthest(trained, control), EQUAL[control]
    assert difference[:equal].max() < 1e-6
    assert difference[equal:].max() > 1e-5


# --- the report -------------------------------------------------------------------------------------------------


def drawn(seeds: int, iterations: int) -> Any:
    """Random figures of all runs; the last control is far off."""
    shape = seeds, len(RUNS), iterations
    generator = np.random.default_rng(3)
    losses = generator.normal(size=shape)
    losses[:, -1] += 10
    replicas = np.zeros((*shape, 1), dtype=int)
    replicas[:, 4, ::2] = 2  # the replicated run
    imbalance = np.full((*shape, 1), 1.25)
    return bench_loss_curves.Trained(losses, np.ones(shape[:2], dtype=int), replicas, imbalance, imbalance - 0.125)


def test_the_report_has_a_row_for_every_run_in_every_table() -> None:
    options = argparse.Namespace(seeds=3, iterations=400, every=100, output=Path("some.md"))
    report = bench_loss_curves.reported(drawn(3, 400), options)
    parts = {part.split("\n")[0]: part for part in report.split("## ")}
    for name in TESTED | CONTROLS:
        assert f"| {name} less static " in parts["How far apart"]
        assert f"| {name}" in parts["Verdict"]
    for name in RUNS:
        assert f"| {name} " in parts["Replicas and imbalance"]
        assert f"| {name} " in parts["Final losses, and slots moved"]
    for name in CONTROLS:
        assert f"`{name.split(', ')[1]}`: " in parts["Controls"]
    verdicts = {line.split(" | ")[0]: line for line in parts["Verdict"].splitlines() if "of 3 |" in line}
    assert len(verdicts) == len(TESTED | CONTROLS)
    assert "told apart |" in verdicts[next(name for name in verdicts if "too late" in name)]
    lent = next(line for line in parts["Replicas and imbalance"].splitlines() if line.startswith("| replicated  "))
    cells = [cell.strip() for cell in lent.split("|")[1:-1]]
    assert cells == ["replicated", "600 of 1,200", "50.0%", "1.00", "1.250", "1.125", "1.125"]


def test_the_figure_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "curves.png"
    figure.draw(drawn(2, 10).losses, list(RUNS), len(STATIC), len(TESTED), 5, path)
    assert path.read_bytes().startswith(b"\x89PNG")
