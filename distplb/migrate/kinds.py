"""Which kinds of state travel with each declared tensor: equal on all ranks, also those that hold nothing of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from distplb.comm.agreement import digest
from distplb.comm.base import Comm
from distplb.errors import DistplbError
from distplb.migrate.pieces import Layout
from distplb.migrate.rows import RowTensor
from distplb.migrate.state import Traveller

__all__ = ["completed", "what_travels"]

_MOST = 16  # kinds of one tensor: itself, its gradient, its optimizer's state
_NONE = (1 << 63) - 1
_BY_SIZE = {1: torch.uint8, 2: torch.float16, 4: torch.float32, 8: torch.float64}


def what_travels(layers: Sequence[Sequence[Traveller]]) -> int:
    """What must be equal on all ranks, as one number."""
    return digest([[(t.of, t.kind if not t.flats else _code(t)) for t in layer] for layer in layers])


def completed(
    layers: Sequence[Sequence[RowTensor]],
    layouts: Sequence[Sequence[Layout]],
    travelling: Sequence[Sequence[Traveller]],
    comm: Comm,
) -> list[list[Traveller]]:
    """What travels, in the same order on all ranks, with empty tensors where this rank holds nothing.

    Nothing is asked of the others where every rank holds something of every tensor; else one all-reduce.

    Args:
        layers: the declared tensors.
        layouts: of these.
        travelling: what travels on this rank; may be short of layers, where this rank has failed.
        comm: the ranks that hold the tensors.

    Raises:
        DistplbError: on all ranks, if the ranks that hold a tensor differ in what travels with it.
    """
    if not any(layout.is_nowhere_on_some for of_layer in layouts for layout in of_layer):
        return [list(of_layer) for of_layer in travelling]
    numbers, count = {}, 0
    for layer, tensors in enumerate(layers):
        for index in range(len(tensors)):
            numbers[layer, index] = count
            count += 1
    table = torch.full((2, count, _MOST), _NONE, device="cpu")  # by kind its digest and item size; and their negatives
    ranks_hold: dict[int, list[Traveller]] = {number: [] for number in range(count)}
    for layer, of_layer in enumerate(travelling):
        for traveller in of_layer:
            ranks_hold[numbers[layer, traveller.of]].append(traveller)
    for number, kinds in ranks_hold.items():
        if kinds:
            codes = [_code(kind) for kind in kinds] + [0] * (_MOST - len(kinds))
            table[0, number] = torch.tensor(codes, device="cpu")
            table[1, number] = -table[0, number]
    table = table.to(comm.device)
    comm.all_reduce_min(table)
    least, largest = table[0].tolist(), (-table[1]).tolist()
    for (layer, index), number in numbers.items():
        if least[number] != largest[number] and least[number][0] != _NONE:
            raise DistplbError(
                f"the ranks that hold {layers[layer][index].name} differ in the state that travels with it; call "
                "zero_grad() before rebalancer.step(), and step all of its parts together"
            )
    found: list[list[Traveller]] = []
    for layer, tensors in enumerate(layers):
        found.append([])
        for index, row_tensor in enumerate(tensors):
            number = numbers[layer, index]
            found[-1].extend(ranks_hold[number] or _absent(row_tensor, index, least[number]))
    return found


def _code(kind: Traveller) -> int:
    """Kind, type and scalars as one number, whose lowest bits are the bytes of an element."""
    what = (kind.kind, str(kind.dtype), kind.scalars)
    return (digest(what) >> 4 << 4) | kind.dtype.itemsize


def _absent(row_tensor: RowTensor, index: int, codes: Sequence[int]) -> list[Traveller]:
    """What others hold of a tensor, with nothing in it."""
    return [
        Traveller(row_tensor.name, code, (), index, _BY_SIZE[code & 15]) for code in codes if code not in (0, _NONE)
    ]
