"""MPI gives the same plans as any other communicator, moves nothing, and never waits for ever."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conformance import conforms
from mpi_ranks import MPIEXEC, on_mpi_ranks
from plan_cases import PLANS, SELECTION, selected_plans, skewed_load

from distplb import DistplbError, Topology, plan
from distplb.comm.base import WorldOfOne
from distplb.comm.mpi import MpiComm
from distplb.errors import LostRanksError

pytestmark = pytest.mark.skipif(MPIEXEC is None, reason="no mpiexec, or no mpi4py: pip install mpich mpi4py")

DEADLINE = 2.0  # seconds; short, but longer than a process pauses when cores are shared


def refusal(call: Any) -> str:
    try:
        call()
    except DistplbError as error:
        return f"{type(error).__name__} {error}"
    return "no error"


def conforming_and_planning() -> dict[str, Any]:
    """Everything that ranks can show in one start of their processes."""
    from mpi4py import MPI

    comm, world = MpiComm(), MPI.COMM_WORLD
    conforms(comm, pairs=[])
    halves = world.Split(world.rank % 2, -world.rank)  # in the opposite order
    conforms(MpiComm(halves), pairs=[])
    buffer = torch.zeros(1, dtype=torch.uint8)
    refused = [
        refusal(lambda: comm.exchange([([(buffer, 0)], [])])),
        refusal(lambda: MpiComm(MPI.COMM_NULL)),
        refusal(lambda: MpiComm(deadline=0)),
        refusal(lambda: plan(skewed_load()[:, :, : 8 * (1 + comm.rank)], Topology(1, 4), comm=comm)),
    ]
    return {
        "refused": refused,
        "plans": selected_plans(comm),
        "topology": [Topology.from_env().num_nodes, Topology.from_env().gpus_per_node],
    }


@pytest.fixture(scope="module")
def alone() -> dict[str, list[list[int]]]:
    return selected_plans(WorldOfOne())


@pytest.mark.parametrize("ranks", [2, *(pytest.param(ranks, marks=pytest.mark.long) for ranks in (1, 4))])
def test_mpi_conforms_and_plans_what_one_process_plans(ranks: int, alone: dict[str, list[list[int]]]) -> None:
    assert set(SELECTION) <= set(PLANS)
    for answer in on_mpi_ranks(ranks, conforming_and_planning):
        assert answer["plans"] == alone
        assert answer["topology"] == [1, ranks]
        move, null, deadline, differing = answer["refused"]
        assert move == "DistplbError MpiComm only plans and cannot move experts; pass a TorchComm to move them"
        assert "pass an mpi4py Intracomm that this process belongs to, or None" in null
        assert deadline == "DistplbError deadline is 0; pass a positive number of seconds"
        wording = f"DisagreementError ranks disagree on the load's experts: 8 on one, {8 * min(ranks, 4)} on another"
        assert differing == "no error" if ranks == 1 else differing.startswith(wording)


def late(folder: str) -> list[Any]:
    """What ranks 0 and 2 raise while rank 1 stays away, and rank 1 when it arrives; then one more call each."""
    comm, heard = MpiComm(deadline=DEADLINE), []
    comm.all_reduce_sum(torch.ones(1, dtype=torch.int64))
    until = time.monotonic() + 30
    while comm.rank == 1 and len(list(Path(folder).iterdir())) < 2 and time.monotonic() < until:
        time.sleep(0.05)
    while not heard and time.monotonic() < until:
        try:
            comm.all_reduce_min(torch.ones(1, dtype=torch.int64))
        except LostRanksError as lost:
            heard += [list(lost.missing), str(lost)]
    (Path(folder) / f"{comm.rank} has given up").touch()
    began = time.monotonic()
    with pytest.raises(LostRanksError):
        comm.broadcast(torch.ones(1, dtype=torch.int64), comm.rank)  # its root would not have waited for any rank
    return [*heard, time.monotonic() - began < DEADLINE]


def test_a_rank_that_does_not_come_in_time_is_named_and_nobody_goes_on(tmp_path: Path) -> None:
    first, slow, last = on_mpi_ranks(3, late, str(tmp_path))
    for missing, text, at_once in (first, last):
        assert missing == [1]
        assert text.startswith("rank 1 did not answer (waited ")
        assert at_once
    # The others had checked in when they timed out.
    assert slow[0] == []
    assert slow[1].startswith("a collective failed (waited 0.")
    assert f"deadline {DEADLINE:g} s; other ranks had timed out)" in slow[1]
    assert slow[2]
