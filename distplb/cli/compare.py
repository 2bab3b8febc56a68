"""`distplb compare`: planners side by side, on the steps they planned on and on steps that they had not seen.

Shapes: T steps, L layers, E experts, P slots.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import click
from rich.table import Table
from torch import Tensor

from distplb.cli.empties import Empties
from distplb.cli.given import GivenPath
from distplb.cli.hints import hints_of
from distplb.cli.inputs import Inputs, read_inputs
from distplb.cli.options import search_options, topology_options
from distplb.cli.output import console, json_option, plain, print_hints, print_json, progress, table
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
from distplb.records.loads import Loads, read_loads

__all__ = ["compare"]

_MANY = 16  # candidates of the last planner
_NARROW = 52  # columns; below, moves and seconds have no room
_EXAMPLE = """\b
Example:
  distplb compare monday.npz --unseen tuesday.npz --nodes 2 --gpus-per-node 8
"""


class _Steps(NamedTuple):
    """What is planned on and what is judged, which are the same where there is one step alone."""

    planned: Tensor  # [T, L, E]
    unseen: Tensor | None  # [T', L, E]
    told: str
    empty_unseen: Empties | None  # of a file of its own


class _Uneven(NamedTuple):
    """Imbalance, mean over the steps and layers that have tokens."""

    mean: float  # over layers
    worst: float  # layer

    @classmethod
    def of(cls, by_layer: Tensor) -> _Uneven:
        return cls(float(mean_of_known(by_layer)), float(by_layer.nan_to_num(nan=1.0).max()))


class _Row(NamedTuple):
    planner: str
    in_sample: _Uneven
    unseen: _Uneven | None
    moved: int | None
    seconds: float | None


@click.command(epilog=_EXAMPLE)
@click.argument("loads", type=GivenPath())
@click.option("--unseen", type=GivenPath(), help="Judge on this load, which no planner has seen.")
@topology_options
@search_options
@json_option
def compare(
    loads: Path,
    unseen: Path | None,
    topology: Topology,
    options: PlanOptions,
    current: Path | None,
    as_json: bool,
) -> None:
    """Plan for LOADS with several planners and show them side by side.

    Plans are judged on steps that they have not seen: those of --unseen, or else the second half of LOADS, of which
    the first half is planned on then. A load of one step is judged on itself. Layers of two files are the same by their
    names, or by position where neither has names. Files, and hints, as for `distplb plan`.
    """
    inputs = read_inputs(loads, topology, options, current)
    empties = Empties.of(inputs.load, inputs.layers)
    steps = _steps(loads, inputs, empties, unseen)
    before = float(mean_of_known(imbalance(inputs.load, inputs.start)))
    hints = hints_of(inputs.load, before=before, is_trace=inputs.has_steps)
    if unseen is not None and steps.unseen is not None:  # of which it does not matter how even they are, or how many
        hints += [f"{unseen}: {hint}" for hint in hints_of(steps.unseen, before=None, is_trace=False)]
    inputs = replace(inputs, load=steps.planned)
    rows: list[_Row] = []
    with progress("comparing") as told:
        planners = _planners(inputs, given=current is not None)
        for number in (1, 2):  # of steps: the first plan of either kind loads machine code, which is not timed
            _planned(steps.planned[:number], inputs, inputs.options)
        for name, planner in planners.items():
            told(len(rows), len(planners))
            rows.append(_judged(name, planner, inputs, steps))
        rows.append(_bound(inputs, steps))
    if as_json:
        print_json(_document(loads, inputs, empties, steps, rows) | {"hints": hints})
    else:
        out = console()
        out.print(_table(steps, rows, narrow=out.width < _NARROW))
        for left_out in _left_out(loads, unseen, empties, steps):
            out.print(plain(left_out))
        print_hints(hints)


def _steps(path: Path, inputs: Inputs, empties: Empties, unseen: Path | None) -> _Steps:
    load = _counted(path, inputs.load)
    if unseen is not None:
        other = _of_the_same_layers(read_loads(unseen), unseen, inputs, path)
        of_other, other = Empties.of(other, inputs.layers), _counted(unseen, other)
        told = f"planned on {_count(load)} of {path}, unseen are {_count(other)} of {unseen}"
        return _Steps(load, other, told, of_other)
    half = len(load) // 2
    if half:
        seen, other = load[:half], load[half:]
        told = f"planned on the first {_count(seen)}, unseen are the {_count(other)} after them"
        return _Steps(seen, other, told, None)
    told = "judged on the one step that was planned on, so not what it is worth on others"
    return _Steps(load, None, told, None)


def _left_out(path: Path, unseen: Path | None, empties: Empties, steps: _Steps) -> list[str]:
    """What has no tokens, in words."""
    if steps.empty_unseen is None:
        lines = [empties.told()]
    else:
        lines = [empties.told(str(path)), steps.empty_unseen.told(str(unseen))]
    return [line for line in lines if line]


def _counted(path: Path, load: Tensor) -> Tensor:
    """The steps that have tokens, which are planned on and judged."""
    found = steps_with_tokens(load)
    if not len(found):
        raise DistplbError(f"{path} has no tokens, so every placement is as good; pass counts of steps that ran")
    return found


def _of_the_same_layers(found: Loads, unseen: Path, inputs: Inputs, path: Path) -> Tensor:
    """`[T', L, E]` of the layers that are planned for, in their order: by name, or by position where there are none."""
    other, load = as_tokens(found.load), inputs.load
    named, other_named = (one != tuple(map(str, range(len(one)))) for one in (inputs.layers, found.layers))
    if other.shape[2] != load.shape[2] or (other.shape[1] != load.shape[1] and not named and not other_named):
        raise DistplbError(
            f"{unseen} has {other.shape[1]} layers of {other.shape[2]} experts, {path} has {load.shape[1]} of "
            f"{load.shape[2]}; pass two loads of the same model"
        )
    if named != other_named:
        without, with_, layers = (path, unseen, found.layers) if other_named else (unseen, path, inputs.layers)
        raise DistplbError(
            f"{without} has no names of layers, {with_} has {layers[0]!r} and others; pass two files with names, or "
            "two without"
        )
    row = {name: at for at, name in enumerate(found.layers)}
    missing = [name for name in inputs.layers if name not in row]
    if missing:
        own = ", ".join(map(repr, found.layers[:3])) + ", ..." * (len(found.layers) > 3)
        raise DistplbError(
            f"{unseen} has no layer {missing[0]!r}, which {path} has; it has {own}: pass two loads of the same model"
        )
    return other[:, [row[name] for name in inputs.layers]]


def _count(load: Tensor) -> str:
    return f"{len(load)} step{'s' * (len(load) != 1)}"


# --- planners ---------------------------------------------------------------------------------------------------

Planner = Callable[[Tensor], Placement]  # of a load [T, L, E]


def _planners(inputs: Inputs, *, given: bool) -> Mapping[str, Planner]:
    """By name, those that go with the options; what is in force comes first."""
    topology, options, experts = inputs.topology, inputs.options, inputs.start.num_experts
    slots, groups = options.slots(experts), options.num_groups

    def placed(table: Tensor) -> Placement:
        return Placement(table, experts, topology.num_gpus)

    found: dict[str, Planner] = {"current": lambda _: inputs.start} if given else {}
    found["contiguous"] = lambda load: placed(contiguous(load[0], topology, slots))
    if groups is None or options.mode == "remap":  # the others take groups apart, or out of their blocks
        found["greedy (EPLB)"] = lambda load: placed(greedy_numpy(load.sum(0), topology, slots, num_groups=groups))
    if groups is None and slots == experts:
        found["balanced_packing"] = lambda load: placed(_packed(load.sum(0), topology))
    if len(inputs.load) > 1:
        found["plan on the sum"] = lambda load: _planned(load.sum(0), inputs, options)
    found["plan on the steps" if len(inputs.load) > 1 else "plan"] = lambda load: _planned(load, inputs, options)
    if options.candidates != _MANY:
        many = replace(options, num_candidates=_MANY)
        found[f"plan, {_MANY} candidates"] = lambda load: _planned(load, inputs, many)
    return found


def _packed(weight: Tensor, topology: Topology) -> Tensor:
    """`[L, P]` of `[L, E]`."""
    pack, rank = balanced_packing(weight, topology.num_gpus)
    return (pack * topology.slots_per_gpu(weight.shape[1]) + rank).argsort(1)


def _planned(load: Tensor, inputs: Inputs, options: PlanOptions) -> Placement:
    return plan_in_stages(load, inputs.topology, WorldOfOne(), options).placement


def _judged(name: str, planner: Planner, inputs: Inputs, steps: _Steps) -> _Row:
    began = time.perf_counter()
    placement = planner(steps.planned)
    seconds = time.perf_counter() - began
    seen, unseen = (
        None if load is None else _Uneven.of(mean_of_known(imbalance(load, placement), dim=0))
        for load in (steps.planned, steps.unseen)
    )
    assert seen is not None
    return _Row(name, seen, unseen, int(moved_slots(inputs.start, placement, inputs.topology).sum()), seconds)


def _bound(inputs: Inputs, steps: _Steps) -> _Row:
    unseen = None if steps.unseen is None else _Uneven.of(inputs.bound(steps.unseen))
    return _Row("bound", _Uneven.of(inputs.bound(steps.planned)), unseen, None, None)


# --- what is printed --------------------------------------------------------------------------------------------


def _table(steps: _Steps, rows: list[_Row], *, narrow: bool) -> Table:
    numbers = ["in sample", *(["unseen"] if steps.unseen is not None else []), "worst layer"]
    others = [] if narrow else ["slots moved", "time (s)"]
    title = f"Imbalance, fullest GPU / mean GPU; {steps.told}. {'Wider terminals show moves and seconds.' * narrow}"
    found = table("planner", *numbers, *others, title=title)
    for row in rows:
        if row.seconds is None:
            found.add_section()
        shown = [row.in_sample.mean, row.unseen.mean, row.unseen.worst] if row.unseen else list(row.in_sample)
        counts = ["" if row.moved is None else str(row.moved), "" if row.seconds is None else f"{row.seconds:.3f}"]
        cells = [*(f"{value:.4f}" for value in shown), *counts]
        found.add_row(plain(row.planner), *cells[: len(numbers) + len(others)])
    return found


def _document(loads: Path, inputs: Inputs, empties: Empties, steps: _Steps, rows: list[_Row]) -> dict[str, Any]:
    return {
        "loads": str(loads),
        "judged": steps.told,
        "steps_planned_on": len(steps.planned),
        "steps_unseen": 0 if steps.unseen is None else len(steps.unseen),
        **empties.as_json(),
        "unseen_without_tokens": None if steps.empty_unseen is None else steps.empty_unseen.as_json(),
        "nodes": inputs.topology.num_nodes,
        "gpus_per_node": inputs.topology.gpus_per_node,
        "slots": inputs.start.num_slots,
        "planners": [
            row._asdict() | {"in_sample": row.in_sample._asdict(), "unseen": row.unseen and row.unseen._asdict()}
            for row in rows
        ],
    }
