"""Measurements are the same on all ranks: those of rank 0."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import pytest
import torch.distributed as dist
from jobs import Clock
from ranks import on_ranks

from distplb import DistplbError, TimeCurve, Topology, measured_curve
from distplb.comm.base import Round, WorldOfOne
from distplb.comm.torchdist import TorchComm
from distplb.train import measure

TOKENS = [64, 16, 256]


# --- the curve ------------------------------------------------------------------------------------------------------


class Expert:
    """Takes 3 + t µs plus 10 ns per token in turn t, on rank 1 ten times as long; first and last turn add 5 ms."""

    def __init__(self, clock: Clock, rank: int = 0) -> None:
        self.clock, self.slowness, self.runs = clock, 10**rank, list[int]()

    def __call__(self, tokens: int) -> None:
        turn = len(self.runs) // len(TOKENS)
        self.runs.append(tokens)
        self.clock.now += self.slowness * (3e-6 + 1e-6 * turn + 1e-8 * tokens) + (5e-3 if turn in (0, 7) else 0.0)


def test_a_curve_is_the_medians_of_points_that_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(measure, "_now", clock.perf_counter)
    expert = Expert(clock)
    assert measured_curve(expert, TOKENS) == TimeCurve((0, 16, 64, 256), (0, 7160, 7640, 9560))
    assert expert.runs == TOKENS * 8


def test_a_real_run_that_takes_longer_for_more_tokens_gives_a_rising_curve() -> None:
    curve = measured_curve(lambda tokens: time.sleep(tokens * 2e-5), TOKENS)
    assert curve.tokens == (0, 16, 64, 256)
    assert all(least < most for least, most in zip(curve.nanoseconds, curve.nanoseconds[1:], strict=False))
    assert curve.nanoseconds[-1] >= 256 * 20_000


def test_a_curve_that_was_measured_falling_never_falls(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(measure, "_now", clock.perf_counter)

    def run(tokens: int) -> None:
        clock.now += {16: 4e-6, 64: 2e-6, 256: 9e-6}[tokens]

    assert measured_curve(run, TOKENS).nanoseconds == (0, 3000, 3000, 9000)


def root_curve() -> TimeCurve:
    clock = Clock()
    measure._now = clock.perf_counter
    return measured_curve(Expert(clock, dist.get_rank()), TOKENS, comm=TorchComm())


def failing_curve(case: str) -> str:
    odd = dist.get_rank() == 1
    tokens = {"tokens": [64, 17, 256], "fewer": [64], "none": []}.get(case, TOKENS) if odd else TOKENS
    tokens = [] if case == "none" else tokens

    def run(tokens: int) -> None:
        if odd and case == "run" and tokens == 256:
            raise MemoryError("256 tokens do not fit")

    try:
        measured_curve(run, tokens, comm=TorchComm())
    except DistplbError as error:
        return str(error)
    return "no error"


def curves() -> dict[str, Any]:
    return {"curve": root_curve()} | {case: failing_curve(case) for case in ("run", "tokens", "fewer", "none")}


def test_a_curve_is_rank_0s_on_all_ranks_and_so_is_an_error() -> None:
    """If ranks measured the same number of points at different token counts, they continued with different curves."""
    for found in on_ranks(2, curves, deadline=60):
        assert found["curve"] == TimeCurve((0, 16, 64, 256), (0, 7160, 7640, 9560))
        assert found["run"] == "rank 1: MemoryError('256 tokens do not fit')"
        assert "ranks disagree on the tokens of the time curve (digest)" in found["tokens"]
        assert "ranks disagree on the tokens of the time curve (digest)" in found["fewer"]
        assert found["none"].startswith("rank 0: tokens is empty; pass integers of at least 1, such as (1024, 4096)")


# --- the links ------------------------------------------------------------------------------------------------------


class Listening(TorchComm):
    """Records its peers; by its clock a message takes 0.1 ms plus the time of its bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: set[tuple[int, int]] = set()
        self.clock, self.bytes_per_second = Clock(), 1e9 if self.rank == 0 else 3e6

    def exchange(self, rounds: Sequence[Round]) -> None:
        (((data, to),), ((room, source),)), *others = rounds
        assert not others
        assert data.data_ptr() != room.data_ptr()
        self.heard.add((to, source))
        super().exchange(rounds)
        self.clock.now += 1e-4 + data.numel() / self.bytes_per_second


def links(layouts: list[tuple[tuple[int, int], list[int]]]) -> list[dict[str, Any]]:
    """The measurements for each topology and rank order, with the real clock and with the test's clock."""
    really, found = measure._now, []
    for (nodes, gpus), gpu_of_rank in layouts:
        comm, topology = Listening(), Topology(nodes, gpus)
        gpu = gpu_of_rank[comm.rank]
        group = gpu_of_rank[: comm.rank].count(gpu)
        peers = [
            [rank for rank, own in enumerate(gpu_of_rank) if own == number][group] for number in range(nodes * gpus)
        ]
        measure._now = really
        measure._MOST_BYTES = 1 << 20
        bandwidths = measure.measured_bandwidths(comm, topology, peers, gpu)
        measure._now = comm.clock.perf_counter
        timed = measure.measured_bandwidths(comm, topology, peers, gpu)
        found.append({"bandwidths": bandwidths, "timed": timed, "heard": comm.heard})
    return found


