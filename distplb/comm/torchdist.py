"""A communicator over torch.distributed: gloo with host buffers, NCCL with device buffers.

The only file that imports `torch.distributed`, and the only one that translates ranks of a group into global ones.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from distplb.comm.base import Message
from distplb.errors import DistplbError

__all__ = ["TorchComm"]


class TorchComm:
    """The ranks of a process group, or of a one-dimensional device mesh.

    Args:
        group_or_mesh: a ProcessGroup that this process belongs to, a DeviceMesh of one axis, or None for the
            default group. The group is the user's own; it is neither created nor destroyed here.

    Raises:
        DistplbError: if torch.distributed is not initialised, this process is not in the group, or a mesh has
            more than one axis.
    """

    def __init__(self, group_or_mesh: dist.ProcessGroup | DeviceMesh | None = None) -> None:
        if not dist.is_available() or not dist.is_initialized():
            raise DistplbError(
                "torch.distributed is not initialised; call torch.distributed.init_process_group first, "
                "or pass comm=None to run on one rank alone"
            )
        if isinstance(group_or_mesh, DeviceMesh):
            if group_or_mesh.ndim != 1:
                raise DistplbError(
                    f"the mesh has {group_or_mesh.ndim} axes {group_or_mesh.mesh_dim_names}; "
                    "pass one of them, as in mesh['ep']"
                )
            group_or_mesh = group_or_mesh.get_group()
        self._group: dist.ProcessGroup = group_or_mesh or dist.distributed_c10d._get_default_group()
        self.rank = dist.get_rank(self._group)
        if self.rank < 0:
            raise DistplbError(f"global rank {dist.get_rank()} is not in the group; pass a group of its own")
        self.size = dist.get_world_size(self._group)
        self.device = (
            torch.device("cuda", torch.cuda.current_device())
            if dist.get_backend(self._group) == "nccl"
            else torch.device("cpu")
        )

    @property
    def global_ranks(self) -> list[int]:
        """The global rank of each of this group's ranks, in its order."""
        return [self._global(rank) for rank in range(self.size)]

    def all_reduce_sum(self, tensor: Tensor) -> None:
        """Add up over ranks, in place."""
        dist.all_reduce(tensor, dist.ReduceOp.SUM, group=self._group)

    def all_reduce_min(self, tensor: Tensor) -> None:
        """The least over ranks, in place."""
        dist.all_reduce(tensor, dist.ReduceOp.MIN, group=self._group)

    def broadcast(self, tensor: Tensor, root: int) -> None:
        """The root's values, in place."""
        dist.broadcast(tensor, self._global(root), group=self._group)

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> None:
        """One batch of sends and receives; waits for all of them."""
        operations = [
            dist.P2POp(way, tensor, self._global(peer), group=self._group)
            for way, messages in ((dist.isend, sends), (dist.irecv, receives))
            for tensor, peer in messages
        ]
        if operations:
            for work in dist.batch_isend_irecv(operations):
                work.wait()

    def _global(self, rank: int) -> int:
        return int(dist.get_global_rank(self._group, rank))
