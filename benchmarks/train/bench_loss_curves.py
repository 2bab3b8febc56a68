"""Whether moving homes and lending replicas change the training, compared with static runs among each other.

    torchrun --standalone --nproc-per-node 2 -m benchmarks.train.bench_loss_curves --output DATE-loss-curves.md

In float32 a different order of additions gives a different run: differences in the last bit grow until two losses
differ in the second digit, so no run is "the" loss curve. Static runs that differ only in the order of additions (A/A)
show how far apart two curves of the same training are; a run that is rebalanced, replicated or both (A/B) must not be
further away. Controls, each with the effect of one bug, show which errors the comparison would notice.
Shapes: S seeds, R runs, I iterations (one step each), L layers, E experts, M ranks, B sequences of one rank.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

import distplb
from benchmarks.figures import loss_curves as figure
from benchmarks.shared.processes import outside
from benchmarks.shared.tables import command_line, header, markdown, publish
from benchmarks.train.judgement import LEVEL, chance, judged, oddness
from distplb.comm.torchdist import TorchComm
from distplb.replicas.step_balancer import Dispatch

moe_model, pretrain_moe, texts = (outside("examples", name) for name in ("moe_model", "pretrain_moe", "texts"))

BATCH, LENGTH = 8, 32  # sequences of one rank, and bytes of each
CONFIG = moe_model.Config(layers=1, experts=8, top_k=2, dim=32, ffn=64, heads=2, max_sequence=LENGTH)
REPLICA_SLOTS = 2
LEARNING_RATE = 1e-3
SMOOTH = 100  # iterations averaged for each point of a smoothed curve
LAST = 300  # iterations averaged for a final loss

Order = Callable[[torch.Tensor], torch.Tensor]  # permutes the sequences of a global batch


class GradientsLeftBehind(distplb.StepBalancer):
    """A bug: replicas compute their tokens, but their gradients stay where they are instead of coming home."""

    def compute(self, step: Dispatch, experts: Callable, rows: torch.Tensor, *home_rows: torch.Tensor) -> torch.Tensor:
        """As the balancer's, except that nothing flows back into a replica."""

        def run(rows: torch.Tensor, own: Sequence[torch.Tensor], replicas: Sequence[torch.Tensor]) -> torch.Tensor:
            return experts(rows, own, [weight.detach() for weight in replicas])

        return super().compute(step, run, rows, *home_rows)


class WeightsTooLate(distplb.StepBalancer):
    """A bug: replicas compute before the push has arrived, with what their slots held in the step before."""

    held: Sequence[torch.Tensor] | None = None  # [R, ...] of each weight

    def compute(self, step: Dispatch, experts: Callable, rows: torch.Tensor, *home_rows: torch.Tensor) -> torch.Tensor:
        """As the balancer's, except that replicas have the values of the last push; gradients come home as always."""

        def run(rows: torch.Tensor, own: Sequence[torch.Tensor], replicas: Sequence[torch.Tensor]) -> torch.Tensor:
            if step.is_trivial:
                return experts(rows, own, replicas)
            arrived = [weight.detach().clone() for weight in replicas]
            late, self.held = self.held or arrived, arrived
            return experts(rows, own, [OtherValues.apply(*pair) for pair in zip(replicas, late, strict=True)])

        return super().compute(step, run, rows, *home_rows)


