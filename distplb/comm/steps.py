"""`StepComm`, the protocol of what the ranks of an EP group exchange inside a training step, and its `TorchStepComm`.

A step asks for less waiting than a rebalance, so the contract is another one than `Comm`'s. With gloo, every wait ends
at the deadline in a `LostRanksError` that names stage and ranks. With NCCL, the host waits once in a step, for the
counts that split sizes depend on; it polls, so it too ends at the deadline, by ending the process, because kernels
cannot be cancelled. Messages run on a stream of their own, and the stream that computes waits for them on the device:
if one hangs, the next wait for counts ends the process; where none comes, torch does when the group's timeout is over,
a minute after the deadline. A rank that fails tells the others: those that wait hear it within about two seconds.

Shapes: M ranks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from distplb.comm.base import Message, Ranks
from distplb.comm.message_watch import MessageWatch
from distplb.comm.private_names import all_gather_into
from distplb.comm.torchdist import TorchComm, group_of
from distplb.errors import LostRanksError

__all__ = ["StepComm", "StepOfOne", "TorchStepComm", "Transfer"]

_REPORT_SECONDS = 2.0  # to tell the others of an error
_LOOK_SECONDS = 0.5  # between two looks at the store while messages have not arrived
_MORE_SECONDS = 60.0  # than the deadline, until torch ends a process whose kernel hangs
_REPORT_CHARACTERS = 500
# torch 2.13 has renamed the collective, and warns of its former name.
_all_gather: Callable[..., dist.Work | None] = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)


class Transfer(Protocol):
    """Messages on their way."""

    def wait(self) -> None:
        """Return when what arrives may be used, and what was sent may be overwritten, by the calling stream."""


class StepComm(Ranks, Protocol):
    """Ranks 0 to `size` − 1 that call `all_gather` in the same order; only those with messages call `start`.

    Calls raise a `LostRanksError` as those of `Comm` do, and so does every later call.
    """

    def all_gather(self, row: Tensor) -> Tensor:
        """`[M, n]` on the host, from each rank's `row [n]` of the same length."""

    def start(self, sends: Sequence[Message], receives: Sequence[Message]) -> Transfer:
        """Begin to exchange messages; those of two ranks go in order. Buffers are in use until the transfer ends."""

    def tell(self, error: Exception) -> None:
        """Tell ranks that wait for this one why it does not come; they hear it at once and not at their deadline.

        After that every call on this rank raises a `LostRanksError`: the others do not come to it.
        """


class _NothingToWaitFor:
    def wait(self) -> None:
        """Nothing was sent."""


class StepOfOne:
    """The same for a group of one rank, which needs no library."""

    rank, size = 0, 1

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)

    def all_gather(self, row: Tensor) -> Tensor:
        """The row, on the host."""
        return row.cpu()[None]

    def start(self, sends: Sequence[Message], receives: Sequence[Message]) -> Transfer:
        """No rank sends messages to itself."""
        assert not sends
        assert not receives
        return _NothingToWaitFor()

    def tell(self, error: Exception) -> None:
        """Nobody else to tell."""


class TorchStepComm(TorchComm):
    """The ranks of a group in a process group of their own, so that nothing waits behind the framework's messages.

    All ranks of the group create it; the group itself belongs to the user, and is not used after that. If
    `init_process_group` was given a `device_id`, NCCL makes the new group by splitting that of all ranks of the job, so
    all of them create theirs at the same time.

    Args:
        group_or_mesh: as for `TorchComm`.
        deadline: seconds that a call may wait for the other ranks.

    Raises:
        DistplbError: as for `TorchComm`.
    """

    def __init__(self, group_or_mesh: dist.ProcessGroup | DeviceMesh | None = None, *, deadline: float = 300.0) -> None:
        group = group_of(group_or_mesh)
        outer = TorchComm(group, deadline=deadline, side_group=False)
        # torch ends a process, without a word about stages, when a kernel outlasts its group's timeout.
        late = _MORE_SECONDS if outer.device.type == "cuda" else 0.0
        own = outer.new_group(str(dist.get_backend_config(group)), deadline + late)
        super().__init__(own, deadline=deadline, side_group=False)
        self._watch = MessageWatch(self._check_in.was_called, min(_LOOK_SECONDS, self._grace / 2))
        self._stream = torch.cuda.Stream(self.device) if self._is_nccl else None
        if self._is_nccl:
            self.connect(range(self.size))  # NCCL would do it at the first message of each pair, in a step

    def all_gather(self, row: Tensor) -> Tensor:
        """Gather as one collective of the group."""
        with self._in_time() as started:
            rows = row.new_empty(self.size, len(row))
            if self._is_nccl:
                work = _all_gather(rows, row[None], group=self._group, async_op=True)
            else:
                work = all_gather_into(rows, row, self._group)
            return self._on_host(work, rows, started)

    def start(self, sends: Sequence[Message], receives: Sequence[Message]) -> Transfer:
        """Start all messages as one batch; with NCCL, on a stream of their own."""
        with self._in_time():
            operations = [
                dist.P2POp(way, tensor, self._global(peer), group=self._group)
                for way, messages in ((dist.isend, sends), (dist.irecv, receives))
                for tensor, peer in messages
            ]
            if not operations:
                return _NothingToWaitFor()
            if self._stream is not None:
                return self._on_stream(self._stream, operations)
            works = dist.batch_isend_irecv(operations)
        return _OverGloo(lambda: self._wait_for_messages(works))

    def tell(self, error: Exception) -> None:
        """Write the error into the job's store, where waiting ranks look once a second. No call is made after that."""
        if self._lost is None:
            self._lost = LostRanksError((), f"an earlier call failed on this rank: {error}")
            self._check_in.report(min(self._grace, _REPORT_SECONDS), str(error)[:_REPORT_CHARACTERS])

    def _on_host(self, work: dist.Work | None, values: Tensor, started: float) -> Tensor:
        """Wait for a collective and then, with NCCL, for the copy of its values to the host."""
        assert work is not None
        if not self._is_nccl:
            self._wait(work, started, False)
            return values
        work.wait()  # the current stream waits, not the host
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True, device="cpu")
        host.copy_(values, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record(torch.cuda.current_stream(self.device))  # the group's device need not be the current one
        self._wait_until(copied.query, started, listens=True)
        return host

    def _on_stream(self, stream: torch.cuda.Stream, operations: list[dist.P2POp]) -> Transfer:
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for work in dist.batch_isend_irecv(operations):
                work.wait()  # this stream waits, not the host
            arrived = torch.cuda.Event()
            arrived.record(stream)
        for operation in operations:
            operation.tensor.record_stream(stream)
        return _OverNccl(arrived, self.device)

    def _wait_for_messages(self, works: Sequence[dist.Work]) -> None:
        with self._in_time() as started, self._watch.over(works):
            for work in works:
                # No slices here: gloo breaks the connection of a message when waiting for it times out.
                work.wait(timedelta(seconds=max(1e-3, started + self._patience - time.monotonic())))


class _OverGloo:
    def __init__(self, wait: Callable[[], None]) -> None:
        self.wait = wait


class _OverNccl:
    def __init__(self, arrived: torch.cuda.Event, device: torch.device) -> None:
        self._arrived, self._device = arrived, device

    def wait(self) -> None:
        torch.cuda.current_stream(self._device).wait_event(self._arrived)
