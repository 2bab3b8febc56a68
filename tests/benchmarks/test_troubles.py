"""The standard troubles depend on their seed alone, and each one does what its name says.

Shapes: S steps, L layers, E experts.
"""

from __future__ import annotations

import pytest
import torch
from benchmark_modules import imported
from torch import Tensor

troubles = imported("shared.troubles")

SIZE = troubles.Size(steps=200, layers=3, experts=16, tokens=100_000)


def likeness(one: Tensor, other: Tensor) -> float:
    """Correlate two loads `[L, E]`, mean over the layers."""
    pairs = zip(one.double(), other.double(), strict=True)
    return sum(float(torch.corrcoef(torch.stack(pair))[0, 1]) for pair in pairs) / len(one)


@pytest.mark.parametrize("name", troubles.TROUBLES)
def test_a_trace_is_made_from_its_seed_alone(name: str) -> None:
    make = troubles.TROUBLES[name]
    load = make(SIZE, 3)
    assert load.dtype == torch.int64
    assert load.shape == (200, 3, 16)
    assert bool((load.sum(2) == SIZE.tokens).all())
    torch.manual_seed(1)
    assert torch.equal(load, make(SIZE, 3))
    assert not torch.equal(load, make(SIZE, 4))
    assert not torch.equal(load[:, 0], load[:, 1])


def test_a_stationary_load_stays_but_for_chance() -> None:
    load = troubles.stationary(SIZE, 0).double()
    mean = load.mean(0)
    spread = load.var(0) / (mean * (1 - mean / SIZE.tokens))  # 1 for a multinomial
    assert float(spread.mean()) == pytest.approx(1, abs=0.1)
    assert float((mean.amax(1) / mean.mean(1)).min()) > 1.5  # some experts are hot


def test_a_drift_is_slow_and_forgets() -> None:
    load = troubles.slow_drift(SIZE, 0)
    nearby = [likeness(load[step], load[step + 5]) for step in range(0, 195, 5)]
    assert min(nearby) > 0.95
    assert abs(likeness(load[0], load[-1])) < 0.5


def test_a_shift_is_sudden() -> None:
    load = troubles.sudden_shift(SIZE, 0, at=0.25)
    assert likeness(load[0], load[49]) > 0.98
    assert likeness(load[50], load[199]) > 0.98
    assert abs(likeness(load[49], load[50])) < 0.5


def test_the_hot_expert_rotates() -> None:
    load = troubles.rotating_hot(SIZE, 0, period=40, times=100)
    hottest = load.argmax(2)  # [S, L]
    for layer in range(3):
        runs = [set(hottest[begin : begin + 40, layer].tolist()) for begin in range(0, 200, 40)]
        assert all(len(run) == 1 for run in runs)
        assert len(set.union(*runs)) == 5


def test_bursts_are_short_and_return_to_normal() -> None:
    load = troubles.bursts(SIZE, 0, every=40, length=4, times=50).double()
    median = load.median(0).values
    bursting = (load > 3 * median).any(2)  # [S, L]
    assert 0.03 < float(bursting.double().mean()) < 0.25
    assert likeness(load[~bursting.any(1)].mean(0), median) > 0.999
    begins = (bursting[1:] & ~bursting[:-1]).sum()
    assert int(begins) >= 5
