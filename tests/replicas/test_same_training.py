"""Replicas do not change a training: a run with them equals the run with a plain dispatcher, to a relative 1e-10.

Losses, parameters and optimizer moments are compared in the maximum norm, the tokens' choices of experts exactly. Runs
under data parallelism are in `test_same_sharded_training`. Two runs with replicas are equal to the bit, and in bf16
replicas add no error that matters.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from fsdp2 import needs_fsdp2
from lent_training import Comparison, Run, Trained, check, compared, trained, words
from ranks import on_ranks

FEW = 12
# EP over all ranks, by their number.
WHOLE = {
    2: (
        Run(recompute="full", homes="rows"),
        Run(recompute="selective", micro_batches=3, optimizer="sgd", homes="table", iterations=FEW),
        Run(recompute="reentrant", keep=True, iterations=FEW),
    ),
    3: (Run(ep=3, experts=6, homes="rows"), Run(ep=3, experts=6, keep=True, optimizer="sgd", iterations=FEW)),
    4: (Run(ep=4, homes="table", optimizer="sgd"),),
}


@cache
def results(size: int) -> dict[Run, Comparison]:
    """Of one start of the ranks for all runs, because starting them takes longer than a run."""
    found: dict[Run, Comparison] = on_ranks(size, compared, WHOLE[size])[0]
    return found


@pytest.mark.parametrize(
    ("size", "run"),
    [pytest.param(size, run, id=f"{size} ranks, {words(run)}") for size, runs in WHOLE.items() for run in runs],
)
def test_a_run_with_replicas_is_the_run_without(size: int, run: Run) -> None:
    check(run, results(size)[run])


# --- to the bit ---------------------------------------------------------------------------------------------------


def trained_twice(run: Run) -> tuple[bool, bool, float]:
    """Whether two runs are equal to the bit, whether one with another optimizer is; the share with replicas."""
    one, other, third = trained(run), trained(run), trained(replace(run, optimizer="sgd"))
    same = all(torch.equal(value, other.values[name]) for name, value in one.values.items())
    return same, torch.equal(one.values["losses"], third.values["losses"]), one.lent


TWICE: list[Any] = [
    pytest.param(2, Run(homes="rows", recompute="full", iterations=24), id="2 ranks"),
    pytest.param(4, Run("fsdp 0", "none", 1, "adamw", "rows", iterations=FEW), id="4 ranks", marks=needs_fsdp2),
    pytest.param(4, Run("ddp", "selective", 3, "adamw", "table"), id="4 ranks, long", marks=pytest.mark.long),
]


@pytest.mark.parametrize(("size", "run"), TWICE)
def test_two_runs_are_equal_to_the_bit(size: int, run: Run) -> None:
    for same, unlike, share in on_ranks(size, trained_twice, run):
        assert (same, unlike) == (True, False)
        assert share > 0.5


# --- in bf16 ------------------------------------------------------------------------------------------------------


def errors(run: Run) -> tuple[float, float, float]:
    """The errors against float64 in bf16, without replicas and with; and the share of steps with replicas."""
    exact = trained(replace(run.plain, dtype=torch.float64))
    plain, lent = trained(replace(run, replicas=False)), trained(run)
    return error(exact, plain), error(exact, lent), lent.lent


def error(exact: Trained, rough: Trained) -> float:
    """The mean over tensors of the relative error, in the Euclidean norm."""
    assert torch.equal(exact.routing, rough.routing)
    found = [float((rough.values[name].double() - value).norm() / value.norm()) for name, value in exact.values.items()]
    return sum(found) / len(found)


BF16: list[Any] = [
    pytest.param(2, Run(micro_batches=2, dtype=torch.bfloat16, forced=True, iterations=30), id="2 ranks"),
    pytest.param(
        4, Run("fsdp 0", "full", dtype=torch.bfloat16, forced=True, iterations=FEW), id="4 ranks", marks=needs_fsdp2
    ),
]


@pytest.mark.parametrize(("size", "run"), BF16)
def test_in_bf16_replicas_add_no_error_that_matters(size: int, run: Run) -> None:
    plain, lent, share = on_ranks(size, errors, run)[0]
    assert share > 0.5
    assert 1e-5 < plain < 0.5  # rounding shows
    assert lent <= 2 * plain
