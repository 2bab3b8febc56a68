"""The observer: the time between two calls, and the load of several EP groups, one group per step.

Shapes: T steps, L layers, E experts, P slots, M GPUs.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from jobs import EXPERTS, LAYERS, SLOT_BYTES, Clock, Job
from ranks import on_ranks
from torch import Tensor

from distplb import DistplbError, LoadWindow, Placement, Topology
from distplb.comm.base import WorldOfOne
from distplb.comm.torchdist import TorchComm
from distplb.records.events import RebalanceEvent
from distplb.train import observer
from distplb.train.observer import Observer, steps_digest
from distplb.train.stop_loss import Pace


def alone(window: LoadWindow | None = None) -> Observer:
    return Observer(LoadWindow(1, 2, 4) if window is None else window, WorldOfOne(), Topology(1, 1), 0, seed=0)


# --- the clock ------------------------------------------------------------------------------------------------------


def test_the_pace_is_of_the_training_loop_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(observer, "time", clock)
    job = alone()
    assert job.pace() == Pace(0.0, 0.0, 0)
    for seconds in (7.0, 2.0, 1.0, 2.0):  # the start of the first one is unknown
        clock.now += seconds
        job.iteration_ends()
        clock.now += 100.0  # a rebalance
        job.loop_goes_on()
    assert job.pace() == Pace.of([2.0, 1.0, 2.0])
    assert job.pace() == Pace(0.0, 0.0, 0)
    clock.now += 5.0
    job.iteration_ends()
    assert job.pace() == Pace.of([5.0])


def test_the_time_before_a_clear_and_of_what_is_done_then_is_nobodys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Iterations before `apply` were added to those under its placement, and its own time to the next iteration."""
    clock = Clock()
    monkeypatch.setattr(observer, "time", clock)
    job = alone()
    for seconds, does_clear in ((9.0, False), (9.0, True), (50.0, False), (1.0, False), (1.0, False)):
        clock.now += seconds
        job.iteration_ends()
        job.loop_goes_on()
        if does_clear:
            job.clear()
    assert job.iterations == 3
    assert job.pace() == Pace(1.0, 0.0, 2)


# --- alone ----------------------------------------------------------------------------------------------------------


def test_the_tokens_of_a_layer_are_of_layers_that_have_any() -> None:
    """Without measurements they set the price of a move: layers without tokens made moves cheaper."""
    window = LoadWindow(3, 2, 4)
    for _ in range(2):
        for layer, counts in enumerate(([10, 20], [0, 0], [30, 0])):
            window.add(layer, torch.tensor(counts), training=True)
    assert alone(window).tokens == 60
    assert alone().tokens == 0


def test_each_step_belongs_to_an_iteration_since_the_last_clear() -> None:
    window = LoadWindow(1, 2, 100)
    job = alone(window)
    job.iteration_ends()
    job.clear()
    for _ in range(4):
        for _ in range(3):  # micro-batches
            window.add(0, torch.tensor([1, 2]), training=True)
        job.iteration_ends()
    assert job.seen == 12
    found = job.iterations_of_steps(last=25, seen=12)
    assert found.tolist() == [22, 22, 22, 23, 23, 23, 24, 24, 24, 25, 25, 25]


def test_of_a_sample_of_the_steps_each_is_told_its_own_iteration() -> None:
    window = LoadWindow(1, 1, 5)
    job = alone(window)
    for iteration in range(1, 51):
        for _ in range(2):
            window.add(0, torch.tensor([iteration]), training=True)
        job.iteration_ends()
    told = job.iterations_of_steps(last=50, seen=job.seen)
    assert told.tolist() == window.load()[:, 0, 0].tolist()
    assert len(told) == 5


