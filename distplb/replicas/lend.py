"""Replicas of a step in the autograd graph: pushed before the experts compute, and again before their backward.

`lent` puts three nodes around the experts. In the backward they run in this order:

(1) `_AfterExperts` pushes the home rows to the replica slots once more, unless they are still there.
(2) The experts' own backward.
(3) `_Push` brings the replicas' gradients home and adds them, home first, then in the order of GPUs, before anything
    else sees the home's gradient.
(4) `_BeforeExperts` and `_Push` tell that the replicas are no longer needed.

All ranks of the group build the same nodes if any of them holds a replica, and so take part in the exchanges alike.

Shapes: X rows (tokens) on this GPU, G own and R replica slots.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from distplb.comm.base import Message
from distplb.comm.steps import StepComm, Transfer
from distplb.core.private_names import backward_number, is_referred_to_once, unseen_by_modes
from distplb.errors import DistplbError
from distplb.replicas.buffer import Buffer
from distplb.replicas.pushes import Copy, Pushes
from distplb.replicas.stages import StepStages

__all__ = ["Experts", "Lender", "Loan", "lent"]

# The experts of a layer: rows `[X, ...]`, own rows `[G, ...]` and replica rows `[R, ...]` of each tensor -> `[X, ...]`.
Experts = Callable[[Tensor, Sequence[Tensor], Sequence[Tensor]], Tensor]


@dataclass(eq=False)
class Loan:
    """The replicas of one step of one layer on this GPU.

    Args:
        layer: the layer, in words.
        key: the layer and the split, so that a recomputation finds the replicas of its step.
        pushes: what this GPU sends and receives.
        num_slots: R.
        home_rows: `[G, ...]` each, this GPU's rows, without their graph.
        replica_rows: `[R, ...]` each, the rows of the replica slots.
        is_computed: whether the experts have run.
        pending: the parts of the backward that still need the replicas.
    """

    layer: str
    key: tuple[int, int]
    pushes: Pushes
    num_slots: int
    home_rows: tuple[Tensor, ...] = ()
    replica_rows: tuple[Tensor, ...] = ()
    is_computed: bool = False
    pending: set[str] = field(default_factory=set)


class Lender:
    """Pushes the replicas of one step at a time, and knows whose are in the buffer.

    Args:
        comm: the ranks of the group.
        stages: where stages are timed and named.
        keep: whether every step has memory of its own until its backward, so that nothing is pushed again.
    """

    def __init__(self, comm: StepComm, stages: StepStages, *, keep: bool) -> None:
        self.comm, self.stages, self.keep = comm, stages, keep
        self._weights, self._gradients = Buffer(), Buffer()
        self._held: Loan | None = None  # whose replicas the buffer holds
        self._held_since = -1  # the backward pass that pushed them; -1 for a forward
        self._computing: Loan | None = None  # between (1) and (4)
        self._transfer: Transfer | None = None

    @property
    def num_bytes(self) -> int:
        """Of the buffers for weights and gradients."""
        return self._weights.num_bytes + self._gradients.num_bytes

    def start(self, loan: Loan, home_rows: Sequence[Tensor]) -> None:
        """Begin to push a step's replicas, unless a recomputation finds those of its step."""
        loan.home_rows = tuple(rows.detach() for rows in home_rows)
        if self._holds_for_recomputation(loan):
            assert self._held is not None
            loan.replica_rows = self._held.replica_rows
            return
        if backward_number() == -1:
            self._computing = None  # of a backward that ended in an error
        memory = Buffer() if self.keep else self._weights
        loan.replica_rows = tuple(memory.rows(loan.num_slots, loan.home_rows))
        self._push(loan, "push")

    def finish(self, loan: Loan) -> None:
        """Wait until the replicas are there; push them again if those of another step have replaced them."""
        if not self._holds(loan):
            self._push(loan, "push")
        with self.stages.stage("push"):
            self._wait()

    def begin_backward(self, loan: Loan) -> None:
        """(1): push again, unless the replicas are still there."""
        if self._computing is not None and self._computing is not loan and not self.keep:
            raise DistplbError(
                f"the replicas of {loan.layer} are needed while those of {self._computing.layer} are in use, because "
                "parts of the backward run side by side; pass keep=True, which holds the replicas of every step until "
                "its backward"
            )
        self._computing = loan if loan.pending else None
        if not self._holds(loan):
            self._push(loan, "push again")
            with self.stages.stage("push again"):
                self._wait()

    def leave(self, loan: Loan, part: str) -> None:
        """(4): this part of the backward no longer needs the replicas."""
        loan.pending.discard(part)
        if self._computing is loan and not loan.pending:
            self._computing = None

    def bring_home(self, loan: Loan, own: Sequence[Tensor | None], lent: Sequence[Tensor | None]) -> list[Tensor]:
        """(3): the gradients `[G, ...]` of the home rows, from those of own and replica rows."""
        if not self._holds(loan):
            raise DistplbError(
                f"the replicas of {loan.layer} were overwritten during its backward, so its gradients are wrong; pass "
                "keep=True, which holds the replicas of every step until its backward"
            )
        home = [_fresh(one, rows) for one, rows in zip(own, loan.home_rows, strict=True)]
        with self.stages.stage("bring home"):
            away = [
                torch.zeros_like(rows) if one is None else one.contiguous()
                for one, rows in zip(lent, loan.replica_rows, strict=True)
            ]
            scratch = self._gradients.rows(loan.num_slots, home)
            for number in range(loan.pushes.num_rounds):
                arriving = [copy for copy in loan.pushes.sends if copy.nth // loan.num_slots == number]
                leaving = [copy for copy in loan.pushes.receives if copy.nth // loan.num_slots == number]
                sends = [(rows[copy.slot], copy.peer) for copy in leaving for rows in away]
                receives = [(rows[copy.nth % loan.num_slots], copy.peer) for copy in arriving for rows in scratch]
                self.comm.start(sends, receives).wait()
                for rows, arrived in zip(home, scratch, strict=True):
                    _add(rows, arrived, arriving, loan.num_slots)
        return home

    def _holds(self, loan: Loan) -> bool:
        return self.keep or self._held is loan or self._holds_for_recomputation(loan)

    def _holds_for_recomputation(self, loan: Loan) -> bool:
        """Whether this very backward pass has pushed the same replicas, for a recomputation or what it recomputes."""
        number, held = backward_number(), self._held
        return not self.keep and held is not None and held.key == loan.key and self._held_since == number != -1

    def _push(self, loan: Loan, stage: str) -> None:
        sends: list[Message] = [(rows[copy.own], copy.peer) for copy in loan.pushes.sends for rows in loan.home_rows]
        receives = [(rows[copy.slot], copy.peer) for copy in loan.pushes.receives for rows in loan.replica_rows]
        with self.stages.stage(stage):
            self._wait()  # for what another step has started
            self._held = None
            self._transfer = self.comm.start(sends, receives)
            self._held, self._held_since = loan, backward_number()

    def _wait(self) -> None:
        transfer, self._transfer = self._transfer, None
        if transfer is not None:
            transfer.wait()


def lent(lender: Lender, loan: Loan, experts: Experts, rows: Tensor, home_rows: Sequence[Tensor]) -> Tensor:
    """Compute a step's experts on own and replica rows; the graph brings the replicas' gradients home.

    Args:
        lender: who pushes.
        loan: the step's replicas, whose push was started.
        experts: computes the rows.
        rows: `[X, ...]`, the tokens that arrived here.
        home_rows: `[G, ...]` each, this GPU's rows.
    """
    lender.finish(loan)
    loan.is_computed = True
    if torch.is_grad_enabled():
        loan.pending = {"rows"} if rows.requires_grad else set()
        if any(one.requires_grad for one in home_rows):
            loan.pending.add("weights")
    before: Tensor = _BeforeExperts.apply(rows, lender, loan)  # type: ignore[no-untyped-call]  # in torch's stubs
    both = _Push.apply(lender, loan, *home_rows)  # type: ignore[no-untyped-call]
    after = experts(before, both[: len(home_rows)], both[len(home_rows) :])
    computed: Tensor = _AfterExperts.apply(after, lender, loan)  # type: ignore[no-untyped-call]
    return computed


class _BeforeExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, lender: Lender, loan: Loan) -> Tensor:
        ctx.lender, ctx.loan = lender, loan
        return _same(rows)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        ctx.lender.leave(ctx.loan, "rows")
        return gradient, None, None


class _AfterExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, lender: Lender, loan: Loan) -> Tensor:
        ctx.lender, ctx.loan = lender, loan
        return _same(rows)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        ctx.lender.begin_backward(ctx.loan)
        return gradient, None, None


