"""Steps and layers without tokens."""

from __future__ import annotations

import json
from collections.abc import Callable
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distplb import (
    EventLog,
    MoveModel,
    Placement,
    RebalanceEvent,
    TimeCurve,
    Topology,
    Trace,
    imbalance,
    lower_bound,
    read_events,
)
from distplb.core.balance import balancedness_sglang, balancedness_vllm, max_violation
from distplb.records.scalars import scalars
from distplb.report.run import Run
from distplb.report.summary import Summary
from distplb.study.replay import Replay, replay
from distplb.study.what_if import STEPS, Study
from inputs.case import Case, command

__all__ = ["CASES", "FOUR", "MODEL", "TWO", "cost_of", "replayed", "trace_of"]


TWO, FOUR = Topology(num_nodes=1, gpus_per_node=2), Topology(num_nodes=1, gpus_per_node=4)


ON_TWO = ("--gpus-per-node", 2, "--engine", "reference")


MODEL = MoveModel(seconds_per_token=1.0, bytes_per_slot=8, bandwidth_inside=8.0, bandwidth_between=8.0)


NOTHING = torch.zeros(3, 1, 4, dtype=torch.int64)


UNEVEN = [[60, 50, 20, 10]]  # of one layer; 1.5714 in order, 1.0000 at best


def steps(*counts: list[list[int]], empty: int = 0) -> Tensor:
    """Make a load `[T, L, E]` of these steps, followed by `empty` steps without tokens."""
    load = torch.tensor(counts)
    return torch.cat([load, load.new_zeros(empty, *load.shape[1:])])


def saved(folder: Path, load: Tensor, name: str = "counts.npy") -> Path:
    np.save(folder / name, load.numpy())
    return folder / name


def traced(folder: Path, load: Tensor) -> Path:
    trace_of(load).save(folder / "trace.npz")
    return folder / "trace.npz"


def trace_of(load: Tensor) -> Trace:
    number = torch.arange(len(load))
    placement = Placement.contiguous(load.shape[1], load.shape[2], num_gpus=2)
    return Trace(load, (placement,), torch.zeros_like(number), number)


def ring(filled: int, rows: int) -> Tensor:
    """Make a ring buffer `[T, 1, 4]` whose first rows are filled."""
    return steps(*[UNEVEN] * filled, empty=rows - filled)


def dense(layers: int, *without: int) -> Tensor:
    """Make a load `[1, L, 4]` in which some layers are dense, without tokens."""
    load = torch.tensor(UNEVEN * layers)[None]
    load[:, list(without)] = 0
    return load


def field(*names: str) -> Callable[[str], object]:
    """Show the value under these names in a JSON object."""

    def show(printed: str) -> object:
        value: Any = json.loads(printed)
        for name in names:
            value = value[int(name)] if isinstance(value, list) else value[name]
        return round(value, 4) if isinstance(value, float) else json.dumps(value)

    return show


def line_with(words: str) -> Callable[[str], object]:
    return lambda printed: next(line.strip() for line in printed.splitlines() if words in line)


def of_planner(name: str, which: str) -> Callable[[str], object]:
    def show(printed: str) -> object:
        row = next(row for row in json.loads(printed)["planners"] if row["planner"] == name)
        return round(row[which]["mean"], 4)

    return show


def replayed(load: Tensor, start: Placement | None = None, curve: TimeCurve | None = None) -> Replay:
    topology = Topology(1, 2 if start is None else start.num_gpus)
    return replay(
        trace_of(load), lambda load, current: current, topology=topology, every=1, model=MODEL, start=start, curve=curve
    )


def cost_of(outcome: Replay) -> str:
    busiest = outcome.busiest.sum().item()
    return f"busiest {busiest}, imbalance {outcome.mean_imbalance:.4f}, {outcome.compute_seconds} s"


def event_of(load: Tensor) -> RebalanceEvent:
    """Build the event of a rebalance on this window that moves no expert."""
    from distplb.migrate.transfer import MoveTotals
    from distplb.planning.options import PlanOptions
    from distplb.planning.plan import PlanResult
    from distplb.train.rebalance_event import Account
    from distplb.train.stop_loss import Pace

    _, layers, experts = load.shape
    there = Placement.contiguous(layers, experts, 2)
    account = Account(
        iteration=10,
        layers=tuple(str(layer) for layer in range(layers)),
        topology=TWO,
        old=there,
        planned=PlanResult(there, load, "reference"),
        target=there,
        left_alone=(False,) * layers,
        options=PlanOptions(current=there),
        model=None,
        pace=Pace(1.0, 0.0, 10),
        steps_until_next=10,
        router_ties=(None,) * layers,
        last_applied=0,
    )
    return account.event(MoveTotals(), "kept", "", {})


