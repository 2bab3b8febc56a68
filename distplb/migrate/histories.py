"""Experts in tensors of their own, each with a history of its own: it travels with them, also where histories differ.

An expert without a token has no gradient in that iteration, and is stepped on once less than the others; one that never
had a token has no optimizer state at all. What is one number for a tensor, such as its `step`, and whether there is a
gradient or state at all, then belongs to the expert. Where one tensor holds several experts, they have it in common.
Shapes: P slots.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from distplb.comm.agreement import agree, digest
from distplb.comm.base import Comm
from distplb.comm.dtensors import local_like
from distplb.errors import in_stage
from distplb.migrate.kinds import NOTHING, kinds_of
from distplb.migrate.rows import RowTensor
from distplb.migrate.settings import Steppers
from distplb.migrate.state import Holding, Holdings, Traveller

__all__ = ["History", "Own", "agreed_histories", "own_slots"]

_SCALARS = 6  # of one tensor, at most; more are not understood


class What(NamedTuple):
    """What goes with a tensor: the names and types of what travels, and the names of its scalars."""

    kinds: tuple[tuple[str, str], ...]
    scalars: tuple[str, ...]


class Row(NamedTuple):
    """The history of the expert in one slot."""

    what: What
    values: tuple[float, ...]  # of the scalars


def own_slots(row_tensor: RowTensor) -> list[int] | None:
    """The slot of each tensor that holds a declared one; None where a tensor has parts of several slots."""
    found: list[int] = []
    for part in row_tensor.held:
        slots = {span.slot for span in part.spans}
        if len(slots) != 1:
            return None
        found += slots
    return found


class History:
    """The histories of the experts that one declared tensor holds, as they travel.

    Args:
        layer: index of the layer.
        rows: by slot, of the expert that is in it.
        of_slot: the slots of this rank, with what goes with their tensors.
        examples: of each scalar, as the optimizer keeps it.
        optimizer: by slot of this rank, the one that steps on its tensor; none for those whose shards are stepped on.

    Attributes:
        layer: index of the layer.
    """

    def __init__(
        self,
        layer: int,
        rows: Sequence[Row],
        of_slot: Mapping[int, Holding],
        examples: Mapping[str, Any],
        optimizer: Mapping[int, Optimizer],
    ) -> None:
        self.layer, self._rows, self._of_slot = layer, list(rows), of_slot
        self._examples, self._optimizer = examples, optimizer
        kinds = {kind for row in rows for kind in row.what.kinds}
        self._kinds = sorted(kinds, key=lambda kind: (kind[0] != "", kind[0] != "grad", kind))
        self._names = {name for row in rows for name in row.what.scalars} | {name for name, _ in kinds} - {"", "grad"}
        self._whole = {slot: dict(holding.whole) for slot, holding in of_slot.items()}
        for slot, holding in of_slot.items():
            for kind, dtype in self._kinds:
                if kind not in self._whole[slot]:  # so that something can arrive there
                    self._whole[slot][kind] = torch.zeros_like(holding.tensor.detach(), dtype=_dtype(dtype))

    def travellers(self, index: int, name: str) -> list[Traveller]:
        """What travels, with zeros where an expert has nothing of a kind.

        Args:
            index: of the declared tensor in its layer.
            name: of the tensor.
        """
        found = []
        for kind, dtype in self._kinds:
            flats = tuple(
                local_like(f"{name}:{kind}", self._whole[slot][kind], holding.tensor).detach().view(-1)
                for slot, holding in self._of_slot.items()
            )
            found.append(Traveller(name, kind, flats, index, _dtype(dtype)))
        return found

    def follow(self, source: Sequence[int]) -> None:
        """Experts have changed slots: give each tensor of this rank the history of the expert that it now holds.

        Args:
            source: `[P]`, the slot in which the expert of each slot was before.
        """
        self._rows = [self._rows[slot] for slot in source]
        for slot in self._of_slot:
            if source[slot] != slot:
                self._put(slot)

    def _put(self, slot: int) -> None:
        tensor, row, whole = self._of_slot[slot].tensor, self._rows[slot], self._whole[slot]
        there = {kind for kind, _ in row.what.kinds}
        values = dict(zip(row.what.scalars, row.values, strict=True))
        tensor.grad = whole["grad"] if "grad" in there else None
        if slot not in self._optimizer:  # only its shards are stepped on
            return
        state = self._optimizer[slot].state
        if not there - {"", "grad"} and not values:
            state.pop(tensor, None)  # as of a tensor that was never stepped on
            return
        of_tensor = state[tensor]
        for name in self._names:
            if name in there:
                of_tensor[name] = whole[name]
            elif name in values:
                of_tensor[name] = _with_value(of_tensor.get(name), self._examples[name], values[name])
            else:
                of_tensor.pop(name, None)


@dataclass(frozen=True)
class Own:
    """A declared tensor whose experts have histories of their own, and what goes with them on this rank."""

    layer: int
    index: int
    row_tensor: RowTensor
    held: Holdings


def agreed_histories(
    own: Sequence[Own], all_held: Iterable[Holdings], num_slots: int, stepping: Steppers, comm: Comm
) -> list[History | int | None]:
    """The history of every expert, of any rank, for each of some declared tensors. Two all-reduces; none for none.

    Args:
        own: the tensors, the same on all ranks; each rank holds something of them.
        all_held: what goes with any tensor of this rank: examples of what others may have.
        num_slots: P.
        stepping: which optimizers step on what, and keep its state.
        comm: the ranks that hold the tensors.

    Returns:
        For each tensor its history; the number of a slot where ranks that hold copies of its expert differ; None where
        a rank does not know what another has.

    Raises:
        DistplbError: on all ranks, if one of them has no memory for what may arrive.
    """
    if not own:
        return []
    table = torch.full((2, len(own), num_slots, 1 + _SCALARS), NOTHING, device="cpu")
    for number, one in enumerate(own):
        for slot, holding in zip(own_slots(one.row_tensor) or (), one.held.each, strict=True):
            values = [_bits(holding.scalars[name]) for name in sorted(holding.scalars)][:_SCALARS]
            row = [digest(_what(holding)), *values, *[0] * (_SCALARS - len(values))]
            table[0, number, slot] = torch.tensor(row, device="cpu")
            table[1, number, slot] = -table[0, number, slot]
    table = table.to(comm.device)
    comm.all_reduce_min(table)
    least, largest = table[0].cpu(), -table[1].cpu()
    found: list[History | int | None] = []
    error: Exception | None = None
    try:
        examples = _examples(all_held)
        for one, low, high in zip(own, least, largest, strict=True):
            differing = (low != high).any(1).nonzero()[:, 0].tolist()
            alike = examples[digest(sorted(one.held.settings.items()))]
            found.append(differing[0] if differing else _history(one, low.tolist(), alike, stepping))
    except Exception as caught:  # no memory for zeros
        found, error = [None] * len(own), in_stage("move", caught)
    all_know = agree(comm, {}, error, minimum=[int(each is not None) for each in found])
    return [each if is_known else None for each, is_known in zip(found, all_know, strict=True)]


@dataclass(frozen=True)
class _Known:
    """What goes with tensors that are trained alike: all that may, by its digest, and an example of each scalar."""

    what: dict[int, What] = field(default_factory=dict)
    scalars: dict[str, Any] = field(default_factory=dict)

    def add(self, holding: Holding) -> None:
        what = _what(holding)
        if digest(what) in self.what:
            return
        self.scalars.update(holding.raw)
        itself = what.kinds[:1]
        gradient = ("grad", itself[0][1])
        state = tuple(kind for kind in what.kinds if kind[0] not in ("", "grad"))
        # One that has no gradient now, or was never stepped on, has less than this one.
        for each in (
            what,
            What((*itself, *state), what.scalars),
            What((*itself, gradient, *state), what.scalars),
            What(itself, ()),
            What((*itself, gradient), ()),
        ):
            self.what[digest(each)] = each


def _examples(all_held: Iterable[Holdings]) -> dict[int, _Known]:
    """By digest of the settings. Looked at once for all tensors: a rank has many, and few that are not alike."""
    found: dict[int, _Known] = {}
    seen = set[tuple[int, What]]()
    for held in all_held:
        settings = digest(sorted(held.settings.items()))
        known = found.setdefault(settings, _Known())
        for holding in held.each:
            if (settings, _what(holding)) not in seen:
                seen.add((settings, _what(holding)))
                known.add(holding)
    return found


def _history(one: Own, rows: Sequence[Sequence[int]], known: _Known, stepping: Steppers) -> History | None:
    histories = []
    for code, *values in rows:
        if code not in known.what or len(known.what[code].scalars) > _SCALARS:
            return None
        what = known.what[code]
        histories.append(Row(what, tuple(map(_number, values[: len(what.scalars)]))))
    slots = dict(zip(own_slots(one.row_tensor) or (), one.held.each, strict=True))
    steps_on: dict[int, Optimizer] = {}
    for slot, holding in slots.items() if one.row_tensor.stepped else ():
        those = stepping.get(id(holding.tensor), [])
        if len(those) != 1:  # what two of them keep under one key would be taken for the other's
            return None
        steps_on[slot] = those[0][0]
    return History(one.layer, histories, slots, known.scalars, steps_on)


def _what(holding: Holding) -> What:
    return What(kinds_of(holding), tuple(sorted(holding.scalars)))


def _with_value(held: Any, example: Any, value: float) -> Any:
    """A scalar of the state, in place where it is a tensor that is there."""
    if isinstance(example, Tensor):
        return (torch.empty_like(example) if held is None else held).fill_(value)
    return type(example)(value)


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name.removeprefix("torch."))
    assert isinstance(found, torch.dtype)
    return found


def _bits(value: float) -> int:
    """As a whole number, whose negative is one too."""
    found: int = struct.unpack("<q", struct.pack("<d", value or 0.0))[0]
    return found


def _number(bits: int) -> float:
    found: float = struct.unpack("<d", struct.pack("<q", bits))[0]
    return found
