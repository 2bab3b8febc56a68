"""Runs of every kind that a report must handle: events, traces, and missing parts of either.

Shapes: R rebalances, L layers, M GPUs, E experts, S steps.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from distplb import EventLog, Placement, RebalanceEvent, StepEvent, Topology, Trace
from distplb.report.run import Run

__all__ = [
    "EXPERTS",
    "HALF",
    "HOSTILE",
    "NOTHING",
    "RUNS",
    "event",
    "many_steps",
    "step",
    "steps",
    "trace",
    "with_holes",
    "write_folder",
]

EXPERTS = 8


def event(number: int = 1, layers: int = 2, gpus: int = 4, **changed: Any) -> RebalanceEvent:
    """Make the event of a rebalance that lowered GPU 0, the busiest, from 1.5 to 1.1 times the mean."""
    names = tuple(f"blocks.{layer}.moe" for layer in range(layers))
    before = ((600, *(400 - 200 // max(1, gpus - 1),) * (gpus - 1)),) * layers
    fields: dict[str, Any] = {
        "iteration": 10 * number,
        "layers": names,
        "decision": "moved",
        "reason": "the moves lower the cost by more than their price",
        "seconds": {"count": 0.25, "search": 1.5, "move": 0.5},
        "last_applied": 10 * number,
        "num_experts": EXPERTS,
        "num_nodes": 1,
        "steps": 10,
        "imbalance_before": (1.5,) * layers,
        "imbalance_after": (1.1,) * layers,
        "imbalance_bound": (1.0,) * layers,
        "imbalance_next": (1.2,) * layers,
        "tokens_of_gpu_before": before,
        "tokens_of_gpu_after": ((440,) * gpus,) * layers,
        "hottest_experts": (((3, 800), (1, 200)),) * layers,
        "slots_moved": 4,
        "bytes_inside": 3_000_000,
        "bytes_between": 1_000_000,
        "iteration_seconds": 0.5,
        "iteration_seconds_next": 0.4,
        "repaid": True,
    }
    return RebalanceEvent(**fields | changed)


SECONDS = {  # of a step, by part
    "count": 0.001,
    "waiting to count": 0.002,
    "split": 0.0005,
    "push": 0.003,
    "dispatch": 0.01,
    "experts": 0.04,
    "waiting": 0.004,
    "push again": 0.002,
    "experts backward": 0.08,
    "waiting backward": 0.006,
    "bring home": 0.0015,
}


def step(number: int = 10, layers: int = 2, gpus: int = 4, started: float = 1.0, **changed: Any) -> StepEvent:
    """Make a sampled step of 8 slots in which GPU 1 computed tokens of slot 0, and GPU 2 some of slot 1."""
    before = ((700, *(100,) * (gpus - 1)),) * layers
    fields: dict[str, Any] = {
        "step": number,
        "started": started,
        "layers": tuple(f"layers.{layer}" for layer in range(layers)),
        "num_slots": 8,
        "num_nodes": 1,
        "replica_slots": 2,
        "imbalance_before": (2.0 - number / 1000,) * layers,
        "imbalance_after": (1.004,) * layers,
        "imbalance_bound": (1.0,) * layers,
        "tokens_of_gpu_before": before,
        "tokens_of_gpu_after": ((sum(before[0]) // gpus,) * gpus,) * layers,
        "replicas": (((0, 1, 200), (1, 2, 100)) if gpus > 2 else (),) * layers,
        "bytes_inside": 6_000_000,
        "bytes_between": 0,
        "seconds": SECONDS,
    }
    return StepEvent(**fields | changed)


def steps(count: int = 10, **changed: Any) -> tuple[StepEvent, ...]:
    """Steps 10, 20, ..., of one start of a job."""
    return tuple(step(10 * number, **changed) for number in range(1, count + 1))


def many_steps(
    count: int, layers: int, slots: int, gpus: int, nodes: int = 1, started: float = 1.0, seed: int = 0
) -> tuple[StepEvent, ...]:
    """Steps of a large job: an expert that stays hot in each layer, others that are hot in one step."""
    random = np.random.default_rng(seed)
    names = tuple(f"model.layers.{layer}.mlp.experts" for layer in range(layers))
    hottest = random.integers(0, slots, layers)
    made = []
    for number in range(count):
        before = random.lognormal(0, 0.35, (layers, gpus)) * 1000
        after = np.full((layers, gpus), before.mean(1, keepdims=True)) * random.uniform(0.99, 1.004, (layers, gpus))
        before_tokens, after_tokens = before.astype(int), after.astype(int)
        levels, after_levels = (one.max(1) / one.mean(1) for one in (before_tokens, after_tokens))
        replicas = [
            [
                (int(slot), int(gpu), 100)
                for slot, gpu in zip(rows, random.permutation(gpus), strict=False)
                if slot * gpus // slots != gpu
            ]
            for rows in (
                {int(hottest[layer]), *random.integers(0, slots, min(slots, gpus, 40) // 2).tolist()}
                for layer in range(layers)
            )
        ]
        made.append(
            StepEvent(
                step=16 * number + 1,
                started=started,
                layers=names,
                num_slots=slots,
                num_nodes=nodes,
                replica_slots=2,
                imbalance_before=tuple(levels.tolist()),
                imbalance_after=tuple(after_levels.tolist()),
                imbalance_bound=(1.0,) * layers,
                tokens_of_gpu_before=tuple(map(tuple, before_tokens.tolist())),
                tokens_of_gpu_after=tuple(map(tuple, after_tokens.tolist())),
                replicas=tuple(map(tuple, replicas)),
                bytes_inside=10**9,
                bytes_between=10**7,
                seconds={name: value * float(random.uniform(0.9, 1.1)) for name, value in SECONDS.items()},
            )
        )
    return tuple(made)


def trace(
    steps: int = 24, layers: int = 2, experts: int = EXPERTS, gpus: int = 4, moved_at: int | None = None
) -> Trace:
    """Make a trace in which experts 0 and 1 are hot, and share a GPU until all slots shift by one at `moved_at`."""
    load = torch.full((steps, layers, experts), 10)
    load += torch.arange(steps)[:, None, None] % 3
    load[..., :2] *= 5
    placements = [Placement.contiguous(layers, experts, gpus)]
    if moved_at is not None:
        placements.append(Placement(placements[0].expert_of_slot.roll(1, dims=1), experts, gpus))
    index = torch.zeros(steps, dtype=torch.int64)
    index[moved_at or steps :] = 1
    return Trace(
        load, tuple(placements), index, torch.arange(1, steps + 1), tuple(f"blocks.{i}.moe" for i in range(layers))
    )


SKIPPED = RebalanceEvent(
    iteration=30, layers=("blocks.0.moe", "blocks.1.moe"), decision="skipped", reason="", seconds={}, last_applied=20
)
ZERO = {
    "tokens_of_gpu_before": ((0,) * 4,) * 2,
    "tokens_of_gpu_after": ((0,) * 4,) * 2,
    "hottest_experts": (((0, 0),),) * 2,
}
LEVELS = ("imbalance_before", "imbalance_after", "imbalance_bound")
HALF: dict[str, Any] = dict.fromkeys((*LEVELS, "imbalance_next"), (None, 1.5)) | {
    "tokens_of_gpu_before": ((0,) * 4, (600, 400, 200, 400)),
    "tokens_of_gpu_after": ((0,) * 4, (440.5, 400.5, 359, 400)),
    "hottest_experts": (((0, 0),), ((3, 800), (1, 200))),
}
NOTHING = replace(
    SKIPPED, decision="kept", iteration=20, num_experts=EXPERTS, num_nodes=1
)  # the event of a window without tokens

STEP_LEVELS = ("imbalance_before", "imbalance_after", "imbalance_bound")
NO_TOKENS: dict[str, Any] = dict.fromkeys(STEP_LEVELS, (None, None)) | {
    "tokens_of_gpu_before": ((0,) * 4,) * 2,
    "tokens_of_gpu_after": ((0,) * 4,) * 2,
    "replicas": ((), ()),
}
BARE: dict[str, Any] = {
    "step": 1,
    "started": 0.0,
    "layers": ("0",),
    "num_slots": 1,
    "num_nodes": 1,
    "replica_slots": 0,
    "seconds": {},
}  # the fields without a default


def with_holes(whole: Trace) -> Trace:
    """Remove all tokens of every second step, and of the first layer."""
    load = whole.load.clone()
    load[1::2], load[:, 0] = 0, 0
    return replace(whole, load=load)


HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=http://evil.example/x onerror=alert(1)>',
    "'onload='alert(1)",
    r"$\frac{1}{$ & ]]> --> {{ 7 * 7 }} {% raw %}",
    "</td></table><iframe src=//evil.example>",
    "nul\0 lone\ud800 back‮wards",
)

RUNS = {
    "nothing": Run("nothing"),
    "one event": Run("run", (event(),)),
    "one layer": Run("run", (event(layers=1), event(2, layers=1))),
    "one GPU": Run("run", (event(gpus=1, tokens_of_gpu_before=((9,),) * 2),)),
    "skipped alone": Run("run", (SKIPPED,)),
    "skipped between": Run("run", (event(1), SKIPPED, event(4))),
    "no tokens": Run("run", (event(**ZERO),)),
    "an older version's": Run(
        "run", (event(tokens_of_gpu_before=(), tokens_of_gpu_after=(), hottest_experts=(), num_experts=0),)
    ),
    "dry run": Run(
        "run", tuple(event(n, decision="dry run", slots_moved=0, bytes_inside=0, bytes_between=0) for n in (1, 2))
    ),
    "nothing is known of the next window": Run(
        "run", (event(imbalance_next=None, iteration_seconds_next=None, repaid=None),)
    ),
    "trace": Run("run", trace=trace(steps=6)),
    "trace of one step, layer and GPU": Run("run", trace=trace(steps=1, layers=1, gpus=1)),
    "trace without tokens": Run(
        "run", trace=replace(trace(steps=4), load=torch.zeros(4, 2, EXPERTS, dtype=torch.int64))
    ),
    "trace of steps and layers without tokens": Run("run", trace=with_holes(trace(steps=24))),
    "trace of one step with tokens": Run("run", trace=with_holes(trace(steps=2))),
    "moved, with steps and layers without tokens": Run("run", trace=with_holes(trace(steps=24, moved_at=12))),
    "a layer without tokens": Run("run", (event(**HALF), event(2, **HALF | {"imbalance_next": None}))),
    "a window without tokens follows": Run("run", (event(imbalance_next=(None, None)),)),
    "a window without tokens between": Run("run", (event(), NOTHING, event(3))),
    "windows without tokens alone": Run("run", (NOTHING,)),
    "trace on other GPUs": Run("run", trace=trace(steps=4), topology=Topology(2, 1)),
    "both": Run("run", (event(1), event(2)), trace(steps=20, moved_at=10), steps=steps()),
    "events and trace": Run("run", (event(1), event(2)), trace(steps=20, moved_at=10)),
    "steps": Run("run", steps=steps()),
    "one step": Run("run", steps=steps(1)),
    "steps on one GPU": Run("run", steps=steps(2, gpus=1, num_slots=1)),
    "steps of several starts": Run("run", steps=(*steps(), *steps(3, started=2.0, layers=1))),
    "steps without replicas": Run("run", steps=steps(replicas=((), ()), imbalance_after=(1.5, 1.5))),
    "even steps": Run("run", steps=steps(imbalance_before=(1.0, 1.0), imbalance_after=(1.0, 1.0))),
    "steps without tokens": Run("run", steps=steps(**NO_TOKENS)),
    "steps with a layer without tokens": Run("run", steps=steps(**dict.fromkeys(STEP_LEVELS, (None, 1.5)))),
    "steps without a time": Run("run", steps=steps(seconds={})),
    "steps without a backward": Run("run", steps=steps(seconds={"experts": 0.1, "waiting": 0.01})),
    "steps of other GPUs": Run("run", steps=(step(gpus=4), step(gpus=2, started=2.0))),
    "steps that name nothing": Run("run", steps=(StepEvent(**BARE),)),
    "steps without layers": Run("run", steps=(StepEvent(**BARE | {"layers": ()}),)),
    "steps beside others": Run(
        "run",
        steps=steps(),
        beside=(
            Run("forced", steps=steps(imbalance_before=(1.0, 1.0), replicas=((), ()))),
            Run("static", steps=steps(replicas=((), ()), seconds=SECONDS | {"experts": 0.03})),
        ),
    ),
    "both, all skipped": Run("run", (SKIPPED,), trace(steps=20)),
}


def write_folder(path: Path) -> Path:
    """Write a folder as a `Rebalancer` does: each event twice, complete the second time, and a part of a trace."""
    log = EventLog(path / "events.jsonl")
    for one in (event(1), event(2)):
        log(replace(one, imbalance_next=None))
        log(one)
    log.close()
    log = EventLog(path / "steps.jsonl")
    for one_step in steps():
        log(one_step)
    log.close()
    trace(steps=20, moved_at=10).save(path / "000000000001.npz")
    return path
