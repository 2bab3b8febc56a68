"""What bench_replay.py replays, and on what cluster: recorded traces, made ones, and steps of recorded sequences.

Shapes: S steps, L layers, E experts, M GPUs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from sequences import read_sequences, rescaled, steps_of
from torch import Tensor
from troubles import TROUBLES, Size

from distplb import Placement, Topology, Trace

SHIPPED = Path(__file__).parent / "traces"
MADE = Size(steps=320, layers=4, experts=64, tokens=65536)
SEQUENCES, STEPS = 8, 320  # of the steps that are made of recorded sequences


@dataclass(frozen=True)
class Case:
    """A trace, where it is from ("recorded", "made" or "drawn"), and the steps within which experts have one mean."""

    name: str
    origin: str
    trace: Trace
    topology: Topology
    balanced: int | None = None

    @property
    def title(self) -> str:
        """For a heading."""
        return f"{self.name}, every expert rescaled to the same mean" if self.balanced else self.name

    def rescaled(self, steps: int | None = None) -> Case:
        """What a router would leave whose biases balance it perfectly over so many steps, or over the whole trace.

        Every step keeps its tokens.
        """
        steps = self.trace.num_steps if steps is None else steps
        load = torch.cat([rescaled(part, keep_steps=True) for part in self.trace.load.split(steps)])
        return replace(self, trace=replace(self.trace, load=load), balanced=steps)


def cluster_of(experts: int, experts_per_gpu: int, nodes: int | None) -> Topology:
    """So many experts on each GPU, at least two GPUs; on two nodes where there are four GPUs or more."""
    gpus = max(2, experts // experts_per_gpu)
    nodes = (2 if gpus >= 4 else 1) if nodes is None else nodes
    if experts % gpus or gpus % nodes:
        raise SystemExit(f"{experts} experts do not go evenly on {gpus} GPUs of {nodes} nodes")
    return Topology(nodes, gpus // nodes)


def recorded(paths: list[Path]) -> Iterator[tuple[str, Trace]]:
    """Of files, and of folders that hold such files; a folder of parts that a TraceWriter wrote is one trace."""
    for path in paths:
        if path.is_dir() and not _holds_parts(path):
            yield from ((one.stem, Trace.read(one)) for one in sorted(path.glob("*.npz")))
        else:
            yield path.stem, Trace.read(path)


def made(seeds: int, size: Size = MADE) -> Iterator[tuple[str, Trace]]:
    """The standard troubles."""
    for seed in range(seeds):
        for name, make in TROUBLES.items():
            yield name if seeds == 1 else f"{name}, seed {seed}", as_trace(make(size, seed))


def drawn(folder: Path) -> Iterator[tuple[str, Trace]]:
    """Steps of random sequences, which recur: of all texts together, and of one text after the other."""
    texts = read_sequences(folder)
    together = steps_of(torch.cat(list(texts.values())), STEPS, SEQUENCES, 0)
    yield "sequences of three texts together", as_trace(together)
    each = STEPS // len(texts)
    parts = [steps_of(text, each, SEQUENCES, [1, nth]) for nth, text in enumerate(texts.values())]
    yield "sequences of three texts, one after the other", as_trace(torch.cat(parts))


def as_trace(load: Tensor) -> Trace:
    """Of `[S, L, E]`, an iteration for each step."""
    steps, layers, experts = load.shape
    none = torch.zeros(steps, dtype=torch.int64)
    return Trace(load, (Placement.contiguous(layers, experts, 1),), none, torch.arange(steps))


def _holds_parts(folder: Path) -> bool:
    """Whether files are named by their first iteration."""
    return all(path.stem.isdigit() for path in folder.glob("*.npz"))
