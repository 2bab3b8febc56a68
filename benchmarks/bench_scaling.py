"""Planning on 1 to 8 ranks: time, quality, what of the time is overhead; and a model of it up to 1,024 ranks.

    python benchmarks/bench_scaling.py --loads DIR --output benchmarks/results/DATE-scaling.md
    python benchmarks/bench_scaling.py --loads DIR --hosts 4 --megabits 1000  # as root: namespaces on slow links

Every number of ranks is a job of its own under torchrun (scaling_turns.py), in which plans and bare collectives of the
same sizes take turns. The model is scaling_model.py.
Shapes: T steps, L layers, E experts, P slots, K candidates, R ranks.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scaling_figure
from scaling_model import (
    COLLECTIVE,
    POLISH,
    SEARCH,
    STAGES,
    Fit,
    Turn,
    collective_row,
    fitted,
    interval,
    polish_row,
    search_row,
    share_of_core,
)
from scaling_turns import CASES, quality
from tables import command_line, header, markdown, progress

import distplb

FAR = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
TARGET_RANKS, TARGET = 4, 1.5  # overhead is at most so many times the bare collectives
SECONDS_OF_A_JOB = 900
HERE = Path(__file__).parent
TEXT = (
    "Every rank is a process that searches with one thread. The wall is from the first rank's begin to the last rank's "
    "end, on the clock that they share; they start at one agreed moment. Overhead is the wall less the slowest rank's "
    "search and less the root's polish, so waiting for late ranks, Python, checks and copies are all in it. `bare` are "
    "the same collectives (sizes and types as the plan asked for them) straight from torch.distributed, back to back, "
    "in the same processes, turn by turn with the plans. Given are medians over turns and, in brackets, quartiles; × "
    "is the median of overhead / bare, turn by turn. A turn begins when nothing else runs on the machine, or after "
    "--patience seconds all the same; where {least} turns or more began in quiet, only they are counted (`quiet`)."
)
LEAST_QUIET = 5
SHARED = (
    "Rows marked * have more ranks than cores. Their walls are of processes that take turns on a core, also in what "
    "is called overhead, and say nothing about as many cores; the CPU seconds of a rank do."
)
MODEL = (
    "What is fitted: the bare collectives of all cells together (R > 1), search and polish of each load on CPU "
    "seconds, and what a plan takes beyond bare collectives on as many ranks as there are cores. Assumed: gloo's ring "
    "for all-reduces, its tree for the broadcast; one link speed for all pairs; R ranks on C cores take R / C times as "
    "long over a message; no rank is late by itself. Brackets hold 95 % of {draws} fits to turns that were drawn "
    "again: that is noise, not whether the assumptions hold, and nothing beyond {most} ranks was measured."
)
DRAWS = 1000
RING = COLLECTIVE.index("ring message")


@dataclass(frozen=True)
class Cell:
    """One load at one number of ranks and candidates; `turns` that count, and how many began in `quiet`, of all."""

    case: str
    ranks: int
    candidates: int
    collectives: tuple[tuple[str, int], ...]  # kind and bytes
    imbalance: float
    bound: float
    digest: int
    turns: tuple[Turn, ...]
    quiet: tuple[int, int]

    @classmethod
    def of(cls, found: dict[str, Any]) -> Cell:
        """From what scaling_turns.py writes."""
        own = {name: found[name] for name in ("case", "ranks", "candidates", "imbalance", "bound", "digest")}
        collectives = tuple((kind, size) for kind, size in found["collectives"])
        turns = tuple(map(Turn.of_marks, found["turns"]))
        quiet = tuple(turn for turn in turns if turn.quiet)
        counted = quiet if len(quiet) >= LEAST_QUIET else turns
        return cls(**own, collectives=collectives, turns=counted, quiet=(len(quiet), len(turns)))

    def every(self, figure: Callable[[Turn], float]) -> list[float]:
        """A figure of each turn."""
        return [figure(turn) for turn in self.turns]

    def median(self, figure: Callable[[Turn], float]) -> float:
        """Of a figure."""
        return float(np.median(self.every(figure)))


@dataclass(frozen=True)
class Model:
    """Everything that a wall is made of, fitted; search and polish of each load."""

    collective: Fit
    rest: dict[str, Fit]
    search: dict[str, Fit]
    polish: dict[str, Fit]

    def wall(self, cell: Cell, ranks: int, candidates: int, cores: float = float("inf")) -> tuple[float, np.ndarray]:
        """Seconds of a plan of the cell's load, and those of all draws `[D]`."""
        rows = [collective_row(kind, size, ranks, cores) for kind, size in cell.collectives]
        share = share_of_core(ranks, cores)
        parts = [
            self.collective.at([np.sum(rows, 0).tolist()]),
            self.rest[cell.case].at([[share]]),
            self.search[cell.case].at([[share * factor for factor in search_row(candidates, ranks)]]),
            self.polish[cell.case].at([polish_row(candidates, ranks)]),
        ]
        return float(sum(estimate[0] for estimate, _ in parts)), np.sum([draws[:, 0] for _, draws in parts], 0)


