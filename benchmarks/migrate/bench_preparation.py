"""How long a rank takes to prepare a move: commits, its own copies, and the rounds that all ranks share.

    python -m benchmarks.migrate.bench_preparation --output benchmarks/results/DATE-ready.md

Other ranks are simulated: layouts are built directly, and the communicator only has a size.
Shapes: L layers, E experts, G slots on each GPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks.shared.processes import run_alone
from benchmarks.shared.tables import command_line, header, markdown, progress, publish
from distplb import Placement
from distplb.comm.base import WorldOfOne
from distplb.migrate.layout import Layout, Part
from distplb.migrate.optimizer_state import Traveller
from distplb.migrate.slot_routes import peers
from distplb.migrate.staging import StagingMemory
from distplb.migrate.transfer import Limits, Transfer, TravellingLayer

MIB = 1 << 20
WEIGHTS, STATES = 3, 3  # gate, up and down; each with two moments
KINDS = ("copies", "FSDP2", "distributed optimizer")
TEXT = (
    "Seconds of `Transfer(...)` on one simulated rank, in the middle of the job: from two placements to its copies, "
    "the rounds and the bytes sent, for a move to a random placement, which changes nearly every slot. Each expert has "
    "three weights, each with two moments; router rows are on every rank. EP × data: the GPUs of an EP group, and the "
    "number of EP groups that hold copies of the same experts. Copies: each rank of a GPU has all of that GPU's "
    "experts. FSDP2: the columns of each row are sharded over the ranks with the same GPU's experts. Distributed "
    "optimizer: weights are copies, and the moments are in one flat buffer of the layer's three weights, which is cut "
    "over these ranks in equal ranges. One commit: without a budget; otherwise each commit stages at most 256 MiB, "
    "where an expert's row of one tensor is 1 MiB. The first of several moves is listed separately, because it "
    "examines the layouts; for the others, the median is given."
)


@dataclass(frozen=True)
class Case:
    """One job.

    Args:
        kind: kind of the layouts.
        gpus, groups: GPUs of an EP group, and how many EP groups hold copies of the same experts.
        experts, layers: experts per layer, and layers of the model.
        in_one: whether a move is one commit, without a budget.
    """

    kind: str
    gpus: int
    groups: int
    experts: int
    layers: int
    in_one: bool


CASES = [Case(kind, 8, 64, 256, 4, in_one) for kind in KINDS for in_one in (True, False)]
CASES += [Case(kind, 64, 8, 256, 4, True) for kind in KINDS]
CASES += [Case("copies", 8, groups, 256, 4, True) for groups in (1, 8)]
CASES += [Case("copies", 8, 64, 64, 4, True), Case("copies", 8, 64, 256, 16, False)]


def main() -> None:
    """Measure, print, and write the result if requested."""
    options = parsed_options()
    if options.case:
        print(json.dumps(measured(Case(**json.loads(options.case)), options.turns)))
        return
    lines = []
    for case in CASES:
        progress(f"{case}")
        words = ["--turns", str(options.turns), "--case", json.dumps(asdict(case))]
        result = run_alone("benchmarks.migrate.bench_preparation", *words, OMP_NUM_THREADS="1")
        numbers = [f"{result['commits']:g}", f"{result['first']:.3f}", f"{result['then']:.3f}"]
        lines.append([f"{case.gpus} × {case.groups}", case.kind, str(case.experts), str(case.layers), *numbers])
    progress("")
    head = ["EP × data", "layout", "experts", "layers", "commits", "first, s", "then, s"]
    command = command_line("migrate.bench_preparation", {"--turns": options.turns})
    publish(f"{header('Preparing a move', TEXT, command, 'cpu')}\n\n{markdown(head, lines)}", options.output)


def parsed_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Seconds to prepare a move.")
    parser.add_argument("--turns", type=int, default=5, metavar="N", help="timed moves after the first")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the result there, as markdown")
    parser.add_argument("--case", help=argparse.SUPPRESS)  # run one case in its own process and print JSON
    return parser.parse_args()


# --- one case ---------------------------------------------------------------------------------------------------


def measured(case: Case, turns: int) -> dict[str, float]:
    """Prepare moves one after the other, with the layouts that a job agrees on once."""
    comm = WorldOfOne()
    comm.size = case.gpus * case.groups  # type: ignore[misc]
    comm.rank = case.groups // 2 * case.gpus + case.gpus // 2  # type: ignore[misc]
    layers, memory = job(case, comm.rank), StagingMemory()
    limits = Limits(10**9, 10**15 if case.in_one else 256 * MIB, 1e9)
    nodes = [other % case.gpus // 8 for other in range(comm.size)]
    generator = torch.Generator().manual_seed(0)
    old, seconds, commits = Placement.contiguous(case.layers, case.experts, case.gpus), [], 0
    for _ in range(turns + 1):
        rows = [torch.randperm(case.experts, generator=generator) for _ in range(case.layers)]
        new = Placement(torch.stack(rows), case.experts, case.gpus)
        start = time.perf_counter()
        move = Transfer(old, new, layers, comm, nodes, memory, limits)
        seconds.append(time.perf_counter() - start)
        commits, old = len(move._commits), new
    return {"first": seconds[0], "then": statistics.median(seconds[1:]), "commits": commits}


def job(case: Case, rank: int) -> list[TravellingLayer]:
    """By layer, layouts and what travels on one rank; its memory is never touched."""
    layouts = layouts_of(case)
    peers(list(layouts.values()), rank)  # done once, when the ranks agree on their layouts
    layers = []
    for _ in range(case.layers):
        travelling = []
        for number, (name, layout) in enumerate(layouts.items()):
            numel = sum(part.numel for part in layout.held[rank])
            kinds = ["", "exp_avg", "exp_avg_sq"] if case.kind != "distributed optimizer" or name == "router" else [""]
            kinds = ["exp_avg", "exp_avg_sq"] if name.startswith("shard") else kinds
            for _ in kinds:
                flats = (torch.empty(numel),) if numel else ()
                travelling.append(Traveller(flats, number, torch.float32))
        layers.append((list(layouts.values()), travelling))
    return layers


def layouts_of(case: Case) -> dict[str, Layout]:
    """The layouts of one layer; equal layouts are one object, as after the ranks' agreement."""
    row, own = MIB // 4, case.experts // case.gpus
    ranks = range(case.gpus * case.groups)
    copies = tuple((Part(r % case.gpus * own * row, (r % case.gpus + 1) * own * row, 0, row),) for r in ranks)
    layouts = {"router": Layout(64, case.experts, ((Part(0, case.experts * 64, 0, 64),),) * len(ranks))}
    if case.kind == "FSDP2":
        width = row // case.groups
        held = tuple(
            (
                Part(
                    r % case.gpus * own * width,
                    (r % case.gpus + 1) * own * width,
                    r // case.gpus * width,
                    (r // case.gpus + 1) * width,
                ),
            )
            for r in ranks
        )
        same = Layout(row, case.experts, held)
        return layouts | {f"w{n}": same for n in range(WEIGHTS)}
    same = Layout(row, case.experts, copies)
    layouts |= {f"w{n}": same for n in range(WEIGHTS)}
    if case.kind == "distributed optimizer":
        layouts |= {f"shard{n}": Layout(row, case.experts, flat(case, n, own, row)) for n in range(WEIGHTS)}
    return layouts


def flat(case: Case, weight: int, own: int, row: int) -> tuple[tuple[Part, ...], ...]:
    """By rank, one weight's part of a buffer of all weights that is cut into equal ranges."""
    size, held = own * row, []
    each = -(-WEIGHTS * size // case.groups)
    for rank in range(case.gpus * case.groups):
        gpu, group = rank % case.gpus, rank // case.gpus
        start, stop = (min(max(end - weight * size, 0), size) for end in (group * each, (group + 1) * each))
        held.append((Part(gpu * size + start, gpu * size + stop, 0, row),) if start < stop else ())
    return tuple(held)


if __name__ == "__main__":
    main()
