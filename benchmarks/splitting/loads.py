"""The steps that splits are measured on: recorded, power laws, log-normal popularities, and eight workloads.

Every step is made from (name, seed, step) alone. With each step comes the one before it, from which the baselines that
plan ahead place their replicas.
Shapes: N sequences, L layers, E experts, M GPUs.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.shared.sequences import read_sequences, steps_of

__all__ = ["WORKLOADS", "Size", "Step", "log_normal", "power_law", "recorded", "workload"]

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

TIMES = 16  # recorded counts are multiplied, so that whole tokens do not hide the answer
HOT, EVERY = 8.0, 4  # how much hotter a hot expert is, and how often a burst comes, in steps


@dataclass(frozen=True)
class Size:
    """Size of a made step: GPUs, experts, and the choices of each GPU's router (tokens × experts per token)."""

    gpus: int = 64
    experts: int = 256
    choices: int = 8192 * 8


@dataclass(frozen=True)
class Step:
    """One step of one layer.

    Args:
        before: `[E]` int64, the tokens of each expert in an earlier step.
        counts: `[M, E]` int64, the tokens that each GPU's router sends to each expert.
    """

    before: Ints
    counts: Ints


def recorded(folder: Path, gpus: int, size: int, draws: int, seed: int = 0) -> Iterator[Step]:
    """Steps of `size` random recorded sequences, times 16, every layer in each draw.

    Every token is dealt to a random source, because a recording does not tell its GPU. The step before is another draw.
    """
    sequences = torch.cat(list(read_sequences(folder).values()))
    steps = TIMES * steps_of(sequences, draws + 1, size, [seed, size]).numpy()  # [S, L, E]
    generator = np.random.default_rng([seed, gpus, size])
    for before, now in pairwise(steps):
        for layer, tokens in enumerate(now):
            yield Step(before[layer], generator.multinomial(tokens, np.full(gpus, 1 / gpus)).T.astype(np.int64))


def power_law(imbalance: float, size: Size, steps: int, seed: int = 0) -> Iterator[Step]:
    """Popularities `rank ** -exponent` in random order; the exponent gives the GPUs this imbalance, up to chance."""
    for step in range(steps):
        generator = _generator(f"power law {imbalance}", seed, step)
        logarithm = -np.log(1 + generator.permutation(size.experts))

        def of_gpus(exponent: float, logarithm: Floats = logarithm) -> float:
            return _max_over_mean(_popularity(exponent * logarithm).reshape(size.gpus, -1).sum(1))

        yield _twice(_popularity(_solved(of_gpus, imbalance) * logarithm), size, generator)


def log_normal(max_violation: float, size: Size, steps: int, seed: int = 0) -> Iterator[Step]:
    """Log-normal popularities; the deviation gives the hottest expert this MaxVio (its tokens / mean - 1)."""
    for step in range(steps):
        generator = _generator(f"log-normal {max_violation}", seed, step)
        normal = generator.normal(size=size.experts)

        def of_experts(deviation: float, normal: Floats = normal) -> float:
            return _max_over_mean(_popularity(deviation * normal))

        yield _twice(_popularity(_solved(of_experts, 1 + max_violation) * normal), size, generator)


def workload(name: str, size: Size, steps: int, seed: int = 0) -> Iterator[Step]:
    """Steps 1, 2, ... of one of the `WORKLOADS`, each with the step before it."""
    before = step_of(name, size, 0, seed)
    for step in range(1, steps + 1):
        now = step_of(name, size, step, seed)
        yield Step(before.sum(0), now)
        before = now


def step_of(name: str, size: Size, step: int, seed: int = 0) -> Ints:
    """`[M, E]`: the counts of one step of a workload, from (workload, seed, step) alone."""
    lasting, passing = _generator(name, seed), _generator(name, seed, step)
    popularity, weight = WORKLOADS[name](size, lasting, step)
    return _sampled(popularity, weight, size, passing)


# --- workloads: size, a generator that is the same in all steps, step -> popularity [E], weights of sources [M] ------

Shape = tuple[Floats, Floats]


def balanced(size: Size, lasting: np.random.Generator, step: int) -> Shape:
    """All experts equally popular."""
    return np.ones(size.experts), np.ones(size.gpus)


