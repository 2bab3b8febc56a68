"""The count of a step: one all-gather of every rank's counts, with what the ranks have to agree on.

What is wrong on one rank is in its row, so all ranks refuse it alike, in one text and without a second wait. The
weights of a layer are compared once, in rows of the same length: a rank that does that while others count is refused.

Shapes: M ranks, N tokens of this rank, K experts of each token, P slots.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
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

__all__ = ["Row", "checked_counts", "counts_of", "marked_as_unseen", "name_digest", "refuse_weights"]

# Before the counts.
_CALL, _LAYER, _OPTIONS, _BACKWARD, _GRADIENTS, _COMPUTES, _UNSEEN, _KIND, _INVALID, _EXAMPLE = range(10)
_HEADER = 10
_NAME_BYTES = 96  # of a layer's name, in errors
_RIGHT, _NO_TENSOR, _NO_INTEGERS, _NO_TABLE, _NO_DEVICE = range(5)  # kinds of what a rank passed
_KINDS = {
    _NO_TENSOR: "no tensor",
    _NO_INTEGERS: "no integers",
    _NO_TABLE: "no [N, K] tensor",
    _NO_DEVICE: "a tensor on another device than the group's",
}
_NO_WEIGHT, _OTHER_ROWS, _NOT_CONTIGUOUS = range(1, 4)  # kinds of weights that do not fit
_WEIGHTS = {
    _NO_WEIGHT: "no tensors with rows",
    _OTHER_ROWS: "a tensor with {} rows",
    _NOT_CONTIGUOUS: "a tensor that is not contiguous",
}


@dataclass(frozen=True)
class Row:
    """What a rank tells the others: its counts, after what the ranks compare.

    Args:
        call: how many dispatches came before.
        layer: the digest of the layer's name.
        options: the digest of the options.
        backward: whether this is the recomputation of a step.
        gradients: whether autograd records this step; an evaluation is not recorded.
    """

    call: int
    layer: int
    options: int
    backward: bool
    gradients: bool

    def tensor(self, expert_of_token: object, num_slots: int, device: torch.device) -> Tensor:
        """`[10 + P]` int64 on the device. No operation waits for the device.

        Args:
            expert_of_token: `[N, K]`, as the user passed it; what does not fit is told to all ranks.
            num_slots: P.
            device: the group's.
        """
        kind = _kind(expert_of_token, device)
        if kind == _RIGHT:
            assert isinstance(expert_of_token, Tensor)
            if expert_of_token.is_cpu and (counts := _host_counts(expert_of_token, num_slots)) is not None:
                whole = np.empty(_HEADER + num_slots, np.int64)
                whole[:_HEADER] = *self._place(), False, 0, kind, 0, 0
                whole[_HEADER:] = counts
                return torch.from_numpy(whole)
            ids = expert_of_token.flatten().to(torch.int64)
        row = torch.zeros(_HEADER + num_slots, dtype=torch.int64, device=device)
        if kind == _RIGHT:
            found = torch.zeros(num_slots + 2, dtype=torch.int64, device=device)  # first and last for invalid ids
            found.scatter_add_(0, ids.clamp(-1, num_slots).add_(1), torch.ones_like(ids))
            row[_HEADER:] = found[1:-1]
            row[_INVALID] = found[0] + found[-1]
            if len(ids):
                least, most = ids.aminmax()
                row[_EXAMPLE] = least.where(least < 0, most)
        head = torch.tensor([*self._place(), False, 0, kind], device="cpu")
        row[: len(head)] = head.to(device, non_blocking=True)
        return row

    def of_weights(self, weights: Sequence[object], num_slots: int, num_own: int) -> Tensor:
        """`[10 + P]` int64 on the host: the same about the weights of the layer.

        Args:
            weights: as the user passed them; what does not fit is told to all ranks.
            num_slots: P.
            num_own: G.
        """
        row = torch.zeros(_HEADER + num_slots, dtype=torch.int64, device="cpu")
        kind, found = _weights_kind(weights, num_own)
        shapes = [(list(one.shape), one.dtype) for one in weights if isinstance(one, Tensor)]
        head = [*self._place(), True, 0, kind, found, digest(repr(shapes).encode())]
        row[:_HEADER] = torch.tensor(head, device="cpu")
        return row

    def _place(self) -> tuple[int, ...]:
        """Where this rank is."""
        return self.call, self.layer, self.options, self.backward, self.gradients


def marked_as_unseen(row: Tensor) -> Tensor:
    """The row, with the mark that this rank has seen no forward with the counts that it recomputes."""
    marked = row.clone()
    marked[_UNSEEN] = 1
    return marked


def counts_of(row: Tensor) -> Tensor:
    """`[P]`, this rank's own counts."""
    return row[_HEADER:]


