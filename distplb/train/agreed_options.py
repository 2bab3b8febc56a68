"""The options of a rebalancer, checked and equal on all ranks: `agree_on_options` returns them as one value.

Shapes: L layers, E experts, P slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from torch.optim import Optimizer

from distplb.comm.agreement import agree, digest
from distplb.comm.base import Comm, WorldOfOne
from distplb.comm.roster import Roster
from distplb.core.arguments import refuse_wrong_types, whole_number
from distplb.core.layer import MoELayer
from distplb.core.placement import Placement
from distplb.core.topology import Topology
from distplb.errors import DistplbError
from distplb.migrate.mover import Mover
from distplb.planning.engine_choice import engine_for
from distplb.planning.legal import check_legal
from distplb.planning.options import PlanOptions
from distplb.records.read_log import check_log
from distplb.records.trace_parts import check_folder
from distplb.train.options import Moves, Record, Search
from distplb.train.routing import Routing
from distplb.train.window import LoadWindow

__all__ = ["Agreed", "Arguments", "agree_on_options", "enter"]

# All ranks must agree on these from the start, and on `Moves.fields`.
_MODEL_FIELDS = ("the model (digest)", "time_curve (digest)", "Moves: model (digest)", "slot_class (digest)")
_FIELDS = (
    *("the number of layers", "every", *Moves().fields(), "spread (digest)", *_MODEL_FIELDS),
    "the tables slot_of_expert (digest)",
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Agreed:
    """A rebalancer's options, the same on all ranks, and the objects of this rank that they apply to.

    Args:
        layer_names: the L names; empty on a rank without MoE layers.
        optimizers: the optimizers that step on the layers' parameters.
        comm: the ranks that rebalance together.
        topology: the nodes and GPUs of one EP group.
        every: iterations between rebalances; 0 if there are none.
        plan_options: options of each plan, except the placement in force and the price of moves.
        moves: which moves of a plan are made, and how.
        record: what is recorded.
        routing: how tokens find the experts.
        window: the counts.
        start: the initial placement.
        mover: moves this rank's part of the layers.
    """

    layer_names: tuple[str, ...]
    optimizers: Sequence[Optimizer]
    comm: Comm
    topology: Topology
    every: int
    plan_options: PlanOptions
    moves: Moves
    record: Record
    routing: Routing
    window: LoadWindow
    start: Placement
    mover: Mover

    @property
    def num_slots(self) -> int:
        """P, slots of each layer; equal to E."""
        return self.window.shape[2]

    @property
    def is_writer(self) -> bool:
        """Whether this rank writes trace and log."""
        return self.comm.rank == 0 and bool(self.layer_names)

    @cached_property
    def logical_order(self) -> Placement:
        """The placement with expert e in slot e of every layer."""
        return _logical_order(self.layer_names, self.window, self.topology)

    def check_rules(self, placement: Placement) -> None:
        """Refuse a placement of this model that splits a routing group or a slot class.

        Raises:
            DistplbError: naming the layer.
        """
        check_legal(placement, self.logical_order, self.routing.num_groups, self.plan_options.slot_class)

    def check_placement(self, placement: Placement) -> None:
        """Refuse a placement that cannot be put into force.

        Raises:
            DistplbError: if the placement belongs to another model, has replicas, or breaks the rules.
        """
        if placement.has_replicas:
            raise DistplbError(
                f"the placement has {placement.num_slots} slots for {placement.num_experts} experts, and replicas "
                "cannot be trained yet because their gradients are not reduced; pass a placement with one slot per "
                "expert"
            )
        for name in ("num_layers", "num_experts", "num_gpus"):
            number, number_of_model = getattr(placement, name), getattr(self.start, name)
            if number != number_of_model:
                raise DistplbError(
                    f"the placement has {name} {number}, the model {number_of_model}; pass a placement of this model"
                )
        self.check_rules(placement)

    def fields(self) -> dict[str, int]:
        """The values that must be equal on all ranks, as integers by name."""
        options, classes = self.plan_options, self.plan_options.slot_class
        listed = None if classes is None else torch.as_tensor(classes, device="cpu").tolist()
        model = (self.mover.digest(), digest(options.time_curve), digest(self.moves.model), digest(listed))
        values = (len(self.layer_names), self.every, *self.moves.fields().values(), digest(self.moves.spread), *model)
        return dict(zip(_FIELDS, (*values, self.start.digest()), strict=True))

    def let_go(self) -> None:
        """Release the model and the optimizers."""
        self.routing.close()
        self.mover.close()


class Arguments(NamedTuple):
    """The arguments of `Rebalancer` on this rank, unchecked."""

    layers: Sequence[MoELayer]
    optimizer: Optimizer | Sequence[Optimizer]
    comm: Comm
    gpu: int | None
    topology: Topology
    every: int | None
    window: LoadWindow | int
    search: Search
    moves: Moves
    record: Record


def agree_on_options(arguments: Arguments) -> Agreed:
    """Check the arguments of a rebalancer, and that they are the same on all ranks. Collective.

    Raises:
        DistplbError: on every rank, if any rank's arguments are refused or differ from those of other ranks.
    """
    agreed: Agreed | None = None
    fields, error = dict.fromkeys(_FIELDS, 0), None
    try:
        _check_types(arguments)
        agreed = _on_this_rank(arguments)
        fields = agreed.fields()
    except Exception as refused:
        error = refused
    try:
        agree(arguments.comm, fields, error)
        assert agreed is not None
        agreed.mover.agree_on_layouts()
    except BaseException:
        if agreed is not None:
            agreed.let_go()
        raise
    return agreed


def enter(agreed: Agreed) -> tuple[Roster, bool]:
    """Enter the communicator in the job's roster. Collective.

    Returns:
        The roster, and whether all ranks know where the rows are.

    Raises:
        DistplbError: on every rank, if another communicator holds layers of the same names.
    """
    error: Exception | None = None
    knows_rows = False
    roster = Roster(agreed.comm, agreed.layer_names)
    try:
        roster.enter()
        start = agreed.start.expert_of_slot.tolist()
        knows_rows = all(
            row in (None, tuple(own)) for row, own in zip(agreed.mover.inherited_rows(), start, strict=True)
        )
    except Exception as refused:
        error = refused
    try:
        (everywhere,) = agree(agreed.comm, {}, error, minimum=[int(knows_rows)])
    except BaseException:
        agreed.let_go()
        raise
    return roster, bool(everywhere)


def _on_this_rank(arguments: Arguments) -> Agreed:
    layers, optimizer, comm, gpu, topology, every, window, search, moves, record = arguments
    every = 0 if every is None else whole_number("every", every, 1, "iterations, at least 1, or None")
    search, moves = search.checked(), moves.checked(every)
    names = _names(layers)
    optimizers = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)
    routing = Routing(layers)
    try:
        counts = _counts(layers, routing, window, search.seed, is_read=every > 0)
        if layers:
            counts.name_layers(names)
        num_slots = counts.shape[2]
        options = PlanOptions(
            mode=routing.mode,
            num_groups=routing.num_groups,
            slot_class=search.slot_class,
            seed=search.seed,
            num_candidates=search.num_candidates,
            engine=search.engine,
            time_curve=search.time_curve,
        )
        options.check(topology, len(layers), num_slots)
        logical = _logical_order(names, counts, topology)
        start = routing.start(logical)
        check_legal(start, logical, routing.num_groups, options.slot_class)
        _try_engine(options, topology, start, counts, every, comm)
        if comm.rank == 0 and names:
            _check_folder(record, names, num_slots, topology)
        return Agreed(
            layer_names=names,
            optimizers=optimizers,
            comm=comm,
            topology=topology,
            every=every,
            plan_options=options,
            moves=moves,
            record=record,
            routing=routing,
            window=counts,
            start=start,
            mover=Mover(layers, optimizers, comm, topology, num_slots, gpu, routing.num_groups),
        )
    except BaseException:
        routing.close()
        raise


def _check_types(arguments: Arguments) -> None:
    refuse_wrong_types(
        {
            "layers": (arguments.layers, (Sequence,), "a list of MoELayers"),
            "optimizer": (arguments.optimizer, (Optimizer, Sequence), "the optimizer, or a list of all"),
            "topology": (arguments.topology, (Topology,), "a Topology, such as Topology.from_env()"),
            "window": (arguments.window, (LoadWindow, int), "a LoadWindow, or how many steps to keep"),
            "gpu": (arguments.gpu, (int, None), "this rank's index in its EP group"),
            "search": (arguments.search, (Search,), "a Search, such as Search(num_candidates=64)"),
            "moves": (arguments.moves, (Moves,), "a Moves, such as Moves(max_bytes=8 << 30)"),
            "record": (arguments.record, (Record,), "a Record, such as Record('run')"),
        }
    )
    layers, optimizer = arguments.layers, arguments.optimizer
    several = [] if isinstance(optimizer, Optimizer) else optimizer
    refuse_wrong_types({f"layers[{n}]": (one, (MoELayer,), "a MoELayer") for n, one in enumerate(layers)})
    refuse_wrong_types({f"optimizer[{n}]": (one, (Optimizer,), "an optimizer") for n, one in enumerate(several)})
    arguments.record.check()


def _names(layers: Sequence[MoELayer]) -> tuple[str, ...]:
    names = tuple(layer.name for layer in layers)
    if len(set(names)) != len(names):
        raise DistplbError(
            f"layer names repeat ({len(names)} layers, {len(set(names))} distinct); pass each layer once, under a "
            "unique name"
        )
    return names


def _counts(
    layers: Sequence[MoELayer], routing: Routing, window: LoadWindow | int, seed: int, *, is_read: bool
) -> LoadWindow:
    """Return the window that the loop fills, or one that the layers fill themselves if it is ever read."""
    if not isinstance(window, LoadWindow):
        return routing.window(window if is_read else 1, seed, is_filled=is_read)
    if not layers:
        return routing.window(1, 0)
    if len(layers) != window.shape[1]:
        raise DistplbError(
            f"the window has num_layers {window.shape[1]}, the rebalancer {len(layers)}; pass "
            f"LoadWindow(num_layers={len(layers)}, ...)"
        )
    routing.subscribe()
    return window


def _logical_order(names: Sequence[str], window: LoadWindow, topology: Topology) -> Placement:
    return Placement.contiguous(len(names), window.shape[2], topology.num_gpus)


def _try_engine(
    options: PlanOptions, topology: Topology, start: Placement, window: LoadWindow, every: int, comm: Comm
) -> None:
    """Compile the kernels that rebalances run and check their plans now, while no other rank waits in a rebalance."""
    kept, num_layers, num_slots = window.shape
    device = window.steps().device if isinstance(comm, WorldOfOne) else comm.device
    options = replace(options, current=start, move_price=1.0)
    # No step if there are no rebalances.
    steps = min(kept, every) if start.num_layers else 0  # with one micro-batch per iteration; doubled for more
    while steps:
        engine_for(options, topology, (steps, num_layers, num_slots), device)
        steps = min(kept, 2 * steps) if steps < kept else 0


def _check_folder(record: Record, names: Sequence[str], num_slots: int, topology: Topology) -> None:
    """Check that the folder has no files of another job; the rank that writes it does so before all ranks agree."""
    if record.folder is None or record.events_file is None:
        return
    folder = Path(record.folder)
    if folder.exists() and not folder.is_dir():
        raise DistplbError(f"record: {folder} is a file; pass the path of a folder")
    job = (tuple(names), num_slots, topology.num_gpus)
    try:
        check_folder(folder, *job)
        check_log(record.events_file, *job)
    except DistplbError as refused:
        raise DistplbError(f"record: {refused}") from refused
    except OSError:  # an unreadable folder cannot be written either; that warns later and must not end the training
        return
