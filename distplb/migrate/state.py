"""What travels with an expert: every tensor that has a row for each slot is found here, or refused by its name."""

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
from distplb.migrate.dtensors import is_dtensor, local_like
from distplb.migrate.rows import RowTensor, check_plain
from distplb.migrate.settings import Trainers, settings_of
from distplb.torchnames import leaves

__all__ = ["Traveller", "check_known", "travellers"]

Optimizers = Sequence[Optimizer]


@dataclass(frozen=True)
class Traveller:
    """One tensor that travels: a declared tensor, its gradient, or a part of its optimizer state.

    Args:
        name: of the declared tensor, fully qualified.
        kind: which state of it: empty for the tensor itself; a number where this rank holds nothing of it.
        flats: `[n]` each, views of this rank's elements, one for each tensor that holds the declared one.
        of: the index of the declared tensor whose layout it shares.
        dtype: of the elements.
        scalars: the state and settings that stay, by name; experts change places only where all have the same.
    """

    name: str
    kind: str | int
    flats: tuple[Tensor, ...]
    of: int
    dtype: torch.dtype
    scalars: tuple[tuple[str, Any], ...] = ()

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


def travellers(tensors: Sequence[RowTensor], optimizers: Optimizers, trained: Trainers) -> list[Traveller]:
    """Everything that travels with the declared tensors that this rank holds, in an order that ranks share.

    Args:
        tensors: declared by one layer.
        optimizers: that step on them.
        trained: by what settings they do, now.

    Raises:
        DistplbError: as `check_known`; if the optimizer holds a tensor for one of them that is neither a scalar nor of
            its shape; or if the experts of one tensor differ in what is held for them.
    """
    check_known(tensors, trained)
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
        settings = sorted(settings_of(row_tensor, trained).items())
        for kind in first.kinds:
            parts = [one.tensors[kind] for one in each]
            flats = tuple(part.detach().view(-1) for part in parts)
            stays = () if kind else (*first.scalars, *settings)
            found.append(Traveller(row_tensor.name, kind, flats, index, flats[0].dtype, stays))
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
        check_plain(f"{name}:grad", found["grad"])
    scalars: list[tuple[str, float]] = []
    for number, optimizer in enumerate(optimizers):
        state: Mapping[str, Any] = optimizer.state.get(tensor, {})
        for key, value in sorted(state.items()):
            full = f"{name}:{key}"
            if key in found or key in dict(scalars):  # two optimizers may hold state of the same name for it
                key = f"{key} of optimizer {number}"
            if not isinstance(value, Tensor):
                _refuse_hidden_tensors(full, value, optimizer)
                if isinstance(value, int | float):
                    scalars.append((key, float(value)))
            elif value.shape == tensor.shape and value.is_floating_point():
                found[key] = local_like(full, value, tensor)
                check_plain(full, found[key])
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
    if any(isinstance(leaf, Tensor) for leaf in leaves(value)):
        raise DistplbError(
            f"{name} of {type(optimizer).__name__} is a {type(value).__name__} with tensors in it, whose layout is not "
            "understood, so nothing is moved; use an optimizer whose state has the parameter's shape (AdamW, SGD, ...)"
        )
