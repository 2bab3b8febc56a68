"""Replicas and moving homes in torchtitan's own models on four ranks: with FSDP2, HSDP, tensor parallelism, pipelines.

As in test_torchtitan_replicas.py, each run is compared with that of the same job without replicas and moves.
"""

from __future__ import annotations

from typing import Any

import pytest
from ranks import on_ranks

pytest.importorskip("torchtitan")

from titan_models import Job, PipelineJob, meshes
from titan_runs import FAULTS, Left, broken, lent_job, run, summary, without
from torch.distributed.pipelining.schedules import (
    Schedule1F1B,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
)
from torchtitan.distributed.activation_checkpoint import FullAC, SelectiveAC

from distplb import Spread
from distplb.errors import DistplbError

TOLERANCE = 1e-9
ITERATIONS, FEW = range(30), range(12)
FULL, SELECTIVE = {"checkpointing": FullAC.Config()}, {"checkpointing": SelectiveAC.Config()}

# Name: degrees of the meshes, options of the job, iterations.
LAYOUTS: dict[str, tuple[dict[str, int], dict[str, Any], range]] = {
    "FSDP2, dim 0": ({"ep": 2}, {}, ITERATIONS),
    "FSDP2, dim 1": ({"ep": 2}, {"dim_1": True}, ITERATIONS),
    "HSDP": ({"ep": 2, "replicate": 2}, {}, ITERATIONS),
    "FSDP2, dim 0, selective": ({"ep": 2}, SELECTIVE, FEW),
    "FSDP2, dim 1, full": ({"ep": 2}, {"dim_1": True} | FULL, FEW),
    "one expert on a GPU": ({"ep": 4}, {"num_experts": 4}, FEW),
    "TP 2": ({"ep": 4, "tp": 2}, {}, FEW),
    "FSDP2, dim 1, full, all options": ({"ep": 2}, {"dim_1": True} | FULL, FEW),
    "FSDP2, dim 0, selective, all options": ({"ep": 2}, SELECTIVE, FEW),
}
# Options that other runs turn on one at a time: moves spread over iterations, every step sampled, and a cap or a quota.
SAMPLED: dict[str, Any] = {"on_event": lambda _: None, "sample_every": 1}
TOGETHER: dict[str, dict[str, Any]] = {
    "FSDP2, dim 1, full, all options": {"spread": Spread(1, 2), "replicas": SAMPLED | {"max_tokens_per_gpu": 10**6}},
    "FSDP2, dim 0, selective, all options": {
        "spread": Spread(1, 2),
        "replicas": SAMPLED | {"keep": True, "min_quota": 2},
    },
}
SCHEDULES: dict[str, tuple[Any, int, dict[str, Any]]] = {
    "1F1B": (Schedule1F1B, 1, {}),
    "interleaved 1F1B": (ScheduleInterleaved1F1B, 2, {}),
    "interleaved 1F1B, full": (ScheduleInterleaved1F1B, 2, FULL),
    "zero bubble": (ScheduleInterleavedZeroBubble, 2, {}),
}
RUNS = [*LAYOUTS, *SCHEDULES]


def sharded() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, (degrees, options, iterations) in LAYOUTS.items():
        dims = meshes(**degrees)
        steps, other = len(iterations), {key: value for key, value in options.items() if key != "checkpointing"}
        reference = without(Job(dims, steps=steps, batch=8, **other), iterations)
        job = Job(dims, steps=steps, batch=8, **options)
        found[name] = summary(run(job, iterations, **TOGETHER.get(name, {})), reference)
    for fault in FAULTS:
        with broken(fault):
            found[fault] = summary(run(Job(meshes(ep=4, tp=2), steps=len(FEW), batch=8), FEW), reference)
    return found


def pipelined(name: str) -> PipelineJob:
    schedule, loops, options = SCHEDULES[name]
    # In its first iteration torch sends memory that was never written through each stage, to learn shapes. torchtitan
    # counts those tokens too, so that a loss-free bias differs between two runs without distplb.
    return PipelineJob(meshes(ep=2, pp=2), schedule, loops, steps=len(FEW), batch=16, bias=False, **options)


def in_a_pipeline() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in SCHEDULES:
        reference = without(pipelined(name), FEW)
        said = ""
        if "zero" in name:
            try:
                lent_job(pipelined(name), Left())
            except DistplbError as error:
                said = str(error)
        found[name] = summary(run(pipelined(name), FEW, **({"pp_schedule": None} if said else {})), reference)
        found[name].said = said
        if name == "1F1B":
            with broken("gradients stay away"):
                found["gradients stay away"] = summary(run(pipelined(name), FEW), reference)
    return found


@pytest.fixture(scope="module")
def found() -> list[dict[str, Any]]:
    """The results of each of four ranks."""
    return on_ranks(4, sharded, deadline=300)


@pytest.fixture(scope="module")
def pipeline() -> list[dict[str, Any]]:
    return on_ranks(4, in_a_pipeline, deadline=300)


def check(one: Any, *, moves: bool = True) -> None:
    print(one)
    assert one.lent > 0.5 * one.forwards
    assert (one.moved > 0) == moves
    assert max(one.losses, one.gradients, one.state) <= TOLERANCE


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_sharded_run_with_replicas_and_moves_is_the_run_without(found: list[dict[str, Any]], layout: str) -> None:
    for rank in found:
        check(rank[layout], moves=layout != "one expert on a GPU")  # every placement is as good as another


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_pipelined_run_with_replicas_and_moves_is_the_run_without(
    pipeline: list[dict[str, Any]], schedule: str
) -> None:
    for rank in pipeline:
        check(rank[schedule])


@pytest.mark.parametrize("fault", FAULTS)
def test_the_comparison_notices_in_a_sharded_run(found: list[dict[str, Any]], fault: str) -> None:
    for rank in found:
        one = rank[fault]
        assert min(one.losses, one.gradients, one.state) > 1e5 * TOLERANCE


def test_the_comparison_notices_in_a_pipeline(pipeline: list[dict[str, Any]]) -> None:
    for rank in pipeline:
        one = rank["gradients stay away"]
        assert min(one.losses, one.gradients, one.state) > 1e5 * TOLERANCE


def test_a_zero_bubble_schedule_is_refused_before_training(pipeline: list[dict[str, Any]]) -> None:
    for rank in pipeline:
        assert rank["zero bubble"].said.startswith("the pipeline schedule, ScheduleInterleavedZeroBubble, computes")
