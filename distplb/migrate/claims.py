"""`Claim`: which rebalancer of this process moves which tensors, and where an earlier one left their rows.

A row does not show which expert it holds, so this is recorded for the lifetime of the tensors.
Shapes: L layers, P slots.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor

from distplb.comm.dtensors import local_like
from distplb.core.placement import Placement
from distplb.errors import DistplbError
from distplb.migrate.row_tensors import RowTensor

__all__ = ["Claim", "ExpertsBySlot"]

ExpertsBySlot = tuple[int, ...]  # [P], of one layer


class _Record:
    """The claim on one tensor, and where its rows are."""

    def __init__(self, tensor: Tensor) -> None:
        key = id(tensor)
        self.tensor = weakref.ref(tensor, lambda _: _RECORDS.pop(key, None) and None)
        self.holder: weakref.ref[Claim] | None = None
        self.rows: ExpertsBySlot | None = None  # None until a rebalancer has moved it


# Global to the process on purpose: two rebalancers of one model have no other way to detect each other.
_RECORDS: dict[int, _Record] = {}


class Claim:
    """The exclusive right of one rebalancer to move some tensors.

    Args:
        layers: by layer, the declared tensors.

    Raises:
        DistplbError: if two of them share memory, or one is claimed by another rebalancer that has not been closed.
    """

    def __init__(self, layers: Sequence[Sequence[RowTensor]]) -> None:
        _refuse_shared_memory(layers)
        self._first_names = [layer[0].name if layer else "" for layer in layers]
        self._layers = [[_record(tensor) for row_tensor in layer for tensor in row_tensor.tensors] for layer in layers]
        names = [[row_tensor.name for row_tensor in layer for _ in row_tensor.tensors] for layer in layers]
        records = [record for layer in self._layers for record in layer]
        if any(_is_held(record) for record in records):
            gc.collect()  # a claim without references may not have been freed yet
        for name, record in zip((name for layer in names for name in layer), records, strict=True):
            if _is_held(record):
                raise DistplbError(
                    f"{name} is moved by another Rebalancer of this process, and each would assume that the rows are "
                    "where it put them itself; close() the other one first"
                )
        for record in records:
            record.holder = weakref.ref(self)

    def inherited_rows(self) -> list[ExpertsBySlot | None]:
        """Return, by layer, where an earlier rebalancer left the rows; None if there was none.

        Raises:
            DistplbError: if tensors of one layer were left in different places.
        """
        rows = [{record.rows for record in layer} for layer in self._layers]
        for number, of_layer in enumerate(rows):
            if (
                len(of_layer) == 2
                and None in of_layer
                and all(one == tuple(range(len(one))) for one in of_layer if one)
            ):
                of_layer.discard(None)  # rows that were never moved are in the same places as restored ones
            if len(of_layer) > 1:
                raise DistplbError(
                    f"in the layer of {self._first_names[number]}, an earlier Rebalancer moved the rows of only some "
                    "tensors; declare every tensor that has a row for each expert, both there and here"
                )
        return [next(iter(of_layer), None) for of_layer in rows]

    def note(self, placement: Placement) -> None:
        """Record that the rows are now where this placement has them."""
        for layer, rows in zip(self._layers, map(tuple, placement.expert_of_slot.tolist()), strict=True):
            for record in layer:
                record.rows = rows

    def release(self) -> None:
        """Release the tensors; the record of where their rows are stays."""
        for record in (record for layer in self._layers for record in layer):
            if record.holder is not None and record.holder() is self:
                record.holder = None


def _record(tensor: Tensor) -> _Record:
    record = _RECORDS.get(id(tensor))
    if record is None or record.tensor() is not tensor:  # the id of a freed tensor may be reused
        record = _RECORDS[id(tensor)] = _Record(tensor)
    return record


def _is_held(record: _Record) -> bool:
    return record.holder is not None and record.holder() is not None


def _refuse_shared_memory(layers: Sequence[Sequence[RowTensor]]) -> None:
    """Refuse rows that are declared twice, because they would be moved twice; a shard may be part of its tensor."""
    ranges = sorted(
        (start, stop, row_tensor.name)
        for layer in layers
        for row_tensor in layer
        if not row_tensor.is_shard
        for tensor in row_tensor.tensors
        for start, stop in [_bytes(row_tensor.name, tensor)]
    )
    for (_, stop, one), (start, _, other) in pairwise(ranges):
        if start < stop:
            raise DistplbError(
                f"{one} and {'another tensor of that name' if other == one else other} share memory, so moving one "
                "would also move the other; declare each tensor once, "
                "and do not rebalance layers that share experts"
            )


def _bytes(name: str, tensor: Tensor) -> tuple[int, int]:
    """Start and end address of this rank's part, which is contiguous."""
    local = local_like(name, tensor, tensor)
    return local.data_ptr(), local.data_ptr() + local.nbytes
