"""DTensors: which part of a tensor with one row per slot this rank holds. Nothing is sent here.

`torch.distributed.tensor` is imported at the first DTensor, because importing it takes as long as importing torch.
"""

from __future__ import annotations

import sys
from typing import NamedTuple

import torch
from torch import Tensor

from distplb.comm.private_names import local_shape_and_offset
from distplb.errors import DistplbError

__all__ = ["Block", "block_of", "is_dtensor", "local_like"]


class Block(NamedTuple):
    """This rank's part of a DTensor `[P, ...]`: consecutive rows, and the elements `low` to `high` of each row."""

    local: Tensor
    first_row: int
    row: int  # number of elements in a whole row
    low: int
    high: int


def is_dtensor(tensor: Tensor) -> bool:
    """Whether the tensor is a DTensor."""
    if "torch.distributed.tensor" not in sys.modules:  # then no DTensor exists
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def block_of(name: str, tensor: Tensor) -> Block:
    """The part of a DTensor that this rank holds.

    Raises:
        DistplbError: if that part is not a range of columns in consecutive rows.
    """
    from torch.distributed.tensor import DTensor, Shard

    assert isinstance(tensor, DTensor)
    for placement in tensor.placements:
        # FSDP2 uses a strided shard on top of another shard of the same dim.
        is_sharded = isinstance(placement, Shard) or hasattr(placement, "split_factor")
        if placement.is_partial() or (is_sharded and getattr(placement, "dim", None) not in (0, 1)):
            raise DistplbError(
                f"{name} is a DTensor with placements {tensor.placements}; pass one that is replicated, or sharded "
                "along dim 0 (experts) or dim 1, because a rank's part of an expert must be one range"
            )
    shape, offset = local_shape_and_offset(tensor)
    with torch.no_grad():
        local = tensor.to_local()
    if tuple(local.shape) != shape:
        raise DistplbError(
            f"{name} has a local part of shape {tuple(local.shape)}, but its placements {tensor.placements} on a "
            f"mesh of shape {tuple(tensor.device_mesh.shape)} imply {shape}"
        )
    row = tensor.numel() // max(1, tensor.shape[0])
    if tensor.dim() == 1:
        return Block(local, offset[0], row, 0, row)
    inner = row // tensor.shape[1]
    return Block(local, offset[0], row, offset[1] * inner, (offset[1] + shape[1]) * inner)


def local_like(name: str, value: Tensor, like: Tensor) -> Tensor:
    """The local part of a gradient or of optimizer state, which must be laid out like its parameter.

    Raises:
        DistplbError: if it is not.
    """
    if not is_dtensor(like) and not is_dtensor(value):
        return value
    from torch.distributed.tensor import DTensor

    if (
        not isinstance(like, DTensor)
        or not isinstance(value, DTensor)
        or (value.placements, value.device_mesh) != (like.placements, like.device_mesh)
    ):
        raise DistplbError(
            f"{name} is a {type(value).__name__} {getattr(value, 'placements', 'without placements')}, its parameter a "
            f"{type(like).__name__} {getattr(like, 'placements', 'without placements')}; nothing is moved, because it "
            "is not known which elements belong to which expert"
        )
    with torch.no_grad():
        local: Tensor = value.to_local()
    return local
