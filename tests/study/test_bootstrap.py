"""The interval of a gain: None for few intervals, of width 0 if all are equal, and about as reliable as it says."""

from __future__ import annotations

import numpy as np
import pytest

from distplb.study.bootstrap import Gain, estimate_gain


def test_few_intervals_tell_no_interval() -> None:
    assert estimate_gain([7, 8, 9], [10, 10, 10]) == Gain(pytest.approx(0.2), None, None)
    assert estimate_gain([7, 8, 9, 8], [10, 10, 10, 10]).low is not None


def test_intervals_that_are_all_alike_leave_no_doubt() -> None:
    assert estimate_gain([9] * 5, [10] * 5) == Gain(*[pytest.approx(0.1)] * 3)


@pytest.mark.parametrize(("number", "alike"), [(6, 0.0), (16, 0.3), (36, 0.5)])
def test_the_interval_holds_the_truth_about_as_often_as_it_says(number: int, alike: float) -> None:
    generator, hits = np.random.default_rng(0), 0
    for _ in range(200):
        chance = generator.standard_normal(number + 30)
        for at in range(1, len(chance)):
            chance[at] = alike * chance[at - 1] + np.sqrt(1 - alike**2) * chance[at]
        static = 1 + 0.05 * generator.standard_normal(number)
        gain = estimate_gain((0.95 * static - 0.03 * chance[30:]).tolist(), static.tolist())
        assert gain.low is not None
        assert gain.high is not None
        hits += gain.low <= 0.05 <= gain.high
    assert 0.88 <= hits / 200 <= 0.995


def test_intervals_that_took_no_time_are_in_no_share() -> None:
    """The saved share was a fraction of 0."""
    assert estimate_gain([1, 2], [0, 0]) == Gain(0.0, None, None)
    gain = estimate_gain([0, 0, 0, 0, 0, 0, 0, 9], [0, 0, 0, 0, 0, 0, 0, 10])
    assert gain.low == gain.high == pytest.approx(0.1)
