"""What distplb adds to a step of the example's MoE layer where there is nothing to gain, and what it gains elsewhere.

    python -m benchmarks.replicas.bench_step --output benchmarks/results/DATE-replicas.md

Two ranks over gloo. Balanced counts: the layer alone, forward and backward, with a balancer and without in turn, and
the balancer's `dispatch` against the exchange of counts that it replaces. Uneven counts: the same with replicas.
Shapes: N tokens of a rank, M = 2 GPUs, G own and R = 2 replica slots.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from benchmarks.replicas.host_time import TOKENS, host_time
from benchmarks.shared.processes import on_this_host, outside, run_job
from benchmarks.shared.tables import command_line, header, markdown, progress, publish, verdict
from distplb import Topology
from distplb.replicas.step_balancer import StepBalancer

MODULE, RANKS, EXPERTS, R = "benchmarks.replicas.bench_step", 2, 8, 2
# Tokens of a rank, dim and ffn, from a step of a few milliseconds up.
SIZES = ((64, 64, 256), (512, 128, 512), (1024, 256, 1024), (2048, 512, 1024))
WARM_UP = 16  # steps, and dispatches
TARGET = 0.005  # of a step
STEP_MILLISECONDS = (5, 20, 100)
HOT = (2.0, 0.5)  # bias of the scores of the first experts; a score is between 0 and 1
STAGES = ("count", "split", "push", "push again", "bring home")
SECONDS = 600  # for one size
TEXT = (
    "Medians, with quartiles in brackets. A step is one forward and backward of the MoE layer of examples/moe_model.py "
    "alone, with 8 experts of which a token takes 2, in float32 on one thread of each of two ranks over gloo; steps "
    "with a balancer and without alternate in one run, and the one that goes first changes. `exchange` is the layer's "
    "own exchange of counts, counting included; `dispatch` takes its place, and finds that no replica pays. Both start "
    "at a barrier, so their code is cold, as in a step. `adds` is dispatch − exchange; `share` is that of the step "
    "without a balancer. `difference` is what whole steps differ by, pair by pair; its spread is that of the machine, "
    "which other jobs share."
)


def main() -> None:
    """Measure, print, and write the report if requested."""
    options = parsed_options()
    if options.job:
        run_job(options.job, measured)
        return
    rows, uneven = [], []
    for size in SIZES:
        for hot, found in ((False, rows), (True, uneven)):
            progress(f"{size}, {'uneven' if hot else 'balanced'}")
            task = {"size": size, "hot": hot, "pairs": options.pairs, "calls": options.calls}
            found.append(on_this_host(RANKS, MODULE, task, seconds=SECONDS))
    progress("host time")
    hosts = [(gpus, slots, host_time(gpus, slots)) for gpus, slots in ((2, 8), (8, 64), (64, 256))]
    progress("")
    top = header(
        "What replicas cost a step, and what they gain",
        TEXT,
        command_line("replicas.bench_step", {"--pairs": options.pairs, "--calls": options.calls}),
        "cpu",
    )
    publish("\n\n".join([top, *balanced_part(rows), *uneven_part(uneven), *host_part(hosts)]), options.output)


def parsed_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="What distplb adds to a step, and what it gains.")
    parser.add_argument("--pairs", type=int, default=24, help="steps with a balancer, and as many without")
    parser.add_argument("--calls", type=int, default=300, help="dispatches, and as many bare exchanges")
    parser.add_argument("--job", type=Path, help="folder of a task, for the ranks of a job")
    parser.add_argument("--output", type=Path, help="also write the report to this file")
    return parser.parse_args()


# --- on the ranks -------------------------------------------------------------------------------------------------


class Layers:
    """The example's layer with a balancer and without, on the same tokens.

    Args:
        size: N, dim and ffn.
        depth: layers, one after the other.
        hot: whether some experts are hot; else all have equally many tokens.
    """

    def __init__(self, size: list[int], depth: int, hot: bool) -> None:
        moe_model = outside("examples", "moe_model")
        tokens, dim, ffn = size
        config = moe_model.Config(experts=EXPERTS, dim=dim, ffn=ffn, forced=not hot)
        topology = Topology(1, dist.get_world_size())
        self.balancer = StepBalancer(topology=topology, num_experts=EXPERTS, replica_slots=R)
        torch.manual_seed(0)
        self.layers = {
            name: [moe_model.MoE(config, dist.group.WORLD, balancer, str(number)) for number in range(depth)]
            for name, balancer in (("plain", None), ("balanced", self.balancer))
        }
        for layer in (*self.layers["plain"], *self.layers["balanced"]):
            for weight in (layer.w_in, layer.w_out):
                torch.nn.init.normal_(weight, std=0.02)
            if hot:
                layer.expert_bias[: len(HOT)] = torch.tensor(HOT)
        generator = torch.Generator().manual_seed(1 + dist.get_rank())
        self.x = torch.randn(1, tokens, dim, generator=generator, requires_grad=True)
        self.slots = (torch.arange(2 * tokens) % EXPERTS).view(tokens, 2)

    def step(self, name: str) -> float:
        """Seconds of a forward and backward."""
        self.x.grad = None
        for layer in self.layers[name]:
            layer.zero_grad()
        dist.barrier()
        begin = time.perf_counter()
        x = self.x
        for layer in self.layers[name]:
            x = layer(x)
        x.sum().backward()
        return time.perf_counter() - begin

    def exchange(self) -> float:
        """Seconds of the exchange of counts that a plain layer makes, until split sizes are known."""
        dist.barrier()
        begin = time.perf_counter()
        sent, received = self.layers["plain"][0].count(self.slots)
        assert len(sent.sum(1).tolist()) == len(received.sum(1).tolist())
        return time.perf_counter() - begin

    def dispatch(self) -> float:
        """Seconds of a dispatch of even counts, until split sizes are known."""
        dist.barrier()
        begin = time.perf_counter()
        step = self.balancer.dispatch("even", self.slots)
        assert len(step.send.sum(1).tolist()) == len(step.receive.sum(1).tolist())
        assert step.is_trivial
        return time.perf_counter() - begin


def measured(task: dict[str, Any]) -> dict[str, Any]:
    """Both layers in turn, and what belongs to the task; the mean over ranks of each measurement."""
    depth = 2 if task["hot"] else 1  # so that the first of two is pushed again
    layer = Layers(task["size"], depth, task["hot"])
    steps: dict[str, list[float]] = {"plain": [], "balanced": []}
    for name in (*steps, *steps):
        layer.step(name)  # compiles, allocates
    before = dict(layer.balancer.seconds)
    watched = watch(layer.balancer)
    for pair in range(task["pairs"]):
        for name in ("plain", "balanced") if pair % 2 else ("balanced", "plain"):
            steps[name].append(layer.step(name))
    stages = {name: seconds - before.get(name, 0.0) for name, seconds in layer.balancer.seconds.items()}
    calls: dict[str, list[float]] = {"exchange": [], "dispatch": []}
    if not task["hot"]:
        for call in range(WARM_UP + task["calls"]):
            seconds = {"exchange": layer.exchange(), "dispatch": layer.dispatch()}
            for name in calls if call >= WARM_UP else ():
                calls[name].append(seconds[name])
    plain = layer.layers["plain"][0]
    expert = sum(weight[0].numel() * weight.element_size() for weight in (plain.w_in, plain.w_out))
    return {
        "size": task["size"],
        "steps": {name: over_ranks(seconds) for name, seconds in steps.items()},
        "calls": {name: over_ranks(seconds) for name, seconds in calls.items()},
        "stages": {name: over_ranks([seconds / (task["pairs"] * depth)])[0] for name, seconds in stages.items()},
        "expert_bytes": expert,
        **watched,
    }


def watch(balancer: StepBalancer) -> dict[str, list[float]]:
    """Lists that get, for every dispatch from now on, its replicas and its imbalance at home and as it is split."""
    found: dict[str, list[float]] = {"replicas": [], "home": [], "split": []}
    dispatch = balancer.dispatch

    def watched(*arguments: Any) -> Any:
        step = dispatch(*arguments)
        if step.split is not None:
            load = step.split.counts.sum(0).view(RANKS, -1).sum(1).double()
            found["home"].append(float(load.max() / load.mean()))
            found["split"].append(step.split.imbalance)
        found["replicas"].append(0 if step.split is None else step.split.num_replicas)
        return step

    balancer.dispatch = watched  # type: ignore[method-assign]
    return found


def over_ranks(seconds: list[float]) -> list[float]:
    """The mean over ranks of each number."""
    values = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(values)
    return [float(value) for value in values / dist.get_world_size()]


# --- the report ---------------------------------------------------------------------------------------------------


def balanced_part(results: list[dict[str, Any]]) -> list[str]:
    """Sizes with even counts, and the share that they would have of longer steps."""
    lines, adds = [], []
    for one in results:
        assert not any(one["replicas"])
        adds.append(float(np.median(np.subtract(one["calls"]["dispatch"], one["calls"]["exchange"]))))
        plain = float(np.median(one["steps"]["plain"]))
        lines.append(
            [
                "{} × {} × {}".format(*one["size"]),
                spread(one["steps"]["plain"], 1e3, ".2f"),
                *(spread(one["calls"][name], 1e6, ".0f") for name in ("exchange", "dispatch")),
                f"{1e6 * adds[-1]:.0f}",
                f"{adds[-1] / plain:.2%}",
                spread(np.subtract(one["steps"]["balanced"], one["steps"]["plain"]), 1e6, ".0f"),
            ]
        )
    names = ["tokens × dim × ffn", "step, ms", "exchange, µs", "dispatch, µs", "adds, µs", "share"]
    worst = max(adds)
    shares = ", ".join(f"{worst / (1e-3 * step):.2%} of {step} ms" for step in STEP_MILLISECONDS)
    met = [
        f"{'{} × {} × {}'.format(*one['size'])}: {verdict(add / float(np.median(one['steps']['plain'])) <= TARGET)}"
        for one, add in zip(results, adds, strict=True)
    ]
    return [
        "## Balanced counts: no replica in any step",
        markdown([*names, "difference, µs"], lines),
        f"Target: at most {TARGET:.1%} of a step. {'; '.join(met)}.",
        f"The most that was added, {1e6 * worst:.0f} µs, would be {shares}.",
    ]


def uneven_part(results: list[dict[str, Any]]) -> list[str]:
    """Sizes with hot experts."""
    lines, stages = [], []
    for one in results:
        size, tokens = "{} × {} × {}".format(*one["size"]), RANKS * one["size"][0]
        replicas = float(np.mean(one["replicas"]))
        speeds = [[tokens / seconds for seconds in one["steps"][name]] for name in ("plain", "balanced")]
        gain = np.median(np.divide(one["steps"]["plain"], one["steps"]["balanced"])) - 1
        lines.append(
            [
                size,
                f"{np.mean(one['home']):.3f}",
                f"{np.mean(one['split']):.3f}",
                f"{replicas:.1f}",
                f"{replicas * one['expert_bytes'] / 1e6:.2f}",
                *(spread(speed, 1.0, ".0f") for speed in speeds),
                f"{gain:+.1%}",
            ]
        )
        stages.append([size, *(f"{1e3 * one['stages'].get(stage, 0.0):.2f}" for stage in STAGES)])
    names = ["tokens × dim × ffn", "imbalance", "with replicas", "replicas", "MB"]
    return [
        "## Uneven counts",
        "Two layers, one after the other. Imbalance is busiest GPU / mean GPU; `replicas` and `MB` are those of one "
        "push of one layer. Only the first layer is pushed again, as the backward of the second one comes at once. The "
        "gradients that come home are as many bytes. Tokens/s are those of both ranks through both layers.",
        markdown([*names, "tokens/s without", "tokens/s with", "gain"], lines),
        "Milliseconds of the host in each stage, for a layer and step, mean over layers, steps and ranks; waiting for "
        "the other rank is part of them:",
        markdown(["tokens × dim × ffn", *STAGES], stages),
    ]


def host_part(results: list[tuple[int, int, dict[str, float]]]) -> list[str]:
    """Host time by the size of the group."""
    names = ("plain", "even", "replicas")
    lines = [
        [f"{gpus} × {slots}", *(f"{1e6 * seconds[name]:.0f}" for name in names)] for gpus, slots, seconds in results
    ]
    return [
        "## Host time of `dispatch` in larger groups",
        f"One process, no communication, {TOKENS} tokens with 2 experts each: µs until split sizes are known. `plain` "
        "counts and copies, as a plain dispatcher does around its exchange; `even` is a step in which no replica pays.",
        markdown(["GPUs × experts", *names], lines),
    ]


def spread(values: Any, scale: float, form: str) -> str:
    """Median and quartiles."""
    low, middle, high = (format(scale * float(np.quantile(values, q)), form) for q in (0.25, 0.5, 0.75))
    return f"{middle} [{low}, {high}]"


if __name__ == "__main__":
    main()
