"""Replicas and moving homes in torchtitan's own models on two ranks: the run with them is the run without.

Small, real torchtitan models with expert parallelism (EP) over two gloo processes. Most have experts that compute in
float64, so that the runs agree to nine digits; torchtitan's own grouped products round to bfloat16, and are compared
with an oracle in float64. Many runs share one start of the processes; each test checks its own part of the results.
"""

from __future__ import annotations

from typing import Any

import pytest
from ranks import on_ranks

from distplb import Spread

pytest.importorskip("torchtitan")

from titan_models import Job, meshes
from titan_runs import FAULTS, Left, broken, run, summary, without
from torchtitan.distributed.activation_checkpoint import FullAC, SelectiveAC

EP, TOLERANCE = 2, 1e-9
ITERATIONS, FEW = range(30), range(12)

# Name: options of the job, options of `rebalancer`. Each is compared with the run of the same job without both.
RUNS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "replicas alone": ({}, {"every": None}),
    "no bias": ({"bias": False}, {}),
    "full recomputation": ({"checkpointing": FullAC.Config()}, {}),
    "selective recomputation": ({"checkpointing": SelectiveAC.Config()}, {}),
    "remap": ({}, {"mode": "remap"}),
    "spread moves": ({}, {"spread": Spread(1, 2, move_seconds=1e-9)}),
    "micro-batches": ({"micro_batches": 2}, {}),
    "micro-batches, selective": ({"micro_batches": 2, "checkpointing": SelectiveAC.Config()}, {}),
    "groups in DTensors": ({"groups": 4}, {}),
    "gpt-oss": ({"gpt_oss": True}, {}),
    "kept": ({"checkpointing": FullAC.Config()}, {"replicas": {"keep": True}}),
    "sampled": ({}, {"replicas": {"sample_every": 1, "on_event": lambda _: None}}),
    "more slots than experts": ({}, {"replica_slots": 9}),
}
BACKEND = {"groups in DTensors": "full_dtensor"}
SHORT = ("micro-batches, selective", "kept", "sampled", "more slots than experts")  # of fewer iterations
# The job without a word that changes no value, so that runs share the one that they are compared with.
SAME_VALUES = ("checkpointing", "micro_batches")


def iterations(kind: str) -> range:
    return FEW if kind in SHORT else ITERATIONS


def job(kind: str, *, is_reference: bool = False) -> Job:
    options = RUNS[kind][0]
    if is_reference:
        options = {key: value for key, value in options.items() if key not in SAME_VALUES}
    return Job(meshes(EP, BACKEND.get(kind, "partial_dtensor")), steps=len(iterations(kind)), **options)


def compared() -> dict[str, Any]:
    found: dict[str, Any] = {}
    references: dict[str, Left] = {}
    for kind, (options, balanced) in RUNS.items():
        values = {key: value for key, value in options.items() if key not in SAME_VALUES}
        same = f"{values} {len(iterations(kind))}"
        if same not in references:
            references[same] = without(job(kind, is_reference=True), iterations(kind))
        found[kind] = summary(run(job(kind), iterations(kind), **balanced), references[same])
    plain = references[f"{{}} {len(ITERATIONS)}"]
    for fault in FAULTS:
        with broken(fault):
            found[fault] = summary(run(job("plain"), ITERATIONS), plain)
    dry = run(job("plain"), ITERATIONS, dry_run=True)
    found["dry run"] = summary(dry, plain)
    found["learned"] = sum(plain.losses[-5:]) / sum(plain.losses[:5])
    return found


@pytest.fixture(scope="module")
def found() -> list[dict[str, Any]]:
    """The results of each of two ranks."""
    return on_ranks(2, compared, deadline=300)


@pytest.mark.parametrize("kind", RUNS)
def test_a_run_with_replicas_and_moves_is_the_run_without(found: list[dict[str, Any]], kind: str) -> None:
    for rank in found:
        one = rank[kind]
        print(kind, one)
        assert rank["learned"] < 0.95
        assert one.lent > 0.5 * one.forwards
        assert (one.moved > 0) == (kind != "replicas alone")
        assert max(one.losses, one.gradients, one.state) <= TOLERANCE


@pytest.mark.parametrize("fault", FAULTS)
def test_the_comparison_notices(found: list[dict[str, Any]], fault: str) -> None:
    for rank in found:
        one = rank[fault]
        print(fault, one)
        assert min(one.losses, one.gradients, one.state) > 1e5 * TOLERANCE


def test_a_dry_run_lends_and_moves_nothing(found: list[dict[str, Any]]) -> None:
    for rank in found:
        one = rank["dry run"]
        assert one.forwards == 2 * len(ITERATIONS)
        assert (one.lent, one.losses, one.gradients, one.state) == (0, 0, 0, 0)
