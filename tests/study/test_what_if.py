"""Savings on a trace, computed by hand, also if its steps stand for several or some have no tokens.

Shapes: S steps, L layers, E experts, R rebalances.
"""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest
import torch
from small_traces import MODEL, TOPOLOGY, noise, ring, skewed, trace_of

from distplb import DistplbError, Placement, TimeCurve, Topology, imbalance, plan
from distplb.study.costs import AssumedJob, steps_stood_for
from distplb.study.what_if import PRICED, STATIC, STEPS, SUM, Study

# --- savings ----------------------------------------------------------------------------------------------------


def test_what_is_saved_is_counted_by_hand() -> None:
    # Contiguous: 12 tokens on the busiest GPU; apart: 7. One swap moves two slots, 20 bytes at 1000 bytes/s.
    (one,) = Study(trace_of(skewed(20)), TOPOLOGY, MODEL).run([(STEPS, 4)])
    assert (one.every, one.rebalances, one.slots_moved) == (4, 4, 2)
    assert one.imbalance == one.imbalance_seen == one.worst_step == 1.0
    assert one.static_seconds == pytest.approx(16 * 0.012)
    assert one.compute_seconds == pytest.approx(16 * 0.007)
    assert one.move_seconds == pytest.approx(0.020)
    assert one.saved == pytest.approx(1 - (16 * 0.007 + 0.020) / (16 * 0.012))
    assert one.low is not None
    assert one.high is not None
    assert one.low <= one.saved <= one.high


def test_static_saves_nothing_and_moves_nothing() -> None:
    (one,) = Study(trace_of(skewed(20)), TOPOLOGY, MODEL).run([(STATIC, 4)])
    assert (one.saved, one.low, one.high, one.slots_moved, one.imbalance) == (0, 0, 0, 0, 12 / 7)


def test_the_steps_before_the_first_plan_are_out_on_both_sides() -> None:
    load = skewed(12)
    load[:4] *= 1000
    (one,) = Study(trace_of(load), TOPOLOGY, MODEL).run([(STEPS, 4)])
    assert one.static_seconds == pytest.approx(8 * 0.012)
    assert one.compute_seconds == pytest.approx(8 * 0.007)


def test_an_interval_that_is_cut_off_is_out_too() -> None:
    outcomes = [Study(trace_of(skewed(steps)), TOPOLOGY, MODEL).run([(STEPS, 4)])[0] for steps in (12, 15)]
    assert outcomes[0] == outcomes[1]


def test_plans_with_the_price_do_not_move_what_does_not_repay_itself() -> None:
    dear = replace(MODEL, bytes_per_slot=10**6)
    study = Study(trace_of(skewed(20)), TOPOLOGY, dear)
    free, priced = study.run([(STEPS, 4), (PRICED, 4)])
    assert free.slots_moved == 2
    assert free.saved < 0
    assert priced.slots_moved == priced.saved == 0


def test_plans_are_made_from_an_even_sample_as_in_a_rebalancer() -> None:
    load = noise(60)
    study = Study(trace_of(load, num_gpus=4), Topology(1, 4), MODEL, window=5)
    (one,) = study.run([(STEPS, 30)])
    sample = load[:30:6]
    placement = plan(sample, Topology(1, 4), current=Placement.contiguous(2, 32, 4))
    assert one.imbalance == pytest.approx(float(imbalance(load[30:], placement).mean()))
    assert one.imbalance_seen == pytest.approx(float(imbalance(sample, placement).mean()))


def test_a_curve_is_what_is_balanced_and_timed() -> None:
    # 6 tokens take 9 ns, 1 takes 3: contiguous 18, apart 12.
    curve = TimeCurve((0, 1, 6), (0, 3, 9))
    cheap = replace(MODEL, bandwidth_inside=1e15)
    (one,) = Study(trace_of(skewed(20)), TOPOLOGY, cheap, curve=curve).run([(PRICED, 4)])
    assert one.saved == pytest.approx(1 / 3, abs=1e-4)
    assert one.static_seconds == pytest.approx(16 * 18e-9)


