"""The tables of the benchmark of splits: targets, where another method is better, and all figures of each load.

Shapes: R replica slots on each GPU.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from benchmarks.shared.tables import markdown, verdict
from benchmarks.splitting.cases import IMBALANCES
from benchmarks.splitting.measurement import Figures, Result
from benchmarks.splitting.methods import DISTPLB, LEAVING, OWN, PLANNED, PRICED, PRICED_LEAVING

__all__ = [
    "better",
    "cheaper",
    "comparison_lines",
    "cost_summary",
    "cost_table",
    "evenness_lines",
    "leaving_table",
    "spread",
    "summary",
    "table",
]

MOST_REPLICAS = {1.1: 31, 1.5: 40, 2.0: 44, 3.0: 46}  # with R = 2, by the imbalance of the power law
MOST_IMBALANCE = {1: {1.1: 1.010, 1.5: 1.013, 2.0: 1.015, 3.0: 1.019}, 2: dict.fromkeys(IMBALANCES, 1.005)}  # by R
MOST_RECORDED = 1.008
MEASURES = (  # another method is better
    "fewer replicas, at most as uneven",
    "as many replicas, more even",
    "lower cost",
    "lower cost at full prices, by more than 1/64 of one",
    "that, by a method that leaves homes alone",
)
NEAR = 1 / 64  # of a replica's price; levels that are nearer to each other are not told apart by distplb's search
ROUNDING = 1e-6  # the tolerance is a fraction of 2^20, the target a decimal


def spread(values: Sequence[float], digits: int) -> str:
    """Format the median and the quartiles.

    >>> spread([1, 2, 3, 4, 5], digits=0)
    '3 (2–4)'
    """
    low, middle, high = (f"{value:.{digits}f}" for value in np.percentile(values, [25, 50, 75]))
    return middle if low == high == middle else f"{middle} ({low}–{high})"


# --- targets ----------------------------------------------------------------------------------------------------


def comparison_lines(results: list[Result]) -> list[list[str]]:
    """Format in how many steps another method is better, over all loads and methods."""
    number, steps = dict.fromkeys(MEASURES, 0), 0
    for result in results:
        for step, (own, priced) in enumerate(zip(result.figures[DISTPLB], result.figures[PRICED], strict=True)):
            others = [each[step] for name, each in result.figures.items() if name not in OWN]
            at_home = [each[step] for name, each in result.figures.items() if name not in (*OWN, *PLANNED)]
            near = result.prices[step] * NEAR
            is_better = (
                any(one.beats(own) for one in others),
                any(one.imbalance < own.imbalance and one.replicas == own.replicas for one in others),
                any(one.cost < priced.cost - ROUNDING for one in others),
                any(one.full_cost < priced.cost - near for one in others),
                any(one.full_cost < priced.cost - near for one in at_home),
            )
            for name, one in zip(MEASURES, is_better, strict=True):
                number[name] += one
            steps += 1
    return [
        [f"all, {steps} steps", f"another method: {name}", "0 steps", f"{each} steps", verdict(each == 0)]
        for name, each in number.items()
    ]


def evenness_lines(results: list[Result]) -> list[list[str]]:
    """Format the targets of loads on one node: worst imbalance, and median replicas of power laws."""
    lines = []
    for result in results:
        own, case = result.figures[DISTPLB], result.case
        limit = MOST_RECORDED if case.is_recorded else MOST_IMBALANCE.get(case.slots, {}).get(case.imbalance)
        if limit is None or case.topology.num_nodes > 1:
            continue
        worst = max(one.imbalance for one in own)
        is_met = verdict(worst <= limit + ROUNDING)
        lines.append([case.text, "worst imbalance", f"≤ {limit}", f"{worst:.4f}", is_met])
        if case.imbalance is not None and case.slots == 2:
            replicas, most = float(np.median([one.replicas for one in own])), MOST_REPLICAS[case.imbalance]
            lines.append([case.text, "replicas, median", f"≤ {most}", f"{replicas:g}", verdict(replicas <= most)])
    return lines


# --- another method is better -----------------------------------------------------------------------------------


def better(results: list[Result]) -> str:
    """Format a row for each load and method that is better than distplb in some step."""
    lines = []
    for result in results:
        own = result.figures[DISTPLB]
        for name, figures in result.figures.items():
            if name in OWN:
                continue
            pairs = list(zip(figures, own, result.levels, strict=True))
            fewer = sum(one.beats(mine) for one, mine, _ in pairs)
            even = [(mine, aim) for one, mine, aim in pairs if one.is_more_even(mine)]
            missed = sum(mine.imbalance > aim for mine, aim in even)
            sends = sum(one.sends_less(mine) for one, mine, _ in pairs)
            if fewer or even or sends:
                lines.append([result.case.text, name, *map(str, (len(own), fewer, len(even), missed, sends))])
    head = ["load", "method", "steps", "fewer replicas", "more even", "level missed", "fewer sends"]
    return markdown(head, lines) if lines else "None."


def cheaper(results: list[Result]) -> str:
    """Format a row for each load and method that costs less than distplb with prices in some step."""
    lines = [
        [result.case.text, name, own, *cells]
        for result in results
        for own in (PRICED, PRICED_LEAVING)
        for name in result.figures
        if own in result.figures and (cells := _cheaper_cells(result, name, own))
    ]
    head = ["load", "split", "cheaper than", "steps", "cheaper", "at full price", "saving, median", "largest"]
    return markdown(head, lines) if lines else "None."


def _cheaper_cells(result: Result, name: str, own: str) -> list[str]:
    """Steps, those that are cheaper, and at full price; the saving. Empty if none are."""
    trios = list(zip(result.figures[name], result.figures[own], result.prices, strict=True))
    saved = [1 - one.cost / mine.cost for one, mine, price in trios if one.cost < mine.cost - price * NEAR]
    if not saved:
        return []
    full = sum(one.full_cost < mine.cost - price * NEAR for one, mine, price in trios)
    return [*map(str, (len(trios), len(saved), full)), f"{np.median(saved):.2%}", f"{max(saved):.2%}"]


# --- figures ----------------------------------------------------------------------------------------------------


def summary(results: list[Result]) -> str:
    """Format a row for each load: median imbalance and replicas of each method."""
    names = [name for name in results[0].figures if name not in (LEAVING, PRICED, PRICED_LEAVING)]
    lines = []
    for result in results:
        cells = []
        for name in names:
            each = result.figures[name]
            imbalance = np.median([one.imbalance for one in each])
            cells.append(f"{imbalance:.4f}, {np.median([one.replicas for one in each]):.0f}")
        bound = np.median([one.bound for one in result.figures[DISTPLB]])
        lines.append([result.case.text, f"{bound:.4f}", *cells])
    return markdown(["imbalance, replicas", "bound", *names], lines)


def cost_summary(results: list[Result]) -> str:
    """Format a row for each load: the median cost of each method, and of distplb's priced split its replicas."""
    names = [name for name in results[0].figures if name not in (LEAVING, PRICED, PRICED_LEAVING)]
    lines = []
    for result in results:
        cells = [f"{np.median([one.cost for one in result.figures[name]]):.4f}" for name in names]
        own = []
        for name in (PRICED, PRICED_LEAVING):
            each = result.figures.get(name)
            cost = each and np.median([one.cost for one in each])
            own.append(f"{cost:.4f}, {np.median([one.replicas for one in each]):.0f}" if each else "–")
        lines.append([result.case.text, *own, *cells])
    unpriced = "distplb, not priced"
    return markdown(
        ["cost", f"{PRICED}, replicas", f"{PRICED_LEAVING}, replicas", unpriced, *names[1:]],
        lines,
    )


