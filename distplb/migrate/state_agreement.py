"""The ranks agree on what travels in the next move and which layers have to stay.

State that differs between experts of one tensor, or between ranks, cannot travel with a tensor as a whole. It travels
expert by expert if each has a tensor of its own (`expert_histories`); otherwise the layer stays (`left_out`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from distplb.comm.agreement import ABSENT, agree, digest, with_negatives
from distplb.comm.base import Comm
from distplb.errors import DisagreementError, in_stage
from distplb.migrate.expert_histories import ExpertHistories, PerExpertTensor, agreed_histories
from distplb.migrate.layout_agreement import AgreedTensor
from distplb.migrate.left_out import LeftOut, reasons_left_out
from distplb.migrate.optimizer_settings import OptimizersById
from distplb.migrate.optimizer_state import MAX_KINDS, LayerStates, RowTensorState, Traveller

__all__ = ["AgreedState", "agreed_state"]

_CODES = 2 + MAX_KINDS  # per tensor: its settings, its scalars, and its kinds
_MIXED = (1 << 62) + 1  # replaces the codes if the tensors that hold it differ; larger than any digest
_DTYPE_OF_SIZE = {1: torch.uint8, 2: torch.float16, 4: torch.float32, 8: torch.float64}


class AgreedState(NamedTuple):
    """What the ranks have agreed on before a move.

    Args:
        travellers: by layer, everything that travels; empty for a layer that stays.
        left_out: by index of a layer that stays, the reason.
        histories: histories of experts that differ in them.
    """

    travellers: list[list[Traveller]]
    left_out: dict[int, str]
    histories: list[ExpertHistories]


def agreed_state(
    layers: Sequence[Sequence[AgreedTensor]],
    states: LayerStates,
    num_slots: int,
    optimizers: OptimizersById,
    comm: Comm,
    error: Exception | None,
) -> AgreedState:
    """Agree on what travels with the experts of each layer. Collective, even if this rank cannot move.

    A layer stays if experts that may change places have different histories that cannot travel.

    Args:
        layers: by layer, the declared tensors.
        states: the state that goes with each on this rank; anything if this rank has failed.
        num_slots: P.
        optimizers: the optimizers of each parameter.
        comm: the ranks that hold the tensors.
        error: why this rank has failed, if it has.

    Raises:
        DistplbError: on all ranks, if one has failed, with its error.
        DisagreementError: on all ranks, if ranks train a tensor with different settings.
    """
    kinds = _agreed_kinds(layers, states, comm, error)
    stays: dict[int, LeftOut] = {}
    own: list[PerExpertTensor] = []
    for layer, tensors in enumerate(layers):
        for index, (row_tensor, layout, is_own) in enumerate(tensors):
            if kinds[layer][index] is not None:
                continue
            if is_own and not layout.has_empty_rank:
                own.append(PerExpertTensor(layer, index, row_tensor, states[layer][index]))
            else:
                stays.setdefault(layer, LeftOut(row_tensor, states[layer][index], is_own, None))
    own = [one for one in own if one.layer not in stays]
    every_state = (state for of_layer in states for state in of_layer)
    histories = agreed_histories(own, every_state, num_slots, optimizers, comm)
    for one, history in zip(own, histories, strict=True):
        if not isinstance(history, ExpertHistories):
            stays.setdefault(one.layer, LeftOut(one.row_tensor, one.state, True, history))
    left_out = dict(zip(stays, reasons_left_out(list(stays.values()), comm), strict=True))
    history_of = {
        (one.layer, one.index): history
        for one, history in zip(own, histories, strict=True)
        if isinstance(history, ExpertHistories) and one.layer not in left_out
    }
    travellers: list[list[Traveller]] = [[] for _ in layers]
    for layer, tensors in enumerate(layers):
        for index, (row_tensor, _, _) in enumerate(tensors if layer not in left_out else ()):
            codes = kinds[layer][index]
            if codes is None:
                travellers[layer] += history_of[layer, index].travelling(index, row_tensor.name)
            else:
                travellers[layer] += _travelling(index, states[layer][index], codes)
    return AgreedState(travellers, left_out, list(history_of.values()))


def _agreed_kinds(
    layers: Sequence[Sequence[AgreedTensor]], states: LayerStates, comm: Comm, error: Exception | None
) -> list[list[tuple[int, ...] | None]]:
    """Agree on the codes of what travels, by layer and declared tensor, in order; None if they differ.

    One all-reduce.
    """
    count = sum(map(len, layers))
    codes = torch.full((count, _CODES), ABSENT, device="cpu")
    if error is None:
        try:
            for number, state in enumerate(state for of_layer in states for state in of_layer):
                if state.of_tensors:
                    codes[number] = torch.tensor(_codes(state), device="cpu")
        except Exception as caught:
            error = in_stage("move", caught)
    reduced = agree(comm, {}, error, minimum=with_negatives(codes).flatten().tolist())
    minimum, negative_maximum = torch.tensor(reduced, device="cpu").view(2, count, _CODES)
    rows = zip([tensor for of_layer in layers for tensor in of_layer], minimum, -negative_maximum, strict=True)
    agreed = iter([_agreed(tensor.row_tensor.name, low, high) for tensor, low, high in rows])
    return [[next(agreed) for _ in of_layer] for of_layer in layers]


def _agreed(name: str, minimum: Tensor, maximum: Tensor) -> tuple[int, ...] | None:
    """The codes of one tensor's kinds, from its reduced codes `[_CODES]`; None if these differ."""
    settings, *codes = minimum.tolist()
    if settings != maximum[0]:
        raise DisagreementError(f"ranks differ in how they train {name}", "the settings (digest)")
    if codes != maximum[1:].tolist() or codes[0] == _MIXED:
        return None
    return tuple(code for code in codes[1:] if code)


def _travelling(index: int, state: RowTensorState, codes: Sequence[int]) -> list[Traveller]:
    """List what travels with a tensor, in the same order on all ranks; without elements if this rank holds none of it.

    Args:
        index: index of the declared tensor in its layer.
        state: the state that goes with it on this rank.
        codes: codes of its kinds, agreed on by all ranks that hold the tensor.
    """
    if not state.of_tensors:
        return [Traveller((), index, _DTYPE_OF_SIZE[code & 15]) for code in codes]
    travellers = []
    for kind, _ in state.of_tensors[0].kinds:
        flats = tuple(one.local[kind].detach().view(-1) for one in state.of_tensors)
        travellers.append(Traveller(flats, index, flats[0].dtype))
    return travellers


def _codes(state: RowTensorState) -> list[int]:
    """Codes `[_CODES]` of settings, scalars and kinds."""
    settings = digest(sorted(state.settings.items()))
    distinct = {(one.kinds, tuple(sorted(one.effect.items()))) for one in state.of_tensors}
    if len(distinct) > 1:
        return [settings, *[_MIXED] * (_CODES - 1)]
    kinds, effect = next(iter(distinct))
    codes = [_code(name, dtype, state.of_tensors[0].local[name].dtype.itemsize) for name, dtype in kinds]
    return [settings, digest(effect), *codes, *[0] * (_CODES - 2 - len(codes))]


def _code(name: str, dtype: str, itemsize: int) -> int:
    """Encode a kind as one number whose lowest bits are the bytes of an element."""
    return (digest((name, dtype)) >> 4 << 4) | itemsize
