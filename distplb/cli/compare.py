"""`distplb compare`: compare planners, on the steps they planned on and on steps they had not seen.

Shapes: T steps, L layers, E experts, P slots.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import click
from torch import Tensor

from distplb.cli.compare_splits import Imbalance, StepsToSplit, bound_of_all, refuse_replica_slots
from distplb.cli.compare_tables import Row, comparison_table, row_as_json, sentences_of_splits
from distplb.cli.empty_parts import EmptyParts
from distplb.cli.load_hints import load_hints
from distplb.cli.output import console, json_option, print_hints, print_json, progress
from distplb.cli.param_types import NamedPath, WholeNumber
from distplb.cli.plan_request import PlanRequest
from distplb.cli.shared_options import planning_options
from distplb.comm.base import WorldOfOne
from distplb.core.cost import imbalance, mean_of_known, steps_with_tokens
from distplb.core.counts import as_tokens
from distplb.core.placement import Placement
from distplb.core.price import moved_slots
from distplb.core.topology import Topology
from distplb.errors import DistplbError
from distplb.packing.balanced_packing import balanced_packing
from distplb.planning.greedy import contiguous, greedy_numpy
from distplb.planning.options import PlanOptions
from distplb.planning.plan import plan_in_stages
from distplb.records.read_loads import Loads, read_loads
from distplb.splitting.rules import MOST_SLOTS

__all__ = ["compare"]

_MANY_CANDIDATES = 16  # candidates of the last planner
_EXAMPLE = """\b
Examples:
  distplb compare monday.npz --unseen tuesday.npz --nodes 2 --gpus-per-node 8
  distplb compare trace.npz --gpus-per-node 8 --replica-slots 2
