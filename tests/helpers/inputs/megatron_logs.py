"""Megatron-LM's logs, and replays."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from distplb import (
    Placement,
    Topology,
    Trace,
)
from distplb.core.price import MoveModel
from distplb.study.replay import replay
from inputs.case import Case, command

__all__ = ["CASES", "iterations", "line", "text_line"]


Rows = Sequence[Sequence[int]]


A, B, C, D = [10, 6], [3, 13], [5, 11], [7, 9]


def line(iteration: int, layer: int, rows: Rows) -> str:
    """Format a line as Megatron-LM's `ActivationLogger.save_tpe` writes it."""
    return json.dumps({"iter": iteration, "block": "decoder", "layer": layer, "tpe": rows}) + "\n"


def text_line(rank: int, iteration: int, layer: int, row: Sequence[int]) -> str:
    """Format a line as its unmerged revision wrote it, to one file for all ranks."""
    return f"Rank={rank} iter={iteration} layer={layer} tokens_per_expert={row}\n"


def read(*texts: str, show: Callable[[Trace], object] | None = None) -> Callable[[Path], object]:
    """Read Megatron-LM's files of ranks 0, 1, ...; show the load, unless `show` is given."""

    def run(folder: Path) -> object:
        for rank, text in enumerate(texts):
            (folder / f"rank{rank}.jsonl").write_text(text)
        trace = Trace.from_megatron(folder)
        return trace.load.tolist() if show is None else show(trace)

    return run


def read_text(text: str) -> Callable[[Path], object]:
    def run(folder: Path) -> object:
        (folder / "tokens_per_expert.log").write_text(text)
        return Trace.from_megatron(folder).load.tolist()

    return run


def iterations(trace: Trace) -> object:
    return f"iterations {trace.iteration.tolist()}"


def replayed(iteration: Sequence[int], every: int) -> Callable[[Path], object]:
    """Show where a planner is called, and on how many steps."""

    def run(folder: Path) -> object:
        lengths: list[int] = []
        steps = len(iteration)
        job = Trace(
            torch.ones(steps, 1, 2, dtype=torch.int64), (Placement.contiguous(1, 2, 1),), [0] * steps, iteration
        )

        def planner(load: torch.Tensor, current: Placement) -> Placement:
            lengths.append(len(load))
            return current

        outcome = replay(job, planner, topology=Topology(1, 1), every=every, model=MoveModel(1e-6, 1, 1e9, 1e9))
        return f"plans before steps {list(outcome.rebalance_steps)}, on {lengths} steps"

    return run


def command_replays(*words: object) -> Callable[[Path], object]:
    """Run `distplb replay` on four iterations of two micro-batches, 10 iterations apart."""

    def run(folder: Path) -> object:
        for rank in (0, 1):
            text = "".join(line(10 * at, 0, [[8 - at, at], [at, 8 - at]]) for at in range(1, 5))
            (folder / f"rank{rank}.jsonl").write_text(text)
        return command("replay", folder, "--engine", "reference", *words, show=lambda text: text.splitlines()[0])

    return run


