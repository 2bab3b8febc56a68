"""`Rebalancer`: observe, decide, plan, move. The object that a training loop holds.

Of its files, `options` and `agreed_options` say what it is built from, `parts` holds what it is made of, `rebalance`
is one rebalance, `placement_in_force` how the placement changes, and `journal` what it tells.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

from torch.optim import Optimizer

from distplb.comm.agreement import agree
from distplb.comm.base import Comm, WorldOfOne, refuse_other_comm
from distplb.core.arguments import plain
from distplb.core.layer import MoELayer
from distplb.core.placement import Placement
from distplb.core.topology import Topology
from distplb.errors import DisagreementError, DistplbError, HalfMovedError, LostRanksError
from distplb.train.agreed_options import Arguments, agree_on_options, enter
from distplb.train.attach import Attached
from distplb.train.background import Background
from distplb.train.checkpoint import Counters, Saved
from distplb.train.journal import Journal
from distplb.train.observer import Observer
from distplb.train.options import Moves, Record, Search
from distplb.train.parts import Parts
from distplb.train.placement_in_force import InForce, is_so_on_all
from distplb.train.pricing import Pricer
from distplb.train.rebalance import Rebalance
from distplb.train.window import LoadWindow

__all__ = ["Rebalancer"]

_LOOKS = 2  # the first one may be in an iteration whose step was skipped


class Rebalancer:
    """Counts loads, plans a better placement every few iterations, and moves experts with their optimizer state.

    All methods but the properties are collective: all ranks of `comm` call them, in the same order and from the
    thread that trains. In the loop::

        loss.backward()
        optimizer.step()
        optimizer.zero_grad()  # first, because gradients that are still held travel too
        rebalancer.step()

    Experts change slots, and router rows with them, so the router's outputs stay numbers of slots, the dispatcher
    stays as it is, and the model computes what it computed before. Where layers have a table (`slot_of_expert`) the
    router stays as it is, and the dispatcher looks up the slot.

    Args:
        layers: the MoE layers, the same on all ranks of `comm` and in the same order; none on a rank without any, as
            in a stage of a pipeline, where every method then does nothing but count iterations.
        optimizer: the one that steps on their parameters, or all of them.
        topology: of one EP group.
        every: iterations between rebalances.
        comm: the ranks that hold these layers: all EP groups side by side that hold copies of the same experts, or the
            EP group where there is but one. None for this process alone.
        gpu: which GPU of its EP group this rank is; its rank in `comm` where `comm` is the EP group alone.
        window: the counts; its layers in the order of `layers`, its experts the router's outputs. Each layer's forward
            calls `window.add(index, counts)`. Or the most steps that a window keeps which the layers fill
            (`MoELayer.counts`).
        search: how plans are searched.
        moves: which moves of a plan are made, and how.
        record: what is recorded, and who is told.

    Raises:
        DistplbError: on every rank, if any rank's arguments are refused or differ from the others'.
    """

    def __init__(
        self,
        layers: Sequence[MoELayer],
        optimizer: Optimizer | Sequence[Optimizer],
        *,
        topology: Topology,
        every: int,
        comm: Comm | None = None,
        gpu: int | None = None,
        window: LoadWindow | int = 64,
        search: Search = Search(),
        moves: Moves = Moves(),
        record: Record = Record(),
    ) -> None:
        refuse_other_comm(comm, moves=True)
        if not layers:
            comm, topology, gpu = None, Topology(1, 1), None
        comm = WorldOfOne() if comm is None else comm
        agreed = agree_on_options(
            Arguments(layers, optimizer, comm, plain(gpu), topology, every, plain(window), search, moves, record)
        )
        observer = Observer(agreed.window, comm, agreed.topology, agreed.mover.gpu, agreed.plan_options.seed)
        pricer = Pricer(observer, comm, agreed.topology, agreed.moves.model, agreed.window.shape[0])
        journal = Journal(agreed)
        self._roster, knows_rows = enter(agreed)
        self._parts = Parts(
            agreed=agreed,
            observer=observer,
            pricer=pricer,
            in_force=InForce(agreed, observer, self._roster, knows_rows),
            journal=journal,
            background=Background(comm.device),
        )
        self._rebalance: Rebalance | None = None  # under way
        self._is_postponed = False  # one that is due, to the next iteration
        self._looks = _LOOKS  # at whether what is there can travel, that are left
        self._attached: list[Attached] = []
        self._is_closed = False

    # --- what is in force ------------------------------------------------------------------------------------

    @property
    def placement(self) -> Placement:
        """The placement in force."""
        return self._parts.in_force.placement

    @property
    def iteration(self) -> int:
        """Calls of `step` so far."""
        return self._parts.iteration

    @property
    def last_applied(self) -> int:
        """The last iteration at which a rebalance began that was carried out, whether or not anything had to move.

        0 where none was in this process. One that stays behind `iteration` by much more than `every` tells of a
        rebalancer that goes on without doing anything: switched off, or skipped each time.
        """
        return self._parts.last_applied

    @property
    def enabled(self) -> bool:
        """Whether rebalances begin; may be set, to the same on all ranks."""
        return self._parts.enabled

    @enabled.setter
    def enabled(self, value: bool) -> None:
        """To the same on all ranks."""
        self._parts.enabled = value

    # --- in the loop -----------------------------------------------------------------------------------------

    def step(self) -> None:
        """Call once an iteration, after `optimizer.step()`; rebalances on every `every`-th call while `enabled`.

        A rebalance whose digests differ between ranks is skipped, with a warning and an event that say so. One that is
        under way, spread over iterations, is dropped when `enabled` is set to False.

        The first two calls look whether what is there can travel, so that it is not refused hours later. Where a
        backward pass has begun and no optimizer has stepped, as where a gradient scaler has skipped the step, a
        rebalance that is due waits for the next iteration.

        Raises:
            DistplbError: on every rank, if the rebalance is refused: nothing has moved then, but for what a spread one
                had moved before. Not with `Moves.on_refusal` "skip".
            LostRanksError: if ranks do not come, before anything was written.
            HalfMovedError: if a move broke off in the middle, now or before.
        """
        self._refuse_if_unfit()
        parts = self._parts
        parts.iteration += 1
        self._looks -= 1
        if not parts.agreed.layer_names:
            if self._looks == _LOOKS - 1:
                self._roster.warn_if_nobody_has_layers()
            return
        parts.observer.iteration_ends()
        parts.agreed.mover.watch.iteration_ends()
        try:
            if self._looks >= 0:
                self._look()
            if not parts.enabled:
                self._drop()
            elif self._rebalance is None and (self._is_postponed or parts.iteration % parts.agreed.every == 0):
                self._begin()
            self._go_on()
        except (LostRanksError, HalfMovedError, DisagreementError):
            raise
        except DistplbError as refused:
            if parts.agreed.moves.on_refusal == "raise":
                raise
            parts.journal.warn_of_refusal(str(refused))
            parts.forget_counts()
            parts.journal.tell_of_skipping(parts.iteration, str(refused), parts.last_applied, {})
        parts.observer.loop_goes_on()

    def attach(self) -> Attached:
        """Call `step` by itself whenever the optimizers have stepped, each once; instead of calling it in the loop.

        Gradients are still held then, and travel with the experts: a quarter more bytes with AdamW.

        Returns:
            What calls it; its `remove()` ends that.
        """
        self._attached.append(Attached(self._parts.agreed.optimizers, self.step))
        return self._attached[-1]

    def saving(self, response: Any, *, until: Literal["written", "staged"] = "written") -> None:
        """Have the next move wait for the end of an asynchronous save. Not collective.

        A move in the meantime could mix two placements in one checkpoint. `step` does not wait: a rebalance that is due
        moves in the first iteration in which no rank's save is under way. `apply` and the end of `in_logical_order`
        wait, so that an upload that takes minutes is better saved as it is, or staged by a copy.

        Args:
            response: what `torch.distributed.checkpoint.async_save` returned, or a future of your own.
            until: "staged" if the stager copies all that it is given, as torch 2.13's own does, and tells when: a
                plain future does not. What is staged may otherwise be the tensors themselves, as with torch 2.6 on the
                CPU. Where the copy was made before `async_save` returned, there is nothing to wait for, nor to tell.

        Raises:
            DistplbError: for another response or end.
        """
        if self._parts.agreed.layer_names:
            self._parts.in_force.saves.add(response, until)

    # --- placements by hand ----------------------------------------------------------------------------------

    def apply(self, placement: Placement) -> None:
        """Move every expert to the slot that `placement` gives it, now; a rebalance that is under way is dropped.

        Counts so far are forgotten.

        Raises:
            DistplbError: on every rank, if the placement is of another model, has replicas or differs between
                ranks, takes apart a routing group or a class of slots, or if the state of a layer is refused: nothing
                has moved then.
        """
        self._refuse_if_unfit()
        self._drop()
        self._apply(placement)
        self._parts.forget_counts()

    def restore(self) -> None:
        """Move every expert back to where the job started from."""
        self.apply(self._parts.in_force.first)

    @contextmanager
    def in_logical_order(self) -> Iterator[None]:
        """Expert e in slot e of every layer, for a checkpoint that others can read; afterwards all is as before.

        The block saves model, optimizer and, if it likes, this rebalancer. Give `saving` what an asynchronous save
        returns. If the block raises, experts stay in logical order, and `placement` says so. A rebalance that is under
        way goes on afterwards.
        """
        self._refuse_if_unfit()
        there = self.placement
        self._apply(self._parts.agreed.logical_order)
        yield
        self._apply(there)

    def close(self) -> None:
        """Let go of model and optimizers, and wait until trace and log are written, if they are recorded.

        Not collective. Experts stay where they are, which `state_dict` still tells; nothing moves any more.
        """
        self._is_closed = True
        self._drop()
        self._parts.background.close()
        for attached in self._attached:
            attached.remove()
        self._parts.agreed.let_go()
        self._roster.withdraw()
        self._parts.journal.close()

    # --- checkpoints -----------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Placement in force, first placement and counters as tensors, by layer name, to be saved with the model.

        With `torch.distributed.checkpoint` the rebalancer itself is passed beside model and optimizer. It is loaded on
        any number of GPUs, and by any stages of a pipeline.
        """
        parts, in_force = self._parts, self._parts.in_force
        in_force.refuse_if_half_moved()
        counters = Counters(parts.iteration, parts.rebalances, parts.enabled, parts.stop_loss.strikes)
        return Saved(in_force.rows_as_known(), in_force.first, counters).to_state(parts.agreed.layer_names)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up where `state_dict` was called, with the model and optimizer as they were saved. Moves nothing.

        A rebalance that was under way then is not taken up; the next one begins as if it had ended.

        Raises:
            DistplbError: if the state is of another version or model.
        """
        parts, agreed = self._parts, self._parts.agreed
        parts.in_force.refuse_if_half_moved()
        if not agreed.layer_names:
            return
        saved = Saved.from_state(state, agreed.layer_names, agreed.num_slots, agreed.topology.num_gpus)
        parts.in_force.load(saved.placement, saved.first)
        self._drop()
        parts.iteration, parts.rebalances, parts.enabled, parts.stop_loss.strikes = saved.counters
        parts.forget_counts()

    # --- the rebalance under way -----------------------------------------------------------------------------

    def _look(self) -> None:
        """Whether what is there can travel, on all ranks."""
        parts, agreed = self._parts, self._parts.agreed
        looks = parts.enabled and not agreed.moves.dry_run and not agreed.mover.watch.may_have_skipped()
        agree(agreed.comm, {}, parts.in_force.collect_state()[1] if looks else None)

    def _begin(self) -> None:
        """A rebalance, unless some rank cannot tell whether its step has been skipped."""
        agreed = self._parts.agreed
        self._is_postponed = not (
            agreed.moves.dry_run or is_so_on_all(agreed.comm, lambda: not agreed.mover.watch.may_have_skipped())
        )
        if not self._is_postponed:
            self._rebalance = Rebalance(self._parts)

    def _go_on(self) -> None:
        """With the rebalance under way, as far as it may go in this iteration."""
        if self._rebalance is None:
            return
        try:
            has_ended = self._rebalance.advance(self._parts.iteration)
        except BaseException:
            self._rebalance = None
            raise
        if has_ended:
            self._rebalance = None

    def _drop(self) -> None:
        """The rebalance under way, wherever it is: between two commits every placement is as good as another."""
        self._rebalance, self._is_postponed = None, False

    def _apply(self, placement: Placement) -> None:
        if self._parts.agreed.layer_names:
            self._parts.in_force.apply(placement, verify=self._parts.verifies)

    def _refuse_if_unfit(self) -> None:
        self._parts.in_force.refuse_if_half_moved()
        if self._is_closed:
            raise DistplbError("this Rebalancer has been closed, and moves nothing any more; make a new one")
        self._parts.in_force.refuse_unknown_rows()
