"""`ReportFigure`: what each figure of a report consists of."""

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
        title: its heading.
        draw: from a run and a width in inches to a figure.
        caption: what to see in it, in numbers.
        lacks: what the run needs and does not have, in one sentence; empty where the figure can be drawn.
    """

    title: str
    draw: Callable[[Run, float], Figure]
    caption: Callable[[Run], str]
    lacks: Callable[[Run], str]

    @property
    def name(self) -> str:
        """In files and addresses."""
        return self.draw.__name__.replace("_", "-")


def refuse_if_lacking(lack: str) -> None:
    """Refuse to draw a run that does not have what the figure needs.

    Raises:
        DistplbError: with that, unless it is empty.
    """
    if lack:
        raise DistplbError(lack)
