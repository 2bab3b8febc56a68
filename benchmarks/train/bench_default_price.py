"""Rebalances without a known price of moves: with the default price only, and with even layers left alone too.

    python -m benchmarks.train.bench_default_price --loads DIR --output benchmarks/results/DATE-default-price.md

Three cases: equally likely experts, for which no plan can help; recorded and generated traces, evaluated on steps that
no plan had seen; and a recorded load, perturbed. Shapes: S steps, T steps of a window, L layers, E experts, M GPUs.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import distplb
from benchmarks.shared import traces
from benchmarks.shared.loads import disturbed
from benchmarks.shared.tables import command_line, header, markdown, progress, publish
from benchmarks.shared.traces import UNTIMED, Case
from distplb import Placement, Topology, imbalance, replay
from distplb.core.price import moved_slots
from distplb.packing.engines import engine_named
from distplb.planning.chance import even_by_chance
from distplb.train.pricing import default_price

Planner = Callable[[Tensor, Placement], Placement]

SIZES = ((1, 8, 64), (2, 8, 64), (1, 8, 256), (2, 32, 256), (1, 64, 128), (2, 64, 512))  # nodes, M, E
EVEN_STEPS, EVEN_TOKENS, EVEN_LAYERS, EVEN_WINDOWS = (4, 16, 64), (2048, 65536), 2, 3
LOAD, NOISE = "deepseek-v3_prefill_in1024.npy", 0.1
HEAD = ["static", "price alone", "moved", "left alone", "moved"]
TEXT = (
    "Slots moved, over all rebalances and layers, and the mean imbalance of the steps after the first rebalance, each "
    "under a plan that had not seen it. `price alone` plans with the price of a moved slot that a Rebalancer uses "
    "without a time curve or a move model; `left alone` also keeps layers whose GPUs differ no more than by chance, as "
    "a Rebalancer does. The results do not depend on the machine."
)


def main() -> None:
    """Measure, print, and write the result to --output if given."""
    parser = argparse.ArgumentParser(description="Rebalances without a known price of moves.")
    parser.add_argument("--loads", type=Path, metavar="DIR", help="folder of recorded loads, as for bench_replay")
    parser.add_argument("--every", type=int, default=32, metavar="N", help="steps between rebalances, and in each plan")
    parser.add_argument("--candidates", type=int, default=8, metavar="K")
    parser.add_argument("--windows", type=int, default=EVEN_WINDOWS, help="windows of each even load")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the result there, as markdown")
    options = parser.parse_args()
    parts = [f"## Equally likely experts\n\n{even_table(options)}", f"## Traces\n\n{trace_table(options)}"]
    if options.loads:
        parts.append(f"## A disturbed load\n\n{disturbed_table(options)}")
    progress("")
    arguments = {"--loads": options.loads and "DIR"}
    arguments |= {f"--{name}": getattr(options, name) for name in ("every", "candidates", "windows")}
    command = command_line("train.bench_default_price", arguments)
    title = "Rebalances without a known price of moves"
    publish("\n\n".join([header(title, TEXT, command, engine_named(None)[0]), *parts]), options.output)


def planner(topology: Topology, num_candidates: int, alone: bool) -> Planner:
    """Return a planner with the default price; `alone` leaves even layers alone."""

    def planned(load: Tensor, current: Placement) -> Placement:
        tokens = int(load.sum()) // load.shape[1] // topology.num_gpus
        price = default_price(tokens, topology)
        is_even = even_by_chance(load, current)[:, None] & alone
        if is_even.all():  # whatever the search found, it would be dropped
            return current
        plan = distplb.plan(load, topology, current=current, move_price=price, num_candidates=num_candidates)
        table = torch.where(is_even, current.expert_of_slot, plan.expert_of_slot)
        return Placement(table, current.num_experts, current.num_gpus)

    return planned


def both(load: Tensor, topology: Topology, every: int, num_candidates: int) -> list[str]:
    """The static imbalance, then imbalance and slots moved of each planner."""
    trace, cells = traces.as_trace(load), []
    planners = [planner(topology, num_candidates, alone) for alone in (False, True)]
    for one in ((lambda load, current: current), *planners):
        run = replay(trace, one, topology=topology, every=every, model=UNTIMED)
        cells.append(f"{float(run.imbalance[every:].mean()):.4f}")
        cells.append(f"{run.slots_moved}")
    return [cells[0], *cells[2:]]


def even_table(options: argparse.Namespace) -> str:
    """One row for each size, window and number of tokens."""
    lines = []
    for nodes, gpus, experts in SIZES:
        for steps in EVEN_STEPS:
            for tokens in EVEN_TOKENS:
                progress(f"even, {gpus} GPUs, {experts} experts, {steps} steps of {tokens} tokens")
                mean = torch.full((steps * (options.windows + 1), EVEN_LAYERS, experts), tokens * gpus / experts)
                load = torch.poisson(mean, generator=torch.Generator().manual_seed(gpus + steps)).long()
                name = f"{gpus} GPUs on {nodes}, {experts} experts, {steps} steps of {tokens} tokens a GPU"
                slots = options.windows * EVEN_LAYERS * experts
                lines.append([name, f"{slots}", *both(load, Topology(nodes, gpus // nodes), steps, options.candidates)])
    return markdown(["load", "slots", *HEAD], lines)


def trace_table(options: argparse.Namespace) -> str:
    """One row for each trace, and one with all its experts rescaled to the same mean."""
    sources = [*traces.recorded_traces([traces.SHIPPED])]
    sources += traces.sampled_traces(options.loads) if options.loads else []
    lines = []
    for name, trace in (*sources, *traces.generated_traces(1)):
        case = Case(name, "", trace, traces.cluster_of(trace.num_experts, 8))
        for one in (case, case.rescaled()):
            progress(one.title)
            slots = (trace.num_steps - 1) // options.every * trace.num_layers * trace.num_experts
            cells = both(one.trace.load, one.topology, options.every, options.candidates)
            lines.append([one.title, f"{slots}", *cells])
    return markdown(["trace", "slots", *HEAD], lines)


def disturbed_table(options: argparse.Namespace) -> str:
    """Plan again after a load is perturbed: with free moves, with one price for all moves, and with one by distance."""
    load = torch.from_numpy(np.load(options.loads / LOAD).astype(np.int64))
    layers, experts = load.shape
    next_load = disturbed(load, NOISE, seed=0)
    tokens = int(next_load.sum()) // layers // 16
    lines = []
    for topology in (Topology(1, 16), Topology(2, 8)):
        start = Placement.contiguous(layers, experts, 16)
        start = distplb.plan(load, topology, current=start, num_candidates=options.candidates)
        uniform = default_price(tokens, Topology(1, 16))
        prices = {"moving for nothing": (0.0, 0.0), "the same price everywhere": uniform}
        if topology.num_nodes > 1:
            prices["by distance"] = default_price(tokens, topology)
        for name, price in prices.items():
            plan = distplb.plan(next_load, topology, current=start, move_price=price, num_candidates=options.candidates)
            inside, between = moved_slots(start, plan, topology).sum(0).tolist()
            share = f"{(inside + between) / layers / experts:.1%}"
            even = float(imbalance(next_load, plan).mean())
            lines.append([f"16 GPUs on {topology.num_nodes}, {name}", f"{even:.4f}", share, f"{inside}", f"{between}"])
    text = f"{LOAD}, every count times exp(x), x normal with standard deviation {NOISE}; evaluated on the planned load."
    return f"{text}\n\n{markdown(['plan', 'imbalance', 'moved', 'inside nodes', 'between'], lines)}"


if __name__ == "__main__":
    main()
