"""What travels with an expert: every tensor that has a row for each slot is found here, or refused by its name.

Shapes: P slots, G slots on this GPU.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from distplb.errors import DistplbError
from distplb.layer import ExpertTensor, FlatShard, MoELayer, Rows
from distplb.migrate.dtensors import block_of, is_dtensor, local_like
from distplb.migrate.pieces import Part, joined

__all__ = ["BackwardWatch", "RowTensor", "Traveller", "check_known", "row_tensors", "travellers"]

Optimizers = Sequence[Optimizer]


@dataclass(frozen=True)
class RowTensor:
    """A tensor that a layer declares, and which part of all slots' rows this rank holds in it.

    Args:
        name: fully qualified.
        tensors: what holds it, as the optimizer knows it: one tensor, one for each slot, or none.
        held: by tensor, which part of the slots' rows it is.
        row: elements of one slot.
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
        """What this rank holds, in the order of its memory."""
        return joined(self.held)

    @property
    def dtype(self) -> torch.dtype | None:
        """Of its elements; None where this rank holds none of them."""
        return self.tensors[0].dtype if self.tensors else None


@dataclass(frozen=True)
class Traveller:
    """One tensor that travels: a declared tensor, its gradient, or a part of its optimizer state.

    Args:
        name: of the declared tensor, fully qualified.
        kind: which state of it: empty for the tensor itself; a number where this rank holds nothing of it.
        flats: `[n]` each, views of this rank's elements, one for each tensor that holds the declared one.
        of: the index of the declared tensor whose layout it shares.
        dtype: of the elements.
        scalars: the state that stays, by name; experts change places only where it is the same for all of them.
    """

    name: str
    kind: str | int
    flats: tuple[Tensor, ...]
    of: int
    dtype: torch.dtype
    scalars: tuple[tuple[str, float], ...] = ()

    @property
    def nbytes(self) -> int:
        """On this rank."""
        return sum(flat.nbytes for flat in self.flats)

    @cached_property
    def _starts(self) -> list[int]:
        return [0, *accumulate(flat.numel() for flat in self.flats)]

    def at(self, offset: int, count: int) -> Tensor:
        """`[count]`: a view of elements from local element `offset` on, which no two tensors share."""
        if len(self.flats) == 1:
            return self.flats[0][offset : offset + count]
        number = bisect_right(self._starts, offset) - 1
        offset -= self._starts[number]
        return self.flats[number][offset : offset + count]


# --- what a layer declares ---------------------------------------------------------------------------------------


def row_tensors(layer: MoELayer, gpu: int, slots_per_gpu: int, num_gpus: int) -> list[RowTensor]:
    """The layer's declared tensors on GPU number `gpu`, checked.

    Raises:
        DistplbError: if a tensor has not a row for each of its slots, is not contiguous, or is of a kind whose
            rows cannot be moved as plain elements.
    """
    unknown = sorted(set(layer.shards) - set(layer.experts) - set(layer.router))
    if unknown:
        raise DistplbError(f"{layer.name}: shards of {unknown[0]!r}, which is not among the layer's tensors")
    both = sorted(set(layer.experts) & set(layer.router) & set(layer.shards))
    if both:
        raise DistplbError(f"{layer.name}: shards of {both[0]!r}, which is both an expert and a router tensor")
    found = []
    for key, declared in sorted(layer.experts.items()):
        name = f"{layer.name}.experts.{key}"
        whole = _expert_rows(name, declared, gpu, slots_per_gpu, num_gpus, stepped=key not in layer.shards)
        found.append(whole)
        if key in layer.shards:
            found.append(_shards(f"{layer.name}.shards.{key}", whole, layer.shards[key]))
    num_slots = slots_per_gpu * num_gpus
    for key, tensor in sorted(layer.router.items()):
        name = f"{layer.name}.router.{key}"
        whole = _router_rows(name, tensor, num_slots, stepped=key not in layer.shards)
        found.append(whole)
        if key in layer.shards:
            found.append(_shards(f"{layer.name}.shards.{key}", whole, layer.shards[key]))
    return found


