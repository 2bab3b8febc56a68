"""Commands, options and their words."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from distplb import Placement, Topology, Trace, plan
from inputs.case import Case, command

__all__ = ["CASES"]

Run = Callable[[Path], object]
TWO = ("--gpus-per-node", 2)


def counts(*shape: int) -> np.ndarray:
    """Skewed, and other ones in each step and layer."""
    return (np.arange(np.prod(shape)) * 2654435761 % 1009).reshape(shape)


def file(folder: Path, *shape: int, name: str = "load.npy") -> Path:
    np.save(folder / name, counts(*shape))
    return folder / name


def named(folder: Path, name: str, layers: Sequence[str], load: np.ndarray | None = None) -> Path:
    """A trace on two GPUs."""
    load = counts(4, len(layers), 8) if load is None else load
    placement = Placement.contiguous(load.shape[1], load.shape[2], 2)
    steps = torch.arange(len(load))
    Trace(torch.from_numpy(load), (placement,), torch.zeros_like(steps), steps, tuple(layers)).save(folder / name)
    return folder / name


def planned(*options: object, shape: Sequence[int] = (2, 3, 8), gpus: Sequence[object] = TWO) -> Run:
    """`distplb plan` of counts of this shape; the slots, where it plans."""
    words = (*gpus, "--engine", "reference", *options, "--json")
    return lambda folder: command(
        "plan", file(folder, *shape), *words, show=lambda out: f"{json.loads(out)['slots']} slots"
    )


def priced(price: str) -> Run:
    """`distplb plan` at this price of moves; what it moves."""
    words = (*TWO, "--engine", "reference", "--move-price", price, "--json")
    return lambda folder: command("plan", file(folder, 2, 3, 8), *words, show=moved)


def moved(out: str) -> str:
    total = json.loads(out)["all_layers"]
    return f"{total['moved_inside'] + total['moved_between']} slots moved"


def called(shape: Sequence[int], topology: Topology, **options: object) -> Run:
    options = {"engine": "reference"} | options
    return lambda _: plan(torch.from_numpy(counts(*shape)), topology, **options)


def hinted(load: np.ndarray) -> Run:
    """The hints of a plan, after the figure of the table's last line."""

    def run(folder: Path) -> object:
        np.save(folder / "load.npy", load)
        words = ("plan", folder / "load.npy", *TWO, "--engine", "reference")
        return command(*words, show=lambda out: "a table")

    return run


def written(*words: object) -> Run:
    """`distplb plan` with an --output in or of the folder."""

    def run(folder: Path) -> object:
        load = file(folder, 2, 3, 8)
        (folder / "runs").mkdir()
        os.mkfifo(folder / "pipe")  # not /dev/null, which a fault would replace by a file
        options = [str(word).format(folder=folder) for word in words]
        return command("plan", load, *TWO, "--engine", "reference", *options, show=lambda out: "written")

    return run


def in_force(slots: int, gpus: int) -> Run:
    """`distplb plan` on two GPUs, with 8 experts and a placement in force."""

    def run(folder: Path) -> object:
        table = (torch.arange(slots) % 8).sort().values
        Placement(table.expand(3, -1), 8, gpus).save(folder / "placement.json")
        words = (*TWO, "--engine", "reference", "--current", folder / "placement.json")
        return command("plan", file(folder, 2, 3, 8), *words, "--json", show=moved)

    return run


def unseen(first: Sequence[str], second: Sequence[str]) -> Run:
    """`distplb compare` of two traces, whose layers have these names; the second's counts follow its names."""

    def run(folder: Path) -> object:
        load = {name: at for at, name in enumerate(sorted({*first, *second}))}
        every = counts(4, len(load), 8)
        one, other = (every[:, [load[name] for name in names]] for names in (first, second))
        paths = named(folder, "monday.npz", first, one), named(folder, "tuesday.npz", second, other[::-1].copy())
        words = ("compare", paths[0], "--unseen", paths[1], *TWO, "--engine", "reference", "--json")
        return command(*words, show=of_greedy)

    return run


def of_greedy(out: str) -> str:
    """What the greedy planner has on the steps that it has not seen."""
    rows = {row["planner"]: row for row in json.loads(out)["planners"]}
    return f"greedy (EPLB): {rows['greedy (EPLB)']['unseen']['mean']:.4f}"