CASES: list[Case] = [
    Case(
        "Megatron: two micro-batches, two ranks",
        "[[[10, 6, 5, 11]], [[3, 13, 7, 9]]]",
        read(line(1, 0, [A, B]), line(1, 0, [C, D])),
    ),
    Case(
        "Megatron: each micro-batch twice in a row",
        "[[[10, 6]], [[3, 13]]] [warning: rank0.jsonl: iterations in which each micro-batch is counted twice, as "
        "with activation recomputation: 1 of 1; each micro-batch is used once]",
        read(line(1, 0, [A, A, B, B])),
    ),
    Case(
        "Megatron: each micro-batch twice, as in a pipeline",
        "[[[10, 6]], [[3, 13]], [[5, 11]]] [warning: rank0.jsonl: iterations in which each micro-batch is counted "
        "twice, as with activation recomputation: 1 of 1; each micro-batch is used once]",
        read(line(1, 0, [A, B, A, C, B, C])),
    ),
    Case(
        "Megatron: one of two layers is recomputed",
        "[[[10, 6], [5, 11]], [[3, 13], [7, 9]]] [warning: rank0.jsonl: iterations in which each micro-batch is "
        "counted twice, as with activation recomputation: 1 of 1; each micro-batch is used once]",
        read(line(1, 0, [A, A, B, B]) + line(1, 1, [C, D])),
    ),
    Case(
        "Megatron: rows that are pairwise equal in one layer, but not in the other",
        "[[[10, 6], [10, 6]], [[10, 6], [3, 13]], [[3, 13], [5, 11]], [[3, 13], [7, 9]]]",
        read(line(1, 0, [A, A, B, B]) + line(1, 1, [A, B, C, D])),
    ),
    Case("Megatron: two micro-batches with equal counts", "[[[10, 6]], [[10, 6]]]", read(line(1, 0, [A, A]))),
    Case(
        "Megatron: a router that is forced to route evenly",
        "[[[4, 4]], [[4, 4]], [[4, 4]], [[4, 4]]]",
        read(line(1, 0, [[4, 4]] * 2) + line(2, 0, [[4, 4]] * 2)),
    ),
    Case(
        "Megatron: rank 1 died an iteration early",
        "iterations [1] [warning: left out 1 of 2 iterations: rank1.jsonl lacks iteration 2 of decoder.layers.0]",
        read(line(1, 0, [A]) + line(2, 0, [B]), line(1, 0, [C]), show=iterations),
    ),
    Case(
        "Megatron: rank 1 died in the middle of a line",
        "iterations [1] [warning: rank1.jsonl: line 2 (iteration 2) is truncated; left out 1 of 2 iterations: "
        "rank1.jsonl lacks iteration 2 of decoder.layers.0]",
        read(line(1, 0, [A]) + line(2, 0, [B]), line(1, 0, [C]) + line(2, 0, [D])[:45], show=iterations),
    ),
    Case(
        "Megatron: rank 0 died between two layers",
        "iterations [1] [warning: left out 1 of 2 iterations: rank0.jsonl lacks iteration 2 of decoder.layers.1]",
        read(line(1, 0, [A]) + line(1, 1, [B]) + line(2, 0, [C]), show=iterations),
    ),
    Case(
        "Megatron: the job died in the middle of a line, and continued on that line",
        "iterations [1, 2, 3] [warning: rank0.jsonl: line 2 (iteration 2) is truncated]",
        read(line(1, 0, [A]) + line(2, 0, [B])[:45] + line(2, 0, [C]) + line(3, 0, [D]), show=iterations),
    ),
    Case(
        "Megatron: a resumed job wrote iteration 2 again, with other counts",
        "[[[10, 6]], [[5, 11]], [[7, 9]]]",
        read(line(1, 0, [A]) + line(2, 0, [B]) + line(2, 0, [C]) + line(3, 0, [D])),
    ),
    Case(
        "Megatron: only rank 0 wrote iteration 2 again before the job died",
        "iterations [1] [warning: left out 1 of 2 iterations: rank1.jsonl or rank0.jsonl has iteration 2 from an "
        "earlier run of the job]",
        read(line(1, 0, [A]) + line(2, 0, [B]) + line(2, 0, [C]), line(1, 0, [A]) + line(2, 0, [B]), show=iterations),
    ),
    Case(
        "Megatron: the file of rank 0 is empty",
        "refused: rank0.jsonl has no complete line; pass files that have at least one",
        read("", line(1, 0, [A])),
    ),
    Case(
        "Megatron: ranks without a common iteration",
        "refused: rank1.jsonl lacks iteration 1 of decoder.layers.0, and no iteration is complete on all ranks; "
        "pass the files of one job and its pipeline_parallel",
        read(line(1, 0, [A]), line(2, 0, [A])),
    ),
    Case(
        "Megatron: a line of another kind of layer",
        "refused: rank0.jsonl, line 2 is not a line of tokens per expert (block is 'encoder'); remove what is "
        "damaged from the files of all ranks",
        read(line(1, 0, [A]) + line(2, 0, [A]).replace("decoder", "encoder")),
    ),
    Case(
        "Megatron: a negative count",
        "refused: rank0.jsonl, line 1 is not a line of tokens per expert (tpe has -2, but counts must be "
        "non-negative); remove what is damaged from the files of all ranks",
        read(line(1, 0, [[4, -2]])),
    ),
    Case(
        "Megatron: a line without counts",
        "refused: rank0.jsonl, line 1 is not a line of tokens per expert (it has no 'tpe'); remove what is damaged "
        "from the files of all ranks",
        read(line(1, 0, [A]).replace("tpe", "counts")),
    ),
    Case(
        "Megatron: tokens_per_expert.log of an earlier revision",
        "[[[10, 6, 5, 11]], [[3, 13, 7, 9]]]",
        read_text("".join(text_line(rank, 1, 0, row) for rank, row in ((1, C), (1, D), (0, A), (0, B)))),
    ),
    Case(
        "Megatron: tokens_per_expert.log without rank 0",
        "refused: tokens_per_expert.log has lines of rank 1, but not of rank 0; pass a log of all ranks",
        read_text(text_line(1, 1, 0, A)),
    ),
    Case(
        "Megatron: tokens_per_expert.log with a tensor",
        "refused: tokens_per_expert.log, line 1 is not a line of tokens per expert ('Rank=0 iter=1 layer=0 "
        "tokens_per_expert=tensor([1])'); remove what is damaged from the files of all ranks",
        read_text("Rank=0 iter=1 layer=0 tokens_per_expert=tensor([1])\n"),
    ),
    Case(
        "replay(every=3) of iterations of two steps",
        "plans before steps [4, 6], on [4, 2] steps",
        replayed([1, 1, 2, 2, 3, 3, 4, 4], 3),
    ),
    Case("replay(every=2) of one iteration of six steps", "plans before steps [], on [] steps", replayed([1] * 6, 2)),
    Case(
        "distplb replay --every 10 of iterations 10, 20, 30, 40",
        (
            "8 steps of 40 iterations, 1 layer of 4 experts on 2 GPUs (1 node × 2) [Hint: the GPUs are "
            "already balanced: the busiest has 0.0 % more than the mean, so there is nothing to gain]"
        ),
        command_replays("--every", 10),
    ),
    Case(
        "distplb replay --every 4 of the same",
        "exit 2: [Error: the trace has no step in 4 iterations; rebalance every 10 or more]",
        command_replays("--every", 4),
    ),
]