def main() -> None:
    """Measure, fit, print, and write where that is asked for."""
    options = parsed_options()
    cells = measured(options)
    cores = len(os.sched_getaffinity(0))
    model = modelled(cells, cores)
    samples = {} if options.hosts else more_candidates(options.loads, options.cases)
    report = reported(cells, model, samples, cores, options)
    print(report)
    if options.output:
        options.output.write_text(f"{report}\n")
        scaling_figure.draw(panels(cells, model, cores), samples, options.output.with_suffix(".png"))


# --- measurement ------------------------------------------------------------------------------------------------


def measured(options: argparse.Namespace) -> list[Cell]:
    """All cells, in the order of loads, ranks and candidates."""
    found: list[dict[str, Any]] = []
    for ranks in options.ranks:
        progress(f"{ranks} ranks")
        what = [[name, candidates, CASES[name].turns] for name in options.cases for candidates in numbers(name, ranks)]
        found += on_hosts(options, ranks, what) if options.hosts else on_this_host(options, ranks, what)
    progress("")
    names = list(CASES)
    cells = sorted(map(Cell.of, found), key=lambda cell: (names.index(cell.case), cell.ranks, cell.candidates))
    plans: dict[tuple[str, int], set[int]] = {}
    for cell in cells:
        plans.setdefault((cell.case, cell.candidates), set()).add(cell.digest)
    assert all(len(digests) == 1 for digests in plans.values()), "another number of ranks made another plan"
    return cells


def numbers(name: str, ranks: int) -> list[int]:
    """K at so many ranks: fixed, and so many for each rank."""
    return sorted({CASES[name].fixed, CASES[name].each * ranks})


def arguments(options: argparse.Namespace, what: list[Any], output: Path) -> list[str]:
    """Of scaling_turns.py."""
    given = ["--loads", str(options.loads.resolve()), "--what", json.dumps(what), "--output", str(output)]
    return [*given, "--patience", str(options.patience)]


