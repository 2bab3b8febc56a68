"""`distplb plan`: plan a placement for a load, and show what it is worth on that load.

Shapes: T steps, L layers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import click
from rich.table import Table

from distplb.cli.load_hints import load_hints
from distplb.cli.output import console, json_option, print_hints, print_json, progress, table
from distplb.cli.param_types import NamedPath, OutputFile, refuse_overwriting
from distplb.cli.plan_request import PlanRequest
from distplb.cli.shared_options import planning_options
from distplb.comm.base import WorldOfOne
from distplb.core.cost import imbalance, mean_of_known, mean_of_layers, nan_to_none
from distplb.core.placement import Placement
from distplb.core.price import moved_slots
from distplb.core.topology import Topology
from distplb.planning.options import PlanOptions
from distplb.planning.plan import plan_in_stages

__all__ = ["plan"]

_MAX_ROWS = 24
_EVEN = 1e-9  # a smaller distance from the bound is not visible in any digit
_EXAMPLE = """\b
Example:
  distplb plan trace.npz --nodes 2 --gpus-per-node 8 --output placement.json
"""


class _Row(NamedTuple):
    """A layer; one without tokens has no imbalance."""

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
@click.argument("loads", type=NamedPath())
@planning_options
@click.option("--output", type=OutputFile(), help="File to write the placement to, as JSON by layer.")
@click.option("--all", "show_all", is_flag=True, help=f"Show all layers, not only the {_MAX_ROWS} most uneven.")
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
    """Plan a placement for LOADS and show what it is worth.

    LOADS are the tokens of each expert: a distplb trace, or counts [layers, experts] or [steps, layers, experts] as
    .npy, .npz, .csv, .tsv, .txt, .json, .yaml, .pt or .safetensors. Imbalance is busiest GPU / mean GPU, averaged over
    the steps that have tokens. If the load does not look like that of a job, a hint says so, on standard error or in
    the JSON field "hints".
    """
    refuse_overwriting(output, loads)
    request = PlanRequest.read(loads, topology, options, current)
    with progress("planning"):
        planned = plan_in_stages(request.load, topology, WorldOfOne(), request.options)
        rows = _rows(request, planned.placement)
    if output is not None:
        planned.placement.save(output, request.layers)
    hints = load_hints(request.load, before=mean_of_layers([row.before for row in rows]), is_trace=request.has_steps)
    if as_json:
        print_json(_document(request, planned.engine, rows, output) | {"hints": hints})
    else:
        _print(request, rows, show_all, output)
        print_hints(hints)


def _rows(request: PlanRequest, placement: Placement) -> list[_Row]:
    before, after = (
        nan_to_none(mean_of_known(imbalance(request.load, one), dim=0)) for one in (request.in_force, placement)
    )
    bound = nan_to_none(request.bound(request.load))
    moved = moved_slots(request.in_force, placement, request.topology).T.tolist()
    return [_Row(*values) for values in zip(request.layers, before, after, bound, *moved, strict=True)]


def _total(rows: list[_Row], name: str) -> _Row:
    """The mean of ratios, the sum of counts."""
    _, before, after, bound, inside, between = zip(*rows, strict=True)
    level, level_after, level_bound = map(mean_of_layers, (before, after, bound))
    return _Row(name, level, level_after, level_bound, sum(inside), sum(between))


def _document(request: PlanRequest, engine: str, rows: list[_Row], output: Path | None) -> dict[str, Any]:
    total = _total(rows, "")._asdict()
    del total["layer"]
    return {
        "loads": str(request.path),
        "steps": request.empty_parts.counted_steps,
        **request.empty_parts.as_json(),
        **request.cluster_as_json(),
        "engine": engine,
        "imbalance_of": "the load that was planned on",
        "all_layers": total,
        "layers": [row._asdict() for row in rows],
        "output": None if output is None else str(output),
    }


# --- tables -----------------------------------------------------------------------------------------------------


def _print(request: PlanRequest, rows: list[_Row], show_all: bool, output: Path | None) -> None:
    out = console()
    out.print(_table(rows, show_all))
    if left_out := request.empty_parts.sentence():
        out.print(left_out)
    out.print(_summary(rows, num_steps=len(request.load)))
    if output is not None:
        out.print(f"Written to {output}.")


def _table(rows: list[_Row], show_all: bool) -> Table:
    shown, rest = rows, list[_Row]()
    if not show_all and len(rows) > _MAX_ROWS:
        shown = sorted(rows, key=lambda row: -(row.before or 0))
        shown, rest = shown[:_MAX_ROWS], shown[_MAX_ROWS:]
    lines = table("layer", "before", "after", "bound", "slots moved")
    for row in shown:
        _add_row(lines, row)
    lines.add_section()
    if rest:
        _add_row(lines, _total(rest, f"{len(rest)} more (--all)"))
    _add_row(lines, _total(rows, f"all {len(rows)}"))
    return lines


def _add_row(lines: Table, row: _Row) -> None:
    lines.add_row(row.layer, *("–" if value is None else f"{value:.4f}" for value in row[1:4]), str(row.moved))


def _summary(rows: list[_Row], *, num_steps: int) -> str:
    levels = [(row.before, row.after, row.bound) for row in rows]
    before, after, bound = (  # of the layers that have tokens
        [value for value in values if value is not None] for values in zip(*levels, strict=True)
    )
    if not before:
        return "The load has no tokens, so all placements are equally good."
    if all(level <= limit + _EVEN for level, limit in zip(before, bound, strict=True)):
        return "The placement in force already meets the bound: there is nothing to gain on this load."
    is_met = all(level <= limit + _EVEN for level, limit in zip(after, bound, strict=True))
    met = " The plan meets the bound." if is_met else ""
    over = f", mean over {num_steps} steps" if num_steps > 1 else ""
    return (
        f"Busiest GPU / mean GPU{over} of the load that was planned on.{met} "
        "To judge a plan on steps it has not seen, run distplb compare --unseen."
    )
