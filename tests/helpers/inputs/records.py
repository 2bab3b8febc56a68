"""Events, traces, and folders that a job records to."""

from __future__ import annotations

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
from inputs.case import Case
from inputs.megatron_logs import iterations

__all__ = ["CASES"]


def record(iteration: int, **other: object) -> str:
    """Format a line of events.jsonl, without the newline."""
    known = {"layers": ("moe",), "decision": "kept", "reason": "", "seconds": {}, "last_applied": iteration}
    return RebalanceEvent(iteration=iteration, **known | other).to_json()  # type: ignore[arg-type]


def events(text: str | bytes) -> Callable[[Path], object]:
    """Read a file of events, and show their iterations."""

    def run(folder: Path) -> object:
        path = folder / "events.jsonl"
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return [event.iteration for event in read_events(path)]

    return run


def large(size: int) -> Callable[[Path], object]:
    """Read a sparse file of this many bytes, which takes no space on the disk."""

    def run(folder: Path) -> object:
        with (folder / "events.jsonl").open("wb") as file:
            file.truncate(size)
        return read_events(folder / "events.jsonl")

    return run


def trace(folder: Path, *lives: Sequence[Sequence[int]], layers: Sequence[str] = ("moe",)) -> None:
    """Write a job's trace: for each of its runs, parts with these iterations. Run n counts n tokens per expert."""
    for tokens, parts in enumerate(lives, start=1):
        with TraceWriter(folder, layers=layers) as writer:
            for part in parts:
                load = torch.full((len(part), len(layers), 2), tokens)
                writer.add(load, Placement.contiguous(len(layers), 2, 2), part)


def lives(*of_job: Sequence[Sequence[int]]) -> Callable[[Path], object]:
    def run(folder: Path) -> object:
        trace(folder, *of_job)
        trace_read = Trace.read(folder)
        return f"iterations {trace_read.iteration.tolist()} of runs {trace_read.load[:, 0, 0].tolist()}"

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
    """Build a rebalancer of one layer "moe" with 4 experts on one GPU, which records to the folder."""
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
        return "continued"

    return run


def of_other_experts(folder: Path) -> object:
    return trace(folder, [[1]])


def own_trace(folder: Path) -> object:
    with TraceWriter(folder, layers=["moe"]) as writer:
        writer.add(torch.ones(1, 1, 4, dtype=torch.int64), Placement.contiguous(1, 4, 1), [1])


def written(name: str, text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(text)


CASES: list[Case] = [
    Case(
        "events: record 2 is cut off before the end of its line",
        "[1, 3, 4] [warning: events.jsonl: line 2 is incomplete and left out]",
        events(f"{record(1)}\n{record(2)[:90]}\n{record(3)}\n{record(4)}\n"),
    ),
    Case(
        "events: record 2 is cut off, and record 3 follows on the same line",
        "[1, 3, 4] [warning: events.jsonl: line 2 is incomplete and left out]",
        events(f"{record(1)}\n{record(2)[:90]}{record(3)}\n{record(4)}\n"),
    ),
    Case("events: two whole records on one line", "[1, 2, 3]", events(f"{record(1)}\n{record(2)}{record(3)}\n")),
    Case(
        "events: zeros where a machine died",
        "[1, 2]",
        events(record(1).encode() + b"\n" + b"\0" * 9 + b"\n" + record(2).encode() + b"\n"),
    ),
    Case("events: a record with a field from a later version", "[1]", events(record(1)[:-1] + ', "colour": 3}\n')),
    Case(
        "events: a record of version 2",
        "refused: events.jsonl, line 1: it is 'distplb.event', version 2; this distplb reads 'distplb.event', "
        "version 1; pass a file that an EventLog wrote",
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
        "events: a file of another kind",
        "refused: events.jsonl, line 1: it is not JSON; pass a file that an EventLog wrote",
        events("iteration,decision\n1,moved\n"),
    ),
    Case(
        "events: a line of a gigabyte",
        "refused: events.jsonl, line 1 has more than 16777216 bytes; remove it, or pass a file that an EventLog wrote",
        large(1 << 30),
    ),
    Case(
        "events: a file of 100 GB",
        "refused: events.jsonl has 100000000000 bytes, but max_bytes allows 1073741824; pass a larger max_bytes if "
        "you trust it",
        large(100 * 10**9),
    ),
    Case(
        "trace: a resumed job that records again from iteration 3",
        "iterations [1, 2, 3, 4] of runs [1, 1, 2, 2]",
        lives([[1, 2], [3, 4], [5, 6]], [[3], [4]]),
    ),
    Case(
        "trace: a job that starts again from iteration 2 in its folder",
        "iterations [1, 2, 3] of runs [1, 2, 2]",
        lives([[1, 2], [3, 4]], [[2, 3]]),
    ),
    Case("trace: a part that was never finished", "iterations [1, 2]", half_written),
    Case(
        "trace: a part that is cut off",
        "refused: 000000000002.npz cannot be read (File is not a zip file); pass a trace written by Trace.save or "
        "TraceWriter; or move 000000000002.npz away to read the other parts",
        damaged,
    ),
    Case(
        "trace: parts of two jobs",
        "refused: 5.npz has other layers than 000000000001.npz; pass parts of one job and one pipeline stage",
        mixed,
    ),
    Case("record= a folder with a trace of this job", "continued", recorded_beside(own_trace)),
    Case(
        "record= a folder with a trace of another job",
        "refused: record: 000000000001.npz belongs to another job: it has layers: 1 ('moe'), experts: 2, GPUs: 2; "
        "this job has layers: 1 ('moe'), experts: 4, GPUs: 1; record in another folder, or move the files away",
        recorded_beside(of_other_experts),
    ),
    Case(
        "record= a folder with events of another job",
        "refused: record: events.jsonl belongs to another job: it has layers ['a', 'b'], this job has ['moe']; "
        "record in another folder, or move the file away",
        recorded_beside(written("events.jsonl", record(1, layers=("a", "b")) + "\n")),
    ),
    Case(
        "record= a folder with an events.jsonl of another kind",
        "refused: record: events.jsonl is not a log of rebalances; record in another folder, or move the file away",
        recorded_beside(written("events.jsonl", "a,b\n")),
    ),
]
