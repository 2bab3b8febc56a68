"""An integer checksum of every logical expert's tensors, wherever they are.

Each 32-bit word of a row is multiplied by an odd weight that depends on its position, and the products are summed
modulo 2^32. So the sums of the ranks' parts add up to the checksum of the row, while another expert's row, or a row
with parts in the wrong places, has another checksum.
Shapes: L layers, E experts, P slots.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from distplb.comm.agreement import agree
from distplb.comm.base import Comm
from distplb.core.placement import Placement
from distplb.errors import in_stage
from distplb.migrate.optimizer_state import Traveller
from distplb.migrate.row_tensors import RowTensor

__all__ = ["expert_checksums"]

_MASK = (1 << 32) - 1
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int32}


def expert_checksums(
    tensors: Sequence[tuple[Sequence[RowTensor], Sequence[Traveller]]], placement: Placement, comm: Comm
) -> Tensor:
    """Compute checksums `[L, E]`, int64 on the host, equal on all ranks. Two all-reduces.

    Args:
        tensors: by layer, the declared tensors and everything that travels with them on this rank.
        placement: the placement in force.
        comm: the ranks that hold the tensors.

    Raises:
        DistplbError: on all ranks, if one of them could not compute its part, for example for lack of memory.
    """
    by_expert = torch.zeros(placement.num_layers, placement.num_experts, dtype=torch.int64, device="cpu")
    error: Exception | None = None
    try:
        by_expert = by_expert.scatter_add(1, placement.expert_of_slot, _sums(tensors, placement)).to(comm.device)
    except Exception as caught:
        error = in_stage("verify", caught)
    agree(comm, {}, error)
    comm.all_reduce_sum(by_expert)
    return by_expert.cpu() & _MASK


def _sums(tensors: Sequence[tuple[Sequence[RowTensor], Sequence[Traveller]]], placement: Placement) -> Tensor:
    """Checksums `[L, P]` of what this rank holds."""
    sums = torch.zeros(placement.num_layers, placement.num_slots, dtype=torch.int64, device="cpu")
    weights: dict[tuple[int, torch.device], Tensor] = {}
    for layer, (declared, travelling) in enumerate(tensors):
        for number, traveller in enumerate(travelling):
            row_tensor = declared[traveller.index]
            salt = 2 * number + 1  # odd, and another for each tensor, to detect that two tensors were swapped
            for slot, part in _slot_sums(traveller, row_tensor, weights):
                sums[layer, slot] += (part * salt) & _MASK
    return sums


def _slot_sums(
    traveller: Traveller, row_tensor: RowTensor, weights: dict[tuple[int, torch.device], Tensor]
) -> list[tuple[int, int]]:
    """(slot, checksum of the span) for each span that this rank holds."""
    slots, sums, base = [], [], 0
    words_each = max(1, traveller.dtype.itemsize // 4)
    for part in row_tensor.parts:
        for span in part.spans:
            held = traveller.at(base + span.offset, span.stop - span.start)
            words = held.view(_INTEGERS[traveller.dtype.itemsize]).to(torch.int32)
            key = (row_tensor.row * words_each, held.device)
            if key not in weights:
                weights[key] = _odd_weights(*key)
            place = weights[key][span.start * words_each : span.stop * words_each]
            sums.append((words * place).sum(dtype=torch.int64) & _MASK)  # int32 products wrap, as intended
            slots.append(span.slot)
        base += part.numel
    return list(zip(slots, torch.stack(sums).tolist(), strict=True)) if sums else []


def _odd_weights(count: int, device: torch.device) -> Tensor:
    """Odd weights `[count]` int32, scattered so that neighbouring positions differ (Knuth's multiplier)."""
    place = torch.arange(count, dtype=torch.int64, device=device)
    scattered = ((place + 1) * 2654435761) & _MASK
    scattered = ((scattered ^ (scattered >> 15)) * 0x846CA68B) & _MASK | 1
    return (scattered - (1 << 31)).to(torch.int32)