class _Push(torch.autograd.Function):
    """Home rows to own rows, which are the same memory, and replica rows, which the lender has pushed."""

    @staticmethod
    def forward(ctx: Any, lender: Lender, loan: Loan, *home_rows: Tensor) -> tuple[Tensor, ...]:
        ctx.lender, ctx.loan = lender, loan
        ctx.set_materialize_grads(False)
        with unseen_by_modes():  # selective recomputation would keep what was in the memory
            replicas = [Buffer.alias(rows) for rows in loan.replica_rows]
        return (*map(_same, home_rows), *replicas)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        number = len(gradients) // 2
        own, lent = list(gradients[:number]), gradients[number:]
        del gradients
        home = ctx.lender.bring_home(ctx.loan, own, lent)
        ctx.lender.leave(ctx.loan, "weights")
        return None, None, *home


def _same(rows: Tensor) -> Tensor:
    """What a function returns that changes nothing: no view, so that the caller may change it in place as if there
    were no function; autograd still notices when what an expert keeps for its backward is changed so.
    """
    return rows.detach()


def _fresh(gradient: Tensor | None, like: Tensor) -> Tensor:
    """A contiguous gradient that nobody else reads; zeros if this GPU's own experts had none."""
    if gradient is None:
        return torch.zeros_like(like)
    return gradient if gradient.is_contiguous() and is_referred_to_once(gradient) else gradient.clone()


def _add(rows: Tensor, arrived: Tensor, copies: Sequence[Copy], num_slots: int) -> None:
    """Add gradients that have arrived to their home's, in order; sums of low precision are rounded once."""
    by_own: dict[int, list[int]] = {}
    for copy in copies:
        by_own.setdefault(copy.own, []).append(copy.nth % num_slots)
    for own, places in by_own.items():
        total = rows[own].to(torch.promote_types(rows.dtype, torch.float32))
        for place in places:
            total += arrived[place]
        rows[own] = total
