"""Whether a loss curve stands out among the static ones of its seed, by a permutation test.

If a run is no different, each of a seed's runs is the furthest from the others with the same probability, and seeds
are independent. So all ways to pick one run of each seed are equally likely, and the share of them that lie at least as
far apart as the run is p: exact, for any number of seeds. It is a multiple of 1 / R^S, so few seeds cannot tell
anything apart. Shapes: S seeds, R runs of each, I iterations.
"""

from __future__ import annotations

import itertools

import numpy as np

__all__ = ["LEVEL", "chance", "judged", "oddness", "smallest_chance"]

LEVEL = 0.05  # a run with at most this p is told apart


def oddness(curves: np.ndarray) -> np.ndarray:
    """`[S, R]`: the largest distance of each run from the mean of the seed's other runs, for curves `[S, R, I]`."""
    others = (curves.sum(1, keepdims=True) - curves) / (curves.shape[1] - 1)
    return np.abs(curves - others).max(-1)


def chance(odd: np.ndarray, run: int) -> float:
    """The share of all ways to pick one run of each seed whose sum of `odd [S, R]` is at least that of `run`."""
    sums = np.array([sum(pick) for pick in itertools.product(*odd)])
    return float((sums >= odd[:, run].sum() * (1 - 1e-12)).mean())


def smallest_chance(seeds: int, runs: int) -> float:
    """The smallest p that this many seeds of so many runs each can have: of a run that is furthest in every seed.

    >>> smallest_chance(3, 4)
    0.015625
    """
    return float(runs) ** -seeds


def judged(odd: np.ndarray, run: int) -> str:
    """The verdict on a run, in words, from `odd [S, R]`.

    >>> judged(np.array([[1.0, 2.0, 3.0, 9.0]] * 3), 3)
    'told apart'
    >>> judged(np.array([[1.0, 2.0, 3.0, 9.0]] * 2), 3)  # p is 1 / 16
    'too few seeds'
    """
    if smallest_chance(*odd.shape) > LEVEL:
        return "too few seeds"
    return "within" if chance(odd, run) > LEVEL else "told apart"
