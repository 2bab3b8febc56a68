"""`distplb plan`: a placement for a load, and what it is worth on that load.

Shapes: T steps, L layers.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import click
from rich.table import Table

from distplb.cli.empties import Empties
from distplb.cli.given import GivenPath, OutputPath, refuse_overwriting
from distplb.cli.hints import hints_of
from distplb.cli.inputs import Inputs, read_inputs
from distplb.cli.options import search_options, topology_options
from distplb.cli.output import console, json_option, plain, print_hints, print_json, progress, table
from distplb.comm.base import WorldOfOne
from distplb.core.cost import imbalance, mean_of_known, mean_of_layers, nan_to_none, steps_with_tokens
from distplb.core.placement import Placement
from distplb.core.price import moved_slots
from distplb.core.topology import Topology
from distplb.planning.options import PlanOptions
from distplb.planning.plan import plan_in_stages

__all__ = ["plan"]

_MOST_ROWS = 24
_EVEN = 1e-9  # closer to the bound than anybody reads
_EXAMPLE = """\b
Example:
  distplb plan trace.npz --nodes 2 --gpus-per-node 8 --output placement.json
"""


class _Row(NamedTuple):
    """Of a layer without tokens there is no imbalance."""

    layer: str
    before: float | None
    after: float | None
    bound: float | None
    moved_inside: int
    moved_between: int

    @property
    def moved(self) -> int:
        return self.moved_inside + self.moved_between


@click.command(epilog=_EXAMPLE)
@click.argument("loads", type=GivenPath())
@topology_options
@search_options
@click.option("--output", type=OutputPath(), help="Write the placement there, as JSON by layer.")
@click.option("--all", "show_all", is_flag=True, help=f"Show all layers, not only the {_MOST_ROWS} most uneven.")
@json_option
def plan(
    loads: Path,
    topology: Topology,
    options: PlanOptions,
    current: Path | None,
    output: Path | None,
    show_all: bool,
    as_json: bool,
) -> None:
    """Plan a placement for LOADS and say what it is worth.

    LOADS are tokens of each expert: a distplb trace, or counts as .npy, .npz, .csv, .tsv, .txt, .json, .yaml, .pt or
    .safetensors, [layers, experts] or [steps, layers, experts]. Imbalance is the fullest GPU over the mean GPU, the
    mean over steps that have tokens. A load that looks like none of a job's is hinted at, on the standard error, or as
    "hints" of the JSON.
    """
    refuse_overwriting(output, loads)
    inputs = read_inputs(loads, topology, options, current)
    empties = Empties.of(inputs.load, inputs.layers)
    if empties.counted_steps:
        inputs = replace(inputs, load=steps_with_tokens(inputs.load))
    with progress("planning"):
        planned = plan_in_stages(inputs.load, topology, WorldOfOne(), inputs.options)
        rows = _rows(inputs, planned.placement)
    if output is not None:
        planned.placement.save(output, inputs.layers)
    hints = hints_of(inputs.load, before=mean_of_layers([row.before for row in rows]), is_trace=inputs.has_steps)
    if as_json:
        print_json(_document(loads, inputs, empties, planned.engine, rows, output) | {"hints": hints})
    else:
        _print(inputs, empties, rows, show_all, output)
        print_hints(hints)


def _rows(inputs: Inputs, placement: Placement) -> list[_Row]:
    before, after = (
        nan_to_none(mean_of_known(imbalance(inputs.load, one), dim=0)) for one in (inputs.start, placement)
    )
    bound = nan_to_none(inputs.bound(inputs.load))
    moved = moved_slots(inputs.start, placement, inputs.topology).T.tolist()
    return [_Row(*values) for values in zip(inputs.layers, before, after, bound, *moved, strict=True)]


def _over_all(rows: list[_Row], name: str) -> _Row:
    """The mean of what is a ratio, the sum of what is counted."""
    _, before, after, bound, inside, between = zip(*rows, strict=True)
    level, level_after, level_bound = map(mean_of_layers, (before, after, bound))
    return _Row(name, level, level_after, level_bound, sum(inside), sum(between))


def _document(
    loads: Path, inputs: Inputs, empties: Empties, engine: str, rows: list[_Row], output: Path | None
) -> dict[str, Any]:
    total = _over_all(rows, "")._asdict()
    del total["layer"]
    return {
        "loads": str(loads),
        "steps": empties.counted_steps,
        **empties.as_json(),
        "nodes": inputs.topology.num_nodes,
        "gpus_per_node": inputs.topology.gpus_per_node,
        "slots": inputs.start.num_slots,
        "engine": engine,
        "imbalance_of": "the load that was planned on",
        "all_layers": total,
        "layers": [row._asdict() for row in rows],
        "output": None if output is None else str(output),
    }


# --- for a person -----------------------------------------------------------------------------------------------


def _print(inputs: Inputs, empties: Empties, rows: list[_Row], show_all: bool, output: Path | None) -> None:
    out = console()
    out.print(_table(rows, show_all))
    if empties.told():
        out.print(plain(empties.told()))
    out.print(plain(_summary(inputs, rows)))
    if output is not None:
        out.print(plain(f"Written to {output}."))


def _table(rows: list[_Row], show_all: bool) -> Table:
    shown, rest = rows, list[_Row]()
    if not show_all and len(rows) > _MOST_ROWS:
        shown = sorted(rows, key=lambda row: -(row.before or 0))
        shown, rest = shown[:_MOST_ROWS], shown[_MOST_ROWS:]
    found = table("layer", "before", "after", "bound", "slots moved")
    for row in shown:
        _add(found, row)
    found.add_section()
    if rest:
        _add(found, _over_all(rest, f"{len(rest)} more (--all)"))
    _add(found, _over_all(rows, f"all {len(rows)}"))
    return found


def _add(found: Table, row: _Row) -> None:
    found.add_row(plain(row.layer), *("–" if value is None else f"{value:.4f}" for value in row[1:4]), str(row.moved))


def _summary(inputs: Inputs, rows: list[_Row]) -> str:
    steps = len(inputs.load)
    levels = [(row.before, row.after, row.bound) for row in rows]
    before, after, bound = (  # of the layers that have tokens
        [value for value in values if value is not None] for values in zip(*levels, strict=True)
    )
    if not before:
        return "The load has no tokens at all, so every placement is as good."
    if all(one <= least + _EVEN for one, least in zip(before, bound, strict=True)):
        return "The placement in force meets the bound already: there is nothing to gain on this load."
    is_met = all(one <= least + _EVEN for one, least in zip(after, bound, strict=True))
    met = " The plan meets the bound." if is_met else ""
    over = f", mean over {steps} steps," if steps > 1 else ""
    return (
        f"Fullest GPU / mean GPU{over} of the load that was planned on.{met} "
        "What a plan is worth on steps that it has not seen: distplb compare --unseen."
    )
