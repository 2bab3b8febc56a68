"""Replicas through the adapters of torchtitan and transformers: tokens/s, imbalance of every step, peak memory.

    python -m benchmarks.integrations.bench_replicas --output benchmarks/results/DATE-adapter-replicas.md

Two ranks, one for each core, train four models in turns: without distplb, with homes that move, with replicas, and with
both. Four ranks tell the imbalance of every step, and what the fullest rank holds. With `--output`, the steps are also
drawn, to a PNG beside the report.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.figures import adapter_steps
from benchmarks.integrations.adapter_jobs import EVEN, EVERY, FRAMEWORKS, TEXT, Case, Method, imbalances, memory, times
from benchmarks.shared.processes import on_this_host, run_job
from benchmarks.shared.tables import command_line, header, markdown, progress, publish, verdict

MODULE, RANKS, CORES = "benchmarks.integrations.bench_replicas", 4, 2
SECONDS = 3600  # for one case
SLOTS, MIN_QUOTA = 2, 64
CAP = 1.02  # times the even share
ADDED = 0.005  # the most that a step with an even router may take longer
MEBIBYTE = 2**20
METHODS = [
    Method("static"),
    Method("homes", moves=True),
    Method("replicas", slots=SLOTS),
    Method("both", moves=True, slots=SLOTS),
    Method("both, min_quota", moves=True, slots=SLOTS, options={"min_quota": MIN_QUOTA}),
]
REPLICAS, BOTH = METHODS[2], METHODS[3]
ENOUGH = 6  # replica slots with which a step of UNEVEN can be even, which a cap needs
PEAKS = [METHODS[0], Method("replicas", slots=ENOUGH), Method(f"replicas, cap {CAP}", slots=ENOUGH, cap=CAP)]
# Sequences of a rank and width of the experts: those of the example, and sizes at which experts take longest.
SMALL = {"torchtitan": (4, 64), "transformers": (8, 128)}
LARGE = {"torchtitan": (16, 512), "transformers": (64, 1024)}
UNEVEN = "one-gpu-hot"
JOBS = {"times": times, "imbalances": imbalances, "memory": memory}
NOTE = (
    "The models of the two examples in float32, whose products torchtitan computes in bfloat16: 2 layers; torchtitan: "
    "64 experts, top 8; transformers: 16, top 2. `text` is their own router on the source of Python's library; other "
    f"workloads replace its choice: {UNEVEN} makes the experts of one GPU 8 times as popular, {EVEN} gives all experts "
    f"equally many tokens. Homes may move every {EVERY} iterations, and a GPU may hold {SLOTS} replicas. Replicas are "
    f"free; with `min_quota`, each computes at least {MIN_QUOTA} tokens."
)


def main() -> None:
    """Measure, print, and write the report if requested."""
    options = parsed_options()
    if options.job:
        run_job(options.job, job)
        return
    os.environ |= {"MALLOC_MMAP_THRESHOLD_": str(2**16), "MALLOC_TRIM_THRESHOLD_": "0"}  # for `memory`
    named = {"--pairs": options.pairs, "--added-pairs": options.added_pairs, "--steps": options.steps}
    command = command_line("integrations.bench_replicas", named)
    parts = [header("Replicas through the adapters", NOTE, command, "cpu")]
    parts += time_part(options.pairs)
    parts += added_part(options.added_pairs)
    parts += step_part(options.steps, options.output)
    parts += memory_part()
    progress("")
    publish("\n\n".join(parts), options.output)


def parsed_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Replicas through the adapters of torchtitan and transformers.")
    parser.add_argument("--pairs", type=int, default=60, help="iterations that are timed, of each method")
    parser.add_argument("--added-pairs", type=int, default=300, help="the same with an even router")
    parser.add_argument("--steps", type=int, default=60, help="whose imbalance is told")
    parser.add_argument("--job", type=Path, help="folder of a task, for the ranks of a job")
    parser.add_argument("--output", type=Path, help="also write the report to this file")
    return parser.parse_args()


def job(task: dict[str, Any]) -> dict[str, Any]:
    """Run one of JOBS on the ranks."""
    methods = [Method(**one) for one in task["methods"]]
    found: dict[str, Any] = JOBS[task["what"]](Case(**task["case"]), methods, task["steps"])
    return found


def measured(what: str, ranks: int, case: Case, methods: list[Method], steps: int) -> dict[str, Any]:
    """What one of JOBS returns, run on ranks of this host."""
    progress(f"{what}: {name_of(case)}")
    task = {"what": what, "case": asdict(case), "methods": [asdict(one) for one in methods], "steps": steps}
    found: dict[str, Any] = on_this_host(ranks, MODULE, task, seconds=SECONDS)
    return found


def name_of(case: Case) -> str:
    """In words.

    >>> name_of(Case("torchtitan", "text", 4, 64))
    'torchtitan, text, 4 sequences of a rank, experts 64 wide'
    """
    return f"{case.framework}, {case.workload}, {case.sequences} sequences of a rank, experts {case.hidden} wide"


def time_part(pairs: int) -> list[str]:
    """Tokens/s of the methods in each case."""
    parts = [
        f"## Tokens/s\n\n{CORES} ranks of one thread, {pairs} iterations of each method, in turns. Tokens/s of the "
        "median iteration. `of static` compares each iteration with that of `static` in the same turn: median, and "
        "quartiles in brackets; above 1 is faster."
    ]
    for framework in FRAMEWORKS:
        for workload, sizes in ((TEXT, SMALL), (TEXT, LARGE), (UNEVEN, LARGE)):
            case = Case(framework, workload, *sizes[framework])
            found = measured("times", CORES, case, METHODS, pairs)
            static = np.array(found["seconds"]["static"])
            lines = []
            for name, each in found["seconds"].items():
                low, middle, high = np.quantile(static / each, (0.25, 0.5, 0.75))
                rate = found["tokens"] / float(np.median(each))
                lines.append([name, f"{rate:.0f}", f"{middle:.3f}", f"[{low:.3f}, {high:.3f}]"])
            parts += [
                f"### {name_of(case)}",
                markdown(["method", "tokens/s", "of static", "[quartiles]"], lines),
            ]
    return parts


def added_part(pairs: int) -> list[str]:
    """What distplb adds to an iteration whose router is even."""
    lines = []
    for framework in FRAMEWORKS:
        for sizes in (SMALL, LARGE):
            case = Case(framework, EVEN, *sizes[framework])
            found = measured("times", CORES, case, [METHODS[0], REPLICAS], pairs)["seconds"]
            static, own = np.array(found["static"]), np.array(found[REPLICAS.name])
            added, (low, high) = float(np.median(own / static - 1)), sure_of(own / static - 1)
            cells = [f"{1e3 * np.median(static):.1f}", f"{added:+.2%}", f"[{low:+.2%}, {high:+.2%}]"]
            lines.append([name_of(case), *cells, verdict(added <= ADDED)])
    return [
        f"## What an even router costs\n\n{CORES} ranks, {pairs} pairs of iterations, `replicas` against `static`. No "
        "replica is lent; tokens are counted and split. `added` is the median over the pairs, with the interval in "
        f"which the median lies in 95 of 100 draws of the same pairs. Target: at most {ADDED:.1%}.",
        markdown(["case", "static, ms", "added", "[95 %]", "target"], lines),
    ]


def sure_of(ratios: np.ndarray) -> tuple[float, float]:
    """The interval that holds the median in 95 of 100 resamples."""
    drawn = np.random.default_rng(0).choice(ratios, (2000, len(ratios)))
    low, high = np.quantile(np.median(drawn, 1), (0.025, 0.975))
    return float(low), float(high)


def step_part(steps: int, output: Path | None) -> list[str]:
    """The imbalance of every step on four ranks, before replicas are lent and with them."""
    lines, drawn = [], {}
    for framework in FRAMEWORKS:
        for workload in (TEXT, UNEVEN):
            case = Case(framework, workload, *SMALL[framework])
            found = measured("imbalances", RANKS, case, [REPLICAS, BOTH], steps)
            drawn[f"{framework}, {workload}"] = found
            for name, each in found.items():
                before, after, replicas = np.array(each).T
                cells = [f"{of(one):.4f}" for one in (before, after) for of in (np.mean, np.max)]
                lines.append([f"{framework}, {workload}", name, *cells, f"{replicas.mean():.2f}"])
    head = ["case", "method", "before", "worst", "after", "worst", "replicas"]
    parts = [
        f"## Imbalance of every step\n\n{RANKS} ranks, {steps} steps, means over the layers of a step: busiest GPU / "
        "mean GPU in tokens, before replicas are lent and with them; `replicas` are those of a layer. `before` of "
        f"`{BOTH.name}` is what moved homes alone reach.",
        markdown(head, lines),
    ]
    if output is not None:
        figure = output.with_suffix(".png")
        adapter_steps.draw(drawn, figure)
        parts.append(f"![Imbalance of every step]({figure.name})")
    return parts


def memory_part(steps: int = 3) -> list[str]:
    """What the fullest rank of four holds."""
    lines = []
    for framework in FRAMEWORKS:
        sequences, hidden = LARGE[framework]
        case = Case(framework, UNEVEN, sequences, hidden)
        found = measured("memory", RANKS, case, PEAKS, steps)
        for name, peaks in found.items():
            told = [peaks, ""] if isinstance(peaks, str) else [f"{f(peaks) / MEBIBYTE:.0f}" for f in (max, min)]
            lines.append([name_of(case), name, *told])
    return [
        f"## Peak memory\n\n{RANKS} ranks, {steps} iterations: MiB that a rank holds at most beyond what it holds "
        "between iterations, on the fullest and on the emptiest rank, gloo's buffers included. A GPU may "
        f"hold {ENOUGH} replicas; the cap is {CAP} times the even share of a layer.",
        markdown(["case", "method", "fullest", "emptiest"], lines),
    ]


if __name__ == "__main__":
    main()
