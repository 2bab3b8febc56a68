"""Under data parallelism, a run with replicas equals the run with a plain dispatcher, to a relative 1e-10.

EP 2 × 2 copies on four ranks, under real DDP and FSDP2. Runs with replicas are also recomputed, accumulated, clipped
and rebalanced; the run that each is compared with is under DDP, is not recomputed and moves no experts.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import combinations

import pytest
from fsdp2 import RUNS
from lent_training import Comparison, Run, check, compared, words
from ranks import on_ranks

ITERATIONS, FEW = 100, 12
# Between them, all pairs of values of any two of these.
VARIED = ("sharding", "recompute", "micro_batches", "optimizer", "homes")
SHARDED = [
    Run(*values, iterations=FEW)
    for values in (
        ("ddp", "none", 3, "sgd", "still"),
        ("ddp", "full", 1, "sgd", "rows"),
        ("ddp", "reentrant", 1, "sgd", "table"),
        ("ddp", "selective", 3, "adamw", "still"),
        ("fsdp 0", "none", 1, "adamw", "rows"),
        ("fsdp 0", "full", 3, "adamw", "table"),
        ("fsdp 0", "reentrant", 1, "sgd", "still"),
        ("fsdp 0", "selective", 1, "sgd", "rows"),
        ("fsdp 1", "none", 1, "sgd", "table"),
        ("fsdp 1", "full", 1, "adamw", "still"),
        ("fsdp 1", "reentrant", 3, "adamw", "rows"),
        ("fsdp 1", "selective", 1, "sgd", "table"),
    )
]


def those_that_run(iterations: int) -> tuple[Run, ...]:
    return tuple(replace(run, iterations=iterations) for run in SHARDED if RUNS or run.sharding == "ddp")


@cache
def results(iterations: int) -> dict[Run, Comparison]:
    """Of one start of the ranks for all runs, because starting them takes longer than a run."""
    found: dict[Run, Comparison] = on_ranks(4, compared, those_that_run(iterations), deadline=60 + 4 * iterations)[0]
    return found


@pytest.mark.parametrize("iterations", [FEW, pytest.param(ITERATIONS, marks=pytest.mark.long)])
@pytest.mark.parametrize("run", SHARDED, ids=words)
def test_a_sharded_run_with_replicas_is_the_run_without(run: Run, iterations: int) -> None:
    run = replace(run, iterations=iterations)
    if run not in those_that_run(iterations):
        pytest.skip("this torch's FSDP2 does not run on a CPU")
    check(run, results(iterations)[run])


def test_those_runs_cover_all_pairs() -> None:
    rows = [[getattr(run, name) for name in VARIED] for run in SHARDED]
    for one, other in combinations(range(len(VARIED)), 2):
        values = [{row[column] for row in rows} for column in (one, other)]
        assert len({(row[one], row[other]) for row in rows}) == len(values[0]) * len(values[1])
    values = [len({row[column] for row in rows}) for column in range(len(VARIED))]
    assert values == [3, 4, 2, 2, 3]
