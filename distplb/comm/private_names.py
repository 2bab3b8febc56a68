"""Private names of torch.distributed, for what has no public name.

Each function is one name. Those of FSDP2 are in `comm.fsdp2`, those of torch itself in `core.private_names`. Modules
that importing torch does not import are imported on use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup, Work
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.distributed_c10d import Store

__all__ = [
    "all_gather_into",
    "default_store",
    "flattened",
    "functional_all_to_all",
    "functional_wait",
    "local_shape_and_offset",
    "num_groups",
]


def all_gather_into(rows: Tensor, row: Tensor, group: ProcessGroup) -> Work:
    """Each rank's `row [n]` into `rows [M, n]`, under way: `ProcessGroup._allgather_base`.

    `torch.distributed.all_gather_into_tensor` calls the same, after checks and with a log entry that take about as long
    as everything else that a step does on the host.
    """
    return group._allgather_base(rows, row[None])


def default_store() -> Store:
    """The store that the job's ranks rendezvoused in: `torch.distributed.distributed_c10d._get_default_store`."""
    from torch.distributed.distributed_c10d import _get_default_store

    return _get_default_store()


def flattened(mesh: DeviceMesh, name: str) -> DeviceMesh:
    """The mesh with its axes flattened into a single one of this name: `DeviceMesh._flatten`."""
    return mesh._flatten(name)


def functional_all_to_all(rows: Tensor, receive: list[int], send: list[int], group: ProcessGroup) -> Tensor:
    """Rows that are on their way: `torch.distributed._functional_collectives.all_to_all_single_autograd`."""
    from torch.distributed._functional_collectives import all_to_all_single_autograd

    return all_to_all_single_autograd(rows, receive, send, group)


def functional_wait(rows: Tensor) -> Tensor:
    """The same rows, once they have arrived: `torch.distributed._functional_collectives.wait_tensor`."""
    from torch.distributed._functional_collectives import wait_tensor

    found: Tensor = wait_tensor(rows)
    return found


def local_shape_and_offset(tensor: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape and offset of this rank's part of a DTensor.

    `torch.distributed.tensor._utils.compute_local_shape_and_global_offset`.
    """
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    assert isinstance(tensor, DTensor)
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tuple(shape), tuple(offset)


def num_groups() -> int:
    """How many groups this process is in, as torch counts them for names: `distributed_c10d._world.pg_names`."""
    from torch.distributed.distributed_c10d import _world

    return len(_world.pg_names)
