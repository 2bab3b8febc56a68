"""Options of the other commands."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from distplb import Placement, Trace
from inputs.case import Case, command
from inputs.command_cases import TWO, Run, counts, file, run_words

__all__ = ["CASES"]


def named(folder: Path, name: str, layers: Sequence[str], load: np.ndarray | None = None) -> Path:
    """Save a trace on two GPUs, with these layers."""
    load = counts(4, len(layers), 8) if load is None else load
    placement = Placement.contiguous(load.shape[1], load.shape[2], 2)
    steps = torch.arange(len(load))
    Trace(torch.from_numpy(load), (placement,), torch.zeros_like(steps), steps, tuple(layers)).save(folder / name)
    return folder / name


def unseen(first: Sequence[str], second: Sequence[str]) -> Run:
    """Run `distplb compare` on two traces with these layers; a layer of the same name has the same counts in both."""

    def run(folder: Path) -> object:
        load = {name: at for at, name in enumerate(sorted({*first, *second}))}
        every = counts(4, len(load), 8)
        one, other = (every[:, [load[name] for name in names]] for names in (first, second))
        paths = named(folder, "monday.npz", first, one), named(folder, "tuesday.npz", second, other[::-1].copy())
        words = ("compare", paths[0], "--unseen", paths[1], *TWO, "--engine", "reference", "--json")
        return command(*words, show=of_greedy)

    return run


def of_greedy(out: str) -> str:
    """Show the greedy planner's imbalance on unseen steps."""
    rows = {row["planner"]: row for row in json.loads(out)["planners"]}
    return f"greedy (EPLB): {rows['greedy (EPLB)']['unseen']['mean']:.4f}"


def against(name: str, shape: Sequence[int]) -> Run:
    """Run `distplb compare` on a trace with named layers and an array."""

    def run(folder: Path) -> object:
        other = file(folder, *shape, name=name)
        words = (*TWO, "--engine", "reference")
        return command("compare", named(folder, "monday.npz", ["a", "b"]), "--unseen", other, *words)

    return run


def split_too(*options: object, shape: Sequence[int] = (4, 2, 8)) -> Run:
    """Run `distplb compare` with replicas for single steps, and show the figures of the homes in force."""

    def run(folder: Path) -> object:
        words = (*TWO, "--engine", "reference", "--json", *options)
        return command("compare", file(folder, *shape), *words, show=of_replicas)

    return run


def of_replicas(out: str) -> str:
    """Show what replicas leave of the homes in force, and how many are sent."""
    row = json.loads(out)["planners"][0]["with_replicas"]
    alone, left = row["homes_alone"]["mean"], row["imbalance"]["mean"]
    return f"{alone:.4f} becomes {left:.4f} by {row['replicas']:.2f} replicas"


def replayed(*options: object, load: np.ndarray | None = None) -> Run:
    """Run `distplb replay` on a trace, and show the answer."""

    def run(folder: Path) -> object:
        path = named(folder, "trace.npz", ["a", "b", "c"], counts(24, 3, 8) if load is None else load)
        words = ("replay", path, "--engine", "reference", "--json", *options)
        return command(*words, show=lambda out: json.loads(out)["verdict"]["answer"])

    return run


def reported(*options: object) -> Run:
    """Run `distplb report` on a trace, and write to the folder."""

    def run(folder: Path) -> object:
        path = named(folder, "trace.npz", ["a", "b", "c"], counts(24, 3, 8))
        words = ("report", path, "--output", folder / "report.html")
        return command(*words, *[str(word).format(folder=folder) for word in options])

    return run