def checked_counts(comm: StepComm, row: Tensor, layers: Mapping[int, Hashable]) -> NDArray[np.int64]:
    """`[M, P]`, contiguous, the counts of all ranks. Collective.

    Args:
        comm: the ranks.
        row: this rank's.
        layers: names of layers by digest, as far as this rank knows them.

    Raises:
        DistplbError: the same on all ranks, if a rank passed what is no expert ids, the ranks are not in the same step
            of the same layer, or a rank's router has chosen otherwise in a recomputation.
    """
    gathered = comm.all_gather(row)
    rows: NDArray[np.int64] = gathered.numpy()
    told = rows[:, :_EXAMPLE].tobytes()
    first = told[: len(told) // len(rows)]
    # In every step, so in one comparison: all ranks are at the same point, and none has anything to refuse.
    if told != first * len(rows) or any(first[8 * _UNSEEN :]):
        _refuse(comm, gathered[:, :_HEADER], layers)
        _refuse_ids(gathered[:, :_HEADER], rows.shape[1] - _HEADER, layers)
    return np.ascontiguousarray(rows[:, _HEADER:])


def refuse_weights(comm: StepComm, row: Tensor, num_own: int, layers: Mapping[int, Hashable]) -> None:
    """Compare the weights of a layer among all ranks. Collective.

    Args:
        comm: the ranks.
        row: what `Row.of_weights` tells of this rank's.
        num_own: G.
        layers: as for `checked_counts`.

    Raises:
        DistplbError: the same on all ranks, if weights do not fit or differ.
    """
    rows = comm.all_gather(row.to(comm.device))
    _refuse(comm, rows[:, :_HEADER], layers)
    name = shown(layers.get(int(rows[0, _LAYER])))
    for rank, kind in enumerate(rows[:, _KIND].tolist()):
        if kind:
            raise DistplbError(
                f"rank {rank} passed {_WEIGHTS[kind].format(int(rows[rank, _INVALID]))} as weights of layer {name}; "
                f"pass contiguous local tensors with a row for each of {num_own} own slots, such as DTensor.to_local()"
            )
    others = rows[:, _EXAMPLE].ne(rows[0, _EXAMPLE]).nonzero().flatten().tolist()
    if others:
        raise DistplbError(
            f"rank {others[0]} has weights of other shapes or dtypes in layer {name} than rank 0; pass the same "
            "weights on all ranks"
        )


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


def _host_counts(expert_of_token: Tensor, num_slots: int) -> NDArray[np.int64] | None:
    """`[P]`, in fewer operations than a device needs; None if an id is invalid.

    Args:
        expert_of_token: `[N, K]` integers on the host.
        num_slots: P.
    """
    values = expert_of_token.numpy().astype(np.int64, copy=False).reshape(-1)
    if len(values) and np.maximum.reduce(values.view(np.uint64)) >= num_slots:  # a negative id is a huge one there
        return None
    return np.bincount(values, minlength=num_slots)


def _weights_kind(weights: Sequence[object], num_own: int) -> tuple[int, int]:
    """What is wrong with weights, 0 for nothing, and the number of rows that was found."""
    if not weights:
        return _NO_WEIGHT, 0
    for one in weights:
        if not isinstance(one, Tensor) or one.dim() < 1:
            return _NO_WEIGHT, 0
        if len(one) != num_own:
            return _OTHER_ROWS, len(one)
        if not one.is_contiguous():
            return _NOT_CONTIGUOUS, 0
    return _RIGHT, 0


def _refuse(comm: StepComm, rows: Tensor, layers: Mapping[int, Hashable]) -> None:
    """Check that all ranks are at the same point, from their headers `[M, 10]`, which every rank has."""
    what = {
        _OPTIONS: "the options of the StepBalancer",
        _COMPUTES: "what they call",
        _LAYER: "the layer",
        _CALL: "the step",
    }
    for column, name in what.items():
        others = rows[:, column].ne(rows[0, column]).nonzero().flatten().tolist()
        if others:
            names = _names(comm, layers[int(rows[comm.rank, _LAYER])])
            told = [_told(column, rows[rank], names[rank]) for rank in (0, others[0])]
            raise DistplbError(
                f"rank{'s' * (len(others) > 1)} {_listed(others)} and rank 0 differ in {name}: rank 0 {told[0]}, rank "
                f"{others[0]} {told[1]}; call dispatch and compute for the same layers in the same order, with the "
                "same options, on all ranks of the group"
            )
    if rows[:, _BACKWARD].ne(rows[0, _BACKWARD]).any():
        raise DistplbError(
            "some ranks recompute this step and others do not; recompute the same layers on all ranks of the group"
        )
    without = rows[:, _GRADIENTS].eq(0).nonzero().flatten().tolist()
    if 0 < len(without) < len(rows):
        raise DistplbError(
            f"rank{'s' * (len(without) > 1)} {_listed(without)} would compute this step without gradients, as in an "
            "evaluation, and other ranks with them; evaluate on all ranks of the group, with the same number of "
            "batches"
        )


def _refuse_ids(rows: Tensor, num_slots: int, layers: Mapping[int, Hashable]) -> None:
    """Check what ranks passed as expert ids, from the headers `[M, 10]`."""
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
    for rank in rows[:, _UNSEEN].nonzero().flatten().tolist():
        layer = shown(layers.get(int(rows[0, _LAYER])))
        raise DistplbError(
            f"the router of layer {layer} chose other experts in the recomputation than in the forward, on "
            f"rank {rank}; make the router deterministic, or exclude it from recomputation"
        )


def _names(comm: StepComm, layer: Hashable) -> list[str]:
    """The layer that each rank is in, in words: a second exchange, but only once all ranks know that they refuse."""
    text = shown(layer).encode()[:_NAME_BYTES].ljust(_NAME_BYTES, b"\0")
    mine = torch.frombuffer(bytearray(text), dtype=torch.uint8).to(torch.int64)
    rows = comm.all_gather(mine.to(comm.device)).tolist()
    return [bytes(row).rstrip(b"\0").decode(errors="replace") for row in rows]


def _told(column: int, row: Tensor, name: str) -> str:
    if column == _OPTIONS:
        return f"has digest {int(row[_OPTIONS])}"
    calls = "compute" if row[_COMPUTES] else "dispatch"
    return f"is in {calls} of layer {name}, dispatch {int(row[_CALL])}"


def _listed(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks[:8])) + ", ..." * (len(ranks) > 8)
