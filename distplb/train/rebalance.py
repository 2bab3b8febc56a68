"""One rebalance, in the stages of docs/how-it-works.md: count, search, choose, polish, share, move.

Shapes: T steps, L layers, E experts.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from functools import cache

import torch

from distplb.core.stages import Stages
from distplb.errors import (
    DisagreementError,
    DistplbError,
    HalfMovedError,
    LostRanksError,
    UntrainedError,
    in_stage,
)
from distplb.migrate.state_agreement import AgreedState
from distplb.migrate.transfer import Limits, MoveTotals
from distplb.planning.options import PlanOptions
from distplb.planning.plan import PlanResult, StagedPlan
from distplb.train.decision import Target, decision, target_of, with_rows_of
from distplb.train.journal import Unfinished, warn
from distplb.train.observer import steps_digest
from distplb.train.options import Spread
from distplb.train.parts import Parts
from distplb.train.rebalance_event import Account

__all__ = ["Rebalance"]

_LOGGER = logging.getLogger("distplb")
_AT_ONCE = Spread(0, 0)
# Commits of a spread move are small, so that the time is checked often, but large enough that agreement costs little.
_COMMIT_BYTES = 16 << 20


class Rebalance:
    """One rebalance under way. Collective: all ranks advance it at the same iterations.

    Args:
        parts: the rebalancer's components on this rank.
    """

    def __init__(self, parts: Parts) -> None:
        self._parts, self._moves = parts, parts.agreed.moves
        self._began = self._now = self._due = parts.iteration
        self._seconds, self._resumed = 0.0, 0.0  # spent in earlier calls of `advance`; when this call began
        self._stages, self._old = Stages(), parts.in_force.placement
        self._decision, self._reason = "", ""
        self._ready: AgreedState | None = None  # the state that travels, if agreed in this iteration
        self._staying: dict[int, str] = {}
        self._moved = MoveTotals()
        self._run = self._in_stages()

    def advance(self, iteration: int) -> bool:
        """Advance as far as possible in this iteration.

        Args:
            iteration: the job's iteration.

        Returns:
            Whether the rebalance has ended.
        """
        self._now, self._resumed = iteration, time.perf_counter()
        while self._due <= iteration:
            due = next(self._run, None)
            if due is None:
                return True
            self._due = due
        self._seconds += time.perf_counter() - self._resumed
        return False

    def _in_stages(self) -> Iterator[int]:
        """Run from the window to the event; each yield is the iteration at which to continue."""
        parts, spread = self._parts, self._moves.spread
        options, error = self._measure()
        parts.rebalances += 1
        try:
            planning = self._count(options, error)  # (1)
        except DisagreementError as differing:
            parts.journal.warn_of_skipping(differing)
            parts.forget_counts()
            parts.journal.tell_of_skipping(self._began, str(differing), parts.last_applied, self._stages.seconds)
            return
        self._take_in_window(planning)
        offsets = spread or _AT_ONCE
        wait = self._beside(planning.search)  # (2)
        yield self._began + offsets.choose_after
        wait()
        planning.choose()  # (3)
        wait = self._beside(planning.polish)  # (4)
        yield self._began + offsets.share_after
        wait()
        planned = planning.share()  # (5)
        while spread is not None and not self._moves.dry_run and not parts.in_force.may_move():
            yield self._now + 1
        target = self._decide(planned, options)
        if self._decision in ("moved", "kept"):  # ranks agree on the placement even if nothing has to be moved
            yield from self._move(target)  # (6)
        self._tell(planned, options)

    # --- (1) count -------------------------------------------------------------------------------------------

    def _measure(self) -> tuple[PlanOptions, Exception | None]:
        """Share rank 0's measurements; return the options that follow from them, and an error of this rank if any."""
        parts = self._parts
        with self._stages.stage("count"):
            # A dry run prices no moves: its state may be of a kind that cannot move, which is reported at the end.
            states, error = ([], None) if self._moves.dry_run else parts.in_force.collect_state()
            slot_bytes = parts.agreed.mover.bytes_per_slot(states)
            self._measured = parts.pricer.measured(
                parts.journal.last_seconds, slot_bytes, parts.agreed.routing.ties, self._old.num_layers
            )
            # At the window's rate of steps. It may have more or fewer iterations than `every`: a rebalance is not the
            # only thing that starts a window.
            self._steps_until_next = self._measured.steps * parts.agreed.every / parts.observer.iterations
            options = parts.pricer.priced(parts.agreed.plan_options, self._old, self._measured, self._steps_until_next)
        return options, error or self._measured.error

    def _count(self, options: PlanOptions, error: Exception | None) -> StagedPlan:
        """Begin a plan with the counts of all ranks."""
        parts, agreed = self._parts, self._parts.agreed
        with self._stages.stage("count"):
            load, steps = torch.zeros(1, self._old.num_layers, agreed.num_slots, dtype=torch.int64, device="cpu"), 0
            try:
                steps = steps_digest(parts.observer.steps())
                load = parts.observer.load(parts.in_force.placement if agreed.routing.mode == "permute" else None)
            except Exception as caught:
                error = error or in_stage("count", caught)
        fields = {"the rebalancer's iteration": self._now, "the steps in the window (digest)": steps}
        return StagedPlan(load, agreed.topology, agreed.comm, options, stages=self._stages, fields=fields, error=error)

    def _take_in_window(self, planning: StagedPlan) -> None:
        """Record the window, complete the last rebalance's event with it, and start a new one."""
        parts = self._parts
        # The load is on the host by now: recording it in the background adds nothing to the training stream.
        if parts.journal.trace is not None:
            iterations = parts.observer.iterations_of_steps(self._began, self._measured.steps)
            parts.journal.trace.add(planning.load, self._old, iterations)
        parts.journal.finish(planning.load, self._measured, parts.stop_loss)
        parts.observer.clear()
        self._untrained = parts.agreed.mover.watch.untrained()

    # --- (2) to (5) ------------------------------------------------------------------------------------------

    def _beside(self, run: Callable[[], None]) -> Callable[[], None]:
        """Run in the background, or right away if the rebalance is not spread; return a function that waits for it."""
        if self._moves.spread is None:
            run()
            return lambda: None
        wait = self._parts.background.start(run)

        def timed() -> None:
            with self._stages.stage("wait"):
                wait()

        return timed

    def _decide(self, planned: PlanResult, options: PlanOptions) -> Target:
        """Decide what to do with the plan, after all ranks have agreed on the state that travels."""
        parts, agreed = self._parts, self._parts.agreed
        target = Target(planned.placement, planned.placement, (False,) * self._old.num_layers)
        why_not = ""
        try:
            self._ready = self._prepare()
        except LostRanksError:
            raise
        except DisagreementError as differing:
            self._skip(differing)
        except DistplbError as refused:
            if not self._moves.dry_run:
                raise
            why_not = f"; a move would be refused: {refused}"
        if self._decision != "skipped":
            target = target_of(
                planned,
                parts.in_force.placement,
                options,
                agreed=agreed,
                pricer=parts.pricer,
                slot_bytes=self._measured.slot_bytes,
                staying=self._staying,
            )
            self._decision, self._reason = decision(
                planned.placement,
                target,
                parts.in_force.placement,
                layer_names=agreed.layer_names,
                staying=self._staying,
                is_dry_run=self._moves.dry_run,
                strikes_out=parts.stop_loss.strikes if parts.stop_loss.is_over else 0,
            )
            self._reason += why_not
        if self._decision == "stopped":
            parts.enabled, parts.stop_loss.strikes = False, 0
            warn(f"distplb has turned rebalancing off: {self._reason}")
        self._left_alone, self._target = target.left_alone, target.placement
        return target

    def _prepare(self) -> AgreedState:
        """Agree with all ranks on the state that travels, and on the layers that stay."""
        ready = self._parts.in_force.prepared(self._stages)
        self._staying |= ready.left_out
        self._parts.journal.warn_of_staying(ready.left_out)
        return ready

    def _skip(self, differing: DisagreementError | UntrainedError) -> None:
        self._parts.journal.warn_of_skipping(differing)
        self._decision, self._reason = "skipped", str(differing)

    # --- (6) move --------------------------------------------------------------------------------------------

    def _move(self, target: Target) -> Iterator[int]:
        """Move to the target, over as many iterations as needed; commits stay in force if the rest is skipped."""
        parts, spread = self._parts, self._moves.spread
        limits = None if spread is None else Limits(1, _COMMIT_BYTES, spread.move_seconds)
        while True:
            done = self._commit(limits, target.error)
            if self._decision == "skipped":
                return
            if done is None:
                _LOGGER.info("the rebalance of iteration %d waits for an asynchronous save", self._began)
            else:
                self._moved = self._moved.plus(done)
                if parts.in_force.placement == self._target:
                    parts.last_applied = self._began
                    return
                assert spread is not None  # without limits the move is complete after one call
                # At most twice the commits that fitted: those prepared but not made have to be prepared again.
                limits = Limits(2 * done.commits, _COMMIT_BYTES, spread.move_seconds)
            yield self._now + 1
            while not parts.in_force.may_move():
                yield self._now + 1

    def _commit(self, limits: Limits | None, error: Exception | None) -> MoveTotals | None:
        """Make some commits of the move; None if nothing may move now, or the rest of the move is skipped."""
        parts = self._parts
        try:
            ready, self._ready = self._ready, None  # valid for this iteration only
            if ready is None:
                ready = self._prepare()
                self._target = with_rows_of(parts.in_force.placement, self._target, ready.left_out)
            return parts.in_force.move(
                self._target,
                ready,
                verify=parts.verifies,
                untrained=self._untrained,
                stages=self._stages,
                limits=limits,
                error=error,
            )
        except (DisagreementError, UntrainedError) as differing:
            self._skip(differing)
        except (LostRanksError, HalfMovedError):
            raise
        except DistplbError as refused:
            if self._moves.on_refusal == "raise" or not self._moved.commits:
                raise
            parts.journal.warn_of_refusal(str(refused))  # the event still reports what has moved before
            self._decision, self._reason = "skipped", str(refused)
        return None

    def _tell(self, planned: PlanResult, options: PlanOptions) -> None:
        """Report the event on this rank."""
        parts, agreed = self._parts, self._parts.agreed
        account = Account(
            iteration=self._began,
            layers=agreed.layer_names,
            topology=agreed.topology,
            old=self._old,
            planned=planned,
            target=self._target,
            left_alone=self._left_alone,
            options=options,
            model=parts.pricer.model,
            pace=self._measured.pace,
            steps_until_next=self._steps_until_next,
            router_ties=self._measured.ties,
            last_applied=parts.last_applied,
            stays=self._staying,
        )
        moved, verdict, reason, seconds = self._moved, self._decision, self._reason, self._stages.seconds
        event = cache(lambda: account.event(moved, verdict, reason, seconds))
        parts.observer.restart_clock()
        took = self._seconds + time.perf_counter() - self._resumed
        parts.journal.begin(Unfinished(event, moved.slots, self._target, self._measured.pace, took))
