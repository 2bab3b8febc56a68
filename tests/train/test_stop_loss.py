"""Rebalancing that does not pay off turns itself off, on all ranks at once; losses that may be chance do not count."""

from __future__ import annotations

import random
import statistics
import warnings
from typing import Any

import pytest
import torch
from jobs import EXPERTS, LAYERS, Clock, Job
from ranks import on_ranks

from distplb.comm.torchdist import TorchComm
from distplb.records.events import RebalanceEvent
from distplb.train import observer, rebalance
from distplb.train.stop_loss import Pace, StopLoss

FAST, SLOW = Pace(1.0, 0.0, 100), Pace(1.1, 0.0, 100)


# --- the pace -------------------------------------------------------------------------------------------------------


def test_the_error_of_a_pace_is_that_of_the_medians_of_many_jobs() -> None:
    random_ = random.Random(0)
    paces = [Pace.of([random_.gauss(10.0, 1.0) for _ in range(50)]) for _ in range(2000)]
    spread = statistics.stdev(pace.median for pace in paces)
    assert statistics.mean(pace.error for pace in paces) == pytest.approx(spread, rel=0.1)
    assert {pace.iterations for pace in paces} == {50}


def test_a_single_slow_iteration_does_not_slow_the_pace() -> None:
    assert Pace.of([1.0, 1.0, 1.0, 1.0, 60.0]) == Pace(1.0, 0.0, 5)


def test_one_iteration_alone_is_in_doubt() -> None:
    """Its error was 0, so that with every=1 chance alone, three times in a row, ended rebalancing."""
    assert Pace.of([2.0]) == Pace(2.0, 2.0, 1)
    stop_loss = StopLoss(1)
    assert stop_loss.repaid(Pace.of([2.0]), Pace.of([2.5]), cost=3.0)
    assert not stop_loss.is_over


# --- counted --------------------------------------------------------------------------------------------------------


def test_what_is_saved_until_the_next_one_is_held_against_what_it_took() -> None:
    stop_loss = StopLoss(3)
    assert stop_loss.repaid(SLOW, FAST, cost=9.9)
    assert not stop_loss.repaid(SLOW, FAST, cost=10.1)
    assert not stop_loss.repaid(FAST, SLOW, cost=0.0)


def test_two_standard_errors_are_in_doubt_and_more_are_not() -> None:
    before, after = Pace(1.0, 0.03, 100), Pace(1.0, 0.04, 100)  # 2 × 0.05 × 100 = 10 seconds
    assert StopLoss(1).repaid(before, after, cost=9.9)
    assert not StopLoss(1).repaid(before, after, cost=10.1)


def test_only_strikes_in_a_row_end_it() -> None:
    stop_loss = StopLoss(3)
    for cost in (99.0, 99.0, 1.0, 99.0, 99.0):
        stop_loss.repaid(SLOW, FAST, cost)
        assert not stop_loss.is_over
    stop_loss.repaid(SLOW, FAST, 99.0)
    assert stop_loss.is_over


def test_patience_0_never_ends() -> None:
    stop_loss = StopLoss(0)
    for _ in range(10):
        assert not stop_loss.repaid(FAST, SLOW, 1.0)
    assert not stop_loss.is_over


def test_noise_alone_rarely_strikes() -> None:
    """If rebalances cost and change nothing, one in forty is more than two sigmas on the bad side."""
    random_ = random.Random(1)
    struck = 0
    for _ in range(2000):
        before, after = (Pace.of([random_.gauss(1.0, 0.1) for _ in range(40)]) for _ in range(2))
        struck += not StopLoss(1).repaid(before, after, cost=0.0)
    assert 0.01 < struck / 2000 < 0.05


# --- in a job -------------------------------------------------------------------------------------------------------

EVERY, TOOK = 3, 5.0  # iterations, seconds of a rebalance


class TimedJob:
    """A job whose GPU 0 is always the busiest, so that each rebalance moves; the test sets its iteration seconds."""

    def __init__(self, **options: Any) -> None:
        self.clock = observer.time = Clock()
        rebalance.time = Clock(tick=TOOK)  # read when a rebalance begins and when it ends
        self.events: list[RebalanceEvent] = []
        self.job, self.options = (
            Job(),
            {"every": EVERY, "on_event": self.events.append, "engine": "reference"} | options,
        )
        self.rebalancer = self.job.rebalancer(**self.options)
        self.counts = torch.full((LAYERS, EXPERTS), 10)
        self.counts[:, :2] = 90  # whichever experts these slots hold

    def run(self, *seconds: float) -> None:
        """Run iterations of the given seconds; those of other ranks differ, which must not matter."""
        for own in seconds:
            self.job.iterate(self.counts)
            self.clock.now += own if TorchComm().rank == 0 else 100.0 / (1.0 + self.clock.now)
            self.rebalancer.step()

    def told(self) -> list[tuple[int, str, bool | None]]:
        return [(event.iteration, event.decision, event.repaid) for event in self.events]


def never_paying() -> dict[str, Any]:
    timed = TimedJob()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always", RuntimeWarning)
        timed.run(*[1.0] * 15)
    found: dict[str, Any] = {"told": timed.told(), "enabled": timed.rebalancer.enabled}
    found["warned"] = [str(one.message) for one in warned if one.category is RuntimeWarning]
    found["reason"], found["moved"] = timed.events[-1].reason, timed.events[-1].slots_moved
    timed.rebalancer.enabled = True
    timed.run(*[1.0] * 6)
    found["after"] = timed.told()[len(found["told"]) :]
    return found


