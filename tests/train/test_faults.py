"""Ranks that are killed, are stopped or raise, at each of the six stages: the errors of the others, and their state.

Each cell of the matrix has its own process group, which is unusable afterwards. Cells spend most of their time waiting,
so several run at once.
"""

from __future__ import annotations

import os
import re
import signal
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from jobs import DIM, EXPERTS, LAYERS, Job, by_slot, skewed
from ranks import on_ranks, outcomes_on_ranks

import distplb.migrate.transfer as transfer
from distplb import DistplbError, Placement
from distplb.comm.torchdist import TorchComm, is_loss
from distplb.core.stages import Stages
from distplb.errors import HalfMovedError, LostRanksError
from distplb.migrate.staging import CommitStaging
from distplb.planning.plan import PlanResult, StagedPlan

STAGES = ("count", "search", "choose", "polish", "share", "move")
FAULTS = ("kill", "stop", "raise")
DEADLINE = 6.0
SLACK = 20.0  # for busy cores; without the deadline ranks would wait for 300 s
SIDE_BY_SIDE = 4


def victim_of(stage: str, size: int) -> int:
    """The root if it works alone or the others wait for it; else the last rank."""
    return 0 if stage in ("polish", "share") else size - 1


def broken(stage: str, fault: str, side_group: bool) -> dict[str, Any]:
    """The outcome on one rank of the rebalance in which the victim fails."""
    transfer._STAGING_BYTES = 1  # one commit per swap
    pids = torch.zeros(dist.get_world_size(), dtype=torch.int64)
    pids[dist.get_rank()] = os.getpid()
    dist.all_reduce(pids)
    job = Job()
    mark(job)
    comm = TorchComm(deadline=DEADLINE, side_group=side_group)
    rebalancer = job.rebalancer(comm=comm, num_candidates=8, engine="reference")
    victim = victim_of(stage, comm.size)
    if comm.rank == victim:
        arm(stage, fault, job)
    found: dict[str, Any] = {"kind": None}
    for _ in range(2):
        iterate(job, rebalancer)
        began = time.monotonic()
        try:
            rebalancer.step()
        except Exception as error:
            found |= {"kind": type(error).__name__, "text": str(error), "seconds": time.monotonic() - began}
            found["is of ours"] = isinstance(error, DistplbError)
    found["whole"] = is_whole(job, rebalancer)
    try:
        rebalancer.state_dict()
        found["poisoned"] = False
    except HalfMovedError:
        found["poisoned"] = True
    if fault == "stop" and comm.rank == (1 if victim == 0 else 0):
        os.kill(int(pids[victim]), signal.SIGKILL)  # a stopped process would stay
    return found


def iterate(job: Job, rebalancer: Any) -> None:
    """One iteration with a hot pair on the first GPU; weights and moments stay as `mark` set them."""
    counts = by_slot(skewed((0, 1)), rebalancer.placement)
    for layer in range(LAYERS):
        job.window.add(layer, counts[layer], training=True)


def mark(job: Job) -> None:
    """Set every element of an expert and of its moments to the expert's id, plus 100 l in layer l."""
    job.iterate()
    job.window.clear()
    job.optimizer.zero_grad(set_to_none=True)
    own = len(job.weights[0])
    for layer, weight in enumerate(job.weights):
        number = torch.arange(job.rank * own, (job.rank + 1) * own) + 100.0 * layer
        for tensor in (weight.data, *moments(job, weight)):
            tensor.copy_(number[:, None, None].expand_as(tensor))


def moments(job: Job, weight: Any) -> list[torch.Tensor]:
    state = job.optimizer.state[weight]
    return [state["exp_avg"], state["exp_avg_sq"]]


def is_whole(job: Job, rebalancer: Any) -> bool:
    """Whether all slots of this rank hold the experts of the placement in force."""
    own = len(job.weights[0])
    for layer, weight in enumerate(job.weights):
        expert = rebalancer.placement.expert_of_slot[layer, job.rank * own : (job.rank + 1) * own] + 100.0 * layer
        wanted = expert[:, None, None].expand(own, DIM, 2 * DIM)
        if not all(torch.equal(tensor, wanted) for tensor in (weight.data, *moments(job, weight))):
            return False
    return True


def arm(stage: str, fault: str, job: Job) -> None:
    """Make this process fail on entering the stage; in the move stage, after one commit was written."""
    if stage == "move":
        original_pack, calls = CommitStaging.pack, iter(range(100))

        def pack(self: CommitStaging, step: Any) -> None:
            if next(calls) == 1:
                strike(fault)
            original_pack(self, step)

        CommitStaging.pack = pack  # type: ignore[method-assign]
        return
    original = Stages.stage

    @contextmanager
    def entered(self: Stages, name: str) -> Iterator[None]:
        with original(self, name):
            if name == stage:
                strike(fault)
            yield

    Stages.stage = entered  # type: ignore[method-assign,assignment]


