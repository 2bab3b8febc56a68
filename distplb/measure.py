"""What a plan weighs, measured on the job's own machine: the time of an expert, and the bandwidth of its links.

All ranks measure at once, as they work at once; what rank 0 measured counts, and is the same number on all.
Shapes: M GPUs of an EP group.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch

from distplb.comm.agreement import agree, digest, told_by_root
from distplb.comm.base import Comm, WorldOfOne
from distplb.price import TimeCurve
from distplb.topology import Topology

__all__ = ["measured_bandwidths", "measured_curve"]

_REPEATS = 7
_PAYLOAD_BYTES = 1 << 22  # of one message
_NO_LINK = 1 << 60  # bytes per second where nothing has to be sent


def measured_curve(run: Callable[[int], object], tokens: Sequence[int], *, comm: Comm | None = None) -> TimeCurve:
    """The time curve of an expert, from a micro-benchmark: medians of 7 rounds, after one that is not timed.

    Collective with a `comm`. For a grouped matrix product, `run` may run several experts of as many tokens each
    and the seconds of all count; the planner needs proportions only, but the price of moves needs seconds of one.

    Args:
        run: runs one expert forward and backward with so many tokens; what it leaves running on a GPU is waited
            for.
        tokens: numbers of tokens, each at least 1, up to what a hot expert receives in a step.
        comm: the ranks that measure at once.

    Raises:
        DistplbError: on every rank, with what `run` raised on one of them; or if they differ in `tokens`.
    """
    comm = WorldOfOne() if comm is None else comm
    nanoseconds, error = [0] * len(tokens), None
    try:
        nanoseconds = [round(1e9 * seconds) for seconds in _timed(run, tokens)]
    except Exception as caught:
        error = caught
    agree(comm, {"the tokens of the time curve (digest)": digest(list(tokens))}, error)
    told = told_by_root(comm, nanoseconds)
    return TimeCurve.through(tokens, [value * 1e-9 for value in told])


def _timed(run: Callable[[int], object], tokens: Sequence[int]) -> list[float]:
    """Medians. The points take turns, so that a slow moment of the machine hits all of them."""
    seconds: list[list[float]] = [[] for _ in tokens]
    for turn in range(_REPEATS + 1):
        for point, number in zip(seconds, tokens, strict=True):
            start = _now()
            run(number)
            if turn:
                point.append(_now() - start)
    return [statistics.median(point) for point in seconds]


def _now() -> float:
    """The time, once what runs on the current GPU has ended."""
    # Where nothing was ever run on one, to wait would begin to use it, and take of its memory.
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def measured_bandwidths(comm: Comm, topology: Topology, peers: Sequence[int], gpu: int) -> tuple[int, int]:
    """Bytes per second of a whole EP group inside its nodes and between them, all GPUs exchanging at once.

    Two short rounds in which each GPU sends to a neighbour. Where there is no such link, the other one's number; with
    a single GPU nothing is ever sent, and both are huge.

    Args:
        comm: all its ranks call this together.
        topology: of one EP group.
        peers: `[M]`, the ranks of this rank's EP group, by GPU.
        gpu: this rank's.
    """
    inside = _bandwidth(comm, peers, gpu, _ring(topology, inside=True)) if topology.gpus_per_node > 1 else 0
    between = _bandwidth(comm, peers, gpu, _ring(topology, inside=False)) if topology.num_nodes > 1 else 0
    found = told_by_root(comm, [inside or between or _NO_LINK, between or inside or _NO_LINK])
    return found[0], found[1]


def _ring(topology: Topology, *, inside: bool) -> list[int]:
    """`[M]`: the GPU that each GPU sends to."""
    size, num_gpus = topology.gpus_per_node, topology.num_gpus
    if inside:
        return [gpu // size * size + (gpu + 1) % size for gpu in range(num_gpus)]
    return [(gpu + size) % num_gpus for gpu in range(num_gpus)]


def _bandwidth(comm: Comm, peers: Sequence[int], gpu: int, target: Sequence[int]) -> int:
    data = torch.zeros(_PAYLOAD_BYTES, dtype=torch.uint8, device=comm.device)
    room = torch.empty_like(data)
    seconds = []
    for turn in range(4):
        start = _now()
        comm.exchange([(data, peers[target[gpu]])], [(room, peers[list(target).index(gpu)])])
        if turn:
            seconds.append(_now() - start)
    return max(1, round(len(target) * _PAYLOAD_BYTES / statistics.median(seconds)))
