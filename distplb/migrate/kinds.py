"""Which kinds of state travel with each declared tensor, as all ranks agree on it before a move."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from distplb.comm.agreement import agree, digest
from distplb.comm.base import Comm
from distplb.errors import DisagreementError, in_stage
from distplb.migrate.rows import RowTensor
from distplb.migrate.state import MOST_KINDS, Holding, Holdings, Traveller

__all__ = ["NOTHING", "agreed_kinds", "kinds_of", "travellers"]

NOTHING = (1 << 63) - 1  # in place of a code, of a rank that holds nothing of a tensor
_MOST = 2 + MOST_KINDS  # codes of one tensor: its settings, its scalars, and its kinds
_MIXED = (1 << 62) + 1  # in place of codes, where the tensors that hold it differ; no digest is as large
_BY_SIZE = {1: torch.uint8, 2: torch.float16, 4: torch.float32, 8: torch.float64}


def kinds_of(holding: Holding) -> tuple[tuple[str, str], ...]:
    """Name and type of each kind that travels, in an order that depends on nothing else."""
    kinds = sorted(holding.local, key=lambda kind: (kind != "", kind != "grad", kind))
    return tuple((kind, str(holding.local[kind].dtype)) for kind in kinds)


def agreed_kinds(
    layers: Sequence[Sequence[RowTensor]],
    held: Sequence[Sequence[Holdings]],
    comm: Comm,
    error: Exception | None,
) -> list[list[tuple[int, ...] | None]]:
    """By layer and declared tensor, the codes of what travels with it, in order. One all-reduce.

    Args:
        layers: the declared tensors.
        held: what goes with each on this rank; anything where this rank has failed.
        comm: the ranks that hold the tensors.
        error: why this rank has failed, if it has.

    Raises:
        DistplbError: on all ranks, with the error of one.
        DisagreementError: on all ranks, if a tensor is trained by other settings on another rank.
    """
    count = sum(map(len, layers))
    codes = torch.full((2, count, _MOST), NOTHING, device="cpu")  # and their negatives
    if error is None:
        try:
            own = [_codes(one) for of_layer in held for one in of_layer]
            for number, row in enumerate(own):
                if row is not None:
                    codes[0, number] = torch.tensor(row, device="cpu")
                    codes[1, number] = -codes[0, number]
        except Exception as caught:
            error = in_stage("move", caught)
    reduced = agree(comm, {}, error, minimum=codes.flatten().tolist())
    least, negative = torch.tensor(reduced, device="cpu").view(2, count, _MOST)
    found = []
    numbers = iter(range(count))
    for tensors in layers:
        found.append([_agreed(next(numbers), row_tensor, least, -negative) for row_tensor in tensors])
    return found


def _agreed(number: int, row_tensor: RowTensor, least: torch.Tensor, largest: torch.Tensor) -> tuple[int, ...] | None:
    settings, *low = least[number].tolist()
    if settings != largest[number, 0]:
        raise DisagreementError(f"ranks differ in how they train {row_tensor.name}", "the settings (digest)")
    if low != largest[number, 1:].tolist() or low[0] == _MIXED:
        return None
    return tuple(code for code in low[1:] if code)


def travellers(index: int, row_tensor: RowTensor, held: Holdings, codes: Sequence[int]) -> list[Traveller]:
    """What travels with a tensor, the same on all ranks; with nothing in it where this rank holds nothing of it.

    Args:
        index: of the declared tensor in its layer.
        row_tensor: the tensor.
        held: what goes with it on this rank.
        codes: of that, agreed on by all ranks that hold it.
    """
    if not held.each:
        return [Traveller(row_tensor.name, code, (), index, _BY_SIZE[code & 15]) for code in codes]
    found = []
    for kind, _ in kinds_of(held.each[0]):
        flats = tuple(one.local[kind].detach().view(-1) for one in held.each)
        found.append(Traveller(row_tensor.name, kind, flats, index, flats[0].dtype))
    return found


def _codes(held: Holdings) -> list[int] | None:
    """`[_MOST]`: of settings, scalars and kinds; None where this rank holds nothing."""
    if not held.each:
        return None
    settings = digest(sorted(held.settings.items()))
    each = {(kinds_of(one), tuple(sorted(one.effect.items()))) for one in held.each}
    if len(each) > 1:
        return [settings, *[_MIXED] * (_MOST - 1)]
    kinds, effect = next(iter(each))
    codes = [_code(name, dtype, held.each[0].local[name].dtype.itemsize) for name, dtype in kinds]
    return [settings, digest(effect), *codes, *[0] * (_MOST - 2 - len(codes))]


def _code(name: str, dtype: str, itemsize: int) -> int:
    """A kind as one number, whose lowest bits are the bytes of an element."""
    return (digest((name, dtype)) >> 4 << 4) | itemsize
