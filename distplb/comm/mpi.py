"""A communicator over MPI, for planning: host buffers, no pickles.

The only file that uses mpi4py, which is imported when an `MpiComm` is created.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from distplb.comm.base import Round
from distplb.errors import DistplbError, LostRanksError

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["MpiComm"]

_CHECK_IN_TAG = 0x6470  # tag of the only point-to-point messages
_MOST_GRACE_SECONDS = 5.0  # for the other ranks to check in
# Between two tests of a request: short at first, because a plan's collectives are short, then long enough to free the
# core for the ranks that this one waits for, if ranks outnumber cores.
_LEAST_PAUSE_SECONDS, _MOST_PAUSE_SECONDS = 2e-5, 1e-3


class MpiComm:
    """The ranks of an MPI communicator, which plan together; experts travel over a `TorchComm`.

    No call waits longer than its deadline. A rank that times out checks in with all others, which stop waiting too; a
    rank that arrives later learns of it in the first call in which it has to wait.
    Start scripts with `mpiexec python -m mpi4py script.py`: an error then ends all ranks, whereas MPI_Finalize would
    wait for those that are lost.

    Args:
        comm: an mpi4py intracommunicator that nothing else uses meanwhile; None for COMM_WORLD.
        deadline: seconds that a call may wait for the other ranks.

    Raises:
        DistplbError: if mpi4py is not installed, or `comm` is not an intracommunicator that this process belongs to.
    """

    device = torch.device("cpu")
    only_plans = True  # refused where experts will move

    def __init__(self, comm: MPI.Intracomm | None = None, *, deadline: float = 300.0) -> None:
        try:
            from mpi4py import MPI
        except ImportError as missing:
            raise DistplbError(
                f"MpiComm needs mpi4py ({missing}); pip install 'distplb[mpi]', and install an MPI library"
            ) from missing
        if not deadline > 0:
            raise DistplbError(f"deadline is {deadline!r}; pass a positive number of seconds")
        comm = MPI.COMM_WORLD if comm is None else comm
        if not isinstance(comm, MPI.Intracomm) or comm == MPI.COMM_NULL:
            raise DistplbError(f"comm is {comm!r}; pass an mpi4py Intracomm that this process belongs to, or None")
        self._mpi, self._comm, self._deadline = MPI, comm, deadline
        self.rank, self.size = comm.Get_rank(), comm.Get_size()
        self._lost: LostRanksError | None = None
        self._abandoned: list[MPI.Request] = []  # kept: MPI may still write into their buffers

    def all_reduce_sum(self, tensor: Tensor) -> None:
        """Sum over ranks, in place."""
        self._all_reduce(tensor, self._mpi.SUM)

    def all_reduce_min(self, tensor: Tensor) -> None:
        """Take the minimum over ranks, in place."""
        self._all_reduce(tensor, self._mpi.MIN)

    def broadcast(self, tensor: Tensor, root: int) -> None:
        """Copy the root's values to all ranks, in place."""
        self._finish(lambda: self._comm.Ibcast(tensor.numpy(), root))

    def connect(self, peers: Sequence[int]) -> None:
        """Nothing to set up: no experts will be exchanged."""

    def exchange(self, rounds: Sequence[Round]) -> None:
        """Refuse: only torch.distributed moves experts."""
        raise DistplbError("MpiComm only plans and cannot move experts; pass a TorchComm to move them")

    def _all_reduce(self, tensor: Tensor, operation: MPI.Op) -> None:
        self._finish(lambda: self._comm.Iallreduce(self._mpi.IN_PLACE, tensor.numpy(), operation))

    # --- waiting, and for how long ---------------------------------------------------------------------------

    def _finish(self, start: Callable[[], MPI.Request]) -> None:
        """Start a collective and wait until it is done on this rank."""
        if self._lost is not None:
            raise self._lost
        began = time.monotonic()
        try:
            request = start()
            if self._wait(request.Test, began + self._deadline, self._is_check_in_called):
                return
            self._abandoned.append(request)
            waited = time.monotonic() - began
            why = f"waited {waited:.1f} s, deadline {self._deadline:g} s"
            if waited < self._deadline:
                why += "; other ranks had timed out"
            self._lost = LostRanksError(self._silent(), why)
        except self._mpi.Exception as broken:
            self._lost = LostRanksError((), f"MPI reports: {broken}")
        raise self._lost

    def _wait(self, is_done: Callable[[], bool], until: float, is_over: Callable[[], bool] = lambda: False) -> bool:
        """Wait until it is done, the time is up, or `is_over`; returns whether it is done."""
        pause = _LEAST_PAUSE_SECONDS
        while not is_done():
            if time.monotonic() >= until or is_over():
                return False
            time.sleep(pause)
            pause = min(2 * pause, _MOST_PAUSE_SECONDS)
        return True

    def _is_check_in_called(self) -> bool:
        return self._comm.Iprobe(self._mpi.ANY_SOURCE, _CHECK_IN_TAG)

    def _silent(self) -> list[int]:
        """Check in with all other ranks because this one has timed out; returns those that do not check in."""
        others = [rank for rank in range(self.size) if rank != self.rank]
        nothing = torch.empty(0, dtype=torch.uint8, device="cpu").numpy()
        self._abandoned += [self._comm.Isend(nothing, other, _CHECK_IN_TAG) for other in others]
        answers = [self._comm.Irecv(nothing, other, _CHECK_IN_TAG) for other in others]
        self._abandoned += answers
        until = time.monotonic() + min(self._deadline, _MOST_GRACE_SECONDS)
        self._wait(lambda: all(answer.Test() for answer in answers), until)
        return [other for other, answer in zip(others, answers, strict=True) if not answer.Test()]
