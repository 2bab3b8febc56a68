"""Sampled steps are read from any file that a job wrote, checked, put in order, and summed up in one sentence."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from recorded_runs import RUNS, event, step, steps, trace

from distplb import DistplbError, EventLog, RebalanceEvent, StepEvent, Topology
from distplb.report.run import Run
from distplb.report.sampled_steps import SampledSteps
from distplb.report.summary import Summary


def write(path: Path, events: Any) -> Path:
    log = EventLog(path)
    for one in events:
        log(one)
    log.close()
    return path


def begun(number: int) -> RebalanceEvent:
    """A rebalance whose next window is not known yet."""
    return replace(event(number), imbalance_next=None)


def sampled(run: Run) -> SampledSteps:
    assert run.sampled is not None
    return run.sampled


def test_steps_are_read_from_a_folder_or_alone(folder: Path, tmp_path: Path) -> None:
    whole = Run.read(folder)
    assert (len(whole.events), len(whole.steps), whole.trace is not None) == (2, 10, True)
    (folder / "events.jsonl").unlink()
    (folder / "000000000001.npz").unlink()
    alone = Run.read(folder)
    assert (alone.name, alone.events, alone.trace, alone.steps) == ("run", (), None, steps())
    assert alone.topology == Topology(1, 4)
    assert Run.read(folder / "steps.jsonl").steps == steps()
    both = write(tmp_path / "one.jsonl", (begun(1), *steps(3), begun(2)))
    assert (len(Run.read(both).events), len(Run.read(both).steps)) == (2, 3)


def test_a_record_that_was_cut_off_is_left_out_with_one_warning(tmp_path: Path) -> None:
    path = write(tmp_path / "steps.jsonl", steps(3))
    path.write_text(path.read_text()[:-40])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert len(Run.read(path).steps) == 2
    assert len([one for one in caught if "incomplete and left out" in str(one.message)]) == 1


@pytest.mark.parametrize(
    ("changed", "wording"),
    [
        ({"imbalance_before": (1.5,)}, "layers: 2, imbalances: 1"),
        ({"imbalance_after": (1.5, float("nan"))}, "an imbalance is negative or not finite"),
        ({"imbalance_after": (1.5, "x")}, "an imbalance is negative or not finite"),
        ({"imbalance_bound": (1.5, -1.0)}, "an imbalance is negative or not finite"),
        ({"imbalance_before": 7}, "damaged"),
        ({"seconds": {"push": -1.0}}, "a time is negative or not finite"),
        ({"seconds": {"push": float("inf")}}, "a time is negative or not finite"),
        ({"seconds": {"push": "1"}}, "a time is negative or not finite"),
        ({"seconds": {7: 1.0}}, "a name is not text"),
        ({"started": float("inf")}, "a time is negative or not finite"),
        ({"step": 0}, "step: 0, slots: 8"),
        ({"step": "7"}, "a count is negative"),
        ({"step": 10**400}, "a count is negative, too large"),
        ({"bytes_inside": -1}, "a count is negative"),
        ({"bytes_between": True}, "no whole number"),
        ({"num_nodes": 3}, "nodes: 3, slots: 8, GPUs by table: [4]"),
        ({"num_slots": 6}, "nodes: 1, slots: 6, GPUs by table: [4]"),
        ({"layers": ("a", 7)}, "a name is not text"),
        ({"layers": 7}, "damaged"),
        ({"tokens_of_gpu_before": ((1, 2, 3, 4), (1, 2))}, "damaged"),
        ({"tokens_of_gpu_before": ((1, 2, 3, 4),)}, "layers: 2, but tokens of GPUs for 1"),
        ({"tokens_of_gpu_after": ((1, 2),) * 2}, "GPUs by table: [2, 4]"),
        ({"tokens_of_gpu_after": ((1, 2, 3, -4),) * 2}, "tokens of a GPU are negative"),
        ({"tokens_of_gpu_after": ((1, 2, 3, 10**400),) * 2}, "tokens of a GPU are negative, too large"),
        ({"tokens_of_gpu_after": ((1, 2, 3, 2**63),) * 2}, "tokens of a GPU are negative, too large"),
        ({"tokens_of_gpu_after": ((1, 2, 3, 4.5),) * 2}, "no whole number"),
        ({"tokens_of_gpu_after": (("1", "2", "3", "4"),) * 2}, "no whole number"),
        ({"replicas": (((0, 1, 2),),)}, "layers: 2, but replicas for 1"),
        ({"replicas": (((0, 1),),) * 2}, "a replica is not (slot, GPU, tokens)"),
        ({"replicas": (((8, 1, 2),),) * 2}, "a replica of slot 8 or on GPU 1, with 8 slots and 4 GPUs"),
        ({"replicas": (((0, 4, 2),),) * 2}, "a replica of slot 0 or on GPU 4"),
        ({"replicas": (((0, 1, -2),),) * 2}, "a replica is not (slot, GPU, tokens)"),
        ({"replicas": (7, 7)}, "damaged"),
        ({"tokens_of_gpu_before": (), "tokens_of_gpu_after": ()}, "with 8 slots and 0 GPUs"),
    ],
)
def test_a_damaged_step_is_refused_by_name(changed: dict[str, Any], wording: str) -> None:
    with pytest.raises(DistplbError, match=r"^log: the sampled step .* is damaged \(") as refused:
        Run("log", steps=(step(1), replace(step(20), **changed)))
    assert wording in str(refused.value)


def test_a_damaged_file_is_named(folder: Path) -> None:
    write(folder / "steps.jsonl", [step(110, replicas=(((9, 1, 2),),) * 2)])
    with pytest.raises(DistplbError, match=r"^run: the sampled step 110 is damaged"):
        Run.read(folder)
    (folder / "steps.jsonl").write_text('{"format": "distplb.step", "version": 2}\n')
    with pytest.raises(DistplbError, match=r"steps\.jsonl, line 1: "):
        Run.read(folder)


def test_steps_of_a_resumed_job_go_on_counting() -> None:
    first, second = steps(3), (step(1, started=2.0), step(21, started=2.0))
    found = sampled(Run("run", steps=(*second, *reversed(first), step(5, started=9.0))))
    assert found.at.tolist() == [10, 20, 30, 31, 51, 56]
    assert found.resumed_at == (31, 56)
    assert [one.started for one in found.events] == [1, 1, 1, 2, 2, 9]


def test_layers_may_differ_between_steps_and_from_those_of_rebalances() -> None:
    events = (step(1, layers=3), step(2, layers=1), step(3, layers=2))
    run = Run("run", (event(layers=1),), steps=events)
    found = sampled(run)
    assert found.layers == ("layers.0", "layers.1", "layers.2")
    assert list(zip(found.step.tolist(), found.layer.tolist(), strict=True)) == [
        (0, 0), (0, 1), (0, 2), (1, 0), (2, 0), (2, 1),
    ]  # fmt: skip
    assert run.layers == ("blocks.0.moe",)


def test_layers_without_tokens_are_in_no_mean() -> None:
    events = (step(1, imbalance_before=(None, 3.0), imbalance_after=(None, 1.5)), step(2, imbalance_before=(1.0, 2.0)))
    found = sampled(Run("run", steps=events))
    np.testing.assert_allclose(found.by_step[0], [3.0, 1.5])
    summary = Summary.of(Run("run", steps=events)).sampled
    assert summary is not None
    assert (summary.imbalance_before, summary.worst_before, summary.worst_after) == (2.0, 3.0, 1.5)


def test_the_summary_has_the_numbers_of_the_steps() -> None:
    summary = Summary.of(Run("run", steps=steps(4)))
    told = summary.as_json()["sampled"]
    assert told["num_steps"] == 4
    assert told["imbalance_before"] == pytest.approx(2 - 0.025)
    assert (told["worst_before"], told["worst_after"], told["imbalance_bound"]) == (1.99, 1.004, 1.0)
    assert (told["replicas"], told["bytes_inside"], told["bytes_between"]) == (2.0, 6e6, 0)
    assert told["share_replicas"] == pytest.approx(0.008 / 0.15)
    assert told["share_waiting"] == pytest.approx(0.012 / 0.15)
    facts = {fact.name: fact for fact in summary.facts(Run("run", steps=steps(4)))}
    assert facts["Imbalance of a step"].value == "1.97 → 1.004"
    assert facts["Worst step"].value == "1.99 → 1.004"
    assert facts["Model"] == ("Model", "2 MoE layers", "8 experts on 4 GPUs in 1 node")
    assert "Imbalance" not in facts, "no imbalance of windows was recorded"


@pytest.mark.parametrize(
    ("name", "wording"),
    [
        (
            "steps",
            "In 10 sampled steps replicas lowered the imbalance from 1.945 to 1.004 on average, and the worst from",
        ),
        ("one step", "In 1 sampled step replicas lowered"),
        (
            "steps without replicas",
            "In 10 sampled steps no replica was lent: the imbalance was 1.945 on average",
        ),
        ("even steps", "In 10 sampled steps replicas hardly changed the imbalance: 1.000 at home, 1.000 with them"),
        ("steps without tokens", "In 10 sampled steps no layer had tokens."),
        ("steps that name nothing", "In 1 sampled step no layer had tokens."),
        ("both", "In 10 sampled steps replicas lowered"),
    ],
)
def test_the_headline_tells_what_replicas_did(name: str, wording: str) -> None:
    headline = Summary.of(RUNS[name]).headline
    assert wording in headline
    assert headline.startswith(wording) == (name != "both")


def test_a_trace_takes_its_nodes_from_the_steps() -> None:
    assert Run("run", trace=trace(), steps=steps(num_nodes=2)).topology == Topology(2, 2)
    assert Run("run", trace=trace(gpus=2), steps=steps(num_nodes=2)).topology == Topology(1, 2)


def test_a_step_that_another_version_wrote_may_lack_fields() -> None:
    bare = StepEvent(step=1, started=0.0, layers=("a",), num_slots=8, num_nodes=1, replica_slots=2, seconds={"push": 1})
    assert len(sampled(Run("run", steps=(bare,))).step) == 0