def _expert_rows(
    name: str, declared: ExpertTensor, gpu: int, slots_per_gpu: int, num_gpus: int, stepped: bool
) -> RowTensor:
    if isinstance(declared, Tensor) and is_dtensor(declared):
        found = _block(name, declared, slots_per_gpu * num_gpus, stepped, of_experts=True)
        slots = {span.slot // slots_per_gpu for part in found.held for span in part.spans}
        if slots - {gpu}:
            raise DistplbError(
                f"{name}: this rank is GPU {gpu} of its EP group, and holds experts of GPUs {sorted(slots)}; pass "
                "gpu= as the coordinate on the mesh axis that the experts' dim 0 is sharded over, and a topology of "
                "that axis"
            )
        return found
    if isinstance(declared, Tensor | Rows):
        tensors: tuple[Tensor, ...] = (declared.tensor if isinstance(declared, Rows) else declared,)
        _check_plain(name, tensors[0])
        if isinstance(declared, Rows):
            if not tensors[0].numel() or tensors[0].numel() % slots_per_gpu:
                raise DistplbError(f"{name}: {tensors[0].numel()} elements are not {slots_per_gpu} equal rows")
        else:
            _check_rows(name, tensors[0], slots_per_gpu, "this GPU's slots")
    else:
        tensors = tuple(declared)
        _check_alike(name, tensors, slots_per_gpu)
    row = sum(tensor.numel() for tensor in tensors) // slots_per_gpu
    first = gpu * slots_per_gpu * row
    size = tensors[0].numel()
    held = tuple(Part(first + i * size, first + (i + 1) * size, 0, row) for i in range(len(tensors)))
    return RowTensor(name, tensors, held, row, stepped, of_experts=True)


def _router_rows(name: str, tensor: Tensor, num_slots: int, stepped: bool) -> RowTensor:
    if is_dtensor(tensor):
        return _block(name, tensor, num_slots, stepped, of_experts=False)
    _check_plain(name, tensor)
    _check_rows(name, tensor, num_slots, "the slots of all GPUs")
    row = tensor.numel() // num_slots
    return RowTensor(name, (tensor,), (Part(0, tensor.numel(), 0, row),), row, stepped, of_experts=False)


def _block(name: str, tensor: Tensor, num_slots: int, stepped: bool, of_experts: bool) -> RowTensor:
    """What this rank holds of a DTensor."""
    _check_rows(name, tensor, num_slots, "the slots of all GPUs, for a DTensor")
    block = block_of(name, tensor)
    _check_plain(name, block.local)
    if not block.local.numel():
        return RowTensor(name, (), (), block.row, stepped, of_experts)
    width = block.high - block.low
    start = block.first_row * width
    part = Part(start, start + block.local.numel(), block.low, block.high)
    return RowTensor(name, (tensor,), (part,), block.row, stepped, of_experts)


def _shards(name: str, whole: RowTensor, shards: FlatShard | Sequence[FlatShard | None]) -> RowTensor:
    """What the optimizer steps on, where that is not the declared tensor."""
    given = [shards] if isinstance(shards, FlatShard) else list(shards)
    if len(given) != len(whole.tensors):
        raise DistplbError(f"{name}: {len(given)} shards of {len(whole.tensors)} tensors; pass one, or None, for each")
    tensors, held = [], []
    for shard, tensor, part in zip(given, whole.tensors, whole.held, strict=True):
        if shard is None or not shard.values.numel():
            continue
        _check_plain(name, shard.values)
        stop = shard.start + shard.values.numel()
        if is_dtensor(tensor) or not 0 <= shard.start < stop <= tensor.numel():
            raise DistplbError(
                f"{name}: {shard.values.numel()} elements from {shard.start} on do not lie in the {tensor.numel()} of "
                "the tensor; pass a flat range of a plain tensor"
            )
        tensors.append(shard.values)
        held.append(Part(part.start + shard.start, part.start + stop, 0, whole.row))
    return RowTensor(name, tuple(tensors), tuple(held), whole.row, True, whole.of_experts, is_shard=True)


def _check_rows(name: str, tensor: Tensor, rows: int, whose: str) -> None:
    if tensor.dim() == 0 or tensor.shape[0] != rows or not tensor.numel():
        raise DistplbError(f"{name} has shape {tuple(tensor.shape)}; its first dim must be {rows}, {whose}")


def _check_alike(name: str, tensors: Sequence[Tensor], slots: int) -> None:
    if len(tensors) != slots:
        raise DistplbError(f"{name} is {len(tensors)} tensors; pass one for each of this GPU's {slots} slots")
    for tensor in tensors:
        _check_plain(name, tensor)
        if (tensor.shape, tensor.dtype) != (tensors[0].shape, tensors[0].dtype) or not tensor.numel():
            raise DistplbError(
                f"{name} has tensors of {tensors[0].dtype} {tuple(tensors[0].shape)} and of {tensor.dtype} "
                f"{tuple(tensor.shape)}; experts that change places must be alike"
            )


def _check_plain(name: str, tensor: Tensor) -> None:
    if type(tensor) not in (Tensor, torch.nn.Parameter):
        raise DistplbError(
            f"{name} is a {type(tensor).__name__}, whose layout is not understood; pass the plain local tensor"
        )
    if not tensor.is_contiguous():
        raise DistplbError(
            f"{name} has strides {tensor.stride()} and is not contiguous; store it contiguously, "
            "so that a slot's row is one range"
        )


# --- what travels with it ----------------------------------------------------------------------------------------


def check_known(tensors: Iterable[RowTensor], optimizers: Optimizers) -> None:
    """Refuse a trained tensor that no optimizer knows: its state could not be found, and would stay behind."""
    known = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    for row_tensor in tensors:
        trained = [tensor for tensor in row_tensor.tensors if tensor.requires_grad or row_tensor.is_shard]
        if row_tensor.stepped and any(id(tensor) not in known for tensor in trained):
            raise DistplbError(
                f"{row_tensor.name} requires a gradient but is in no param_group of the optimizer; pass the optimizer "
                "that steps on it (all of them, if there are several), or declare its FlatShard"
            )


def travellers(tensors: Sequence[RowTensor], optimizers: Optimizers) -> list[Traveller]:
    """Everything that travels with the declared tensors that this rank holds, in an order that ranks share.

    Raises:
        DistplbError: if the optimizer holds a tensor for one of them that is neither a scalar nor of its shape, or
            if the experts of one tensor differ in what is held for them.
    """
    found: list[Traveller] = []
    for index, row_tensor in enumerate(tensors):
        dtype = row_tensor.dtype
        if dtype is None:
            continue
        each = [_belongings(row_tensor.name, tensor, optimizers) for tensor in row_tensor.tensors]
        first = each[0]
        for other in each[1:]:
            if (other.kinds, other.scalars) != (first.kinds, first.scalars):
                raise DistplbError(
                    f"{row_tensor.name}: one expert has {_told(first)}, another {_told(other)}; experts can only "
                    "change places where all have the same: call zero_grad() before rebalancer.step(), and give every "
                    "expert a gradient in every step, be it zero"
                )
        for kind in first.kinds:
            parts = [one.tensors[kind] for one in each]
            flats = tuple(part.detach().view(-1) for part in parts)
            scalars = first.scalars if not kind else ()
            found.append(Traveller(row_tensor.name, kind, flats, index, flats[0].dtype, scalars))
    return found


@dataclass(frozen=True)
class _Belongings:
    """What goes with one tensor, by kind, and the scalars that stay."""

    tensors: dict[str, Tensor]
    scalars: tuple[tuple[str, float], ...]

    @property
    def kinds(self) -> tuple[str, ...]:
        return tuple(self.tensors)


def _told(belongings: _Belongings) -> str:
    names = [kind for kind in belongings.kinds if kind] + [f"{k} = {v}" for k, v in belongings.scalars]
    return ", ".join(names) or "nothing"


def _belongings(name: str, tensor: Tensor, optimizers: Optimizers) -> _Belongings:
    found = {"": local_like(name, tensor, tensor)}
    if tensor.grad is not None:
        found["grad"] = local_like(f"{name}:grad", tensor.grad, tensor)
        _check_plain(f"{name}:grad", found["grad"])
    scalars: list[tuple[str, float]] = []
    for optimizer in optimizers:
        state: Mapping[str, Any] = optimizer.state.get(tensor, {})
        for key, value in sorted(state.items()):
            full = f"{name}:{key}"
            if not isinstance(value, Tensor):
                _refuse_hidden_tensors(full, value, optimizer)
                if isinstance(value, int | float):
                    scalars.append((key, float(value)))
            elif value.shape == tensor.shape and value.is_floating_point():
                found[key] = local_like(full, value, tensor)
                _check_plain(full, found[key])
            elif value.numel() > 1:
                raise DistplbError(
                    f"{full} of {type(optimizer).__name__} is {value.dtype} of shape {tuple(value.shape)}, the "
                    f"parameter {tuple(tensor.shape)}: which elements belong to which expert is not known, "
                    "so nothing is moved; use an optimizer whose state has the parameter's shape (AdamW, SGD, ...)"
                )
            elif value.numel() and not is_dtensor(value):
                scalars.append((key, float(value)))
    return _Belongings(found, tuple(scalars))


def _refuse_hidden_tensors(name: str, value: Any, optimizer: Optimizer) -> None:
    leaves = torch.utils._pytree.tree_leaves(value)
    if any(isinstance(leaf, Tensor) for leaf in leaves):
        raise DistplbError(
            f"{name} of {type(optimizer).__name__} is a {type(value).__name__} with tensors in it, whose layout is not "
            "understood, so nothing is moved; use an optimizer whose state has the parameter's shape (AdamW, SGD, ...)"
        )


class BackwardWatch:
    """Knows, without looking at the device, whether gradients of a step that has not been taken are held."""

    def __init__(self, layers: Sequence[Sequence[RowTensor]], optimizers: Sequence[Optimizer]) -> None:
        self._begun: dict[int, Tensor] = {}
        self._sharded = set[int]()  # whose gradients are added up elsewhere, and taken from there
        for row_tensor in (row_tensor for tensors in layers for row_tensor in tensors):
            for tensor in row_tensor.tensors:
                if tensor.requires_grad and tensor.is_leaf:
                    tensor.register_post_accumulate_grad_hook(self._note)
                    if not row_tensor.stepped:
                        self._sharded.add(id(tensor))
        for optimizer in optimizers:
            optimizer.register_step_post_hook(self._forget)

    def refuse_if_begun(self) -> None:
        """Raise if gradients of another step are already on their way."""
        # Where a step was skipped, as by a gradient scaler, they have been dropped since.
        if any(tensor.grad is not None or id(tensor) in self._sharded for tensor in self._begun.values()):
            raise DistplbError(
                "a backward pass has begun since the optimizer's last step; call rebalancer.step() right after "
                "optimizer.step(), before the next forward"
            )

    def _note(self, tensor: Tensor) -> None:
        self._begun[id(tensor)] = tensor

    def _forget(self, *_: Any) -> None:
        self._begun.clear()
