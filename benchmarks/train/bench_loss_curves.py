"""Whether experts that move change the training: rebalanced runs against static ones, beside static against static.

    torchrun --standalone --nproc-per-node 2 -m benchmarks.train.bench_loss_curves --output DATE-loss-curves.md

In float32 another order of additions is another run: differences of the last bit grow until two losses differ in the
second digit, and no run is "the" loss curve. So static runs that differ in the order of additions alone (A/A) show how
far apart two curves of the same training lie, and a run whose experts move (A/B) must not lie further away. A control
whose moments stay behind when experts move shows that the comparison would notice an error.
Shapes: S seeds, R runs, I iterations, B sequences of one rank.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

import distplb
from benchmarks.figures import loss_curves as figure
from benchmarks.shared.processes import outside
from benchmarks.shared.tables import command_line, header, markdown, publish
from distplb.comm.torchdist import TorchComm

moe_model, pretrain_moe, texts = (outside("examples", name) for name in ("moe_model", "pretrain_moe", "texts"))

BATCH, LENGTH = 8, 32  # sequences of one rank, and bytes of each
CONFIG = moe_model.Config(layers=1, experts=8, top_k=2, dim=32, ffn=64, heads=2, max_sequence=LENGTH)
LEARNING_RATE = 1e-3
SMOOTH = 100  # iterations that a point of a smoothed curve is the mean of
LAST = 300  # iterations that a final loss is the mean of

Order = Callable[[torch.Tensor], torch.Tensor]  # of a global batch's sequences
# The mean over a batch is the same in any order of its sequences, but for the order in which it is added up: within a
# rank where they are reversed in each rank's half, between ranks too where the halves change places.
STATIC: dict[str, Order] = {
    "static": lambda crops: crops,
    "static, reversed": lambda crops: crops.unflatten(0, (-1, BATCH)).flip(1).flatten(0, 1),
    "static, halves swapped": lambda crops: crops.roll(BATCH, 0),
}
REBALANCED, CONTROL = "rebalanced", "rebalanced, moments left behind"
RUNS = [*STATIC, REBALANCED, CONTROL]
TEXT = (
    "Loss curves of the model of examples/moe_model.py in float32 on two ranks over gloo. All runs of a seed have the "
    "same initial weights and the same batches; static ones differ in the order of the sequences of each batch, which "
    "is an order of additions and nothing else. Figures are differences of losses, smoothed over "
    f"{SMOOTH} iterations; a final loss is the mean over the last {LAST}; the band is the widest A/A difference of "
    "each iteration, in either direction. How busy the machine was has no influence."
)
JUDGED = (
    "How it is judged: if a run whose experts move is one more run of the same training, it lies no further from the "
    "static runs than they lie from each other, and which of the runs of a seed is furthest from the mean of the "
    "others is chance. The statistic is that distance (largest smoothed difference over the iterations), added up "
    "over the seeds; p is the share of all ways to call one run of each seed the odd one that give at least as much. "
    "Within is p > 0.05; the control has to be told apart for that to mean anything."
)


def main() -> None:
    """Train, compare, print, and write where that is asked for."""
    options = parsed_options()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    text = texts.code()
    losses = np.empty((options.seeds, len(RUNS), options.iterations))
    moved = np.zeros((options.seeds, len(RUNS)), dtype=int)
    for seed, (nth, run) in itertools.product(range(options.seeds), enumerate(RUNS)):
        losses[seed, nth], moved[seed, nth] = trained(run, seed, text, options.iterations, options.every)
        if dist.get_rank() == 0:
            print(f"seed {seed}, {run}: final loss {losses[seed, nth, -LAST:].mean():.4f}", file=sys.stderr, flush=True)
    if dist.get_rank() == 0:
        report = reported(losses, moved, options)
        publish(report, options.output)
        if options.output:
            figure.draw(smoothed(losses), RUNS, len(STATIC), SMOOTH, options.output.with_suffix(".png"))
    dist.destroy_process_group()


def trained(run: str, seed: int, text: torch.Tensor, iterations: int, every: int) -> tuple[np.ndarray, int]:
    """The loss of each iteration `[I]`, mean over ranks, and how many slots were moved."""
    model = moe_model.Transformer(CONFIG, dist.group.WORLD, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
    moved: list[int] = []
    rebalancer = None if run in STATIC else rebalancer_of(model, optimizer, every, seed, moved)
    order = STATIC.get(run, STATIC["static"])
    mine = slice(dist.get_rank() * BATCH, (dist.get_rank() + 1) * BATCH)
    losses = torch.empty(iterations, dtype=torch.float64)
    for iteration in range(iterations):
        crops = order(pretrain_moe.global_batch(text, seed, iteration, BATCH * dist.get_world_size(), LENGTH + 1))[mine]
        loss = model(crops[:, :-1], crops[:, 1:])
        model.backward(loss)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        left_behind = moments_of(optimizer) if run == CONTROL else []
        copies = [moment.clone() for moment in left_behind]
        if rebalancer is not None:
            rebalancer.step()
        for moment, copy in zip(left_behind, copies, strict=True):
            moment.copy_(copy)
        losses[iteration] = loss.item()
    dist.all_reduce(losses)
    return losses.numpy() / dist.get_world_size(), sum(moved)


def moments_of(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """Both moments of every parameter, as AdamW keeps them."""
    return [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]


def rebalancer_of(
    model: nn.Module, optimizer: torch.optim.Optimizer, every: int, seed: int, moved: list[int]
) -> distplb.Rebalancer:
    """As in examples/pretrain_moe.py, but without anything that is measured: no time curve, and no stop-loss.

    Args:
        moved: receives the slots that each rebalance moves.
    """
    moes = model.moes
    window = distplb.LoadWindow(len(moes), CONFIG.experts, every)
    layers = []
    for index, moe in enumerate(moes):
        moe.on_counts = lambda counts, index=index: window.add(index, counts)
        layers.append(
            distplb.MoELayer(
                name=f"blocks.{index}.moe",
                experts={"w_in": moe.w_in, "w_out": moe.w_out},
                router={"weight": moe.router.weight, "expert_bias": moe.expert_bias},
            )
        )
    return distplb.Rebalancer(
        layers,
        optimizer,
        topology=distplb.Topology(1, dist.get_world_size()),
        comm=TorchComm(),
        window=window,
        every=every,
        search=distplb.Search(seed=seed),
        moves=distplb.Moves(model=distplb.MoveModel(1.0, 1, 1e12, 1e12), stop_loss=0),
        record=distplb.Record(
            on_event=lambda event: moved.append(event.slots_moved) if event.imbalance_next is None else None
        ),
    )


# --- comparison -------------------------------------------------------------------------------------------------


def smoothed(losses: np.ndarray) -> np.ndarray:
    """Moving means over SMOOTH iterations, along the last dim: `[..., I]` -> `[..., I - SMOOTH + 1]`."""
    total = np.concatenate([np.zeros((*losses.shape[:-1], 1)), losses.cumsum(-1)], -1)
    return (total[..., SMOOTH:] - total[..., :-SMOOTH]) / SMOOTH


def oddness(curves: np.ndarray) -> np.ndarray:
    """`[S, R]`: how far each run is from the mean of the seed's others, at most; of curves `[S, R, I]`."""
    others = (curves.sum(1, keepdims=True) - curves) / (curves.shape[1] - 1)
    return np.abs(curves - others).max(-1)


