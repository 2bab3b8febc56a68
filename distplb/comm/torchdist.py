"""`TorchComm`: a communicator over torch.distributed, gloo with host buffers or NCCL with device buffers.

The only file that translates ranks of a group into global ones.

No call waits longer than its deadline. gloo: a rank waits for a collective in slices, and asks the job's store between
them whether another rank has lost others; a rank that times out checks in there. NCCL: an unfinished kernel cannot be
cancelled, so before each collective the ranks meet in a gloo side group, where waiting can end in an error; if a kernel
hangs nevertheless, the process ends.
"""

from __future__ import annotations

import atexit
import hashlib
import logging
import os
import re
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from distplb.comm.base import Round
from distplb.comm.check_in import CheckIn
from distplb.comm.private_names import num_groups
from distplb.comm.store import Store, job_store
from distplb.core.stages import current_stage
from distplb.errors import DistplbError, LostRanksError

__all__ = ["TorchComm", "device_type", "group_of", "is_loss"]

_SLICE_SECONDS = 1.0  # of waiting, between two calls to the store
_MOST_GRACE_SECONDS = 10.0  # of a deadline, kept for the check-in
_NCCL_PAUSE_SECONDS = 2e-5  # between two checks of a kernel
_LEAST_SECONDS = 1e-3  # 0 would mean the group's own timeout
_CONNECTED_AT_ONCE = 16  # peers in each direction
_EXIT_STATUS = 75  # "temporary failure" of sysexits.h: the launcher may try again
_SOURCE_LINE = re.compile(r"^\[[^\]]*\] ")  # gloo's messages begin with a location in its source

# Messages of gloo and torch if another rank does not answer, and of NCCL if a call could not be made.
_LOSS = re.compile(r"time[d ]*out|connect|socket|peer|closed|abort|broken pipe|unreachable|end of file", re.IGNORECASE)
_OF_A_CALL = re.compile(r"ncclInvalid|out of memory|can't allocate memory", re.IGNORECASE)
_ERROR_CHARACTERS = 500  # at most, of an error that other ranks read

_log = logging.getLogger("distplb")
_instances: Counter[tuple[int, ...]] = Counter()  # communicators per list of ranks, created in the same order on all


_live: weakref.WeakSet[TorchComm] = weakref.WeakSet()


@atexit.register
def _let_go() -> None:
    """Give up the groups before the interpreter ends, so that a group that its user has destroyed ends its threads now.

    A thread of gloo that then still has to release a tensor would abort the process: Python ends it inside C++.
    """
    for comm in list(_live):
        vars(comm).update(_group=None, _side=None)


