"""Bytes over a slow link, if the planner knows where the link is: two hosts of two GPUs, simulated on one machine.

    python -m benchmarks.train.bench_hosts --loads DIR --output benchmarks/results/DATE-hosts.md

The same jobs are rebalanced with the true topology, two nodes of two GPUs, and as one node of four; both price moves
with the bandwidths that they measure. The bytes are read from the link's own counters.
Shapes: T steps, L layers, E experts, M GPUs.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Iterator
from itertools import permutations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import distplb
from benchmarks.shared import sequences
from benchmarks.shared.processes import on_hosts, outside, run_job
from benchmarks.shared.tables import command_line, header, markdown, progress, publish
from distplb import LoadWindow, MoELayer, MoveModel, Moves, Rebalancer, Record, Search, Topology
from distplb.comm.torchdist import TorchComm
from distplb.train.measure import measured_bandwidths

STEPS, SEQUENCES, LAYERS = 8, 16, 12
ROW = 1 << 14  # float32 elements of an expert, without its two moments
AWARE, UNAWARE = Topology(2, 2), Topology(1, 4)
SECONDS = 1500.0
TEXT = (
    "Two hosts are network namespaces on one machine, each with a link of {megabits:g} Mbit/s in each direction (tbf) "
    "and an unlimited loopback; {delay}. Each has two gloo ranks, under torchrun. The experts of {layers} layers of "
    "DeepSeek-V2-Lite (64 each, 192 KiB with the moments of AdamW) start in a placement planned for one kind of text; "
    "{steps} steps of {sequences} sequences of another kind are counted, and the job is rebalanced. Aware: the "
    "topology is 2 nodes × 2 GPUs; unaware: 1 node × 4 GPUs. Both price a moved slot with the bandwidths that they "
    "measured in the job and with the time of a token, given in the table: the longer it is, the more slots pay off. "
    "If it is not known, the default price is used. Crossing counts the bytes that left the two hosts over their links "
    "during the rebalance, by the kernel's counters: experts, the planner's collectives and headers. Means over "
    "{cases} changes of text and seeds; `÷` is the ratio of the sums, with its range over single changes. "
    "Other work shared the cores, so seconds are too high; bytes and imbalance do not depend on it."
)


def main() -> None:
    """Measure, print, and write the result to --output if given."""
    options = parsed_options()
    if options.job:
        run_job(options.job, job)
        return
    measurement = measured(options)
    progress("")
    publish(f"{heading(options, measurement)}\n\n{table(measurement['cases'], options.nanoseconds)}", options.output)


def parsed_options() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description="Bytes between two hosts, with a planner that knows them or not.")
    parser.add_argument("--loads", type=Path, metavar="DIR", help="folder of deepseek-v2-lite_*_steps.npy")
    parser.add_argument("--megabits", type=float, default=400.0, help="bandwidth of each link and direction, in Mbit/s")
    parser.add_argument("--nanoseconds", type=int, nargs="+", default=[0, 10_000, 40_000, 160_000], help="per token")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the result there, as markdown")
    parser.add_argument("--job", type=Path, metavar="FOLDER", help=argparse.SUPPRESS)  # a rank on its host
    options = parser.parse_args()
    if not (options.loads or options.job):
        parser.error("the following arguments are required: --loads")
    return options


def heading(options: argparse.Namespace, measurement: dict) -> str:
    """The heading of the report, without local paths."""
    names = ("megabits", "nanoseconds", "seeds")
    arguments = {"--loads": "DIR"} | {f"--{name}": getattr(options, name) for name in names}
    text = TEXT.format(
        megabits=options.megabits,
        delay=measurement["delay"],
        layers=LAYERS,
        steps=STEPS,
        sequences=SEQUENCES,
        cases=len(measurement["cases"]) // len(options.nanoseconds),
    )
    pairs = (f"{name} {inside / 1e6:.0f} and {between / 1e6:.0f}" for name, inside, between in measurement["links"])
    top = header("A planner that knows its nodes", text, command_line("train.bench_hosts", arguments), "cpu")
    return f"{top}\n- MB/s measured inside a node and between nodes: {', '.join(pairs)}"


# --- where it runs ----------------------------------------------------------------------------------------------


def measured(options: argparse.Namespace) -> dict:
    """Run the job; return its cases and links, and a text about the delay."""
    why_not = outside("tests/helpers", "hosts").why_not
    if reason := why_not("tbf"):
        raise SystemExit(f"this machine cannot simulate hosts: {reason}")
    has_delay = why_not("netem") is None
    task = {"loads": str(options.loads.resolve()), "nanoseconds": options.nanoseconds, "seeds": options.seeds}
    result = on_hosts(
        2,
        2,
        "benchmarks.train.bench_hosts",
        task,
        megabits=options.megabits,
        delay_ms=0.1 if has_delay else 0.0,
        seconds=SECONDS,
    )
    delay = "a delay of 0.1 ms (netem)" if has_delay else "no delay, because this kernel has no netem"
    return result | {"delay": delay}


def job(task: dict[str, Any]) -> dict[str, Any]:
    """Run one rank: every change of text, with every time of a token, aware and unaware."""
    comm = TorchComm(deadline=SECONDS / 2)
    names = {"aware": AWARE, "unaware": UNAWARE}
    links = {name: measured_bandwidths(comm, topology, range(comm.size), comm.rank) for name, topology in names.items()}
    cases = []
    for before, after, seed in changes(Path(task["loads"]), task["seeds"]):
        for nanoseconds in task["nanoseconds"]:
            case: dict[str, object] = {"nanoseconds": nanoseconds}
            for name, topology in names.items():
                model = MoveModel(nanoseconds * 1e-9, 3 * ROW * 4, *links[name]) if nanoseconds else None
                case[name] = rebalanced(comm, topology, model, before, after, seed)
            cases.append(case)
    return {"cases": cases, "links": [(name, *links[name]) for name in names]}


def changes(folder: Path, seeds: int) -> Iterator[tuple[Tensor, Tensor, int]]:
    """Yield steps `[T, L, E]` of one kind of text, steps of another kind, and a seed."""
    texts = {name: load[:, :LAYERS] for name, load in sequences.read_sequences(folder).items()}
    for one, other in permutations(texts, 2):
        for seed in range(seeds):
            yield (
                sequences.steps_of(texts[one], STEPS, SEQUENCES, seed),
                sequences.steps_of(texts[other], STEPS, SEQUENCES, seed + seeds),
                seed,
            )


def rebalanced(
    comm: TorchComm, topology: Topology, model: MoveModel | None, before: Tensor, after: Tensor, seed: int
) -> dict[str, float]:
    """Rebalance once, from a placement planned for `before [T, L, E]`, after counting the steps of `after`."""
    num_layers, num_experts = after.shape[1:]
    weights = [torch.nn.Parameter(torch.zeros(num_experts // comm.size, ROW)) for _ in range(num_layers)]
    optimizer = torch.optim.AdamW(weights)
    for weight in weights:
        optimizer.state[weight] = {name: torch.zeros_like(weight) for name in ("exp_avg", "exp_avg_sq")}
    tables = [torch.arange(num_experts) for _ in weights]
    layers = [
        MoELayer(name=str(n), experts={"w": w}, slot_of_expert=table)
        for n, (w, table) in enumerate(zip(weights, tables, strict=True))
    ]
    window, events = LoadWindow(num_layers, num_experts, len(after)), []
    rebalancer = Rebalancer(
        layers,
        optimizer,
        topology=topology,
        every=len(after),
        window=window,
        comm=comm,
        search=Search(seed=seed),
        moves=Moves(model=model, verify="off"),
        record=Record(on_event=events.append),
    )
    # Both start from the same placement, planned without nodes.
    rebalancer.apply(distplb.plan(before, UNAWARE, num_candidates=4, seed=seed))
    sent = crossing(comm)
    for step in after:
        for layer, counts in enumerate(step):
            window.add(layer, (counts + comm.rank) // comm.size)  # adds up to the whole over the ranks
        rebalancer.step()
    (event,) = events
    rebalancer.close()
    return {
        "crossed": crossing(comm) - sent,
        "slots": event.slots_moved,
        "before": statistics.mean(event.imbalance_before),
        "imbalance": statistics.mean(event.imbalance_after),
        "seconds": event.seconds.get("move", 0.0),
    }


def crossing(comm: TorchComm) -> int:
    """Bytes that have left all hosts so far; one rank of each host reads its counter."""
    own = Path("/sys/class/net/eth0/statistics/tx_bytes").read_text() if os.environ["LOCAL_RANK"] == "0" else "0"
    bytes_ = torch.tensor([int(own)])
    comm.all_reduce_sum(bytes_)
    return int(bytes_)


# --- text -------------------------------------------------------------------------------------------------------


def table(cases: list[dict], nanoseconds: list[int]) -> str:
    """Aware and unaware side by side, for each time of a token."""
    head = ["ns a token", "planner", "imbalance before", "after", "slots moved", "crossing, MB", "÷", "move, s", "÷"]
    lines = []
    for of_token in nanoseconds:
        own = [case for case in cases if case["nanoseconds"] == of_token]
        for name in ("unaware", "aware"):
            means = {key: statistics.mean(case[name][key] for case in own) for key in own[0][name]}
            ratio = {key: compared(own, key) if name == "aware" else "" for key in ("crossed", "seconds")}
            lines.append(
                [
                    str(of_token) if of_token else "not known",
                    name,
                    f"{means['before']:.4f}",
                    f"{means['imbalance']:.4f}",
                    f"{means['slots']:.0f}",
                    f"{means['crossed'] / 1e6:.1f}",
                    ratio["crossed"],
                    f"{means['seconds']:.2f}",
                    ratio["seconds"],
                ]
            )
    return markdown(head, lines)


def compared(cases: list[dict], key: str) -> str:
    """Aware over unaware: the ratio of the sums, and the range over the cases."""
    each = [case["aware"][key] / case["unaware"][key] for case in cases if case["unaware"][key]]
    whole = sum(case["aware"][key] for case in cases) / sum(case["unaware"][key] for case in cases)
    return f"{whole:.2f} [{min(each):.2f} – {max(each):.2f}]"


if __name__ == "__main__":
    main()