def leaving_table(results: list[Result]) -> str:
    """Format a row for each load on several nodes: what replicas between nodes are worth, free and at H100's prices."""
    lines = []
    for result in results:
        if LEAVING not in result.figures:
            continue
        inside, free = result.figures[DISTPLB], result.figures[LEAVING]
        priced, leaving = result.figures[PRICED], result.figures[PRICED_LEAVING]
        lines.append(
            [
                result.case.text,
                *(spread([one.imbalance for one in each], 4) for each in (inside, free)),
                *(spread([one.leaving for one in each], 0) for each in (free, leaving)),
                *(spread([one.cost for one in each], 4) for each in (priced, leaving)),
                f"{sum(one.leaving > 0 for one in leaving)} of {len(leaving)}",
                f"{max(max(0.0, 1 - one.cost / other.cost) for one, other in zip(leaving, priced, strict=True)):.2%}",
                f"{max(max(0.0, one.cost / other.cost - 1) for one, other in zip(leaving, priced, strict=True)):.2%}",
            ]
        )
    head = [
        "load",
        "imbalance, inside",
        "free",
        "replicas between nodes, free",
        "priced",
        "cost, inside",
        "between too",
    ]
    return markdown([*head, "steps that use them", "largest saving", "largest loss"], lines)


def table(result: Result) -> str:
    """Format a row for each method: how even its splits are, and what they send."""
    head = ["split", "imbalance", "worst", "bound", "replicas", "sends", "receives"]
    head += ["between GPUs", "between nodes", "µs"]
    lines = []
    for name, each in result.figures.items():
        if name in (PRICED, PRICED_LEAVING):
            continue
        times = [one.microseconds for one in each if one.microseconds is not None]
        lines.append(
            [
                name,
                spread([one.imbalance for one in each], 4),
                f"{max(one.imbalance for one in each):.4f}",
                spread([one.bound for one in each], 4),
                *_replicas(each),
                f"{np.median([one.between_gpus for one in each]):.1%}",
                f"{np.median([one.between_nodes for one in each]):.1%}",
                spread(times, 0) if times else "–",
            ]
        )
    return markdown(head, lines)


def cost_table(result: Result) -> str:
    """Format a row for each method: what its splits cost at H100's prices."""
    lines = [
        [
            name,
            spread([one.cost for one in each], 4),
            f"{max(one.cost for one in each):.4f}",
            spread([one.imbalance for one in each], 4),
            *_replicas(each),
        ]
        for name, each in result.figures.items()
        if name != LEAVING
    ]
    return markdown(["at H100's prices", "cost", "worst", "imbalance", "replicas", "sends", "receives"], lines)


def _replicas(figures: list[Figures]) -> list[str]:
    return [spread([getattr(one, name) for one in figures], 0) for name in ("replicas", "sends", "receives")]