def strike(fault: str) -> None:
    if fault == "raise":
        raise MemoryError("no room")
    os.kill(os.getpid(), signal.SIGKILL if fault == "kill" else signal.SIGSTOP)


def cell(stage: str, fault: str, size: int, side_group: bool = False) -> list[dict[str, Any]]:
    """The results of the survivors; the victim of a `raise` is not among them."""
    outcomes = outcomes_on_ranks(size, broken, stage, fault, side_group, deadline=DEADLINE + 30)
    survivors = [outcome for rank, outcome in enumerate(outcomes) if rank != victim_of(stage, size)]
    assert all(answered for answered, _ in survivors), survivors
    return [found for _, found in survivors]


@pytest.fixture(scope="module", params=[4, pytest.param(2, marks=pytest.mark.long)], ids=["4 ranks", "2 ranks"])
def matrix(request: pytest.FixtureRequest) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """All cells for a number of ranks, several at a time because they mostly wait for their deadline."""
    cells = [(stage, fault) for stage in STAGES for fault in FAULTS]
    with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
        return dict(zip(cells, pool.map(lambda one: cell(*one, request.param), cells), strict=True))


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("fault", FAULTS)
def test_all_others_hear_of_it_in_time_and_none_is_left_half_moved(
    matrix: dict[tuple[str, str], list[dict[str, Any]]], fault: str, stage: str
) -> None:
    victim = victim_of(stage, len(matrix[stage, fault]) + 1)
    for found in matrix[stage, fault]:
        assert found["is of ours"], found
        assert found["seconds"] < DEADLINE + SLACK
        # Other ranks notice where they next wait for the victim, unless it could report the error itself.
        where = WAITED_FOR_IN.get(stage, stage)
        if "no room" in found["text"]:
            assert found["text"] == f"rank {victim}: in stage {stage}: MemoryError('no room')"
        else:
            assert re.search(rf"in stage {where}: ranks? [\d, ]*\b{victim}\b[\d, ]* did not answer", found["text"])
        if stage == "move" and fault != "raise":
            assert found["kind"] == "HalfMovedError"
            assert found["poisoned"]
        else:
            assert found["whole"]
            assert not found["poisoned"]


WAITED_FOR_IN = {"search": "choose", "polish": "share"}


# --- with a side group, late ranks, and afterwards --------------------------------------------------------------


@pytest.mark.parametrize("fault", ["kill", "stop"])
def test_ranks_that_meet_in_a_side_group_hear_of_it_there(fault: str) -> None:
    """As over NCCL, whose kernels cannot be cancelled: no rank launches one before all ranks have arrived."""
    for found in cell("choose", fault, 2, side_group=True):
        assert found["kind"] == "LostRanksError"
        assert re.search(r"in stage choose: rank 1 did not answer", found["text"])
        assert found["seconds"] < DEADLINE + SLACK


def late_and_lost() -> dict[str, Any]:
    comm = TorchComm(deadline=DEADLINE)
    value = torch.ones(1)
    if comm.rank == 1:
        time.sleep(DEADLINE / 2)  # longer than one polling interval
    comm.all_reduce_sum(value)
    found: dict[str, Any] = {"late": float(value)}
    if comm.rank == 2:
        return found
    for name in ("first", "again"):
        began = time.monotonic()
        try:
            comm.broadcast(value, 2)
        except LostRanksError as error:
            found |= {name: time.monotonic() - began, "missing": error.missing, "stage": error.stage}
    return found


def test_a_late_rank_is_waited_for_and_after_a_loss_nobody_is() -> None:
    first, second, third = on_ranks(3, late_and_lost)
    assert first["late"] == second["late"] == third["late"] == 3
    for found in (first, second):
        assert found["missing"] == (2,)
        assert found["stage"] is None
        assert found["again"] < 0.5


# --- errors that are not lost ranks -----------------------------------------------------------------------------


def of_a_call() -> tuple[str, str, float]:
    """Rank 1 makes a call that torch refuses while rank 0 waits for it: the errors of each, then and afterwards."""
    comm = TorchComm(deadline=50)
    found, began = [], time.monotonic()
    for root in (7 if comm.rank == 1 else 0, 0):
        try:
            comm.broadcast(torch.ones(1), root)
        except Exception as error:
            found.append(f"{type(error).__name__}: {error}")
    return found[0], found[1], time.monotonic() - began


