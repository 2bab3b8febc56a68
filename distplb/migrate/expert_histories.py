"""Experts in tensors of their own: each has its own history of training, which travels with it.

An expert without a token has no gradient in that iteration, and its tensor is stepped on once less than the others; one
that never had a token has no optimizer state at all. What is one number for a tensor, such as its `step`, and whether
there is a gradient or state at all, then belongs to the expert. Experts that share a tensor have it in common.
Shapes: P slots.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from distplb.comm.agreement import ABSENT, agree, digest, float_bits, float_of_bits, min_and_max
from distplb.comm.base import Comm
from distplb.comm.dtensors import local_like
from distplb.errors import in_stage
from distplb.migrate.optimizer_settings import OptimizersById
from distplb.migrate.optimizer_state import RowTensorState, TensorState, Traveller
from distplb.migrate.row_tensors import RowTensor

__all__ = ["ExpertHistories", "PerExpertTensor", "agreed_histories"]

_MAX_SCALARS = 6  # of one tensor; with more its layer stays


class StateNames(NamedTuple):
    """Which state goes with a tensor: name and dtype of each kind that travels, and the names of its scalars."""

    kinds: tuple[tuple[str, str], ...]
    scalars: tuple[str, ...]


class SlotHistory(NamedTuple):
    """The history of the expert in one slot."""

    names: StateNames
    scalars: tuple[float, ...]


class ExpertHistories:
    """The histories of the experts that one declared tensor holds, as they travel.

    Args:
        layer: index of the layer.
        histories: by slot, of the expert that is in it.
        states: by slot of this rank, what goes with its tensor.
        examples: of each scalar, as the optimizer keeps it.
        optimizers: by slot of this rank, the one that steps on its tensor; none where its shards are stepped on.

    Attributes:
        layer: index of the layer.
    """

    def __init__(
        self,
        layer: int,
        histories: Sequence[SlotHistory],
        states: Mapping[int, TensorState],
        examples: Mapping[str, Any],
        optimizers: Mapping[int, Optimizer],
    ) -> None:
        self.layer, self._histories, self._states = layer, list(histories), states
        self._examples, self._optimizers = examples, optimizers
        kinds = {kind for history in histories for kind in history.names.kinds}
        self._kinds = sorted(kinds, key=lambda kind: (kind[0] != "", kind[0] != "grad", kind))
        self._names = {name for history in histories for name in history.names.scalars}
        self._names |= {name for name, _ in kinds} - {"", "grad"}
        self._whole = {slot: dict(state.whole) for slot, state in states.items()}
        for slot, state in states.items():
            for kind, dtype in self._kinds:
                if kind not in self._whole[slot]:  # so that another expert's can arrive there
                    self._whole[slot][kind] = torch.zeros_like(state.tensor.detach(), dtype=_dtype(dtype))

    def travelling(self, index: int, name: str) -> list[Traveller]:
        """What travels, with zeros where an expert has nothing of a kind.

        Args:
            index: of the declared tensor in its layer.
            name: of the tensor.
        """
        travellers = []
        for kind, dtype in self._kinds:
            flats = tuple(
                local_like(f"{name}:{kind}", self._whole[slot][kind], state.tensor).detach().view(-1)
                for slot, state in self._states.items()
            )
            travellers.append(Traveller(flats, index, _dtype(dtype)))
        return travellers

    def follow(self, source: Sequence[int]) -> None:
        """Experts have changed slots: give each tensor of this rank the history of the expert that it now holds.

        Args:
            source: `[P]`, the slot in which the expert of each slot was before.
        """
        self._histories = [self._histories[slot] for slot in source]
        for slot in self._states:
            if source[slot] != slot:
                self._write(slot)

    def _write(self, slot: int) -> None:
        tensor, history, whole = self._states[slot].tensor, self._histories[slot], self._whole[slot]
        kinds = {kind for kind, _ in history.names.kinds}
        scalars = dict(zip(history.names.scalars, history.scalars, strict=True))
        tensor.grad = whole["grad"] if "grad" in kinds else None
        if slot not in self._optimizers:  # only its shards are stepped on
            return
        state = self._optimizers[slot].state
        if not kinds - {"", "grad"} and not scalars:
            state.pop(tensor, None)  # as of a tensor that was never stepped on
            return
        of_tensor = state[tensor]
        for name in self._names:
            if name in kinds:
                of_tensor[name] = whole[name]
            elif name in scalars:
                of_tensor[name] = _with_value(of_tensor.get(name), self._examples[name], scalars[name])
            else:
                of_tensor.pop(name, None)


@dataclass(frozen=True)
class PerExpertTensor:
    """A declared tensor that is a tensor of its own for each expert, and what goes with it on this rank."""

    layer: int
    index: int
    row_tensor: RowTensor
    state: RowTensorState

    @property
    def by_slot(self) -> dict[int, TensorState]:
        """What goes with the tensor of each slot of this rank."""
        return dict(zip(self.row_tensor.own_slots or (), self.state.of_tensors, strict=True))


def agreed_histories(
    tensors: Sequence[PerExpertTensor],
    every_state: Iterable[RowTensorState],
    num_slots: int,
    optimizers: OptimizersById,
    comm: Comm,
) -> list[ExpertHistories | int | None]:
    """The history of every expert, of any rank, for each of some declared tensors. Two all-reduces; none for none.

    Args:
        tensors: the same on all ranks; each rank holds something of them.
        every_state: what goes with any tensor of this rank: examples of what other ranks may have.
        num_slots: P.
        optimizers: of each parameter; they keep its state.
        comm: the ranks that hold the tensors.

    Returns:
        For each tensor its histories; the number of a slot where ranks that hold copies of its expert differ; None
        where a rank does not know the state that another has.

    Raises:
        DistplbError: on all ranks, if one of them has no memory for what may arrive.
    """
    if not tensors:
        return []
    codes = torch.full((len(tensors), num_slots, 1 + _MAX_SCALARS), ABSENT, device="cpu")
    for number, tensor in enumerate(tensors):
        for slot, state in tensor.by_slot.items():
            scalars = [float_bits(state.scalars[name]) for name in sorted(state.scalars)][:_MAX_SCALARS]
            row = [digest(_names_of(state)), *scalars, *[0] * (_MAX_SCALARS - len(scalars))]
            codes[number, slot] = torch.tensor(row, device="cpu")
    minimum, maximum = min_and_max(comm, codes)
    histories: list[ExpertHistories | int | None] = []
    error: Exception | None = None
    try:
        examples = _examples_by_settings(every_state)
        for tensor, low, high in zip(tensors, minimum, maximum, strict=True):
            differing = (low != high).any(1).nonzero()[:, 0].tolist()
            alike = examples[digest(sorted(tensor.state.settings.items()))]
            histories.append(differing[0] if differing else _histories(tensor, low.tolist(), alike, optimizers))
    except Exception as caught:  # no memory for zeros
        histories, error = [None] * len(tensors), in_stage("move", caught)
    known = agree(comm, {}, error, minimum=[int(each is not None) for each in histories])
    return [each if is_known else None for each, is_known in zip(histories, known, strict=True)]


@dataclass(frozen=True)
class _Examples:
    """Of tensors that are trained alike: which state they may have, by its digest, and each scalar as it is kept."""

    names: dict[int, StateNames] = field(default_factory=dict)
    scalars: dict[str, Any] = field(default_factory=dict)

    def add(self, state: TensorState) -> None:
        names = _names_of(state)
        if digest(names) in self.names:
            return
        self.scalars.update(state.raw)
        itself = names.kinds[:1]
        gradient = ("grad", itself[0][1])
        of_optimizer = tuple(kind for kind in names.kinds if kind[0] not in ("", "grad"))
        # One that has no gradient now, or was never stepped on, has less than this one.
        for each in (
            names,
            StateNames((*itself, *of_optimizer), names.scalars),
            StateNames((*itself, gradient, *of_optimizer), names.scalars),
            StateNames(itself, ()),
            StateNames((*itself, gradient), ()),
        ):
            self.names[digest(each)] = each


def _examples_by_settings(every_state: Iterable[RowTensorState]) -> dict[int, _Examples]:
    """By digest of the settings. Made once for all tensors: a rank has many, and few that differ."""
    by_settings: dict[int, _Examples] = {}
    known = set[tuple[int, StateNames]]()
    for row_tensor_state in every_state:
        settings = digest(sorted(row_tensor_state.settings.items()))
        examples = by_settings.setdefault(settings, _Examples())
        for state in row_tensor_state.of_tensors:
            if (settings, _names_of(state)) not in known:
                known.add((settings, _names_of(state)))
                examples.add(state)
    return by_settings


def _histories(
    tensor: PerExpertTensor, codes: Sequence[Sequence[int]], examples: _Examples, optimizers: OptimizersById
) -> ExpertHistories | None:
    """From the codes of every slot; None where this rank does not know what they stand for."""
    histories = []
    for code, *scalars in codes:
        if code not in examples.names or len(examples.names[code].scalars) > _MAX_SCALARS:
            return None
        names = examples.names[code]
        histories.append(SlotHistory(names, tuple(map(float_of_bits, scalars[: len(names.scalars)]))))
    states = tensor.by_slot
    optimizer_of: dict[int, Optimizer] = {}
    for slot, state in states.items() if tensor.row_tensor.stepped else ():
        of_tensor = optimizers.get(id(state.tensor), [])
        if len(of_tensor) != 1:  # what two of them keep under one key would be taken for the other's
            return None
        optimizer_of[slot] = of_tensor[0][0]
    return ExpertHistories(tensor.layer, histories, states, examples.scalars, optimizer_of)


def _names_of(state: TensorState) -> StateNames:
    return StateNames(state.kinds, tuple(sorted(state.scalars)))


def _with_value(held: Any, example: Any, value: float) -> Any:
    """A scalar of the state, in place where it is a tensor that is there."""
    if isinstance(example, Tensor):
        return (torch.empty_like(example) if held is None else held).fill_(value)
    return type(example)(value)


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name.removeprefix("torch."))
    assert isinstance(dtype, torch.dtype)
    return dtype
