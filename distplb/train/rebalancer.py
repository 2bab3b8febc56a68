"""`Rebalancer`: observe, decide, plan, move. The object that a training loop holds.

Shapes: T steps, L layers, E experts, P slots, M GPUs.
"""

from __future__ import annotations

import logging
import os
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from distplb.comm.agreement import agree, digest
from distplb.comm.base import Comm, WorldOfOne, refuse_other_comm
from distplb.comm.roster import Roster
from distplb.core.arguments import plain, refuse_wrong_types, whole_number
from distplb.core.layer import MoELayer
from distplb.core.placement import Placement
from distplb.core.price import MoveModel, TimeCurve
from distplb.core.stages import Stages
from distplb.core.topology import Topology
from distplb.errors import (
    DisagreementError,
    DistplbError,
    HalfMovedError,
    LostRanksError,
    UntrainedError,
    in_stage,
)
from distplb.migrate.budget import within_budget
from distplb.migrate.mover import Mover
from distplb.migrate.optimizer_state import LayerStates
from distplb.migrate.state_agreement import AgreedState
from distplb.migrate.transfer import Limits, MoveTotals
from distplb.planning.legal import check_legal
from distplb.planning.options import SearchOptions
from distplb.planning.plan import Planned, Planning
from distplb.planning.trial import engine_for
from distplb.records.event_log import EventLog, SummaryWriter, check_log
from distplb.records.events import RebalanceEvent
from distplb.records.trace_parts import check_folder
from distplb.records.trace_writer import TraceWriter
from distplb.train.account import AS_EVEN, Account, completed
from distplb.train.async_saves import Saves
from distplb.train.background import Background
from distplb.train.checkpoint import Counters, Saved
from distplb.train.observer import Observer, steps_digest
from distplb.train.pricing import Pricer, Told
from distplb.train.routing import Routing
from distplb.train.spread import Spread
from distplb.train.stop_loss import Pace, StopLoss
from distplb.train.window import LoadWindow

__all__ = ["Rebalancer"]

