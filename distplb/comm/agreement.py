"""Ranks agree that all is well, and with each other, before any of them goes on.

An error on one rank becomes the same error on all, with nobody left waiting in a larger call.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import NoReturn

import torch

from distplb.comm.base import Comm
from distplb.errors import DisagreementError, DistplbError, HalfMovedError

__all__ = ["agree", "digest", "raise_everywhere", "told_by_root"]

_TEXT_BYTES = 2048


def agree(
    comm: Comm, fields: Mapping[str, int], error: Exception | None = None, *, least: Sequence[int] = ()
) -> list[int]:
    """One all-reduce (MIN) of each field, of its negative, of "I am well" and of "my experts are whole".

    Args:
        comm: all its ranks call this together, with the same names of fields.
        fields: integers (below 2^63 in magnitude) that must be equal on all ranks.
        error: what went wrong on this rank, if anything did; the fields are then not looked at.
        least: integers that may differ, as many on all ranks.

    Returns:
        The least over ranks of each of `least`.

    Raises:
        DistplbError: on every rank, with the text of the lowest failed rank. A HalfMovedError of one rank is one on
            all.
        DisagreementError: on every rank, where a field differs, with its name, the least and the largest value.
    """
    values = [0] * len(fields) if error else list(fields.values())
    ill = comm.rank if error else comm.size  # the least ill rank speaks
    whole = 0 if isinstance(error, HalfMovedError) else 1
    header = torch.tensor([ill, whole, *values, *(-value for value in values), *least], device=comm.device)
    comm.all_reduce_min(header)
    ill, whole, *reduced = header.tolist()
    if ill < comm.size:
        raise_everywhere(comm, ill, error, DistplbError if whole else HalfMovedError)
    number = len(fields)
    for name, low, negative in zip(fields, reduced[:number], reduced[number : 2 * number], strict=True):
        if low != (high := -negative):
            raise DisagreementError(
                f"ranks disagree on {name}: {low} on one, {high} on another, {fields[name]} on rank {comm.rank}; "
                "pass the same on every rank",
                name,
            )
    return reduced[2 * number :]


def digest(value: object) -> int:
    """What is too much for fields of its own, by its `repr`: one field that differs where it does."""
    return int.from_bytes(hashlib.sha256(repr(value).encode()).digest()[:8], "big") >> 2


def raise_everywhere(
    comm: Comm, rank: int, error: Exception | None, kind: type[DistplbError] = DistplbError
) -> NoReturn:
    """Every rank raises what went wrong on `rank`, which passes its `error`. All ranks know the rank by now."""
    text = torch.zeros(_TEXT_BYTES, dtype=torch.uint8, device="cpu")
    if comm.rank == rank:
        told = str(error) if isinstance(error, DistplbError) else repr(error)
        words = told.encode(errors="backslashreplace")[:_TEXT_BYTES]  # names of files may be no UTF-8
        text[: len(words)] = torch.frombuffer(bytearray(words), dtype=torch.uint8)
    text = text.to(comm.device)
    comm.broadcast(text, rank)
    if comm.size == 1 and isinstance(error, kind):
        raise error  # which knows more than its text
    told = bytes(text.tolist()).rstrip(b"\0").decode(errors="replace")
    raise kind(told if comm.size == 1 else f"rank {rank}: {told}") from error


def told_by_root(comm: Comm, values: Sequence[int]) -> list[int]:
    """Rank 0's integers on all ranks: what is measured must be one number everywhere. One broadcast."""
    told = torch.tensor(list(values), dtype=torch.int64, device=comm.device)
    comm.broadcast(told, 0)
    return told.tolist()
