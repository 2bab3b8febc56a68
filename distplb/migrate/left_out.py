"""Explain why a layer stays while others move, in a sentence that names the tensor, the ranks and their steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from distplb.comm.agreement import float_bits, float_of_bits
from distplb.comm.base import Comm
from distplb.migrate.optimizer_state import RowTensorState, TensorState
from distplb.migrate.row_tensors import RowTensor

__all__ = ["LeftOut", "reasons_left_out"]

_MOST_RANKS = 8  # named in a sentence
_NO_STEP = math.nan


class LeftOut(NamedTuple):
    """A declared tensor whose state keeps its layer from moving, and that state on this rank."""

    row_tensor: RowTensor
    state: RowTensorState
    is_own: bool  # whether each expert is in a tensor of its own
    slot: int | None  # in which copies of an expert differ


def reasons_left_out(cases: Sequence[LeftOut], comm: Comm) -> list[str]:
    """Return a sentence for each case, the same on all ranks. One all-reduce; none without cases."""
    if not cases:
        return []
    # By case and rank: whether it holds the tensor, has state, has a gradient; its step.
    table = torch.zeros(len(cases), comm.size, 4, dtype=torch.int64, device="cpu")
    for number, case in enumerate(cases):
        example = _example(case)
        if example is not None:
            has_state = len(example.local.keys() - {"", "grad"}) + len(example.scalars) > 0
            step = float_bits(example.scalars.get("step", _NO_STEP))
            row = [1, int(has_state), int("grad" in example.local), step]
            table[number, comm.rank] = torch.tensor(row, device="cpu")
    table = table.to(comm.device)
    comm.all_reduce_sum(table)
    return [_sentence(case, ranks) for case, ranks in zip(cases, table.tolist(), strict=True)]


def _example(case: LeftOut) -> TensorState | None:
    """Pick the tensor of this rank to report: that of the expert in question, or the one furthest behind."""
    if case.slot is not None:
        slots = case.row_tensor.own_slots or []
        return dict(zip(slots, case.state.of_tensors, strict=True)).get(case.slot)
    return min(case.state.of_tensors, key=lambda one: (len(one.local), one.scalars.get("step", 0.0)), default=None)


def _sentence(case: LeftOut, table: Sequence[Sequence[int]]) -> str:
    holders = [rank for rank, row in enumerate(table) if row[0]]
    gradients_differ = len({table[rank][2] for rank in holders}) > 1
    groups: dict[str, list[int]] = {}
    for rank in holders:
        _, has_state, has_gradient, bits = table[rank]
        step = float_of_bits(bits)
        words = f"step {step:g}" if not math.isnan(step) else ("state" if has_state else "no state")
        if gradients_differ:
            words += " and a gradient" if has_gradient else " and no gradient"
        groups.setdefault(words, []).append(rank)
    where = f"{case.row_tensor.name}" + ("" if case.slot is None else f" in slot {case.slot}")
    apart = "; ".join(f"{words} on {_ranks(some)}" for words, some in groups.items())
    if case.slot is not None:
        return f"{where}: copies of one expert differ ({apart}); take the same optimizer steps on all of them"
    if case.is_own:
        return f"{where}: some rank does not know the optimizer state that another has for an expert (at least {apart})"
    return (
        f"{where}: {apart}. A tensor of several experts has one history for all of them; on ranks without tokens, run "
        "the experts on an empty batch, so that their gradient is zero, or keep each expert in a tensor of its own"
    )


def _ranks(some: Sequence[int]) -> str:
    if len(some) == 1:
        return f"rank {some[0]}"
    more = f" and {len(some) - _MOST_RANKS} more" if len(some) > _MOST_RANKS else ""
    return f"ranks {', '.join(map(str, some[:_MOST_RANKS]))}{more}"
