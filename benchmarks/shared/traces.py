"""The traces that benchmarks replay, and their clusters: recorded, generated, and sampled from recorded sequences.

Shapes: S steps, L layers, E experts, M GPUs.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.shared.sequences import read_sequences, rescaled, steps_of
from benchmarks.shared.troubles import TROUBLES, Size
from distplb import MoveModel, Placement, Topology, Trace

SHIPPED = Path(__file__).parents[1] / "traces"
GENERATED = Size(steps=320, layers=4, experts=64, tokens=65536)
UNTIMED = MoveModel(1e-6, 1, 1e9, 1e9)  # for replays whose modelled seconds are not looked at
SEQUENCES, STEPS = 8, 320  # of the steps that are sampled from recorded sequences


@dataclass(frozen=True)
class Case:
    """A trace and its cluster.

    Args:
        name: of the trace.
        origin: "recorded", "made" (by a generator) or "drawn" (from recorded sequences).
        trace: as it was recorded, or rescaled.
        topology: of the cluster.
        balanced: steps over which every expert has the same mean, where the trace is rescaled.
    """

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
        """The load under a router whose biases balance it perfectly over so many steps, or over the whole trace.

        Every step keeps its tokens.
        """
        steps = self.trace.num_steps if steps is None else steps
        load = torch.cat([rescaled(part, keep_steps=True) for part in self.trace.load.split(steps)])
        return replace(self, trace=replace(self.trace, load=load), balanced=steps)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that `all_cases` reads."""
    parser.add_argument("--traces", type=Path, nargs="+", default=[SHIPPED], help=".npz files, or folders of them")
    parser.add_argument("--loads", type=Path, metavar="DIR", help="folder of deepseek-v2-lite_*_steps.npy")
    parser.add_argument("--no-made", action="store_true", help="leave out the generators of troubles.py")
    parser.add_argument("--seeds", type=int, default=1, help="of the generators")
    parser.add_argument("--experts-per-gpu", type=int, default=8, metavar="G")


def shown_options(options: argparse.Namespace) -> dict[str, object]:
    """Those options for a command line, without the reader's own paths."""
    return {
        "--loads": options.loads and "DIR",
        "--traces": None if options.traces == [SHIPPED] else "TRACES",
        "--no-made": options.no_made,
        "--seeds": options.seeds,
        "--experts-per-gpu": options.experts_per_gpu,
    }


def all_cases(options: argparse.Namespace) -> list[Case]:
    """Every trace that the options name, as it is."""
    sources = {"recorded": list(recorded_traces(options.traces))}
    sources["drawn"] = list(sampled_traces(options.loads)) if options.loads else []
    sources["made"] = [] if options.no_made else list(generated_traces(options.seeds))
    return [
        Case(name, origin, trace, cluster_of(trace.num_experts, options.experts_per_gpu))
        for origin, traces in sources.items()
        for name, trace in traces
    ]


def cluster_of(experts: int, experts_per_gpu: int) -> Topology:
    """So many experts on each GPU, at least two GPUs; on two nodes where there are four GPUs or more."""
    gpus = max(2, experts // experts_per_gpu)
    nodes = 2 if gpus >= 4 else 1
    if experts % gpus or gpus % nodes:
        raise SystemExit(f"{experts} experts do not go evenly on {gpus} GPUs of {nodes} nodes")
    return Topology(nodes, gpus // nodes)


def recorded_traces(paths: list[Path]) -> Iterator[tuple[str, Trace]]:
    """Those of files, and of folders of such files; a folder of parts that a TraceWriter wrote is one trace."""
    for path in paths:
        if path.is_dir() and not _holds_parts(path):
            yield from ((file.stem, Trace.read(file)) for file in sorted(path.glob("*.npz")))
        else:
            yield path.stem, Trace.read(path)


def generated_traces(seeds: int) -> Iterator[tuple[str, Trace]]:
    """The standard troubles."""
    for seed in range(seeds):
        for name, generate in TROUBLES.items():
            yield name if seeds == 1 else f"{name}, seed {seed}", as_trace(generate(GENERATED, seed))


def sampled_traces(folder: Path) -> Iterator[tuple[str, Trace]]:
    """Steps of random sequences, which recur: of all texts together, and of one text after the other."""
    texts = read_sequences(folder)
    together = steps_of(torch.cat(list(texts.values())), STEPS, SEQUENCES, 0)
    yield "sequences of three texts together", as_trace(together)
    each = STEPS // len(texts)
    parts = [steps_of(text, each, SEQUENCES, [1, nth]) for nth, text in enumerate(texts.values())]
    yield "sequences of three texts, one after the other", as_trace(torch.cat(parts))


def as_trace(load: Tensor) -> Trace:
    """A trace of `[S, L, E]` with an iteration for each step."""
    steps, layers, experts = load.shape
    placement_of_step = torch.zeros(steps, dtype=torch.int64)
    return Trace(load, (Placement.contiguous(layers, experts, 1),), placement_of_step, torch.arange(steps))


def _holds_parts(folder: Path) -> bool:
    """Whether files are named by their first iteration."""
    return all(path.stem.isdigit() for path in folder.glob("*.npz"))
