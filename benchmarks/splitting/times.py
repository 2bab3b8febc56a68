"""Times of decisions, of the public call, and of one GPU's sends and receives.

Shapes: E experts, M GPUs, G own slots on each GPU.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.shared.tables import markdown, progress, verdict
from benchmarks.splitting import baselines, methods, prices
from benchmarks.splitting.cases import IMBALANCES, SIZE, Case, law_case
from benchmarks.splitting.loads import Size, Step
from distplb.splitting import cpu
from distplb.splitting.routes import exchange_of
from distplb.splitting.rules import Rules
from distplb.splitting.split import split

__all__ = ["REPEATS", "Times", "fastest", "time_lines", "time_table", "times", "times_of"]

Ints = NDArray[np.int64]

REPEATS = 7  # of every timed call; the fastest counts
CHECKED, PUBLIC, EXCHANGE = "decision, with its check", "split()", "exchange_of()"
COLUMNS = (
    methods.DISTPLB,
    methods.THRESHOLD,
    methods.THRESHOLD_FIRST,
    CHECKED,
    PUBLIC,
    EXCHANGE,
    methods.PRICED,
)
MOST_MICROSECONDS = {CHECKED: 50, PUBLIC: 100}
STEPS = 8  # at most


@dataclass(frozen=True)
class Times:
    """Microseconds on a power law with R = 2, as medians over steps, by `COLUMNS`."""

    case: Case
    microseconds: dict[str, float]


def times(sizes: tuple[Size, ...], steps: int) -> list[Times]:
    """Time every power law at every size."""
    return [_timed(law_case(imbalance, size, min(steps, STEPS))) for size in sizes for imbalance in IMBALANCES]


def _timed(case: Case) -> Times:
    found: dict[str, list[float]] = {}
    for step in case.steps():
        progress(f"time of {case.text}")
        for name, microseconds in (times_of(case, step.counts.sum(0)) | _whole_times(case, step)).items():
            found.setdefault(name, []).append(microseconds)
    return Times(case, {name: float(np.median(each)) for name, each in found.items()})


def times_of(case: Case, tokens: Ints) -> dict[str, float]:
    """Microseconds of the compiled decisions on one step, from tokens to replicas."""
    cluster = case.cluster
    aim, lowest, gap = methods.level(case, tokens), methods.lowest_of(tokens, case), methods.gap_of(tokens, case)
    rules = Rules(case.slots, aim)
    own = partial(cpu.replicas, tokens, cluster.home, cluster.node)
    search = partial(baselines.threshold_replicas, tokens, cluster.home, cluster.node, case.slots)
    return {
        methods.DISTPLB: fastest(partial(own, rules)),
        methods.PRICED: fastest(partial(own, rules._replace(inside=round(prices.INSIDE)))),
        methods.THRESHOLD: fastest(partial(search, lowest, gap)),
        methods.THRESHOLD_FIRST: fastest(partial(search, aim, 1)),
    }


def _whole_times(case: Case, step: Step) -> dict[str, float]:
    """Microseconds of what a training step calls: the decision with its check, `split`, `exchange_of`."""
    cluster, tokens = case.cluster, step.counts.sum(0)
    rules = Rules(case.slots, methods.level(case, tokens))

    def decide() -> None:
        expert, part = cpu.replicas(tokens, cluster.home, cluster.node, rules)
        quota = cpu.quotas(tokens, cluster.home, expert, part)
        if not cpu.is_legal(step.counts, cluster.home, quota, expert):
            raise AssertionError("the engine's split is not legal")

    counts, home = torch.from_numpy(step.counts), torch.from_numpy(cluster.home)
    call = partial(split, counts, home, topology=case.topology, replica_slots=case.slots, engine="cpu")
    own = torch.arange(case.num_experts).view(case.topology.num_gpus, -1)  # [M, G], homes are contiguous
    exchange = partial(exchange_of, call(), case.topology, 0, own, engine="cpu")
    return {CHECKED: fastest(decide), PUBLIC: fastest(call), EXCHANGE: fastest(exchange)}


def fastest(call: Callable[[], object]) -> float:
    """Microseconds of the fastest of several calls, after one that may compile."""
    call()
    nanoseconds = []
    for _ in range(REPEATS):
        begin = time.perf_counter_ns()
        call()
        nanoseconds.append(time.perf_counter_ns() - begin)
    return min(nanoseconds) / 1000


def time_lines(found: list[Times]) -> list[list[str]]:
    """Format the targets, which are those of 64 GPUs and 256 experts."""
    lines = []
    for each in found:
        if each.case.num_experts > SIZE.experts:
            continue
        ratio = each.microseconds[methods.DISTPLB] / each.microseconds[methods.THRESHOLD]
        lines.append([each.case.text, f"decision ÷ {methods.THRESHOLD}", "≤ 1", f"{ratio:.2f}", verdict(ratio <= 1)])
        for name, limit in MOST_MICROSECONDS.items():
            reached = each.microseconds[name]
            lines.append([each.case.text, f"{name}, µs", f"≤ {limit}", f"{reached:.1f}", verdict(reached <= limit)])
    return lines


def time_table(found: list[Times]) -> str:
    """Format a row for each power law and size."""
    lines = [[each.case.text, *(f"{each.microseconds[name]:.0f}" for name in COLUMNS)] for each in found]
    return markdown(["µs", *COLUMNS], lines)
