"""`Comm`, the protocol of a communicator; and `WorldOfOne`, for a single process, which needs no library."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from distplb.core.arguments import shown
from distplb.errors import DistplbError

__all__ = ["Comm", "Message", "Ranks", "Round", "WorldOfOne", "refuse_other_comm"]

# One point-to-point operation: the buffer, and the rank at the other end.
Message = tuple[Tensor, int]
Round = tuple[Sequence[Message], Sequence[Message]]  # messages to send, messages to receive


class Ranks(Protocol):
    """Who a communicator connects, and where its tensors are."""

    @property
    def rank(self) -> int:
        """The rank of this process in the communicator."""

    @property
    def size(self) -> int:
        """The number of ranks."""

    @property
    def device(self) -> torch.device:
        """The device that buffers must be on."""


class Comm(Ranks, Protocol):
    """Ranks 0 to `size` − 1 that call the same methods in the same order.

    All tensors are contiguous and on `device`; collectives work in place. No call waits for ever: if ranks do not
    arrive in time, or the connection to them breaks, it raises a `LostRanksError`, and so does every later call.
    """

    def all_reduce_sum(self, tensor: Tensor) -> None:
        """Sum over ranks, element by element."""

    def all_reduce_min(self, tensor: Tensor) -> None:
        """Take the minimum over ranks, element by element."""

    def broadcast(self, tensor: Tensor, root: int) -> None:
        """Copy the root's values to all ranks."""

    def connect(self, peers: Sequence[int]) -> None:
        """Set up now what the library would set up at the first message between two ranks, such as GPU buffers.

        All ranks call this together. Peers that messages cannot reach are refused only by `exchange`.

        Args:
            peers: the ranks that this one will exchange messages with; each of them passes this one.
        """

    def exchange(self, rounds: Sequence[Round]) -> None:
        """Send and receive point-to-point messages, round by round; returns when all of this rank's are done.

        All ranks call this together, including those without messages. Rounds limit how much is in flight at once: all
        ranks order their rounds alike, but each may leave out rounds in which it has no messages.
        """


class WorldOfOne:
    """A communicator of a single rank: every collective is already done."""

    rank = 0
    size = 1

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)

    def all_reduce_sum(self, tensor: Tensor) -> None:
        """Nothing to add."""

    def all_reduce_min(self, tensor: Tensor) -> None:
        """Nothing to compare with."""

    def broadcast(self, tensor: Tensor, root: int) -> None:
        """No other rank to send to."""

    def connect(self, peers: Sequence[int]) -> None:
        """No other rank to connect to."""

    def exchange(self, rounds: Sequence[Round]) -> None:
        """No other rank to exchange with; no rank sends messages to itself."""


_FOR_PLANNING = ("rank", "size", "device", "all_reduce_sum", "all_reduce_min", "broadcast")
_FOR_MOVING = (*_FOR_PLANNING, "connect", "exchange")


def refuse_other_comm(comm: object, *, moves: bool) -> None:
    """Refuse an argument that is not a communicator before its methods are called; None is accepted.

    Args:
        comm: the argument that the user passed.
        moves: whether experts will be exchanged over it too; planning alone needs neither `connect` nor `exchange`.

    Raises:
        DistplbError: if it is not a communicator, or one that moves no experts where they will move.
    """
    names = _FOR_MOVING if moves else _FOR_PLANNING
    if moves and getattr(comm, "only_plans", False):
        raise DistplbError(f"{type(comm).__name__} only plans and cannot move experts; pass a TorchComm to move them")
    if comm is None or (not isinstance(comm, type) and all(hasattr(comm, name) for name in names)):
        return
    raise DistplbError(
        f"comm is {shown(comm)}; pass a communicator, such as TorchComm(group) from distplb.comm.torchdist, or None "
        "for this process alone"
    )