_LOGGER = logging.getLogger("distplb")
_VERIFIED_BY_DEFAULT = 3  # rebalances
_AT_ONCE = Spread(0, 0)
_EVENTS = "events.jsonl"  # in the folder of a record
# Of a spread move: small commits, so that the time is looked at often, but not so small that agreeing takes longer.
_COMMIT_BYTES = 16 << 20
# What all ranks must share from the start.
_FIELDS = (
    *(
        "the number of layers",
        "every",
        "verify",
        "on_refusal (skip is 1)",
        "dry_run",
        "max_bytes",
        "stop_loss",
        "spread (digest)",
    ),
    *("the model (digest)", "time_curve (digest)", "move_model (digest)", "slot_class (digest)"),
    "the tables slot_of_expert (digest)",
)
_LOOKS = 2  # the first one may be in an iteration whose step was skipped
_SAVE_SECONDS = 1800.0  # that `apply` waits for an asynchronous save
_SAVE_PAUSE_SECONDS = 0.2  # of that, between two agreements on whether it has ended: far below any deadline


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
        comm: the ranks that hold these layers: all EP groups side by side that hold copies of the same experts, or the
            EP group where there is but one. None for this process alone.
        every: iterations between rebalances.
        window: the counts; its layers in the order of `layers`, its experts the router's outputs. Each layer's forward
            calls `window.add(index, counts)`. Where None, one is made that the layers fill (`MoELayer.counts`).
        window_steps: the most steps that such a window keeps.
        gpu: which GPU of its EP group this rank is; its rank in `comm` where `comm` is the EP group alone.
        slot_class: `[P]` integers; experts then stay in slots of their class, as of `plan`.
        num_candidates: randomised starts of each layer's search, dealt to the ranks.
        seed: of the search.
        engine: of the search, which may differ between ranks; the fastest that is there where None. `cuda`, also where
            it is asked for, compiles its kernels here, and plans a few rows of the job's own shapes. If that fails or
            differs, which is logged, this rank searches with `cpu`, and the plans are the same.
        time_curve: from an expert's tokens to its time, as from `measured_curve`; what is balanced then is time.
        move_model: what tokens and moves cost, so that only what repays itself is moved. Where None and a time curve
            is there, it is measured: seconds from the curve, bytes from what travels, bandwidths by a short transfer
            before the first rebalance. Without either a moved slot has to save 2^-13 of the mean GPU's tokens, so that
            experts do not move for next to nothing, and a layer whose GPUs are as even as chance leaves them is left
            alone.
        max_bytes: that the experts moved by one rebalance may have, with their state, over all ranks; the moves that
            save most come first. No limit where None.
        stop_loss: after so many rebalances in a row whose iterations did not become faster by what they took,
            rebalancing turns itself off (`enabled` is then False) and says so; 0 for never.
        spread: over which iterations a rebalance is spread, so that none of them takes long; all in one where None.
            Between them the placement in force is a valid one, and may be saved. Another rebalance begins when the last
            has ended.
        record: folder for a trace of all windows and a log of all events, written by rank 0 beside the training;
            `Trace.read` and `distplb report` read it. A resumed job goes on in its folder; one that holds files of a
            job of other layers, experts or GPUs is refused. In a pipeline each stage needs a folder of its own.
        summary_writer: gets imbalance, bytes, seconds and so on as scalars after each rebalance, such as
            `torch.utils.tensorboard.SummaryWriter`; that of rank 0.
        dry_run: plan and report, but move nothing; also where state and gradients could not travel, which the event's
            reason tells. Moves are free without a `move_model`, and `max_bytes` is of no account.
        verify: "digest" compares a checksum of every expert before and after each move; "off" does not; "first"
            does so for the first three rebalances of the job.
        on_refusal: what `step` does where a rebalance is refused, as for optimizer state that cannot travel: "raise"
            the error, or "skip" the rebalance with a warning and an event, so that training goes on as it is. Lost
            ranks, half moved experts and ranks that are not at the same iteration are errors either way.
        on_event: called with a `RebalanceEvent` after each rebalance, and once more with the same record when the
            next window has told how the plan fared. What it raises is logged, and does not reach the loop.

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
        window: LoadWindow | None = None,
        window_steps: int = 64,
        comm: Comm | None = None,
        gpu: int | None = None,
        slot_class: Tensor | None = None,
        num_candidates: int = 16,
        seed: int = 0,
        engine: str | None = None,
        time_curve: TimeCurve | None = None,
        move_model: MoveModel | None = None,
        max_bytes: int | None = None,
        stop_loss: int = 3,
        spread: Spread | None = None,
        record: str | os.PathLike[str] | None = None,
        summary_writer: SummaryWriter | None = None,
        dry_run: bool = False,
        verify: Literal["first", "digest", "off"] = "first",
        on_refusal: Literal["raise", "skip"] = "raise",
        on_event: Callable[[RebalanceEvent], None] | None = None,
    ) -> None:
        self.enabled = True
        refuse_other_comm(comm, moves=True)
        self._comm: Comm = WorldOfOne() if comm is None or not layers else comm
        every, window_steps, seed, max_bytes, stop_loss, gpu, dry_run = map(
            plain, (every, window_steps, seed, max_bytes, stop_loss, gpu, dry_run)
        )
        self._topology, self._every = (topology if layers else Topology(1, 1)), every
        self._given_window, self._window_steps, self._slot_class, self._seed = window, window_steps, slot_class, seed
        self._search: dict[str, Any] = {"num_candidates": num_candidates, "engine": engine, "time_curve": time_curve}
        self._max_bytes, self._stop_loss, self._spread = max_bytes, StopLoss(stop_loss), spread
        self._dry_run, self._verify, self._on_event = dry_run, verify, on_event
        self._iteration, self._rebalances, self._last_applied = 0, 0, 0
        self._under_way: Iterator[int] | None = None
        self._due = 0  # the iteration at which that goes on
        self._took, self._since = 0.0, 0.0  # its seconds in earlier calls of `step`; when it went on in this one
        self._pending: _Pending | None = None
        self._saves, self._background = Saves(), Background(self._comm.device)
        self._names: tuple[str, ...] = ()
        self._attached: list[Attached] = []
        self._is_closed = False
        self._stay = set[int]()  # layers that could not be moved when last looked at
        self._on_refusal, self._refused = on_refusal, ""  # the last reason that was told
        self._looks = _LOOKS  # at whether what is there can travel, that are left
        self._is_postponed = False  # a rebalance that is due, to the next iteration
        self._record, self._summary_writer = record, summary_writer
        self._mover = self._agreed_mover(layers, optimizer, gpu if layers else None, move_model)
        self._observer = Observer(self._window, self._comm, self._topology, self._mover.gpu, seed)
        self._pricer = Pricer(self._observer, self._comm, self._topology, move_model, self._window.shape[0])
        is_writer = self._comm.rank == 0 and bool(layers)
        self._trace, self._log = None, None
        if is_writer and record is not None:
            self._trace = TraceWriter(record, layers=self._names)
        if is_writer and (record is not None or summary_writer is not None):
            self._log = EventLog(None if record is None else Path(record) / _EVENTS, summary_writer)
        self._first = self._placement = self._start
        self._roster, self._knows_rows = self._entered()
        if self._knows_rows:
            self._mover.note(self._placement)
        self._routing.follow(None, self._placement)

    @property
    def placement(self) -> Placement:
        """The placement in force."""
        return self._placement

    @property
    def iteration(self) -> int:
        """Calls of `step` so far."""
        return self._iteration

    @property
    def last_applied(self) -> int:
        """The last iteration at which a rebalance began that was carried out, whether or not anything had to move.

        0 where none was in this process. One that stays behind `iteration` by much more than `every` tells of a
        rebalancer that goes on without doing anything: switched off, or skipped each time.
        """
        return self._last_applied

    def step(self) -> None:
        """Call once an iteration, after `optimizer.step()`; rebalances on every `every`-th call while `enabled`.

        A rebalance whose digests differ between ranks is skipped, with a warning and an event that say so. One that is
        under way, spread over iterations, is dropped when `enabled` is set to False.

        The first two calls look whether what is there can travel, so that it is not refused hours later. Where a
        backward pass has begun and no optimizer has stepped, as where a gradient scaler has skipped the step, a
        rebalance that is due waits for the next iteration.

        Raises:
            DistplbError: on every rank, if the rebalance is refused: nothing has moved then, but for what a spread one
                had moved before. Not with `on_refusal` "skip".
            LostRanksError: if ranks do not come, before anything was written.
            HalfMovedError: if a move broke off in the middle, now or before.
        """
        self._refuse_if_unfit()
        self._iteration += 1
        self._looks -= 1
        if not self._names:
            if self._looks == _LOOKS - 1:
                self._roster.warn_if_nobody_has_layers()
            return
        self._observer.iteration_ends()
        self._mover.watch.iteration_ends()
        try:
            if self._looks >= 0:
                self._look()
            if not self.enabled:
                self._drop()
            elif self._under_way is None and (self._is_postponed or self._iteration % self._every == 0):
                self._begin()
            self._go_on()
        except (LostRanksError, HalfMovedError, DisagreementError):
            raise
        except DistplbError as refused:
            if self._on_refusal == "raise":
                raise
            self._skip(str(refused))
        self._observer.loop_goes_on()

    def attach(self) -> Attached:
        """Call `step` by itself whenever the optimizers have stepped, each once; instead of calling it in the loop.

        Gradients are still held then, and travel with the experts: a quarter more bytes with AdamW.

        Returns:
            What calls it; its `remove()` ends that.
        """
        self._attached.append(Attached(self._optimizers, self.step))
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
        if self._names:
            self._saves.add(response, until)

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
        self._forget_counts()

    def restore(self) -> None:
        """Move every expert back to where the job started from."""
        self.apply(self._first)

    @contextmanager
    def in_logical_order(self) -> Iterator[None]:
        """Expert e in slot e of every layer, for a checkpoint that others can read; afterwards all is as before.

        The block saves model, optimizer and, if it likes, this rebalancer. Give `saving` what an asynchronous save
        returns. If the block raises, experts stay in logical order, and `placement` says so. A rebalance that is under
        way goes on afterwards.
        """
        self._refuse_if_unfit()
        there = self._placement
        self._apply(self._logical_order())
        yield
        self._apply(there)

    def close(self) -> None:
        """Let go of model and optimizers, and wait until trace and log are written, if they are recorded.

        Not collective. Experts stay where they are, which `state_dict` still tells; nothing moves any more.
        """
        self._is_closed = True
        self._drop()
        self._background.close()
        for attached in self._attached:
            attached.remove()
        self._let_go(self._mover)
        self._roster.withdraw()
        for writer in (self._trace, self._log):
            if writer is not None:
                writer.close()

    def state_dict(self) -> dict[str, Any]:
        """Placement in force, first placement and counters as tensors, by layer name, to be saved with the model.

        With `torch.distributed.checkpoint` the rebalancer itself is passed beside model and optimizer. It is loaded on
        any number of GPUs, and by any stages of a pipeline.
        """
        self._refuse_if_poisoned()
        counters = Counters(self._iteration, self._rebalances, self.enabled, self._stop_loss.strikes)
        return Saved(self._rows_as_known(), self._first, counters).to_state(self._names)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up where `state_dict` was called, with the model and optimizer as they were saved. Moves nothing.

        A rebalance that was under way then is not taken up; the next one begins as if it had ended.

        Raises:
            DistplbError: if the state is of another version or model.
        """
        self._refuse_if_poisoned()
        if not self._names:
            return
        saved = Saved.from_state(state, self._names, self._window.shape[2], self._topology.num_gpus)
        for placement in (saved.placement, saved.first):  # as legal as `in_logical_order` and `restore` will need it
            check_legal(placement, self._logical_order(), self._routing.num_groups, self._slot_class)
        self._drop()
        self._placement, self._first = saved.placement, saved.first
        self._iteration, self._rebalances, self.enabled, self._stop_loss.strikes = saved.counters
        self._routing.follow(None, self._placement)
        self._mover.note(self._placement)
        self._knows_rows = True
        self._forget_counts()

    def _look(self) -> None:
        """Whether what is there can travel, on all ranks."""
        is_told = self.enabled and not self._dry_run and not self._mover.watch.may_have_skipped()
        agree(self._comm, {}, self._held()[1] if is_told else None)

    def _skip(self, reason: str) -> None:
        """A rebalance that is refused before anything has moved, where training goes on."""
        self._warn_of_refusal(reason)
        self._forget_counts()
        self._tell_of_skipping(self._iteration, reason, {})

    # --- one rebalance ---------------------------------------------------------------------------------------

    def _go_on(self) -> None:
        """With the rebalance under way, as far as it may go in this iteration."""
        self._since = time.perf_counter()
        try:
            while self._under_way is not None and self._due <= self._iteration:
                due = next(self._under_way, None)
                if due is None:
                    self._under_way = None
                else:
                    self._due = due
        except BaseException:
            self._under_way = None
            raise
        self._took += time.perf_counter() - self._since

    def _begin(self) -> None:
        """A rebalance, unless some rank cannot tell whether its step has been skipped."""
        self._is_postponed = not (self._dry_run or self._agreed(lambda: not self._mover.watch.may_have_skipped()))
        if not self._is_postponed:
            self._under_way, self._due, self._took = self._rebalance(), self._iteration, 0.0

    def _drop(self) -> None:
        """The rebalance under way, wherever it is: between two commits every placement is as good as another."""
        self._under_way, self._is_postponed = None, False

    def _rebalance(self) -> Iterator[int]:
        """One rebalance, from the window to the event; each time it yields the iteration at which it goes on."""
        stages, old, began = Stages(), self._placement, self._iteration
        decision, reason, would_be = "", "", ""
        spread = self._spread or _AT_ONCE
        with stages.stage("count"):
            # A dry run prices no moves: state may be of a kind that could not be moved, which is told at the end.
            held, error = ([], None) if self._dry_run else self._held()
            took = 0.0 if self._pending is None else self._pending.took
            slot_bytes = self._mover.bytes_per_slot(held)
            told = self._pricer.told_by_root(took, slot_bytes, self._routing.ties, len(self._names))
            error = error or told.error
            # At the rate of the window, which may have more or fewer iterations: not all began with a rebalance.
            until_next = told.seen * self._every / self._observer.iterations
            options = self._pricer.priced(self._options, old, told, until_next)
        self._rebalances += 1
        try:
            planning = self._counted(options, stages, error)
        except DisagreementError as differing:
            self._warn_of_skipping(differing)
            self._forget_counts()
            self._tell_of_skipping(began, str(differing), stages.seconds)
            return
        # On the host from here on: what is written down beside the training must not get into its stream.
        if self._trace is not None:
            self._trace.add(planning.load, old, self._observer.iterations_of_steps(began, told.seen))
        self._complete_event(planning.load, told)
        self._observer.clear()
        untrained = self._mover.watch.untrained()
        searched = self._beside(planning.search)
        yield began + spread.choose_after
        searched(stages)
        planning.choose()
        polished = self._beside(planning.polish)
        yield began + spread.share_after
        polished(stages)
        planned = planning.share()
        while self._spread is not None and not self._dry_run and not self._may_go_on():
            yield self._iteration + 1
        wanted, moved = _Wanted(planned.placement, planned.placement, (False,) * len(self._names)), MoveTotals()
        ready: AgreedState | None = None
        stays: dict[int, str] = {}
        try:
            ready = self._prepared(stages)
            stays |= ready.left_out
            self._warn_of_staying(ready.left_out)
        except LostRanksError:
            raise
        except DisagreementError as differing:
            self._warn_of_skipping(differing)
            decision, reason = "skipped", str(differing)
        except DistplbError as refused:
            if not self._dry_run:
                raise
            would_be = f"; it would be refused: {refused}"
        if decision != "skipped":
            wanted = self._wanted(planned, old, options, told.slot_bytes, stays)
            decision, reason = self._decision(planned, wanted, stays)
            reason += would_be
        target = wanted.target
        limits = None if self._spread is None else Limits(1, _COMMIT_BYTES, spread.move_seconds)
        while decision in ("moved", "kept"):  # ranks agree on the placement also where nothing has to be moved
            try:
                if ready is None:
                    ready = self._prepared(stages)
                    stays |= ready.left_out
                    self._warn_of_staying(ready.left_out)
                    target = _with_rows_of(self._placement, target, ready.left_out)
                done = self._move(target, ready, stages, limits, untrained, wanted.error)
            except (DisagreementError, UntrainedError) as differing:
                self._warn_of_skipping(differing)
                decision, reason = "skipped", str(differing)
                break
            except (LostRanksError, HalfMovedError):
                raise
            except DistplbError as refused:
                if self._on_refusal == "raise" or not moved.commits:
                    raise
                self._warn_of_refusal(str(refused))  # what has moved before is told
                decision, reason = "skipped", str(refused)
                break
            ready = None  # the training goes on before there is another
            if done is None:
                _LOGGER.info("the rebalance of iteration %d waits for an asynchronous save", began)
                yield self._iteration + 1
                while not self._may_go_on():
                    yield self._iteration + 1
                continue
            moved = moved.plus(done)
            if self._placement == target:
                self._last_applied = began
                break
            # Twice as many as there was time for: what is made ready and not done is made ready again.
            limits = Limits(2 * done.commits, _COMMIT_BYTES, spread.move_seconds)
            yield self._iteration + 1
            while not self._may_go_on():
                yield self._iteration + 1
        account = Account(
            iteration=began,
            layers=self._names,
            topology=self._topology,
            old=old,
            planned=planned,
            target=target,
            left_alone=wanted.left_alone,
            options=options,
            model=self._pricer.model,
            pace=told.pace,
            steps_until_next=until_next,
            router_ties=told.ties,
            last_applied=self._last_applied,
            stays=stays,
        )
        event = cache(lambda: account.event(moved, decision, reason, stages.seconds))
        self._observer.restart_clock()
        took = self._took + time.perf_counter() - self._since
        self._pending = _Pending(event, moved.slots, target, told.pace, took)
        self._tell(event)

    def _counted(self, options: SearchOptions, stages: Stages, error: Exception | None) -> Planning:
        """The plan, begun with the counts of all ranks."""
        with stages.stage("count"):
            load, steps = torch.zeros(1, len(self._names), self._window.shape[2], dtype=torch.int64, device="cpu"), 0
            try:
                steps = steps_digest(self._observer.steps())
                load = self._observer.load(self._placement if self._routing.mode == "permute" else None)
            except Exception as caught:
                error = error or in_stage("count", caught)
        fields = {"the rebalancer's iteration": self._iteration, "the steps in the window (digest)": steps}
        return Planning(load, self._topology, self._comm, options, stages=stages, fields=fields, error=error)

    def _beside(self, run: Callable[[], None]) -> Callable[[Stages], None]:
        """Run it beside the training, or at once where the rebalance is not spread; what waits for its end."""
        if self._spread is None:
            run()
            return lambda stages: None
        wait = self._background.start(run)

        def timed(stages: Stages) -> None:
            with stages.stage("wait"):
                wait()

        return timed

    def _complete_event(self, load: Tensor, told: Told) -> None:
        """The last rebalance's record, now that a window has told how it fared; whether it repaid itself counts."""
        if self._pending is None:
            return
        last, repaid, self._pending = self._pending, None, None
        if last.slots_moved and told.pace.iterations and last.pace.iterations:
            repaid = self._stop_loss.repaid(last.pace, told.pace, told.took)
        self._tell(lambda: completed(last.event(), load, last.placement, told.pace, repaid))

    def _tell_of_skipping(self, iteration: int, reason: str, seconds: dict[str, float]) -> None:
        skipped = RebalanceEvent(
            iteration=iteration,
            layers=self._names,
            decision="skipped",
            reason=reason,
            seconds=seconds,
            last_applied=self._last_applied,
        )
        self._tell(lambda: skipped)

    def _tell(self, event: Callable[[], RebalanceEvent]) -> None:
        """Whoever listens on this rank. Making the record takes longer than all else here; the log does it beside."""
        if self._on_event is not None:
            try:
                self._on_event(event())
            except Exception:  # nobody's training ends because of a figure
                _LOGGER.exception("on_event failed at iteration %d; training goes on", self._iteration)
        if self._log is not None:
            self._log.take(event)

    def _may_go_on(self) -> bool:
        """Whether all saves have ended, and no step may have been skipped, on any rank; all wait for it together."""
        return self._agreed(lambda: self._saves.have_ended() and not self._mover.watch.may_have_skipped())

    def _agreed(self, question: Callable[[], bool]) -> bool:
        """Whether it is so on all ranks."""
        is_so, error = False, None
        try:
            is_so = question()
        except Exception as caught:  # such as of a future of the user's own
            error = in_stage("move", caught)
        return bool(agree(self._comm, {}, error, minimum=[int(is_so)])[0])

    def _warn_of_refusal(self, reason: str) -> None:
        """What is told again and again is warned of once."""
        if reason != self._refused:
            warnings.warn(f"distplb has skipped a rebalance: {reason}", RuntimeWarning, stacklevel=5)
        self._refused = reason

    def _warn_of_skipping(self, differing: DisagreementError | UntrainedError) -> None:
        """Ranks that counted or planned differently keep training; where they differ in more, they must not."""
        if isinstance(differing, DisagreementError) and not differing.field.endswith("(digest)"):
            raise differing
        warnings.warn(f"distplb has skipped a rebalance: {differing}", RuntimeWarning, stacklevel=5)

    def _wanted(
        self, planned: Planned, old: Placement, options: SearchOptions, slot_bytes: int, stays: Mapping[int, str]
    ) -> _Wanted:
        """What of the plan is carried out: what is worth it, can move, and fits in the budget."""
        worth, left_alone = planned.placement, (False,) * len(self._names)
        try:
            worth, left_alone = self._pricer.worth(planned, old, options)
            worth = _with_rows_of(self._placement, worth, stays)
            if self._max_bytes is None or not slot_bytes:
                return _Wanted(worth, worth, left_alone)
            curve = self._options.time_curve
            load = planned.load if curve is None else curve.time(planned.load)
            copies = self._comm.size // self._topology.num_gpus  # EP groups side by side, each of which moves its own
            most = self._max_bytes // (slot_bytes * copies)
            target = within_budget(load, self._placement, worth, most, self._routing.num_groups)
            return _Wanted(worth, target, left_alone)
        except Exception as failed:  # the other ranks are at the agreement of the move by then
            return _Wanted(worth, worth, left_alone, in_stage("move", failed))

    def _decision(self, planned: Planned, wanted: _Wanted, stays: Mapping[int, str]) -> tuple[str, str]:
        """What is done with the plan, and why."""
        if self._dry_run:
            if not stays:
                return "dry run", "a dry run was asked for"
            return "dry run", f"a dry run was asked for; {self._told_of_staying(stays)}"
        if self._stop_loss.is_over:
            reason = (
                f"{self._stop_loss.strikes} rebalances in a row did not repay themselves; set enabled to go on, or "
                "rebalance less often"
            )
            self.enabled, self._stop_loss.strikes = False, 0
            warnings.warn(f"distplb has turned rebalancing off: {reason}", RuntimeWarning, stacklevel=5)
            return "stopped", reason
        if planned.placement == self._placement:
            return "kept", "no layer has a placement that is worth its moves"
        if len(stays) == len(self._names):
            return "skipped", self._told_of_staying(stays)
        more = f"; {self._told_of_staying(stays)}" if stays else ""
        if wanted.worth == self._placement and any(wanted.left_alone):
            return "kept", f"{AS_EVEN}, in every layer that would have moved{more}"
        if wanted.target == self._placement:
            why = "nothing else is worth its moves" if stays else "nothing that is worth moving fits in max_bytes"
            return "kept", why + more
        return "moved", "the moves lower the cost by more than their price" + more

    def _told_of_staying(self, stays: Mapping[int, str]) -> str:
        """Of layers that stay, which they are, and why the first does."""
        names = [self._names[layer] for layer in sorted(stays)]
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        return f"{names[0]}{more} could not be moved: {stays[min(stays)]}"

    def _prepared(self, stages: Stages) -> AgreedState:
        """What travels, agreed on by all ranks."""
        with stages.stage("move"):
            error: Exception | None = None
            held: LayerStates = []
            try:
                self._before_a_move()
                held = self._mover.collect_state()
            except Exception as refused:
                error = in_stage("move", refused)
            return self._mover.prepare(held, error)

    def _warn_of_staying(self, left_out: Mapping[int, str]) -> None:
        """Once for each layer, when it begins to stay."""
        newly = {layer: why for layer, why in left_out.items() if layer not in self._stay}
        self._stay = set(left_out)
        if newly:
            warnings.warn(f"distplb: {self._told_of_staying(newly)}", RuntimeWarning, stacklevel=5)

    def _apply(self, placement: Placement) -> None:
        if not self._names:
            return
        untrained = self._mover.watch.untrained() if self._observer.seen else [False] * len(self._names)
        moved: MoveTotals | None = None
        while moved is None:
            self._wait_for_saves(placement)
            ready, error = self._prepared(Stages()), None
            stay = {layer: why for layer, why in ready.left_out.items() if _changes(self._placement, placement, layer)}
            if stay:
                error = DistplbError(self._told_of_staying(stay))
            moved = self._move(placement, ready, Stages(), None, untrained, error)

    def _wait_for_saves(self, placement: Placement) -> None:
        """Until those of all ranks have ended, unless the placement is refused.

        All look again at once while a save is being written, so that nobody waits for another's at a collective, and
        all give up when the first of them does.
        """
        until = time.monotonic() + _SAVE_SECONDS
        error: Exception | None = None
        have_ended = False
        while not have_ended:
            try:
                self._check_placement(placement)
                mine = self._saves.have_ended(_SAVE_PAUSE_SECONDS)
                if not mine and time.monotonic() > until:
                    error = DistplbError(
                        f"an asynchronous save has not ended in {_SAVE_SECONDS:.0f} s, and nothing may move before it "
                        "has; look for what holds it up"
                    )
            except Exception as refused:
                mine, error = False, in_stage("move", refused)
            have_ended = bool(agree(self._comm, {}, error, minimum=[int(mine)])[0])

    def _move(
        self,
        placement: Placement,
        ready: AgreedState,
        stages: Stages,
        limits: Limits | None = None,
        untrained: Sequence[bool] = (),
        error: Exception | None = None,
    ) -> MoveTotals | None:
        """The one way to another placement, so that none is ever in force that breaks a rule.

        Args:
            placement: wanted.
            ready: what travels, as agreed now.
            stages: receives the seconds.
            limits: of what is done at once.
            untrained: by layer, whether no gradient came to what this rank holds of it while its tokens were counted.
            error: why this rank does not go on; all ranks then raise it.

        Returns:
            None where nothing was done, because the save of some rank has not ended.
        """
        may_move = True
        try:
            self._check_placement(placement)
            self._routing.check_tables(self._placement)
            self._roster.refuse_others()
            may_move = self._saves.have_ended()
        except Exception as refused:
            error = error or in_stage("move", refused)
        return self._mover.move(
            self._placement,
            placement,
            ready,
            node_of_rank=self._observer.node_of_rank,
            on_commit=self._take_up,
            verify=self._verify == "digest" or (self._verify == "first" and self._rebalances <= _VERIFIED_BY_DEFAULT),
            stages=stages,
            error=error,
            limits=limits,
            untrained=untrained,
            may_move=may_move,
        )

    def _before_a_move(self) -> None:
        """For a framework whose parameters have to be made whole first."""

    def _take_up(self, placement: Placement) -> None:
        """After each commit, so that a move that breaks off leaves the placement that is in force."""
        self._routing.follow(self._placement, placement)
        if self._routing.mode == "permute":
            self._observer.follow(self._placement, placement)
        self._placement = placement
        self._mover.note(placement)

    # --- what is refused -------------------------------------------------------------------------------------

    def _agreed_mover(
        self,
        layers: Sequence[MoELayer],
        optimizer: Optimizer | Sequence[Optimizer],
        gpu: int | None,
        model: MoveModel | None,
    ) -> Mover:
        """What moves this rank's part of the layers, once all ranks have the same layers and options."""
        error: Exception | None = None
        fields = dict.fromkeys(_FIELDS, 0)
        mover: Mover | None = None
        try:
            self._check_types(layers, optimizer, gpu, model)
            self._names = tuple(layer.name for layer in layers)
            self._check_options(layers)
            optimizers = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)
            self._optimizers = optimizers
            self._routing = Routing(layers)
            self._window = self._checked_window(layers)
            if layers:
                self._window.name_layers(self._names)
            num_slots = self._window.shape[2]
            self._options = SearchOptions(
                mode=self._routing.mode,
                num_groups=self._routing.num_groups,
                slot_class=self._slot_class,
                seed=self._seed,
                **self._search,
            )
            self._options.check(self._topology, len(layers), num_slots)
            self._slot_class = self._options.slot_class
            self._start = self._routing.start(self._logical_order())
            check_legal(self._start, self._logical_order(), self._routing.num_groups, self._slot_class)
            self._try_engine()
            self._check_record()
            mover = Mover(layers, optimizers, self._comm, self._topology, num_slots, gpu, self._routing.num_groups)
            verify = ("first", "digest", "off").index(self._verify)
            limit = -1 if self._max_bytes is None else self._max_bytes
            classes = None if self._slot_class is None else torch.as_tensor(self._slot_class, device="cpu").tolist()
            prices = (digest(self._options.time_curve), digest(model), digest(classes), self._start.digest())
            what = (int(self._dry_run), limit, self._stop_loss.patience, digest(self._spread), mover.digest(), *prices)
            values = (len(layers), self._every, verify, int(self._on_refusal == "skip"), *what)
            fields = dict(zip(fields, values, strict=True))
        except Exception as caught:
            error = caught
        try:
            agree(self._comm, fields, error)
            assert mover is not None
            mover.agree_on_layouts()
        except BaseException:
            self._let_go(mover)
            raise
        return mover

    def _try_engine(self) -> None:
        """Compile what rebalances will run, and see that it plans right, while nobody waits for this rank in one."""
        kept, num_layers, num_slots = self._window.shape
        device = self._window.steps().device if isinstance(self._comm, WorldOfOne) else self._comm.device
        options = replace(self._options, current=self._start, move_price=1.0)
        steps = min(kept, self._every) if num_layers else 0  # with one micro-batch; of several there are more
        while steps:
            engine_for(options, self._topology, (steps, num_layers, num_slots), device)
            steps = min(kept, 2 * steps) if steps < kept else 0

    def _check_record(self) -> None:
        """By the rank that writes it, before the others are told: nothing of another job is in the folder."""
        if self._record is None or self._comm.rank or not self._names:
            return
        folder = Path(self._record)
        if folder.exists() and not folder.is_dir():
            raise DistplbError(f"record: {folder} is a file; pass a folder")
        job = (self._names, self._window.shape[2], self._topology.num_gpus)
        try:
            check_folder(folder, *job)
            check_log(folder / _EVENTS, *job)
        except DistplbError as refused:
            raise DistplbError(f"record: {refused}") from refused
        except OSError:  # what cannot be read cannot be written either, which is warned of then and ends no training
            return

    def _entered(self) -> tuple[Roster, bool]:
        """This communicator's entry among the job's; and whether it is known on all ranks where the rows are."""
        error: Exception | None = None
        knows_rows = False
        roster = Roster(self._comm, self._names)
        try:
            roster.enter()
            start = self._start.expert_of_slot.tolist()
            knows_rows = all(
                row in (None, tuple(own)) for row, own in zip(self._mover.inherited_rows(), start, strict=True)
            )
        except Exception as caught:
            error = caught
        try:
            (everywhere,) = agree(self._comm, {}, error, minimum=[int(knows_rows)])
        except BaseException:
            self._let_go(self._mover)
            raise
        return roster, bool(everywhere)

    def _let_go(self, mover: Mover | None) -> None:
        """Of the model and the optimizers."""
        if hasattr(self, "_routing"):
            self._routing.close()
        if mover is not None:
            mover.close()

    def _check_types(
        self,
        layers: Sequence[MoELayer],
        optimizer: Optimizer | Sequence[Optimizer],
        gpu: int | None,
        model: MoveModel | None,
    ) -> None:
        whole = "a whole number"
        refuse_wrong_types(
            {
                "layers": (layers, (Sequence,), "a list of MoELayers"),
                "optimizer": (optimizer, (Optimizer, Sequence), "the optimizer, or a list of all"),
                "topology": (self._topology, (Topology,), "a Topology, such as Topology.from_env()"),
                "window": (self._given_window, (LoadWindow, None), "a LoadWindow"),
                "window_steps": (self._window_steps, (int,), whole),
                "seed": (self._seed, (int,), whole),
                "gpu": (gpu, (int, None), "this rank's number in its EP group"),
                "move_model": (model, (MoveModel, None), "a MoveModel"),
                "spread": (self._spread, (Spread, None), "a Spread"),
                "record": (self._record, (str, os.PathLike, None), "the path of a folder"),
                "dry_run": (self._dry_run, (bool,), "True or False"),
                "on_event": (self._on_event, (Callable, None), "a function"),
            }
        )
        several = [] if isinstance(optimizer, Optimizer) else optimizer
        refuse_wrong_types({f"layers[{n}]": (one, (MoELayer,), "a MoELayer") for n, one in enumerate(layers)})
        refuse_wrong_types({f"optimizer[{n}]": (one, (Optimizer,), "an optimizer") for n, one in enumerate(several)})

    def _check_options(self, layers: Sequence[MoELayer]) -> None:
        whole_number("every", self._every, 1, "iterations, at least 1")
        for name, value in (("max_bytes", self._max_bytes), ("stop_loss", self._stop_loss.patience)):
            if name == "stop_loss" or value is not None:
                whole_number(name, value, least=0)
        if self._verify not in ("first", "digest", "off"):
            raise DistplbError(f"verify is {self._verify!r}; pass 'first', 'digest' or 'off'")
        if self._on_refusal not in ("raise", "skip"):
            raise DistplbError(f"on_refusal is {self._on_refusal!r}; pass 'raise' or 'skip'")
        if self._spread is not None and self._spread.share_after >= self._every:
            raise DistplbError(
                f"a rebalance is spread over {self._spread.share_after} iterations and more, and one begins every "
                f"{self._every}; pass a smaller share_after or rebalance less often"
            )
        names = [layer.name for layer in layers]
        if len(set(names)) != len(names):
            raise DistplbError(
                f"{len(names)} layers of {len(set(names))} names; pass each layer once, by a name of its own"
            )

    def _checked_window(self, layers: Sequence[MoELayer]) -> LoadWindow:
        window = self._given_window
        if window is None:
            return self._routing.window(self._window_steps, self._seed)
        if layers and len(layers) != window.shape[1]:
            raise DistplbError(
                f"{len(layers)} layers for a window of {window.shape[1]}; pass a window of as many layers"
            )
        if not layers:
            return self._routing.window(1, 0)
        self._routing.subscribe()
        return window

    def _held(self) -> tuple[LayerStates, Exception | None]:
        """All that goes with the experts of this rank now; or why it may not travel."""
        try:
            return self._mover.collect_state(), None
        except Exception as refused:
            return [], refused

    def _check_placement(self, placement: Placement) -> None:
        if placement.has_replicas:
            raise DistplbError(
                f"the placement has {placement.num_slots} slots for {placement.num_experts} experts; replicas cannot "
                "be trained yet, because their gradients are not added up: pass one with a slot for each expert"
            )
        for what in ("num_layers", "num_experts", "num_gpus"):
            found, wanted = getattr(placement, what), getattr(self._placement, what)
            if found != wanted:
                raise DistplbError(f"the placement has {what} {found}, the model {wanted}; pass one of this model")
        check_legal(placement, self._placement, self._routing.num_groups, self._slot_class)

    # --- small things ----------------------------------------------------------------------------------------

    def _refuse_if_unfit(self) -> None:
        self._refuse_if_poisoned()
        if self._is_closed:
            raise DistplbError("this Rebalancer has been closed, and moves nothing any more; make a new one")
        self._refuse_unknown_rows()

    def _rows_as_known(self) -> Placement:
        """The placement in force; while it has not been loaded, as the rebalancer before this one has left the rows."""
        if self._knows_rows:
            return self._placement
        rows = [
            left or own
            for left, own in zip(self._mover.inherited_rows(), self._start.expert_of_slot.tolist(), strict=True)
        ]
        return Placement(torch.tensor(rows, device="cpu"), self._start.num_experts, self._start.num_gpus)

    def _refuse_unknown_rows(self) -> None:
        if not self._knows_rows:
            raise DistplbError(
                f"the rows of {self._names[0]} were moved by another Rebalancer of this process, and may have been put "
                "elsewhere since; pass the state that belongs to them to load_state_dict(): that one's state_dict(), "
                "or what was saved with the weights. Its restore() and close(), before this one is made, also do"
            )

    def _refuse_if_poisoned(self) -> None:
        if self._mover.broken is not None:
            raise HalfMovedError(
                f"experts may be half moved ({self._mover.broken}); resume from the last checkpoint: "
                "none is written from here"
            )

    def _forget_counts(self) -> None:
        """Counts, and how the last plan fared: neither is what was planned for."""
        self._observer.clear()
        self._pending = None

    def _logical_order(self) -> Placement:
        return Placement.contiguous(len(self._names), self._window.shape[2], self._topology.num_gpus)