def test_bandwidths_of_two_ranks_are_positive_and_equal_on_both() -> None:
    for found in on_ranks(2, links, [((1, 2), [0, 1]), ((2, 1), [0, 1]), ((2, 1), [1, 0])], deadline=60):
        for of_topology in found:
            inside, between = of_topology["bandwidths"]
            assert inside == between > 0  # there is only one kind of link
            assert of_topology["timed"] == pytest.approx((2e9, 2e9))  # both GPUs, at rank 0's rate
    ranks = on_ranks(2, links, [((1, 2), [0, 1])], deadline=60)
    assert len({found[0]["bandwidths"] for found in ranks}) == 1


def test_bandwidths_of_four_ranks_are_of_neighbours_inside_nodes_and_between_them() -> None:
    layouts = [((2, 2), [0, 1, 2, 3]), ((2, 2), [3, 1, 0, 2]), ((1, 2), [0, 0, 1, 1])]
    ranks = on_ranks(4, links, layouts, deadline=60)
    for nth in range(len(layouts)):
        assert len({found[nth]["bandwidths"] for found in ranks}) == 1
        assert min(ranks[0][nth]["bandwidths"]) > 0
    for found in ranks:
        assert found[0]["timed"] == pytest.approx((4e9, 4e9))
        assert found[2]["timed"] == pytest.approx((2e9, 2e9))  # of one EP group
    # By rank: (to, from), inside nodes and between them.
    assert [found[0]["heard"] for found in ranks] == [
        {(1, 1), (2, 2)},
        {(0, 0), (3, 3)},
        {(3, 3), (0, 0)},
        {(2, 2), (1, 1)},
    ]
    assert [found[1]["heard"] for found in ranks] == [  # ranks 2, 1 are node 0, ranks 3, 0 are node 1
        {(3, 3), (1, 1)},
        {(2, 2), (0, 0)},
        {(1, 1), (3, 3)},
        {(0, 0), (2, 2)},
    ]
    assert [found[2]["heard"] for found in ranks] == [{(2, 2)}, {(3, 3)}, {(0, 0)}, {(1, 1)}]


class Simulated(WorldOfOne):
    """Rank 0 of two, on a simulated link: a message takes a latency plus the time of its bytes."""

    size = 2

    def __init__(self, latency: float, bytes_per_second: float) -> None:
        super().__init__()
        self.clock, self.latency, self.bytes_per_second = Clock(), latency, bytes_per_second
        self.largest = 0

    def exchange(self, rounds: Sequence[Round]) -> None:
        (((data, _),), _), *_ = rounds
        self.largest = max(self.largest, data.numel())
        self.clock.now += self.latency + data.numel() / self.bytes_per_second


@pytest.mark.parametrize(
    ("latency", "bytes_per_second"),
    [(2e-4, 3e11), (5e-5, 2e10), (1e-3, 1e9), (2e-4, 1.25e8), (0.03, 1.25e7), (1e-3, 1.25e6), (0.0, 1e5)],
)
def test_the_bandwidth_of_a_link_is_bytes_over_seconds_and_not_its_latency(
    latency: float, bytes_per_second: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """4 MiB over NVLink take 14 µs, with all calls a hundred: moves were priced more than ten times too high."""
    comm = Simulated(latency, bytes_per_second)
    monkeypatch.setattr(measure, "_now", comm.clock.perf_counter)
    found = measure.measured_bandwidths(comm, Topology(1, 2), [0, 1], 0)
    assert found == pytest.approx((2 * bytes_per_second,) * 2, rel=1e-3)
    assert comm.largest <= 1 << 26
    assert comm.clock.now < 3


def test_where_latency_hides_the_transfer_a_bandwidth_is_no_more_than_twice_what_was_seen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    comm = Simulated(0.5, 1e15)
    monkeypatch.setattr(measure, "_now", comm.clock.perf_counter)
    inside, _ = measure.measured_bandwidths(comm, Topology(1, 2), [0, 1], 0)
    assert 2 * (1 << 26) / 0.5 <= inside <= 2 * 2 * (1 << 26) / 0.5


def test_a_ring_of_three_sends_one_way() -> None:
    assert measure._ring(Topology(2, 3), inside=True) == [1, 2, 0, 4, 5, 3]
    assert measure._ring(Topology(3, 2), inside=False) == [2, 3, 4, 5, 0, 1]


def test_a_gpu_alone_has_links_that_cost_nothing() -> None:
    assert measure.measured_bandwidths(WorldOfOne(), Topology(1, 1), [0], 0) == (1 << 60, 1 << 60)


def test_alone_an_error_is_told_as_it_is() -> None:
    def run(tokens: int) -> None:
        raise DistplbError(f"{tokens} tokens are too many")

    with pytest.raises(DistplbError, match=r"^64 tokens are too many$"):
        measured_curve(run, TOKENS)