CASES: list[Case] = [
    Case(
        "`compare --unseen`, the same layers",
        "greedy (EPLB): 1.1348",
        unseen(["a", "b", "c"], ["a", "b", "c"]),
    ),
    Case(
        "`compare --unseen`, the same layers in another order",
        "greedy (EPLB): 1.1348",
        unseen(["a", "b", "c"], ["c", "a", "b"]),
    ),
    Case(
        "`compare --unseen`, with an additional layer",
        "greedy (EPLB): 1.1206",
        unseen(["a", "b", "c"], ["c", "d", "a", "b"]),
    ),
    Case(
        "`compare --unseen`, without layer `b`",
        "exit 2: [Error: tuesday.npz has no layer 'b', which monday.npz has (it has 'c', 'a', 'x'); pass "
        "two loads of the same model]",
        unseen(["a", "b", "c"], ["c", "a", "x"]),
    ),
    Case(
        "`compare` of layers `a` and `b`, `--unseen` an array of two layers",
        "exit 2: [Error: tuesday.npy has no layer names, but monday.npz has some, such as 'a'; pass two "
        "files with names, or two without]",
        against("tuesday.npy", (4, 2, 8)),
    ),
    Case(
        "`compare` of 8 experts, `--unseen` an array of 16",
        "exit 2: [Error: tuesday.npy has 2 layers of 16 experts, monday.npz has 2 of 8; pass two loads of"
        " the same model]",
        against("tuesday.npy", (4, 2, 16)),
    ),
    Case(
        "`compare --gpus-per-node 2 --replica-slots 1`, 8 experts",
        "1.3778 becomes 1.0680 by 1.00 replicas",
        split_too("--replica-slots", 1),
    ),
    Case(
        "`compare --gpus-per-node 2 --replica-slots 1`, 8 experts, counts without steps",
        "1.0319 becomes 1.0049 by 1.00 replicas",
        split_too("--replica-slots", 1, shape=(2, 8)),
    ),
    Case(
        "`compare --replica-slots -1`",
        "exit 2: [Error: Invalid value for '--replica-slots': -1 is not in the range 0<=x<=1024. Try "
        "'distplb compare --help'.]",
        split_too("--replica-slots", -1),
    ),
    Case(
        "`compare --gpus-per-node 2 --slots 10 --replica-slots 2`, 8 experts",
        "exit 2: [Error: --slots 10 gives some of 8 experts several homes, but --replica-slots 2 needs one "
        "home for each; pass --slots 8, or --replica-slots 0]",
        split_too("--slots", 10, "--replica-slots", 2),
    ),
    Case(
        "`replay trace.npz`, 24 steps",
        "yes",
        replayed(),
    ),
    Case(
        "`replay --every 0`",
        "exit 2: [Error: Invalid value for '--every': 0 is not in the range x>=1. Try 'distplb replay --help'.]",
        replayed("--every", 0),
    ),
    Case(
        "`replay --every 1000000000000000000`",
        "exit 2: [Error: the trace covers 24 iterations, but rebalancing every 1000000000000000000 takes "
        "two intervals, one to plan on and one to judge; rebalance every 12 or less, or record for longer]",
        replayed("--every", 10**18),
    ),
    Case(
        "`replay --gpus-per-node 3`, 8 experts",
        (
            "exit 2: [Error: 8 experts cannot be spread evenly over 3 GPUs (1 node × 3); make --nodes × "
            "--gpus-per-node a divisor of 8]"
        ),
        replayed("--gpus-per-node", 3),
    ),
    Case(
        "`replay --engine warp`",
        "exit 2: [Error: --engine 'warp' is unknown; pass one of reference, cpu, cuda, or no --engine]",
        replayed("--engine", "warp"),
    ),
    Case(
        "`replay --tflops nan`",
        "exit 2: [Error: Invalid value for '--tflops': nan is not in the range 1e-06 to 1e+18. Try "
        "'distplb replay --help'.]",
        replayed("--tflops", "nan"),
    ),
    Case(
        "`replay --tokens-per-gpu 1e400`",
        "exit 2: [Error: Invalid value for '--tokens-per-gpu': inf is not in the range 1e-06 to 1e+18. "
        "Try 'distplb replay --help'.]",
        replayed("--tokens-per-gpu", "1e400"),
    ),
    Case(
        "`replay --expert-share 30`",
        "exit 2: [Error: Invalid value for '--expert-share': 30.0 is not in the range 1e-06 to 1. Try "
        "'distplb replay --help'.]",
        replayed("--expert-share", 30),
    ),
    Case(
        "`replay trace.npz --megatron-ep 64`",
        "exit 2: [Error: --megatron-ep is for Megatron-Core's files, and trace.npz is not one; leave it out]",
        replayed("--megatron-ep", 64),
    ),
    Case(
        "`replay run.npz`, a missing file",
        "exit 2: [Error: Invalid value for 'TRACE...': Path 'run.npz' does not exist. Try 'distplb replay --help'.]",
        run_words("replay", "run.npz"),
    ),
    Case(
        "`report --nodes 2`",
        "exit 2: [Error: --nodes 2 without --gpus-per-node; pass both]",
        reported("--nodes", 2),
    ),
    Case(
        "`report --every 1000000000000000000`",
        "exit 2: [Error: the trace covers 24 iterations, but rebalancing every 1000000000000000000 takes "
        "two intervals, one to plan on and one to judge; rebalance every 12 or less, or record for longer]",
        reported("--every", 10**18),
    ),
    Case(
        "`report --gpus-per-node 3`, 8 experts",
        (
            "exit 2: [Error: 8 experts cannot be spread evenly over 3 GPUs (1 node × 3); make --nodes × "
            "--gpus-per-node a divisor of 8]"
        ),
        reported("--gpus-per-node", 3),
    ),
    Case(
        "`report --png trace.npz`, a file",
        "exit 2: [Error: Invalid value for '--png': Directory 'trace.npz' is a file. Try 'distplb report --help'.]",
        reported("--png", "{folder}/trace.npz"),
    ),
    Case(
        "`doctor --deadline inf`",
        "exit 2: [Error: Invalid value for '--deadline': inf is not in the range 0.001 to 1e+06. Try "
        "'distplb doctor --help'.]",
        run_words("doctor", "--deadline", "inf"),
    ),
]
