"""The count of a step: one all-gather of every rank's counts, with what the ranks have to agree on.

What is wrong on one rank is in its row, so all ranks refuse it alike, in one text and without a second wait.

Shapes: M ranks, N tokens of this rank, K experts of each token, P slots.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distplb.comm.steps import StepComm
from distplb.core.arguments import shown
from distplb.core.hashing import digest
from distplb.core.plain_tensor import INTEGERS
from distplb.errors import DistplbError

__all__ = ["Row", "checked_counts", "checked_swap", "counts_of", "marked_as_skipped", "name_digest"]

_CALL, _LAYER, _OPTIONS, _BACKWARD, _SKIPPED, _KIND, _INVALID, _EXAMPLE = range(8)  # columns before the counts
_HEADER = 8
_RIGHT, _NO_TENSOR, _NO_INTEGERS, _NO_TABLE, _NO_DEVICE = range(5)  # kinds of what a rank passed
_KINDS = {
    _NO_TENSOR: "no tensor",
    _NO_INTEGERS: "no integers",
    _NO_TABLE: "no [N, K] tensor",
    _NO_DEVICE: "a tensor on another device than the group's",
}


@dataclass(frozen=True)
class Row:
    """What a rank tells the others: its counts, after what the ranks compare.

    Args:
        call: how many dispatches came before.
        layer: the digest of the layer's name.
        options: the digest of the options.
        backward: whether this is the recomputation of a step.
    """

    call: int
    layer: int
    options: int
    backward: bool

    def tensor(self, expert_of_token: object, num_slots: int, device: torch.device) -> Tensor:
        """`[8 + P]` int64 on the device. No operation waits for the device.

        Args:
            expert_of_token: `[N, K]`, as the user passed it; what does not fit is told to all ranks.
            num_slots: P.
            device: the group's.
        """
        kind = _kind(expert_of_token, device)
        if kind == _RIGHT:
            assert isinstance(expert_of_token, Tensor)
            ids = expert_of_token.flatten().to(torch.int64)
            if ids.is_cpu and (counts := _host_counts(ids, num_slots)) is not None:
                whole = [self.call, self.layer, self.options, self.backward, False, kind, 0, 0]
                return torch.from_numpy(np.concatenate([np.array(whole, np.int64), counts]))
        row = torch.zeros(_HEADER + num_slots, dtype=torch.int64, device=device)
        if kind == _RIGHT:
            found = torch.zeros(num_slots + 2, dtype=torch.int64, device=device)  # first and last for invalid ids
            found.scatter_add_(0, ids.clamp(-1, num_slots).add_(1), torch.ones_like(ids))
            row[_HEADER:] = found[1:-1]
            row[_INVALID] = found[0] + found[-1]
            if len(ids):
                least, most = ids.aminmax()
                row[_EXAMPLE] = least.where(least < 0, most)
        head = torch.tensor([self.call, self.layer, self.options, self.backward, False, kind], device="cpu")
        row[: len(head)] = head.to(device, non_blocking=True)
        return row


def marked_as_skipped(row: Tensor) -> Tensor:
    """The row, with the mark that this rank recomputes a step that it may not have looked at."""
    marked = row.clone()
    marked[_SKIPPED] = 1
    return marked


def counts_of(row: Tensor) -> Tensor:
    """`[P]`, this rank's own counts."""
    return row[_HEADER:]


def checked_counts(comm: StepComm, row: Tensor, layers: Mapping[int, Hashable]) -> tuple[Tensor, bool]:
    """`[M, P]` int64 on the host, the counts of all ranks; and whether all of them say "skipped". Collective.

    Args:
        comm: the ranks.
        row: this rank's.
        layers: names of layers by digest, as far as this rank knows them.

    Raises:
        DistplbError: the same on all ranks, if a rank passed what is no expert ids, or the ranks are not in the same
            step of the same layer.
    """
    rows = comm.all_gather(row)
    _refuse(rows[:, :_HEADER], rows.shape[1] - _HEADER, layers)
    return rows[:, _HEADER:].contiguous(), bool(rows.numpy()[:, _SKIPPED].all())


