"""Measures, on the job's own machines, the time of an expert and the bandwidth of the links.

All ranks measure at the same time, as they do when training; all use the result of rank 0.
Shapes: M GPUs of an EP group.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from distplb.comm.agreement import agree, digest, root_values
from distplb.comm.base import Comm, WorldOfOne, refuse_other_comm
from distplb.core.arguments import refuse_wrong_types, shown, whole_number
from distplb.core.price import TimeCurve
from distplb.core.topology import Topology
from distplb.errors import DistplbError, in_stage

__all__ = ["measured_bandwidths", "measured_curve"]

_REPEATS = 7
_LEAST_BYTES, _MOST_BYTES = 1 << 16, 1 << 26  # of one message; the most is four times as much on a GPU
_LEAST_SECONDS, _MOST_SECONDS = 0.05, 0.5  # least of one message, so that bursts do not count; most of all timed
_LATENCIES = 20  # a message should take this many times the latency of the library's calls
_NO_LINK = 1 << 60  # bytes per second if nothing is ever sent


def measured_curve(run: Callable[[int], object], tokens: Sequence[int], *, comm: Comm | None = None) -> TimeCurve:
    """Measure the time curve of an expert: medians of 7 rounds, after one that is not timed.

    Collective with a `comm`. For a grouped matrix product, `run` may run several experts with the given number of
    tokens each; the curve is then the time of all of them. That is enough for the planner, which only needs
    proportions, but the price of moves needs the seconds of one expert.

    Args:
        run: runs one expert forward and backward with the given number of tokens. GPU work that it leaves running is
            timed too.
        tokens: token counts to time, each at least 1, up to what a hot expert receives in a step.
        comm: the ranks that measure at the same time.

    Raises:
        DistplbError: on every rank, if `run` raises on any rank, or `tokens` differs between ranks.
    """
    refuse_other_comm(comm, moves=False)
    comm = WorldOfOne() if comm is None else comm
    nanoseconds: list[int] = []
    error: Exception | None = None
    try:
        refuse_wrong_types({"run": (run, (Callable,), "a function that takes a number of tokens")})
        tokens = _numbers(tokens)
        nanoseconds = [round(1e9 * seconds) for seconds in _timed(run, tokens)]
    except Exception as caught:
        error = caught
    agree(comm, {"the tokens of the time curve (digest)": 0 if error else digest(tokens)}, error)
    told = root_values(comm, nanoseconds)
    return TimeCurve.through(tokens, [value * 1e-9 for value in told])


def _numbers(tokens: Sequence[int]) -> list[int]:
    """The token counts as Python integers of at least 1."""
    wanted = "integers of at least 1, such as (1024, 4096)"
    try:
        found = list(tokens)
    except TypeError:
        raise DistplbError(f"tokens is {shown(tokens)}; pass {wanted}") from None
    if not found:
        raise DistplbError(f"tokens is empty; pass {wanted}")
    return [whole_number(f"tokens[{nth}]", number, minimum=1) for nth, number in enumerate(found)]


def _timed(run: Callable[[int], object], tokens: Sequence[int]) -> list[float]:
    """Median seconds of each point. The points take turns, so that a slow moment of the machine affects all of them."""
    seconds: list[list[float]] = [[] for _ in tokens]
    for turn in range(_REPEATS + 1):
        for point, number in zip(seconds, tokens, strict=True):
            start = _now()
            run(number)
            if turn:
                point.append(_now() - start)
    return [statistics.median(point) for point in seconds]


def _now() -> float:
    """The time after all work on the current GPU has ended."""
    # If CUDA was never used, synchronising would initialise it and take GPU memory.
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def measured_bandwidths(comm: Comm, topology: Topology, peers: Sequence[int], gpu: int) -> tuple[int, int]:
    """Measure bytes per second of a whole EP group inside nodes and between them, with all GPUs exchanging at once.

    Each GPU sends to a neighbour, inside its node and then in another node. The time of a one-byte message is
    subtracted, because a move pays for library calls, synchronisation and kernels only once for all its messages.
    Messages grow until the transfer takes most of the time, up to 64 MiB (on a GPU 256 MiB, or a sixteenth of its free
    memory if that is less). If the topology has only one of the two kinds of link, both results are those of this link.
    With a single GPU nothing is ever sent, and both are huge.

    Args:
        comm: all its ranks call this together.
        topology: the nodes and GPUs of one EP group.
        peers: `[M]`, the ranks of this rank's EP group, by GPU.
        gpu: the GPU of this rank in its EP group.
    """
    refuse_other_comm(comm, moves=True)
    refuse_wrong_types(
        {
            "topology": (topology, (Topology,), "a Topology"),
            "peers": (peers, (Sequence,), "the ranks of this rank's EP group, by GPU"),
            "gpu": (gpu, (int,), "this rank's index in its EP group"),
        }
    )
    peers = [whole_number(f"peers[{nth}]", peer) for nth, peer in enumerate(peers)]
    inside = _bandwidth(comm, peers, gpu, _ring(topology, inside=True)) if topology.gpus_per_node > 1 else 0
    between = _bandwidth(comm, peers, gpu, _ring(topology, inside=False)) if topology.num_nodes > 1 else 0
    found = root_values(comm, [inside or between or _NO_LINK, between or inside or _NO_LINK])
    return found[0], found[1]


def _ring(topology: Topology, *, inside: bool) -> list[int]:
    """`[M]`: the GPU that each GPU sends to."""
    size, num_gpus = topology.gpus_per_node, topology.num_gpus
    if inside:
        return [gpu // size * size + (gpu + 1) % size for gpu in range(num_gpus)]
    return [(gpu + size) % num_gpus for gpu in range(num_gpus)]


def _bandwidth(comm: Comm, peers: Sequence[int], gpu: int, target: Sequence[int]) -> int:
    """Bytes per second of all GPUs together, by this rank's clock; rank 0 decides the sizes of messages."""
    to, source = peers[target[gpu]], peers[list(target).index(gpu)]

    def seconds(size: int, times: int) -> float:
        data, room = _buffers(comm, size)
        found = []
        for _ in range(times):
            start = _now()
            comm.exchange([([(data, to)], [(room, source)])])
            found.append(_now() - start)
        return statistics.median(found)

    most = _most_bytes(comm)
    seconds(1, 1)  # not timed: the first message also sets up connections
    latency = seconds(1, _REPEATS)
    size, enough = _LEAST_BYTES, 0
    while not enough:
        took = seconds(size, 1)
        (enough,) = root_values(comm, [took >= max(_LEAST_SECONDS, _LATENCIES * latency) or 2 * size > most])
        size *= 1 if enough else 2
    (times,) = root_values(comm, [max(1, min(_REPEATS, int(_MOST_SECONDS / max(took, 1e-9))))])
    took = seconds(size, times)
    # If latency still dominates, subtract at most half: beyond that the difference is noise.
    return max(1, round(len(target) * size / max(took - min(latency, took / 2), 1e-9)))


def _buffers(comm: Comm, size: int) -> tuple[Tensor, Tensor]:
    """Allocate a send and a receive buffer, on all ranks or on none."""
    data = room = torch.empty(0, dtype=torch.uint8, device=comm.device)
    error: Exception | None = None
    try:
        data = torch.ones(size, dtype=torch.uint8, device=comm.device)  # written once, so that all pages are mapped
        room = torch.ones_like(data)
    except Exception as caught:
        error = in_stage("count", caught)
    agree(comm, {}, error)
    return data, room


def _most_bytes(comm: Comm) -> int:
    """Most bytes of one message, so that all ranks have room for two."""
    if comm.device.type != "cuda":
        return _MOST_BYTES
    free, _ = torch.cuda.mem_get_info(comm.device)
    least = torch.tensor([min(4 * _MOST_BYTES, free // 16)], device=comm.device)
    comm.all_reduce_min(least)
    return int(least)