def test_a_job_whose_moves_never_pay_turns_itself_off_after_three_on_all_ranks() -> None:
    reason = "3 rebalances in a row did not pay off; set enabled = True to continue, or rebalance less often"
    for found in on_ranks(2, never_paying, deadline=60):
        assert found["told"] == [
            (3, "moved", None),
            (3, "moved", False),
            (6, "moved", None),
            (6, "moved", False),
            (9, "moved", None),
            (9, "moved", False),
            (12, "stopped", None),
        ]
        assert not found["enabled"]
        assert found["moved"] == 0
        assert found["reason"] == reason
        assert found["warned"] == [f"distplb has turned rebalancing off: {reason}"]
        # Nothing moved at 12, so 18 counts no strike for it; counting starts at zero.
        assert found["after"] == [(12, "stopped", None), (18, "moved", None), (18, "moved", False), (21, "moved", None)]


def resumed_between_strikes() -> dict[str, Any]:
    timed = TimedJob()
    timed.run(*[1.0] * 9)
    state = timed.rebalancer.state_dict()
    assert timed.rebalancer.enabled
    timed.rebalancer.close()
    timed.rebalancer = timed.job.rebalancer(**timed.options)
    timed.rebalancer.load_state_dict(state)
    before = len(timed.events)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        timed.run(*[1.0] * 6)
    counters = [each["layers"]["moe.1"]["counters"].tolist() for each in (state, timed.rebalancer.state_dict())]
    return {"told": timed.told()[before:], "counters": counters}


def test_strikes_and_being_off_are_kept_in_a_checkpoint() -> None:
    for found in on_ranks(2, resumed_between_strikes, deadline=60):
        # The pace before the checkpoint is unknown at 12; the third strike is that of 12, counted at 15.
        assert found["told"] == [(12, "moved", None), (12, "moved", False), (15, "stopped", None)]
        # Iteration, rebalances, enabled, strikes.
        assert found["counters"] == [[9, 3, 1, 2], [15, 5, 0, 0]]


def paying_or_in_doubt() -> list[list[bool | None]]:
    found = []
    falling = [100.0 - 10 * (iteration // EVERY) for iteration in range(18)]  # 30 seconds less each time, for 5
    noisy = [3.0, 1.0, 9.0, 2.0, 8.0, 4.0] * 3  # no faster, but too noisy to tell
    for seconds, options in ((falling, {}), (noisy, {}), ([1.0] * 18, {"stop_loss": 0})):
        timed = TimedJob(**options)
        timed.run(*seconds)
        assert timed.rebalancer.enabled
        assert {event.decision for event in timed.events} == {"moved"}
        found.append([event.repaid for event in timed.events if event.imbalance_next is not None])
    timed = TimedJob(every=1)
    timed.run(*[1.0] * 3)
    return [*found, [event.repaid for event in timed.events if event.imbalance_next is not None]]


def test_a_job_whose_moves_pay_or_may_pay_goes_on() -> None:
    for paying, noisy, patient, first in on_ranks(2, paying_or_in_doubt, deadline=60):
        assert paying == noisy == [True] * 5
        assert patient == [False] * 5
        assert first[0] is None  # the first iteration was not timed, so there is nothing to compare with


def even_and_then_skewed() -> dict[str, Any]:
    """Run twelve windows of equally likely experts, then two in which some are hot."""
    timed, generator = TimedJob(), torch.Generator().manual_seed(TorchComm().rank)
    planned = []
    for iteration in range(12 * EVERY):
        timed.counts = torch.poisson(torch.full((LAYERS, EXPERTS), 50.0), generator=generator).long()
        timed.run(1.0)
        if iteration % EVERY == EVERY - 1:
            planned.append(timed.events[-1].placement_digest == timed.rebalancer.placement.digest())
    found: dict[str, Any] = {"told": timed.told(), "enabled": timed.rebalancer.enabled, "planned": planned}
    found["left_out"], found["reasons"] = timed.events[-1].left_out, {event.reason for event in timed.events}
    timed.counts = torch.full((LAYERS, EXPERTS), 10)
    timed.counts[:, :2] = 90
    timed.run(*[1.0] * 2 * EVERY)
    return found | {"then": timed.told()[len(found["told"]) :]}


def test_an_even_load_is_left_alone_and_rebalancing_stays_on() -> None:
    """Experts moved because of chance differences in a window and gained nothing; the third time rebalancing ended."""
    for found in on_ranks(2, even_and_then_skewed, deadline=60):
        assert found["enabled"]
        assert {(decision, repaid) for _, decision, repaid in found["told"]} == {("kept", None)}
        assert sum(found["planned"]) < 3  # the search found moves nearly every time
        assert "the GPUs differ no more than by chance, in every layer that would have moved" in found["reasons"]
        assert found["left_out"] == ("the GPUs differ no more than by chance",) * LAYERS
        assert [(iteration, decision) for iteration, decision, _ in found["then"] if iteration > 36] == [
            (39, "moved"),
            (39, "moved"),
            (42, "moved"),
        ]
