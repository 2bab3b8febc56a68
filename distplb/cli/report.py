"""`distplb report`: the records of a job, as one page and as figures."""

from __future__ import annotations

from pathlib import Path

import click

from distplb.cli.output import console, json_option, print_json, progress
from distplb.cli.param_types import NamedPath, OutputFile, WholeNumber, refuse_overwriting
from distplb.core.topology import Topology
from distplb.errors import DistplbError

__all__ = ["report"]

_AT_LEAST_1 = WholeNumber()
_EPILOG = """\b
Examples:
  distplb report run/
  distplb report trace.npz --nodes 8 --gpus-per-node 8 --every 100 --every 500 --png figures/
  distplb report run/ --beside forced/ --beside static/
"""


@click.command(epilog=_EPILOG)
@click.argument("run", type=NamedPath())
@click.option(
    "--output",
    type=OutputFile(),
    default="report.html",
    show_default=True,
    help="HTML file to write.",
)
@click.option("--png", type=NamedPath(file_okay=False), help="Folder for the figures as PNG.")
@click.option(
    "--every", type=_AT_LEAST_1, multiple=True, help="Iterations between rebalances to try on the trace; repeatable."
)
@click.option("--nodes", type=_AT_LEAST_1, default=1, help="Nodes of the EP group, with --gpus-per-node.")
@click.option("--gpus-per-node", type=_AT_LEAST_1, help="GPUs of the EP group on each node; default: the run's.")
@click.option(
    "--beside",
    type=NamedPath(),
    multiple=True,
    help="Folder of another run of the same job, whose steps are compared with this one's; repeatable.",
)
@json_option
def report(
    run: Path,
    output: Path,
    png: Path | None,
    every: tuple[int, ...],
    nodes: int,
    gpus_per_node: int | None,
    beside: tuple[Path, ...],
    as_json: bool,
) -> None:
    """Write the report of a RUN as one HTML file that needs no network.

    RUN is the folder of Rebalancer(record=...), its events.jsonl, the steps.jsonl of a StepBalancer, a trace (.npz), or
    counts as for distplb replay. Other intervals between rebalances are tried if there is a trace.
    """
    for path in (run, *beside):
        refuse_overwriting(output, path)
    if nodes > 1 and gpus_per_node is None:
        raise DistplbError(f"--nodes {nodes} without --gpus-per-node; pass both")
    try:
        from distplb.report.beside import with_beside
        from distplb.report.page import write_figures, write_report
        from distplb.report.run import Run
        from distplb.report.summary import Summary
    except ImportError as missing:
        raise DistplbError(f"{missing}; pip install 'distplb[report]' installs what a report needs") from missing
    topology = None if gpus_per_node is None else Topology(nodes, gpus_per_node)
    with progress("trying other intervals") as update:
        recorded = with_beside(Run.read(run, topology), beside)
        run_with_trials = write_report(recorded, output, every=every, progress=update)
    figures = [] if png is None else write_figures(run_with_trials, png)
    summary = Summary.of(run_with_trials)
    if as_json:
        print_json(summary.as_json() | {"report": str(output), "figures": [str(path) for path in figures]})
        return
    out = console()
    for line in (summary.headline, str(output), *map(str, figures)):
        out.print(line)
