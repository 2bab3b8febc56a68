"""The memory in which this rank stages a commit, and where each copy is in it.

Everything that a commit moves is read into this memory, or sent to that of another rank, before anything is written.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain

import torch
from torch import Tensor

from distplb.comm.base import Comm
from distplb.migrate.messages import Copy, RankCommit
from distplb.migrate.optimizer_state import Traveller

__all__ = ["KEPT_BYTES", "CommitStaging", "StagingMemory"]

KEPT_BYTES = 256 << 20  # at least, for each room on the host


class StagingMemory:
    """Memory to stage in. Host memory is kept from move to move, because its first touch takes longer than a fast link.

    Torch caches GPU memory itself, and other tensors can use it between moves.
    """

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}

    def room(self, name: str, size: int, device: torch.device) -> Tensor:
        """Return uninitialised uint8 memory `[size]`; rooms in use at the same time have different names."""
        if device.type != "cpu":
            return torch.empty(size, dtype=torch.uint8, device=device)
        kept = self._kept.pop(name, None)
        if kept is None or kept.numel() < size:
            del kept  # free it before allocating more
            # Untouched pages take no memory, and moves of other sizes reuse the pages that have been touched.
            kept = torch.empty(max(size, KEPT_BYTES) if size else 0, dtype=torch.uint8, device="cpu")
        self._kept[name] = kept
        return kept[:size]


class CommitStaging:
    """Stages the commits of one change of placement, one after the other, on this rank.

    The constructor allocates memory for the largest of them, so a lack of memory shows there.

    Args:
        travellers: everything that travels, in the order of tensor indices.
        commits: the commits as this rank sees them.
        comm: the ranks that hold the tensors.
        memory: the memory to stage in.
    """

    def __init__(
        self, travellers: Sequence[Traveller], commits: Sequence[RankCommit], comm: Comm, memory: StagingMemory
    ) -> None:
        self._travellers, self._comm = travellers, comm
        self._item_bytes = [traveller.dtype.itemsize for traveller in travellers]
        self._devices = [each.flats[0].device if each.flats else comm.device for each in travellers]
        outgoing = self._largest(_all(self._packed(commit)) for commit in commits)
        self._outgoing = memory.room("outgoing", outgoing, comm.device)
        # Copies from this rank and from others share one room, so that both together are within the budget, unless
        # rows are on a GPU and the communicator needs its buffers on the host.
        own = next((flat.device for each in travellers for flat in each.flats), comm.device)
        self._local: Tensor | None = None
        if own != comm.device:
            self._local = memory.room("inside", self._largest(commit.local for commit in commits), own)
        local = [commit.local if self._local is None else [] for commit in commits]
        arriving = (copies + _received(commit) for copies, commit in zip(local, commits, strict=True))
        self._arriving = memory.room("arriving", self._largest(arriving), comm.device)

    def pack(self, commit: RankCommit) -> None:
        """Read everything that this rank sends, to itself and to others, before anything is written."""
        sent = self._laid_out(_all(self._packed(commit)), self._outgoing)
        for copy, room in chain(self._laid_out(commit.local, self._rooms(commit)[0]), sent):
            room.copy_(self._source(copy))

    def exchange(self, commit: RankCommit) -> None:
        """Send and receive the messages of the commit, in its rounds. Collective."""
        rank, packed, (_, room) = self._comm.rank, self._outgoing, self._rooms(commit)
        sends: dict[int, deque[Tensor]] = {target: deque() for target in commit.sends}
        for target, message in _each(commit.sends):
            if self._is_sent_in_place(message):
                sends[target].append(self._source(message[0]))
            else:
                sends[target].append(packed[: self._total(message)])
                packed = packed[self._total(message) :]
        receives: dict[int, deque[Tensor]] = {source: deque() for source in commit.receives}
        for source, message in _each(commit.receives):
            receives[source].append(room[: self._total(message)])
            room = room[self._total(message) :]
        self._comm.exchange(
            [
                (
                    [(sends[target].popleft(), target) for source, target in ways if source == rank],
                    [(receives[source].popleft(), source) for source, target in ways if target == rank],
                )
                for ways in commit.rounds
            ]
        )

    def write(self, commit: RankCommit) -> None:
        """Write the staged copies to their new places."""
        for copy, staged in self._staged(commit):
            self._bytes(copy.tensor, copy.target_offset, copy.count).copy_(staged)

    def _staged(self, commit: RankCommit) -> Iterator[tuple[Copy, Tensor]]:
        """Each copy into this rank, with its bytes."""
        local, arriving = self._rooms(commit)
        return chain(self._laid_out(commit.local, local), self._laid_out(_received(commit), arriving))

    def _rooms(self, commit: RankCommit) -> tuple[Tensor, Tensor]:
        """The memory that stages copies inside this rank, and the memory for those from others."""
        if self._local is not None:
            return self._local, self._arriving
        size = self._total(commit.local)
        return self._arriving[:size], self._arriving[size:]

    def _packed(self, commit: RankCommit) -> list[list[Copy]]:
        """The messages that are packed before they are sent."""
        return [message for _, message in _each(commit.sends) if not self._is_sent_in_place(message)]

    def _is_sent_in_place(self, message: Sequence[Copy]) -> bool:
        """Whether a message is one range of memory that the communicator can read.

        No rank writes there until all ranks have received their messages.
        """
        return len(message) == 1 and self._devices[message[0].tensor] == self._comm.device

    def _source(self, copy: Copy) -> Tensor:
        return self._bytes(copy.tensor, copy.source_offset, copy.count)

    def _laid_out(self, copies: Sequence[Copy], room: Tensor) -> Iterator[tuple[Copy, Tensor]]:
        """Each copy with its part of the room, one after the other."""
        start = 0
        for copy in copies:
            yield copy, room[start : start + self._size(copy)]
            start += self._size(copy)

    def _bytes(self, tensor: int, offset: int, count: int) -> Tensor:
        """A view of some elements of a tensor as bytes."""
        return self._travellers[tensor].at(offset, count).view(torch.uint8)

    def _largest(self, copies: Iterator[list[Copy]]) -> int:
        """Bytes of the largest of several lists of copies."""
        return max(map(self._total, copies), default=0)

    def _total(self, copies: Sequence[Copy]) -> int:
        return sum(map(self._size, copies))

    def _size(self, copy: Copy) -> int:
        return copy.count * self._item_bytes[copy.tensor]


def _each(messages: Mapping[int, Sequence[list[Copy]]]) -> Iterator[tuple[int, list[Copy]]]:
    """Each message, and the rank at its other end."""
    return ((rank, message) for rank, of_rank in messages.items() for message in of_rank)


def _all(messages: Iterable[list[Copy]]) -> list[Copy]:
    return [copy for message in messages for copy in message]


def _received(commit: RankCommit) -> list[Copy]:
    return _all(chain(*commit.receives.values()))
