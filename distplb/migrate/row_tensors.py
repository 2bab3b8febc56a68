"""`RowTensor`: a tensor with a row for every slot, as a layer declares it, and the part of it that this rank holds.

Shapes: P slots, G slots on this GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distplb.comm.dtensors import block_of, is_dtensor, local_like
from distplb.core.layer import ExpertTensor, FlatShard, MoELayer, Rows
from distplb.errors import DistplbError
from distplb.migrate.layout import Part, joined

__all__ = ["RowTensor", "check_plain", "declared_tensors"]


@dataclass(frozen=True)
class RowTensor:
    """A checked tensor that a layer declares, and the part of all slots' rows that this rank holds of it.

    Args:
        name: fully qualified name.
        tensors: the tensors that hold it, as the optimizer knows them: one, one for each slot, or none.
        held: by tensor, the part of the slots' rows that it holds.
        row: number of elements per slot.
        stepped: whether the optimizer steps on it (and not on a shard of it).
        of_experts: whether it belongs to the experts (and not to the router).
        is_shard: whether it is the optimizer's shard of another declared tensor.
    """

    name: str
    tensors: tuple[Tensor, ...]
    held: tuple[Part, ...]
    row: int
    stepped: bool
    of_experts: bool
    is_shard: bool = False

    @property
    def parts(self) -> tuple[Part, ...]:
        """The parts that this rank holds, in memory order."""
        return joined(self.held)

    @property
    def own_slots(self) -> list[int] | None:
        """The slot of each of the tensors; None if one of them has parts of several slots."""
        slots: list[int] = []
        for part in self.held:
            of_part = {span.slot for span in part.spans}
            if len(of_part) != 1:
                return None
            slots += of_part
        return slots


def declared_tensors(layer: MoELayer, gpu: int, slots_per_gpu: int, num_gpus: int) -> list[RowTensor]:
    """Check and return the layer's declared tensors on GPU `gpu`.

    Raises:
        DistplbError: if a tensor does not have a row for each of its slots, is not contiguous, or is of a kind whose
            rows cannot be moved as plain elements.
    """
    unknown = sorted(set(layer.shards) - set(layer.experts) - set(layer.router))
    if unknown:
        raise DistplbError(
            f"{layer.name}: shards has {unknown[0]!r}, which is not among the layer's tensors; use names from experts "
            "or router"
        )
    both = sorted(set(layer.experts) & set(layer.router) & set(layer.shards))
    if both:
        raise DistplbError(
            f"{layer.name}: shards has {both[0]!r}, which is both an expert and a router tensor; rename one of them"
        )
    tensors = []
    for key, declared in sorted(layer.experts.items()):
        name = f"{layer.name}.experts.{key}"
        whole = _expert_rows(name, declared, gpu, slots_per_gpu, num_gpus, stepped=key not in layer.shards)
        tensors.append(whole)
        if key in layer.shards:
            tensors.append(_shards(f"{layer.name}.shards.{key}", whole, layer.shards[key]))
    num_slots = slots_per_gpu * num_gpus
    for key, tensor in sorted(layer.router.items()):
        name = f"{layer.name}.router.{key}"
        whole = _router_rows(name, tensor, num_slots, stepped=key not in layer.shards)
        tensors.append(whole)
        if key in layer.shards:
            tensors.append(_shards(f"{layer.name}.shards.{key}", whole, layer.shards[key]))
    return tensors


def _expert_rows(
    name: str, declared: ExpertTensor, gpu: int, slots_per_gpu: int, num_gpus: int, stepped: bool
) -> RowTensor:
    if isinstance(declared, Tensor) and is_dtensor(declared):
        block = _block(name, declared, slots_per_gpu * num_gpus, stepped, of_experts=True)
        slots = {span.slot // slots_per_gpu for part in block.held for span in part.spans}
        if slots - {gpu}:
            raise DistplbError(
                f"{name}: this rank is GPU {gpu} of its EP group, but holds experts of GPUs {sorted(slots)}; pass "
                "gpu= as the coordinate on the mesh axis that the experts' dim 0 is sharded over, and a topology of "
                "that axis"
            )
        return block
    if isinstance(declared, Tensor | Rows):
        tensors: tuple[Tensor, ...] = (declared.tensor if isinstance(declared, Rows) else declared,)
        check_plain(name, tensors[0])
        if isinstance(declared, Rows):
            if not tensors[0].numel() or tensors[0].numel() % slots_per_gpu:
                raise DistplbError(
                    f"{name} has {tensors[0].numel()} elements; pass a multiple of {slots_per_gpu}, with a row for "
                    "each slot of this GPU"
                )
        else:
            _check_rows(name, tensors[0], slots_per_gpu, "one row per slot of this GPU")
    else:
        tensors = tuple(declared)
        _check_alike(name, tensors, slots_per_gpu)
    row = sum(tensor.numel() for tensor in tensors) // slots_per_gpu
    first = gpu * slots_per_gpu * row
    size = tensors[0].numel()
    held = tuple(Part(first + i * size, first + (i + 1) * size, 0, row) for i in range(len(tensors)))
    return RowTensor(name, tensors, held, row, stepped, of_experts=True)


def _router_rows(name: str, tensor: Tensor, num_slots: int, stepped: bool) -> RowTensor:
    _refuse_expert_numbers(name, tensor, num_slots)
    if is_dtensor(tensor):
        return _block(name, tensor, num_slots, stepped, of_experts=False)
    check_plain(name, tensor)
    _check_rows(name, tensor, num_slots, "one row per slot of all GPUs")
    row = tensor.numel() // num_slots
    return RowTensor(name, (tensor,), (Part(0, tensor.numel(), 0, row),), row, stepped, of_experts=False)


def _block(name: str, tensor: Tensor, num_slots: int, stepped: bool, of_experts: bool) -> RowTensor:
    """The part of a DTensor that this rank holds."""
    _check_rows(name, tensor, num_slots, "one row per slot of all GPUs, because it is a DTensor")
    block = block_of(name, tensor)
    check_plain(name, block.local)
    if not block.local.numel():
        return RowTensor(name, (), (), block.row, stepped, of_experts)
    width = block.high - block.low
    start = block.first_row * width
    part = Part(start, start + block.local.numel(), block.low, block.high)
    return RowTensor(name, (tensor,), (part,), block.row, stepped, of_experts)


def _shards(name: str, whole: RowTensor, shards: FlatShard | Sequence[FlatShard | None]) -> RowTensor:
    """The shards that the optimizer steps on in place of the declared tensor."""
    each = [shards] if isinstance(shards, FlatShard) else list(shards)
    if len(each) != len(whole.tensors):
        raise DistplbError(
            f"{name}: {len(each)} shard{'s' * (len(each) != 1)} for {len(whole.tensors)} "
            f"tensor{'s' * (len(whole.tensors) != 1)}; pass one shard, or None, for each tensor"
        )
    tensors, held = [], []
    for shard, tensor, part in zip(each, whole.tensors, whole.held, strict=True):
        if shard is None or not shard.values.numel():
            continue
        check_plain(name, shard.values)
        stop = shard.start + shard.values.numel()
        if is_dtensor(tensor) or not 0 <= shard.start < stop <= tensor.numel():
            raise DistplbError(
                f"{name}: the shard covers elements {shard.start} to {stop} of a tensor with {tensor.numel()}; pass a "
                "flat range of a plain tensor"
            )
        tensors.append(shard.values)
        held.append(Part(part.start + shard.start, part.start + stop, 0, whole.row))
    return RowTensor(name, tuple(tensors), tuple(held), whole.row, True, whole.of_experts, is_shard=True)


def _refuse_expert_numbers(name: str, tensor: Tensor, num_slots: int) -> None:
    """Refuse rows with expert ids: rows keep their values when they move, but ids would have to change."""
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        return
    values = local_like(name, tensor, tensor)
    if values.numel() and 0 <= int(values.min()) < int(values.max()) < num_slots:
        raise DistplbError(
            f"{name} holds integers from {int(values.min())} to {int(values.max())}, which look like expert ids; rows "
            "that move keep their values, so the ids would name other experts than before. If the router looks experts "
            "up in a table of its own, as hash routing does, leave router empty and pass slot_of_expert; if these are "
            "counts, zero them first or keep them as floats"
        )


def _check_rows(name: str, tensor: Tensor, rows: int, whose: str) -> None:
    if tensor.dim() == 0 or tensor.shape[0] != rows or not tensor.numel():
        raise DistplbError(f"{name} has shape {tuple(tensor.shape)}; its first dim must be {rows}, {whose}")


def _check_alike(name: str, tensors: Sequence[Tensor], slots: int) -> None:
    if len(tensors) != slots:
        raise DistplbError(
            f"{name} is {len(tensors)} tensor{'s' * (len(tensors) != 1)}; pass {slots}, one for each slot of this GPU"
        )
    for tensor in tensors:
        check_plain(name, tensor)
        if (tensor.shape, tensor.dtype) != (tensors[0].shape, tensors[0].dtype) or not tensor.numel():
            raise DistplbError(
                f"{name} has tensors of {tensors[0].dtype} {tuple(tensors[0].shape)} and of {tensor.dtype} "
                f"{tuple(tensor.shape)}; experts that change places must have the same dtype and shape"
            )


def check_plain(name: str, tensor: Tensor) -> None:
    """Refuse a tensor whose elements are not contiguous in memory.

    Raises:
        DistplbError: with its type or strides.
    """
    if type(tensor) not in (Tensor, torch.nn.Parameter):
        raise DistplbError(
            f"{name} is a {type(tensor).__name__}, whose layout is not understood; pass the plain local tensor"
        )
    if not tensor.is_contiguous():
        raise DistplbError(
            f"{name} has strides {tensor.stride()} and is not contiguous; store it contiguously, "
            "so that a slot's row is one range"
        )