def chance(odd: np.ndarray, run: int) -> float:
    """The share of all ways to pick one run of each seed whose sum of `[S, R]` is at least that of `run`."""
    sums = np.array([sum(pick) for pick in itertools.product(*odd)])
    return float((sums >= odd[:, run].sum() * (1 - 1e-12)).mean())


def against_static(curves: np.ndarray, run: int) -> np.ndarray:
    """`[S, N, I]`: a run less each static one, or of a static one the differences of all pairs of static runs."""
    number = len(STATIC)
    if run < number:
        return np.stack([curves[:, i] - curves[:, j] for i, j in itertools.combinations(range(number), 2)], 1)
    return np.stack([curves[:, run] - curves[:, i] for i in range(number)], 1)


def reported(losses: np.ndarray, moved: np.ndarray, options: argparse.Namespace) -> str:
    """The whole result; losses `[S, R, I]`, slots moved `[S, R]`."""
    arguments = {"--seeds": options.seeds, "--iterations": options.iterations, "--every": options.every}
    command = command_line("train.bench_loss_curves", arguments, ranks=2)
    parts = [
        header("Rebalanced against static, beside static against static", TEXT, command, "cpu"),
        f"{options.seeds} seeds, {options.iterations:,} iterations, a rebalance every {options.every}; MoE layers: "
        f"{CONFIG.layers}, {CONFIG.experts} experts, top-{CONFIG.top_k}; {2 * BATCH * LENGTH} bytes an iteration.",
    ]
    if options.output:
        path = options.output.with_suffix(".png")
        parts.append(f"![Differences of smoothed losses, and the curves]({path.name})")
    parts += [
        f"## How far apart\n\n{differences(losses)}",
        f"## Verdict\n\n{textwrap.fill(JUDGED, 110)}\n\n{verdict(losses)}",
    ]
    parts.append(f"## Final losses, and slots moved\n\n{finals(losses, moved)}")
    return "\n\n".join(parts)


