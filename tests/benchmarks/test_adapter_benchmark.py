"""`bench_replicas` of the adapters: the workload is what the ranks count, whatever homes moved; its arithmetic."""

from __future__ import annotations

import doctest
import os
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from benchmark_modules import imported
from ranks import on_ranks

adapter_jobs, bench_replicas = imported("integrations.adapter_jobs"), imported("integrations.bench_replicas")
Case, Method = adapter_jobs.Case, adapter_jobs.Method
BOTH = Method("both", moves=True, slots=2)
STEPS = 7  # homes move after the fifth


def test_examples_print_what_they_say() -> None:
    results = doctest.testmod(bench_replicas)
    assert results.attempted
    assert not results.failed


def steps_of(framework: str) -> dict[str, Any]:
    os.environ |= dict.fromkeys(["WORLD_SIZE", "LOCAL_WORLD_SIZE"], str(dist.get_world_size()))  # as torchrun does
    sequences, hidden = bench_replicas.SMALL[framework]
    found = {}
    for workload in (adapter_jobs.EVEN, bench_replicas.UNEVEN):
        told: list[Any] = []
        training = adapter_jobs.Training(Case(framework, workload, sequences, hidden), BOTH, told.append)
        before = training.job.rebalancer.placement.expert_of_slot
        for _ in range(STEPS + 1):
            training.train()
        placements = [before] * adapter_jobs.EVERY + [training.job.rebalancer.placement.expert_of_slot] * STEPS
        expected = []
        for step in range(STEPS):
            counts = torch.zeros(placements[step].shape, dtype=torch.int64)  # [L, P], of the expert of each slot
            for layer, experts in enumerate(placements[step]):
                training.iteration = step + 1
                shape = (training.tokens, training.framework.top_k, training.framework.experts)
                chosen = training._choice(layer, shape).flatten().bincount(minlength=shape[2])
                counts[layer] = chosen[experts]
            dist.all_reduce(counts)
            expected.append(counts.unflatten(1, (dist.get_world_size(), -1)).sum(-1).tolist())
        found[workload] = {
            "moved": not torch.equal(before, placements[-1]),
            "counted": [[list(gpus) for gpus in one.tokens_of_gpu_before] for one in told[:STEPS]],
            "expected": expected,
            "lowered": [one.imbalance_before[0] - one.imbalance_after[0] for one in told[:STEPS]],
        }
        del training
    return found


@pytest.mark.parametrize("framework", adapter_jobs.FRAMEWORKS)
def test_ranks_count_the_workload_before_and_after_homes_move(framework: str) -> None:
    found = on_ranks(2, steps_of, framework, deadline=200)[0]
    even, uneven = found[adapter_jobs.EVEN], found[bench_replicas.UNEVEN]
    assert all(len(set(gpus)) == 1 for step in even["counted"] for gpus in step)
    assert not even["moved"]
    assert uneven["moved"]
    assert uneven["counted"] == uneven["expected"]
    assert uneven["counted"][0] != uneven["counted"][-1]
    assert min(uneven["lowered"][:5]) > 0.1


def test_the_interval_of_a_median_holds_it_and_shrinks_with_more_pairs() -> None:
    drawn = np.random.default_rng(1).normal(0.01, 0.05, 4000)
    (low, high), (lower, higher) = bench_replicas.sure_of(drawn), bench_replicas.sure_of(drawn[:40])
    assert lower < low < np.median(drawn) < high < higher
    assert high - low < 0.005