def written(event: RebalanceEvent, folder: Path) -> RebalanceEvent:
    log = EventLog(folder / "events.jsonl")
    log(event)
    log.close()
    return read_events(folder / "events.jsonl")[0]


def earlier_line(folder: Path) -> RebalanceEvent:
    """Read an event of a window with an empty layer, as earlier versions wrote it."""
    line = (
        '{"format": "distplb.event", "version": 1, "iteration": 500, "layers": ["0", "1"], "decision": "kept", '
        '"reason": "", "seconds": {}, "last_applied": 500, "steps": 4, "imbalance_before": [1.5, 1.0], '
        '"imbalance_after": [1.25, 1.0], "imbalance_bound": [1.0, 1.0], "tokens_of_gpu_before": [[3, 1], [0, 0]]}'
    )
    (folder / "events.jsonl").write_text(f"{line}\n")
    return read_events(folder / "events.jsonl")[0]


def moved_in_study(load: Tensor) -> str:
    (one,) = Study(trace_of(load), TWO, MODEL, engine="reference").run([(STEPS, 4)])
    return f"{one.rebalances} rebalances, imbalance {one.imbalance:.4f}, {one.static_seconds:.0f} s static"


CASES: list[Case] = [
    Case(
        "`imbalance` of tokens [100, 200] and of three empty steps, on 2 GPUs",
        "[1.3333, nan, nan, nan]",
        lambda _: [
            round(value, 4)
            for value in imbalance(steps([[100, 200]], empty=3), Placement.contiguous(1, 2, 2))[:, 0].tolist()
        ],
    ),
    Case(
        "`imbalance(...).nanmean()` of the same",
        "1.3333",
        lambda _: round(float(imbalance(steps([[100, 200]], empty=3), Placement.contiguous(1, 2, 2)).nanmean()), 4),
    ),
    Case(
        "`lower_bound` of the same",
        "[1.3333]",
        lambda _: [round(one, 4) for one in lower_bound(steps([[100, 200]], empty=3), TWO, 2).tolist()],
    ),
    Case(
        "`lower_bound` of two layers, of which the second never has tokens",
        "[1.0, nan]",
        lambda _: lower_bound(steps([[1, 1], [0, 0]], empty=3), TWO, 2).tolist(),
    ),
    Case(
        "`distplb plan` of [100, 200] and three empty steps: imbalance before",
        "1.3333",
        lambda folder: command(
            "plan", saved(folder, steps([[100, 200]], empty=3)), *ON_TWO, "--json", show=field("all_layers", "before")
        ),
    ),
    Case(
        "`distplb plan` of the same: its note",
        (
            "3 of 4 steps had no tokens and are left out. [Hint: there is one step: the plan is judged on the "
            "step it was made from; record more steps]"
        ),
        lambda folder: command(
            "plan", saved(folder, steps([[100, 200]], empty=3)), *ON_TWO, show=line_with("no tokens")
        ),
    ),
    Case(
        "`distplb plan` of a model with 61 layers, 3 of them dense: its note",
        (
            "3 of 61 layers had no tokens: 0, 1, 2; means are over the other 58. [Hint: there is one step: "
            "the plan is judged on the step it was made from; record more steps] [Hint: all 58 layers have "
            "the same counts: was one layer recorded for all of them?]"
        ),
        lambda folder: command("plan", saved(folder, dense(61, 0, 1, 2)), *ON_TWO, show=line_with("no tokens")),
    ),
    Case(
        "`distplb plan --json` of the same: mean imbalance before",
        "1.5714",
        lambda folder: command(
            "plan", saved(folder, dense(61, 0, 1, 2)), *ON_TWO, "--json", show=field("all_layers", "before")
        ),
    ),
    Case(
        "`distplb plan --json` of the same: imbalance of a dense layer",
        "null",
        lambda folder: command(
            "plan", saved(folder, dense(61, 0, 1, 2)), *ON_TWO, "--json", show=field("layers", "0", "before")
        ),
    ),
    Case(
        "`distplb plan` of counts that are all 0",
        "The load has no tokens, so all placements are equally good.",
        lambda folder: command("plan", saved(folder, NOTHING), *ON_TWO, show=line_with("no tokens")),
    ),
    Case(
        "`distplb compare` of a buffer of 1,000 rows, 60 of them filled: imbalance of `contiguous` on unseen steps",
        "1.5714",
        lambda folder: command(
            "compare", saved(folder, ring(60, 1000)), *ON_TWO, "--json", show=of_planner("contiguous", "unseen")
        ),
    ),
    Case(
        "`distplb compare` of the same: which steps are planned on and judged",
        '"planned on the first half (30 steps), unseen: the second half (30 steps)"',
        lambda folder: command("compare", saved(folder, ring(60, 1000)), *ON_TWO, "--json", show=field("judged")),
    ),
    Case(
        "`distplb compare` of counts that are all 0",
        "exit 2: [Error: counts.npy has no tokens, so all placements are equally good; pass counts of steps that ran]",
        lambda folder: command("compare", saved(folder, NOTHING), *ON_TWO),
    ),
    Case(
        "`distplb compare --unseen` with counts that are all 0",
        "exit 2: [Error: later.npy has no tokens, so all placements are equally good; pass counts of steps that ran]",
        lambda folder: command(
            "compare",
            saved(folder, ring(4, 4)),
            "--unseen",
            saved(folder, NOTHING, "later.npy"),
            *ON_TWO,
        ),
    ),
    Case(
        "`distplb replay` of a buffer of 400 rows, 24 of them filled: iterations that it covers",
        "24",
        lambda folder: command(
            *("replay", traced(folder, ring(24, 400)), "--every", 4, "--engine", "reference", "--json"),
            show=field("iterations"),
        ),
    ),
    Case(
        "`distplb replay` of the same: the answer",
        '"yes"',
        lambda folder: command(
            *("replay", traced(folder, ring(24, 400)), "--every", 4, "--engine", "reference", "--json"),
            *("--tokens-per-gpu", 1e9),
            show=field("verdict", "answer"),
        ),
    ),
    Case(
        "`distplb replay` of a trace without tokens",
        "exit 2: [Error: the trace has no tokens; pass the trace of a job that trains]",
        lambda folder: command("replay", traced(folder, NOTHING)),
    ),
    Case(
        "`replay` of [60, 50, 20, 10] and an empty step on 2 GPUs: totals",
        "busiest 110, imbalance 1.5714, 110.0 s",
        lambda _: cost_of(replayed(steps(UNEVEN, empty=1))),
    ),
    Case(
        "`replay` of an empty step, with a time curve in which an idle expert takes 30 ns: busiest GPU",
        "[0]",
        lambda _: replayed(steps(UNEVEN, empty=1), curve=TimeCurve((0, 10), (30, 100))).busiest[1].tolist(),
    ),
    Case(
        "`Study` of 24 filled rows: a rebalance every 4 iterations, planned on the steps",
        "5 rebalances, imbalance 1.0000, 2200 s static",
        lambda _: moved_in_study(ring(24, 24)),
    ),
    Case(
        "`Study` of a buffer of 400 rows, the same 24 of them filled",
        "5 rebalances, imbalance 1.0000, 2200 s static",
        lambda _: moved_in_study(ring(24, 400)),
    ),
    Case(
        "vLLM's and SGLang's balancedness of [[3, 1]] and an empty step, and MaxVio",
        "0.6667, 0.6667, 0.5000",
        lambda _: ", ".join(
            f"{one(steps([[3, 1]], empty=1)):.4f}" for one in (balancedness_vllm, balancedness_sglang, max_violation)
        ),
    ),
    Case(
        "the event of a window whose second layer has no tokens: imbalance before",
        "(1.5, None)",
        lambda folder: written(event_of(steps([[3, 1], [0, 0]], empty=1)), folder).imbalance_before,
    ),
    Case(
        "its scalar `imbalance/now`",
        "1.5",
        lambda _: scalars(event_of(steps([[3, 1], [0, 0]], empty=1)))["imbalance/now"],
    ),
    Case(
        "the event of a window without tokens: steps, imbalance before",
        "(0, ())",
        lambda folder: attrgetter("steps", "imbalance_before")(written(event_of(NOTHING), folder)),
    ),
    Case(
        "an event of an earlier version, with 1.0 for a layer without tokens: imbalance before",
        "(1.5, 1.0)",
        lambda folder: earlier_line(folder).imbalance_before,
    ),
    Case(
        "a report of a trace with 3 empty steps of 7: imbalance before",
        "1.5714",
        lambda _: round(Summary.of(Run("run", trace=trace_of(ring(4, 7)))).imbalance_before or 0, 4),
    ),
    Case(
        "the same: number of steps left out",
        "3",
        lambda _: Summary.of(Run("run", trace=trace_of(ring(4, 7)))).steps_without_tokens,
    ),
]