def differences(losses: np.ndarray) -> str:
    """Over all seeds: the largest, the root of the mean square, what lies in the band of A/A, and final losses."""
    lines = []
    names = [("static less static (A/A)", 0), *((f"{name} less static", RUNS.index(name)) for name in RUNS[-2:])]
    band = np.abs(against_static(smoothed(losses), 0)).max((0, 1))  # [I]
    for what, run in names:
        curves = against_static(smoothed(losses), run)
        inside = (np.abs(curves) <= band).mean()
        final = against_static(losses[..., -LAST:], run).mean(-1)
        figures = np.abs(curves).max(), np.sqrt((curves**2).mean()), np.abs(final).max(), np.sqrt((final**2).mean())
        numbers = [f"{value:.4f}" for value in figures]
        lines.append([what, str(curves.shape[0] * curves.shape[1]), *numbers[:2], f"{inside:.1%}", *numbers[2:]])
    return markdown(["difference", "curves", "largest", "rms", "in the band", "final, largest", "final, rms"], lines)


def verdict(losses: np.ndarray) -> str:
    """Rebalanced and control, each beside the static runs."""
    lines = []
    for name in (REBALANCED, CONTROL):
        own = [*range(len(STATIC)), RUNS.index(name)]
        odd = oddness(smoothed(losses[:, own]))
        p = chance(odd, len(STATIC))
        furthest = int((odd.argmax(1) == len(STATIC)).sum())
        distances = f"{odd[:, -1].mean():.4f}", f"{odd[:, :-1].mean():.4f}"
        lines.append(
            [name, *distances, f"{furthest} of {len(odd)}", f"{p:.3f}", "within" if p > 0.05 else "told apart"]
        )
    return markdown(["run", "its distance", "a static run's", "furthest of its seed", "p", "verdict"], lines)


def finals(losses: np.ndarray, moved: np.ndarray) -> str:
    """A row for each run."""
    final = losses[..., -LAST:].mean(-1)
    lines = [[run, *(f"{x:.4f}" for x in final[:, nth]), str(moved[:, nth].sum())] for nth, run in enumerate(RUNS)]
    return markdown(["run", *(f"seed {seed}" for seed in range(len(final))), "slots moved"], lines)


def parsed_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Loss curves of rebalanced and static runs.")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--iterations", type=int, default=3000)
    parser.add_argument("--every", type=int, default=100, help="iterations between rebalances")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the result there, as markdown, and a figure")
    options = parser.parse_args()
    if options.iterations < LAST:
        parser.error(f"--iterations {options.iterations} must be at least {LAST}")
    if int(os.environ.get("WORLD_SIZE", "1")) != 2:
        parser.error("start it with torchrun --nproc-per-node 2")
    return options


if __name__ == "__main__":
    main()
