"""Acts on a schedule: stages each commit, has all ranks agree, and writes it in place.

Nothing is half moved: until all ranks have staged a commit, nobody has written any of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distplb.comm.agreement import agree
from distplb.comm.base import Comm
from distplb.errors import DistplbError, HalfMovedError
from distplb.migrate.pieces import Layout
from distplb.migrate.schedule import Copy, SlotMove, commits, copies, rounds
from distplb.migrate.state import RowTensor, Traveller
from distplb.placement import Placement

__all__ = ["Moved", "agreed_layouts", "move"]

_STAGING_BYTES = 256 << 20
_OPERATIONS = 32  # in one round, on one rank


@dataclass(frozen=True)
class Moved:
    """What a move did, over all ranks: slots that received another expert, bytes that crossed ranks."""

    slots: int = 0
    bytes: int = 0


LayerTensors = tuple[Sequence[RowTensor], Sequence[Layout], Sequence[Traveller]]


def agreed_layouts(layers: Sequence[Sequence[RowTensor]], num_slots: int, comm: Comm) -> list[list[Layout]]:
    """By layer, the layout of each declared tensor: every rank tells the others which part it holds.

    One all-reduce of [tensors, ranks, 2] integers.

    Raises:
        DistplbError: if the ranks together do not hold a tensor whole.
    """
    flat = [tensor for layer in layers for tensor in layer]
    table = torch.zeros(len(flat), comm.size, 2, dtype=torch.int64)
    for number, tensor in enumerate(flat):
        table[number, comm.rank] = torch.tensor([tensor.start, tensor.start + tensor.tensor.numel()])
    table = table.to(comm.device)
    comm.all_reduce_sum(table)
    shared: dict[Layout, Layout] = {}  # equal layouts are one object, whose pieces are made once
    found = []
    for tensor, parts in zip(flat, table.tolist(), strict=True):
        try:
            layout = Layout(tensor.row, num_slots, tuple((start, stop) for start, stop in parts))
        except DistplbError as error:
            raise DistplbError(f"{tensor.name}: {error}") from error
        found.append(shared.setdefault(layout, layout))
    following = iter(found)
    return [[next(following) for _ in layer] for layer in layers]


def move(
    old: Placement,
    new: Placement,
    layers: Sequence[LayerTensors],
    comm: Comm,
    on_commit: Callable[[Placement], None],
) -> Moved:
    """Bring experts and all that travels with them from the slots of `old` to those of `new`.

    Args:
        old: the placement in force.
        new: of the same shape; neither with replicas.
        layers: by layer, the declared tensors, their layouts, and what travels with them on this rank.
        comm: the ranks that hold the tensors.
        on_commit: told the placement in force after each commit, before the next begins.

    Raises:
        DistplbError: if a commit could not be staged: it and those after it did not happen.
        HalfMovedError: if one could not be written: the model is not whole any more.
    """
    flats = [traveller.flat for _, _, travelling in layers for traveller in travelling]
    numbered = _numbered(layers)
    plan = commits(old, new, *_row_bytes(layers), _budget(layers))
    placement, crossed = old, 0
    error: Exception | None = None
    for number, moves in enumerate(plan):
        wanted = copies(moves, numbered, comm.rank)
        staged: list[tuple[Copy, Tensor]] = []
        if error is None:
            try:
                staged = _stage(wanted, flats, comm)
            except Exception as caught:
                error = caught
        _agree_on_commit(comm, number, error)
        try:
            for copy, data in staged:
                _bytes(flats, copy.tensor, copy.target_offset, copy.count).copy_(data)
        except Exception as caught:
            # The others learn of it at the next agreement; none of them writes anything until then.
            error = HalfMovedError(f"commit {number} was not written whole: {caught!r}")
            continue
        placement = _after(placement, moves)
        on_commit(placement)
        crossed += sum(c.count * flats[c.tensor].element_size() for c in wanted if c.source_rank != c.target_rank)
    _agree_on_commit(comm, len(plan), error)
    return Moved(sum(len(moves) for moves in plan), crossed)


def _agree_on_commit(comm: Comm, number: int, error: Exception | None) -> None:
    try:
        agree(comm, {"the number of the commit": number}, error)
    except DistplbError:
        raise
    except Exception as lost:
        # Without an answer nobody knows whether the others went on to write.
        raise HalfMovedError(f"the ranks could not agree on commit {number}: {lost!r}") from lost


def _stage(wanted: Sequence[Copy], flats: Sequence[Tensor], comm: Comm) -> list[tuple[Copy, Tensor]]:
    """Each copy into this rank with its bytes, read before anything is written."""
    local = [c for c in wanted if c.source_rank == c.target_rank == comm.rank]
    staged = [(c, _bytes(flats, c.tensor, c.source_offset, c.count).clone()) for c in local]
    pairs = sorted({(c.source_rank, c.target_rank) for c in wanted if c.source_rank != c.target_rank})
    between = {
        pair: [c for c in wanted if (c.source_rank, c.target_rank) == pair] for pair in pairs if comm.rank in pair
    }
    sends, receives = {}, {}
    for (source, target), some in between.items():
        if source == comm.rank:
            parts = [_bytes(flats, c.tensor, c.source_offset, c.count) for c in some]
            sends[target] = torch.cat([part.to(comm.device) for part in parts])
        else:
            count = sum(_size(c, flats) for c in some)
            receives[source] = torch.empty(count, dtype=torch.uint8, device=comm.device)
    for some_pairs in rounds(pairs, _OPERATIONS):
        comm.exchange(
            [(sends[target], target) for source, target in some_pairs if source == comm.rank],
            [(receives[source], source) for source, target in some_pairs if target == comm.rank],
        )
    for source, buffer in receives.items():
        some = between[source, comm.rank]
        staged.extend(zip(some, buffer.split([_size(c, flats) for c in some]), strict=True))
    return staged


def _bytes(flats: Sequence[Tensor], tensor: int, offset: int, count: int) -> Tensor:
    """A view of some elements of a tensor as bytes."""
    return flats[tensor][offset : offset + count].view(torch.uint8)


def _size(copy: Copy, flats: Sequence[Tensor]) -> int:
    return copy.count * flats[copy.tensor].element_size()


def _after(placement: Placement, moves: Sequence[SlotMove]) -> Placement:
    """The placement in force once a commit is written."""
    table = placement.expert_of_slot.clone()
    for move in moves:
        table[move.layer, move.target] = placement.expert_of_slot[move.layer, move.source]
    return Placement(table, placement.num_experts, placement.num_gpus)


def _numbered(layers: Sequence[LayerTensors]) -> list[list[tuple[int, Layout]]]:
    """By layer, the number of each tensor that travels, counted over all layers, and its layout."""
    number, found = 0, []
    for _, layouts, travelling in layers:
        found.append([(number + i, layouts[traveller.of]) for i, traveller in enumerate(travelling)])
        number += len(travelling)
    return found


def _row_bytes(layers: Sequence[LayerTensors]) -> tuple[list[int], list[int]]:
    """By layer, the bytes of one slot's rows that its own GPU stages, and those that every rank stages."""
    own, every = [], []
    for _, layouts, travelling in layers:
        sizes = [(layouts[t.of].everywhere, layouts[t.of].row * t.flat.element_size()) for t in travelling]
        own.append(sum(size for everywhere, size in sizes if not everywhere))
        every.append(sum(size for everywhere, size in sizes if everywhere))
    return own, every


def _budget(layers: Sequence[LayerTensors]) -> int:
    """Bytes staged on a rank in one commit: 256 MiB, or a swap of two of the largest experts."""
    largest = max((own + every for own, every in zip(*_row_bytes(layers), strict=True)), default=0)
    return max(_STAGING_BYTES, 2 * largest)