def on_this_host(options: argparse.Namespace, ranks: int, what: list[Any]) -> list[dict[str, Any]]:
    """One job of so many ranks."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "turns.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        command += [str(HERE / "scaling_turns.py"), *arguments(options, what, output)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        subprocess.run(command, env=environment, check=True, timeout=SECONDS_OF_A_JOB)
        return json.loads(output.read_text())


def on_hosts(options: argparse.Namespace, ranks: int, what: list[Any]) -> list[dict[str, Any]]:
    """The same over network namespaces, as many ranks on each; ranks of a host reach each other without a link."""
    sys.path.insert(0, str(HERE.parent / "tests"))
    import hosts

    with tempfile.TemporaryDirectory() as folder, hosts.hosts(options.hosts, megabits=options.megabits) as members:
        output, log = Path(folder) / "turns.json", Path(folder) / "log"
        given = arguments(options, what, output)
        jobs = hosts.torchrun(members, ranks // options.hosts, HERE / "scaling_turns.py", given, log)
        until = time.monotonic() + SECONDS_OF_A_JOB
        failed = [job.wait(max(0.0, until - time.monotonic())) for job in jobs]
        if any(failed):
            raise SystemExit(log.read_text())
        return json.loads(output.read_text())


def more_candidates(folder: Path, names: Sequence[str]) -> dict[str, list[tuple[int, float, float]]]:
    """By load: K, the imbalance that so many candidates reach, and its lower bound. A plan is the same on any ranks."""
    found = {}
    for name in names:
        case = CASES[name]
        load = case.load(folder)
        found[name] = []
        for candidates in (1 << power for power in range(case.most.bit_length())):
            progress(f"{name}: {candidates} candidates")
            placement = distplb.plan(load, case.topology, num_slots=case.slots, num_candidates=candidates)
            reached = quality(load, case, placement)
            found[name].append((candidates, reached["imbalance"], reached["bound"]))
    progress("")
    return found


# --- model ------------------------------------------------------------------------------------------------------


def modelled(cells: Sequence[Cell], cores: int) -> Model:
    """Fitted to all cells."""
    rows, samples = [], []
    for cell in (cell for cell in cells if cell.ranks > 1):
        for nth, (kind, size) in enumerate(cell.collectives):
            rows.append(collective_row(kind, size, cell.ranks, cores))
            samples.append(cell.every(lambda turn, nth=nth: turn.collectives[nth]))
    rest, search, polish = {}, {}, {}
    for name in names_of(cells):
        own = [cell for cell in cells if cell.case == name]
        # Beyond the cores it is waiting for a core; and in some turns it is nothing at all.
        unshared = [cell for cell in own if cell.ranks <= cores] or own
        beyond = [cell.every(lambda turn: max(1e-6, turn.overhead - turn.bare)) for cell in unshared]
        rest[name] = fitted([[1.0]] * len(unshared), beyond, DRAWS, seed=1)
        given = [search_row(cell.candidates, cell.ranks) for cell in own]
        search[name] = fitted(given, [cell.every(lambda turn: turn.search_cpu) for cell in own], DRAWS, seed=2)
        given = [polish_row(cell.candidates, cell.ranks) for cell in own]
        polish[name] = fitted(given, [cell.every(lambda turn: turn.polish_cpu) for cell in own], DRAWS, seed=3)
    return Model(fitted(rows, samples, DRAWS, seed=0), rest, search, polish)


def panels(cells: Sequence[Cell], model: Model, cores: int) -> list[scaling_figure.Panel]:
    """For each load one of a fixed K, and one of so many candidates for each rank."""
    found = []
    for name in names_of(cells):
        case = CASES[name]
        for title, number in (
            (f"{name}, K = {case.fixed}", lambda ranks, case=case: case.fixed),
            (f"{name}, {case.each} for each rank", lambda ranks, case=case: case.each * ranks),
        ):
            own = [cell for cell in cells if cell.case == name and cell.candidates == number(cell.ranks)]
            far = [model.wall(own[0], ranks, number(ranks)) for ranks in FAR]
            here = [model.wall(own[0], cell.ranks, number(cell.ranks), cores)[0] for cell in own]
            found.append(
                scaling_figure.Panel(
                    title,
                    cores,
                    [cell.ranks for cell in own],
                    {
                        "wall": [cell.every(lambda turn: turn.wall) for cell in own],
                        "CPU s of a rank": [cell.every(lambda turn: turn.cpu) for cell in own],
                        "collectives alone": [cell.every(lambda turn: turn.bare) for cell in own],
                    },
                    here,
                    FAR,
                    [estimate for estimate, _ in far],
                    np.stack(interval(np.stack([draws for _, draws in far], 1))),
                )
            )
    return found


# --- report -----------------------------------------------------------------------------------------------------


def reported(
    cells: Sequence[Cell],
    model: Model,
    samples: dict[str, list[tuple[int, float, float]]],
    cores: int,
    options: argparse.Namespace,
) -> str:
    """The whole result."""
    given = {"--loads": "DIR", "--ranks": options.ranks, "--hosts": options.hosts, "--megabits": options.megabits}
    if options.cases != list(CASES):
        given["--cases"] = options.cases
    parts = [
        header(title(options), TEXT.format(least=LEAST_QUIET), command_line("bench_scaling.py", given), "cpu"),
        wrapped(SHARED),
    ]
    if options.output:
        parts.append(f"![Seconds against ranks, measured and modelled]({options.output.with_suffix('.png').name})")
    parts.append(f"## What to see\n\n{seen(cells, model)}")
    parts.append(f"## Overhead at {TARGET_RANKS} ranks\n\n{targets(cells)}")
    for name in names_of(cells):
        own = [cell for cell in cells if cell.case == name]
        sizes = ", ".join(f"{kind} {size:,} B" for kind, size in own[0].collectives)
        parts.append(f"## {name}\n\n{times(own, cores)}\n\n{wrapped(f'Collectives: {sizes}. By stage, in ms:')}")
        parts.append(stages(own, cores))
    parts.append(f"## The model\n\n{wrapped(MODEL.format(draws=f'{DRAWS:,}', most=max(options.ranks)))}")
    parts += [
        parameters(model),
        checked(cells, model, cores),
        f"Carried on, a core for each rank:\n\n{far(cells, model)}",
    ]
    if samples:
        parts.append(f"## What more candidates bring\n\n{brought(samples)}")
    return "\n\n".join(parts)


def title(options: argparse.Namespace) -> str:
    """Of the result."""
    if not options.hosts:
        return "Planning on more ranks"
    return f"Planning on {options.hosts} hosts with links of {options.megabits:g} Mbit/s"


def seen(cells: Sequence[Cell], model: Model) -> str:
    """In words, from the figures."""
    texts = []
    ratios = [cell.median(lambda turn: turn.overhead / turn.bare) for cell in cells if cell.ranks == TARGET_RANKS]
    if ratios:
        met = sum(ratio <= TARGET for ratio in ratios)
        texts.append(
            f"At {TARGET_RANKS} ranks overhead is {min(ratios):.2f} to {max(ratios):.2f} × the bare collectives; "
            f"{met} of {len(ratios)} are at most {TARGET:g} ×."
        )
    for name in names_of(cells):
        cell, fixed = next(cell for cell in cells if cell.case == name), CASES[name].fixed
        walls = {ranks: model.wall(cell, ranks, fixed)[0] for ranks in FAR}
        best = min(walls, key=lambda ranks: walls[ranks])
        texts.append(
            f"{name}, K = {fixed}, modelled with a core each: {ms(walls[1])} ms on one rank, least on {best} "
            f"({ms(walls[best])} ms), {ms(walls[FAR[-1]])} ms on {FAR[-1]:,}."
        )
    step, low, high = (1e6 * value[RING] for value in (model.collective.parameters, *interval(model.collective.draws)))
    quiet, turns = np.sum([cell.quiet for cell in cells], 0)
    texts.append(
        f"Far out it is gloo's ring that takes the time: its messages follow one another, and grow with the ranks. One "
        f"took {step:.0f} µs [{low:.0f} – {high:.0f}] here, where ranks share cores and {quiet} of {turns:,} turns "
        "began in quiet; with cores of their own it takes less, and NCCL's trees send fewer."
    )
    texts.append("Any number of ranks made the same plan of the same candidates: every run checks that.")
    return "\n".join(textwrap.fill(text, 110, initial_indent="- ", subsequent_indent="  ") for text in texts)


def targets(cells: Sequence[Cell]) -> str:
    """Overhead against bare collectives."""
    lines = []
    for cell in (cell for cell in cells if cell.ranks == TARGET_RANKS):
        ratio = cell.median(lambda turn: turn.overhead / turn.bare)
        lines.append(
            [
                f"{cell.case}, K = {cell.candidates}",
                spread(cell.every(lambda turn: turn.overhead)),
                spread(cell.every(lambda turn: turn.bare)),
                f"{ratio:.2f}",
                f"≤ {TARGET:g}",
                "met" if ratio <= TARGET else "missed",
            ]
        )
    return markdown(["load", "overhead ms", "bare ms", "×", "asked", "verdict"], lines)


def times(cells: Sequence[Cell], cores: int) -> str:
    """A row for each cell of one load."""
    head = [
        "ranks",
        "K",
        "wall ms",
        "slowest search",
        "polish",
        "overhead",
        "bare",
        "×",
        "CPU ms a rank",
        "imbalance",
        "quiet",
    ]
    lines = [
        [
            marked(cell, cores),
            str(cell.candidates),
            spread(cell.every(lambda turn: turn.wall)),
            *(
                ms(cell.median(figure))
                for figure in (
                    lambda turn: turn.slowest,
                    lambda turn: turn.stages[STAGES.index("polish")],
                    lambda turn: turn.overhead,
                    lambda turn: turn.bare,
                )
            ),
            f"{cell.median(lambda turn: turn.overhead / turn.bare):.2f}",
            ms(cell.median(lambda turn: turn.cpu)),
            f"{cell.imbalance:.5f}",
            "{} of {}".format(*cell.quiet),
        ]
        for cell in cells
    ]
    return f"{markdown(head, lines)}\n\nLower bound of the imbalance: {cells[0].bound:.5f}."


def stages(cells: Sequence[Cell], cores: int) -> str:
    """The wall's parts, and each bare collective, in ms."""
    names = ["header", "sum", "min", "broadcast"]
    lines = []
    for cell in cells:
        parts = [cell.median(lambda turn, nth=nth: turn.stages[nth]) for nth in range(len(STAGES))]
        bare = [cell.median(lambda turn, nth=nth: turn.collectives[nth]) for nth in range(len(names))]
        lines.append([marked(cell, cores), str(cell.candidates), *map(ms, parts), *map(ms, bare)])
    return markdown(["ranks", "K", *STAGES, *(f"bare {name}" for name in names)], lines)