def against(name: str, shape: Sequence[int]) -> Run:
    """`distplb compare` of a trace with names and an array."""

    def run(folder: Path) -> object:
        other = file(folder, *shape, name=name)
        words = (*TWO, "--engine", "reference")
        return command("compare", named(folder, "monday.npz", ["a", "b"]), "--unseen", other, *words)

    return run


def replayed(*options: object, load: np.ndarray | None = None) -> Run:
    """`distplb replay` of a trace; the answer."""

    def run(folder: Path) -> object:
        path = named(folder, "trace.npz", ["a", "b", "c"], counts(24, 3, 8) if load is None else load)
        words = ("replay", path, "--engine", "reference", "--json", *options)
        return command(*words, show=lambda out: json.loads(out)["verdict"]["answer"])

    return run


def reported(*options: object) -> Run:
    """`distplb report` of a trace, into the folder."""

    def run(folder: Path) -> object:
        path = named(folder, "trace.npz", ["a", "b", "c"], counts(24, 3, 8))
        words = ("report", path, "--output", folder / "report.html")
        return command(*words, *[str(word).format(folder=folder) for word in options])

    return run


def judged_on_ranks(folder: Path) -> object:
    """`distplb compare` on a load whose unseen steps are counts of single ranks."""
    np.save(folder / "ranks.npy", of_single_ranks())
    words = ("compare", file(folder, 2, 2, 16), "--unseen", folder / "ranks.npy", *TWO, "--engine", "reference")
    return command(*words, show=lambda out: "a table")


def told(*words: object) -> Run:
    return lambda folder: command(*words)


def layer_named(name: str) -> Run:
    """The first column of the row of a layer with this name."""

    def run(folder: Path) -> object:
        (folder / "load.json").write_text(json.dumps({name: [9, 1, 1, 1], "other": [1, 2, 3, 4]}))
        words = ("plan", folder / "load.json", *TWO, "--engine", "reference")
        return command(*words, show=lambda out: out.splitlines()[3].split()[0])

    return run


def of_single_ranks() -> np.ndarray:
    """`[4, 2, 16]`: each step has the four experts of one of four ranks."""
    load, own = np.zeros((4, 2, 16), dtype=np.int64), counts(4, 2, 4) + 100
    for rank in range(4):
        load[rank, :, 4 * rank : 4 * rank + 4] = own[rank]
    return load


def padded(layers: int) -> np.ndarray:
    """Counts with 20,000 tokens more on expert 0."""
    load = counts(3, layers, 16)
    load[:, :, 0] += 20_000
    return load


