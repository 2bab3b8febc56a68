"""How fast experts move, against a bare exchange of the same bytes between the same ranks; and the memory it takes.

    python benchmarks/bench_move.py --output benchmarks/results/DATE-move.md

Real processes over gloo, on one machine's loopback and, where namespaces may be made, on two hosts with a slow link
between them. Shapes: L layers, E experts, P slots.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import move_figure
import torch
import torch.distributed as dist
from tables import command_line, header, markdown, progress
from torch import nn

from distplb import LoadWindow, MoELayer, Moves, Placement, Rebalancer, Topology
from distplb.comm.base import Round
from distplb.comm.torchdist import TorchComm
from distplb.migrate.staging import StagingMemory
from distplb.planning.relabel import relabelled
from distplb.train.measure import measured_bandwidths

TESTS = Path(__file__).parent.parent / "tests" / "helpers"
EXPERTS, LAYERS = 64, 1
MIB = 1 << 20
STATES = 3  # weight and two moments
SECONDS = 600.0
TEXT = (
    f"One layer of {EXPERTS} experts, float32, with the two moments of AdamW; each change of placement is to a random "
    "one, named as plans are: GPUs so that most experts stay, and those that stay keep their slots. Moving is the "
    "whole of `Rebalancer.apply`: what travels is looked up, the schedule made, rows are staged, agreed upon and "
    "written; `verify` is off. Bare is an exchange (isend, irecv) of the same messages between the same ranks in the "
    "same rounds, from and to buffers that were there before, and nothing else. Needed is what a move cannot do "
    "without: the same exchange from and to memory of each message's own, three agreements (all-reduces of eight "
    "integers), and what has arrived written once more, to where it belongs. They take turns; bandwidth is the "
    "bytes that cross from rank to rank over the slowest rank's seconds, a ratio that of one turn, each as median "
    "and quartiles. {before}Memory is the rise of the peak resident memory (VmHWM, reset before) above what was "
    "resident, on the rank where it is largest, and the budget for what arrives in one commit. Link is the bandwidth "
    "between hosts that a rebalancer measures, and what both links are limited to."
)


BEFORE = "Before is the ratio of another checkout, measured by its own benchmark next to this one. "


@dataclass(frozen=True)
class Setting:
    """Ranks, the link between their halves, and the row of one expert in one tensor."""

    ranks: int
    row_mib: float
    megabits: float | None = None  # per second and direction, between two hosts; one machine where None

    @property
    def where(self) -> str:
        """In words."""
        if self.megabits is None:
            return f"{self.ranks} on one host"
        return f"2 hosts × {self.ranks // 2}, {self.megabits:g} Mbit/s"


@dataclass(frozen=True)
class Found:
    """Of the turns of one setting: bytes that crossed, seconds of both, and what each took of memory."""

    bytes: list[int]
    moving: list[float]
    bare: list[float]
    needed: list[float]
    commits: int
    staged: int  # bytes, the most of all ranks
    budget: int
    between: int  # bytes per second between hosts, as a rebalancer would measure them


SETTINGS = [Setting(ranks, row) for ranks in (2, 4) for row in (1, 4, 16)]
SETTINGS += [Setting(ranks, 1, megabits) for megabits in (400.0, 1000.0) for ranks in (2, 4)]


def main() -> None:
    """Measure, print, and write where that is asked for."""
    options = parsed_options()
    if options.job:
        job(options.job)
        return
    found, earlier = {}, {}
    for setting in SETTINGS:
        setting = Setting(setting.ranks, setting.row_mib / options.smaller, setting.megabits)
        progress(f"{setting.where}, {setting.row_mib:g} MiB")
        measured = over_hosts(setting, options.turns) if setting.megabits else on_one(setting, options.turns)
        if measured is not None:
            found[setting] = measured
        if options.before and not setting.megabits:
            earlier[setting] = ratios(of_checkout(options.before, setting, options.turns))
    progress("")
    given = {"--turns": options.turns, "--smaller": None if options.smaller == 1 else options.smaller}
    given["--before"] = "DIR" if options.before else None
    text = TEXT.format(before=BEFORE if options.before else "")
    lines = [header("Moving experts", text, command_line("bench_move.py", given), "cpu")]
    lines += [f"- load of the machine in the last minute, at the end: {os.getloadavg()[0]:.1f}", ""]
    report = "\n".join([*lines, table(found, earlier)])
    if options.output:
        figure = options.output.with_suffix(".png")
        move_figure.draw(
            [(setting.where, setting.row_mib, ratios(asdict(one))) for setting, one in found.items()], figure
        )
        report += f"\n\n![Moving over a bare exchange of the same bytes]({figure.name})"
        options.output.write_text(f"{report}\n")
    print(report)


def parsed_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Bandwidth and memory of moves.")
    parser.add_argument("--turns", type=int, default=9, metavar="N", help="timed moves, after one that is not")
    parser.add_argument("--smaller", type=int, default=1, metavar="F", help="rows are that much smaller")
    parser.add_argument("--before", type=Path, metavar="DIR", help="another checkout, to compare with")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the result there, as markdown")
    parser.add_argument("--job", type=Path, metavar="FOLDER", help=argparse.SUPPRESS)  # on a host of its own
    return parser.parse_args()


# --- on the ranks -----------------------------------------------------------------------------------------------


class Listening(TorchComm):
    """Notes the rounds that it exchanges: bytes and the rank at the other end, of sends and of receives."""

    def __init__(self) -> None:
        super().__init__(deadline=SECONDS / 2)
        self.rounds: list[tuple[list[tuple[int, int]], list[tuple[int, int]]]] = []

    def exchange(self, rounds: Sequence[Round]) -> None:
        """As `Comm`."""
        for sends, receives in rounds:
            self.rounds.append(([(t.nbytes, to) for t, to in sends], [(t.nbytes, source) for t, source in receives]))
        super().exchange(rounds)


def measured(setting: Setting, turns: int) -> dict[str, object]:
    """A `Found` as a dictionary, on every rank."""
    comm, commits = Listening(), []
    size, row = EXPERTS // comm.size, round(setting.row_mib * MIB) // 4
    weight = nn.Parameter(torch.full((size, row), float(comm.rank)))
    router = nn.Parameter(torch.zeros(EXPERTS, 1))
    optimizer = torch.optim.AdamW([weight, router])
    for state in ("exp_avg", "exp_avg_sq"):
        for parameter in (weight, router):
            optimizer.state[parameter][state] = torch.ones_like(parameter)
    layer = MoELayer(
        name="moe", experts={"w": weight}, router={"weight": router}, invalidate=lambda: commits.append(None)
    )
    rebalancer = Rebalancer(
        [layer],
        optimizer,
        topology=Topology(1, comm.size),
        every=1,
        window=LoadWindow(LAYERS, EXPERTS, 1),
        comm=comm,
        moves=Moves(verify="off"),
    )
    generator = torch.Generator().manual_seed(0)
    moving, bare, needed, crossed, staged, staging = [], [], [], [], 0, StagingMemory()
    for turn in range(turns + 1):
        fresh = Placement(torch.randperm(EXPERTS, generator=generator)[None], EXPERTS, comm.size)
        target = relabelled(fresh, rebalancer.placement, (size,))
        comm.rounds.clear()
        commits.clear()
        resident = forget_peak()
        seconds = timed(lambda target=target: rebalancer.apply(target))
        staged = max(staged, peak() - resident)
        messages = prepared(comm.rounds)
        again = timed(lambda messages=messages: exchange(messages))
        least = timed(with_writes(comm.rounds, staging))
        if turn:  # the first makes connections
            moving.append(seconds)
            bare.append(again)
            needed.append(least)
            crossed.append(total(comm, sum(size for sends, _ in comm.rounds for size, _ in sends)))
    budget = max(256 * MIB, 2 * STATES * row * 4)
    most = torch.tensor([-staged])
    comm.all_reduce_min(most)
    hosts = Topology(1, comm.size) if setting.megabits is None else Topology(2, comm.size // 2)
    between = measured_bandwidths(comm, hosts, range(comm.size), comm.rank)[1]
    return asdict(Found(crossed, moving, bare, needed, len(commits), -int(most), budget, between))


Rounds = list[tuple[list[tuple[torch.Tensor, int]], list[tuple[torch.Tensor, int]]]]


def prepared(rounds: list[tuple[list[tuple[int, int]], list[tuple[int, int]]]]) -> Rounds:
    """Buffers for rounds of the same bytes, shared by the rounds and written once, so that no page is missing."""
    most = max((sum(size for size, _ in way) for both in rounds for way in both), default=0)
    buffers = [torch.zeros(most, dtype=torch.uint8) for _ in range(2)]

    def laid_out(buffer: torch.Tensor, way: list[tuple[int, int]]) -> list[tuple[torch.Tensor, int]]:
        parts = buffer[: sum(size for size, _ in way)].split([size for size, _ in way]) if way else ()
        return [(part, rank) for part, (_, rank) in zip(parts, way, strict=True)]

    return [(laid_out(buffers[0], sends), laid_out(buffers[1], receives)) for sends, receives in rounds]


def exchange(rounds: Rounds) -> None:
    """Nothing but the library's calls."""
    for sends, receives in rounds:
        operations = [dist.P2POp(dist.isend, data, to) for data, to in sends]
        operations += [dist.P2POp(dist.irecv, room, source) for room, source in receives]
        if operations:
            for work in dist.batch_isend_irecv(operations):
                work.wait()


