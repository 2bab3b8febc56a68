"""`ReportFigure`: the parts of each figure in a report."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from matplotlib.figure import Figure

from distplb.errors import DistplbError
from distplb.report.run import Run

__all__ = ["ReportFigure", "refuse_if_lacking"]


class ReportFigure(NamedTuple):
    """One figure of a report.

    Args:
        title: the heading.
        draw: makes the figure from a run and a width in inches.
        caption: what is plotted and how to read it, with the run's numbers.
        lacks: the data that the run lacks, in one sentence; empty if the figure can be drawn.
    """

    title: str
    draw: Callable[[Run, float], Figure]
    caption: Callable[[Run], str]
    lacks: Callable[[Run], str]

    @property
    def name(self) -> str:
        """The name in file names and in links to the section."""
        return self.draw.__name__.replace("_", "-")


def refuse_if_lacking(lack: str) -> None:
    """Refuse to draw a run that lacks data.

    Raises:
        DistplbError: with `lack` as its message, unless it is empty.
    """
    if lack:
        raise DistplbError(lack)
