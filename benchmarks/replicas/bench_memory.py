"""The largest batch that fits a given memory: static, with replicas, with a cap on a GPU's tokens, and forced.

    python -m benchmarks.replicas.bench_memory --output benchmarks/results/DATE-memory.md

Four ranks over gloo train the example's model on workloads whose loads are uneven, on one that is nearly even, and on
two nodes, where replicas cannot even out everything. A batch fits if no rank holds more than the budget in any step; it
does not fit if some step is refused because no split keeps the cap.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.replicas.memory_steps import SEQUENCE, SIZES, Case, Method, largest, measured, timed
from benchmarks.shared.processes import on_this_host, run_job
from benchmarks.shared.tables import command_line, header, markdown, progress, publish

MODULE, RANKS, CORES = "benchmarks.replicas.bench_memory", 4, 2
PRICE = 128  # tokens
MOST = 256  # sequences of a rank
MEBIBYTE = 2**20
SECONDS = 3600  # for one case
PRICED, COARSE = {"push_price": (PRICE, math.inf)}, {"min_quota": PRICE, "tolerance": 0.1}
METHODS = [
    Method("static", None),
    Method("replicas"),
    Method("replicas, cap", is_capped=True),
    Method("priced replicas", PRICED),
    Method("priced replicas, cap", PRICED, is_capped=True),
    Method("forced", None, is_forced=True),
]
MORE = [Method("coarse replicas", COARSE), Method("coarse replicas, cap", COARSE, is_capped=True)]  # in one case
CASES = [
    Case("bursts"),
    Case("rotating"),
    Case("one-gpu-hot"),
    Case("balanced"),
    Case("bursts", recompute=True),
    Case("one-gpu-hot", nodes=2),
]
TIMED = [Case("bursts"), Case("rotating"), Case("balanced")]
TEXT = (
    f"The model of examples/moe_model.py in float32: {SIZES['layers']} layers, {SIZES['experts']} experts of which a "
    f"token takes {SIZES['top_k']}, dim {SIZES['dim']}, ffn {SIZES['ffn']}, 2 replica slots, sequences of {SEQUENCE} "
    "tokens. Peaks are bytes of all tensors that a rank holds at once in any of the steps, by the allocator's events: "
    "weights, gradients, activations, replicas; no optimizer, no buffer of an all-reduce. `largest batch` is what a "
    "bisection finds, to one sequence: that batch fits the budget and the next one does not, which is the answer if "
    "peaks grow with the batch. `replicas` evens out to 0.5 % at no price; with `priced`, a replica costs "
    f"{PRICE} tokens; `coarse` has min_quota {PRICE} and tolerance 0.1. The cap is the batch's even share plus 2 %. "
    "`forced` gives every expert equally many tokens, which changes the model. Imbalance is busiest GPU / mean GPU in "
    "a layer and step; replicas are those of a layer and step. Counts and routes are drawn from seeds, so the figures "
    "do not depend on how busy the machine is, except for the seconds."
)


def main() -> None:
    """Measure, print, and write the report if requested."""
    options = parsed_options()
    if options.job:
        run_job(options.job, job)
        return
    task = {"budget": options.budget, "steps": options.steps, "most": MOST}
    batches, times = [], []
    for nth, case in enumerate(CASES):
        progress(f"batches, {name_of(case)}")
        methods = METHODS[:-1] + MORE * (nth == 0) + METHODS[-1:]
        batches.append((case, on_this_host(RANKS, MODULE, task_of(case, methods) | task, seconds=SECONDS)))
    for case in TIMED:
        progress(f"seconds, {name_of(case)}")
        timing = {"sequences": options.timed // SEQUENCE, "steps": options.pairs}
        times.append((case, on_this_host(CORES, MODULE, task_of(case, METHODS) | timing, seconds=SECONDS)))
    progress("")
    named = {"--budget": options.budget, "--steps": options.steps, "--timed": options.timed, "--pairs": options.pairs}
    top = header(
        "The largest batch that fits, with a cap on tokens and without",
        TEXT,
        command_line("replicas.bench_memory", named),
        "cpu",
    )
    parts = batch_part(batches, options.budget, options.steps) + time_part(times, options.timed, options.pairs)
    publish("\n\n".join([top, *parts]), options.output)


def parsed_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="The largest batch that fits, with a cap on tokens and without.")
    parser.add_argument("--budget", type=float, default=8.0, help="MiB of a rank")
    parser.add_argument("--steps", type=int, default=4, help="of which the worst has to fit")
    parser.add_argument("--timed", type=int, default=256, help="tokens of a rank in the steps that are timed")
    parser.add_argument("--pairs", type=int, default=16, help="steps that are timed, of each method")
    parser.add_argument("--job", type=Path, help="folder of a task, for the ranks of a job")
    parser.add_argument("--output", type=Path, help="also write the report to this file")
    return parser.parse_args()


def task_of(case: Case, methods: list[Method]) -> dict[str, Any]:
    """A case and its methods as JSON."""
    return {"case": asdict(case), "methods": [asdict(method) for method in methods]}


# --- on the ranks -------------------------------------------------------------------------------------------------


def job(task: dict[str, Any]) -> dict[str, Any]:
    """By method: the largest batch that fits; or seconds, if the task has no budget."""
    case, methods = Case(**task["case"]), [Method(**one) for one in task["methods"]]
    if "budget" not in task:
        return timed(case, methods, task["sequences"], task["steps"])
    return {method.name: fitting(case, method, task) for method in methods}


def fitting(case: Case, method: Method, task: dict[str, Any]) -> dict[str, Any]:
    """What was measured of the largest batch that fits (None if none does), and the refusals on the way to it."""
    tried: dict[int, dict[str, Any]] = {}

    def peak(sequences: int) -> float:
        tried[sequences] = one = measured(case, method, sequences, task["steps"])
        return math.inf if "refused" in one else float(max(one["peaks"]))

    batch = largest(task["budget"] * MEBIBYTE, task["most"], peak)
    refused = [one["refused"] for one in tried.values() if "refused" in one]
    return {"batch": tried.get(batch), "tried": len(tried), "refused": refused, "is_most": batch == task["most"]}


# --- the report ---------------------------------------------------------------------------------------------------


def name_of(case: Case) -> str:
    """In words.

    >>> name_of(Case("bursts", nodes=2, recompute=True))
    'bursts, two nodes, with recomputation'
    """
    return case.workload + ", two nodes" * (case.nodes > 1) + ", with recomputation" * case.recompute


def batch_part(found: list[tuple[Case, dict[str, Any]]], budget: float, steps: int) -> list[str]:
    """A table for each case."""
    head = ["method", "largest batch", "of static", "imbalance", "worst", "fullest, MiB", "emptiest, MiB", "replicas"]
    parts = [f"## Largest batch in {budget:g} MiB\n\n{RANKS} ranks, {steps} steps; batches in tokens of a rank."]
    for case, methods in found:
        static = methods["static"]["batch"]
        lines = [
            [name, *batch_cells(one, None if static is None else static["tokens"]), refusals(one)]
            for name, one in methods.items()
        ]
        parts += [f"### {name_of(case)}", markdown([*head, "refused"], lines)]
    parts.append(
        "`refused`: of the batches tried, those with a step that no split kept under the cap; the least cap of such a "
        "step."
    )
    return parts


def batch_cells(one: dict[str, Any], static: int | None) -> list[str]:
    """The largest batch, and what was measured of it."""
    batch = one["batch"]
    if batch is None:
        return ["none", *["–"] * 6]
    peaks = [of_rank / MEBIBYTE for of_rank in batch["peaks"]]
    return [
        "at least " * one["is_most"] + str(batch["tokens"]),
        "–" if static is None else f"{batch['tokens'] / static - 1:+.1%}",
        f"{np.mean(batch['busiest']):.3f}",
        f"{max(batch['busiest']):.3f}",
        f"{max(peaks):.2f}",
        f"{min(peaks):.2f}",
        f"{batch['replicas']:.2f}",
    ]


def refusals(one: dict[str, Any]) -> str:
    """How many batches were refused, and the least cap that their steps needed, over the even share."""
    if not one["refused"]:
        return f"0 of {one['tried']}"
    return f"{len(one['refused'])} of {one['tried']}; {min(one['refused']):.3f} × the even share"


def time_part(found: list[tuple[Case, dict[str, Any]]], tokens: int, steps: int) -> list[str]:
    """A table for each case that was timed."""
    parts = [
        f"## What a cap costs in time\n\n{CORES} ranks, one for each core, {tokens} tokens of a rank, {steps} steps, "
        "all methods in turn. Milliseconds of a step, of its slowest rank: median and quartiles. `of static` "
        "compares step with step: median."
    ]
    for case, methods in found:
        static = methods["static"]["seconds"]
        lines = []
        for name, one in methods.items():
            if "refused" in one:
                lines.append([name, f"refused: needs {one['refused']:.3f} × the even share", *["–"] * 4])
                continue
            low, middle, high = (f"{1e3 * float(np.quantile(one['seconds'], q)):.1f}" for q in (0.25, 0.5, 0.75))
            change = float(np.median(np.divide(one["seconds"], static))) - 1
            imbalance = [f"{np.mean(one['busiest']):.3f}", f"{max(one['busiest']):.3f}"]
            lines.append(
                [name, f"{middle} [{low}, {high}]", f"{change:+.1%}", *imbalance, f"{np.mean(one['lent']):.2f}"]
            )
        head = ["method", "step, ms", "of static", "imbalance", "worst", "replicas"]
        parts += [f"### {name_of(case)}", markdown(head, lines)]
    return parts


if __name__ == "__main__":
    main()
