"""Planning on 1 to 8 ranks: time, overhead and quality; and a model of the time up to 1,024 ranks.

    python -m benchmarks.planning.bench_scaling --loads DIR --output benchmarks/results/DATE-scaling.md
    python -m benchmarks.planning.bench_scaling --loads DIR --hosts 4 --megabits 1000  # as root: slow links

Every number of ranks is a separate job under torchrun (scaling/turns.py), in which plans and bare collectives of the
same sizes take turns. The model is in scaling/model.py.
Shapes: M predictions.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.figures import scaling as figure
from benchmarks.planning.scaling.cells import Cell, measured, more_candidates, names_of
from benchmarks.planning.scaling.model import interval
from benchmarks.planning.scaling.report import reported
from benchmarks.planning.scaling.turns import CASES
from benchmarks.planning.scaling.wall import FAR, WallModel, modelled
from benchmarks.shared.tables import publish


def main() -> None:
    """Measure, fit, print the report, and write it if requested."""
    options = parsed_options()
    cells = measured(options)
    cores = len(os.sched_getaffinity(0))
    model = modelled(cells, cores)
    samples = {} if options.hosts else more_candidates(options.loads, options.cases)
    publish(reported(cells, model, samples, cores, options), options.output)
    if options.output:
        figure.draw(panels(cells, model, cores), samples, options.output.with_suffix(".png"))


def parsed_options() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description="Planning on more ranks, measured and modelled.")
    parser.add_argument("--loads", type=Path, required=True, help="folder of the recorded loads")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 3, 4, 6, 8], help="multiples of --hosts")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="LOAD", help=", ".join(CASES))
    parser.add_argument("--hosts", type=int, help="spread the ranks over this many network namespaces")
    parser.add_argument("--megabits", type=float, help="speed of each host's link, in Mbit/s")
    parser.add_argument("--patience", type=float, default=0.2, help="seconds to wait for a quiet machine before a turn")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the report (Markdown) and a figure there")
    options = parser.parse_args()
    if options.hosts and any(ranks % options.hosts for ranks in options.ranks):
        parser.error(f"--ranks {options.ranks} are not all multiples of --hosts {options.hosts}; pass multiples")
    if bool(options.megabits) != bool(options.hosts):
        parser.error("--hosts needs --megabits, the speed of the hosts' links, and --megabits needs --hosts; pass both")
    return options


def panels(cells: Sequence[Cell], model: WallModel, cores: int) -> list[figure.Panel]:
    """Build two panels for each load: one with a fixed K, one with a fixed number of candidates per rank."""
    drawn = []
    for name in names_of(cells):
        case = CASES[name]
        for title, number in (
            (f"{name}, K = {case.fixed}", lambda ranks, case=case: case.fixed),
            (f"{name}, {case.each} per rank", lambda ranks, case=case: case.each * ranks),
        ):
            own = [cell for cell in cells if cell.case == name and cell.candidates == number(cell.ranks)]
            far = [model.wall(own[0], ranks, number(ranks)) for ranks in FAR]
            here = [model.wall(own[0], cell.ranks, number(cell.ranks), cores)[0] for cell in own]
            drawn.append(
                figure.Panel(
                    title,
                    cores,
                    [cell.ranks for cell in own],
                    {
                        "wall": [cell.every(lambda turn: turn.wall) for cell in own],
                        "CPU s per rank": [cell.every(lambda turn: turn.cpu) for cell in own],
                        "collectives alone": [cell.every(lambda turn: turn.bare) for cell in own],
                    },
                    here,
                    FAR,
                    [estimate for estimate, _ in far],
                    np.stack(interval(np.stack([draws for _, draws in far], 1))),
                )
            )
    return drawn


if __name__ == "__main__":
    main()
