"""The time of a plan against the number of ranks: figures of one turn, a model, intervals of its parameters. Pure.

The model, in seconds; K candidates on R ranks that share C cores, s = max(1, R / C) ranks per core:
- a collective: s × (call + ring or tree message × number of sequential messages + byte × bytes through one rank).
  gloo's all-reduce is a ring, with 2 (R − 1) messages and 2 (R − 1) / R of its bytes; its broadcast is a tree, with
  ⌈log2 R⌉ messages, each of all bytes;
- the slowest rank's search: set-up + candidate × ⌈K / R⌉, in CPU seconds;
- the root's polish: polish + rebuild × (1 − ⌈K / R⌉ / K), because the root has already built those winners that are
  its own candidates.
No parameter is negative. Parameters are fitted to medians over turns by least squares of logarithms, because noise is
multiplicative; their intervals come from resampling the turns.
Shapes: N measured cells, C parameters, D draws, M predictions.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = [
    "COLLECTIVE",
    "POLISH",
    "SEARCH",
    "STAGES",
    "Fit",
    "Turn",
    "collective_row",
    "fitted",
    "interval",
    "polish_row",
    "search_row",
    "share_of_core",
]

STAGES = ("count", "search", "choose", "polish", "share")
_ROUNDS = 8  # iterations of the fit
_MIN_SHARE = 1e-3  # lower limit of prediction / value while fitting, because logarithms need positive numbers
COLLECTIVE, SEARCH, POLISH = (
    ("call", "ring message", "tree message", "byte"),
    ("set-up", "candidate"),
    ("polish", "rebuild"),
)


@dataclass(frozen=True)
class Turn:
    """Seconds of one plan, and of the same collectives alone, over all ranks.

    Args:
        wall: from the first rank's begin to the last one's end.
        stages: the five parts of the wall time, as in STAGES. The search lasts from the first rank's begin to the last
            one's end, and the polish is the root's; the others are the times between, which include waiting for the
            last rank.
        slowest: search time of the slowest rank.
        collectives: time of each alone, from the last rank's end of the one before to the last rank's end.
        cpu: CPU seconds of a rank in the whole plan, mean over ranks.
        search_cpu, polish_cpu: CPU seconds of the search, maximum over ranks; and of the root's polish.
        quiet: whether nothing else ran on the machine when the turn started.
    """

    wall: float
    stages: tuple[float, ...]
    slowest: float
    collectives: tuple[float, ...]
    cpu: float
    search_cpu: float
    polish_cpu: float
    quiet: bool

    @property
    def bare(self) -> float:
        """Time of all collectives alone."""
        return sum(self.collectives)

    @property
    def overhead(self) -> float:
        """Wall time without the slowest rank's search and the root's polish; it includes waiting for late ranks."""
        return self.wall - self.slowest - self.stages[STAGES.index("polish")]

    @classmethod
    def of_marks(cls, ranks: Sequence[Mapping[str, Any]]) -> Turn:
        """Build a turn from each rank's "plan" (stage: begin, end, CPU seconds), "bare" (begin, each end), "quiet"."""
        plans = [rank["plan"] for rank in ranks]
        begin, end = min(plan["whole"][0] for plan in plans), max(plan["whole"][1] for plan in plans)
        polish = plans[0]["polish"]
        edges = [
            begin,
            min(plan["search"][0] for plan in plans),
            max(plan["search"][1] for plan in plans),
            polish[0],
            polish[1],
            end,
        ]
        bare = np.array([rank["bare"] for rank in ranks])
        dones = [bare[:, 0].min(), *bare[:, 1:].max(0)]
        return cls(
            wall=end - begin,
            stages=tuple(np.diff(edges).tolist()),
            slowest=max(plan["search"][1] - plan["search"][0] for plan in plans),
            collectives=tuple(np.diff(dones).tolist()),
            cpu=float(np.mean([plan["whole"][2] for plan in plans])),
            search_cpu=max(plan["search"][2] for plan in plans),
            polish_cpu=polish[2],
            quiet=bool(ranks[0]["quiet"]),
        )