CASES: list[Case] = [
    Case(
        "`plan --nodes 3 --gpus-per-node 8`, 160 experts",
        "exit 2: [Error: 160 slots cannot be spread evenly over 24 GPUs (3 nodes × 8); pass --slots 168, "
        "8 more than experts, or --nodes and --gpus-per-node whose product divides 160]",
        planned(shape=(1, 2, 160), gpus=("--nodes", 3, "--gpus-per-node", 8)),
    ),
    Case(
        "`plan(load, Topology(3, 8))`, 160 experts",
        "refused: 160 slots cannot be spread evenly over 24 GPUs (3 nodes × 8); pass num_slots=168, 8 "
        "more than experts, or num_nodes and gpus_per_node whose product divides 160",
        called((1, 2, 160), Topology(3, 8)),
    ),
    Case(
        "`plan --gpus-per-node 16 --slots 16`, 256 experts",
        "exit 2: [Error: --slots is 16 for 256 experts; it counts the slots of all GPUs, and every expert"
        " needs one: pass --slots 272 for 16 more than experts, or --slots 256 for 16 on each of 16 GPUs]",
        planned("--slots", 16, shape=(1, 2, 256), gpus=("--gpus-per-node", 16)),
    ),
    Case(
        "`plan(load, Topology(1, 16), num_slots=16)`, 256 experts",
        "refused: num_slots is 16 for 256 experts; it counts the slots of all GPUs, and every expert "
        "needs one: pass num_slots=272 for 16 more than experts, or num_slots=256 for 16 on each of 16 "
        "GPUs",
        called((1, 2, 256), Topology(1, 16), num_slots=16),
    ),
    Case(
        "`plan --gpus-per-node 16 --slots 272`, 256 experts",
        "272 slots",
        planned("--slots", 272, shape=(1, 2, 256), gpus=("--gpus-per-node", 16)),
    ),
    Case(
        "`--gpus-per-node 2 --slots 9`, 8 experts",
        "exit 2: [Error: 9 slots cannot be spread evenly over 2 GPUs (1 nodes × 2); pass --slots 10, 2 "
        "more than experts, or --nodes and --gpus-per-node whose product divides 9]",
        planned("--slots", 9),
    ),
    Case(
        "`--gpus-per-node 2 --slots 1000000000000`, 8 experts",
        "exit 2: [Error: --slots is 1000000000000, more than can be planned; pass the slots of all GPUs "
        "together, at most 1048576]",
        planned("--slots", 10**12),
    ),
    Case(
        "`--slots 0`",
        "exit 2: [Error: Invalid value for '--slots': 0 is not in the range x>=1. Try 'distplb plan --help'.]",
        planned("--slots", 0),
    ),
    Case(
        "`--slots 1e3`",
        "exit 2: [Error: Invalid value for '--slots': '1e3' is not a valid integer. Try 'distplb plan --help'.]",
        planned("--slots", "1e3"),
    ),
    Case(
        "`--slots nan`",
        "exit 2: [Error: Invalid value for '--slots': 'nan' is not a valid integer. Try 'distplb plan --help'.]",
        planned("--slots", "nan"),
    ),
    Case(
        "`--gpus-per-node 1000000000`, 8 experts",
        "exit 2: [Error: 8 slots cannot be spread evenly over 1000000000 GPUs (1 nodes × 1000000000); "
        "pass --nodes and --gpus-per-node whose product divides 8]",
        planned(gpus=("--gpus-per-node", 10**9)),
    ),
    Case(
        "`--gpus-per-node 2.0`",
        "exit 2: [Error: Invalid value for '--gpus-per-node': '2.0' is not a valid integer. Try 'distplb "
        "plan --help'.]",
        planned(gpus=("--gpus-per-node", "2.0")),
    ),
    Case(
        "`--nodes 0`",
        "exit 2: [Error: Invalid value for '--nodes': 0 is not in the range x>=1. Try 'distplb plan --help'.]",
        planned("--nodes", 0),
    ),
    Case(
        "`--groups 3`, 8 experts",
        "exit 2: [Error: --groups is 3, which does not divide 8 experts; pass the number of groups of the"
        " router, or leave it out]",
        planned("--groups", 3),
    ),
    Case(
        "`plan(load, Topology(1, 2), num_groups=3)`, 8 experts",
        "refused: num_groups is 3, which does not divide 8 experts; pass the number of groups of the "
        "router, or leave it out",
        called((2, 3, 8), Topology(1, 2), num_groups=3),
    ),
    Case(
        "`--nodes 2 --groups 1`",
        "exit 2: [Error: --groups is 1, which 2 nodes cannot share evenly; pass a multiple of 2, or leave"
        " it out to plan without groups]",
        planned("--nodes", 2, "--groups", 1),
    ),
    Case(
        "`--mode permute --slots 10`, 8 experts",
        "exit 2: [Error: --slots is 10 for 8 experts, and --mode 'permute' knows no replicas; pass --mode"
        " remap, or --slots 8]",
        planned("--mode", "permute", "--slots", 10),
    ),
    Case(
        "`--mode swap`",
        "exit 2: [Error: Invalid value for '--mode': 'swap' is not one of 'remap', 'permute'. Try "
        "'distplb plan --help'.]",
        planned("--mode", "swap"),
    ),
    Case(
        "`--engine warp`",
        "exit 2: [Error: --engine 'warp' is not there; pass one of reference, cpu, cuda, or no --engine]",
        planned("--engine", "warp"),
    ),
    Case(
        '`plan(load, Topology(1, 2), engine="warp")`',
        "refused: engine 'warp' is not there; pass one of reference, cpu, cuda, or engine=None",
        called((2, 3, 8), Topology(1, 2), engine="warp"),
    ),
    Case(
        "`--candidates 5000000`",
        "exit 2: [Error: --candidates is 5000000; pass 1 to 2^22]",
        planned("--candidates", 5_000_000),
    ),
    Case(
        "`--seed 1180591620717411303424`",
        "exit 2: [Error: --seed is 1180591620717411303424; pass a whole number in [0, 2^62)]",
        planned("--seed", 2**70),
    ),
    Case(
        "`--seed -1`",
        "exit 2: [Error: Invalid value for '--seed': -1 is not in the range x>=0. Try 'distplb plan --help'.]",
        planned("--seed", -1),
    ),
    Case(
        "`--move-price 1e3`, more than there is to gain",
        "0 slots moved",
        priced("1e3"),
    ),
    Case(
        "`--move-price inf`",
        "0 slots moved",
        priced("inf"),
    ),
    Case(
        "`--move-price 1,2,3`",
        "exit 2: [Error: Invalid value for '--move-price': '1,2,3' is no price; pass tokens, at least 0: "
        "one number, or INSIDE,BETWEEN. Try 'distplb plan --help'.]",
        planned("--move-price", "1,2,3"),
    ),
    Case(
        "`--move-price nan`",
        "exit 2: [Error: Invalid value for '--move-price': 'nan' is no price; pass tokens, at least 0: "
        "one number, or INSIDE,BETWEEN. Try 'distplb plan --help'.]",
        planned("--move-price", "nan"),
    ),
    Case(
        "`--move-price -1`",
        "exit 2: [Error: Invalid value for '--move-price': '-1' is no price; pass tokens, at least 0: one"
        " number, or INSIDE,BETWEEN. Try 'distplb plan --help'.]",
        planned("--move-price", -1),
    ),
    Case(
        "`--current` of 10 slots, without `--slots`",
        "exit 2: [Error: --current has (layers, experts, slots, GPUs) = (3, 8, 10, 2), the load and "
        "topology (3, 8, 8, 2); pass the placement in force of the same model, or --slots 10]",
        in_force(10, 2),
    ),
    Case(
        "`--current` of 4 GPUs, `--gpus-per-node 2`",
        (
            "exit 2: [Error: placement.json is of 4 GPUs, and 2 are asked for; pass the placement of this model and "
            "cluster]"
        ),
        in_force(8, 4),
    ),
    Case(
        "`--current -`",
        "exit 2: [Error: Invalid value for '--current': '-' is no path, and the standard input is not "
        "read; pass a file, or ./- for one of this name. Try 'distplb plan --help'.]",
        planned("--current", "-"),
    ),
    Case(
        "`plan -`",
        "exit 2: [Error: Invalid value for 'LOADS': '-' is no path, and the standard input is not read; "
        "pass a file, or ./- for one of this name. Try 'distplb plan --help'.]",
        told("plan", "-", *TWO),
    ),
    Case(
        '`plan ""`',
        "exit 2: [Error: Invalid value for 'LOADS': '' is no path; pass one. Try 'distplb plan --help'.]",
        told("plan", "", *TWO),
    ),
    Case(
        "`plan` without `--gpus-per-node`",
        "exit 2: [Error: Missing option '--gpus-per-node'. Try 'distplb plan --help'.]",
        told("plan", "load.npy"),
    ),
    Case(
        "`plan a.npy b.npy`",
        "exit 2: [Error: Got unexpected extra argument (b.npy). Try 'distplb plan --help'.]",
        told("plan", "a.npy", "b.npy", *TWO),
    ),
    Case(
        "`--output placement.json`",
        "written",
        written("--output", "{folder}/placement.json"),
    ),
    Case(
        "`--output runs`, a folder",
        "exit 2: [Error: Invalid value for '--output': runs is a folder; pass the file to write, as "
        "runs/name. Try 'distplb plan --help'.]",
        written("--output", "{folder}/runs"),
    ),
    Case(
        "`--output missing/placement.json`",
        "exit 2: [Error: Invalid value for '--output': there is no folder missing; make it, or pass "
        "another file. Try 'distplb plan --help'.]",
        written("--output", "{folder}/missing/placement.json"),
    ),
    Case(
        "`--output load.npy/placement.json`",
        "exit 2: [Error: Invalid value for '--output': load.npy is no folder; pass another file. Try "
        "'distplb plan --help'.]",
        written("--output", "{folder}/load.npy/placement.json"),
    ),
    Case(
        "`plan load.npy --output load.npy`",
        "exit 2: [Error: Invalid value for --output: load.npy is what is read, and would be lost; pass "
        "another file. Try 'distplb plan --help'.]",
        written("--output", "{folder}/load.npy"),
    ),
    Case(
        "`--output pipe`, a named pipe",
        "exit 2: [Error: Invalid value for '--output': pipe is not a regular file, and would be replaced "
        "by one; pass another file. Try 'distplb plan --help'.]",
        written("--output", "{folder}/pipe"),
    ),
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
        "`compare --unseen`, with a further layer",
        "greedy (EPLB): 1.1206",
        unseen(["a", "b", "c"], ["c", "d", "a", "b"]),
    ),
    Case(
        "`compare --unseen`, without layer `b`",
        "exit 2: [Error: tuesday.npz has no layer 'b', which monday.npz has; it has 'c', 'a', 'x': pass "
        "two loads of the same model]",
        unseen(["a", "b", "c"], ["c", "a", "x"]),
    ),
    Case(
        "`compare` of layers `a` and `b`, `--unseen` an array of two layers",
        "exit 2: [Error: tuesday.npy has no names of layers, monday.npz has 'a' and others; pass two "
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
        "exit 2: [Error: the trace covers 24 iterations, and a rebalance every 1000000000000000000 takes "
        "twice as many: to plan on, and to judge; rebalance every 12 or less, or record for longer]",
        replayed("--every", 10**18),
    ),
    Case(
        "`replay --gpus-per-node 3`, 8 experts",
        "exit 2: [Error: 8 experts cannot be spread evenly over 3 GPUs (1 nodes × 3); make --nodes × "
        "--gpus-per-node a divisor of 8]",
        replayed("--gpus-per-node", 3),
    ),
    Case(
        "`replay --engine warp`",
        "exit 2: [Error: --engine 'warp' is not there; pass one of reference, cpu, cuda, or no --engine]",
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
        "exit 2: [Error: --megatron-ep is of Megatron-Core's files, and trace.npz is none; leave it out]",
        replayed("--megatron-ep", 64),
    ),
    Case(
        "`replay run.npz` without the file",
        "exit 2: [Error: Invalid value for 'TRACE...': Path 'run.npz' does not exist. Try 'distplb replay --help'.]",
        told("replay", "run.npz"),
    ),
    Case(
        "`report --nodes 2`",
        "exit 2: [Error: --nodes 2 without --gpus-per-node; pass both]",
        reported("--nodes", 2),
    ),
    Case(
        "`report --every 1000000000000000000`",
        "exit 2: [Error: the trace covers 24 iterations, and a rebalance every 1000000000000000000 takes "
        "twice as many: to plan on, and to judge; rebalance every 12 or less, or record for longer]",
        reported("--every", 10**18),
    ),
    Case(
        "`report --gpus-per-node 3`, 8 experts",
        "exit 2: [Error: 8 experts cannot be spread evenly over 3 GPUs (1 nodes × 3); make --nodes × "
        "--gpus-per-node a divisor of 8]",
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
        told("doctor", "--deadline", "inf"),
    ),
    Case(
        "a layer named `[/red]`",
        "[/red]",
        layer_named("[/red]"),
    ),
    Case(
        "a layer named `:warning:`",
        ":warning:",
        layer_named(":warning:"),
    ),
    Case(
        "counts of four ranks in four steps, each of its own experts",
        "a table [Hint: no expert has tokens in more than one of 4 steps: counts of single ranks, each of"
        " its own experts? add them up]",
        hinted(of_single_ranks()),
    ),
    Case(
        "`compare --unseen ranks.npy`, with these",
        "a table [Hint: ranks.npy: no expert has tokens in more than one of 4 steps: counts of single "
        "ranks, each of its own experts? add them up]",
        judged_on_ranks,
    ),
    Case(
        "their sum",
        "a table [Hint: there is one step: a plan for it is judged on what it was made from; record some more]",
        hinted(of_single_ranks().sum(0, keepdims=True)),
    ),
    Case(
        "the same as an array without steps",
        "a table",
        hinted(of_single_ranks().sum(0)),
    ),
    Case(
        "20,000 tokens of padding on expert 0 in each of 4 layers",
        "a table [Hint: in every layer expert 0 has at least 58,402 tokens more than the next one, about "
        "as many in all layers: padding that is routed? leave it out of the counts]",
        hinted(padded(4)),
    ),
    Case(
        "one layer's counts in all of 4 layers",
        "a table [Hint: all 4 layers have the same counts: one layer, recorded for all of them?]",
        hinted(np.repeat(counts(3, 1, 8), 4, axis=1)),
    ),
    Case(
        "the same number of tokens on every expert",
        "a table [Hint: the GPUs are even already: the fullest has 0.0 % more than the mean, so there is "
        "nothing to gain]",
        hinted(np.full((3, 2, 8), 100)),
    ),
    Case(
        "skewed counts",
        "a table",
        hinted(counts(3, 4, 16)),
    ),
]
