"""Whether moving experts changes the training: rebalanced against static runs, compared with static against static.

    torchrun --standalone --nproc-per-node 2 -m benchmarks.train.bench_loss_curves --output DATE-loss-curves.md

In float32 a different order of additions gives a different run: differences in the last bit grow until two losses
differ in the second digit, so no run is "the" loss curve. Static runs that differ only in the order of additions (A/A)
show how far apart two curves of the same training are; a run whose experts move (A/B) must not be further away. A
control whose moments stay behind when experts move shows that the comparison would notice an error.
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
SMOOTH = 100  # iterations averaged for each point of a smoothed curve
LAST = 300  # iterations averaged for a final loss

Order = Callable[[torch.Tensor], torch.Tensor]  # permutes the sequences of a global batch
# Permuting a batch only changes the order in which its mean is summed: within each rank if its half is reversed, and
# between ranks if the halves are swapped.
STATIC: dict[str, Order] = {
    "static": lambda crops: crops,
    "static, reversed": lambda crops: crops.unflatten(0, (-1, BATCH)).flip(1).flatten(0, 1),
    "static, halves swapped": lambda crops: crops.roll(BATCH, 0),
}
REBALANCED, CONTROL = "rebalanced", "rebalanced, moments left behind"
RUNS = [*STATIC, REBALANCED, CONTROL]
TEXT = (
    "Loss curves of the model of examples/moe_model.py in float32 on two ranks over gloo. All runs of a seed have the "
    "same initial weights and the same batches; static runs differ in the order of the sequences of each batch, which "
    "only changes the order of additions. Figures are differences of losses, smoothed over "
    f"{SMOOTH} iterations; a final loss is the mean over the last {LAST}; the band is the widest A/A difference of "
    "each iteration, in either direction. The load of the machine has no influence."
)
JUDGED = (
    "If moving experts does not change the training, a run whose experts move is no further from the static runs than "
    "they are from each other, and it is chance which run of a seed is furthest from the mean of the others. The "
    "statistic is that distance (largest smoothed difference over the iterations), summed over the seeds; p is the "
    "share of all ways to pick one run of each seed that give at least this sum. `within` means p > 0.05; that only "
    "means something if the control is `told apart`."
)


def main() -> None:
    """Train, compare, print, and write the result to --output if given."""
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
    """Train one run; return the mean loss over ranks by iteration `[I]`, and the slots moved."""
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
    """Both AdamW moments of every parameter."""
    return [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]


def rebalancer_of(
    model: nn.Module, optimizer: torch.optim.Optimizer, every: int, seed: int, moved: list[int]
) -> distplb.Rebalancer:
    """Build a rebalancer as in examples/pretrain_moe.py, but independent of timing: no time curve and no stop-loss.

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
    """Moving mean over SMOOTH iterations, along the last dim: `[..., I]` -> `[..., I - SMOOTH + 1]`."""
    total = np.concatenate([np.zeros((*losses.shape[:-1], 1)), losses.cumsum(-1)], -1)
    return (total[..., SMOOTH:] - total[..., :-SMOOTH]) / SMOOTH


def oddness(curves: np.ndarray) -> np.ndarray:
    """`[S, R]`: the largest distance of each run from the mean of the seed's other runs, for curves `[S, R, I]`."""
    others = (curves.sum(1, keepdims=True) - curves) / (curves.shape[1] - 1)
    return np.abs(curves - others).max(-1)


def chance(odd: np.ndarray, run: int) -> float:
    """The share of all ways to pick one run of each seed whose sum of `odd [S, R]` is at least that of `run`."""
    sums = np.array([sum(pick) for pick in itertools.product(*odd)])
    return float((sums >= odd[:, run].sum() * (1 - 1e-12)).mean())


def against_static(curves: np.ndarray, run: int) -> np.ndarray:
    """`[S, N, I]`: a run minus each static run; for a static `run`, the differences of all pairs of static runs."""
    number = len(STATIC)
    if run < number:
        return np.stack([curves[:, i] - curves[:, j] for i, j in itertools.combinations(range(number), 2)], 1)
    return np.stack([curves[:, run] - curves[:, i] for i in range(number)], 1)


def reported(losses: np.ndarray, moved: np.ndarray, options: argparse.Namespace) -> str:
    """Return the whole report, from losses `[S, R, I]` and slots moved `[S, R]`."""
    arguments = {"--seeds": options.seeds, "--iterations": options.iterations, "--every": options.every}
    command = command_line("train.bench_loss_curves", arguments, ranks=2)
    parts = [
        header("Rebalanced against static, compared with static against static", TEXT, command, "cpu"),
        f"{options.seeds} seeds, {options.iterations:,} iterations, a rebalance every {options.every}; MoE layers: "
        f"{CONFIG.layers}, {CONFIG.experts} experts, top-{CONFIG.top_k}; {2 * BATCH * LENGTH} bytes per iteration.",
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
    """Table of differences over all seeds: largest, root mean square, share in the A/A band, and final losses."""
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
    """Table that compares the rebalanced run and the control with the static runs."""
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
    """Table with one row per run."""
    final = losses[..., -LAST:].mean(-1)
    lines = [[run, *(f"{x:.4f}" for x in final[:, nth]), str(moved[:, nth].sum())] for nth, run in enumerate(RUNS)]
    return markdown(["run", *(f"seed {seed}" for seed in range(len(final))), "slots moved"], lines)


def parsed_options() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description="Loss curves of rebalanced and static runs.")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--iterations", type=int, default=3000)
    parser.add_argument("--every", type=int, default=100, help="iterations between rebalances")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the result there, as markdown and figure")
    options = parser.parse_args()
    if options.iterations < LAST:
        parser.error(f"--iterations {options.iterations} must be at least {LAST}")
    if int(os.environ.get("WORLD_SIZE", "1")) != 2:
        parser.error("start this benchmark with torchrun --nproc-per-node 2")
    return options


if __name__ == "__main__":
    main()
