"""`Rebalancer`: the object that a training loop holds. It observes, decides, plans and moves.

Its files: `options` and `agreed_options` hold its options, `parts` its components, `rebalance` runs one rebalance,
`placement_in_force` changes the placement, and `journal` reports what happened.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
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
from distplb.replicas.step_balancer import StepBalancer
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

_LOOKS = 2  # two, because the optimizer step of the first iteration may have been skipped


class Rebalancer:
    """Counts loads, plans a better placement every few iterations, and moves experts with their optimizer state.

    All methods are collective unless they say otherwise (properties are not): all ranks of `comm` call them, in the
    same order and from the training thread. In the loop::

        loss.backward()
        optimizer.step()
        optimizer.zero_grad()  # first, because gradients that are still held travel too
        rebalancer.step()

    Experts change slots and take their router rows along. The router's outputs are then slot indices, the dispatcher
    needs no change, and the model computes what it computed before. Where layers have a table (`slot_of_expert`), the
    router does not change and the dispatcher looks up each expert's slot.

    Args:
        layers: the MoE layers, the same on all ranks of `comm` and in the same order. Pass an empty list on ranks
            without MoE layers, such as some pipeline stages; every method then only counts iterations.
        optimizer: the optimizer that steps on the layers' parameters, or a list of all such optimizers.
        topology: the nodes and GPUs of one EP group.
        every: iterations between rebalances. None never rebalances: nothing is counted, and experts stay where they
            are, unless `apply`, `restore` or `in_logical_order` moves them.
        comm: the ranks that hold these layers: all EP groups that hold copies of the same experts, or the single EP
            group if there is only one. None for this process alone.
        gpu: which GPU of its EP group this rank is. Defaults to the rank in `comm`, if `comm` is a single EP group.
        window: a `LoadWindow` whose layers are in the order of `layers` and whose experts are the router's outputs;
            each layer's forward calls `window.add(index, counts)`. Or an integer: how many steps to keep in a window
            that the layers fill themselves (`MoELayer.counts`).
        search: how plans are searched.
        moves: which moves of a plan are made, and how.
        record: what is recorded, and where it goes.
        step_balancer: lends replicas to the same layers, if an adapter has given them one. Neither needs the other:
            homes change between steps, and replicas last for one.

    Raises:
        DistplbError: on every rank, if any rank's arguments are refused or differ from those of other ranks.
    """

    def __init__(
        self,
        layers: Sequence[MoELayer],
        optimizer: Optimizer | Sequence[Optimizer],
        *,
        topology: Topology,
        every: int | None,
        comm: Comm | None = None,
        gpu: int | None = None,
        window: LoadWindow | int = 64,
        search: Search = Search(),
        moves: Moves = Moves(),
        record: Record = Record(),
        step_balancer: StepBalancer | None = None,
    ) -> None:
        self.step_balancer = step_balancer
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
        self._rebalance: Rebalance | None = None  # the one under way
        self._is_postponed = False  # a rebalance is due and waits for the next iteration
        self._looks = _LOOKS  # how many early checks of the state are left
        self._attached: list[Attached] = []
        self._ends: list[Callable[[], None]] = []
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
        """The iteration at which the last completed rebalance began, whether or not anything had to move.

        0 if this process has completed none. If it falls behind `iteration` by much more than `every`, the rebalancer
        is not doing anything: it is switched off, or every rebalance is skipped.
        """
        return self._parts.last_applied

    @property
    def enabled(self) -> bool:
        """Whether rebalances begin. May be set, to the same value on all ranks."""
        return self._parts.enabled

    @enabled.setter
    def enabled(self, value: bool) -> None:
        """Set it to the same value on all ranks."""
        self._parts.enabled = value

    # --- in the loop -----------------------------------------------------------------------------------------

    def step(self) -> None:
        """Call once per iteration, after `optimizer.step()`; rebalances on every `every`-th call while `enabled`.

        If digests differ between ranks, the rebalance is skipped, with a warning and an event. Setting `enabled` to
        False drops a spread rebalance that is under way.

        The first two calls check that all state can travel, so that a job does not find out hours later. If a backward
        pass has begun but no optimizer has stepped, for example because a gradient scaler skipped the step, a
        rebalance that is due waits for the next iteration.

        Raises:
            DistplbError: on every rank, if the rebalance is refused. Nothing has moved then, except what a spread
                rebalance had moved in earlier iterations. Not raised with `Moves.on_refusal` "skip".
            LostRanksError: if ranks do not arrive, before anything was written.
            HalfMovedError: if this move or an earlier one broke off in the middle.
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
            elif self._rebalance is None and (self._is_postponed or self._is_due()):
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
        """Call `step` automatically whenever every optimizer has stepped once, instead of calling it in the loop.

        Gradients are still held at that point and travel with the experts: a quarter more bytes with AdamW.

        Returns:
            A handle; its `remove()` ends the automatic calls.
        """
        self._attached.append(Attached(self._parts.agreed.optimizers, self.step))
        return self._attached[-1]

    def saving(self, response: Any, *, until: Literal["written", "staged"] = "written") -> None:
        """Hold back moves until an asynchronous save has ended. Not collective.

        A move during the save could mix two placements in one checkpoint. `step` does not block: a rebalance that is
        due moves in the first iteration in which no rank is saving. `apply` and the end of `in_logical_order` do
        block, so if an upload takes minutes, save without `in_logical_order` or use a stager that copies.

        Args:
            response: the return value of `torch.distributed.checkpoint.async_save`, or a future of your own.
            until: "staged" if the stager copies everything it is given, as that of torch 2.13 does, and reports when it
                is done; a plain future does not report it. Otherwise the staged tensors may be the originals, as with
                torch 2.6 on the CPU. If the copy is complete before `async_save` returns, there is nothing to wait
                for and no need to call this.

        Raises:
            DistplbError: if `response` or `until` is anything else.
        """
        if self._parts.agreed.layer_names:
            self._parts.in_force.saves.add(response, until)

    # --- placements set manually -----------------------------------------------------------------------------

    def apply(self, placement: Placement) -> None:
        """Move every expert now to the slot that `placement` gives it. Drops a rebalance that is under way.

        The counts collected so far are cleared.

        Raises:
            DistplbError: on every rank, if the placement belongs to another model, has replicas, differs between
                ranks, or splits a routing group or a slot class, or if the state of a layer is refused. Nothing has
                moved then.
        """
        self._refuse_if_unfit()
        self._drop()
        self._apply(placement)
        self._parts.forget_counts()

    def restore(self) -> None:
        """Move every expert back to where the job started."""
        self.apply(self._parts.in_force.first)

    @contextmanager
    def in_logical_order(self) -> Iterator[None]:
        """Put expert e in slot e of every layer for the block, so that other programs can read what it saves.

        The block saves model, optimizer and, optionally, this rebalancer. Pass the return value of an asynchronous
        save to `saving`. After the block the placement is restored, and a rebalance that is under way continues. If
        the block raises, experts stay in logical order, and `placement` shows that.
        """
        self._refuse_if_unfit()
        there = self.placement
        self._apply(self._parts.agreed.logical_order)
        yield
        self._apply(there)

    def close(self) -> None:
        """Release model and optimizers, and wait until trace and log, if recorded, are written.

        Not collective. Experts stay where they are, and later moves are refused; `state_dict` still works. If an
        adapter lends replicas, that ends: all ranks close between the same two steps.
        """
        self._is_closed = True
        self._drop()
        self._parts.background.close()
        for attached in self._attached:
            attached.remove()
        for end in self._ends:
            end()
        self._ends.clear()
        self._parts.agreed.let_go()
        self._roster.withdraw()
        self._parts.journal.close()

    def on_close(self, end: Callable[[], None]) -> None:
        """Have `close` call a function, with which an adapter ends what it has set up beside the layers.

        Args:
            end: called once, without arguments.
        """
        self._ends.append(end)

    # --- checkpoints -----------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the placement in force, the first placement and counters as tensors, by layer name.

        Save it with the model; with `torch.distributed.checkpoint`, pass the rebalancer itself next to model and
        optimizer. It can be loaded on any number of GPUs and with any split into pipeline stages. Not collective.
        """
        parts, in_force = self._parts, self._parts.in_force
        in_force.refuse_if_half_moved()
        counters = Counters(parts.iteration, parts.rebalances, parts.enabled, parts.stop_loss.strikes)
        return Saved(in_force.rows_as_known(), in_force.first, counters).to_state(parts.agreed.layer_names)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from a `state_dict`, with the model and optimizer saved along with it. Moves nothing.

        A rebalance that was under way at the save is not resumed; the next one begins as if it had ended.

        Raises:
            DistplbError: if the state has another version or belongs to another model.
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
        """Check that the state of all ranks can travel."""
        parts, agreed = self._parts, self._parts.agreed
        will_move = parts.enabled and agreed.every > 0 and not agreed.moves.dry_run
        looks = will_move and not agreed.mover.watch.may_have_skipped()
        agree(agreed.comm, {}, parts.in_force.collect_state()[1] if looks else None)

    def _is_due(self) -> bool:
        """Whether a rebalance begins at this iteration."""
        every = self._parts.agreed.every
        return every > 0 and self._parts.iteration % every == 0

    def _begin(self) -> None:
        """Begin a rebalance, or postpone it if the optimizer step of some rank may have been skipped."""
        agreed = self._parts.agreed
        self._is_postponed = not (
            agreed.moves.dry_run or is_so_on_all(agreed.comm, lambda: not agreed.mover.watch.may_have_skipped())
        )
        if not self._is_postponed:
            self._rebalance = Rebalance(self._parts)

    def _go_on(self) -> None:
        """Advance the rebalance under way as far as it may go in this iteration."""
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
        """Drop the rebalance under way. Safe at any point, because the placement between two commits is a valid one."""
        self._rebalance, self._is_postponed = None, False

    def _apply(self, placement: Placement) -> None:
        if self._parts.agreed.layer_names:
            self._parts.in_force.apply(placement, verify=self._parts.verifies)

    def _refuse_if_unfit(self) -> None:
        self._parts.in_force.refuse_if_half_moved()
        if self._is_closed:
            raise DistplbError("this Rebalancer has been closed; make a new one")
        self._parts.in_force.refuse_unknown_rows()