class OtherValues(torch.autograd.Function):
    """The second tensor's values, with the gradient of the first."""

    @staticmethod
    def forward(ctx: object, weight: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Return the values."""
        return values.clone()

    @staticmethod
    def backward(ctx: object, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Hand the gradient on to the weight."""
        return gradient, None


@dataclass(frozen=True)
class Run:
    """How one run is trained.

    Args:
        order: of the sequences of each batch.
        rebalances: whether homes move.
        balancer: what lends replicas; None for no replicas.
        leaves_moments: whether AdamW's moments stay behind when homes move, which is a bug.
    """

    order: Order = lambda crops: crops
    rebalances: bool = False
    balancer: type[distplb.StepBalancer] | None = None
    leaves_moments: bool = False


# Permuting a batch only changes the order in which its mean is summed: within each rank if its half is reversed, and
# between ranks if the halves are swapped.
STATIC = {
    "static": Run(),
    "static, reversed": Run(lambda crops: crops.unflatten(0, (-1, BATCH)).flip(1).flatten(0, 1)),
    "static, halves swapped": Run(lambda crops: crops.roll(BATCH, 0)),
}
TESTED = {
    "rebalanced": Run(rebalances=True),
    "replicated": Run(balancer=distplb.StepBalancer),
    "both": Run(rebalances=True, balancer=distplb.StepBalancer),
}
CONTROLS = {
    "rebalanced, moments left behind": Run(rebalances=True, leaves_moments=True),
    "replicated, gradients left behind": Run(balancer=GradientsLeftBehind),
    "replicated, weights too late": Run(balancer=WeightsTooLate),
}
RUNS = STATIC | TESTED | CONTROLS


TEXT = (
    "Loss curves of the model of examples/moe_model.py in float32 on two ranks over gloo. All runs of a seed have the "
    "same initial weights and the same batches; static runs differ in the order of the sequences of each batch, which "
    "only changes the order of additions. Figures are differences of losses, smoothed over "
    f"{SMOOTH} iterations; a final loss is the mean over the last {LAST}; the band is the widest A/A difference of "
    "each iteration, in either direction. The load of the machine has no influence."
)
JUDGED = (
    "Each run is compared with the static runs alone. If it trains as they do, it is no further from them than they "
    "are from each other, and it is chance which run of a seed is furthest from the mean of the others. The "
    "statistic is that distance (largest smoothed difference over the iterations), summed over the seeds; p is the "
    f"share of all ways to pick one run of each seed that give at least this sum. `within` means p > {LEVEL}; that "
    "only means something if controls are `told apart`. All other runs have the order of `static`, and may stay closer "
    "to it than the two other orders do; that makes `within` a little likelier than it should be. The tested runs are "
    "not independent of each other: `both` is `replicated` until the first rebalance."
)
FAULTS = (
    "`moments left behind`: when homes move, AdamW's moments stay in their slots. `gradients left behind`: replicas "
    "compute their tokens, but their gradients are not brought home. `weights too late`: replicas compute before the "
    "push has arrived, in forward and backward, with what their slots held in the step before: the expert's weights "
    "of one step ago, or another expert's."
)
LENT = (
    "A step is one forward and backward of one layer. Imbalance is busiest GPU / mean GPU, in tokens: before, if "
    "every token were computed at home; after, where tokens were computed. Means over the steps of all seeds."
)


@dataclass(frozen=True)
class Trained:
    """What was seen of one run; `stacked`, of many, with more dims in front.

    Args:
        losses: `[I]`, means over ranks.
        moved: `[]`, slots that rebalances moved.
        replicas: `[I, L]`, replicas lent.
        before: `[I, L]`, imbalance if every token were computed at home.
        after: `[I, L]`, imbalance of the tokens that GPUs computed.
    """

    losses: np.ndarray
    moved: np.ndarray
    replicas: np.ndarray
    before: np.ndarray
    after: np.ndarray

    @classmethod
    def stacked(cls, many: Sequence[Trained]) -> Trained:
        """One value whose arrays have a new first dim."""
        return cls(**{field.name: np.stack([getattr(one, field.name) for one in many]) for field in fields(cls)})


def main() -> None:
    """Train, compare, print, and write the result to --output if given."""
    options = parsed_options()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    text, seeds = texts.code(), list[Trained]()
    for seed in range(options.seeds):
        runs = list[Trained]()
        for name, run in RUNS.items():
            runs.append(trained(run, seed, text, options.iterations, options.every))
            if dist.get_rank() == 0:
                final = runs[-1].losses[-LAST:].mean()
                print(f"seed {seed}, {name}: final loss {final:.4f}", file=sys.stderr, flush=True)
        seeds.append(Trained.stacked(runs))
        if dist.get_rank() == 0 and options.curves:
            np.savez_compressed(options.curves, names=np.array(list(RUNS)), **asdict(Trained.stacked(seeds)))
    if dist.get_rank() == 0:
        seen = Trained.stacked(seeds)
        publish(reported(seen, options), options.output)
        if options.output:
            picture = options.output.with_suffix(".png")
            figure.draw(smoothed(seen.losses), list(RUNS), len(STATIC), len(TESTED), SMOOTH, picture)
    dist.destroy_process_group()


def trained(run: Run, seed: int, text: torch.Tensor, iterations: int, every: int) -> Trained:
    """Train one run on all ranks."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    balancer = balancer_of(run.balancer) if run.balancer else None
    model = moe_model.Transformer(CONFIG, dist.group.WORLD, seed, balancer=balancer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
    moved: list[int] = []
    rebalancer = rebalancer_of(model, optimizer, every, seed, moved) if run.rebalances else None
    losses = torch.empty(iterations, dtype=torch.float64)
    counts = torch.zeros(iterations, CONFIG.layers, CONFIG.experts, dtype=torch.int64)  # [I, L, E]
    computed = torch.zeros(iterations, CONFIG.layers, ranks, dtype=torch.int64)  # [I, L, M], this rank's until summed
    replicas = torch.zeros(iterations, CONFIG.layers, dtype=torch.int64)
    for iteration in range(iterations):
        crops = pretrain_moe.global_batch(text, seed, iteration, BATCH * ranks, LENGTH + 1)
        mine = run.order(crops)[rank * BATCH : (rank + 1) * BATCH]
        loss = model(mine[:, :-1], mine[:, 1:])
        for layer, moe in enumerate(model.moes):
            counts[iteration, layer], computed[iteration, layer, rank] = moe.counts, moe.tokens_received
            replicas[iteration, layer] = moe.num_replicas
        model.backward(loss)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        left_behind = moments_of(optimizer) if run.leaves_moments else []
        copies = [moment.clone() for moment in left_behind]
        if rebalancer is not None:
            rebalancer.step()
        for moment, copy in zip(left_behind, copies, strict=True):
            moment.copy_(copy)
        losses[iteration] = loss.item()
    for own in (losses, counts, computed):
        dist.all_reduce(own)
    at_home = counts.unflatten(-1, (ranks, -1)).sum(-1)  # [I, L, M]
    return Trained(
        losses.numpy() / ranks,
        np.array(sum(moved)),
        replicas.numpy(),
        imbalance(at_home.numpy()),
        imbalance(computed.numpy()),
    )


def imbalance(tokens: np.ndarray) -> np.ndarray:
    """Busiest GPU / mean GPU: `[..., M]` -> `[...]`."""
    return tokens.max(-1) / tokens.mean(-1)


def balancer_of(kind: type[distplb.StepBalancer]) -> distplb.StepBalancer:
    """Build a step balancer as in examples/pretrain_moe.py."""
    topology = distplb.Topology(1, dist.get_world_size())
    return kind(dist.group.WORLD, topology=topology, num_experts=CONFIG.experts, replica_slots=REPLICA_SLOTS)


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


def against_static(curves: np.ndarray, run: int) -> np.ndarray:
    """`[S, N, I]`: a run minus each static run; for a static `run`, the differences of all pairs of static runs."""
    number = len(STATIC)
    if run < number:
        return np.stack([curves[:, i] - curves[:, j] for i, j in itertools.combinations(range(number), 2)], 1)
    return np.stack([curves[:, run] - curves[:, i] for i in range(number)], 1)


def reported(seen: Trained, options: argparse.Namespace) -> str:
    """Return the whole report, from what was seen of S seeds and R runs."""
    arguments = {"--seeds": options.seeds, "--iterations": options.iterations, "--every": options.every}
    command = command_line("train.bench_loss_curves", arguments, ranks=2)
    parts = [
        header("Rebalanced and replicated against static, compared with static against static", TEXT, command, "cpu"),
        f"{options.seeds} seeds, {options.iterations:,} iterations of one step, a rebalance every {options.every}; MoE "
        f"layers: {CONFIG.layers}, {CONFIG.experts} experts, top-{CONFIG.top_k}; at most {REPLICA_SLOTS} replicas on a "
        f"rank; {2 * BATCH * LENGTH} bytes per iteration.",
    ]
    if options.output:
        path = options.output.with_suffix(".png")
        parts.append(f"![Differences of smoothed losses, and the curves]({path.name})")
    parts += [
        f"## How far apart\n\n{differences(seen.losses)}",
        f"## Verdict\n\n{filled(judged_how(options.seeds))}\n\n{verdict(seen.losses)}",
        f"## Controls\n\n{filled(FAULTS)}",
        f"## Replicas and imbalance\n\n{filled(LENT)}\n\n{balance(seen)}",
        f"## Final losses, and slots moved\n\n{finals(seen.losses, seen.moved)}",
    ]
    return "\n\n".join(parts)


def filled(text: str) -> str:
    """Break a paragraph into lines as the header does."""
    return textwrap.fill(text, 110)


def judged_how(seeds: int) -> str:
    """Explain the verdict, and what p it can have."""
    runs = len(STATIC) + 1
    picks = runs**seeds
    called = int(LEVEL * picks)
    attainable = (
        f"With {runs} runs of each of {seeds} seeds there are {picks} picks, so p is at least {1 / picks:.3f}: "
        + (
            f"a run that is no different is told apart with a probability of at most {called / picks:.3f}, at least "
            f"one of {len(TESTED)} such runs with at most {len(TESTED) * called / picks:.2f}; p is not corrected for "
            "that."
            if called
            else "too much to tell anything apart."
        )
    )
    return f"{JUDGED} {attainable}"


def differences(losses: np.ndarray) -> str:
    """Table of differences over all seeds: largest, root mean square, share in the A/A band, and final losses."""
    lines = []
    others = [(f"{name} less static", nth) for nth, name in enumerate(RUNS) if name not in STATIC]
    band = np.abs(against_static(smoothed(losses), 0)).max((0, 1))  # [I]
    for what, run in [("static less static (A/A)", 0), *others]:
        curves = against_static(smoothed(losses), run)
        inside = (np.abs(curves) <= band).mean()
        final = against_static(losses[..., -LAST:], run).mean(-1)
        figures = np.abs(curves).max(), np.sqrt((curves**2).mean()), np.abs(final).max(), np.sqrt((final**2).mean())
        numbers = [f"{value:.4f}" for value in figures]
        lines.append([what, str(curves.shape[0] * curves.shape[1]), *numbers[:2], f"{inside:.1%}", *numbers[2:]])
    return markdown(["difference", "curves", "largest", "rms", "in the band", "final, largest", "final, rms"], lines)


def verdict(losses: np.ndarray) -> str:
    """Table that compares each other run with the static runs, one at a time."""
    lines = []
    for name in TESTED | CONTROLS:
        own = [*range(len(STATIC)), list(RUNS).index(name)]
        odd = oddness(smoothed(losses[:, own]))
        furthest = int((odd.argmax(1) == len(STATIC)).sum())
        distances = f"{odd[:, -1].mean():.4f}", f"{odd[:, :-1].mean():.4f}"
        what = f"{name} (control)" if name in CONTROLS else name
        p = f"{chance(odd, len(STATIC)):.3f}"
        lines.append([what, *distances, f"{furthest} of {len(odd)}", p, judged(odd, len(STATIC))])
    return markdown(["run", "its distance", "a static run's", "furthest of its seed", "p", "verdict"], lines)


def balance(seen: Trained) -> str:
    """Table with the replicas and the imbalance of each run, over all seeds, steps and layers."""
    lines = []
    for nth, name in enumerate(RUNS):
        replicas, before, after = (values[:, nth] for values in (seen.replicas, seen.before, seen.after))  # [S, I, L]
        steps = f"{(replicas > 0).sum():,} of {replicas.size:,}"
        means = f"{replicas.mean():.2f}", f"{before.mean():.3f}", f"{after.mean():.3f}", f"{after.max():.3f}"
        lines.append([name, steps, f"{(replicas > 0).mean():.1%}", *means])
    return markdown(
        ["run", "steps with replicas", "share", "replicas per step", "imbalance before", "after", "after, worst"], lines
    )


def finals(losses: np.ndarray, moved: np.ndarray) -> str:
    """Table with one row per run."""
    final = losses[..., -LAST:].mean(-1)
    lines = [[run, *(f"{x:.4f}" for x in final[:, nth]), str(moved[:, nth].sum())] for nth, run in enumerate(RUNS)]
    return markdown(["run", *(f"seed {seed}" for seed in range(len(final))), "slots moved"], lines)


def parsed_options() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description="Loss curves of rebalanced, replicated and static runs.")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--iterations", type=int, default=3000)
    parser.add_argument("--every", type=int, default=100, help="iterations between rebalances")
    parser.add_argument("--curves", type=Path, metavar="FILE", help="write what was seen of each run there, as .npz")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the result there, as markdown and figure")
    options = parser.parse_args()
    if options.iterations < LAST:
        parser.error(f"--iterations {options.iterations} must be at least {LAST}")
    if int(os.environ.get("WORLD_SIZE", "1")) != 2:
        parser.error("start this benchmark with torchrun --nproc-per-node 2")
    return options


if __name__ == "__main__":
    main()
