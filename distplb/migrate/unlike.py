"""Why a layer stays as it is while others move, in words that name tensor, ranks and steps."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from typing import NamedTuple

import torch

from distplb.comm.base import Comm
from distplb.migrate.histories import own_slots
from distplb.migrate.rows import RowTensor
from distplb.migrate.state import Holding, Holdings

__all__ = ["Unlike", "why_unlike"]

_MOST_RANKS = 8  # that are named
_NO_STEP = math.nan


class Unlike(NamedTuple):
    """A declared tensor that keeps its layer where it is, and what goes with it on this rank."""

    row_tensor: RowTensor
    held: Holdings
    is_own: bool  # whether each expert is in a tensor of its own
    slot: int | None  # where copies of an expert differ


def why_unlike(cases: Sequence[Unlike], comm: Comm) -> list[str]:
    """For each a sentence that is the same on all ranks. One all-reduce; none where there is nothing to say."""
    if not cases:
        return []
    table = torch.zeros(
        len(cases), comm.size, 4, dtype=torch.int64, device="cpu"
    )  # holds it, has state, has a gradient, step
    for number, case in enumerate(cases):
        holding = _told_of(case)
        if holding is not None:
            has_state = len(holding.local.keys() - {"", "grad"}) + len(holding.scalars) > 0
            step = struct.unpack("<q", struct.pack("<d", holding.scalars.get("step", _NO_STEP)))[0]
            row = [1, int(has_state), int("grad" in holding.local), step]
            table[number, comm.rank] = torch.tensor(row, device="cpu")
    table = table.to(comm.device)
    comm.all_reduce_sum(table)
    return [_sentence(case, ranks) for case, ranks in zip(cases, table.tolist(), strict=True)]


def _told_of(case: Unlike) -> Holding | None:
    """What is told of this rank: of the expert in question, or of the one that is furthest behind."""
    if case.slot is not None:
        slots = own_slots(case.row_tensor) or []
        return dict(zip(slots, case.held.each, strict=True)).get(case.slot)
    return min(case.held.each, key=lambda one: (len(one.local), one.scalars.get("step", 0.0)), default=None)


def _sentence(case: Unlike, table: Sequence[Sequence[int]]) -> str:
    holders = [rank for rank, row in enumerate(table) if row[0]]
    gradients_differ = len({table[rank][2] for rank in holders}) > 1
    groups: dict[str, list[int]] = {}
    for rank in holders:
        _, has_state, has_gradient, bits = table[rank]
        step = struct.unpack("<d", struct.pack("<q", bits))[0]
        words = f"step {step:g}" if not math.isnan(step) else ("state" if has_state else "no state")
        if gradients_differ:
            words += " and a gradient" if has_gradient else " and no gradient"
        groups.setdefault(words, []).append(rank)
    where = f"{case.row_tensor.name}" + ("" if case.slot is None else f" in slot {case.slot}")
    apart = "; ".join(f"{words} on {_ranks(some)}" for words, some in groups.items())
    if case.slot is not None:
        return f"{where}: copies of one expert differ ({apart}); step on all of them alike"
    if case.is_own:
        return f"{where}: what its optimizer holds for an expert is not known on every rank ({apart} at the least)"
    return (
        f"{where}: {apart}. A tensor of several experts has one history for all of them; where a rank has no tokens, "
        "let its experts take part with none, so that their gradient is zero, or hold each in a tensor of its own"
    )


def _ranks(some: Sequence[int]) -> str:
    if len(some) == 1:
        return f"rank {some[0]}"
    more = f" and {len(some) - _MOST_RANKS} more" if len(some) > _MOST_RANKS else ""
    return f"ranks {', '.join(map(str, some[:_MOST_RANKS]))}{more}"
