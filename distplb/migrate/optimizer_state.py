"""What travels with an expert: its weights, gradients and optimizer state; anything not understood is refused by name.

State with the parameter's shape travels, whatever the optimizer. Scalars such as `step` are compared
(`state_agreement`), or travel if each expert has a tensor of its own (`expert_histories`).
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from distplb.comm.dtensors import is_dtensor, local_like
from distplb.core.private_names import leaves
from distplb.errors import DistplbError
from distplb.migrate.optimizer_settings import OptimizersById, Settings, SettingsById, check_settings, settings_of
from distplb.migrate.row_tensors import RowTensor, check_plain

__all__ = ["MAX_KINDS", "LayerStates", "RowTensorState", "TensorState", "Traveller", "layer_state"]

MAX_KINDS = 14  # per tensor: the tensor itself, its gradient, its optimizer state
_ADAMS = (torch.optim.Adam, torch.optim.AdamW)


@dataclass(frozen=True)
class Traveller:
    """One tensor that travels: a declared tensor, its gradient, or a part of its optimizer state.

    Args:
        flats: `[n]` each: views of this rank's elements, one for each tensor that holds the declared one.
        index: index in its layer of the declared tensor whose layout it shares.
        dtype: dtype of the elements.
    """

    flats: tuple[Tensor, ...]
    index: int
    dtype: torch.dtype

    @cached_property
    def _starts(self) -> list[int]:
        return [0, *accumulate(flat.numel() for flat in self.flats)]

    def at(self, offset: int, count: int) -> Tensor:
        """A view `[count]` of the elements from local element `offset` on, all in one tensor."""
        if len(self.flats) == 1:
            return self.flats[0][offset : offset + count]
        number = bisect_right(self._starts, offset) - 1
        offset -= self._starts[number]
        return self.flats[number][offset : offset + count]


@dataclass
class TensorState:
    """The state that goes with one tensor of this rank.

    Args:
        tensor: the tensor as the optimizer knows it.
        whole: by kind, what travels: the tensor itself under "", its gradient, the parts of its optimizer state.
        local: by kind, this rank's elements of `whole`.
        scalars: by name, state that is one number for the whole tensor, such as `step`.
        effect: by name, a number that is equal for two tensors if the scalar makes no difference to their training.
        raw: by name, the scalars as the optimizer keeps them.
    """

    tensor: Tensor
    whole: dict[str, Tensor] = field(default_factory=dict)
    local: dict[str, Tensor] = field(default_factory=dict)
    scalars: dict[str, float] = field(default_factory=dict)
    effect: dict[str, float] = field(default_factory=dict)
    raw: dict[str, Any] = field(default_factory=dict)

    @property
    def kinds(self) -> tuple[tuple[str, str], ...]:
        """Name and dtype of each kind that travels, in an order that depends on the names only."""
        names = sorted(self.local, key=lambda name: (name != "", name != "grad", name))
        return tuple((name, str(self.local[name].dtype)) for name in names)

    def add(self, name: str, kind: str, value: Tensor) -> None:
        """Add a tensor that travels.

        Raises:
            DistplbError: if it is not known which of its elements belong to which expert.
        """
        self.whole[kind], self.local[kind] = value, local_like(name, value, self.tensor)
        check_plain(name, self.local[kind])


@dataclass(frozen=True)
class RowTensorState:
    """The state that goes with one declared tensor on this rank.

    Args:
        of_tensors: the state of each tensor that holds it; empty if this rank holds nothing of it.
        settings: the settings with which its optimizers step on it.
    """

    of_tensors: tuple[TensorState, ...]
    settings: Settings

    @property
    def nbytes(self) -> int:
        """Bytes of everything that travels."""
        return sum(part.nbytes for state in self.of_tensors for part in state.local.values())


LayerStates = Sequence[Sequence[RowTensorState]]  # by layer and declared tensor


def layer_state(
    tensors: Sequence[RowTensor], optimizers: Sequence[Optimizer], settings: SettingsById, by_id: OptimizersById
) -> list[RowTensorState]:
    """Collect the state that goes with each of a layer's declared tensors on this rank.

    Args:
        tensors: the tensors that one layer declares.
        optimizers: the optimizers that step on them.
        settings: the current settings of the optimizers' parameters.
        by_id: the optimizers of each parameter.

    Raises:
        DistplbError: as `check_settings`; or if an optimizer's state for one of them has a tensor that is neither a
            scalar nor of its shape, or more kinds than can travel.
    """
    check_settings(tensors, settings)
    return [
        RowTensorState(
            tuple(_tensor_state(row_tensor.name, tensor, optimizers, by_id) for tensor in row_tensor.tensors),
            settings_of(row_tensor, settings),
        )
        for row_tensor in tensors
    ]


def _tensor_state(name: str, tensor: Tensor, optimizers: Sequence[Optimizer], by_id: OptimizersById) -> TensorState:
    state = TensorState(tensor)
    state.add(name, "", tensor)
    if tensor.grad is not None:
        state.add(f"{name}:grad", "grad", tensor.grad)
    for number, optimizer in enumerate(optimizers):
        values: Mapping[str, Any] = optimizer.state.get(tensor, {})
        for key, value in sorted(values.items()):
            kind = key
            if kind in state.whole or kind in state.scalars:  # two optimizers may hold state of the same name for it
                kind = f"{key} of optimizer {number}"
            if _travels(f"{name}:{key}", value, tensor, optimizer):
                state.add(f"{name}:{key}", kind, value)
            elif _is_scalar(value):
                state.raw[kind] = value
                state.scalars[kind] = state.effect[kind] = float(value)
                if key == "step":
                    last_step = _last_step_that_matters(*_betas(by_id.get(id(tensor), [])))
                    state.effect[kind] = min(float(value), last_step)
    if len(state.local) > MAX_KINDS:
        raise DistplbError(
            f"{name} has {len(state.local) - 1} tensors of state and gradient, but experts move with at most "
            f"{MAX_KINDS - 1}; use an optimizer with fewer"
        )
    return state


def _travels(name: str, value: Any, tensor: Tensor, optimizer: Optimizer) -> bool:
    """Whether a value of the optimizer's state has one element for each element of the tensor.

    Raises:
        DistplbError: if it is any other tensor with more than one element, or a container with tensors in it.
    """
    if not isinstance(value, Tensor):
        _refuse_hidden_tensors(name, value, optimizer)
        return False
    if value.shape == tensor.shape and value.is_floating_point():
        return True
    if value.numel() > 1:
        raise DistplbError(
            f"{name} of {type(optimizer).__name__} is {value.dtype} of shape {tuple(value.shape)} for a parameter of "
            f"shape {tuple(tensor.shape)}, so it is not known which elements belong to which expert and nothing is "
            "moved; use an optimizer with floating-point state of the parameter's shape (AdamW, SGD, ...)"
        )
    return False


def _is_scalar(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1 and not is_dtensor(value)
    return isinstance(value, int | float)


def _betas(steppers: Sequence[tuple[Optimizer, Mapping[str, Any]]]) -> tuple[float, ...]:
    """The betas of Adam or AdamW if it alone steps on a tensor; else empty."""
    if len(steppers) != 1 or type(steppers[0][0]) not in _ADAMS:
        return ()
    return tuple(float(beta) for beta in steppers[0][1]["betas"])


@cache
def _last_step_that_matters(*betas: float) -> float:
    """The step from which Adam's update no longer depends on the step count, to the bit.

    The step enters only through the bias corrections 1 − beta^step, which are 1 as soon as beta^step is at most 2^-54.
    """
    if not betas or not all(0 <= beta < 1 for beta in betas):
        return math.inf
    return max(1 if beta == 0 else math.ceil(54 * math.log(2) / -math.log(beta)) + 1 for beta in betas)


def _refuse_hidden_tensors(name: str, value: Any, optimizer: Optimizer) -> None:
    if any(isinstance(leaf, Tensor) for leaf in leaves(value)):
        raise DistplbError(
            f"{name} of {type(optimizer).__name__} is a {type(value).__name__} with tensors whose layout is not "
            "understood, so nothing is moved; use an optimizer whose state has the parameter's shape (AdamW, SGD, ...)"
        )
