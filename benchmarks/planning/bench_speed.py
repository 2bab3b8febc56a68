"""How long `distplb.plan` takes on DeepSeek-V3's recorded loads, on a quiet machine and on busy cores.

    python -m benchmarks.planning.bench_speed --loads DIR --against COMMIT --output benchmarks/results/DATE-speed.md

With `--against`, the package of that commit takes turns with this one in the same process.
Shapes: T steps, L layers, E experts, P slots, M GPUs.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

import distplb
from benchmarks.shared.baselines import greedy_numpy
from benchmarks.shared.earlier import EARLIER, put_earlier
from benchmarks.shared.loads import Layout, real_loads, wobbling_steps
from benchmarks.shared.tables import command_line, header, markdown, progress, publish, verdict
from distplb import Placement, imbalance, lower_bound

MODEL, STEPS, DEVIATION = "deepseek-v3", 32, 0.1
NOW, BEFORE, NUMPY = "now", "before", "greedy_numpy"
MOST_TIMES_BUSY = 3  # the quiet time
BUSY = "import time\nwhile True: time.perf_counter()"
TEXT = (
    "Time of whole `plan` calls with one candidate: median of all calls, quartiles in brackets; planners take turns. "
    f"Imbalance is the mean over layers and loads. With T = {STEPS}, each load is divided into as many steps, whose "
    f"popularities deviate log-normally ({DEVIATION}); imbalance is that of {STEPS} other steps, and greedy plans on "
    "their sum. `busy` has one other process for each core, which does nothing but look at the clock."
)


@dataclass(frozen=True)
class Case:
    """What is planned, and its targets.

    Args:
        layout: the cluster and its slots.
        steps: T.
        milliseconds: the most that a call takes on a quiet machine.
        imbalance: the most that it leaves, over the lower bound if `of_bound`; None for no more than before.
    """

    layout: Layout
    steps: int
    milliseconds: float
    imbalance: float | None = None
    of_bound: bool = False

    @property
    def name(self) -> str:
        """As in the tables."""
        return f"{self.layout.slots} on {self.layout.topology.num_gpus}" + f", T = {self.steps}" * (self.steps > 1)


CASES = (
    Case(Layout(4, 288), 1, 4, 1.0002),
    Case(Layout(8, 320), 1, 5, 1.0006),
    Case(Layout(4, 256), 1, 3, 1.0005, of_bound=True),
    Case(Layout(4, 288), STEPS, 200),
)


@dataclass
class Found:
    """Of one planner in one case: imbalance, and seconds on a quiet machine and on busy cores."""

    imbalance: float = 0.0
    quiet: list[float] = field(default_factory=list)
    busy: list[float] = field(default_factory=list)


def main() -> None:
    """Measure, print the report, and write it if requested."""
    options = parsed_options()
    began = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        packages = {NOW: distplb}
        if options.against:
            put_earlier(options.against, Path(folder))
            sys.path.insert(0, folder)
            packages[BEFORE] = import_module(EARLIER)
        loads = real_loads(options.loads)[MODEL]
        cases = [(case, *measured(case, packages, loads, options.repeats)) for case in CASES]
    progress("")
    command = command_line(
        "planning.bench_speed", {"--loads": "DIR", "--against": options.against, "--repeats": options.repeats}
    )
    text = f"{TEXT} Load average of the machine before: {began:.1f}."
    parts = [header("How long a plan takes", text, command, "cpu"), table(cases), checked(cases)]
    publish("\n\n".join(parts), options.output)


def parsed_options() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--loads", type=Path, required=True, metavar="DIR", help="folder with the recorded loads")
    parser.add_argument("--against", metavar="COMMIT", help="also time the package of this commit")
    parser.add_argument("--repeats", type=int, default=12, help="timed calls on each load, quiet and busy")
    parser.add_argument("--output", type=Path, metavar="FILE", help="also write the report to this file")
    return parser.parse_args()


# --- measurement ------------------------------------------------------------------------------------------------


def measured(
    case: Case, packages: dict[str, ModuleType], loads: list[Tensor], repeats: int
) -> tuple[dict[str, Found], float]:
    """Judge all planners on every load and time them in turns; and the mean lower bound."""
    topology, slots = case.layout.topology, case.layout.slots
    planners: dict[str, Callable[[Tensor], Any]] = {
        name: partial(planned, package, nodes=case.layout.nodes, slots=slots) for name, package in packages.items()
    }
    planners[NUMPY] = lambda load: greedy_numpy(load if load.dim() == 2 else load.sum(0), topology, slots)
    found = {name: Found() for name in planners}
    seen = [wobbling_steps(load, case.steps, DEVIATION, seed=0) for load in loads] if case.steps > 1 else loads
    judged = [wobbling_steps(load, case.steps, DEVIATION, seed=1) for load in loads] if case.steps > 1 else loads
    for name, planner in planners.items():
        uneven = []
        for load, other in zip(seen, judged, strict=True):
            placement = Placement(planner(load), load.shape[-1], topology.num_gpus)
            uneven.append(float(imbalance(other, placement).mean()))
        found[name].imbalance = float(np.mean(uneven))
    for is_busy in (False, True):
        with every_core_busy() if is_busy else nothing():
            for repeat in range(repeats):
                progress(f"{case.name}{', busy' * is_busy}: {repeat + 1} of {repeats}")
                for load in seen:
                    for name, planner in planners.items():
                        start = time.perf_counter()
                        planner(load)
                        taken = time.perf_counter() - start
                        (found[name].busy if is_busy else found[name].quiet).append(taken)
    bounds = [lower_bound(load, topology, slots) for load in judged]
    return found, float(torch.cat([one.flatten() for one in bounds]).mean())


def planned(package: ModuleType, load: Tensor, *, nodes: int, slots: int) -> Tensor:
    """Plan with one candidate: `[L, P]`."""
    topology = package.Topology(nodes, Layout(nodes, slots).topology.gpus_per_node)
    table: Tensor = package.plan(load, topology, num_slots=slots, num_candidates=1).expert_of_slot
    return table


@contextmanager
def every_core_busy() -> Iterator[None]:
    """A process for each core, for as long as the block runs."""
    others = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in os.sched_getaffinity(0)]
    try:
        time.sleep(1)  # until they have started
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


@contextmanager
def nothing() -> Iterator[None]:
    """Leave the machine as it is."""
    yield


# --- report -----------------------------------------------------------------------------------------------------


def table(cases: list[tuple[Case, dict[str, Found], float]]) -> str:
    """A row for each planner in each case."""
    lines = []
    for case, found, bound in cases:
        for name, one in found.items():
            cells = [cell for times in (one.quiet, one.busy) for cell in quartiles(times)]
            times_numpy = np.median(found[NUMPY].quiet) / np.median(one.quiet)
            lines.append([case.name, name, f"{one.imbalance:.5f}", f"{one.imbalance / bound:.5f}", *cells])
            lines[-1].append(f"{times_numpy:.2f}")
    head = [
        "slots on GPUs",
        "planner",
        "imbalance",
        "÷ bound",
        "ms",
        "[quartiles]",
        "ms, busy",
        "[quartiles]",
        "× numpy",
    ]
    return markdown(head, lines)


def quartiles(seconds: list[float]) -> tuple[str, str]:
    """Median and quartiles in milliseconds."""
    low, middle, high = 1e3 * np.quantile(seconds, (0.25, 0.5, 0.75))
    return f"{middle:.2f}", f"[{low:.2f} – {high:.2f}]"


def checked(cases: list[tuple[Case, dict[str, Found], float]]) -> str:
    """A row for each target."""
    lines = []
    for case, found, bound in cases:
        own = found[NOW]
        quiet, busy = (1e3 * float(np.median(times)) for times in (own.quiet, own.busy))
        reached, most = own.imbalance, case.imbalance
        if most is None:
            most = found[BEFORE].imbalance if BEFORE in found else None
        elif case.of_bound:
            reached /= bound
        measures = [
            ("imbalance ÷ bound" if case.of_bound else "imbalance", reached, most, 5),
            ("ms", quiet, case.milliseconds, 2),
            ("ms, busy ÷ quiet", busy / quiet, MOST_TIMES_BUSY, 2),
        ]
        if case.steps == 1:  # half of greedy's time or less
            measures.append((f"ms ÷ that of {NUMPY}", quiet / (1e3 * float(np.median(found[NUMPY].quiet))), 0.5, 2))
        for measure, value, limit, digits in measures:
            if limit is not None:
                cells = [f"≤ {limit:.{digits}f}", f"{value:.{digits}f}", verdict(value <= limit)]
                lines.append([case.name, measure, *cells])
    return "## Targets\n\n" + markdown(["slots on GPUs", "measure", "target", "reached", "verdict"], lines)


if __name__ == "__main__":
    main()