class Attached:
    """Calls a rebalancer's step whenever all of its optimizers have stepped."""

    def __init__(self, optimizers: Sequence[Optimizer], step: Callable[[], None]) -> None:
        self._all, self._stepped, self._step = {id(optimizer) for optimizer in optimizers}, set[int](), step
        self._handles = [optimizer.register_step_post_hook(self._note) for optimizer in optimizers]

    def remove(self) -> None:
        """Call it no more."""
        for handle in self._handles:
            handle.remove()

    def _note(self, optimizer: Optimizer, *_: Any) -> None:
        self._stepped.add(id(optimizer))
        if self._stepped == self._all:
            self._stepped.clear()
            self._step()


def _changes(old: Placement, new: Placement, layer: int) -> bool:
    """Whether the layer is another one in a placement that may be of another model."""
    return layer >= new.num_layers or not torch.equal(old.expert_of_slot[layer], new.expert_of_slot[layer])


def _with_rows_of(other: Placement, placement: Placement, layers: Collection[int]) -> Placement:
    """The placement, with some layers as the other one has them."""
    if not layers:
        return placement
    table, some = placement.expert_of_slot.clone(), sorted(layers)
    table[some] = other.expert_of_slot[some]
    return Placement(table, placement.num_experts, placement.num_gpus)


@dataclass(frozen=True)
class _Wanted:
    """Of a plan, what is worth its moves, and the part of it that is carried out; or why this rank cannot tell."""

    worth: Placement
    target: Placement
    left_alone: tuple[bool, ...]  # by layer, because its GPUs are as even as chance leaves them
    error: Exception | None = None


@dataclass(frozen=True)
class _Pending:
    """A record that waits for the next window: the placement that it will tell of, the pace before, what it took."""

    event: Callable[[], RebalanceEvent]
    slots_moved: int
    placement: Placement
    pace: Pace
    took: float
