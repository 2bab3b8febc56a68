"""Which rows of which GPU go to which replica slots, and back as gradients: this GPU's part, from the split alone.

Shapes: M GPUs, R replica slots on each GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from distplb.splitting.rules import EMPTY

__all__ = ["Copy", "Pushes"]


class Copy(NamedTuple):
    """One replica: the own slot of its home, the replica slot that holds it, and the GPU at the other end."""

    own: int
    slot: int
    peer: int
    nth: int  # of the home's replicas, in the order in which their gradients are added


@dataclass(frozen=True)
class Pushes:
    """The replicas that a GPU sends and receives, each in the order of GPUs and slots, which both ends share.

    Args:
        sends: replicas of this GPU's experts.
        receives: replicas that this GPU holds.
        num_rounds: in which the gradients of all replicas come home, at most R at a time to each home.
    """

    sends: tuple[Copy, ...]
    receives: tuple[Copy, ...]
    num_rounds: int

    @classmethod
    def of(cls, replica: Tensor, num_own: int, gpu: int) -> Pushes:
        """The part of one GPU.

        >>> import torch
        >>> Pushes.of(torch.tensor([[-1], [0]]), num_own=1, gpu=0).sends  # GPU 1 holds a replica of slot 0
        (Copy(own=0, slot=0, peer=1, nth=0),)

        Args:
            replica: `[M, R]`, the slot whose expert each replica slot holds; -1 for none.
            num_own: G.
            gpu: this GPU.
        """
        sends, receives = list[Copy](), list[Copy]()
        made = [0] * len(replica)  # of each home so far
        for holder, held in enumerate(replica.tolist()):
            for slot, expert in enumerate(held):
                if expert == EMPTY:
                    continue
                home, own = divmod(expert, num_own)
                if home == gpu:
                    sends.append(Copy(own, slot, holder, made[home]))
                if holder == gpu:
                    receives.append(Copy(own, slot, home, made[home]))
                made[home] += 1
        return cls(tuple(sends), tuple(receives), -(-max(made) // max(1, replica.shape[1])))