def test_progress_goes_from_nothing_to_all() -> None:
    calls: list[tuple[int, int]] = []
    study = Study(trace_of(skewed(12)), TOPOLOGY, MODEL)
    study.run([(PRICED, 3), (PRICED, 6)], progress=lambda done, total: calls.append((done, total)))
    assert calls == sorted(calls)
    assert {total for _, total in calls} == {24}
    assert calls[-1] == (24, 24)


# --- steps that stand for several -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("iterations", "side_by_side", "expected"),
    [
        ([1, 2, 3, 4], 1, 1.0),
        ([5, 5, 6, 6, 7, 7], 1, 1.0),  # all micro-batches of each iteration
        ([100, 100, 200, 200, 300, 300], 1, 100.0),
        ([100, 100, 200, 200, 300, 300], 2, 50.0),
        ([3, 3, 3], 1, 1.0),
    ],
)
def test_a_step_stands_for_as_many_as_its_iterations_are_apart(
    iterations: list[int], side_by_side: int, expected: float
) -> None:
    trace = trace_of(skewed(len(iterations)), torch.tensor(iterations))
    assert steps_stood_for(trace, side_by_side) == expected


def test_where_steps_stand_for_several_moves_weigh_less() -> None:
    every_step = Study(trace_of(skewed(20)), TOPOLOGY, MODEL)
    each_tenth = Study(trace_of(skewed(20), 10 * torch.arange(20)), TOPOLOGY, MODEL)
    assert (each_tenth.iterations, each_tenth.stands_for) == (200, 10)
    assert each_tenth.cuts_of(40) == every_step.cuts_of(4) == [4, 8, 12, 16, 20]
    one, ten = every_step.run([(STEPS, 4)])[0], each_tenth.run([(STEPS, 40)])[0]
    assert ten.move_seconds == pytest.approx(one.move_seconds)
    assert ten.static_seconds == pytest.approx(10 * one.static_seconds)
    assert ten.saved == pytest.approx(1 - (160 * 0.007 + 0.020) / (160 * 0.012))
    # Moves of 0.05 s do not pay off if an interval saves 0.02 s, but do if it saves 0.2 s.
    dear = replace(MODEL, bytes_per_slot=25)
    assert Study(trace_of(skewed(20)), TOPOLOGY, dear).run([(PRICED, 4)])[0].slots_moved == 0
    assert Study(trace_of(skewed(20)), TOPOLOGY, dear, stands_for=10).run([(PRICED, 4)])[0].slots_moved == 2


@pytest.mark.parametrize(
    ("every", "text"),
    [
        (11, "the trace covers 20 iterations, but rebalancing every 11 takes two intervals.*every 10 or less"),
        (0, "no step in 0 iterations; rebalance every 1 or more"),
    ],
)
def test_an_interval_that_the_trace_cannot_tell_of_is_refused(every: int, text: str) -> None:
    with pytest.raises(DistplbError, match=text):
        Study(trace_of(skewed(20)), TOPOLOGY, MODEL).run([(PRICED, every)])


def test_a_trace_of_one_iteration_is_not_told_to_rebalance_every_zero() -> None:
    with pytest.raises(DistplbError, match=r"covers one iteration, .* takes two, .*; record for longer"):
        Study(trace_of(skewed(1)), TOPOLOGY, MODEL).run([(PRICED, 1)])


