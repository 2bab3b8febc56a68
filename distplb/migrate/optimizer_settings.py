"""The settings that each declared tensor is trained with.

Settings stay with the slots, so experts that change places must share them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from distplb.comm.agreement import ABSENT, agree, digest, min_and_max
from distplb.comm.base import Comm
from distplb.errors import DistplbError
from distplb.migrate.row_tensors import RowTensor

__all__ = [
    "OptimizersById",
    "Settings",
    "SettingsById",
    "agree_on_settings",
    "check_settings",
    "optimizers_by_id",
    "settings_by_id",
    "settings_of",
]

Settings = dict[str, Any]  # by name: the numbers of a param group, the optimizer's class, requires_grad
SettingsById = dict[int, Settings]  # by `id` of a parameter
OptimizersById = dict[int, list[tuple[Optimizer, dict[str, Any]]]]  # by `id` of a parameter: (optimizer, param group)

_KIND = "the optimizer"


def settings_by_id(optimizers: Sequence[Optimizer]) -> SettingsById:
    """Return the settings of every parameter that the optimizers step on."""
    by_id: SettingsById = {}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            settings: Settings = {_KIND: type(optimizer).__name__}
            settings |= {name: value for name, raw in group.items() if (value := _comparable(raw)) is not None}
            by_id |= {id(parameter): by_id.get(id(parameter), {}) | settings for parameter in group["params"]}
    return by_id


def optimizers_by_id(optimizers: Sequence[Optimizer]) -> OptimizersById:
    """Return the optimizers that step on each parameter."""
    by_id: OptimizersById = {}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                by_id.setdefault(id(parameter), []).append((optimizer, group))
    return by_id


def check_settings(tensors: Iterable[RowTensor], settings: SettingsById) -> None:
    """Refuse tensors whose training does not let experts change places, whatever their state.

    Raises:
        DistplbError: if a trained tensor is in none of the optimizers, because its state could not be found and would
            stay behind; if experts of one tensor are trained with different settings.
    """
    for row_tensor in tensors:
        trained = [tensor for tensor in row_tensor.tensors if tensor.requires_grad or row_tensor.is_shard]
        if row_tensor.stepped and any(id(tensor) not in settings for tensor in trained):
            raise DistplbError(
                f"{row_tensor.name} requires a gradient but is in no param_group of the optimizer; pass the optimizer "
                "that steps on it (all of them, if there are several), or declare its FlatShard"
            )
        settings_of(row_tensor, settings)


def settings_of(row_tensor: RowTensor, settings: SettingsById) -> Settings:
    """Return the settings of a tensor on this rank, the same for all its experts; empty if the rank holds none of it.

    Raises:
        DistplbError: if its experts differ, because a move would leave each with another's settings.
    """
    each = [settings.get(id(tensor), {}) | {"requires_grad": tensor.requires_grad} for tensor in row_tensor.tensors]
    for other in each[1:]:
        for name in sorted(each[0].keys() | other.keys(), key=lambda name: (name != _KIND, name)):
            one, another = each[0].get(name, "not set"), other.get(name, "not set")
            if one != another:
                raise DistplbError(
                    f"{row_tensor.name}: {name} is {one} for one expert and {another} for another, and would stay "
                    "with the slots when experts change places; train all experts of a layer alike, for example in one "
                    "param group of one optimizer"
                )
    return each[0] if each else {}


def agree_on_settings(layers: Sequence[Sequence[RowTensor]], settings: SettingsById, comm: Comm) -> None:
    """Refuse, on all ranks, tensors that ranks train with different settings. One all-reduce if they agree.

    Raises:
        DistplbError: naming the first tensor on which ranks differ, and one rank's settings for it.
    """
    tensors = [row_tensor for layer in layers for row_tensor in layer]
    own = [settings_of(row_tensor, settings) for row_tensor in tensors]
    codes = [digest(sorted(each.items())) if each else ABSENT for each in own]
    minimum, maximum = min_and_max(comm, torch.tensor(codes, dtype=torch.int64, device="cpu"))
    for row_tensor, each, low, high in zip(tensors, own, minimum.tolist(), maximum.tolist(), strict=True):
        if low not in (ABSENT, high):
            here = ", ".join(f"{name} {value}" for name, value in sorted(each.items()))
            refused = DistplbError(
                f"ranks differ in how they train {row_tensor.name} ({here}, unlike other ranks), but settings stay "
                "with the slots when experts change places; give it the same settings on every rank"
            )
            agree(comm, {}, refused if digest(sorted(each.items())) == high and each else None)


def _comparable(value: Any) -> Any:
    """Convert one or several numbers to plain Python; None for a value that a step does not use, such as a name."""
    if isinstance(value, Tensor):
        return value.tolist() if value.numel() == 1 else None
    if isinstance(value, bool | int | float):
        return value
    if isinstance(value, tuple | list) and value and all(isinstance(each, bool | int | float) for each in value):
        return tuple(value)
    return None
