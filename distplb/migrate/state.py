"""What travels with an expert: every tensor that has a row for each slot is found here, or refused by its name.

Shapes: P slots, G slots on this GPU.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from distplb.errors import DistplbError
from distplb.layer import MoELayer

__all__ = ["BackwardWatch", "RowTensor", "Traveller", "check_known", "row_tensors", "travellers"]

Optimizers = Sequence[Optimizer]


@dataclass(frozen=True)
class RowTensor:
    """A tensor that a layer declares, and which part of all slots' rows this rank holds in it.

    Args:
        name: fully qualified.
        tensor: this rank's part.
        row: elements of one slot.
        start: where the part begins, in slot-major elements.
        stepped: whether the optimizer steps on it (and not on a shard of it).
    """

    name: str
    tensor: Tensor
    row: int
    start: int
    stepped: bool


@dataclass(frozen=True)
class Traveller:
    """One tensor that travels: a declared tensor, its gradient, or a part of its optimizer state.

    Args:
        name: fully qualified, with the kind of state behind a colon.
        flat: `[n]`, a view of this rank's elements.
        of: the index of the declared tensor whose layout it shares.
    """

    name: str
    flat: Tensor
    of: int


def row_tensors(layer: MoELayer, gpu: int, slots_per_gpu: int, num_gpus: int) -> list[RowTensor]:
    """The layer's declared tensors on GPU number `gpu`, checked.

    Raises:
        DistplbError: if a tensor has not a row for each of its slots, is not contiguous, or is of a kind whose
            rows cannot be moved as plain elements.
    """
    found = []
    for key, tensor in sorted(layer.experts.items()):
        name = f"{layer.name}.experts.{key}"
        _check_rows(name, tensor, slots_per_gpu, "this GPU's slots")
        row = tensor.numel() // slots_per_gpu
        start = gpu * slots_per_gpu * row
        shard = layer.shards.get(key)
        found.append(RowTensor(name, tensor, row, start, stepped=shard is None))
        if shard is not None:
            name = f"{layer.name}.shards.{key}"
            _check_plain(name, shard.values)
            if shard.values.dim() != 1 or not 0 <= shard.start <= tensor.numel() - shard.values.numel():
                raise DistplbError(
                    f"{name}: {tuple(shard.values.shape)} elements from {shard.start} on do not lie in the "
                    f"{tensor.numel()} of the expert tensor; pass a flat range of it"
                )
            found.append(RowTensor(name, shard.values, row, start + shard.start, stepped=True))
    unknown = sorted(set(layer.shards) - set(layer.experts))
    if unknown:
        raise DistplbError(f"{layer.name}: shards of {unknown[0]!r}, which is not among the layer's experts")
    for key, tensor in sorted(layer.router.items()):
        name = f"{layer.name}.router.{key}"
        num_slots = slots_per_gpu * num_gpus
        _check_rows(name, tensor, num_slots, "the slots of all GPUs")
        found.append(RowTensor(name, tensor, tensor.numel() // num_slots, 0, stepped=True))
    return found


def _check_rows(name: str, tensor: Tensor, rows: int, whose: str) -> None:
    _check_plain(name, tensor)
    if tensor.dim() == 0 or tensor.shape[0] != rows or not tensor.numel():
        raise DistplbError(f"{name} has shape {tuple(tensor.shape)}; its first dim must be {rows}, {whose}")


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


def check_known(tensors: Iterable[RowTensor], optimizers: Optimizers) -> None:
    """Refuse a trained tensor that no optimizer knows: its state could not be found, and would stay behind."""
    known = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    for row_tensor in tensors:
        if row_tensor.stepped and row_tensor.tensor.requires_grad and id(row_tensor.tensor) not in known:
            raise DistplbError(
                f"{row_tensor.name} requires a gradient but is in no param_group of the optimizer; pass the optimizer "
                "that steps on it (all of them, if there are several), or declare its FlatShard"
            )


def travellers(tensors: Sequence[RowTensor], optimizers: Optimizers) -> list[Traveller]:
    """Everything that travels with the declared tensors, in an order that is the same on every rank.

    Raises:
        DistplbError: if the optimizer holds a tensor for one of them that is neither a scalar nor of its shape.
    """
    found: list[Traveller] = []
    for index, row_tensor in enumerate(tensors):
        tensor = row_tensor.tensor
        parts = [("", tensor)]
        if tensor.grad is not None:
            parts.append((":grad", tensor.grad))
        parts.extend(_state_of(row_tensor, optimizers))
        found.extend(Traveller(row_tensor.name + kind, part.detach().view(-1), index) for kind, part in parts)
    return found


def _state_of(row_tensor: RowTensor, optimizers: Optimizers) -> Iterator[tuple[str, Tensor]]:
    for optimizer in optimizers:
        state: Mapping[str, Any] = optimizer.state.get(row_tensor.tensor, {})
        for key, value in sorted(state.items()):
            name = f"{row_tensor.name}:{key}"
            if not isinstance(value, Tensor):
                _refuse_hidden_tensors(name, value, optimizer)
            elif value.shape == row_tensor.tensor.shape and value.is_floating_point():
                _check_plain(name, value)
                yield f":{key}", value
            elif value.numel() > 1:
                raise DistplbError(
                    f"{name} of {type(optimizer).__name__} is {value.dtype} of shape {tuple(value.shape)}, the "
                    f"parameter {tuple(row_tensor.tensor.shape)}: which elements belong to which expert is not known, "
                    "so nothing is moved; use an optimizer whose state has the parameter's shape (AdamW, SGD, ...)"
                )


def _refuse_hidden_tensors(name: str, value: Any, optimizer: Optimizer) -> None:
    leaves = torch.utils._pytree.tree_leaves(value)
    if any(isinstance(leaf, Tensor) for leaf in leaves):
        raise DistplbError(
            f"{name} of {type(optimizer).__name__} is a {type(value).__name__} with tensors in it, whose layout is not "
            "understood, so nothing is moved; use an optimizer whose state has the parameter's shape (AdamW, SGD, ...)"
        )


class BackwardWatch:
    """Knows, without looking at the device, whether a backward pass has begun since the optimizer's last step."""

    def __init__(self, layers: Sequence[Sequence[RowTensor]], optimizers: Sequence[Optimizer]) -> None:
        self._begun = False
        for tensors in layers:
            for tensor in (row_tensor.tensor for row_tensor in tensors):
                if tensor.requires_grad and tensor.is_leaf:
                    tensor.register_post_accumulate_grad_hook(self._note)
        for optimizer in optimizers:
            optimizer.register_step_post_hook(self._forget)

    def refuse_if_begun(self) -> None:
        """Raise if gradients of another step are already on their way."""
        if self._begun:
            raise DistplbError(
                "a backward pass has begun since the optimizer's last step; call rebalancer.step() right after "
                "optimizer.step(), before the next forward"
            )

    def _note(self, _: Tensor) -> None:
        self._begun = True

    def _forget(self, *_: Any) -> None:
        self._begun = False