def with_writes(
    rounds: list[tuple[list[tuple[int, int]], list[tuple[int, int]]]], staging: StagingMemory
) -> Callable[[], None]:
    """What a move cannot do without, each message from and to memory of its own that was written before.

    The memory is kept from turn to turn: gigabytes that are given back cost the process its time later, in a move.
    """
    flat = [[one for both in rounds for one in both[way]] for way in (0, 1)]
    sizes = [size for way in (*flat, flat[1]) for size, _ in way]  # sent, received, and where that belongs
    parts = iter(staging.room("needed", sum(sizes), torch.device("cpu")).fill_(0).split(sizes))
    sends, receives = ([(next(parts), rank) for _, rank in way] for way in flat)
    rows = list(parts)
    following = iter(sends), iter(receives)
    messages = [tuple([next(some) for _ in way] for some, way in zip(following, both, strict=True)) for both in rounds]

    def run() -> None:
        dist.all_reduce(torch.zeros(8, dtype=torch.int64), dist.ReduceOp.MIN)
        exchange(messages)  # type: ignore[arg-type]
        dist.all_reduce(torch.zeros(8, dtype=torch.int64), dist.ReduceOp.MIN)
        for row, (room, _) in zip(rows, receives, strict=True):
            row.copy_(room)
        dist.all_reduce(torch.zeros(8, dtype=torch.int64), dist.ReduceOp.MIN)

    return run