def parameters(model: Model) -> str:
    """All of them, with their intervals."""
    parts = [("collectives", COLLECTIVE, model.collective)]
    for name in model.search:
        parts += [(name, SEARCH, model.search[name]), (name, POLISH, model.polish[name])]
        parts.append((name, ("rest",), model.rest[name]))
    lines = []
    for what, names, fit in parts:
        low, high = interval(fit.draws)
        for nth, name in enumerate(names):
            unit, scale = ("ns", 1e9) if name == "byte" else ("µs", 1e6)
            figures = (f"{scale * value:.3g}" for value in (fit.parameters[nth], low[nth], high[nth]))
            lines.append([f"{what}: {name}", *figures, unit])
    return markdown(["parameter", "fitted", "low", "high", "unit"], lines)


def checked(cells: Sequence[Cell], model: Model, cores: int) -> str:
    """How far the model is from the walls, which it was not fitted on."""
    lines = []
    for name in names_of(cells):
        ratios = [
            model.wall(cell, cell.ranks, cell.candidates, cores)[0] / cell.median(lambda turn: turn.wall)
            for cell in cells
            if cell.case == name
        ]
        lines.append([name, f"{np.median(ratios):.2f}", f"{min(ratios):.2f}", f"{max(ratios):.2f}"])
    head = ["modelled wall on these cores / measured", "median", "least", "most"]
    return (
        f"{wrapped('Walls themselves are not fitted. Modelled on these cores, against the measured:')}\n\n"
        + markdown(head, lines)
    )


