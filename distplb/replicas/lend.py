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

import sys
from collections.abc import Callable, Sequence, Set
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from distplb.comm.base import Message
from distplb.comm.steps import StepComm, Transfer
from distplb.core.private_names import backward_number, is_referred_to_once, unseen_by_modes, will_run
from distplb.errors import DistplbError
from distplb.replicas.buffer import Buffer
from distplb.replicas.pushes import Pushes
from distplb.replicas.sampling import Sample
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
        sample: where the step is measured, if it is sampled.
        home_rows: `[G, ...]` each, this GPU's rows, without their graph.
        replica_rows: `[R, ...]` each, the rows of the replica slots.
        is_computed: whether the experts have run.
        pending: the parts of the backward under way that need the replicas and are still to come.
    """

    layer: str
    key: tuple[int, int]
    pushes: Pushes
    num_slots: int
    sample: Sample | None = None
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
        self._computing_since = -1  # the backward pass that it is in
        self._transfer: Transfer | None = None

    @property
    def num_bytes(self) -> int:
        """Of the buffers for weights and gradients."""
        return self._weights.num_bytes + self._gradients.num_bytes

    def start(self, loan: Loan, home_rows: Sequence[Tensor]) -> None:
        """Begin to push a step's replicas, unless a recomputation finds those of its step."""
        with self.stages.stage("push", loan.sample):
            loan.home_rows = tuple(rows.detach() for rows in home_rows)
            if self._holds_for_recomputation(loan):
                assert self._held is not None
                loan.replica_rows = self._held.replica_rows
                return
            memory = Buffer() if self.keep else self._weights
            loan.replica_rows = tuple(memory.rows(loan.num_slots, loan.home_rows))
            self._push(loan)

    def finish(self, loan: Loan) -> None:
        """Wait until the replicas are there; push them again if those of another step have replaced them."""
        with self.stages.stage("push", loan.sample):
            if not self._holds(loan):
                self._push(loan)
            self._wait()

    def begin_backward(self, loan: Loan, runs: Set[str]) -> None:
        """(1): push again, unless the replicas are still there.

        Args:
            loan: the step's replicas.
            runs: the parts that this backward comes to; a pipeline asks for the gradients of rows alone.
        """
        other, number = self._computing, backward_number()
        # One that is left from another backward pass ended in an error, or was not asked for all gradients.
        if other not in (None, loan) and self._computing_since == number and not self.keep:
            assert other is not None
            raise self._told(
                DistplbError(
                    f"the replicas of {loan.layer} are needed while those of {other.layer} are in use, because "
                    "parts of the backward run side by side; pass keep=True, which holds the replicas of every step "
                    "until its backward"
                )
            )
        loan.pending = set(runs)  # anew, because a graph that is retained runs more than once
        self._computing, self._computing_since = (loan if loan.pending else None), number
        if not self._holds(loan):
            with self.stages.stage("push again", loan.sample):
                self._push(loan)
                self._wait()
        if loan.sample is not None:
            loan.sample.begin("experts backward")

    def leave(self, loan: Loan, part: str) -> None:
        """(4): this part of the backward no longer needs the replicas, which have to be there until now."""
        if not self._holds(loan):
            raise self._told(
                DistplbError(
                    f"the replicas of {loan.layer} were overwritten during its backward, so its gradients are wrong; "
                    "pass keep=True, which holds the replicas of every step until its backward"
                )
            )
        loan.pending.discard(part)
        if loan.sample is not None and not loan.pending:
            loan.sample.end("experts backward")
        if self._computing is loan and not loan.pending:
            self._computing = None

    def bring_home(self, loan: Loan, home: Sequence[Tensor], lent: Sequence[Tensor | None]) -> None:
        """(3): add the gradients of replicas to those of the own rows.

        Args:
            loan: the step's replicas.
            home: `[G, ...]` each, the gradients of the own rows, which nobody else reads.
            lent: `[R, ...]` each, the gradients of the replica rows.
        """
        totals = dict[tuple[int, int], Tensor]()  # of a tensor's own row, in a dtype that does not round each addend
        with self.stages.stage("bring home", loan.sample):
            _count_exchange(loan)
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
                for copy in arriving:
                    for number_of_tensor, (rows, arrived) in enumerate(zip(home, scratch, strict=True)):
                        at = number_of_tensor, copy.own
                        if at not in totals:
                            totals[at] = rows[copy.own].to(torch.promote_types(rows.dtype, torch.float32))
                        totals[at] += arrived[copy.nth % loan.num_slots]
            for (number_of_tensor, own), total in totals.items():
                home[number_of_tensor][own] = total

    def _holds(self, loan: Loan) -> bool:
        return self.keep or self._held is loan or self._holds_for_recomputation(loan)

    def _holds_for_recomputation(self, loan: Loan) -> bool:
        """Whether this very backward pass has pushed the same replicas, for a recomputation or what it recomputes."""
        number, held = backward_number(), self._held
        if self.keep or held is None or held.key != loan.key or not self._held_since == number != -1:
            return False
        # Two layers under one name, whose steps happen to have the same quotas, still have weights of their own.
        places = ([rows.data_ptr() for rows in one.home_rows] for one in (held, loan))
        return next(places) == next(places)

    def _told(self, error: DistplbError) -> DistplbError:
        """An error after which this rank sends no gradients, for which others wait: they hear of it at once."""
        self.comm.tell(error)
        return error

    def _push(self, loan: Loan) -> None:
        sends: list[Message] = [(rows[copy.own], copy.peer) for copy in loan.pushes.sends for rows in loan.home_rows]
        receives = [(rows[copy.slot], copy.peer) for copy in loan.pushes.receives for rows in loan.replica_rows]
        self._wait()  # for what another step has started
        self._held = None
        self._transfer = self.comm.start(sends, receives)
        self._held, self._held_since = loan, backward_number()
        _count_exchange(loan)

    def _wait(self) -> None:
        transfer, self._transfer = self._transfer, None
        if transfer is not None:
            transfer.wait()


