"""Logs and records of jobs."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from distplb import (
    LoadWindow,
    MoELayer,
    Placement,
    RebalanceEvent,
    Rebalancer,
    Record,
    Search,
    Topology,
    Trace,
    TraceWriter,
    read_events,
)
from distplb.core.price import MoveModel
from distplb.study.replay import replay
from inputs.case import Case, command

__all__ = ["CASES", "line", "record", "text_line"]

Rows = Sequence[Sequence[int]]
A, B, C, D = [10, 6], [3, 13], [5, 11], [7, 9]


def line(iteration: int, layer: int, rows: Rows) -> str:
    """As Megatron-LM's `ActivationLogger.save_tpe` writes it."""
    return json.dumps({"iter": iteration, "block": "decoder", "layer": layer, "tpe": rows}) + "\n"


def text_line(rank: int, iteration: int, layer: int, row: Sequence[int]) -> str:
    """As it wrote it before it was merged, in one file of all ranks."""
    return f"Rank={rank} iter={iteration} layer={layer} tokens_per_expert={row}\n"


def record(iteration: int, **other: object) -> str:
    """A line of events.jsonl, without its end."""
    known = {"layers": ("moe",), "decision": "kept", "reason": "", "seconds": {}, "last_applied": iteration}
    return RebalanceEvent(iteration=iteration, **known | other).to_json()  # type: ignore[arg-type]


def read(*texts: str, show: Callable[[Trace], object] | None = None) -> Callable[[Path], object]:
    """Megatron-LM's files of ranks 0, 1, ...; the loads of all steps and layers where nothing else is to be shown."""

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


def events(text: str | bytes) -> Callable[[Path], object]:
    """The iterations of the records of a file."""

    def run(folder: Path) -> object:
        path = folder / "events.jsonl"
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return [event.iteration for event in read_events(path)]

    return run


def large(size: int) -> Callable[[Path], object]:
    """A file of so many bytes, which takes no room on the disk."""

    def run(folder: Path) -> object:
        with (folder / "events.jsonl").open("wb") as file:
            file.truncate(size)
        return read_events(folder / "events.jsonl")

    return run


def trace(folder: Path, *lives: Sequence[Sequence[int]], layers: Sequence[str] = ("moe",)) -> None:
    """Parts of a job, each of its lives with parts of these iterations; life 1 counts 1 token, life 2 has 2, ..."""
    for tokens, parts in enumerate(lives, start=1):
        with TraceWriter(folder, layers=layers) as writer:
            for part in parts:
                load = torch.full((len(part), len(layers), 2), tokens)
                writer.add(load, Placement.contiguous(len(layers), 2, 2), part)


def lives(*of_job: Sequence[Sequence[int]]) -> Callable[[Path], object]:
    def run(folder: Path) -> object:
        trace(folder, *of_job)
        found = Trace.read(folder)
        return f"iterations {found.iteration.tolist()} of lives {found.load[:, 0, 0].tolist()}"

    return run


def half_written(folder: Path) -> object:
    trace(folder, [[1], [2]])
    (folder / "000000000003.npz.77.tmp").write_bytes(b"PK half")
    return iterations(Trace.read(folder))


def damaged(folder: Path) -> object:
    trace(folder, [[1], [2]])
    path = folder / "000000000002.npz"
    path.write_bytes(path.read_bytes()[:100])
    return Trace.read(folder)


def mixed(folder: Path) -> object:
    trace(folder, [[1]])
    load = torch.ones(1, 1, 2, dtype=torch.int64)
    Trace(load, (Placement.contiguous(1, 2, 2),), [0], [5], ("other",)).save(folder / "5.npz")
    return Trace.read(folder)


def rebalancer(folder: Path) -> Rebalancer:
    """Of one layer "moe" with 4 experts on one GPU, recording in the folder."""
    experts = torch.nn.Parameter(torch.zeros(4, 1))
    layer = MoELayer(name="moe", experts={"w": experts}, router={"w": torch.zeros(4, 2)})
    return Rebalancer(
        [layer],
        torch.optim.SGD([experts]),
        topology=Topology(1, 1),
        every=2,
        window=LoadWindow(1, 4, 8),
        search=Search(engine="reference"),
        record=Record(folder),
    )


def recorded_beside(write: Callable[[Path], object]) -> Callable[[Path], object]:
    def run(folder: Path) -> object:
        write(folder)
        rebalancer(folder).close()
        return "goes on"

    return run


def of_other_experts(folder: Path) -> object:
    return trace(folder, [[1]])