def timed(run: Callable[[], object]) -> float:
    """Seconds of the slowest rank; all begin together."""
    dist.barrier()
    start = time.perf_counter()
    run()
    seconds = torch.tensor([time.perf_counter() - start], dtype=torch.float64)
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    return float(seconds)


def total(comm: TorchComm, number: int) -> int:
    """Over all ranks."""
    numbers = torch.tensor([number])
    comm.all_reduce_sum(numbers)
    return int(numbers)


def forget_peak() -> int:
    """Bytes resident now, from which the peak is counted anew."""
    Path("/proc/self/clear_refs").write_text("5")
    return memory("VmRSS")


def peak() -> int:
    """Bytes that were resident at once, at most, since `forget_peak`."""
    return memory("VmHWM")


def memory(what: str) -> int:
    """A line of the process's status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(f"{what}:")).split()[1])


# --- where they run ---------------------------------------------------------------------------------------------


def of_checkout(where: Path, setting: Setting, turns: int) -> dict[str, Any]:
    """What another checkout's own benchmark finds on this machine's loopback."""
    given = f"bench_move.Setting({setting.ranks}, {setting.row_mib}), {turns}"
    code = f"import bench_move, dataclasses, json; print(json.dumps(dataclasses.asdict(bench_move.on_one({given}))))"
    paths = [where, where / "benchmarks", where / "tests" / "helpers"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(str(path.resolve()) for path in paths)}
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, cwd=paths[1], env=environment, stdout=subprocess.PIPE, check=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def on_one(setting: Setting, turns: int) -> Found:
    """On this machine's loopback."""
    from ranks import on_ranks

    return Found(**on_ranks(setting.ranks, measured, setting, turns, deadline=SECONDS)[0])