def _count_exchange(loan: Loan) -> None:
    """Rows of replicas travel, or their gradients, which have the same size."""
    if loan.sample is not None:
        loan.sample.num_exchanges += 1
        loan.sample.bytes_per_replica = sum(rows.nbytes // max(1, len(rows)) for rows in loan.home_rows)


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
    before: Tensor = _BeforeExperts.apply(rows, lender, loan)  # type: ignore[no-untyped-call]  # in torch's stubs
    *both, tie = _Push.apply(lender, loan, *home_rows)  # type: ignore[no-untyped-call]
    own, replicas = both[: len(home_rows)], both[len(home_rows) :]
    with loan.sample.part("experts") if loan.sample else nullcontext():
        after = experts(before, own, replicas)
    computed: Tensor = _AfterExperts.apply(after, lender, loan, before, tie)  # type: ignore[no-untyped-call]
    return computed


class _BeforeExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, lender: Lender, loan: Loan) -> Tensor:
        ctx.lender, ctx.loan = lender, loan
        return _same(rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        ctx.lender.leave(ctx.loan, "rows")
        return gradient, None, None


class _AfterExperts(torch.autograd.Function):
    """Tied to the other nodes, so that they run on all ranks, also where experts do not use what they get."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, lender: Lender, loan: Loan, before: Tensor, tie: Tensor) -> Tensor:
        ctx.lender, ctx.loan = lender, loan
        return _same(rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, Tensor]:
        _, before, push = (node for node, _ in ctx.next_functions)
        parts = (("rows", before), ("weights", push))
        runs = {part for part, node in parts if node is not None and will_run(node)}
        ctx.lender.begin_backward(ctx.loan, runs)
        return gradient, None, None, None, gradient.new_empty(0)


class _Push(torch.autograd.Function):
    """Home rows to own rows, which are the same memory, replica rows, which the lender has pushed, and the tie."""

    @staticmethod
    def forward(ctx: Any, lender: Lender, loan: Loan, *home_rows: Tensor) -> tuple[Tensor, ...]:
        ctx.lender, ctx.loan = lender, loan
        ctx.set_materialize_grads(False)
        with unseen_by_modes():  # selective recomputation would keep what was in the memory
            replicas = [Buffer.alias(rows) for rows in loan.replica_rows]
        return (*map(_same, home_rows), *replicas, home_rows[0].new_empty(0))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        number = len(gradients) // 2
        ctx.lender.leave(ctx.loan, "weights")
        home = _fresh([*gradients[:number], gradients[-1]], ctx.loan.home_rows)
        ctx.lender.bring_home(ctx.loan, home, gradients[number:-1])
        return None, None, *home


def _same(rows: Tensor) -> Tensor:
    """What a function returns that changes nothing: no view, so that the caller may change it in place as if there
    were no function; autograd still notices when what an expert keeps for its backward is changed so.
    """
    return rows.detach()


def _fresh(gradients: list[Tensor | None], like: Sequence[Tensor]) -> list[Tensor]:
    """Contiguous gradients that nobody else reads; zeros where this GPU's own experts had none.

    Args:
        gradients: of the own rows, then that of the tie, which nobody else holds: a tensor to which more names refer in
            Python than to this one is held by a hook or a function's workspace, and is copied.
        like: the home rows.
    """
    fewest, found = sys.getrefcount(gradients[-1]), list[Tensor]()
    for place, rows in enumerate(like):
        is_held = sys.getrefcount(gradients[place]) != fewest
        one, gradients[place] = gradients[place], None
        if one is None:
            found.append(torch.zeros_like(rows))
        elif is_held or not one.is_contiguous() or not is_referred_to_once(one):
            found.append(one.clone())
        else:
            found.append(one)
    return found
