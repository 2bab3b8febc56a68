"""How fast experts move, against a bare exchange of the same bytes between the same ranks; and the memory it takes.

    python benchmarks/bench_move.py --output benchmarks/results/DATE-move.md

Real processes over gloo, on one machine's loopback and, where namespaces may be made, on two hosts with a slow link
between them. Shapes: L layers, E experts, P slots.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import move_figure
import torch
import torch.distributed as dist
from tables import command_line, header, markdown, progress
from torch import nn

from distplb import LoadWindow, MoELayer, Placement, Rebalancer, Topology
from distplb.comm.base import Message
from distplb.comm.torchdist import TorchComm
from distplb.planning.relabel import relabelled

TESTS = Path(__file__).parent.parent / "tests"
EXPERTS, LAYERS = 64, 1
MIB = 1 << 20
STATES = 3  # weight and two moments
SECONDS = 600.0
TEXT = (
    f"One layer of {EXPERTS} experts, float32, with the two moments of AdamW; each change of placement is to a random "
    "one, named as plans are: GPUs so that most experts stay, and those that stay keep their slots. Moving is the "
    "whole of `Rebalancer.apply`: what travels is looked up, the schedule made, rows are staged, agreed upon and "
    "written; `verify` is off. Bare is an exchange (isend, irecv) of the same messages between the same ranks in the "
    "same rounds, from and to buffers that were there before, and nothing else. They take turns; bandwidth is the "
    "bytes that cross from rank to rank over the slowest rank's seconds, the ratio that of one turn, each as median "
    "and quartiles. Memory is the rise of the process's peak resident memory (VmHWM, reset before) above what was "
    "resident, on the rank where it is largest, and the budget for what arrives in one commit."
)


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
    commits: int
    staged: int  # bytes, the most of all ranks
    budget: int


SETTINGS = [Setting(ranks, row) for ranks in (2, 4) for row in (1, 4, 16)]
SETTINGS += [Setting(2, 1, 1000.0), Setting(4, 1, 1000.0)]


def main() -> None:
    """Measure, print, and write where that is asked for."""
    options = parsed_options()
    if options.job:
        job(options.job)
        return
    found = {}
    for setting in SETTINGS:
        setting = Setting(setting.ranks, setting.row_mib / options.smaller, setting.megabits)
        progress(f"{setting.where}, {setting.row_mib:g} MiB")
        measured = over_hosts(setting, options.turns) if setting.megabits else on_one(setting, options.turns)
        if measured is not None:
            found[setting] = measured
    progress("")
    given = {"--turns": options.turns, "--smaller": None if options.smaller == 1 else options.smaller}
    report = "\n\n".join([header("Moving experts", TEXT, command_line("bench_move.py", given), "cpu"), table(found)])
    if options.output:
        figure = options.output.with_suffix(".png")
        move_figure.draw([(setting.where, setting.row_mib, ratios(one)) for setting, one in found.items()], figure)
        report += f"\n\n![Moving over a bare exchange of the same bytes]({figure.name})"
        options.output.write_text(f"{report}\n")
    print(report)


def parsed_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Bandwidth and memory of moves.")
    parser.add_argument("--turns", type=int, default=9, metavar="N", help="timed moves, after one that is not")
    parser.add_argument("--smaller", type=int, default=1, metavar="F", help="rows are that much smaller")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the result there, as markdown")
    parser.add_argument("--job", type=Path, metavar="FOLDER", help=argparse.SUPPRESS)  # on a host of its own
    return parser.parse_args()


# --- on the ranks -----------------------------------------------------------------------------------------------


class Listening(TorchComm):
    """Notes the rounds that it exchanges: bytes and the rank at the other end, of sends and of receives."""

    def __init__(self) -> None:
        super().__init__(deadline=SECONDS / 2)
        self.rounds: list[tuple[list[tuple[int, int]], list[tuple[int, int]]]] = []

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> None:
        """As `Comm`."""
        self.rounds.append(([(t.nbytes, to) for t, to in sends], [(t.nbytes, source) for t, source in receives]))
        super().exchange(sends, receives)


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
        verify="off",
    )
    generator = torch.Generator().manual_seed(0)
    moving, bare, crossed, staged = [], [], [], 0
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
        if turn:  # the first makes connections
            moving.append(seconds)
            bare.append(again)
            crossed.append(total(comm, sum(size for sends, _ in comm.rounds for size, _ in sends)))
    budget = max(256 * MIB, 2 * STATES * row * 4)
    most = torch.tensor([-staged])
    comm.all_reduce_min(most)
    return asdict(Found(crossed, moving, bare, len(commits), -int(most), budget))


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


def ratios(found: Found) -> list[float]:
    """Of each turn, the bandwidth of moving over the bare one."""
    return [bare / moving for bare, moving in zip(found.bare, found.moving, strict=True)]


def table(found: dict[Setting, Found]) -> str:
    """A line for each setting."""
    head = ["ranks", "row, MiB", "crossing, MiB", "commits", "bare, MB/s", "moving, MB/s", "ratio", "memory, MiB"]
    lines = []
    for setting, one in found.items():
        speeds = [
            [size / seconds / 1e6 for size, seconds in zip(one.bytes, way, strict=True)]
            for way in (one.bare, one.moving)
        ]
        crossing, memory_mib = statistics.median(one.bytes) / MIB, f"{one.staged / MIB:.0f} of {one.budget / MIB:.0f}"
        numbers = [f"{setting.row_mib:g}", f"{crossing:.0f}", str(one.commits)]
        numbers += [spread(values, 0) for values in speeds] + [spread(ratios(one), 2), memory_mib]
        lines.append([setting.where, *numbers])
    return markdown(head, lines)


def spread(values: Sequence[float], digits: int) -> str:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{middle:.{digits}f} [{low:.{digits}f} – {high:.{digits}f}]"


if __name__ == "__main__":
    sys.path.insert(0, str(TESTS))
    main()