"""


class _Steps(NamedTuple):
    """The steps to plan on, and unseen steps to judge on: None if there is only one step."""

    planned: Tensor  # [T, L, E]
    unseen: Tensor | None  # [T', L, E]
    description: str
    unseen_empty_parts: EmptyParts | None  # of the file of --unseen
    is_sum: bool  # whether the file that they are judged on has no steps

    @property
    def judged(self) -> Tensor:
        """`[T', L, E]`: the unseen steps, or the one that was planned on."""
        return self.planned if self.unseen is None else self.unseen


@click.command(epilog=_EXAMPLE)
@click.argument("loads", type=NamedPath())
@click.option("--unseen", type=NamedPath(), help="Load to judge plans on, which no planner sees.")
@planning_options
@click.option(
    "--replica-slots",
    type=WholeNumber(0, MOST_SLOTS),
    default=0,
    show_default=True,
    help="Slots on each GPU for replicas of single steps; if any, each step is split too.",
)
@json_option
def compare(
    loads: Path,
    unseen: Path | None,
    replica_slots: int,
    topology: Topology,
    options: PlanOptions,
    current: Path | None,
    as_json: bool,
) -> None:
    """Plan for LOADS with several planners and compare them.

    Plans are judged on steps they have not seen: those of --unseen, or else the second half of LOADS, in which case
    they are made from the first half. A load of one step is judged on itself. Layers of the two files are matched by
    name, or by position if neither file has names. File formats and hints are those of `distplb plan`.

    With --replica-slots, every judged step is also split under each planner's homes: the table shows the imbalance that
    replicas for that step leave, and how many are sent. Of a long load, a sample of the steps is split. Counts by
    source GPU are not needed, because replicas depend on the totals only; tokens that cross GPUs are not shown.
    """
    request = PlanRequest.read(loads, topology, options, current)
    _refuse_without_tokens(loads, request.empty_parts)
    refuse_replica_slots(request, replica_slots)
    steps = _halves(request) if unseen is None else _two_files(request, unseen)
    before = float(mean_of_known(imbalance(request.load, request.in_force)))
    hints = load_hints(request.load, before=before, is_trace=request.has_steps)
    if unseen is not None and steps.unseen is not None:  # neither its imbalance nor its number of steps matters
        hints += [f"{unseen}: {hint}" for hint in load_hints(steps.unseen, before=None, is_trace=False)]
    to_split = StepsToSplit.of(steps.judged, request, replica_slots) if replica_slots else None
    rows: list[Row] = []
    with progress("comparing") as update:
        planners = _planners(request, len(steps.planned), with_current=current is not None)
        for number in (1, 2):  # steps; the first plan of either kind loads compiled code, which must not be timed
            _plan(steps.planned[:number], request, request.options)
        work = itertools.count(1)  # plans and, with replicas, splits of a step
        total = len(planners) * (1 + (0 if to_split is None else len(to_split.steps)))
        update(0, total)
        for name, planner in planners.items():
            rows.append(_evaluate(name, planner, request, steps, to_split, lambda: update(next(work), total)))
        rows.append(_bound(request, steps, rows))
    if as_json:
        print_json(_document(request, steps, rows, to_split) | {"hints": hints})
    else:
        out = console()
        out.print(comparison_table(rows, steps.description, to_split, out.width))
        for sentence in sentences_of_splits(rows, to_split, is_sum=steps.is_sum) if to_split else []:
            out.print(sentence)
        for sentence in _sentences_of_empty_parts(request, unseen, steps):
            out.print(sentence)
        print_hints(hints)


# --- steps ------------------------------------------------------------------------------------------------------


def _halves(request: PlanRequest) -> _Steps:
    """Plan on the first half of the steps, and judge on the second."""
    load = request.load
    half, is_sum = len(load) // 2, not request.has_steps
    if not half:
        description = "judged on the one step that was planned on, which says nothing about other steps"
        return _Steps(load, None, description, None, is_sum)
    first, second = load[:half], load[half:]
    description = f"planned on the first half ({_count(first)}), unseen: the second half ({_count(second)})"
    return _Steps(first, second, description, None, is_sum)


def _two_files(request: PlanRequest, path: Path) -> _Steps:
    """Plan on all steps of the load, and judge on those of another file."""
    loads = read_loads(path)
    load = _in_order_of_layers(loads, path, request)
    empty_parts = EmptyParts.of(load, request.layers)
    _refuse_without_tokens(path, empty_parts)
    unseen = steps_with_tokens(load)
    description = f"planned on {_count(request.load)} of {request.path}, unseen: {_count(unseen)} of {path}"
    return _Steps(request.load, unseen, description, empty_parts, loads.load.dim() != 3)


def _refuse_without_tokens(path: Path, empty_parts: EmptyParts) -> None:
    if not empty_parts.counted_steps:
        raise DistplbError(f"{path} has no tokens, so all placements are equally good; pass counts of steps that ran")


def _in_order_of_layers(loads: Loads, path: Path, request: PlanRequest) -> Tensor:
    """`[T', L, E]`: the planned layers in their order, matched by name, or by position if there are no names."""
    unseen, load = as_tokens(loads.load), request.load
    has_names, unseen_has_names = (one != tuple(map(str, range(len(one)))) for one in (request.layers, loads.layers))
    same_layers = unseen.shape[1] == load.shape[1] or has_names or unseen_has_names
    if unseen.shape[2] != load.shape[2] or not same_layers:
        raise DistplbError(
            f"{path} has {unseen.shape[1]} layer{'s' * (unseen.shape[1] != 1)} of {unseen.shape[2]} "
            f"expert{'s' * (unseen.shape[2] != 1)}, {request.path} has {load.shape[1]} of {load.shape[2]}; pass two "
            "loads of the same model"
        )
    if has_names != unseen_has_names:
        without, with_, layers = (
            (request.path, path, loads.layers) if unseen_has_names else (path, request.path, request.layers)
        )
        raise DistplbError(
            f"{without} has no layer names, but {with_} has some, such as {layers[0]!r}; pass two files with names, "
            "or two without"
        )
    row = {name: at for at, name in enumerate(loads.layers)}
    missing = [name for name in request.layers if name not in row]
    if missing:
        own = ", ".join(map(repr, loads.layers[:3])) + ", ..." * (len(loads.layers) > 3)
        raise DistplbError(
            f"{path} has no layer {missing[0]!r}, which {request.path} has (it has {own}); pass two loads of the same "
            "model"
        )
    return unseen[:, [row[name] for name in request.layers]]


def _count(load: Tensor) -> str:
    return f"{len(load)} step{'s' * (len(load) != 1)}"


# --- planners ---------------------------------------------------------------------------------------------------

Planner = Callable[[Tensor], Placement]  # for a load [T, L, E]


def _planners(request: PlanRequest, num_steps: int, *, with_current: bool) -> Mapping[str, Planner]:
    """The planners that fit the options, by name; the placement in force comes first."""
    topology, options, experts = request.topology, request.options, request.in_force.num_experts
    slots, groups = options.slots(experts), options.num_groups

    def placed(table: Tensor) -> Placement:
        return Placement(table, experts, topology.num_gpus)

    planners: dict[str, Planner] = {"current": lambda _: request.in_force} if with_current else {}
    planners["contiguous"] = lambda load: placed(contiguous(load[0], topology, slots))
    if groups is None or options.mode == "remap":  # permuted groups stay in blocks, which greedy ignores
        planners["greedy (EPLB)"] = lambda load: placed(greedy_numpy(load.sum(0), topology, slots, num_groups=groups))
    if groups is None and slots == experts:
        planners["balanced_packing"] = lambda load: placed(_packed(load.sum(0), topology))
    if num_steps > 1:
        planners["plan on the sum"] = lambda load: _plan(load.sum(0), request, options)
    planners["plan on the steps" if num_steps > 1 else "plan"] = lambda load: _plan(load, request, options)
    if options.candidates != _MANY_CANDIDATES:
        many = replace(options, num_candidates=_MANY_CANDIDATES)
        planners[f"plan, {_MANY_CANDIDATES} candidates"] = lambda load: _plan(load, request, many)
    return planners


def _packed(weight: Tensor, topology: Topology) -> Tensor:
    """`[L, P]`: the table of `balanced_packing` for `weight [L, E]`."""
    pack, rank = balanced_packing(weight, topology.num_gpus)
    return (pack * topology.slots_per_gpu(weight.shape[1]) + rank).argsort(1)


def _plan(load: Tensor, request: PlanRequest, options: PlanOptions) -> Placement:
    return plan_in_stages(load, request.topology, WorldOfOne(), options).placement


def _evaluate(
    name: str,
    planner: Planner,
    request: PlanRequest,
    steps: _Steps,
    to_split: StepsToSplit | None,
    advance: Callable[[], None],
) -> Row:
    began = time.perf_counter()
    placement = planner(steps.planned)
    seconds = time.perf_counter() - began
    in_sample, unseen = (
        None if load is None else Imbalance.of(mean_of_known(imbalance(load, placement), dim=0))
        for load in (steps.planned, steps.unseen)
    )
    assert in_sample is not None
    moved = int(moved_slots(request.in_force, placement, request.topology).sum())
    advance()
    splits = None if to_split is None else to_split.under(placement, advance)
    return Row(name, in_sample, unseen, moved, seconds, splits)


def _bound(request: PlanRequest, steps: _Steps, planners: Sequence[Row]) -> Row:
    in_sample = Imbalance.of(request.bound(steps.planned))
    unseen = None if steps.unseen is None else Imbalance.of(request.bound(steps.unseen))
    splits = [row.splits for row in planners if row.splits is not None]
    return Row("bound", in_sample, unseen, None, None, bound_of_splits=bound_of_all(splits) if splits else None)


# --- output -----------------------------------------------------------------------------------------------------


def _sentences_of_empty_parts(request: PlanRequest, unseen: Path | None, steps: _Steps) -> list[str]:
    if steps.unseen_empty_parts is None:
        sentences = [request.empty_parts.sentence()]
    else:
        sentences = [request.empty_parts.sentence(str(request.path)), steps.unseen_empty_parts.sentence(str(unseen))]
    return [sentence for sentence in sentences if sentence]


def _document(
    request: PlanRequest, steps: _Steps, rows: Sequence[Row], to_split: StepsToSplit | None
) -> dict[str, Any]:
    return {
        "loads": str(request.path),
        "judged": steps.description,
        "steps_planned_on": len(steps.planned),
        "steps_unseen": 0 if steps.unseen is None else len(steps.unseen),
        **request.empty_parts.as_json(),
        "unseen_without_tokens": None if steps.unseen_empty_parts is None else steps.unseen_empty_parts.as_json(),
        **request.cluster_as_json(),
        **({} if to_split is None else to_split.as_json()),
        "planners": [row_as_json(row) for row in rows],
    }
