"""`Comm`: what distplb needs of a communicator; `WorldOfOne`, for a single process, needs no library."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from distplb.core.arguments import shown
from distplb.errors import DistplbError

__all__ = ["Comm", "Message", "Round", "WorldOfOne", "refuse_other_comm"]

# One point-to-point operation: the buffer, and the rank at the other end.
Message = tuple[Tensor, int]
Round = tuple[Sequence[Message], Sequence[Message]]  # what is sent, and what is received


class Comm(Protocol):
    """Ranks 0 to `size` − 1 that call the same methods in the same order.

    All tensors are contiguous and lie on `device`; collectives work in place. No call waits for ever: where ranks do
    not come in time, or the connection to them breaks, it raises a `LostRanksError`, and so does every call after it.
    """

    @property
    def rank(self) -> int:
        """This process, counted inside the communicator."""

    @property
    def size(self) -> int:
        """The number of ranks."""

    @property
    def device(self) -> torch.device:
        """Where the library wants its buffers."""

    def all_reduce_sum(self, tensor: Tensor) -> None:
        """Add up over ranks, element by element."""

    def all_reduce_min(self, tensor: Tensor) -> None:
        """The minimum over ranks, element by element."""

    def broadcast(self, tensor: Tensor, root: int) -> None:
        """The root's values, everywhere."""

    def connect(self, peers: Sequence[int]) -> None:
        """Let the library make now what it else makes at the first message between two ranks, such as buffers on a GPU.

        All ranks call this together. Where messages cannot go that way, `exchange` refuses them.

        Args:
            peers: the ranks that this one will exchange with; it is one of theirs.
        """

    def exchange(self, rounds: Sequence[Round]) -> None:
        """Point-to-point messages, round after round; returns when all of this rank's are done.

        All ranks call this together, also those without messages. Rounds limit how much is in flight at once: both
        ends of a message number their rounds alike, and may leave out those that they have none in.
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
        """No other rank to exchange with; messages to oneself are never made."""


_FOR_PLANNING = ("rank", "size", "device", "all_reduce_sum", "all_reduce_min", "broadcast")
_FOR_MOVING = (*_FOR_PLANNING, "connect", "exchange")


def refuse_other_comm(comm: object, *, moves: bool) -> None:
    """Refuse an argument that is no communicator, before its methods are called; None passes.

    Args:
        comm: an argument of the user's.
        moves: whether experts will be exchanged over it, too; planning alone needs no method for that.

    Raises:
        DistplbError: with what to pass.
    """
    names = _FOR_MOVING if moves else _FOR_PLANNING
    if comm is None or (not isinstance(comm, type) and all(hasattr(comm, name) for name in names)):
        return
    raise DistplbError(
        f"comm is {shown(comm)}; pass a communicator, such as TorchComm(group) of distplb.comm.torchdist, or None for "
        "this process alone"
    )