def test_an_error_of_one_rank_is_told_as_what_it_is_and_the_others_hear_of_it() -> None:
    """It was reported as the loss of all other ranks, each of which waited until its deadline."""
    (waiting, waits_no_more, first), (refused, then, second) = on_ranks(2, of_a_call, deadline=60)
    assert refused == "RuntimeError: ProcessGroupGloo::broadcast: invalid root rank: 7"
    assert re.match("LostRanksError: .*rank 1 failed: RuntimeError.'ProcessGroupGloo::broadcast: invalid root", waiting)
    assert waits_no_more == waiting
    assert then.startswith("LostRanksError: a collective failed (an earlier call failed on this rank: Runtim")
    assert max(first, second) < 40


LOST = [
    RuntimeError("[pair.cc:537] Read error [127.0.0.1]:1: Connection reset by peer. This is typically caused by a"),
    RuntimeError("[unbound_buffer.cc:81] Timed out waiting 2000ms for recv operation to complete"),
    RuntimeError("[pair.cc:152] Application timeout caused pair closure"),
    RuntimeError("Connection closed by peer [127.0.0.1]:1"),
    dist.DistNetworkError("The client socket has timed out after 5000ms"),
    dist.DistBackendError("NCCL communicator was aborted on rank 0. Original reason was: watchdog"),
    dist.DistBackendError("NCCL error: remote process exited or there was a network error"),
]
NOT_LOST = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"),
    RuntimeError("ProcessGroupGloo::broadcast: invalid root rank: 7"),
    RuntimeError("No backend type associated with device type meta"),
    RuntimeError("input tensor has to be contiguous"),
    NotImplementedError("Could not run 'c10d::allreduce_' with arguments from the 'SparseCsrCPU' backend"),
    dist.DistBackendError("NCCL error in: ProcessGroupNCCL.cpp:42, ncclInvalidUsage: usage that peers closed"),
    ValueError("Tensors must be contiguous"),
]


@pytest.mark.parametrize("error", [*LOST, *NOT_LOST], ids=lambda error: str(error)[:40])
def test_what_a_library_says_of_lost_ranks_is_told_from_what_it_says_of_a_call(error: Exception) -> None:
    """The texts are those of torch 2.13."""
    assert is_loss(error) == any(error is lost for lost in LOST)


# --- digests that differ ----------------------------------------------------------------------------------------


def differing(what: str) -> dict[str, Any]:
    """Six iterations with three rebalances; at the second, rank 1 differs."""
    job, events = Job(), []
    rebalancer = job.rebalancer(comm=TorchComm(deadline=30), num_candidates=2, on_event=events.append)
    warned = []
    for iteration in range(1, 7):
        job.iterate(skewed((0, 1)))  # the first two slots, whichever experts they hold
        if iteration == 4 and job.rank == 1:
            spoil(what, job)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            rebalancer.step()
        warned += [(iteration, str(warning.message)) for warning in caught if "distplb" in str(warning.message)]
    done = [event for event in events if event.imbalance_next is None]
    return {
        "decisions": [(event.iteration, event.decision, event.last_applied) for event in done],
        "reason": done[1].reason,
        "slots": done[1].slots_moved,
        "warned": warned,
        "last": rebalancer.last_applied,
    }


def spoil(what: str, job: Job) -> None:
    if what == "steps":  # one more than on the other ranks
        for layer in range(LAYERS):
            job.window.add(layer, torch.ones(EXPERTS, dtype=torch.int64), training=True)
        return
    share = StagedPlan.share

    def other_placement(self: StagedPlan) -> PlanResult:
        planned = share(self)
        StagedPlan.share = share  # type: ignore[method-assign]
        table = planned.placement.expert_of_slot.flip(1)
        return replace(planned, placement=Placement(table, EXPERTS, planned.placement.num_gpus))

    StagedPlan.share = other_placement  # type: ignore[method-assign]


@pytest.mark.parametrize(("what", "words"), [("steps", "the steps in the window"), ("placement", "the placement")])
def test_a_digest_that_differs_skips_the_rebalance_and_training_goes_on(what: str, words: str) -> None:
    for found in on_ranks(2, differing, what, deadline=60):
        assert [(iteration, decision) for iteration, decision, _ in found["decisions"]] == [
            (2, "moved"),
            (4, "skipped"),
            (6, "moved"),
        ]
        assert [last for *_, last in found["decisions"]] == [2, 2, 6]
        assert found["last"] == 6
        assert found["slots"] == 0
        assert f"ranks disagree on {words} (digest)" in found["reason"]
        assert found["warned"] == [(4, f"distplb has skipped a rebalance: {found['reason']}")]
