"""The ranks agree, once and before anything moves, on which rank holds what of each declared tensor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from distplb.comm.agreement import agree
from distplb.comm.base import Comm
from distplb.errors import DistplbError
from distplb.migrate.layout import Layout, Part, joined
from distplb.migrate.row_tensors import RowTensor
from distplb.migrate.slot_routes import peers

__all__ = ["AgreedTensor", "agreed_tensors"]


class AgreedTensor(NamedTuple):
    """A declared tensor as all ranks have agreed on it.

    Args:
        row_tensor: this rank's part of it.
        layout: which rank holds which elements of it.
        is_own: whether each expert is in a tensor of its own, on all ranks.
    """

    row_tensor: RowTensor
    layout: Layout
    is_own: bool


def agreed_tensors(layers: Sequence[Sequence[RowTensor]], num_slots: int, comm: Comm) -> list[list[AgreedTensor]]:
    """Share which parts each rank holds; return each declared tensor with its layout, by layer.

    Three all-reduces: of the largest number of parts, of [tensors, ranks, parts, 4] integers, and of a bit for each
    tensor. Then each rank connects to all ranks that it may exchange experts with, so that no move has to.

    Raises:
        DistplbError: if no rank holds some element of a tensor.
    """
    tensors = [tensor for layer in layers for tensor in layer]
    layouts = _agreed_layouts(tensors, num_slots, comm)
    are_own = agree(comm, {}, minimum=[int(tensor.own_slots is not None) for tensor in tensors])
    comm.connect(peers(layouts, comm.rank))
    agreed = (AgreedTensor(*each[:2], bool(each[2])) for each in zip(tensors, layouts, are_own, strict=True))
    return [[next(agreed) for _ in layer] for layer in layers]


def _agreed_layouts(tensors: Sequence[RowTensor], num_slots: int, comm: Comm) -> list[Layout]:
    own = [tensor.parts for tensor in tensors]
    negative_maximum = torch.tensor([-max((len(parts) for parts in own), default=0)], device=comm.device)
    comm.all_reduce_min(negative_maximum)
    table = torch.zeros(len(tensors), comm.size, -int(negative_maximum), 4, dtype=torch.int64, device="cpu")
    for number, parts in enumerate(own):
        for place, part in enumerate(parts):
            table[number, comm.rank, place] = torch.tensor([part.start, part.stop, part.low, part.high], device="cpu")
    table = table.to(comm.device)
    comm.all_reduce_sum(table)
    shared: dict[tuple[int, bytes], Layout] = {}  # equal layouts are one object, whose pieces are listed once
    layouts = []
    for tensor, ranks in zip(tensors, table.cpu(), strict=True):
        key = tensor.row, ranks.numpy().tobytes()
        if key not in shared:
            held = tuple(joined(Part(*part) for part in parts) for parts in ranks.tolist())
            try:
                shared[key] = Layout(tensor.row, num_slots, held)
            except DistplbError as error:
                raise DistplbError(f"{tensor.name}: {error}") from error
        layouts.append(shared[key])
    return layouts
