"""Ranks agree that none has failed and that their values match before any of them continues.

An error on one rank is raised on all of them, and no rank is left waiting in a larger collective.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import NoReturn

import torch
from torch import Tensor

from distplb.comm.base import Comm
from distplb.core import hashing
from distplb.errors import DisagreementError, DistplbError, HalfMovedError

__all__ = [
    "ABSENT",
    "agree",
    "digest",
    "float_bits",
    "float_of_bits",
    "min_and_max",
    "raise_everywhere",
    "root_values",
    "with_negatives",
]

ABSENT = (1 << 63) - 1  # stands for the value of a rank that has none; larger than any digest
_TEXT_BYTES = 2048


def agree(
    comm: Comm, fields: Mapping[str, int], error: Exception | None = None, *, minimum: Sequence[int] = ()
) -> list[int]:
    """Raise on all ranks if one of them has failed or the ranks differ. One all-reduce (MIN).

    It reduces each field and its negative, whether the rank has failed, and whether its experts are whole.

    Args:
        comm: all its ranks call this together, with the same field names.
        fields: integers (below 2^63 in magnitude) that must be equal on all ranks.
        error: the error of this rank, if it has failed; its fields are then ignored.
        minimum: integers that may differ; the same number of them on all ranks.

    Returns:
        The minimum over ranks of each integer in `minimum`.

    Raises:
        DistplbError: on every rank, with the text of the lowest failed rank; a HalfMovedError if any rank has one.
        DisagreementError: on every rank, if a field differs, with its name, minimum and maximum.
    """
    values = [0] * len(fields) if error else list(fields.values())
    failed_rank = comm.rank if error else comm.size  # the lowest one reports
    is_whole = 0 if isinstance(error, HalfMovedError) else 1
    header = torch.tensor([failed_rank, is_whole, *values, *(-value for value in values), *minimum], device=comm.device)
    comm.all_reduce_min(header)
    failed_rank, is_whole, *reduced = header.tolist()
    if failed_rank < comm.size:
        raise_everywhere(comm, failed_rank, error, DistplbError if is_whole else HalfMovedError)
    number = len(fields)
    for name, low, negative in zip(fields, reduced[:number], reduced[number : 2 * number], strict=True):
        if low != (high := -negative):
            raise DisagreementError(
                f"ranks disagree on {name}: {low} on one, {high} on another, {fields[name]} on rank {comm.rank}; "
                "pass the same value on every rank",
                name,
            )
    return reduced[2 * number :]


def digest(value: object) -> int:
    """A value as one field for `agree`: below 2^62, and different if the value's `repr` differs."""
    return hashing.digest(repr(value).encode())


def raise_everywhere(
    comm: Comm, rank: int, error: Exception | None, kind: type[DistplbError] = DistplbError
) -> NoReturn:
    """Raise the error of `rank`, which passes it, on every rank. All ranks already know which rank has failed."""
    text = torch.zeros(_TEXT_BYTES, dtype=torch.uint8, device="cpu")
    if comm.rank == rank:
        message = str(error) if isinstance(error, DistplbError) else repr(error)
        encoded = message.encode(errors="backslashreplace")[:_TEXT_BYTES]  # file names need not be UTF-8
        text[: len(encoded)] = torch.frombuffer(bytearray(encoded), dtype=torch.uint8)
    text = text.to(comm.device)
    comm.broadcast(text, rank)
    if comm.size == 1 and isinstance(error, kind):
        raise error  # it carries more than its text
    message = bytes(text.tolist()).rstrip(b"\0").decode(errors="replace")
    raise kind(message if comm.size == 1 else f"rank {rank}: {message}") from error


def float_bits(value: float) -> int:
    """A float as an int64 that ranks can exchange and compare, to the bit; its negative is an int64 too."""
    bits: int = struct.unpack("<q", struct.pack("<d", value or 0.0))[0]
    return bits


def float_of_bits(bits: int) -> float:
    """The float of `float_bits`."""
    value: float = struct.unpack("<d", struct.pack("<q", bits))[0]
    return value


def with_negatives(values: Tensor) -> Tensor:
    """`[2, ...]`: int64 values and their negatives, whose minima over ranks are the minimum and minus the maximum.

    A value that is `ABSENT` is so in both, and does not affect the minima of the ranks that have one.
    """
    return torch.stack([values, torch.where(values == ABSENT, values, -values)])


def min_and_max(comm: Comm, values: Tensor) -> tuple[Tensor, Tensor]:
    """The minimum and the maximum over ranks of each value, on the host. One all-reduce.

    Args:
        comm: all its ranks call this together.
        values: `[...]` int64 on the host, `ABSENT` where this rank has none. Where no rank has a value, the minimum is
            `ABSENT` and the maximum its negative.
    """
    both = with_negatives(values).to(comm.device)
    comm.all_reduce_min(both)
    minimum, negative_maximum = both.cpu()
    return minimum, -negative_maximum


def root_values(comm: Comm, values: Sequence[int]) -> list[int]:
    """Rank 0's integers on all ranks, for measurements that must be the same everywhere. One broadcast."""
    shared = torch.tensor(list(values), dtype=torch.int64, device=comm.device)
    comm.broadcast(shared, 0)
    return shared.tolist()