class TorchComm:
    """The ranks of a process group, or of a one-dimensional device mesh.

    All its ranks create it, and if they create several, in the same order.

    Args:
        group_or_mesh: a ProcessGroup that this process belongs to, a DeviceMesh with one axis, or None for the default
            group. The group belongs to the user; it is neither created nor destroyed here. If it has NCCL for GPUs and
            another backend for the CPU, NCCL is used, on the device that the group is bound to, or else on the current
            device.
        deadline: seconds that a call may wait for the other ranks. Choose it longer than ranks ever drift apart, for
            example through a slow checkpoint on one of them, and shorter than the group's own timeout.
        side_group: whether to create a gloo group of the same ranks, in which they meet before each call on the group
            itself; creating it is collective. None creates it for NCCL only, which needs it.

    Raises:
        DistplbError: if torch.distributed is not initialised, this process is not in the group, a mesh has more than
            one axis, or the group has neither NCCL and a GPU nor a backend for the CPU.
    """

    def __init__(
        self,
        group_or_mesh: dist.ProcessGroup | DeviceMesh | None = None,
        *,
        deadline: float = 300.0,
        side_group: bool | None = None,
    ) -> None:
        if not deadline > 0:
            raise DistplbError(f"deadline is {deadline!r}; pass a positive number of seconds")
        self._group = group_of(group_or_mesh)
        _live.add(self)
        self.rank = dist.get_rank(self._group)
        self.size = dist.get_world_size(self._group)
        self.device = _device_of(self._group)
        self._is_nccl = self.device.type == "cuda"
        self._grace = min(deadline / 4, _MOST_GRACE_SECONDS)
        self._deadline, self._patience = deadline, deadline - self._grace
        self._lost: LostRanksError | None = None
        self._check_in = CheckIn(self._connection(), self.rank, self.size)
        self._side: dist.ProcessGroup | None = None
        if self.size > 1 and (self._is_nccl if side_group is None else side_group):
            self._side = self.new_group("gloo", deadline)

    @property
    def global_ranks(self) -> list[int]:
        """The global rank of each rank of this group, in its order."""
        return [self._global(rank) for rank in range(self.size)]

    def all_reduce_sum(self, tensor: Tensor) -> None:
        """Sum over ranks, in place."""
        self._all_reduce(tensor, dist.ReduceOp.SUM)

    def all_reduce_min(self, tensor: Tensor) -> None:
        """Take the minimum over ranks, in place."""
        self._all_reduce(tensor, dist.ReduceOp.MIN)

    def broadcast(self, tensor: Tensor, root: int) -> None:
        """Copy the root's values to all ranks, in place."""
        self._meet()
        options = dist.BroadcastOptions()
        options.rootRank, options.timeout = root, timedelta(seconds=self._patience)
        with self._in_time() as started:
            self._wait(self._group.broadcast([tensor], options), started, self._is_nccl)

    def connect(self, peers: Sequence[int]) -> None:
        """Exchange a byte with each peer: NCCL sets up buffers and connections at the first message of two ranks."""
        byte = torch.zeros(1, dtype=torch.uint8, device=self.device)
        rounds: list[Round] = []
        for start in range(1, self.size, _CONNECTED_AT_ONCE):
            # Rounds are ordered by distance between ranks, so that both ends have a message in the same round.
            far = range(start, min(start + _CONNECTED_AT_ONCE, self.size))
            ways = [[(self.rank + sign * steps) % self.size for steps in far] for sign in (1, -1)]
            to, source = ([peer for peer in way if peer in peers] for way in ways)
            if to or source:
                rounds.append(([(byte, peer) for peer in to], [(byte.clone(), peer) for peer in source]))
        self.exchange(rounds)

    def exchange(self, rounds: Sequence[Round]) -> None:
        """Exchange each round as one batch. All ranks first meet once in the side group, if there is one."""
        self._meet()
        kernels: list[dist.Work] = []
        for sends, receives in rounds:
            operations = [
                dist.P2POp(way, tensor, self._global(peer), group=self._group)
                for way, messages in ((dist.isend, sends), (dist.irecv, receives))
                for tensor, peer in messages
            ]
            if not operations:
                continue
            with self._in_time() as started:
                for work in dist.batch_isend_irecv(operations):
                    if self._is_nccl:
                        kernels.append(work)  # its stream runs them one after the other
                    else:
                        # No slices here: gloo breaks the connection of a message when waiting for it times out.
                        work.wait(timedelta(seconds=max(_LEAST_SECONDS, started + self._patience - time.monotonic())))
        for work in kernels:
            with self._in_time() as started:
                self._wait_for_kernel(work, started)

    def new_group(self, backend: str, seconds: float) -> dist.ProcessGroup:
        """Create another group of the same ranks in the same order. Only they take part, as in everything here.

        torch names such a group after its ranks and the number of groups that the process is in; where ranks are in
        different numbers of groups, they would wait for each other under different names. So for as long as it takes,
        ranks in fewer groups join groups of their own.

        Args:
            backend: as for `torch.distributed.new_group`.
            seconds: the timeout of the group.
        """
        least = torch.tensor([-num_groups()], device=self.device)
        self.all_reduce_min(least)
        own = [
            dist.new_group([dist.get_rank()], backend="gloo", use_local_synchronization=True)
            for _ in range(num_groups(), -int(least))
        ]
        ranks = self.global_ranks
        order: dict[str, Any] = (
            {} if ranks == sorted(ranks) else {"sort_ranks": False}
        )  # torch sorts them, or knows this option
        group: dist.ProcessGroup = dist.new_group(
            ranks, backend=backend, timeout=timedelta(seconds=seconds), use_local_synchronization=True, **order
        )
        for one in own:
            dist.destroy_process_group(one)
        return group

    def _global(self, rank: int) -> int:
        return int(dist.get_global_rank(self._group, rank))

    # --- waiting, and for how long ---------------------------------------------------------------------------

    def _all_reduce(self, tensor: Tensor, operation: dist.ReduceOp.RedOpType) -> None:
        self._meet()
        with self._in_time() as started:
            self._wait(self._group.allreduce([tensor], self._options(operation)), started, self._is_nccl)

    def _meet(self) -> None:
        """Wait in the side group, if there is one, until all ranks are here."""
        if self._side is not None:
            with self._in_time() as started:
                here = torch.zeros(1, dtype=torch.uint8, device="cpu")
                self._wait(self._side.allreduce([here], self._options(dist.ReduceOp.SUM)), started, False)

    def _options(self, operation: dist.ReduceOp.RedOpType) -> dist.AllreduceOptions:
        options = dist.AllreduceOptions()
        # gloo's own timeout, so that its threads do not wait longer than ours.
        options.reduceOp, options.timeout = dist.ReduceOp(operation), timedelta(seconds=self._patience)
        return options

    @contextmanager
    def _in_time(self) -> Iterator[float]:
        """Time a library call that begins now. After a call that ended in an error, no other is made."""
        if self._lost is not None:
            raise self._lost
        started = time.monotonic()
        try:
            yield started
        except Exception as error:
            if is_loss(error):
                self._lost = self._loss(started, error)
                raise self._lost from error
            # Only this rank has failed: the others wait, and read about it in the store.
            self._lost = LostRanksError((), f"an earlier call failed on this rank: {error!r}")
            self._check_in.report(self._grace, repr(error)[:_ERROR_CHARACTERS])
            raise

    def _wait(self, work: dist.Work, started: float, is_kernel: bool) -> None:
        if is_kernel:
            self._wait_for_kernel(work, started)
            return
        until, part = started + self._patience, min(_SLICE_SECONDS, self._grace / 2)
        while True:
            try:
                work.wait(timedelta(seconds=max(_LEAST_SECONDS, min(part, until - time.monotonic()))))
            except RuntimeError:
                if work.is_completed():
                    work.wait()  # it has ended since, or raises its own error
                elif time.monotonic() >= until or self._check_in.was_called(part):
                    raise
                else:
                    continue
            return

    def _wait_for_kernel(self, work: dist.Work, started: float) -> None:
        """Wait for a kernel that all ranks have issued."""
        self._wait_until(work.is_completed, started)
        work.wait()

    def _wait_until(self, is_done: Callable[[], bool], started: float, *, listens: bool = False) -> None:
        """Wait for what kernels have to do. One that hangs cannot be cancelled: the process ends.

        Args:
            is_done: asked until it is True.
            started: since when, for the deadline.
            listens: whether to end the process as soon as another rank has reported a failure.
        """
        look = started + _SLICE_SECONDS
        while not is_done():
            now = time.monotonic()
            if now > started + self._deadline:
                self._end_process(started, self._check_in.missing(self._grace))
            if listens and now > look:
                if self._check_in.was_called(_SLICE_SECONDS):
                    self._end_process(started, self._check_in.missing(_SLICE_SECONDS))
                look = time.monotonic() + _SLICE_SECONDS
            time.sleep(_NCCL_PAUSE_SECONDS)

    def _end_process(self, started: float, missing: list[int] | None) -> NoReturn:
        failed = "".join(f"; rank {rank} failed: {text}" for rank, text in sorted(self._check_in.errors.items()))
        message = "in stage %s: an NCCL kernel did not end in %.3g s, deadline %g s; ranks that do not answer: %s%s"
        _log.critical(message, current_stage(), time.monotonic() - started, self._deadline, missing, failed)
        if self._side is not None:
            self._side.abort()
        logging.shutdown()
        os._exit(_EXIT_STATUS)

    def _loss(self, started: float, error: Exception) -> LostRanksError:
        waited = time.monotonic() - started
        silent = self._check_in.missing(max(self._grace / 2, started + self._deadline - time.monotonic()))
        errors = self._check_in.errors
        missing = silent or []
        why = (
            f"waited {waited:.1f} s, deadline {self._deadline:g} s; {_SOURCE_LINE.sub('', str(error)).splitlines()[0]}"
        )
        if silent is None:
            why += "; the store that ranks check in through does not answer either"
        why += "".join(f"; rank {rank} failed: {text}" for rank, text in sorted(errors.items()))
        if errors and missing:
            # They may only be busy: the check-in does not last until the deadline once a rank has told its error.
            why += f"; no word so far from rank{'s' * (len(missing) > 1)} {', '.join(map(str, missing))}"
            missing = []
        return LostRanksError(missing, why)

    def _connection(self) -> Callable[[], Store]:
        """A function that connects to the job's store, under a name that all ranks of this communicator share."""
        ranks = tuple(self.global_ranks)
        _instances[ranks] += 1
        name = hashlib.sha256(repr(ranks).encode()).hexdigest()[:16]
        return job_store(f"{name}/{_instances[ranks]}")