def over_hosts(setting: Setting, turns: int) -> Found | None:
    """On two hosts; None, and why on the error stream, where none can be made."""
    from hosts import hosts, torchrun, why_not

    if reason := why_not("tbf"):
        print(f"left out {setting.where}: {reason}", file=sys.stderr)
        return None
    with tempfile.TemporaryDirectory() as name, hosts(2, megabits=setting.megabits) as members:
        folder, end = Path(name), time.monotonic() + SECONDS
        (folder / "setting.json").write_text(json.dumps([asdict(setting), turns]))
        launchers = torchrun(members, setting.ranks // 2, Path(__file__), ["--job", name], folder / "log")
        while any(launcher.poll() is None for launcher in launchers) and time.monotonic() < end:
            time.sleep(0.1)
        if not (folder / "found.json").exists():
            raise SystemExit(f"the job on two hosts failed:\n{(folder / 'log').read_text()}")
        return Found(**json.loads((folder / "found.json").read_text()))


def job(folder: Path) -> None:
    """One rank under torchrun."""
    setting, turns = json.loads((folder / "setting.json").read_text())
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found = measured(Setting(**setting), turns)
    if dist.get_rank() == 0:
        (folder / "found.json").write_text(json.dumps(found))
    dist.destroy_process_group()


# --- text -------------------------------------------------------------------------------------------------------


def ratios(found: dict[str, Any], to: str = "bare") -> list[float]:
    """Of each turn, the bandwidth of moving over another one."""
    return [other / moving for other, moving in zip(found[to], found["moving"], strict=True)]


def table(found: dict[Setting, Found], earlier: dict[Setting, list[float]]) -> str:
    """A line for each setting."""
    head = ["ranks", "row, MiB", "crossing, MiB", "commits", "bare, MB/s", "moving, MB/s", "moving / bare"]
    head += ["before"] * bool(earlier) + ["needed / bare", "moving / needed", "memory, MiB", "link, MB/s"]
    lines = []
    for setting, one in found.items():
        speeds = [
            [size / seconds / 1e6 for size, seconds in zip(one.bytes, way, strict=True)]
            for way in (one.bare, one.moving)
        ]
        crossing, memory_mib = statistics.median(one.bytes) / MIB, f"{one.staged / MIB:.0f} of {one.budget / MIB:.0f}"
        numbers = [f"{setting.row_mib:g}", f"{crossing:.0f}", str(one.commits)]
        numbers += [spread(values, 0) for values in speeds] + [spread(ratios(asdict(one)), 2)]
        if earlier:
            numbers.append(spread(earlier[setting], 2) if setting in earlier else "")
        least = [bare / needed for bare, needed in zip(one.bare, one.needed, strict=True)]
        numbers += [spread(least, 2), spread(ratios(asdict(one), "needed"), 2), memory_mib, link(setting, one)]
        lines.append([setting.where, *numbers])
    return markdown(head, lines)


def link(setting: Setting, found: Found) -> str:
    """Between the hosts: what a rebalancer measures, and the limits of all of them together."""
    return "" if setting.megabits is None else f"{found.between / 1e6:.0f} of {2 * setting.megabits / 8:.0f}"


def spread(values: Sequence[float], digits: int) -> str:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{middle:.{digits}f} [{low:.{digits}f} – {high:.{digits}f}]"


if __name__ == "__main__":
    sys.path.insert(0, str(TESTS))
    main()
