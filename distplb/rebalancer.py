"""`Rebalancer`: observe, decide, plan, move. The object that a training loop holds.

Shapes: T steps, L layers, E experts, P slots, M GPUs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from distplb.comm.agreement import agree
from distplb.comm.base import Comm, WorldOfOne
from distplb.cost import imbalance, lower_bound
from distplb.errors import DistplbError, HalfMovedError
from distplb.events import RebalanceEvent
from distplb.layer import MoELayer
from distplb.load import LoadWindow
from distplb.migrate.checksum import expert_checksums
from distplb.migrate.state import RowTensor, Traveller, check_known, row_tensors, travellers
from distplb.migrate.transfer import Move, agreed_layouts
from distplb.placement import Placement
from distplb.planner import Planned, PlanOptions, plan_in_stages
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
        rebalancer.step()
        optimizer.zero_grad()

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
        self._optimizers = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)
        self._options = PlanOptions(num_candidates=num_candidates, seed=seed, engine=engine)
        self._dry_run, self._verify, self._on_event = dry_run, verify, on_event
        self._iteration, self._rebalances = 0, 0
        self._poison: str | None = None
        self._pending: _Pending | None = None
        self._names = tuple(layer.name for layer in layers)
        self._tensors = self._agreed_tensors(layers, gpu)
        self._layouts = agreed_layouts(self._tensors, window.shape[2], self._comm)
        self._placement = Placement.contiguous(len(layers), window.shape[2], topology.num_gpus)
        self._first = self._placement
        self._backward = _BackwardWatch(self._tensors, self._optimizers)

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
        self._forget_counts()

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

    def _plan(self, stages: Stages) -> tuple[Planned, list[list[Traveller]]]:
        with stages.stage("count"):
            travelling, error = self._travelling()
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
        self,
        placement: Placement,
        travelling: list[list[Traveller]],
        stages: Stages,
        error: Exception | None = None,
    ) -> Move | None:
        """Move to `placement`, unless `error` or what it takes is refused; returns what was done, None if nothing."""
        fields = {"the placement (digest)": 0, "what travels with the experts (digest)": 0}
        move: Move | None = None
        with stages.stage("move"):
            if error is None:
                try:
                    layers = list(zip(self._tensors, self._layouts, travelling, strict=True))
                    move = Move(self._placement, placement, layers, self._comm)
                    fields = dict(zip(fields, (placement.digest(), _digest_of(travelling)), strict=True))
                except Exception as caught:
                    error = caught
            agree(self._comm, fields, error)
        if move is None or not move.slots:
            return None
        verify = self._verify == "digest" or (self._verify == "first" and self._rebalances < _VERIFIED_BY_DEFAULT)
        before = self._checksums(travelling, stages) if verify else None
        self._poison = "a move was interrupted"
        try:
            with stages.stage("move"):
                move.run(self._record)
            if before is not None:
                self._compare(before, travelling, stages)
        except HalfMovedError as broken:
            self._poison = str(broken)
            raise
        except DistplbError:
            self._poison = None  # refused before anything of that commit was written
            raise
        self._poison = None
        return move

    def _record(self, placement: Placement) -> None:
        self._placement = placement

    def _checksums(self, travelling: list[list[Traveller]], stages: Stages) -> Tensor:
        """`[L, E]`: of every expert, where it is now."""
        with stages.stage("verify"):
            tensors = list(zip(self._tensors, travelling, strict=True))
            return expert_checksums(tensors, self._placement, self._comm)

    def _compare(self, before: Tensor, travelling: list[list[Traveller]], stages: Stages) -> None:
        wrong = before.ne(self._checksums(travelling, stages)).nonzero()
        if len(wrong):
            layer, expert = wrong[0].tolist()
            raise HalfMovedError(
                f"after the move, expert {expert} of {self._names[layer]} is not what it was ({len(wrong)} such); "
                "resume from the last checkpoint with the rebalancer disabled, and report this"
            )

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

    # --- what travels, and what is refused -------------------------------------------------------------------

    def _agreed_tensors(self, layers: Sequence[MoELayer], gpu: int | None) -> list[list[RowTensor]]:
        """By layer, the declared tensors of this rank, once all ranks have the same."""
        error: Exception | None = None
        fields = dict.fromkeys(("the number of layers", "every", "verify", "dry_run", "the model (digest)"), 0)
        found: list[list[RowTensor]] = []
        try:
            gpu = self._checked_gpu(gpu)
            self._check_options(layers)
            slots_per_gpu = self._topology.slots_per_gpu(self._window.shape[2])
            found = [row_tensors(layer, gpu, slots_per_gpu, self._topology.num_gpus) for layer in layers]
            for tensors in found:
                check_known(tensors, self._optimizers)
            model = _digest([(t.name, str(t.tensor.dtype), t.row) for tensors in found for t in tensors])
            verify = ("first", "digest", "off").index(self._verify)
            values = (len(layers), self._every, verify, int(self._dry_run), model)
            fields = dict(zip(fields, values, strict=True))
        except Exception as caught:
            error = caught
        agree(self._comm, fields, error)
        return found

    def _checked_gpu(self, gpu: int | None) -> int:
        num_gpus, size = self._topology.num_gpus, self._comm.size
        if size % num_gpus:
            raise DistplbError(
                f"the topology has {num_gpus} GPUs, the communicator {size} ranks; pass a topology whose GPUs are "
                "the ranks of one EP group, and a communicator of one or more whole EP groups"
            )
        if gpu is None and size != num_gpus:
            raise DistplbError(
                f"{size} ranks hold {size // num_gpus} copies of the experts of {num_gpus} GPUs; pass gpu=, "
                "this rank's number in its EP group"
            )
        gpu = self._comm.rank if gpu is None else gpu
        if not 0 <= gpu < num_gpus:
            raise DistplbError(f"gpu is {gpu}; pass this rank's number in its EP group, 0 to {num_gpus - 1}")
        return gpu

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

    def _travelling(self) -> tuple[list[list[Traveller]], Exception | None]:
        """By layer, what travels now; or why it may not."""
        try:
            self._backward.refuse_if_begun()
            return [travellers(tensors, self._optimizers) for tensors in self._tensors], None
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
        if self._poison is not None:
            raise HalfMovedError(
                f"experts may be half moved ({self._poison}); resume from the last checkpoint, nothing is written here"
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


class _BackwardWatch:
    """Knows, without looking at the device, whether a backward pass has begun since the optimizer's last step."""

    def __init__(self, layers: Sequence[Sequence[RowTensor]], optimizers: Sequence[Optimizer]) -> None:
        self._begun = False
        for tensors in layers:
            for tensor in (row_tensor.tensor for row_tensor in tensors):
                if tensor.requires_grad and tensor.is_leaf:
                    tensor.register_post_accumulate_grad_hook(self._note)
        for optimizer in optimizers:
            optimizer.register_step_post_hook(self._forget)

    def refuse_if_begun(self) -> None:
        """Raise if gradients of another step are already on their way."""
        if self._begun:
            raise DistplbError(
                "a backward pass has begun since the optimizer's last step; call rebalancer.step() right after "
                "optimizer.step(), before the next forward"
            )

    def _note(self, _: Tensor) -> None:
        self._begun = True

    def _forget(self, *_: Any) -> None:
        self._begun = False


def _by_layer(load: Tensor, placement: Placement) -> tuple[float, ...]:
    return tuple(imbalance(load, placement).mean(0).tolist())


def _digest_of(travelling: list[list[Traveller]]) -> int:
    return _digest([(t.name, str(t.flat.dtype)) for layer in travelling for t in layer])


def _digest(parts: Sequence[tuple[Any, ...]]) -> int:
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 2
