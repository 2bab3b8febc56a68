"""Rows of tokens among the ranks of a framework's groups, in the autograd graph.

Shapes: X rows that this rank sends, Y rows that it receives, N tokens of a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from distplb.comm.private_names import functional_all_to_all, functional_wait

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["exchanged_rows", "own_slices"]


def exchanged_rows(
    rows: Tensor, receive_sizes: Sequence[int], send_sizes: Sequence[int], group: ProcessGroup
) -> Tensor:
    """The rows `[Y, ...]` that arrive, in the order of ranks; their gradients go back. Collective in both passes.

    Args:
        rows: `[X, ...]`, in the order of the ranks that they go to.
        receive_sizes: rows that come from each rank.
        send_sizes: rows that go to each rank.
        group: the ranks; its own timeout rules.
    """
    arriving = functional_all_to_all(rows, list(receive_sizes), list(send_sizes), group)
    arrived: Tensor = _Waited.apply(arriving)  # type: ignore[no-untyped-call]  # in torch's stubs
    return arrived


def own_slices(mesh: DeviceMesh, *shared: Tensor) -> tuple[Tensor, ...]:
    """This rank's slice of tensors that all ranks of a mesh share; their gradients are gathered from all slices.

    Args:
        mesh: of one axis.
        shared: `[N, ...]` each, the same on all ranks. The slices may have different numbers of rows, also none.
    """
    from torch.distributed.tensor import DTensor, Replicate, Shard

    whole = (DTensor.from_local(one, mesh, [Replicate()], run_check=False) for one in shared)
    return tuple(one.redistribute(mesh, [Shard(0)]).to_local() for one in whole)


class _Waited(torch.autograd.Function):
    """Rows that have arrived: a product may read them without waiting."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        return functional_wait(rows)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient
