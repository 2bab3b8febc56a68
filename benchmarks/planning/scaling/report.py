"""The report of bench_scaling: summary, targets, times and stages of each load, the model and its intervals."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Sequence

import numpy as np

from benchmarks.planning.scaling.cells import MIN_QUIET, Cell, names_of
from benchmarks.planning.scaling.model import COLLECTIVE, POLISH, SEARCH, STAGES, interval
from benchmarks.planning.scaling.turns import CASES
from benchmarks.planning.scaling.wall import DRAWS, FAR, WallModel
from benchmarks.shared.tables import command_line, header, markdown, verdict

__all__ = ["reported"]

TARGET_RANKS, TARGET = 4, 1.5  # upper limit of overhead / bare collectives
RING = COLLECTIVE.index("ring message")
TEXT = (
    "Every rank is a process that searches with one thread. Wall time is from the first rank's begin to the last "
    "rank's end, on the clock that they share; they start at one agreed moment. Overhead is the wall time minus the "
    "slowest rank's search and the root's polish, so it includes waiting for late ranks, Python, checks and copies. "
    "`bare` are the same collectives (with the sizes and types of the plan's) called directly in torch.distributed, "
    "back to back, in the same processes, in turns with the plans. Figures are medians over turns, with quartiles in "
    "brackets; × is the median over turns of overhead / bare. A turn begins when nothing else runs on the machine, or "
    "after --patience seconds at the latest; if {quiet} turns or more began on a quiet machine, only they count "
    "(`quiet`)."
)
SHARED = (
    "Rows marked * have more ranks than cores, so ranks take turns on a core. Their wall times and overheads do not "
    "predict those with a core per rank; the CPU seconds of a rank do."
)
MODEL = (
    "Fitted are the bare collectives of all cells together (R > 1), search and polish of each load in CPU seconds, and "
    "the overhead beyond bare collectives, from cells with no more ranks than cores. Assumed are gloo's ring for "
    "all-reduces and its tree for the broadcast, one link speed for all pairs, R / C times the time of a message for R "
    "ranks on C cores, and no rank that is late on its own. Brackets hold 95 % of {draws} fits to resampled turns: "
    "they show noise, not whether the assumptions hold, and nothing beyond {largest} ranks was measured."
)


def reported(
    cells: Sequence[Cell],
    model: WallModel,
    samples: dict[str, list[tuple[int, float, float]]],
    cores: int,
    options: argparse.Namespace,
) -> str:
    """Format the whole report."""
    arguments = {"--loads": "DIR"} | {f"--{name}": getattr(options, name) for name in ("ranks", "hosts", "megabits")}
    if options.cases != list(CASES):
        arguments["--cases"] = options.cases
    parts = [
        header(title(options), TEXT.format(quiet=MIN_QUIET), command_line("planning.bench_scaling", arguments), "cpu"),
        wrapped(SHARED),
    ]
    if options.output:
        parts.append(f"![Seconds against ranks, measured and modelled]({options.output.with_suffix('.png').name})")
    parts.append(f"## Summary\n\n{summary(cells, model)}")
    parts.append(f"## Overhead at {TARGET_RANKS} ranks\n\n{targets(cells)}")
    for name in names_of(cells):
        own = [cell for cell in cells if cell.case == name]
        sizes = ", ".join(f"{kind} {size:,} B" for kind, size in own[0].collectives)
        parts.append(f"## {name}\n\n{times(own, cores)}\n\n{wrapped(f'Collectives: {sizes}. By stage, in ms:')}")
        parts.append(stages(own, cores))
    parts.append(f"## The model\n\n{wrapped(MODEL.format(draws=f'{DRAWS:,}', largest=max(options.ranks)))}")
    parts += [
        parameters(model),
        checked(cells, model, cores),
        f"Extrapolated, with one core per rank:\n\n{far(cells, model)}",
    ]
    if samples:
        parts.append(f"## Imbalance with more candidates\n\n{quality_of_candidates(samples)}")
    return "\n\n".join(parts)


def title(options: argparse.Namespace) -> str:
    """Return the title of the report."""
    if not options.hosts:
        return "Planning on more ranks"
    return f"Planning on {options.hosts} host{'s' * (options.hosts > 1)} with links of {options.megabits:g} Mbit/s"


def summary(cells: Sequence[Cell], model: WallModel) -> str:
    """Summarise the figures in words."""
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
            f"{name}, K = {fixed}, modelled with one core per rank: {ms(walls[1])} ms on one rank, minimum on {best} "
            f"({ms(walls[best])} ms), {ms(walls[FAR[-1]])} ms on {FAR[-1]:,}."
        )
    step, low, high = (1e6 * value[RING] for value in (model.collective.parameters, *interval(model.collective.draws)))
    quiet, turns = np.sum([cell.quiet for cell in cells], 0)
    texts.append(
        f"On many ranks gloo's ring dominates, because its messages are sequential and their number grows with the "
        f"ranks. A message took {step:.0f} µs [{low:.0f} – {high:.0f}] here, where ranks share cores and {quiet} of "
        f"{turns:,} turns began on a quiet machine; with a core per rank it takes less, and NCCL's trees send fewer."
    )
    texts.append("All numbers of ranks made the same plan from the same candidates, which every run checks.")
    return "\n".join(textwrap.fill(text, 110, initial_indent="- ", subsequent_indent="  ") for text in texts)


def targets(cells: Sequence[Cell]) -> str:
    """Format overhead against bare collectives."""
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
                verdict(ratio <= TARGET),
            ]
        )
    return markdown(["load", "overhead ms", "bare ms", "×", "target", "verdict"], lines)


def times(cells: Sequence[Cell], cores: int) -> str:
    """Format a row for each cell of one load."""
    head = [
        "ranks",
        "K",
        "wall ms",
        "slowest search",
        "polish",
        "overhead",
        "bare",
        "×",
        "CPU ms per rank",
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
    """Format the parts of the wall time, and each bare collective, in ms."""
    names = ["header", "sum", "min", "broadcast"]
    lines = []
    for cell in cells:
        parts = [cell.median(lambda turn, nth=nth: turn.stages[nth]) for nth in range(len(STAGES))]
        bare = [cell.median(lambda turn, nth=nth: turn.collectives[nth]) for nth in range(len(names))]
        lines.append([marked(cell, cores), str(cell.candidates), *map(ms, parts), *map(ms, bare)])
    return markdown(["ranks", "K", *STAGES, *(f"bare {name}" for name in names)], lines)


def parameters(model: WallModel) -> str:
    """Format all parameters with their intervals."""
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


def checked(cells: Sequence[Cell], model: WallModel, cores: int) -> str:
    """Compare the model with the measured wall times, which it was not fitted to."""
    lines = []
    for name in names_of(cells):
        ratios = [
            model.wall(cell, cell.ranks, cell.candidates, cores)[0] / cell.median(lambda turn: turn.wall)
            for cell in cells
            if cell.case == name
        ]
        lines.append([name, f"{np.median(ratios):.2f}", f"{min(ratios):.2f}", f"{max(ratios):.2f}"])
    head = ["modelled wall on these cores / measured", "median", "min", "max"]
    return f"{wrapped('The wall times themselves are not fitted. Modelled on these cores / measured:')}\n\n" + markdown(
        head, lines
    )


def far(cells: Sequence[Cell], model: WallModel) -> str:
    """Format modelled wall times in ms, up to more ranks than were measured."""
    ranks = FAR[::2]
    lines = []
    for name in names_of(cells):
        cell, case = next(cell for cell in cells if cell.case == name), CASES[name]
        for what, number in ((f"K = {case.fixed}", None), (f"{case.each} per rank", case.each)):
            walls = [model.wall(cell, many, case.fixed if number is None else number * many) for many in ranks]
            ends = (interval(draws) for _, draws in walls)
            texts = [
                f"{ms(estimate)} [{ms(float(low))} – {ms(float(high))}]"
                for (estimate, _), (low, high) in zip(walls, ends, strict=True)
            ]
            lines.append([f"{name}, {what}", *texts])
    return markdown(["wall in ms at ranks", *(f"{many:,}" for many in ranks)], lines)


def quality_of_candidates(samples: dict[str, list[tuple[int, float, float]]]) -> str:
    """Format the measured imbalance against the number of candidates."""
    numbers_of = sorted({candidates for sample in samples.values() for candidates, _, _ in sample})[::2]
    lines = []
    for name, sample in samples.items():
        reached = {candidates: value for candidates, value, _ in sample}
        texts = [f"{reached[number]:.5f}" if number in reached else "" for number in numbers_of]
        lines.append([name, f"{sample[0][2]:.5f}", *texts])
    return markdown(["imbalance at K", "bound", *(f"{number:,}" for number in numbers_of)], lines)


def marked(cell: Cell, cores: int) -> str:
    return f"{cell.ranks}{'*' if cell.ranks > cores else ''}"


def ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2f}" if seconds < 0.1 else f"{seconds * 1e3:,.0f}"


def spread(seconds: Sequence[float]) -> str:
    """Format median and quartiles in ms."""
    low, middle, high = np.quantile(seconds, [0.25, 0.5, 0.75])
    return f"{ms(middle)} [{ms(low)} – {ms(high)}]"


def wrapped(text: str) -> str:
    return textwrap.fill(text, 110)
