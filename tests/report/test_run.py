"""A run is read from any files that a job wrote, checked, and summed up in one sentence."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from recorded_runs import RUNS, event, trace

from distplb import DistplbError, Topology
from distplb.report.run import Run
from distplb.report.summary import Summary


def test_a_run_is_read_from_its_folder_its_log_or_its_trace(folder: Path) -> None:
    both = Run.read(folder)
    assert (both.name, len(both.events), both.every, both.topology) == ("run", 2, 10, Topology(1, 4))
    assert both.trace is not None
    log, recorded = Run.read(folder / "events.jsonl"), Run.read(folder / "000000000001.npz")
    assert log.events == both.events
    assert log.trace is None
    assert recorded.events == ()
    assert recorded.trace is not None
    assert torch.equal(recorded.trace.load, both.trace.load)


@pytest.mark.parametrize(
    ("changed", "wording"),
    [
        ({"imbalance_before": (1.5,)}, "layers: 2, imbalances: 1"),
        ({"imbalance_before": (None, None)}, "steps: 10, but no tokens in any layer"),
        ({"imbalance_after": (1.5, "x")}, "iteration 10 is damaged"),
        ({"imbalance_next": (1.5, float("inf"))}, "negative or not finite"),
        ({"seconds": {"move": -1.0}}, "negative or not finite"),
        ({"tokens_of_gpu_before": ((1, 2), (1,))}, "GPUs by layer: [1, 2, 4]"),
        ({"tokens_of_gpu_before": ((10**400, 2, 3, 4),) * 2}, "iteration 10 is damaged"),
        ({"num_nodes": 3}, "nodes: 3, GPUs by layer: [4]"),
        ({"hottest_experts": (((1,),),) * 2}, "damaged"),
        ({"reason": 7}, "a name is not text"),
        ({"layers": 7}, "damaged"),
        ({"iteration": "7"}, "damaged"),
    ],
)
def test_a_damaged_event_is_refused_by_name(changed: dict[str, Any], wording: str) -> None:
    with pytest.raises(DistplbError, match=r"^log: the event of iteration") as refused:
        Run("log", (replace(event(), **changed),))
    assert wording in str(refused.value)


def test_files_of_different_jobs_are_refused(folder: Path) -> None:
    with pytest.raises(DistplbError, match=r"its trace \(GPUs: 4, layers: 2\) does not match the topology \(GPUs: 8\)"):
        Run.read(folder, Topology(1, 8))
    with pytest.raises(DistplbError, match=r"the events \(layers: 3\)"):
        Run("run", (event(layers=3),), trace())


@pytest.mark.parametrize("lengths", [[1], [5], [1, 1], [3, 3, 3], [1, 5, 1], [5, 1], [1, 1, 1, 9]])
def test_no_iteration_is_planned_on_and_judged(lengths: list[int]) -> None:
    """The second half of a trace began within an iteration, and the plan was made from its other micro-batches."""
    iteration = [10 * nth for nth, length in enumerate(lengths) for _ in range(length)]
    run = Run("run", trace=replace(trace(len(iteration)), iteration=torch.tensor(iteration)))
    assert run.evaluation is not None
    assert run.trace is not None
    unseen = run.evaluation.unseen
    begins = [iteration.index(at) for at in sorted(set(iteration))]
    half = next((at for at in begins if at >= max(1, len(iteration) // 2)), None)
    if half is None:
        assert unseen is None
    else:
        assert unseen is not None
        assert int(unseen.before.sum()) == int(run.trace.load[half:].sum())
        assert (unseen.first, unseen.last) == (iteration[half], iteration[-1])
    assert Summary.of(run).imbalance_before is not None


@pytest.mark.parametrize(
    ("run", "wording"),
    [
        ("nothing", "No load was recorded, so the imbalance is unknown."),
        (
            "one event",
            "Rebalancing lowered the imbalance from 1.50 to 1.20; no placement could beat 1.00. By meas",
        ),
        ("dry run", "Nothing was moved (dry run). The plans give an imbalance of 1.20 instead of 1.50"),
        ("nothing is known of the next window", "The imbalance is 1.50; no placement could beat 1.00. What a plan"),
        (Run("run", (event(imbalance_next=(1.6, 1.4)),)), "Rebalancing did not lower the imbalance: 1.50 without it"),
        (Run("run", (event(repaid=False), event(2))), "1 of 2 rebalances certainly did not pay off."),
        (Run("run", (event(decision="stopped"),)), "Rebalancing turned itself off."),
    ],
)
def test_the_headline_is_the_result(run: str | Run, wording: str) -> None:
    assert wording in Summary.of(RUNS[run] if isinstance(run, str) else run).headline
