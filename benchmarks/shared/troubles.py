"""Traces of the standard troubles of load balancing, generated from a seed.

Every layer has its own expert popularities, and every step draws its tokens from them.
Shapes: S steps, L layers, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

SPREAD = 0.7  # standard deviation of an expert's log popularity, as in the benchmarks' log-normal loads
Array = np.ndarray


@dataclass(frozen=True)
class Size:
    """Size of a trace: S, L, E, and the tokens that each layer routes in each step (times experts per token)."""

    steps: int
    layers: int
    experts: int
    tokens: int


def stationary(size: Size, seed: int) -> Tensor:
    """Popularities that never change; steps differ by chance only: `[S, L, E]` int64."""
    generator = np.random.default_rng(seed)
    return sampled(np.tile(scores(size, generator), (size.steps, 1, 1)), size, generator)


def slow_drift(size: Size, seed: int, *, turns: float = 0.25) -> Tensor:
    """Popularities that drift steadily, until after a quarter turn none of the first is left: `[S, L, E]` int64."""
    generator = np.random.default_rng(seed)
    first, second = scores(size, generator), scores(size, generator)
    angle = np.linspace(0, 2 * np.pi * turns, size.steps)[:, None, None]
    return sampled(np.cos(angle) * first + np.sin(angle) * second, size, generator)


def sudden_shift(size: Size, seed: int, *, at: float = 0.5) -> Tensor:
    """Popularities that change in one step, at this share of the trace, as on a new text: `[S, L, E]` int64."""
    generator = np.random.default_rng(seed)
    first, second = scores(size, generator), scores(size, generator)
    after = (np.arange(size.steps) >= at * size.steps)[:, None, None]
    return sampled(np.where(after, second, first), size, generator)


def rotating_hot(size: Size, seed: int, *, period: int = 50, times: float = 8.0) -> Tensor:
    """One expert of each layer is `times` as popular, and a different one after each period: `[S, L, E]` int64."""
    generator = np.random.default_rng(seed)
    order = generator.permuted(np.tile(np.arange(size.experts), (size.layers, 1)), axis=1)  # [L, E]
    hot = order[:, np.arange(size.steps) // period % size.experts].T  # [S, L]
    heat = np.log(times) * (np.arange(size.experts) == hot[..., None])
    return sampled(scores(size, generator) + heat, size, generator)


def bursts(size: Size, seed: int, *, every: int = 40, length: int = 4, times: float = 8.0) -> Tensor:
    """About every `every` steps a random expert is `times` as popular for `length` steps: `[S, L, E]` int64."""
    generator = np.random.default_rng(seed)
    begins = generator.random((size.steps, size.layers)) < 1 / every
    expert = generator.integers(size.experts, size=(size.steps, size.layers))
    heat = np.zeros((size.steps, size.layers, size.experts))
    for step, layer in zip(*np.nonzero(begins), strict=True):
        heat[step : step + length, layer, expert[step, layer]] = np.log(times)
    return sampled(scores(size, generator) + heat, size, generator)


TROUBLES: dict[str, Callable[[Size, int], Tensor]] = {
    "stationary": stationary,
    "slow drift": slow_drift,
    "sudden shift": sudden_shift,
    "rotating hot expert": rotating_hot,
    "bursts": bursts,
}


def scores(size: Size, generator: np.random.Generator) -> Array:
    """Draw the logarithms of popularities `[L, E]`."""
    return generator.normal(0, SPREAD, (size.layers, size.experts))


def sampled(score: Array, size: Size, generator: np.random.Generator) -> Tensor:
    """Draw tokens `[S, L, E]` int64; `score [S, L, E]` are the logarithms of popularities."""
    popularity = np.exp(score)
    popularity /= popularity.sum(-1, keepdims=True)
    return torch.from_numpy(generator.multinomial(size.tokens, popularity).astype(np.int64))
