"""The one buffer that holds the replicas of whichever layer computes, for all layers.

Shapes: R replica slots on each GPU.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["Buffer"]

_ALIGNED = 256  # bytes; what kernels for matrix products like best


class Buffer:
    """Memory for R rows of several tensors, as large as the largest layer needed so far.

    What it hands out are tensors of their own over the same memory: autograd does not notice when they are filled
    again, so a product may keep them for its backward. Whoever hands them out must fill them again before that.

    >>> buffer = Buffer()
    >>> rows, same = (buffer.rows(2, [torch.zeros(8, 3)])[0] for _ in range(2))
    >>> rows.shape, rows.data_ptr() == same.data_ptr()
    (torch.Size([2, 3]), True)
    """

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8, device="cpu")

    @property
    def num_bytes(self) -> int:
        """How large it is."""
        return self._memory.numel()

    def rows(self, number: int, like: Sequence[Tensor]) -> list[Tensor]:
        """Tensors `[number, ...]` with rows of the shape and dtype of those of `like`, with any values.

        Args:
            number: R.
            like: tensors `[..., ...]` on one device, whose first dim counts rows.
        """
        starts, end = [], 0
        for tensor in like:
            starts.append(end)
            size = number * math.prod(tensor.shape[1:]) * tensor.element_size()
            end += -(-size // _ALIGNED) * _ALIGNED
        if self._memory.numel() < end or (like and self._memory.device != like[0].device):
            # Tensors that were handed out keep the old memory alive for as long as they are needed.
            self._memory = torch.empty(end, dtype=torch.uint8, device=like[0].device)
        found = []
        for start, tensor in zip(starts, like, strict=True):
            shape = (number, *tensor.shape[1:])
            size = math.prod(shape) * tensor.element_size()
            found.append(self.alias(self._memory[start : start + size].view(tensor.dtype).view(shape)))
        return found

    @staticmethod
    def alias(rows: Tensor) -> Tensor:
        """A tensor of its own over the same memory: filling one does not change the other's version."""
        empty = torch.empty(0, dtype=rows.dtype, device=rows.device)
        return empty.set_(rows.untyped_storage(), rows.storage_offset(), rows.shape, rows.stride())
