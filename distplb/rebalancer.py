"""`Rebalancer`: observe, decide, plan, move. The object that a training loop holds.

Shapes: T steps, L layers, E experts, P slots, M GPUs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from distplb.bound import lower_bound
from distplb.comm.agreement import agree
from distplb.comm.base import Comm, WorldOfOne
from distplb.cost import imbalance
from distplb.errors import DistplbError, HalfMovedError
from distplb.events import RebalanceEvent
from distplb.layer import MoELayer
from distplb.load import LoadWindow
from distplb.migrate.mover import Mover, Travelling
from distplb.migrate.transfer import Move
from distplb.placement import Placement
from distplb.planner import Planned, plan_in_stages
from distplb.planning.options import SearchOptions
from distplb.stages import Stages
from distplb.topology import Topology

__all__ = ["Rebalancer"]

_STATE_VERSION = 1
_VERIFIED_BY_DEFAULT = 3  # rebalances


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
        dry_run: plan and report, but move nothing.
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
        num_candidates: int = 64,
        seed: int = 0,
        engine: str | None = None,
        dry_run: bool = False,
        verify: Literal["first", "digest", "off"] = "first",
        on_event: Callable[[RebalanceEvent], None] | None = None,
    ) -> None:
        self.enabled = True
        self._comm: Comm = WorldOfOne() if comm is None else comm
        self._topology, self._window, self._every = topology, window, every
        self._options = SearchOptions(num_candidates=num_candidates, seed=seed, engine=engine, mode="permute")
        self._dry_run, self._verify, self._on_event = dry_run, verify, on_event
        self._iteration, self._rebalances = 0, 0
        self._pending: _Pending | None = None
        self._names = tuple(layer.name for layer in layers)
        optimizers = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)
        self._mover = self._agreed_mover(layers, optimizers, gpu)
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
        if self.enabled and self._iteration % self._every == 0:
            self._rebalance()

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

    def state_dict(self) -> dict[str, Any]:
        """Placement, first placement (both by layer name) and counters, to be saved with the model."""
        self._refuse_if_poisoned()
        return {
            "version": _STATE_VERSION,
            "iteration": self._iteration,
            "rebalances": self._rebalances,
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
        self._forget_counts()

    # --- one rebalance ---------------------------------------------------------------------------------------

    def _rebalance(self) -> None:
        stages, old = Stages(), self._placement
        planned, travelling = self._plan(stages)
        events = [] if self._pending is None else [self._pending.completed(planned.load)]
        moved = None
        if not self._dry_run:
            moved = self._move(planned.placement, travelling, stages)
        self._rebalances += 1
        event = self._event(planned, old, moved, stages)
        self._pending = _Pending(event, planned.placement)
        self._window.clear()
        if self._on_event is not None:
            for told in (*events, event):
                self._on_event(told)

    def _plan(self, stages: Stages) -> tuple[Planned, Travelling]:
        with stages.stage("count"):
            # A dry run asks nothing of the optimizer: its state may be of a kind that could not be moved.
            travelling, error = ([], None) if self._dry_run else self._travelling()
            counts = self._window.load()  # [T, L, P], by the router's outputs, which are slots
            slot = self._placement.inverse[..., 0].to(counts.device)  # [L, E]
            load = counts.gather(2, slot.expand(len(counts), -1, -1))  # [T, L, E]
            if error is None and not len(load):
                error = DistplbError(
                    "the window has no steps of some layer; have each layer's forward call "
                    "window.add(index, counts) in training"
                )
        planned = plan_in_stages(
            load,
            self._topology,
            self._comm,
            replace(self._options, current=self._placement),
            stages=stages,
            fields={"the rebalancer's iteration": self._iteration},
            error=error,
        )
        return planned, travelling

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

    def _event(self, planned: Planned, old: Placement, moved: Move | None, stages: Stages) -> RebalanceEvent:
        load, placement = planned.load, planned.placement
        return RebalanceEvent(
            iteration=self._iteration,
            layers=self._names,
            steps=len(load),
            imbalance_before=_by_layer(load, old),
            imbalance_after=_by_layer(load, placement),
            imbalance_bound=tuple(lower_bound(load, self._topology, placement.num_slots).tolist()),
            imbalance_next=None,
            slots_moved=moved.slots if moved else 0,
            bytes_moved=moved.bytes if moved else 0,
            seconds=stages.seconds,
            engine=planned.engine,
            placement_digest=placement.digest(),
            dry_run=self._dry_run,
        )

    # --- what is refused -------------------------------------------------------------------------------------

    def _agreed_mover(self, layers: Sequence[MoELayer], optimizers: Sequence[Optimizer], gpu: int | None) -> Mover:
        """What moves this rank's part of the layers, once all ranks have the same layers and options."""
        error: Exception | None = None
        fields = dict.fromkeys(("the number of layers", "every", "verify", "dry_run", "the model (digest)"), 0)
        try:
            self._check_options(layers)
            mover = Mover(layers, optimizers, self._comm, self._topology, self._window.shape[2], gpu)
            verify = ("first", "digest", "off").index(self._verify)
            values = (len(layers), self._every, verify, int(self._dry_run), mover.digest())
            fields = dict(zip(fields, values, strict=True))
        except Exception as caught:
            error = caught
        agree(self._comm, fields, error)
        mover.agree_on_layouts()
        return mover

    def _check_options(self, layers: Sequence[MoELayer]) -> None:
        if not isinstance(self._every, int) or self._every < 1:
            raise DistplbError(f"every is {self._every!r}; pass iterations, at least 1")
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
        self._window.clear()
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
    """A record that waits for the next window."""

    event: RebalanceEvent
    placement: Placement

    def completed(self, load: Tensor) -> RebalanceEvent:
        return replace(self.event, imbalance_next=_by_layer(load, self.placement))


def _by_layer(load: Tensor, placement: Placement) -> tuple[float, ...]:
    return tuple(imbalance(load, placement).mean(0).tolist())