def own_trace(folder: Path) -> object:
    with TraceWriter(folder, layers=["moe"]) as writer:
        writer.add(torch.ones(1, 1, 4, dtype=torch.int64), Placement.contiguous(1, 4, 1), [1])


def written(name: str, text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(text)


def replayed(iteration: Sequence[int], every: int) -> Callable[[Path], object]:
    """Where a planner is called, and how many steps it sees."""

    def run(folder: Path) -> object:
        seen: list[int] = []
        steps = len(iteration)
        job = Trace(
            torch.ones(steps, 1, 2, dtype=torch.int64), (Placement.contiguous(1, 2, 1),), [0] * steps, iteration
        )

        def planner(load: torch.Tensor, current: Placement) -> Placement:
            seen.append(len(load))
            return current

        found = replay(job, planner, topology=Topology(1, 1), every=every, model=MoveModel(1e-6, 1, 1e9, 1e9))
        return f"plans before steps {list(found.rebalance_steps)}, on {seen} steps"

    return run


def command_replays(*words: object) -> Callable[[Path], object]:
    """`distplb replay` of four iterations of two micro-batches, 10 iterations apart."""

    def run(folder: Path) -> object:
        for rank in (0, 1):
            text = "".join(line(10 * at, 0, [[8 - at, at], [at, 8 - at]]) for at in range(1, 5))
            (folder / f"rank{rank}.jsonl").write_text(text)
        return command("replay", folder, "--engine", "reference", *words, show=lambda told: told.splitlines()[0])

    return run


CASES: list[Case] = [
    # Megatron-LM's lines
    Case(
        "Megatron: two micro-batches, two ranks",
        "[[[10, 6, 5, 11]], [[3, 13, 7, 9]]]",
        read(line(1, 0, [A, B]), line(1, 0, [C, D])),
    ),
    Case(
        "Megatron: each micro-batch twice, one after the other",
        "[[[10, 6]], [[3, 13]]] [warning: rank0.jsonl: 1 of 1 iterations have each micro-batch's counts "
        "twice, as a job that recomputes activations writes them; each is used once]",
        read(line(1, 0, [A, A, B, B])),
    ),
    Case(
        "Megatron: each micro-batch twice, as in a pipeline",
        "[[[10, 6]], [[3, 13]], [[5, 11]]] [warning: rank0.jsonl: 1 of 1 iterations have each "
        "micro-batch's counts twice, as a job that recomputes activations writes them; each is used "
        "once]",
        read(line(1, 0, [A, B, A, C, B, C])),
    ),
    Case(
        "Megatron: one of two layers is recomputed",
        "[[[10, 6], [5, 11]], [[3, 13], [7, 9]]] [warning: rank0.jsonl: 1 of 1 iterations have each "
        "micro-batch's counts twice, as a job that recomputes activations writes them; each is used "
        "once]",
        read(line(1, 0, [A, A, B, B]) + line(1, 1, [C, D])),
    ),
    Case(
        "Megatron: rows that are twins in one layer, but not in the other",
        "[[[10, 6], [10, 6]], [[10, 6], [3, 13]], [[3, 13], [5, 11]], [[3, 13], [7, 9]]]",
        read(line(1, 0, [A, A, B, B]) + line(1, 1, [A, B, C, D])),
    ),
    Case("Megatron: two micro-batches with equal counts", "[[[10, 6]], [[10, 6]]]", read(line(1, 0, [A, A]))),
    Case(
        "Megatron: a router that is forced to be even",
        "[[[4, 4]], [[4, 4]], [[4, 4]], [[4, 4]]]",
        read(line(1, 0, [[4, 4]] * 2) + line(2, 0, [[4, 4]] * 2)),
    ),
    Case(
        "Megatron: rank 1 died an iteration early",
        "iterations [1] [warning: 1 of 2 iterations are left out: rank1.jsonl lacks iteration 2 of decoder.layers.0]",
        read(line(1, 0, [A]) + line(2, 0, [B]), line(1, 0, [C]), show=iterations),
    ),
    Case(
        "Megatron: rank 1 died in the middle of a line",
        "iterations [1] [warning: rank1.jsonl: line 2, of iteration 2, breaks off; 1 of 2 iterations "
        "are left out: rank1.jsonl lacks iteration 2 of decoder.layers.0]",
        read(line(1, 0, [A]) + line(2, 0, [B]), line(1, 0, [C]) + line(2, 0, [D])[:45], show=iterations),
    ),
    Case(
        "Megatron: rank 0 died between two layers",
        "iterations [1] [warning: 1 of 2 iterations are left out: rank0.jsonl lacks iteration 2 of decoder.layers.1]",
        read(line(1, 0, [A]) + line(1, 1, [B]) + line(2, 0, [C]), show=iterations),
    ),
    Case(
        "Megatron: the job died in the middle of a line, and went on there",
        "iterations [1, 2, 3] [warning: rank0.jsonl: line 2, of iteration 2, breaks off]",
        read(line(1, 0, [A]) + line(2, 0, [B])[:45] + line(2, 0, [C]) + line(3, 0, [D]), show=iterations),
    ),
    Case(
        "Megatron: a resumed job wrote iteration 2 again, with other counts",
        "[[[10, 6]], [[5, 11]], [[7, 9]]]",
        read(line(1, 0, [A]) + line(2, 0, [B]) + line(2, 0, [C]) + line(3, 0, [D])),
    ),
    Case(
        "Megatron: only rank 0 wrote iteration 2 again before the job died",
        "iterations [1] [warning: 1 of 2 iterations are left out: rank1.jsonl or rank0.jsonl has "
        "iteration 2 of an earlier life of the job]",
        read(line(1, 0, [A]) + line(2, 0, [B]) + line(2, 0, [C]), line(1, 0, [A]) + line(2, 0, [B]), show=iterations),
    ),
    Case(
        "Megatron: the file of rank 0 is empty",
        "refused: rank0.jsonl has no whole line; pass the files of ranks that have written some",
        read("", line(1, 0, [A])),
    ),
    Case(
        "Megatron: ranks without a common iteration",
        "refused: rank1.jsonl lacks iteration 1 of decoder.layers.0, and no iteration is whole on all "
        "ranks; pass the files of one job, and pipeline_parallel as in it",
        read(line(1, 0, [A]), line(2, 0, [A])),
    ),
    Case(
        "Megatron: a line of another kind of layer",
        "refused: rank0.jsonl, line 2 is not a line of tokens per expert (block is 'encoder'); cut off "
        "what is damaged, in the files of all ranks",
        read(line(1, 0, [A]) + line(2, 0, [A]).replace("decoder", "encoder")),
    ),
    Case(
        "Megatron: a negative count",
        "refused: rank0.jsonl, line 1 is not a line of tokens per expert (tpe has -2, and counts are "
        "non-negative); cut off what is damaged, in the files of all ranks",
        read(line(1, 0, [[4, -2]])),
    ),
    Case(
        "Megatron: a line without counts",
        "refused: rank0.jsonl, line 1 is not a line of tokens per expert (it has no 'tpe'); cut off what "
        "is damaged, in the files of all ranks",
        read(line(1, 0, [A]).replace("tpe", "counts")),
    ),
    Case(
        "Megatron: tokens_per_expert.log of an earlier revision",
        "[[[10, 6, 5, 11]], [[3, 13, 7, 9]]]",
        read_text("".join(text_line(rank, 1, 0, row) for rank, row in ((1, C), (1, D), (0, A), (0, B)))),
    ),
    Case(
        "Megatron: tokens_per_expert.log without rank 0",
        "refused: tokens_per_expert.log has no line of rank 0, but of rank 1; pass all ranks'",
        read_text(text_line(1, 1, 0, A)),
    ),
    Case(
        "Megatron: tokens_per_expert.log with a tensor",
        "refused: tokens_per_expert.log, line 1 is not a line of tokens per expert ('Rank=0 "
        "iter=1 layer=0 tokens_per_expert=tensor([1])'); cut off what is damaged, in the files of all ranks",
        read_text("Rank=0 iter=1 layer=0 tokens_per_expert=tensor([1])\n"),
    ),
    # Replays
    Case(
        "replay(every=3) of iterations of two steps",
        "plans before steps [4, 6], on [4, 2] steps",
        replayed([1, 1, 2, 2, 3, 3, 4, 4], 3),
    ),
    Case("replay(every=2) of one iteration of six steps", "plans before steps [], on [] steps", replayed([1] * 6, 2)),
    Case(
        "distplb replay --every 10 of iterations 10, 20, 30, 40",
        (
            "8 steps of 40 iterations, 1 layer of 4 experts on 2 GPUs (1 × 2) [Hint: the GPUs are even already: the "
            "fullest has 0.0 % more than the mean, so there is nothing to gain]"
        ),
        command_replays("--every", 10),
    ),
    Case(
        "distplb replay --every 4 of them",
        "exit 2: [Error: the trace has no step in 4 iterations; rebalance every 10 or more]",
        command_replays("--every", 4),
    ),
    # Records
    Case(
        "events: record 2 is cut off, with its line's end",
        "[1, 3, 4] [warning: events.jsonl: line 2 is not whole, and left out]",
        events(f"{record(1)}\n{record(2)[:90]}\n{record(3)}\n{record(4)}\n"),
    ),
    Case(
        "events: record 2 is cut off, 3 follows on its line",
        "[1, 3, 4] [warning: events.jsonl: line 2 is not whole, and left out]",
        events(f"{record(1)}\n{record(2)[:90]}{record(3)}\n{record(4)}\n"),
    ),
    Case("events: two whole records on one line", "[1, 2, 3]", events(f"{record(1)}\n{record(2)}{record(3)}\n")),
    Case(
        "events: zeros where a machine died",
        "[1, 2]",
        events(record(1).encode() + b"\n" + b"\0" * 9 + b"\n" + record(2).encode() + b"\n"),
    ),
    Case("events: a record with a field of a later version", "[1]", events(record(1)[:-1] + ', "colour": 3}\n')),
    Case(
        "events: a record of version 2",
        "refused: events.jsonl, line 1: it is 'distplb.event', version 2; this distplb reads "
        "distplb.event 1; pass a file that an EventLog wrote",
        events(record(1).replace('"version": 1', '"version": 2') + "\n"),
    ),
    Case(
        "events: a record without its decision",
        "refused: events.jsonl, line 1: it is not a rebalance's record (it lacks layers, decision, "
        "reason, seconds, last_applied); pass a file that an EventLog wrote",
        events('{"format": "distplb.event", "version": 1, "iteration": 1}\n'),
    ),
    Case(
        "events: an iteration in quotes",
        "refused: events.jsonl, line 1: it is not a rebalance's record (iteration is '1'); pass a file "
        "that an EventLog wrote",
        events(record(1).replace('"iteration": 1', '"iteration": "1"') + "\n"),
    ),
    Case("events: an empty file", "[]", events("")),
    Case(
        "events: a file of something else",
        "refused: events.jsonl, line 1: it is no line of JSON; pass a file that an EventLog wrote",
        events("iteration,decision\n1,moved\n"),
    ),
    Case(
        "events: a line of a gigabyte",
        "refused: events.jsonl, line 1 has more than 16777216 bytes; cut it off, or pass a file that an EventLog wrote",
        large(1 << 30),
    ),
    Case(
        "events: a file of 100 GB",
        "refused: events.jsonl has 100000000000 bytes, 1073741824 are allowed; pass a larger max_bytes if you trust it",
        large(100 * 10**9),
    ),
    # Folders
    Case(
        "trace: a resumed job that records again from iteration 3",
        "iterations [1, 2, 3, 4] of lives [1, 1, 2, 2]",
        lives([[1, 2], [3, 4], [5, 6]], [[3], [4]]),
    ),
    Case(
        "trace: a job that begins anew in its folder",
        "iterations [1, 2, 3] of lives [1, 2, 2]",
        lives([[1, 2], [3, 4]], [[2, 3]]),
    ),
    Case("trace: a part that is half written", "iterations [1, 2]", half_written),
    Case(
        "trace: a part that is cut off",
        "refused: 000000000002.npz cannot be read (File is not a zip file); pass a trace written by "
        "Trace.save or TraceWriter; or move 000000000002.npz away, to read the parts beside it",
        damaged,
    ),
    Case(
        "trace: parts of two jobs",
        "refused: 5.npz has other layers than 000000000001.npz; pass parts of one job, and of one stage of a pipeline",
        mixed,
    ),
    Case("record= a folder with a trace of this job", "goes on", recorded_beside(own_trace)),
    Case(
        "record= a folder with a trace of another job",
        "refused: record: 000000000001.npz is of another job: it has layers: 1 ('moe'), experts: 2, "
        "GPUs: 2; this one layers: 1 ('moe'), experts: 4, GPUs: 1; record in a folder of its own, or "
        "move the files away",
        recorded_beside(of_other_experts),
    ),
    Case(
        "record= a folder with events of another job",
        "refused: record: events.jsonl is of another job: it has layers ['a', 'b'], this one ['moe']; "
        "record in a folder of its own, or move the file away",
        recorded_beside(written("events.jsonl", record(1, layers=("a", "b")) + "\n")),
    ),
    Case(
        "record= a folder with another file events.jsonl",
        "refused: record: events.jsonl is no log of rebalances; record in a folder of its own, or move the file away",
        recorded_beside(written("events.jsonl", "a,b\n")),
    ),
]