def checked_swap(comm: StepComm, row: Tensor, layers: Mapping[int, Hashable]) -> Tensor:
    """`[M, G]` int64 on the host: what each rank sends to each own slot of this one, as plain dispatchers exchange it.

    The arguments and errors are those of `checked_counts`.
    """
    own = row[_HEADER:].view(comm.size, -1)
    rows = comm.swap(torch.cat([row[:_HEADER].expand(comm.size, -1), own], 1))
    _refuse(rows[:, :_HEADER], len(row) - _HEADER, layers)
    return rows[:, _HEADER:].contiguous()


def name_digest(layer: Hashable) -> int:
    """A hash of a layer's name, the same in all processes."""
    return digest(repr(layer).encode())


def _kind(value: object, device: torch.device) -> int:
    if not isinstance(value, Tensor):
        return _NO_TENSOR
    if value.dtype not in INTEGERS or value.dtype == torch.bool:
        return _NO_INTEGERS
    if value.dim() != 2:
        return _NO_TABLE
    return _RIGHT if value.device.type == device.type else _NO_DEVICE


def _host_counts(ids: Tensor, num_slots: int) -> NDArray[np.int64] | None:
    """`[P]`, in fewer operations than a device needs; None if an id is invalid.

    Args:
        ids: `[N * K]` int64 on the host.
        num_slots: P.
    """
    values: NDArray[np.int64] = ids.numpy()
    if len(values) and (values.min() < 0 or values.max() >= num_slots):
        return None
    return np.bincount(values, minlength=num_slots)


def _is_fine(rows: Tensor) -> bool:
    """Whether there is nothing to refuse; short, because this runs in every step."""
    headers = rows.numpy()
    alike, wrong = headers[:, _CALL : _BACKWARD + 1], headers[:, _KIND : _INVALID + 1]
    return not wrong.any() and bool((alike == alike[0]).all())


def _refuse(rows: Tensor, num_slots: int, layers: Mapping[int, Hashable]) -> None:
    """Check the headers `[M, 8]` of all ranks, which every rank has."""
    if _is_fine(rows):
        return
    what = {_OPTIONS: "the options of the StepBalancer", _LAYER: "the layer", _CALL: "the step"}
    for column, name in what.items():
        others = rows[:, column].ne(rows[0, column]).nonzero().flatten().tolist()
        if others:
            told = [_told(column, rows[rank], layers) for rank in (0, others[0])]
            raise DistplbError(
                f"rank{'s' * (len(others) > 1)} {_listed(others)} and rank 0 differ in {name}: rank 0 {told[0]}, rank "
                f"{others[0]} {told[1]}; call dispatch for the same layers in the same order, with the same options, "
                "on all ranks of the group"
            )
    if rows[:, _BACKWARD].ne(rows[0, _BACKWARD]).any():
        raise DistplbError(
            "some ranks recompute this step and others do not; recompute the same layers on all ranks of the group"
        )
    for rank, kind in enumerate(rows[:, _KIND].tolist()):
        if kind:
            raise DistplbError(
                f"rank {rank} passed {_KINDS[kind]} as expert_of_token; pass the [N, K] ids of its tokens' experts, on "
                "the device of the group"
            )
    for rank in rows[:, _INVALID].nonzero().flatten().tolist():
        number, example = int(rows[rank, _INVALID]), int(rows[rank, _EXAMPLE])
        raise DistplbError(
            f"rank {rank} has {number} id{'s' * (number != 1)} such as {example} in expert_of_token; pass ids in "
            f"[0, {num_slots})"
        )


def _told(column: int, row: Tensor, layers: Mapping[int, Hashable]) -> str:
    layer = layers.get(int(row[_LAYER]))
    where = "is in a layer that this rank has not seen" if layer is None else f"is in layer {shown(layer)}"
    return f"{where}, dispatch {int(row[_CALL])}" if column != _OPTIONS else f"has digest {int(row[_OPTIONS])}"


def _listed(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks[:8])) + ", ..." * (len(ranks) > 8)