def share_of_core(ranks: int, cores: float) -> float:
    """Return the number of ranks per core; 1 if each rank has its own."""
    return max(1.0, ranks / cores)


def collective_row(kind: str, num_bytes: int, ranks: int, cores: float = float("inf")) -> list[float]:
    """Return the factors of COLLECTIVE; kind is "broadcast", or anything else for an all-reduce.

    >>> collective_row("sum", 800, 4)
    [1.0, 6.0, 0.0, 1200.0]
    >>> collective_row("broadcast", 800, 4, cores=2)
    [2.0, 0.0, 4.0, 3200.0]
    """
    rounds = (ranks - 1).bit_length()  # log2, rounded up
    ring, tree, moved = 0.0, float(rounds), float(rounds * num_bytes)
    if kind != "broadcast":
        ring, tree, moved = 2.0 * (ranks - 1), 0.0, 2 * (ranks - 1) / ranks * num_bytes
    share = share_of_core(ranks, cores)
    return [share, share * ring, share * tree, share * moved]


def search_row(candidates: int, ranks: int) -> list[float]:
    """Return the factors of SEARCH."""
    return [1.0, float(-(-candidates // ranks))]


def polish_row(candidates: int, ranks: int) -> list[float]:
    """Return the factors of POLISH."""
    return [1.0, 1 - -(-candidates // ranks) / candidates]


@dataclass(frozen=True)
class Fit:
    """Fitted parameters, and their fits to resampled turns.

    Args:
        parameters: fitted parameters `[C]`.
        draws: parameters fitted to resampled turns, `[D, C]`.
    """

    parameters: np.ndarray
    draws: np.ndarray

    def at(self, rows: Sequence[Sequence[float]]) -> tuple[np.ndarray, np.ndarray]:
        """Predict for rows `[M, C]`: `[M]`, and by all draws `[D, M]`."""
        return np.asarray(rows) @ self.parameters, self.draws @ np.asarray(rows).T


def interval(draws: np.ndarray, share: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """Return the ends of the interval that holds this share of the draws, along dim 0."""
    low, high = np.quantile(draws, [(1 - share) / 2, (1 + share) / 2], axis=0)
    return low, high


def fitted(
    rows: Sequence[Sequence[float]], samples: Sequence[Sequence[float]], draws: int = 1000, seed: int = 0
) -> Fit:
    """Fit parameters to the median of each cell.

    Args:
        rows: factors of each cell, `[N, C]`.
        samples: the seconds of each cell's turns, N cells.
        draws: D, how often the turns are resampled.
        seed: seed of the draws.
    """
    generator, factors = np.random.default_rng(seed), np.asarray(rows, dtype=float)
    cells = [np.asarray(cell, dtype=float) for cell in samples]
    again = np.stack(
        [np.median(cell[generator.integers(len(cell), size=(draws, len(cell)))], axis=1) for cell in cells], 1
    )
    medians = np.array([np.median(cell) for cell in cells])
    return Fit(_solved(factors, medians), np.stack([_solved(factors, drawn) for drawn in again]))


def _solved(factors: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Minimise the sum of squares of log(predicted / value) over non-negative `[C]`, by the Gauss-Newton method."""
    solution = _non_negative(factors / values[:, None], np.ones(len(values)))
    for _ in range(_ROUNDS):
        predicted = np.maximum(factors @ solution, _MIN_SHARE * values)
        solution = _non_negative(factors / predicted[:, None], 1 + np.log(values / predicted))
    return solution


def _non_negative(factors: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Solve non-negative least squares, `[C]`: the best over all subsets of parameters, the others being zero."""
    count = factors.shape[1]
    best, lowest = np.zeros(count), float((values**2).sum())
    for size in range(count, 0, -1):
        for chosen in map(list, itertools.combinations(range(count), size)):
            solution = np.linalg.lstsq(factors[:, chosen], values, rcond=None)[0]
            left = float(((factors[:, chosen] @ solution - values) ** 2).sum())
            if (solution >= 0).all() and left < lowest:
                best, lowest = np.zeros(count), left
                best[chosen] = solution
        if size == count and best.any():  # the full set is feasible
            break
    return best
