"""What travels with an expert: every tensor that has a row for each slot is found here, or refused by its name."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from distplb.comm.dtensors import is_dtensor, local_like
from distplb.core.torchnames import leaves
from distplb.errors import DistplbError
from distplb.migrate.rows import RowTensor, check_plain
from distplb.migrate.settings import Settings, Steppers, Trainers, settings_of

__all__ = ["MOST_KINDS", "Holding", "Holdings", "Traveller", "check_known", "holdings"]

Optimizers = Sequence[Optimizer]

MOST_KINDS = 14  # that travel with one tensor: itself, its gradient, its optimizer's state
_ADAMS = (torch.optim.Adam, torch.optim.AdamW)


@dataclass(frozen=True)
class Traveller:
    """One tensor that travels: a declared tensor, its gradient, or a part of its optimizer state.

    Args:
        name: of the declared tensor, fully qualified.
        kind: which state of it: empty for the tensor itself; a number where this rank holds nothing of it.
        flats: `[n]` each, views of this rank's elements, one for each tensor that holds the declared one.
        of: the index of the declared tensor whose layout it shares.
        dtype: of the elements.
    """

    name: str
    kind: str | int
    flats: tuple[Tensor, ...]
    of: int
    dtype: torch.dtype

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


def check_known(tensors: Iterable[RowTensor], trained: Trainers) -> None:
    """Refuse what cannot change places whatever its state is.

    Raises:
        DistplbError: for a trained tensor that no optimizer knows, because its state could not be found and would stay
            behind; for experts that are trained by other settings than others of the same tensor.
    """
    for row_tensor in tensors:
        steps = [tensor for tensor in row_tensor.tensors if tensor.requires_grad or row_tensor.is_shard]
        if row_tensor.stepped and any(id(tensor) not in trained for tensor in steps):
            raise DistplbError(
                f"{row_tensor.name} requires a gradient but is in no param_group of the optimizer; pass the optimizer "
                "that steps on it (all of them, if there are several), or declare its FlatShard"
            )
        settings_of(row_tensor, trained)


@dataclass
class Holding:
    """What goes with one tensor of this rank.

    Args:
        tensor: as the optimizer knows it.
        whole: by kind, what travels: the tensor itself under "", its gradient, the parts of its optimizer state.
        local: by kind, this rank's elements of these.
        scalars: state that is one number for the whole tensor, such as its `step`; by name.
        effect: by name, a number that is equal where tensors with one and with the other are trained alike.
        raw: by name, the scalars as they are held.
    """

    tensor: Tensor
    whole: dict[str, Tensor] = field(default_factory=dict)
    local: dict[str, Tensor] = field(default_factory=dict)
    scalars: dict[str, float] = field(default_factory=dict)
    effect: dict[str, float] = field(default_factory=dict)
    raw: dict[str, Any] = field(default_factory=dict)

    def take(self, name: str, kind: str, value: Tensor) -> None:
        """Note a tensor that travels.

        Raises:
            DistplbError: if which of its elements belong to which expert is not known.
        """
        self.whole[kind], self.local[kind] = value, local_like(name, value, self.tensor)
        check_plain(name, self.local[kind])


@dataclass(frozen=True)
class Holdings:
    """What goes with one declared tensor on this rank.

    Args:
        each: for each tensor that holds it, what goes with that; none where this rank holds nothing of it.
        settings: by which its optimizers step on it.
    """

    each: tuple[Holding, ...]
    settings: Settings

    @property
    def nbytes(self) -> int:
        """Of all that travels."""
        return sum(part.nbytes for holding in self.each for part in holding.local.values())


def holdings(
    tensors: Sequence[RowTensor], optimizers: Optimizers, trained: Trainers, stepping: Steppers
) -> list[Holdings]:
    """Everything that goes with each of the declared tensors on this rank.

    Args:
        tensors: declared by one layer.
        optimizers: that step on them.
        trained: by what settings they do, now.
        stepping: which of them do.

    Raises:
        DistplbError: as `check_known`; or if the optimizer holds a tensor for one of them that is neither a scalar nor
            of its shape.
    """
    check_known(tensors, trained)
    return [
        Holdings(
            tuple(_holding(row_tensor.name, tensor, optimizers, stepping) for tensor in row_tensor.tensors),
            settings_of(row_tensor, trained),
        )
        for row_tensor in tensors
    ]


def _holding(name: str, tensor: Tensor, optimizers: Optimizers, stepping: Steppers) -> Holding:
    found = Holding(tensor)
    found.take(name, "", tensor)
    if tensor.grad is not None:
        found.take(f"{name}:grad", "grad", tensor.grad)
    for number, optimizer in enumerate(optimizers):
        state: Mapping[str, Any] = optimizer.state.get(tensor, {})
        for key, value in sorted(state.items()):
            full, kind = f"{name}:{key}", key
            if kind in found.whole or kind in found.scalars:  # two optimizers may hold state of the same name for it
                kind = f"{key} of optimizer {number}"
            if not isinstance(value, Tensor):
                _refuse_hidden_tensors(full, value, optimizer)
                if not isinstance(value, int | float):
                    continue
            elif value.shape == tensor.shape and value.is_floating_point():
                found.take(full, kind, value)
                continue
            elif value.numel() > 1:
                raise DistplbError(
                    f"{full} of {type(optimizer).__name__} is {value.dtype} of shape {tuple(value.shape)}, the "
                    f"parameter {tuple(tensor.shape)}: which elements belong to which expert is not known, "
                    "so nothing is moved; use an optimizer whose state has the parameter's shape (AdamW, SGD, ...)"
                )
            elif not value.numel() or is_dtensor(value):
                continue
            found.raw[kind] = value
            found.scalars[kind] = found.effect[kind] = float(value)
            if key == "step":
                found.effect[kind] = min(float(value), _last_step_that_matters(*_betas(stepping.get(id(tensor), []))))
    if len(found.local) > MOST_KINDS:
        raise DistplbError(
            f"{name} has {len(found.local) - 1} tensors of state and gradient; experts move with at most "
            f"{MOST_KINDS - 1}: use an optimizer with fewer"
        )
    return found


def _betas(stepping: Sequence[tuple[Optimizer, Mapping[str, Any]]]) -> tuple[float, ...]:
    """Of Adam or AdamW, where nobody else steps on a tensor; else none."""
    if len(stepping) != 1 or type(stepping[0][0]) not in _ADAMS:
        return ()
    return tuple(float(beta) for beta in stepping[0][1]["betas"])


@cache
def _last_step_that_matters(*betas: float) -> float:
    """From here on Adam's update is the same to the bit whatever the number of the step is.

    It enters by the bias corrections 1 − beta^step alone, which are 1 as soon as beta^step is at most 2^-54.
    """
    if not betas or not all(0 <= beta < 1 for beta in betas):
        return math.inf
    return max(1 if beta == 0 else math.ceil(54 * math.log(2) / -math.log(beta)) + 1 for beta in betas)


def _refuse_hidden_tensors(name: str, value: Any, optimizer: Optimizer) -> None:
    if any(isinstance(leaf, Tensor) for leaf in leaves(value)):
        raise DistplbError(
            f"{name} of {type(optimizer).__name__} is a {type(value).__name__} with tensors in it, whose layout is not "
            "understood, so nothing is moved; use an optimizer whose state has the parameter's shape (AdamW, SGD, ...)"
        )
