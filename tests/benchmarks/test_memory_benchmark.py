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


NEVER_PAYS = {"push_price": (10**6, math.inf)}
METHODS = [
    Method("static", None),
    Method("priced", NEVER_PAYS),
    Method("priced, cap", NEVER_PAYS, is_capped=True),
]
BUDGET = 12.0  # MiB


@pytest.fixture(scope="module")
def small() -> dict[str, dict[str, Any]]:
    """Every method's largest batch in a step with a burst."""
    task = bench_memory.task_of(Case("bursts"), METHODS) | {"budget": BUDGET, "steps": 1, "most": 256}
    found = bench_memory.on_this_host(2, bench_memory.MODULE, task, seconds=bench_memory.SECONDS)
    assert isinstance(found, dict)
    return found


def test_the_cap_is_kept_and_the_batch_fits(small: dict[str, dict[str, Any]]) -> None:
    for name, one in small.items():
        batch = one["batch"]
        assert batch is not None, name
        assert max(batch["peaks"]) <= BUDGET * bench_memory.MEBIBYTE
        if "cap" in name:
            assert max(batch["busiest"]) <= 1 + memory_steps.ABOVE
    assert max(small["static"]["batch"]["busiest"]) > 1.3
    assert small["priced, cap"]["batch"]["replicas"] > 0
    assert small["priced"]["batch"]["replicas"] == 0


def test_the_cap_makes_room_for_a_larger_batch(small: dict[str, dict[str, Any]]) -> None:
    tokens = {name: one["batch"]["tokens"] for name, one in small.items()}
    assert tokens["priced, cap"] > tokens["priced"] == tokens["static"]


def test_the_report_shows_every_method(small: dict[str, dict[str, Any]]) -> None:
    text = "\n".join(bench_memory.batch_part([(Case("bursts"), small)], BUDGET, 1))
    assert all(f"| {method.name} " in text for method in METHODS)


def test_steps_are_timed_in_turn_until_they_are_refused() -> None:
    forced = Method("forced", None, is_forced=True)
    slotless = Method("without slots, cap", {"push_price": (math.inf, math.inf)}, is_capped=True)
    task = bench_memory.task_of(Case("bursts"), [METHODS[0], forced, slotless]) | {"sequences": 16, "steps": 2}
    found = bench_memory.on_this_host(2, bench_memory.MODULE, task, seconds=bench_memory.SECONDS)
    assert [len(one["seconds"]) for one in found.values()] == [2, 2, 0]
    assert max(found["forced"]["busiest"]) == 1
    assert found["without slots, cap"]["refused"] > 1 + memory_steps.ABOVE
    text = "\n".join(bench_memory.time_part([(Case("bursts"), found)], 64, 2))
    assert "refused: needs 1." in text
