"""`bench_step`: its parts on one host, small."""

from __future__ import annotations

import pytest
from benchmark_modules import imported

bench_step, host_time = imported("replicas.bench_step"), imported("replicas.host_time")


def test_host_time_tells_plain_counting_from_even_steps_and_from_those_with_replicas(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(host_time, "STEPS", 3)
    found = host_time.host_time(2, 8)
    assert set(found) == {"plain", "even", "replicas"}
    assert min(found.values()) > 0


@pytest.mark.parametrize("hot", [False, True])
def test_a_small_size_is_measured_and_shown(hot: bool) -> None:
    task = {"size": (16, 8, 16), "hot": hot, "pairs": 2, "calls": 2}
    one = bench_step.on_this_host(bench_step.RANKS, bench_step.MODULE, task, seconds=bench_step.SECONDS)
    part = bench_step.uneven_part([one]) if hot else bench_step.balanced_part([one])
    assert "| 16 × 8 × 16" in "\n".join(part)
    assert any(one["replicas"]) == hot