@pytest.mark.parametrize("gap", [1, 10])
def test_intervals_are_of_whole_iterations(gap: int) -> None:
    """Half of an iteration's micro-batches were planned on, and the other half judged under that plan."""
    lengths = [2, 2, 2, 6, 6, 6, 1, 3, 4]  # steps of each iteration: a batch that grows, and a sample of a window
    iteration = torch.tensor([gap * nth for nth, length in enumerate(lengths) for _ in range(length)])
    study = Study(trace_of(skewed(32), iteration), TOPOLOGY, MODEL)
    (one,) = study.run([(STEPS, 2 * gap)])
    assert one.rebalances == 3
    assert one.static_seconds == pytest.approx(24 * 0.012 * gap)
    assert one.compute_seconds == pytest.approx(24 * 0.007 * gap)
    assert (study.iterations, study.minimum_interval) == (9 * gap, gap)
    assert study.cuts_of(2 * gap) == [4, 12, 24, 28]
    assert study.cuts_of(4 * gap) == [12, 28]
    with pytest.raises(DistplbError, match=f"no step in {gap // 3} iterations; rebalance every {gap} or more"):
        study.cuts_of(gap // 3)


def test_a_trace_of_any_size_stands_for_a_step_of_the_same_seconds() -> None:
    job = AssumedJob(seconds_per_token=1e-6, bytes_per_slot=1000, bandwidth_inside=100.0, bandwidth_between=10.0)
    for scale in (1, 7):
        trace = trace_of(scale * noise(6))
        model = job.model(trace, 4)
        mean = float(trace.load.sum()) / 6 / 2 / 4
        assert mean * model.seconds_per_token == pytest.approx(0.032768)
        assert model.seconds(1, 0) == pytest.approx(1000 / 400)
        assert model.seconds(0, 1) == pytest.approx(1000 / 40)
    with pytest.raises(DistplbError, match="no tokens"):
        AssumedJob().model(trace_of(torch.zeros(3, 1, 4, dtype=torch.int64)), 2)


# --- steps and layers without tokens ----------------------------------------------------------------------------


@pytest.mark.parametrize("first", [0, 130, 380])
def test_a_buffer_that_is_filled_in_part_is_what_was_filled(first: int) -> None:
    """Steps without tokens were balanced and took no time: planners saved nothing, or made moves for one more step."""
    load, cluster = noise(20) * torch.arange(1, 33), Topology(1, 2)
    trials = [(name, 5) for name in (STATIC, SUM, STEPS, PRICED)]
    studies = [Study(trace_of(one), cluster, MODEL) for one in (load, ring(load, 400, first))]
    partly_filled, expected = (study.run(trials) for study in reversed(studies))
    assert partly_filled == expected
    assert [study.iterations for study in studies] == [20, 20]
    assert [study.stands_for for study in studies] == [1, 1]
    assert [study.bound(5) for study in studies] == [studies[0].bound(5)] * 2
    models = [AssumedJob().model(trace_of(one), 2) for one in (load, ring(load, 400, first))]
    assert models[0] == models[1]


def test_a_price_does_not_depend_on_steps_without_tokens() -> None:
    """Empty steps neither give moves time to pay off nor take it from them."""
    alternating = torch.stack([skewed(20), torch.zeros_like(skewed(20))], dim=1).flatten(0, 1)
    for slot_bytes, moved in ((4, 2), (6, 0)):
        model = replace(MODEL, bytes_per_slot=slot_bytes)
        for load in (skewed(20), ring(skewed(20), 999), alternating):
            assert Study(trace_of(load), TOPOLOGY, model).run([(PRICED, 4)])[0].slots_moved == moved


def test_layers_without_tokens_are_in_no_mean() -> None:
    load = noise(20) * torch.arange(1, 33)
    dense = torch.cat([torch.zeros(20, 3, 32, dtype=torch.int64), load], dim=1)
    trials = [(name, 4) for name in (STATIC, PRICED)]
    with_empty_layers, expected = (Study(trace_of(one), Topology(1, 2), MODEL).run(trials) for one in (dense, load))
    assert list(map(asdict, with_empty_layers)) == [pytest.approx(asdict(one), rel=1e-12) for one in expected]
    assert AssumedJob().model(trace_of(dense), 2) == AssumedJob().model(trace_of(load), 2)


def test_a_trace_without_tokens_is_refused() -> None:
    with pytest.raises(DistplbError, match="the trace has no tokens in 3 steps; pass the trace of a job that trains"):
        Study(trace_of(torch.zeros(3, 1, 4, dtype=torch.int64)), TOPOLOGY, MODEL)


def test_a_curve_without_time_is_refused() -> None:
    """The saved share was a fraction of 0."""
    curve = TimeCurve((0, 100, 200), (0, 0, 10))
    with pytest.raises(DistplbError, match="the time curve gives 0 ns for the tokens of the trace; pass a measured"):
        Study(trace_of(skewed(20)), TOPOLOGY, MODEL, curve=curve).run([(PRICED, 4)])
