"""How fast experts move, against a bare exchange of the same bytes between the same ranks; and the memory it takes.

    python -m benchmarks.migrate.bench_bandwidth --output benchmarks/results/DATE-move.md

Real processes over gloo, on one machine's loopback and, where namespaces may be made, on two hosts with a slow link
between them. Shapes: L layers, E experts, P slots.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from benchmarks.figures import bandwidth as figure
from benchmarks.shared.processes import on_hosts, outside, run_job
from benchmarks.shared.tables import command_line, header, markdown, progress, publish
from distplb import LoadWindow, MoELayer, Moves, Placement, Rebalancer, Topology
from distplb.comm.base import Round
from distplb.comm.torchdist import TorchComm
from distplb.migrate.staging import StagingMemory
from distplb.planning.renumber_gpus import relabelled
from distplb.train.measure import measured_bandwidths

EXPERTS, LAYERS = 64, 1
MIB = 1 << 20
STATES = 3  # weight and two moments
SECONDS = 600.0
TEXT = (
    f"One layer of {EXPERTS} experts, float32, with the two moments of AdamW. Each move is to a random placement, "
    "relabelled as plans are: GPUs are numbered so that most experts stay, and those that stay keep their slots. "
    "Moving is all of `Rebalancer.apply`: it collects what travels, makes the schedule, and stages, agrees on and "
    "writes the rows; `verify` is off. Bare is only an exchange (isend, irecv) of the same messages between the same "
    "ranks in the same rounds, from and to existing buffers. Needed is the minimum of a move: the same exchange with "
    "separate memory for each message, three agreements (all-reduces of eight integers), and one more write of what "
    "has arrived, to its place. The three take turns. Bandwidth is the bytes sent between ranks over the slowest "
    "rank's seconds, and a ratio is that of one turn; both are given as median and quartiles. Memory is the rise of "
    "the peak resident memory (VmHWM, reset before) above what was resident, on the rank where it is largest, and the "
    "budget for what arrives in one commit. Link is the bandwidth between hosts that a rebalancer measures, and the "
    "limit of both links together."
)


@dataclass(frozen=True)
class Setting:
    """Ranks, the link between their halves, and the row of one expert in one tensor."""

    ranks: int
    row_mib: float
    megabits: float | None = None  # per second and direction, between two hosts; one machine where None

    @property
    def where(self) -> str:
        """The ranks and links in words."""
        if self.megabits is None:
            return f"{self.ranks} on one host"
        return f"2 hosts × {self.ranks // 2}, {self.megabits:g} Mbit/s"


@dataclass(frozen=True)
class Measurement:
    """The turns of one setting.

    Args:
        bytes: bytes sent between ranks in each turn.
        moving, bare, needed: seconds of each turn.
        commits: number of commits of a move.
        staged, budget: bytes of memory: the largest rise on any rank, and the limit of a commit.
        between: bytes per second between hosts, as a rebalancer would measure them.
    """

    bytes: list[int]
    moving: list[float]
    bare: list[float]
    needed: list[float]
    commits: int
    staged: int
    budget: int
    between: int

    def ratios(self, to: str = "bare") -> list[float]:
        """By turn, the bandwidth of moving over that of another exchange."""
        return [other / moving for other, moving in zip(getattr(self, to), self.moving, strict=True)]


SETTINGS = [Setting(ranks, row) for ranks in (2, 4) for row in (1, 4, 16)]
SETTINGS += [Setting(ranks, 1, megabits) for megabits in (400.0, 1000.0) for ranks in (2, 4)]


def main() -> None:
    """Measure, print, and write the result if requested."""
    options = parsed_options()
    if options.job:
        run_job(options.job, lambda task: measured(Setting(**task["setting"]), task["turns"]))
        return
    measurements = {}
    for setting in SETTINGS:
        progress(f"{setting.where}, {setting.row_mib:g} MiB")
        measurement = over_links(setting, options.turns) if setting.megabits else on_one_host(setting, options.turns)
        if measurement is not None:
            measurements[setting] = measurement
    progress("")
    lines = [
        header("Moving experts", TEXT, command_line("migrate.bench_bandwidth", {"--turns": options.turns}), "cpu"),
        f"- load of the machine in the last minute, at the end: {os.getloadavg()[0]:.1f}",
        "",
        table(measurements),
    ]
    if options.output:
        path = options.output.with_suffix(".png")
        figure.draw([(setting.where, setting.row_mib, one.ratios()) for setting, one in measurements.items()], path)
        lines += ["", f"![Moving over a bare exchange of the same bytes]({path.name})"]
    publish("\n".join(lines), options.output)


def parsed_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Bandwidth and memory of moves.")
    parser.add_argument("--turns", type=int, default=9, metavar="N", help="timed moves, after an untimed one")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the result there, as markdown, and a figure")
    parser.add_argument("--job", type=Path, metavar="FOLDER", help=argparse.SUPPRESS)  # a rank on its host
    return parser.parse_args()


# --- on the ranks -----------------------------------------------------------------------------------------------


class RecordingComm(TorchComm):
    """Records the rounds that it exchanges: bytes and peer of each send and receive."""

    def __init__(self) -> None:
        super().__init__(deadline=SECONDS / 2)
        self.rounds: list[tuple[list[tuple[int, int]], list[tuple[int, int]]]] = []

    def exchange(self, rounds: Sequence[Round]) -> None:
        """As `Comm`."""
        for sends, receives in rounds:
            self.rounds.append(([(t.nbytes, to) for t, to in sends], [(t.nbytes, source) for t, source in receives]))
        super().exchange(rounds)


def measured(setting: Setting, turns: int) -> dict[str, object]:
    """A `Measurement` as a dictionary, on every rank."""
    comm, commits = RecordingComm(), []
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
        seconds_bare = timed(lambda messages=messages: exchange(messages))
        seconds_needed = timed(with_writes(comm.rounds, staging))
        if turn:  # the first one sets up connections
            moving.append(seconds)
            bare.append(seconds_bare)
            needed.append(seconds_needed)
            crossed.append(total(comm, sum(size for sends, _ in comm.rounds for size, _ in sends)))
    budget = max(256 * MIB, 2 * STATES * row * 4)
    largest = torch.tensor([-staged])
    comm.all_reduce_min(largest)
    hosts = Topology(1, comm.size) if setting.megabits is None else Topology(2, comm.size // 2)
    between = measured_bandwidths(comm, hosts, range(comm.size), comm.rank)[1]
    return asdict(Measurement(crossed, moving, bare, needed, len(commits), -int(largest), budget, between))


Rounds = list[tuple[list[tuple[torch.Tensor, int]], list[tuple[torch.Tensor, int]]]]


def prepared(rounds: list[tuple[list[tuple[int, int]], list[tuple[int, int]]]]) -> Rounds:
    """Buffers for rounds of the same bytes, shared by the rounds and written once, so that all pages are resident."""
    capacity = max((sum(size for size, _ in way) for both in rounds for way in both), default=0)
    buffers = [torch.zeros(capacity, dtype=torch.uint8) for _ in range(2)]

    def laid_out(buffer: torch.Tensor, way: list[tuple[int, int]]) -> list[tuple[torch.Tensor, int]]:
        parts = buffer[: sum(size for size, _ in way)].split([size for size, _ in way]) if way else ()
        return [(part, rank) for part, (_, rank) in zip(parts, way, strict=True)]

    return [(laid_out(buffers[0], sends), laid_out(buffers[1], receives)) for sends, receives in rounds]


def exchange(rounds: Rounds) -> None:
    """Exchange messages with the library's calls only."""
    for sends, receives in rounds:
        operations = [dist.P2POp(dist.isend, data, to) for data, to in sends]
        operations += [dist.P2POp(dist.irecv, room, source) for room, source in receives]
        if operations:
            for work in dist.batch_isend_irecv(operations):
                work.wait()


