"""Options of `distplb plan`, and the same options in Python."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from distplb import Placement, Topology, plan
from inputs.case import Case, command
from inputs.command_cases import TWO, Run, counts, file, run_words

__all__ = ["CASES"]


def planned(*options: object, shape: Sequence[int] = (2, 3, 8), gpus: Sequence[object] = TWO) -> Run:
    """Run `distplb plan` on counts of this shape, and show the number of slots."""
    words = (*gpus, "--engine", "reference", *options, "--json")
    return lambda folder: command(
        "plan", file(folder, *shape), *words, show=lambda out: f"{json.loads(out)['slots']} slots"
    )


def priced(price: str) -> Run:
    """Run `distplb plan` at this price of moves, and show how many slots it moves."""
    words = (*TWO, "--engine", "reference", "--move-price", price, "--json")
    return lambda folder: command("plan", file(folder, 2, 3, 8), *words, show=moved)


def moved(out: str) -> str:
    total = json.loads(out)["all_layers"]
    return f"{total['moved_inside'] + total['moved_between']} slots moved"


def called(shape: Sequence[int], topology: Topology, **options: object) -> Run:
    options = {"engine": "reference"} | options
    return lambda _: plan(torch.from_numpy(counts(*shape)), topology, **options)


def written(*words: object) -> Run:
    """Run `distplb plan` with an --output in the folder."""

    def run(folder: Path) -> object:
        load = file(folder, 2, 3, 8)
        (folder / "runs").mkdir()
        os.mkfifo(folder / "pipe")  # not /dev/null, which a bug would replace by a file
        options = [str(word).format(folder=folder) for word in words]
        return command("plan", load, *TWO, "--engine", "reference", *options, show=lambda out: "written")

    return run


def in_force(slots: int, gpus: int) -> Run:
    """Run `distplb plan` with 8 experts on two GPUs and a placement in force, and show how many slots it moves."""

    def run(folder: Path) -> object:
        table = (torch.arange(slots) % 8).sort().values
        Placement(table.expand(3, -1), 8, gpus).save(folder / "placement.json")
        words = (*TWO, "--engine", "reference", "--current", folder / "placement.json")
        return command("plan", file(folder, 2, 3, 8), *words, "--json", show=moved)

    return run


CASES: list[Case] = [
    Case(
        "`plan --nodes 3 --gpus-per-node 8`, 160 experts",
        "exit 2: [Error: 160 slots cannot be spread evenly over 24 GPUs (3 nodes × 8); pass --slots 168 "
        "(8 for replicas), or --nodes and --gpus-per-node whose product divides 160]",
        planned(shape=(1, 2, 160), gpus=("--nodes", 3, "--gpus-per-node", 8)),
    ),
    Case(
        "`plan(load, Topology(3, 8))`, 160 experts",
        "refused: 160 slots cannot be spread evenly over 24 GPUs (3 nodes × 8); pass num_slots=168 (8 "
        "for replicas), or num_nodes and gpus_per_node whose product divides 160",
        called((1, 2, 160), Topology(3, 8)),
    ),
    Case(
        "`plan --gpus-per-node 16 --slots 16`, 256 experts",
        "exit 2: [Error: --slots is 16 for 256 experts; it counts the slots of all GPUs, and every expert"
        " needs one: pass --slots 272 (16 for replicas), or --slots 256 (16 on each of 16 GPUs)]",
        planned("--slots", 16, shape=(1, 2, 256), gpus=("--gpus-per-node", 16)),
    ),
    Case(
        "`plan(load, Topology(1, 16), num_slots=16)`, 256 experts",
        "refused: num_slots is 16 for 256 experts; it counts the slots of all GPUs, and every expert "
        "needs one: pass num_slots=272 (16 for replicas), or num_slots=256 (16 on each of 16 GPUs)",
        called((1, 2, 256), Topology(1, 16), num_slots=16),
    ),
    Case(
        "`plan --gpus-per-node 16 --slots 272`, 256 experts",
        "272 slots",
        planned("--slots", 272, shape=(1, 2, 256), gpus=("--gpus-per-node", 16)),
    ),
    Case(
        "`--gpus-per-node 2 --slots 9`, 8 experts",
        "exit 2: [Error: 9 slots cannot be spread evenly over 2 GPUs (1 node × 2); pass --slots 10 (2 "
        "for replicas), or --nodes and --gpus-per-node whose product divides 9]",
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
        "exit 2: [Error: 8 slots cannot be spread evenly over 1000000000 GPUs (1 node × 1000000000); "
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
        "exit 2: [Error: --groups is 3, which does not divide 8 experts; pass the router's number of "
        "groups, or leave it out]",
        planned("--groups", 3),
    ),
    Case(
        "`plan(load, Topology(1, 2), num_groups=3)`, 8 experts",
        "refused: num_groups is 3, which does not divide 8 experts; pass the router's number of "
        "groups, or leave it out",
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
        "exit 2: [Error: --slots is 10 for 8 experts, and --mode 'permute' does not support replicas; pass "
        "--mode remap, or --slots 8]",
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
        "exit 2: [Error: --engine 'warp' is unknown; pass one of reference, cpu, cuda, or no --engine]",
        planned("--engine", "warp"),
    ),
    Case(
        '`plan(load, Topology(1, 2), engine="warp")`',
        "refused: engine 'warp' is unknown; pass one of reference, cpu, cuda, or engine=None",
        called((2, 3, 8), Topology(1, 2), engine="warp"),
    ),
    Case(
        "`--candidates 5000000`",
        "exit 2: [Error: --candidates is 5000000; pass 1 to 2^22]",
        planned("--candidates", 5_000_000),
    ),
    Case(
        "`--seed 1180591620717411303424`",
        "exit 2: [Error: --seed is 1180591620717411303424; pass an integer in [0, 2^62)]",
        planned("--seed", 2**70),
    ),
    Case(
        "`--seed -1`",
        "exit 2: [Error: Invalid value for '--seed': -1 is not in the range x>=0. Try 'distplb plan --help'.]",
        planned("--seed", -1),
    ),
    Case(
        "`--move-price 1e3`, more than any move gains",
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
        "exit 2: [Error: Invalid value for '--move-price': '1,2,3' is not a price; pass tokens, at least "
        "0: one number, or INSIDE,BETWEEN. Try 'distplb plan --help'.]",
        planned("--move-price", "1,2,3"),
    ),
    Case(
        "`--move-price nan`",
        "exit 2: [Error: Invalid value for '--move-price': 'nan' is not a price; pass tokens, at least 0: "
        "one number, or INSIDE,BETWEEN. Try 'distplb plan --help'.]",
        planned("--move-price", "nan"),
    ),
    Case(
        "`--move-price -1`",
        "exit 2: [Error: Invalid value for '--move-price': '-1' is not a price; pass tokens, at least 0: "
        "one number, or INSIDE,BETWEEN. Try 'distplb plan --help'.]",
        planned("--move-price", -1),
    ),
    Case(
        "`--current` with 10 slots, without `--slots`",
        "exit 2: [Error: --current has (layers, experts, slots, GPUs) = (3, 8, 10, 2), load and "
        "topology have (3, 8, 8, 2); pass the placement in force for the same model, or --slots 10]",
        in_force(10, 2),
    ),
    Case(
        "`--current` for 4 GPUs, `--gpus-per-node 2`",
        (
            "exit 2: [Error: placement.json has num_gpus=4 where 2 is expected; pass the placement of this model "
            "and cluster]"
        ),
        in_force(8, 4),
    ),
    Case(
        "`--current -`",
        "exit 2: [Error: Invalid value for '--current': '-' is not a path, and standard input is not "
        "read; pass a file, or ./- for a file of this name. Try 'distplb plan --help'.]",
        planned("--current", "-"),
    ),
    Case(
        "`plan -`",
        "exit 2: [Error: Invalid value for 'LOADS': '-' is not a path, and standard input is not read; "
        "pass a file, or ./- for a file of this name. Try 'distplb plan --help'.]",
        run_words("plan", "-", *TWO),
    ),
    Case(
        '`plan ""`',
        "exit 2: [Error: Invalid value for 'LOADS': '' is not a path; pass one. Try 'distplb plan --help'.]",
        run_words("plan", "", *TWO),
    ),
    Case(
        "`plan` without `--gpus-per-node`",
        "exit 2: [Error: Missing option '--gpus-per-node'. Try 'distplb plan --help'.]",
        run_words("plan", "load.npy"),
    ),
    Case(
        "`plan a.npy b.npy`",
        "exit 2: [Error: Got unexpected extra argument (b.npy). Try 'distplb plan --help'.]",
        run_words("plan", "a.npy", "b.npy", *TWO),
    ),
    Case(
        "`--output placement.json`",
        "written",
        written("--output", "{folder}/placement.json"),
    ),
    Case(
        "`--output runs`, a folder",
        "exit 2: [Error: Invalid value for '--output': runs is a folder; pass the file to write, such as "
        "runs/name. Try 'distplb plan --help'.]",
        written("--output", "{folder}/runs"),
    ),
    Case(
        "`--output missing/placement.json`",
        "exit 2: [Error: Invalid value for '--output': there is no folder missing; create it, or pass "
        "another file. Try 'distplb plan --help'.]",
        written("--output", "{folder}/missing/placement.json"),
    ),
    Case(
        "`--output load.npy/placement.json`",
        "exit 2: [Error: Invalid value for '--output': load.npy is not a folder; pass another file. Try "
        "'distplb plan --help'.]",
        written("--output", "{folder}/load.npy/placement.json"),
    ),
    Case(
        "`plan load.npy --output load.npy`",
        "exit 2: [Error: Invalid value for --output: load.npy is the command's input and would be "
        "overwritten; pass another file. Try 'distplb plan --help'.]",
        written("--output", "{folder}/load.npy"),
    ),
    Case(
        "`--output pipe`, a named pipe",
        "exit 2: [Error: Invalid value for '--output': pipe is not a regular file, and would be replaced "
        "by one; pass another file. Try 'distplb plan --help'.]",
        written("--output", "{folder}/pipe"),
    ),
]