def test_a_load_is_by_expert_and_a_window_that_has_not_counted_is_refused() -> None:
    window = LoadWindow(1, 4, 2)
    job = alone(window)
    with pytest.raises(DistplbError, match=r"the window has no step that all layers have counted; have each layer's"):
        job.load(Placement.contiguous(1, 4, 1))
    window.add(0, torch.tensor([10, 11, 12, 13]), training=True)
    table = torch.tensor([[2, 0, 3, 1]])
    assert job.load(Placement(table, 4, 1)).tolist() == [[[11, 13, 10, 12]]]
    assert job.steps().tolist() == [0]


def test_windows_of_the_same_steps_have_the_same_digest() -> None:
    digests = [steps_digest(torch.tensor(steps)) for steps in ([0, 3, 7], [0, 3, 7], [0, 3, 8], [0, 3], [3, 0, 7])]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 4
    assert all(0 <= digest < 1 << 62 for digest in digests)


# --- several EP groups ----------------------------------------------------------------------------------------------

LAYOUTS = {"blocks": [0, 1, 0, 1], "strided": [0, 0, 1, 1], "mixed": [1, 0, 0, 1]}
GROUPS = {"blocks": [0, 0, 1, 1], "strided": [0, 1, 0, 1], "mixed": [0, 0, 1, 1]}  # by rank
STEPS = 8


def counts_of(group: int, gpu: int, step: int) -> Tensor:
    """`[L, P]`: different for every group, GPU and step."""
    first = 1 + torch.arange(LAYERS * EXPERTS).reshape(LAYERS, EXPERTS)
    return first * (1000 if group else 1) + 100_000 * gpu + 1_000_000 * step


def loads_of_groups(rounds: int) -> dict[str, Any]:
    """For each layout and round, the load that would be planned on, and the peers."""
    found: dict[str, Any] = {}
    comm = TorchComm()
    for name, gpu_of_rank in LAYOUTS.items():
        window = LoadWindow(LAYERS, EXPERTS, STEPS)
        gpu, group = gpu_of_rank[comm.rank], GROUPS[name][comm.rank]
        job = Observer(window, comm, Topology(1, 2), gpu, seed=3)
        loads = []
        for _ in range(rounds):
            for step in range(3 * STEPS):
                for layer in range(LAYERS):
                    window.add(layer, counts_of(group, gpu, step)[layer], training=True)
            load = job.load(Placement.contiguous(LAYERS, EXPERTS, 2))
            comm.all_reduce_sum(load)
            loads.append((job.steps().tolist(), load.tolist()))
            job.clear()
        found[name] = (job.peers, loads)
    return found


def test_each_step_is_of_exactly_one_group_and_each_group_has_half_of_them() -> None:
    ranks = on_ranks(4, loads_of_groups, 3, deadline=60)
    for name, gpu_of_rank in LAYOUTS.items():
        for rank, found in enumerate(ranks):
            members = [other for other in range(4) if GROUPS[name][other] == GROUPS[name][rank]]
            assert found[name][0] == sorted(members, key=lambda other: gpu_of_rank[other])
        _, loads = ranks[0][name]
        orders = set()
        for (steps, load), *others in zip(loads, *(found[name][1] for found in ranks[1:]), strict=True):
            assert all(load == other for _, other in others)
            wanted = [
                [(counts_of(group, 0, step) + counts_of(group, 1, step)).tolist() for step in steps] for group in (0, 1)
            ]
            of_group = [[group for group in (0, 1) if row == wanted[group][nth]] for nth, row in enumerate(load)]
            assert all(len(groups) == 1 for groups in of_group), of_group
            order = tuple(groups[0] for groups in of_group)
            assert sum(order) == STEPS // 2
            orders.add(order)
        assert len(orders) > 1  # the first group varies


def job_of_groups(gpu_of_rank: list[int], **options: Any) -> tuple[Job, Any]:
    job = Job(ranks=2)
    job.window = LoadWindow(LAYERS, EXPERTS, 2)
    gpu = gpu_of_rank[dist.get_rank()]
    return job, job.rebalancer(gpu=gpu, engine="reference", every=4, **options)


