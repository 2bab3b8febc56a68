"""`write_report`: writes one self-contained page, without scripts or network, every string escaped."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined

from distplb import __version__
from distplb.core.cost import mean_of_layers
from distplb.core.topology import Topology
from distplb.errors import DistplbError
from distplb.records.events import RebalanceEvent
from distplb.report.drawings.base import ReportFigure
from distplb.report.drawings.style import NARROW, WIDE
from distplb.report.figures import FIGURES, Image, image
from distplb.report.formatting import amount, printable, seconds
from distplb.report.interval_trials import with_trials
from distplb.report.run import Run
from distplb.report.summary import Summary

__all__ = ["write_figures", "write_report"]

_PNG_DPI = 150


def write_report(
    run: Run | str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    topology: Topology | None = None,
    every: Sequence[int] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Run:
    """Write the report of a run as one HTML file.

    Args:
        run: a `Run`, or a path for `Run.read`.
        output: path of the file, which is replaced if it exists.
        topology: topology of the EP group, if the files of the run do not have it; ignored for a `Run`.
        every: intervals between rebalances, in iterations, to try on the trace; None chooses suitable ones.
        progress: called with the number of steps done and their total.

    Returns:
        The run, with the intervals that were tried.

    Raises:
        DistplbError: if the run cannot be read, or an interval does not fit the trace.
        OSError: if the file cannot be written.
    """
    if not Path(output).absolute().parent.is_dir():  # refuse before the work, not after it
        raise DistplbError(
            f"there is no folder {Path(output).absolute().parent} to write the report to; create it first"
        )
    run = with_trials(run if isinstance(run, Run) else Run.read(run, topology), every, progress=progress)
    environment = Environment(
        loader=PackageLoader("distplb.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: printable(value) if type(value) is str else value,
    )
    summary = Summary.of(run)
    text = environment.get_template("report.html").render(
        name=run.name,
        note="" if run.trace is None else run.trace.note,
        headline=summary.headline,
        facts=summary.facts(run),
        sections=[_section(figure, run) for figure in FIGURES],
        rows=[_row(event) for event in run.events],
        version=__version__,
    )
    Path(output).write_text(text, encoding="utf-8")
    return run


def write_figures(run: Run, folder: str | os.PathLike[str]) -> list[Path]:
    """Write each figure that the run has data for as `<number>-<name>.png`, in the width for a laptop.

    Returns:
        The files, in the order of the report.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    paths = []
    for number, figure in enumerate(FIGURES, start=1):
        if not figure.lacks(run):
            paths.append(Path(folder) / f"{number}-{figure.name}.png")
            figure.draw(run, WIDE).savefig(paths[-1], dpi=_PNG_DPI)
    return paths


class _Section(NamedTuple):
    name: str
    title: str
    lacks: str
    caption: str = ""
    wide: Image | None = None
    narrow: Image | None = None


def _section(figure: ReportFigure, run: Run) -> _Section:
    lacks = figure.lacks(run)
    if lacks:
        return _Section(figure.name, figure.title, lacks)
    wide, narrow = (image(figure.draw(run, width)) for width in (WIDE, NARROW))
    return _Section(figure.name, figure.title, "", figure.caption(run), wide, narrow)


def _row(event: RebalanceEvent) -> dict[str, Any]:
    """A rebalance's row in the table, by the names of the cells in report.html."""
    levels = {
        name: "–" if level is None else f"{level:.3f}"
        for name in ("before", "after", "bound", "next")
        for level in [mean_of_layers(getattr(event, f"imbalance_{name}") or ())]
    }
    return levels | {
        "iteration": f"{event.iteration:,}",
        "decision": event.decision,
        "reason": event.reason,
        "slots": f"{event.slots_moved:,}",
        "bytes": amount(event.bytes_moved, "B"),
        "seconds": seconds(sum(event.seconds.values())),
        "repaid": "–" if event.repaid is None else "yes or uncertain" if event.repaid else "no",
    }