def far(cells: Sequence[Cell], model: Model) -> str:
    """Walls in ms at more ranks than were measured."""
    ranks = FAR[::2]
    lines = []
    for name in names_of(cells):
        cell, case = next(cell for cell in cells if cell.case == name), CASES[name]
        for what, number in ((f"K = {case.fixed}", None), (f"{case.each} for each rank", case.each)):
            walls = [model.wall(cell, many, case.fixed if number is None else number * many) for many in ranks]
            ends = (interval(draws) for _, draws in walls)
            texts = [
                f"{ms(estimate)} [{ms(float(low))} – {ms(float(high))}]"
                for (estimate, _), (low, high) in zip(walls, ends, strict=True)
            ]
            lines.append([f"{name}, {what}", *texts])
    return markdown(["wall in ms at ranks", *(f"{many:,}" for many in ranks)], lines)


def brought(samples: dict[str, list[tuple[int, float, float]]]) -> str:
    """Imbalance against the number of candidates; measured, and not carried on."""
    numbers_of = sorted({candidates for found in samples.values() for candidates, _, _ in found})[::2]
    lines = []
    for name, found in samples.items():
        reached = {candidates: value for candidates, value, _ in found}
        texts = [f"{reached[number]:.5f}" if number in reached else "" for number in numbers_of]
        lines.append([name, f"{found[0][2]:.5f}", *texts])
    return markdown(["imbalance at K", "bound", *(f"{number:,}" for number in numbers_of)], lines)


def names_of(cells: Sequence[Cell]) -> list[str]:
    """The loads, each once."""
    return list(dict.fromkeys(cell.case for cell in cells))


def marked(cell: Cell, cores: int) -> str:
    return f"{cell.ranks}{'*' if cell.ranks > cores else ''}"


def ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2f}" if seconds < 0.1 else f"{seconds * 1e3:,.0f}"


def spread(seconds: Sequence[float]) -> str:
    """Median and quartiles, in ms."""
    low, middle, high = np.quantile(seconds, [0.25, 0.5, 0.75])
    return f"{ms(middle)} [{ms(low)} – {ms(high)}]"


def wrapped(text: str) -> str:
    return textwrap.fill(text, 110)


def parsed_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Planning on more ranks, measured and modelled.")
    parser.add_argument("--loads", type=Path, required=True, help="folder of the recorded loads")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 3, 4, 6, 8], help="multiples of --hosts")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="LOAD", help=", ".join(CASES))
    parser.add_argument("--hosts", type=int, help="spread the ranks over so many network namespaces")
    parser.add_argument("--megabits", type=float, help="per second, of each host's link")
    parser.add_argument("--patience", type=float, default=0.2, help="seconds to wait for a quiet machine, each time")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the result there, as markdown, and a figure")
    options = parser.parse_args()
    if options.hosts and any(ranks % options.hosts for ranks in options.ranks):
        parser.error(f"--ranks {options.ranks}: {options.hosts} hosts take as many ranks each")
    if options.megabits and not options.hosts:
        parser.error("--megabits is of the links between --hosts")
    return options


if __name__ == "__main__":
    main()