def some_hot(size: Size, lasting: np.random.Generator, step: int) -> Shape:
    """One expert in 16 is hot, for the tokens of all GPUs alike."""
    return _with_hot(size, lasting.choice(size.experts, max(1, size.experts // 16), replace=False))


def one_gpu_hot(size: Size, lasting: np.random.Generator, step: int) -> Shape:
    """All experts of one GPU are hot."""
    per_gpu = size.experts // size.gpus
    return _with_hot(size, lasting.integers(size.gpus) * per_gpu + np.arange(per_gpu))


def hot_spread(size: Size, lasting: np.random.Generator, step: int) -> Shape:
    """As many experts as a GPU has are hot, on different GPUs."""
    per_gpu = size.experts // size.gpus
    return _with_hot(size, per_gpu * lasting.choice(size.gpus, min(per_gpu, size.gpus), replace=False))


def unequal_sources(size: Size, lasting: np.random.Generator, step: int) -> Shape:
    """GPUs with up to nine times as many tokens as others, and log-normal popularities."""
    return lasting.lognormal(0, 0.5, size.experts), lasting.uniform(1, 9, size.gpus)


def without_tokens(size: Size, lasting: np.random.Generator, step: int) -> Shape:
    """A quarter of the experts, all experts of an eighth of the GPUs, and an eighth of the sources have no tokens."""
    popularity, weight = lasting.lognormal(0, 0.5, size.experts), np.ones(size.gpus)
    popularity[lasting.permutation(size.experts)[: size.experts // 4]] = 0
    idle = lasting.permutation(size.gpus)[: max(1, size.gpus // 8)]
    popularity.reshape(size.gpus, -1)[idle] = 0
    weight[lasting.permutation(size.gpus)[: max(1, size.gpus // 8)]] = 0
    return popularity, weight


def rotating(size: Size, lasting: np.random.Generator, step: int) -> Shape:
    """As many experts as a GPU has are hot, other ones in every step."""
    per_gpu = max(1, size.experts // size.gpus)
    order = lasting.permutation(size.experts)
    return _with_hot(size, order[(step * per_gpu + np.arange(per_gpu)) % size.experts])


def bursts(size: Size, lasting: np.random.Generator, step: int) -> Shape:
    """In every fourth step another expert is 32 times as popular; the others are log-normal."""
    popularity, order = lasting.lognormal(0, 0.3, size.experts), lasting.permutation(size.experts)
    if step % EVERY == 0:
        popularity[order[step // EVERY % size.experts]] *= 4 * HOT
    return popularity, np.ones(size.gpus)


WORKLOADS: dict[str, Callable[[Size, np.random.Generator, int], Shape]] = {
    "balanced": balanced,
    "some experts hot": some_hot,
    "experts of one GPU hot": one_gpu_hot,
    "as many hot, spread": hot_spread,
    "unequal sources": unequal_sources,
    "experts and GPUs without tokens": without_tokens,
    "rotating hot spot": rotating,
    "bursts": bursts,
}


def _with_hot(size: Size, hot: Ints) -> Shape:
    popularity = np.ones(size.experts)
    popularity[hot] *= HOT
    return popularity, np.ones(size.gpus)


# --- numbers ----------------------------------------------------------------------------------------------------------


def _generator(name: str, *numbers: int) -> np.random.Generator:
    return np.random.default_rng([zlib.crc32(name.encode()), *numbers])


def _popularity(logarithm: Floats) -> Floats:
    popularity = np.exp(logarithm - logarithm.max())
    return popularity / popularity.sum()


def _max_over_mean(values: Floats) -> float:
    return float(values.max() / values.mean())


def _solved(function: Callable[[float], float], value: float) -> float:
    """The argument in [0, 16] where a function, at first 1, reaches the value."""
    below, above = 0.0, 16.0
    for _ in range(60):
        middle = (below + above) / 2
        below, above = (middle, above) if function(middle) < value else (below, middle)
    return above


def _sampled(popularity: Floats, weight: Floats, size: Size, generator: np.random.Generator) -> Ints:
    """`[M, E]`: every source draws its tokens; all sources together have the same number in every load."""
    tokens = np.rint(size.choices * size.gpus * weight / weight.sum()).astype(np.int64)
    return generator.multinomial(tokens, popularity / popularity.sum()).astype(np.int64)


def _twice(popularity: Floats, size: Size, generator: np.random.Generator) -> Step:
    """Draw a step and the one before it from the same popularities."""
    before, now = (_sampled(popularity, np.ones(size.gpus), size, generator) for _ in range(2))
    return Step(before.sum(0), now)
