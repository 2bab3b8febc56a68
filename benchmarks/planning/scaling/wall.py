"""The model of a plan's wall time, fitted to the measured cells and extrapolated to more ranks.

Shapes: D draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.planning.scaling.cells import Cell, names_of
from benchmarks.planning.scaling.model import Fit, collective_row, fitted, polish_row, search_row, share_of_core

__all__ = ["DRAWS", "FAR", "WallModel", "modelled"]

FAR = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)  # ranks
DRAWS = 1000


@dataclass(frozen=True)
class WallModel:
    """Fits of all parts of a wall time; `rest`, `search` and `polish` are by load."""

    collective: Fit
    rest: dict[str, Fit]
    search: dict[str, Fit]
    polish: dict[str, Fit]

    def wall(self, cell: Cell, ranks: int, candidates: int, cores: float = float("inf")) -> tuple[float, np.ndarray]:
        """Predict the seconds of a plan of the cell's load, and those of all draws `[D]`."""
        rows = [collective_row(kind, size, ranks, cores) for kind, size in cell.collectives]
        share = share_of_core(ranks, cores)
        parts = [
            self.collective.at([np.sum(rows, 0).tolist()]),
            self.rest[cell.case].at([[share]]),
            self.search[cell.case].at([[share * factor for factor in search_row(candidates, ranks)]]),
            self.polish[cell.case].at([polish_row(candidates, ranks)]),
        ]
        return float(sum(estimate[0] for estimate, _ in parts)), np.sum([draws[:, 0] for _, draws in parts], 0)


def modelled(cells: Sequence[Cell], cores: int) -> WallModel:
    """Fit the model to all cells."""
    rows, samples = [], []
    for cell in (cell for cell in cells if cell.ranks > 1):
        for nth, (kind, size) in enumerate(cell.collectives):
            rows.append(collective_row(kind, size, cell.ranks, cores))
            samples.append(cell.every(lambda turn, nth=nth: turn.collectives[nth]))
    rest, search, polish = {}, {}, {}
    for name in names_of(cells):
        own = [cell for cell in cells if cell.case == name]
        # With more ranks than cores the rest includes waiting for a core. In some turns it is zero or negative.
        unshared = [cell for cell in own if cell.ranks <= cores] or own
        beyond = [cell.every(lambda turn: max(1e-6, turn.overhead - turn.bare)) for cell in unshared]
        rest[name] = fitted([[1.0]] * len(unshared), beyond, DRAWS, seed=1)
        factors = [search_row(cell.candidates, cell.ranks) for cell in own]
        search[name] = fitted(factors, [cell.every(lambda turn: turn.search_cpu) for cell in own], DRAWS, seed=2)
        factors = [polish_row(cell.candidates, cell.ranks) for cell in own]
        polish[name] = fitted(factors, [cell.every(lambda turn: turn.polish_cpu) for cell in own], DRAWS, seed=3)
    return WallModel(fitted(rows, samples, DRAWS, seed=0), rest, search, polish)