def group_of(group_or_mesh: dist.ProcessGroup | DeviceMesh | None) -> dist.ProcessGroup:
    """The process group of a group, a one-dimensional mesh, or None for the default group.

    Raises:
        DistplbError: if torch.distributed is not initialised, a mesh has more than one axis, or this process is not in
            the group.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise DistplbError(
            "torch.distributed is not initialised; call torch.distributed.init_process_group first, "
            "or pass comm=None to run on one rank alone"
        )
    if isinstance(group_or_mesh, DeviceMesh):
        if group_or_mesh.ndim != 1:
            raise DistplbError(
                f"the mesh has {group_or_mesh.ndim} axes {group_or_mesh.mesh_dim_names}; "
                "pass one of them, as in mesh['ep'], or two, as in "
                "GridComm(TorchComm(mesh['ep']), TorchComm(mesh['edp']))"
            )
        group_or_mesh = group_or_mesh.get_group()
    group = group_or_mesh or dist.group.WORLD
    assert group is not None, "is_initialized() was True"
    if dist.get_rank(group) < 0:
        raise DistplbError(f"global rank {dist.get_rank()} is not in the group; pass a group that contains it")
    return group


def is_loss(error: Exception) -> bool:
    """Whether an error of the library means that other ranks are lost, not that a call or this rank failed."""
    if not isinstance(error, RuntimeError) or isinstance(error, NotImplementedError) or _OF_A_CALL.search(str(error)):
        return False
    return isinstance(error, dist.DistError) or _LOSS.search(str(error)) is not None


def _device_of(group: dist.ProcessGroup) -> torch.device:
    """The device of a group's messages."""
    if device_type(dist.get_backend_config(group), torch.cuda.is_available()) == "cpu":
        return torch.device("cpu")
    return group.bound_device_id or torch.device("cuda", torch.cuda.current_device())


def device_type(backends: str, has_gpu: bool) -> str:
    """The device type that a group's messages need: "cuda" with NCCL, else "cpu".

    >>> device_type("cpu:gloo,cuda:nccl", has_gpu=True), device_type("cpu:gloo,cuda:gloo", has_gpu=True)
    ('cuda', 'cpu')

    Args:
        backends: the group's backends by device, as `torch.distributed.get_backend_config` returns them. `get_backend`
            would return "undefined" for a group created without a backend, and all of them for a group with several.
        has_gpu: whether this process sees a GPU.

    Raises:
        DistplbError: if there is neither NCCL with a GPU nor a backend for the CPU.
    """
    by_device = dict(pair.split(":") for pair in backends.split(","))
    if by_device.get("cuda") == "nccl" and has_gpu:
        return "cuda"
    if "cpu" in by_device:
        return "cpu"
    also = "" if by_device.get("cuda") != "nccl" else ", and torch sees no GPU here"
    raise DistplbError(
        f"the group's backends are {backends}{also}; ranks exchange over NCCL between GPUs, or through host memory: "
        "pass a group with a backend for the CPU, such as torch.distributed.new_group(backend='gloo')"
    )
