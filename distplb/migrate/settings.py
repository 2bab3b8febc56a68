"""How each declared tensor is trained: what must be the same for experts that change places, beside their state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from distplb.comm.agreement import digest
from distplb.comm.base import Comm
from distplb.errors import DistplbError
from distplb.migrate.rows import RowTensor

__all__ = ["Settings", "Steppers", "Trainers", "agree_on_settings", "settings_of", "steppers", "trainers"]

Settings = dict[str, Any]  # by name: those of a param group that are numbers, and what torch itself knows
Trainers = dict[int, Settings]  # by id of a parameter
Steppers = dict[int, list[tuple[Optimizer, dict[str, Any]]]]  # by id of a parameter, optimizers with its param group

_KIND = "the optimizer"
_NONE = (1 << 63) - 1  # of a rank that holds nothing of a tensor


def trainers(optimizers: Sequence[Optimizer]) -> Trainers:
    """The settings of every parameter that the optimizers step on."""
    found: Trainers = {}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            settings: Settings = {_KIND: type(optimizer).__name__}
            settings |= {name: value for name, raw in group.items() if (value := _comparable(raw)) is not None}
            found |= {id(parameter): found.get(id(parameter), {}) | settings for parameter in group["params"]}
    return found


def steppers(optimizers: Sequence[Optimizer]) -> Steppers:
    """Who steps on each parameter."""
    found: Steppers = {}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                found.setdefault(id(parameter), []).append((optimizer, group))
    return found


def settings_of(row_tensor: RowTensor, trained: Trainers) -> Settings:
    """Those of a tensor on this rank, which are the same for all its experts; none where the rank holds nothing of it.

    Raises:
        DistplbError: if its experts differ: they would be trained by others' settings after a move.
    """
    each = [trained.get(id(tensor), {}) | {"requires_grad": tensor.requires_grad} for tensor in row_tensor.tensors]
    for other in each[1:]:
        for name in sorted(each[0].keys() | other.keys(), key=lambda name: (name != _KIND, name)):
            one, another = each[0].get(name, "not set"), other.get(name, "not set")
            if one != another:
                raise DistplbError(
                    f"{row_tensor.name}: {name} is {one} for one expert and {another} for another, and would stay "
                    "with the slots when experts change places; train all experts of a layer alike, such as in one "
                    "param group of one optimizer"
                )
    return each[0] if each else {}


def agree_on_settings(layers: Sequence[Sequence[RowTensor]], trained: Trainers, comm: Comm) -> None:
    """Refuse, on all ranks, experts that are trained otherwise on another rank. One all-reduce.

    Raises:
        DistplbError: naming the first tensor on which ranks differ, and this rank's settings of it.
    """
    tensors = [row_tensor for layer in layers for row_tensor in layer]
    own = [settings_of(row_tensor, trained) for row_tensor in tensors]
    codes = torch.full((2, len(tensors)), _NONE, device="cpu")
    for number, settings in enumerate(own):
        if settings:
            codes[0, number] = digest(sorted(settings.items()))
            codes[1, number] = -codes[0, number]
    codes = codes.to(comm.device)
    comm.all_reduce_min(codes)
    least, largest = codes[0].tolist(), (-codes[1]).tolist()
    for row_tensor, settings, low, high in zip(tensors, own, least, largest, strict=True):
        if low not in (_NONE, high):
            here = ", ".join(f"{name} {value}" for name, value in sorted(settings.items())) or "none of it"
            raise DistplbError(
                f"ranks differ in how they train {row_tensor.name} (rank {comm.rank}: {here}), which would stay with "
                "the slots when experts change places; give it the same settings on every rank"
            )


def _comparable(value: Any) -> Any:
    """A number, or some, as plain Python; None for what does not enter a step, such as names."""
    if isinstance(value, Tensor):
        return value.tolist() if value.numel() == 1 else None
    if isinstance(value, bool | int | float):
        return value
    if isinstance(value, tuple | list) and value and all(isinstance(each, bool | int | float) for each in value):
        return tuple(value)
    return None