def with_writes(
    rounds: list[tuple[list[tuple[int, int]], list[tuple[int, int]]]], staging: StagingMemory
) -> Callable[[], None]:
    """Build the minimum of a move, with separate memory, already written once, for each message.

    The memory is kept from turn to turn: freeing gigabytes would cost the process time later, in a move.
    """
    flat = [[one for both in rounds for one in both[way]] for way in (0, 1)]
    sizes = [size for way in (*flat, flat[1]) for size, _ in way]  # sent, received, and written to its place
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
    """Seconds of the slowest rank; all ranks start together."""
    dist.barrier()
    start = time.perf_counter()
    run()
    seconds = torch.tensor([time.perf_counter() - start], dtype=torch.float64)
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    return float(seconds)


def total(comm: TorchComm, number: int) -> int:
    """The sum over all ranks."""
    numbers = torch.tensor([number])
    comm.all_reduce_sum(numbers)
    return int(numbers)


def forget_peak() -> int:
    """Reset the peak, and return the bytes resident now."""
    Path("/proc/self/clear_refs").write_text("5")
    return memory("VmRSS")


def peak() -> int:
    """The most bytes resident at once since `forget_peak`."""
    return memory("VmHWM")


def memory(entry: str) -> int:
    """An entry of the process's status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(f"{entry}:")).split()[1])


# --- where they run ---------------------------------------------------------------------------------------------


def on_one_host(setting: Setting, turns: int) -> Measurement:
    """Measure on this machine's loopback."""
    ranks = outside("tests/helpers", "ranks")
    return Measurement(**ranks.on_ranks(setting.ranks, measured, setting, turns, deadline=SECONDS)[0])


