"""`Rebalancer`: observe, decide, plan, move. The object that a training loop holds.

Shapes: T steps, L layers, E experts, P slots, M GPUs.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.optim import Optimizer

from distplb.account import Account, completed
from distplb.comm.agreement import agree, digest
from distplb.comm.base import Comm, WorldOfOne
from distplb.errors import DistplbError, HalfMovedError
from distplb.events import RebalanceEvent
from distplb.layer import MoELayer
from distplb.load import LoadWindow
from distplb.migrate.budget import within_budget
from distplb.migrate.mover import Mover, Travelling
from distplb.migrate.transfer import Move
from distplb.observer import Observer, steps_digest
from distplb.placement import Placement
from distplb.planner import Planned, plan_in_stages
from distplb.planning.options import SearchOptions
from distplb.price import MoveModel, TimeCurve
from distplb.pricer import Pricer, Told
from distplb.stages import Stages
from distplb.stoploss import Pace, StopLoss
from distplb.topology import Topology
from distplb.traces.writer import TraceWriter

__all__ = ["Rebalancer"]

_STATE_VERSION = 2
_VERIFIED_BY_DEFAULT = 3  # rebalances
# What all ranks must share from the start.
_FIELDS = (
    *("the number of layers", "every", "verify", "dry_run", "max_bytes", "stop_loss"),
    *("the model (digest)", "time_curve (digest)", "move_model (digest)"),
)


class Rebalancer:
    """Counts loads, plans a better placement every few iterations, and moves experts with their optimizer state.

    All methods but the properties are collective: all ranks of `comm` call them, in the same order. In the loop::

        loss.backward()
        optimizer.step()
        optimizer.zero_grad()  # first, because gradients that are still held travel too
        rebalancer.step()

    Experts change slots, and router rows with them, so the router's outputs stay numbers of slots, the dispatcher
    stays as it is, and the model computes what it computed before.

    Args:
        layers: the MoE layers, the same on all ranks and in the same order.
        optimizer: the one that steps on their parameters, or all of them.
        topology: of one EP group.
        comm: the ranks that hold these layers: those of the EP group, or of all EP groups side by side that hold
            copies of the same experts. None for this process alone.
        window: the counts; its layers in the order of `layers`, its experts the router's outputs. Each layer's forward
            calls `window.add(index, counts)`.
        every: iterations between rebalances.
        gpu: which GPU of its EP group this rank is; its rank in `comm` where `comm` is the EP group alone.
        num_candidates: randomised starts of each layer's search, dealt to the ranks.
        seed: of the search.
        engine: of the search; the fastest that is there where None.
        time_curve: from an expert's tokens to its time, as from `measured_curve`; what is balanced then is time.
        move_model: what tokens and moves cost, so that only what repays itself is moved. Where None and a time curve
            is there, it is measured: seconds from the curve, bytes from what travels, bandwidths by a short transfer
            before the first rebalance. Without either a moved slot has to save 2^-13 of the mean GPU's tokens, so that
            experts do not move for next to nothing.
        max_bytes: that the experts moved by one rebalance may have, with their state, over all ranks; the moves that
            save most come first. No limit where None.
        stop_loss: after so many rebalances in a row whose iterations did not become faster by what they took,
            rebalancing turns itself off (`enabled` is then False) and says so; 0 for never.
        record: folder for a trace of all windows, written by rank 0; `Trace.read` reads it.
        dry_run: plan and report, but move nothing. What travels is not looked at: moves are then free without a
            `move_model`, and `max_bytes` is of no account.
        verify: "digest" compares a checksum of every expert before and after each move; "off" does not; "first"
            does so for the first three rebalances of the job.
        on_event: called with a `RebalanceEvent` after each rebalance, and once more with the same record when the
            next window has told how the plan fared.

    Raises:
        DistplbError: on every rank, if any rank's arguments are refused or differ from the others'.
    """

    def __init__(
        self,
        layers: Sequence[MoELayer],
        optimizer: Optimizer | Sequence[Optimizer],
        *,
        topology: Topology,
        window: LoadWindow,
        every: int,
        comm: Comm | None = None,
        gpu: int | None = None,
        num_candidates: int = 16,
        seed: int = 0,
        engine: str | None = None,
        time_curve: TimeCurve | None = None,
        move_model: MoveModel | None = None,
        max_bytes: int | None = None,
        stop_loss: int = 3,
        record: str | os.PathLike[str] | None = None,
        dry_run: bool = False,
        verify: Literal["first", "digest", "off"] = "first",
        on_event: Callable[[RebalanceEvent], None] | None = None,
    ) -> None:
        self.enabled = True
        self._comm: Comm = WorldOfOne() if comm is None else comm
        self._topology, self._window, self._every = topology, window, every
        self._options = SearchOptions(
            num_candidates=num_candidates, seed=seed, engine=engine, mode="permute", time_curve=time_curve
        )
        self._max_bytes, self._stop_loss = max_bytes, StopLoss(stop_loss)
        self._dry_run, self._verify, self._on_event = dry_run, verify, on_event
        self._iteration, self._rebalances = 0, 0
        self._pending: _Pending | None = None
        self._names = tuple(layer.name for layer in layers)
        optimizers = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)
        self._mover = self._agreed_mover(layers, optimizers, gpu, move_model)
        self._observer = Observer(window, self._comm, topology, self._mover.gpu, seed)
        self._pricer = Pricer(self._observer, self._comm, topology, move_model, window.shape[0])
        is_writer = self._comm.rank == 0
        self._trace = TraceWriter(record, layers=self._names) if record is not None and is_writer else None
        self._first = self._placement = Placement.contiguous(len(layers), window.shape[2], topology.num_gpus)

    @property
    def placement(self) -> Placement:
        """The placement in force."""
        return self._placement

    @property
    def iteration(self) -> int:
        """Calls of `step` so far."""
        return self._iteration

    def step(self) -> None:
        """Call once an iteration, after `optimizer.step()`; rebalances on every `every`-th call while `enabled`.

        Raises:
            DistplbError: on every rank, if the rebalance is refused: nothing has moved then.
            HalfMovedError: if a move broke off in the middle, now or before.
        """
        self._refuse_if_poisoned()
        self._iteration += 1
        self._observer.iteration_ends()
        if self.enabled and self._iteration % self._every == 0:
            self._rebalance()
        self._observer.loop_goes_on()

    def apply(self, placement: Placement) -> None:
        """Move every expert to the slot that `placement` gives it, now. Counts so far are forgotten.

        Raises:
            DistplbError: on every rank, if the placement is of another model, has replicas or differs between
                ranks, or if the state of a layer is refused: nothing has moved then.
        """
        self._refuse_if_poisoned()
        travelling, error = self._travelling()
        try:
            self._check_placement(placement)
        except DistplbError as refused:
            error = error or refused
        self._move(placement, travelling, Stages(), error)

    def restore(self) -> None:
        """Move every expert back to where the job started from."""
        self.apply(self._first)

    def close(self) -> None:
        """Wait until the trace is written, if one is recorded. Not collective."""
        if self._trace is not None:
            self._trace.close()

    def state_dict(self) -> dict[str, Any]:
        """Placement, first placement (both by layer name) and counters, to be saved with the model."""
        self._refuse_if_poisoned()
        return {
            "version": _STATE_VERSION,
            "iteration": self._iteration,
            "rebalances": self._rebalances,
            "enabled": self.enabled,
            "strikes": self._stop_loss.strikes,
            "num_gpus": self._placement.num_gpus,
            "placement": self._by_name(self._placement),
            "first": self._by_name(self._first),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up where `state_dict` was called, with the model and optimizer as they were saved. Moves nothing.

        Raises:
            DistplbError: if the state is of another version, model or number of GPUs.
        """
        self._refuse_if_poisoned()
        if state.get("version") != _STATE_VERSION:
            raise DistplbError(f"state has version {state.get('version')}; this distplb reads {_STATE_VERSION}")
        if state["num_gpus"] != self._topology.num_gpus:
            raise DistplbError(
                f"state was saved on {state['num_gpus']} GPUs, this topology has {self._topology.num_gpus}; "
                "resume on as many"
            )
        placement, first = self._from_names(state["placement"]), self._from_names(state["first"])
        self._placement, self._first = placement, first
        self._iteration, self._rebalances = state["iteration"], state["rebalances"]
        self.enabled, self._stop_loss.strikes = state["enabled"], state["strikes"]
        self._forget_counts()

    # --- one rebalance ---------------------------------------------------------------------------------------

    def _rebalance(self) -> None:
        began, stages, old = time.perf_counter(), Stages(), self._placement
        with stages.stage("count"):
            # A dry run asks nothing of the optimizer: its state may be of a kind that could not be moved.
            travelling, error = ([], None) if self._dry_run else self._travelling()
            took = 0.0 if self._pending is None else self._pending.took
            told = self._pricer.told_by_root(took, self._mover.bytes_per_slot(travelling))
            # At the rate of the window, which may have more or fewer iterations: not all began with a rebalance.
            until_next = told.seen * self._every / self._observer.iterations
            options = self._pricer.priced(self._options, old, told, until_next)
        planned = self._plan(options, stages, error)
        if self._trace is not None:
            self._trace.add(planned.load, old, self._observer.iterations_of_steps(self._iteration, told.seen))
        events = self._completed_event(planned, told)
        target, moved = self._within_budget(planned, told.slot_bytes), None
        decision, reason = self._decision(planned, target)
        if decision in ("moved", "kept"):  # ranks agree on the placement also where nothing has to be moved
            moved = self._move(target, travelling, stages)
        self._rebalances += 1
        account = Account(
            iteration=self._iteration,
            layers=self._names,
            topology=self._topology,
            old=old,
            planned=planned,
            target=target,
            options=options,
            model=self._pricer.model,
            pace=told.pace,
            steps_until_next=until_next,
        )
        event = account.event(moved, decision, reason, stages.seconds)
        self._pending = _Pending(event, target, told.pace, time.perf_counter() - began)
        self._observer.clear()
        if self._on_event is not None:
            for record in (*events, event):
                self._on_event(record)

    def _plan(self, options: SearchOptions, stages: Stages, error: Exception | None) -> Planned:
        with stages.stage("count"):
            load, steps = torch.zeros(1, len(self._names), self._window.shape[2], dtype=torch.int64), 0
            try:
                steps = steps_digest(self._observer.steps())
                load = self._observer.load(self._placement)
            except Exception as caught:
                error = error or caught
        fields = {"the rebalancer's iteration": self._iteration, "the steps in the window (digest)": steps}
        return plan_in_stages(load, self._topology, self._comm, options, stages=stages, fields=fields, error=error)

    def _completed_event(self, planned: Planned, told: Told) -> list[RebalanceEvent]:
        """The last rebalance's record, now that a window has told how it fared; whether it repaid itself counts."""
        if self._pending is None:
            return []
        last, repaid = self._pending, None
        if last.event.slots_moved and told.pace.iterations and last.pace.iterations:
            repaid = self._stop_loss.repaid(last.pace, told.pace, told.took)
        return [completed(last.event, planned.load, last.placement, told.pace, repaid)]

    def _within_budget(self, planned: Planned, slot_bytes: int) -> Placement:
        """What of the plan is carried out."""
        if self._max_bytes is None or not slot_bytes:
            return planned.placement
        curve = self._options.time_curve
        load = planned.load if curve is None else curve.time(planned.load)
        copies = self._comm.size // self._topology.num_gpus  # EP groups side by side, each of which moves its own
        return within_budget(load, self._placement, planned.placement, self._max_bytes // (slot_bytes * copies))

    def _decision(self, planned: Planned, target: Placement) -> tuple[str, str]:
        """What is done with the plan, and why."""
        if self._dry_run:
            return "dry run", "a dry run was asked for"
        if self._stop_loss.is_over:
            reason = (
                f"{self._stop_loss.strikes} rebalances in a row did not repay themselves; set enabled to go on, or "
                "rebalance less often"
            )
            self.enabled, self._stop_loss.strikes = False, 0
            warnings.warn(f"distplb has turned rebalancing off: {reason}", RuntimeWarning, stacklevel=4)
            return "stopped", reason
        if planned.placement == self._placement:
            return "kept", "no layer has a placement that is worth its moves"
        if target == self._placement:
            return "kept", "nothing that is worth moving fits in max_bytes"
        return "moved", "the moves lower the cost by more than their price"

    def _move(
        self, placement: Placement, travelling: Travelling, stages: Stages, error: Exception | None = None
    ) -> Move | None:
        return self._mover.move(
            self._placement,
            placement,
            travelling,
            on_commit=self._take_up,
            verify=self._verify == "digest" or (self._verify == "first" and self._rebalances < _VERIFIED_BY_DEFAULT),
            stages=stages,
            error=error,
        )

    def _take_up(self, placement: Placement) -> None:
        """After each commit, so that a move that breaks off leaves the placement that is in force."""
        self._placement = placement
        self._forget_counts()

    # --- what is refused -------------------------------------------------------------------------------------

    def _agreed_mover(
        self, layers: Sequence[MoELayer], optimizers: Sequence[Optimizer], gpu: int | None, model: MoveModel | None
    ) -> Mover:
        """What moves this rank's part of the layers, once all ranks have the same layers and options."""
        error: Exception | None = None
        fields = dict.fromkeys(_FIELDS, 0)
        try:
            self._check_options(layers)
            mover = Mover(layers, optimizers, self._comm, self._topology, self._window.shape[2], gpu)
            verify = ("first", "digest", "off").index(self._verify)
            limit = -1 if self._max_bytes is None else self._max_bytes
            prices = (digest(self._options.time_curve), digest(model))
            what = (int(self._dry_run), limit, self._stop_loss.patience, mover.digest(), *prices)
            values = (len(layers), self._every, verify, *what)
            fields = dict(zip(fields, values, strict=True))
        except Exception as caught:
            error = caught
        agree(self._comm, fields, error)
        mover.agree_on_layouts()
        return mover

    def _check_options(self, layers: Sequence[MoELayer]) -> None:
        if not isinstance(self._every, int) or self._every < 1:
            raise DistplbError(f"every is {self._every!r}; pass iterations, at least 1")
        for name, value in (("max_bytes", self._max_bytes), ("stop_loss", self._stop_loss.patience)):
            if value is not None and (not isinstance(value, int) or value < 0):
                raise DistplbError(f"{name} is {value!r}; pass a whole number of at least 0")
        if self._verify not in ("first", "digest", "off"):
            raise DistplbError(f"verify is {self._verify!r}; pass 'first', 'digest' or 'off'")
        names = [layer.name for layer in layers]
        if len(set(names)) != len(names) or len(names) != self._window.shape[1]:
            raise DistplbError(
                f"{len(names)} layers of {len(set(names))} names for a window of {self._window.shape[1]}; "
                "pass each layer once, by a name of its own, and a window of as many layers"
            )
        for layer in layers:
            if not layer.experts or not layer.router:
                raise DistplbError(
                    f"{layer.name} has {len(layer.experts)} expert tensors and {len(layer.router)} router tensors; "
                    "declare all of both: what is not declared does not travel"
                )

    def _travelling(self) -> tuple[Travelling, Exception | None]:
        """All that travels now; or why it may not."""
        try:
            return self._mover.travelling(), None
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

    # --- small things ----------------------------------------------------------------------------------------

    def _refuse_if_poisoned(self) -> None:
        if self._mover.broken is not None:
            raise HalfMovedError(
                f"experts may be half moved ({self._mover.broken}); resume from the last checkpoint: "
                "none is written from here"
            )

    def _forget_counts(self) -> None:
        """Counts are by slot: those made under another placement would be credited to the wrong experts."""
        self._observer.clear()
        self._pending = None

    def _by_name(self, placement: Placement) -> dict[str, list[int]]:
        return dict(zip(self._names, placement.expert_of_slot.tolist(), strict=True))

    def _from_names(self, tables: Mapping[str, list[int]]) -> Placement:
        if set(tables) != set(self._names):
            differing = sorted(set(tables) ^ set(self._names))
            raise DistplbError(f"state and model differ in layer {differing[0]!r}; load the state of this model")
        placement = Placement(
            torch.tensor([tables[name] for name in self._names]),
            self._window.shape[2],
            self._topology.num_gpus,
        )
        self._check_placement(placement)
        return placement


@dataclass(frozen=True)
class _Pending:
    """A record that waits for the next window: the placement that it will tell of, the pace before, what it took."""

    event: RebalanceEvent
    placement: Placement
    pace: Pace
    took: float
