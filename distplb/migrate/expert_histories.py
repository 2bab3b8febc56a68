"""Training histories of experts in tensors of their own; each history travels with its expert.

An expert without tokens gets no gradient in that iteration, so its tensor gets one step fewer than the others;
an expert that never had a token has no optimizer state at all. So state that is one number per tensor, such as `step`,
belongs to the expert, and so does the presence of a gradient and of state. Experts that share a tensor share this
history.
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

_MAX_SCALARS = 6  # per tensor; with more, its layer stays


class StateNames(NamedTuple):
    """The state of a tensor, by name: name and dtype of each kind that travels, and the names of its scalars."""

    kinds: tuple[tuple[str, str], ...]
    scalars: tuple[str, ...]


class SlotHistory(NamedTuple):
    """The history of the expert in one slot."""

    names: StateNames
    scalars: tuple[float, ...]


class ExpertHistories:
    """The histories of the experts in one declared tensor, which travel with the experts.

    Args:
        layer: index of the layer.
        histories: by slot, the history of the expert in it.
        states: by slot of this rank, the state of its tensor.
        examples: by name, an example of each scalar as the optimizer keeps it.
        optimizers: by slot of this rank, the optimizer that steps on its tensor; empty if it steps on shards.

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
                if kind not in self._whole[slot]:  # room for another expert's
                    self._whole[slot][kind] = torch.zeros_like(state.tensor.detach(), dtype=_dtype(dtype))

    def travelling(self, index: int, name: str) -> list[Traveller]:
        """List what travels, with zeros where an expert has nothing of a kind.

        Args:
            index: index of the declared tensor in its layer.
            name: name of the tensor.
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
        """Give each tensor of this rank the history of the expert that it holds after a move.

        Args:
            source: `[P]`, the previous slot of the expert in each slot.
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
        if slot not in self._optimizers:  # the optimizer steps on shards only
            return
        state = self._optimizers[slot].state
        if not kinds - {"", "grad"} and not scalars:
            state.pop(tensor, None)  # as for a tensor that was never stepped on
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
    """A declared tensor that is a tensor of its own for each expert, and its state on this rank."""

    layer: int
    index: int
    row_tensor: RowTensor
    state: RowTensorState

    @property
    def by_slot(self) -> dict[int, TensorState]:
        """The state of the tensor in each slot of this rank."""
        return dict(zip(self.row_tensor.own_slots or (), self.state.of_tensors, strict=True))


def agreed_histories(
    tensors: Sequence[PerExpertTensor],
    every_state: Iterable[RowTensorState],
    num_slots: int,
    optimizers: OptimizersById,
    comm: Comm,
) -> list[ExpertHistories | int | None]:
    """Agree on the histories of all experts of all ranks, for each given tensor. Two all-reduces; none without tensors.

    Args:
        tensors: the same on all ranks; each rank holds a part of each.
        every_state: the state of all tensors of this rank, as examples of what other ranks may have.
        num_slots: P.
        optimizers: the optimizers of each parameter, which keep its state.
        comm: the ranks that hold the tensors.

    Returns:
        For each tensor, its histories; or the index of a slot if ranks differ in their copies of its expert; or None if
        some rank does not know the state that another has.

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
    """What tensors that are trained alike may have: states by digest, and an example of each scalar as it is kept."""

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
        # A tensor that has no gradient now, or was never stepped on, has less state than this one.
        for each in (
            names,
            StateNames((*itself, *of_optimizer), names.scalars),
            StateNames((*itself, gradient, *of_optimizer), names.scalars),
            StateNames(itself, ()),
            StateNames((*itself, gradient), ()),
        ):
            self.names[digest(each)] = each


def _examples_by_settings(every_state: Iterable[RowTensorState]) -> dict[int, _Examples]:
    """Collect examples by digest of the settings, once for all tensors: a rank has many, but few of them differ."""
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
    """Decode the codes of every slot; None if this rank does not know one of them."""
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
        if len(of_tensor) != 1:  # two optimizers may keep different state under the same key
            return None
        optimizer_of[slot] = of_tensor[0][0]
    return ExpertHistories(tensor.layer, histories, states, examples.scalars, optimizer_of)


def _names_of(state: TensorState) -> StateNames:
    return StateNames(state.kinds, tuple(sorted(state.scalars)))


def _with_value(held: Any, example: Any, value: float) -> Any:
    """Return a scalar of the state with a new value, set in place if it is an existing tensor."""
    if isinstance(example, Tensor):
        return (torch.empty_like(example) if held is None else held).fill_(value)
    return type(example)(value)


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name.removeprefix("torch."))
    assert isinstance(dtype, torch.dtype)
    return dtype