def refused_groups() -> dict[str, str]:
    found = {}
    cases: dict[str, Any] = {
        "three of one": {"gpu_of_rank": [0, 0, 0, 1]},
        "all of one": {"gpu_of_rank": [0, 0, 0, 0]},
        "none": {"gpu_of_rank": [None] * 4},
        "beyond": {"gpu_of_rank": [0, 1, 0, 2]},
        "fine": {"gpu_of_rank": LAYOUTS["strided"]},
    }
    for name, case in cases.items():
        try:
            job, rebalancer = job_of_groups(**case)
            for _ in range(4):
                job.iterate()
                rebalancer.step()
            found[name] = "no error"
        except DistplbError as error:
            found[name] = str(error)
    return found


def test_ranks_that_make_no_whole_groups_are_refused_on_all_of_them() -> None:
    """Each rank checked only its own group: the ranks of other groups continued, and waited for it."""
    ranks = on_ranks(4, refused_groups, deadline=60)
    for found in ranks:
        assert found["three of one"] == (
            "the ranks are GPUs [0, 0, 0, 1] of their EP groups, which do not form whole groups of 2; "
            "pass gpu=, this rank's index in its EP group"
        )
        assert "no rank holds element" in found["all of one"]
        assert "check `gpu`" in found["all of one"]
        assert "4 ranks hold 2 copies of the experts of 2 GPUs; pass gpu=" in found["none"]
        assert found["beyond"].startswith("rank 3: gpu is 2; pass this rank's index in its EP group, 0 to 1")
        assert found["fine"] == "no error"


def moved_in_groups(slots: int | None) -> dict[str, Any]:
    told: list[RebalanceEvent] = []
    limit = None if slots is None else 2 * slots * SLOT_BYTES  # over all ranks: each group moves its own copies
    job, rebalancer = job_of_groups(LAYOUTS["strided"], on_event=told.append, max_bytes=limit)
    counts = torch.full((LAYERS, EXPERTS), 10)
    counts[:, :2] = 90
    counts[:, 2] = 30 + 40 * (GROUPS["strided"][dist.get_rank()])
    for _ in range(4):
        job.iterate(counts)
        rebalancer.step()
    [event] = told
    names = ("slots_moved", "bytes_moved", "tokens_peak_before", "steps", "imbalance_before")
    return {name: getattr(event, name) for name in names} | {"placement": rebalancer.placement.digest()}


def both_budgets() -> list[dict[str, Any]]:
    return [moved_in_groups(None), moved_in_groups(2)]


def test_a_budget_is_over_all_ranks_and_copies_count() -> None:
    """It was divided by the bytes of one group's copy, so that D groups moved D times as much as allowed."""
    first, *others = on_ranks(4, both_budgets, deadline=60)
    assert all(other == first for other in others)
    free, limited = first
    assert free["bytes_moved"] == 2 * free["slots_moved"] * SLOT_BYTES
    assert free["slots_moved"] > 2
    assert limited["slots_moved"] == 2
    assert limited["bytes_moved"] == 2 * 2 * SLOT_BYTES
    # Each step is that of one group: GPU 0 has the tokens of its own group's two ranks, in both layers.
    assert free["tokens_peak_before"] == 2 * LAYERS * (90 + 90 + 70 + 10)
    assert free["steps"] == 2
    both = [(2 * (180 + third + 10)) / (180 + third + 50) for third in (30, 70)]
    assert free["imbalance_before"] == pytest.approx((sum(both) / 2,) * LAYERS)


def test_a_group_alone_has_all_steps() -> None:
    assert on_ranks(2, whole_group, deadline=60) == [([1, 0], [[[1, 2, 3, 4]]] * 5)] * 2


def whole_group() -> tuple[list[int], list[Any]]:
    window, comm = LoadWindow(1, 4, 8), TorchComm()
    job = Observer(window, comm, Topology(2, 1), 1 - comm.rank, seed=0)
    for _ in range(5):
        window.add(0, torch.tensor([1, 2, 3, 4]), training=True)
    return job.peers, job.load(Placement.contiguous(1, 4, 2)).tolist()
