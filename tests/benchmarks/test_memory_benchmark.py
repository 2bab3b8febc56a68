"""`bench_memory`: peaks from the allocator's events, the search for the largest batch, a small case on two ranks."""

from __future__ import annotations

import doctest
import math
from types import ModuleType
from typing import Any

import pytest
import torch
from benchmark_modules import imported

allocations, memory_steps = imported("shared.allocations"), imported("replicas.memory_steps")
bench_memory = imported("replicas.bench_memory")
Case, Method = memory_steps.Case, memory_steps.Method


@pytest.mark.parametrize("module", [allocations, memory_steps, bench_memory], ids=lambda module: module.__name__)
def test_examples_print_what_they_say(module: ModuleType) -> None:
    results = doctest.testmod(module)
    assert results.attempted
    assert not results.failed


def test_a_peak_counts_what_is_held_at_once_and_not_what_was_freed() -> None:
    with allocations.Allocations() as watched:
        held = torch.empty(10_000)
        with watched.window():
            for _ in range(3):  # 20,000 more at a time, not 60,000
                other = torch.empty(20_000)
                del other
        with watched.window():
            more = held.clone().add_(held)
        del more
    assert watched.peaks == [4 * 30_000, 4 * 20_000]


def event(time: float, address: int, size: int) -> dict[str, Any]:
    return {"name": allocations.MEMORY, "ts": time, "args": {"Addr": address, "Bytes": size}}


def test_memory_that_another_thread_freed_is_noticed_when_its_address_is_used_again() -> None:
    window = {"name": f"{allocations.WINDOW}1", "ts": 0.0, "dur": 10.0}
    large = event(1, 64, 1000)
    assert allocations.peaks_of([window, large, event(2, 128, 10), event(3, 128, 10)]) == [1010]
    with pytest.raises(AssertionError, match="1000 bytes were freed by threads that nobody watches"):
        allocations.peaks_of([window, large, event(2, 64, 1000)])


@pytest.mark.parametrize("budget", [5, 40, 1000.5, 10**6])
@pytest.mark.parametrize(
    "peak",
    [lambda batch: 20 + 3 * batch, lambda batch: batch**1.5, lambda batch: math.log(batch), lambda _: 17],
    ids=["line", "convex", "concave", "constant"],
)
def test_the_batch_that_is_found_fits_and_the_next_one_does_not(budget: float, peak: Any) -> None:
    tried = []

    def watched(batch: int) -> float:
        tried.append(batch)
        return float(peak(batch))

    batch = memory_steps.largest(budget, 200, watched)
    assert batch == 0 or peak(batch) <= budget
    assert batch == 200 or peak(batch + 1) > budget
    assert len(tried) == len(set(tried)) <= 16


def test_batches_that_are_refused_do_not_fit() -> None:
    assert memory_steps.largest(100, 200, lambda batch: math.inf if batch > 7 else 1) == 7
    assert memory_steps.largest(100, 200, lambda _: math.inf) == 0


def test_a_refusal_tells_the_least_cap_and_no_batch_is_found() -> None:
    one = {"batch": None, "tried": 8, "refused": [1.5, 1.4], "is_most": False}
    assert bench_memory.batch_cells(one, 100)[0] == "none"
    assert bench_memory.refusals(one) == "2 of 8; 1.400 × the even share"


@pytest.fixture(scope="module")
def small() -> dict[str, dict[str, Any]]:
    """Every method's largest batch for the busiest workload, on two ranks."""
    task = bench_memory.task_of(Case("one-gpu-hot"), bench_memory.METHODS) | {"budget": 5.0, "steps": 1, "most": 16}
    found = bench_memory.on_this_host(2, bench_memory.MODULE, task, seconds=bench_memory.SECONDS)
    assert isinstance(found, dict)
    return found


def test_the_cap_is_kept_and_the_batch_fits(small: dict[str, dict[str, Any]]) -> None:
    for name, one in small.items():
        batch = one["batch"]
        assert batch is not None, name
        assert max(batch["peaks"]) <= 5 * bench_memory.MEBIBYTE
        if "cap" in name:
            assert max(batch["busiest"]) <= 1 + memory_steps.ABOVE
    assert max(small["static"]["batch"]["busiest"]) > 1.5
    assert max(small["forced"]["batch"]["busiest"]) == 1
    assert small["priced replicas, cap"]["batch"]["replicas"] > 0
    assert small["priced replicas"]["batch"]["replicas"] == 0  # fewer tokens than a replica costs


def test_the_cap_makes_room_for_a_larger_batch(small: dict[str, dict[str, Any]]) -> None:
    tokens = {name: one["batch"]["tokens"] for name, one in small.items()}
    assert tokens["priced replicas, cap"] > tokens["priced replicas"] == tokens["static"]


def test_the_report_shows_every_method(small: dict[str, dict[str, Any]]) -> None:
    text = "\n".join(bench_memory.batch_part([(Case("one-gpu-hot"), small)], 5.0, 1))
    assert all(f"| {method.name} " in text for method in bench_memory.METHODS)


def test_steps_are_timed_in_turn() -> None:
    methods = [bench_memory.METHODS[0], bench_memory.METHODS[4]]
    task = bench_memory.task_of(Case("one-gpu-hot"), methods) | {"sequences": 4, "steps": 2}
    found = bench_memory.on_this_host(2, bench_memory.MODULE, task, seconds=bench_memory.SECONDS)
    assert all(len(one["seconds"]) == 2 for one in found.values())
    text = "\n".join(bench_memory.time_part([(Case("one-gpu-hot"), found)], 32, 2))
    assert "| static " in text