def over_links(setting: Setting, turns: int) -> Measurement | None:
    """Measure on two hosts; None, with the reason on the error stream, if they cannot be created."""
    if reason := outside("tests/helpers", "hosts").why_not("tbf"):
        print(f"left out {setting.where}: {reason}", file=sys.stderr)
        return None
    task = {"setting": asdict(setting), "turns": turns}
    result = on_hosts(
        2,
        setting.ranks // 2,
        "benchmarks.migrate.bench_bandwidth",
        task,
        megabits=setting.megabits,
        seconds=SECONDS,
    )
    return Measurement(**result)


# --- text -------------------------------------------------------------------------------------------------------


def table(measurements: dict[Setting, Measurement]) -> str:
    """A line for each setting."""
    head = ["ranks", "row, MiB", "crossing, MiB", "commits", "bare, MB/s", "moving, MB/s", "moving / bare"]
    head += ["needed / bare", "moving / needed", "memory, MiB", "link, MB/s"]
    lines = []
    for setting, one in measurements.items():
        speeds = [
            [size / seconds / 1e6 for size, seconds in zip(one.bytes, way, strict=True)]
            for way in (one.bare, one.moving)
        ]
        numbers = [f"{setting.row_mib:g}", f"{statistics.median(one.bytes) / MIB:.0f}", str(one.commits)]
        numbers += [spread(values, 0) for values in speeds] + [spread(one.ratios(), 2)]
        of_needed = [bare / needed for bare, needed in zip(one.bare, one.needed, strict=True)]
        numbers += [spread(of_needed, 2), spread(one.ratios("needed"), 2)]
        numbers += [f"{one.staged / MIB:.0f} of {one.budget / MIB:.0f}", link(setting, one)]
        lines.append([setting.where, *numbers])
    return markdown(head, lines)


def link(setting: Setting, measurement: Measurement) -> str:
    """The bandwidth between hosts that a rebalancer measures, and the limit of both links together."""
    if setting.megabits is None:
        return ""
    return f"{measurement.between / 1e6:.0f} of {2 * setting.megabits / 8:.0f}"


def spread(values: Sequence[float], digits: int) -> str:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{middle:.{digits}f} [{low:.{digits}f} – {high:.{digits}f}]"


if __name__ == "__main__":
    main()
