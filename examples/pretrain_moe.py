"""Pretrain a small mixture-of-experts model on real text; rebalance its experts, and lend replicas of hot ones.

    torchrun --standalone --nproc-per-node 2 examples/pretrain_moe.py --compare
    torchrun --standalone --nproc-per-node 2 examples/pretrain_moe.py --router plain --balance both
    torchrun --standalone --nproc-per-node 2 examples/pretrain_moe.py --workload rotating --balance replicated
    torchrun --standalone --nproc-per-node 2 examples/pretrain_moe.py --balance spread  # moves over several iterations
    python examples/pretrain_moe.py --balance static --data ~/my_text
    python examples/pretrain_moe.py --text code --switch-at 61  # prose from iteration 61
    python examples/pretrain_moe.py --balance static --record trace.npz  # writes the loads, for distplb.replay
    torchrun --standalone --nproc-per-node 2 examples/pretrain_moe.py --report run  # also writes an HTML report

The text is the source or the manual of Python's standard library, which every machine has, or a folder of your own.
`--switch-at` changes from one to the other part-way, which shifts the loads. `--compare` trains ten models, {plain,
loss-free} x {static, rebalanced, replicated, both, forced}, in the same processes, which take turns of `--turn`
iterations so that other work on the machine slows all of them alike, and prints a table at the end. `Run` shows what
distplb needs from a training loop: for homes, a window that counts tokens, a list of layers, and one call after
`optimizer.step()`; for replicas, a `StepBalancer` that the MoE layers call. Given the time curve of an expert, distplb
balances seconds instead of tokens and makes only the moves that pay off.

Shapes: B batch of one rank, S sequence, I iterations, L layers, M GPUs (ranks), E experts, T micro-batches.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import texts
import torch
import torch.distributed as dist
from moe_model import Config, Group, Transformer
from torch import Tensor
from workloads import WORKLOADS, choice

import distplb
from distplb.comm.torchdist import TorchComm
from distplb.core.cost import mean_of_layers

ROUTERS = ("plain", "loss-free")
COMPARED = ("static", "rebalanced", "replicated", "both", "forced")
BALANCES = (*COMPARED, "spread")
BALANCE_HELP = (
    "rebalanced: homes move every --every iterations; replicated: replicas in every step; both; spread: rebalanced, "
    "moves spread over several iterations; forced: perfectly even routing, for reference"
)
TEXTS = {"code": texts.code, "prose": texts.prose}
SAMPLE_EVERY = 5  # steps; a real job has more of them and samples fewer
SPREAD = distplb.Spread(choose_after=1, share_after=2, move_seconds=0.05)
Table = dict[str, dict[str, dict[str, float]]]  # router, balance, figure


def main() -> None:
    args = parse_arguments()
    group, device = start(args.device)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    text = text_of_iterations(args)
    modes = [(r, b) for r in ROUTERS for b in COMPARED] if args.compare else [(args.router, args.balance)]
    say(describe(args, modes, world_size(group), text))
    runs = [Run(args, router, balance, group, device) for router, balance in modes]
    train(args, runs, text)
    table = summarise(runs)
    say(format_table(table, runs))
    if args.json and rank() == 0:
        Path(args.json).write_text(json.dumps(table, indent=2) + "\n")
    for run in runs:
        run.close()
    if args.report and rank() == 0:
        write_reports(runs)
    if group is not None:
        dist.destroy_process_group()


def train(args: argparse.Namespace, runs: list[Run], text: list[Tensor]) -> None:
    """Train every run for one turn, then for the next, and so on; a different run goes first each time."""
    started, done = time.perf_counter(), 0
    for turn, first in enumerate(range(0, args.iterations, args.turn)):
        last = min(first + args.turn, args.iterations)
        for i in range(len(runs)):
            run = runs[(turn + i) % len(runs)]
            run.train_turn(text, first, last)
            done += last - first
            if last % args.every == 0 or last == args.iterations:
                say(run.progress(last, warm_up=last <= args.every))
        seconds = (time.perf_counter() - started) * (len(runs) * args.iterations / done - 1)
        if last % args.every == 0 and seconds > 0:
            say(f"about {seconds / 60:.1f} minutes to go")


@dataclass(frozen=True)
class Measured:
    """Measurements of all ranks over I iterations."""

    seconds: Tensor  # [I], mean over ranks, rebalances excluded
    rebalance_seconds: Tensor  # [I], mean over ranks
    losses: Tensor  # [I], mean over ranks
    forward: Tensor  # [M, I, L] seconds in experts
    backward: Tensor  # [M, I, L] seconds in experts
    received: Tensor  # [M, I, T * L] tokens
    replicas: Tensor  # [I, T * L]

    @staticmethod
    def joined(parts: list[Measured]) -> Measured:
        """Concatenate the parts along I."""
        along = {"seconds": 0, "rebalance_seconds": 0, "losses": 0, "forward": 1, "backward": 1, "received": 1}
        return Measured(
            **{name: torch.cat([getattr(part, name) for part in parts], dim) for name, dim in along.items()},
            replicas=torch.cat([part.replicas for part in parts]),
        )


class Run:
    """One model in training, and its measurements."""

    def __init__(self, args: argparse.Namespace, router: str, balance: str, group: Group, device: torch.device) -> None:
        self.args, self.router, self.balance, self.group, self.device = args, router, balance, group, device
        rate = args.bias_rate if router == "loss-free" else 0.0
        config = Config(
            layers=args.layers,
            experts=args.experts,
            top_k=args.top_k,
            dim=args.dim,
            ffn=args.ffn,
            heads=args.heads,
            max_sequence=args.sequence,
            bias_rate=rate,
            forced=balance == "forced",
            recompute=args.recompute,
        )
        self.folder = Path(args.report) / f"{router}-{balance}" if args.report else None
        if self.folder is not None and rank() == 0:
            shutil.rmtree(self.folder, ignore_errors=True)  # from an earlier job, which this one does not continue
        self.steps: distplb.EventLog | None = None
        balancer = self.make_balancer() if self.is_replicated or args.report else None
        self.model = Transformer(config, group, args.seed, balancer=balancer).to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=args.lr, fused=True)
        self.recorded = tempfile.TemporaryDirectory() if args.record else None
        self.rebalancer = self.make_rebalancer() if self.is_rebalanced or args.record else None
        self.turns: list[Measured] = []

    @property
    def is_rebalanced(self) -> bool:
        return self.balance in ("rebalanced", "both", "spread")

    @property
    def is_replicated(self) -> bool:
        return self.balance in ("replicated", "both")

    def make_balancer(self) -> distplb.StepBalancer:
        """Lend replicas; in other models, which have one for --report, only measure steps."""
        if self.folder is not None and rank() == 0:
            self.steps = distplb.EventLog(self.folder / "steps.jsonl")
        return distplb.StepBalancer(
            self.group,
            topology=distplb.Topology(1, world_size(self.group)),
            num_experts=self.args.experts,
            replica_slots=self.args.replica_slots if self.is_replicated else 0,
            max_tokens_per_gpu=self.args.max_tokens_per_gpu,
            on_event=self.steps,
            sample_every=SAMPLE_EVERY,
        )

    def make_rebalancer(self) -> distplb.Rebalancer:
        moes = self.model.moes
        window = distplb.LoadWindow(len(moes), self.args.experts, self.args.every, device=self.device)
        layers = []
        for index, moe in enumerate(moes):
            moe.on_counts = lambda counts, index=index: window.add(index, counts)
            # Either the router's rows move with the experts, or the dispatcher looks up each expert's slot.
            router = {"weight": moe.router.weight, "expert_bias": moe.expert_bias}  # dim 0: E
            remap = self.args.apply == "remap"
            layers.append(
                distplb.MoELayer(
                    name=f"blocks.{index}.moe",
                    experts={"w_in": moe.w_in, "w_out": moe.w_out},  # dim 0: this rank's slots
                    router={} if remap else router,
                    slot_of_expert=moe.slot_of_expert if remap else None,
                )
            )
        return distplb.Rebalancer(
            layers,
            self.optimizer,
            topology=distplb.Topology(1, world_size(self.group)),
            comm=None if self.group is None else TorchComm(self.group),
            window=window,
            every=self.args.every,
            search=distplb.Search(seed=self.args.seed, time_curve=self.measure_curve()),
            moves=distplb.Moves(spread=SPREAD if self.balance == "spread" else None, dry_run=not self.is_rebalanced),
            record=distplb.Record(self.recorded.name if self.recorded else self.folder, on_event=report),
        )

    def measure_curve(self) -> distplb.TimeCurve:
        """Measure forward and backward of one expert at several numbers of tokens, up to twice the likely maximum."""
        most = 8 * self.args.top_k * self.tokens() // self.args.experts
        points = [most >> halvings for halvings in range(8) if most >> halvings]
        comm = None if self.group is None else TorchComm(self.group)
        return distplb.measured_curve(self.model.moes[0].run_one_expert, points, comm=comm)

    def close(self) -> None:
        """Write what is still to be written, and the recorded loads to one file, if requested."""
        if self.steps is not None:
            self.steps.close()
        if self.rebalancer is None:
            return
        self.rebalancer.close()
        if self.recorded is not None:
            if rank() == 0:
                trace = distplb.Trace.read(self.recorded.name)
                dataclasses.replace(trace, note=self.args.note).save(self.args.record)
            self.recorded.cleanup()

    def train_turn(self, text: list[Tensor], first: int, last: int) -> None:
        """Train iterations first to last - 1; ranks exchange measurements afterwards, outside the measured time."""
        records = []
        barrier(self.group)
        for iteration in range(first, last):
            start = time.perf_counter()
            for moe in self.model.moes:
                moe.forward_seconds = moe.backward_seconds = 0.0
            loss, counted = self.train_batch(*self.batch(text[iteration], iteration), iteration)
            self.optimizer.step()
            if self.router == "loss-free":
                self.model.nudge_biases()
            self.optimizer.zero_grad(set_to_none=True)  # before the rebalance, which would move gradients too
            synchronise(self.device)
            trained = rebalanced = time.perf_counter()
            if self.rebalancer is not None:
                self.rebalancer.step()
                rebalanced = time.perf_counter()
            times = [trained - start, rebalanced - trained, loss]
            seconds = [part for moe in self.model.moes for part in (moe.forward_seconds, moe.backward_seconds)]
            records.append(times + seconds + counted)
        self.turns.append(self.share(torch.tensor(records, dtype=torch.float64)))

    def train_batch(self, inputs: Tensor, targets: Tensor, iteration: int) -> tuple[float, list[float]]:
        """Gradients of one batch in micro-batches: its loss, and tokens and replicas of each step and layer."""
        total, counted = 0.0, list[float]()
        parts = zip(inputs.chunk(self.args.micro_batches), targets.chunk(self.args.micro_batches), strict=True)
        for number, part in enumerate(parts):
            if self.args.workload and self.balance != "forced":
                self.follow_workload(iteration * self.args.micro_batches + number)
            loss = self.model(*part)
            counted += [value for moe in self.model.moes for value in (moe.tokens_received, moe.num_replicas)]
            self.model.accumulate(loss, self.args.micro_batches)
            total += loss.item() / self.args.micro_batches
        self.model.reduce_gradients()
        return total, counted

    def follow_workload(self, step: int) -> None:
        """Let the layers choose as the workload tells, instead of their routers."""
        for layer, moe in enumerate(self.model.moes):
            moe.choose = partial(self.workload_choice, step, layer)

    def workload_choice(self, step: int, layer: int, scores: Tensor) -> Tensor:
        chosen = choice(
            self.args.workload,
            (len(scores), self.args.top_k, self.args.experts),
            seed=self.args.seed,
            step=step,
            layer=layer,
            rank=rank(),
            gpus=world_size(self.group),
        )
        return chosen.to(scores.device)

    def batch(self, text: Tensor, iteration: int) -> tuple[Tensor, Tensor]:
        """This rank's rows of the iteration's global batch, which depends on the seed and the iteration alone."""
        B, S = self.args.batch, self.args.sequence
        crops = global_batch(text, self.args.seed, iteration, B * world_size(self.group), S + 1)  # [M * B, S + 1]
        mine = crops[rank() * B : (rank() + 1) * B].to(self.device)
        return mine[:, :-1], mine[:, 1:]

    def share(self, own: Tensor) -> Measured:
        """Gather the measurements of all ranks on every rank; `own` is [I, 3 + L * 2 + T * L * 2]."""
        own = own.to(self.device)
        everyone = [torch.empty_like(own) for _ in range(world_size(self.group))]
        if self.group is None:
            everyone[0].copy_(own)
        else:
            dist.all_gather(everyone, own, group=self.group)
        gathered = torch.stack(everyone).cpu()  # [M, I, ...]
        seconds, rebalance_seconds, losses = gathered[..., :3].mean(0).unbind(-1)
        end = 3 + 2 * self.args.layers
        forward, backward = gathered[..., 3:end].unflatten(-1, (-1, 2)).unbind(-1)  # [M, I, L] each
        received, replicas = gathered[..., end:].unflatten(-1, (-1, 2)).unbind(-1)  # [M, I, T * L] each
        return Measured(seconds, rebalance_seconds, losses, forward, backward, received, replicas[0])

    def measured(self) -> Measured:
        """All turns except the warm-up, which ends with the first rebalance."""
        return Measured.joined(self.turns[self.args.every // self.args.turn :])

    def tokens(self) -> int:
        """Tokens of one iteration, on all ranks."""
        return self.args.batch * self.args.sequence * world_size(self.group)

    def progress(self, iteration: int, warm_up: bool) -> str:
        window = Measured.joined(self.turns[-(self.args.every // self.args.turn) :])
        speed = self.tokens() / window.seconds.median()
        return (
            f"{self.router:9} {self.balance:10} iteration {iteration:4}  loss {window.losses.mean():.4f}  "
            f"{speed:6.0f} tokens/s  imbalance {imbalance(window.received).mean():.3f}"
            + ("  (warm-up, not counted)" if warm_up else "")
        )


def imbalance(received: Tensor) -> Tensor:
    """Busiest GPU over mean GPU: [M, I, T * L] -> [I, T * L]."""
    return received.amax(0) / received.mean(0)


def summarise(runs: list[Run]) -> Table:
    """Compute the closing table, from medians over iterations, because other work on the machine slows some of them.

    The seconds of an iteration are the median without rebalances, plus the mean of the rebalance seconds.
    """
    table: Table = {}
    for run in runs:
        measured = run.measured()
        rebalancing = measured.rebalance_seconds.mean()
        phases = (measured.forward, measured.backward)  # [M, I, L] each
        in_experts = sum(phase.mean(0).sum(-1) for phase in phases)  # [I]
        waited = sum((phase.amax(0) - phase.mean(0)).sum(-1) for phase in phases)  # [I]
        seconds = measured.seconds.median() + rebalancing
        table.setdefault(run.router, {})[run.balance] = {
            "tokens_per_second": float(run.tokens() / seconds),
            "loss": float(measured.losses[-run.args.every :].mean()),
            "imbalance": float(imbalance(measured.received).mean()),
            "worst_imbalance": float(imbalance(measured.received).max()),
            "replicas": float(measured.replicas.mean()),
            "expert_share": float((in_experts / measured.seconds).median()),
            "wait_share": float((waited / measured.seconds).median()),
            "rebalance_share": float(rebalancing / seconds),
        }
    return table


def format_table(table: Table, runs: list[Run]) -> str:
    args = runs[0].args
    lines = [
        "",
        *([] if args.switch_at is None else [f"text: {describe_text(args)}"]),
        f"Medians over iterations {args.every + 1} to {args.iterations}; "
        "no plan is judged on the iterations it was made from.",
        "In brackets: quartiles of tokens/s, rebalances excluded.",
    ]
    for router, modes in table.items():
        lines += ["", f"router: {router}"]
        lines += [
            f"{'':10}{'tokens/s':>20}{'loss':>9}{'imbalance':>11}{'worst':>7}{'replicas':>10}{'experts':>9}"
            f"{'waiting':>9}{'rebalancing':>13}"
        ]
        for balance, row in modes.items():
            run = next(run for run in runs if (run.router, run.balance) == (router, balance))
            fast, slow = (run.tokens() / run.measured().seconds.quantile(q) for q in (0.25, 0.75))
            lines += [
                f"{balance:10}{row['tokens_per_second']:7.0f} [{slow:5.0f},{fast:5.0f}]{row['loss']:9.4f}"
                f"{row['imbalance']:11.3f}{row['worst_imbalance']:7.2f}{row['replicas']:10.2f}"
                f"{row['expert_share']:9.1%}{row['wait_share']:9.1%}{row['rebalance_share']:13.2%}"
            ]
        lines += [
            format_gain(router, balance, modes, runs)
            for balance in ("rebalanced", "replicated", "both")
            if {"static", balance} <= modes.keys()
        ]
    return "\n".join(lines)


def format_gain(router: str, balance: str, modes: dict[str, dict[str, float]], runs: list[Run]) -> str:
    found, static = modes[balance], modes["static"]
    gain = found["tokens_per_second"] / static["tokens_per_second"] - 1
    predicted = (1 - found["wait_share"]) / (1 - static["wait_share"]) - 1
    losses = {run.balance: Measured.joined(run.turns).losses for run in runs if run.router == router}
    difference = (losses[balance] - losses["static"]).abs().max().item()
    forced = "" if "forced" not in modes else (
        f", {found['tokens_per_second'] / modes['forced']['tokens_per_second']:.2f} of forced"
    )  # fmt: skip
    return (
        f"{balance} over static: {gain:+.1%} tokens/s ({predicted:+.1%} predicted from waiting){forced}. "
        f"Largest difference between their losses: {difference:.1e}"
    )


def report(event: Any) -> None:
    """Print a rebalance's event, which arrives when the rebalance is done, and again after a window under its plan."""
    if event.imbalance_next is not None:
        return  # the next rebalance prints this figure as its "before"
    levels = (event.imbalance_before, event.imbalance_after, event.imbalance_bound)
    before, after, bound = (mean_of_layers(of_layers) for of_layers in levels)
    if before is None:
        return  # the load is not known
    say(
        f"    rebalance after iteration {event.iteration}: imbalance {before:.3f} -> {after:.3f} (bound {bound:.3f}), "
        f"{event.slots_moved} slots and {event.bytes_moved / 1e6:.0f} MB moved in {sum(event.seconds.values()):.2f} s"
    )


def write_reports(runs: list[Run]) -> None:
    """Write an HTML page of each model; those of the same router are beside it where a step's time is shown."""
    from distplb.report.beside import with_beside  # needs pip install 'distplb[report]'
    from distplb.report.page import write_report
    from distplb.report.run import Run as RecordedRun

    for run in runs:
        assert run.folder is not None
        page = run.folder.with_suffix(".html")
        beside = [other.folder for other in runs if other is not run and other.router == run.router]
        write_report(with_beside(RecordedRun.read(run.folder), beside), page)
        say(f"report of {run.router}/{run.balance}: {page.resolve()}")


def describe(args: argparse.Namespace, modes: list[tuple[str, str]], ranks: int, text: list[Tensor]) -> str:
    names = ", ".join(f"{router}/{balance}" for router, balance in modes)
    return (
        f"{args.layers} layer{'s' * (args.layers > 1)}, {args.experts} experts, top-{args.top_k}, dim {args.dim}, "
        f"ffn {args.ffn}; {ranks} rank{'s' * (ranks > 1)} x {args.batch} sequence{'s' * (args.batch > 1)} x "
        f"{args.sequence} bytes from {len(text[0]) / 1e6:.0f} MB of text\n"
        f"text: {describe_text(args)}\n"
        f"{len(modes)} x {args.iterations} iterations in turns of {args.turn}: {names}\n"
        f"The ten runs of --compare take five to eight minutes at the default sizes on two cores."
    )


def global_batch(text: Tensor, seed: int, iteration: int, batch: int, length: int) -> Tensor:
    """Draw random crops [batch, length] of the text, the same on every rank and for any number of ranks."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + iteration)
    starts = torch.randint(len(text) - length, (batch, 1), generator=generator)
    return text[starts + torch.arange(length)].long()


def text_of_iterations(args: argparse.Namespace) -> list[Tensor]:
    """The text of each of the I iterations: uint8 [bytes]."""
    first = texts.files(args.data) if args.data else TEXTS[args.text]()
    if args.switch_at is None:
        return [first] * args.iterations
    before = args.switch_at - 1
    return [first] * before + [TEXTS[other_text(args)]()] * (args.iterations - before)


def other_text(args: argparse.Namespace) -> str:
    return "prose" if args.text == "code" else "code"


def describe_text(args: argparse.Namespace) -> str:
    first = args.data or args.text
    return first if args.switch_at is None else f"{first}, {other_text(args)} from iteration {args.switch_at} on"


def start(device_name: str) -> tuple[Group, torch.device]:
    """Return the group of all ranks (None in a plain process, without torchrun) and this rank's device."""
    device = torch.device(device_name)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return None, device
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return dist.group.WORLD, device


def barrier(group: Group) -> None:
    if group is not None:
        dist.barrier(group)


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def world_size(group: Group) -> int:
    return 1 if group is None else dist.get_world_size(group)


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def say(line: str) -> None:
    if rank() == 0:
        print(line, flush=True)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--router", choices=ROUTERS, default="plain", help="plain: unbalanced; loss-free: balanced by a bias")
    add("--balance", choices=BALANCES, default="rebalanced", help=BALANCE_HELP)
    add("--compare", action="store_true", help=f"train {', '.join(COMPARED)} with both routers, in turns")
    add("--replica-slots", type=int, default=2, help="replicas that a GPU may hold in one step")
    add("--max-tokens-per-gpu", type=int, metavar="TOKENS", help="no GPU computes more in a step, with replicas")
    add("--workload", choices=WORKLOADS, help="choices of experts by this pattern instead of the router")
    add("--micro-batches", type=int, default=1, help="steps of an iteration; divides --batch")
    add("--recompute", action="store_true", help="compute each block's forward again in the backward")
    add("--apply", choices=("permute", "remap"), default="permute", help="permute router rows, or remap by a table")
    add("--every", type=int, default=25, help="iterations between rebalances")
    add("--turn", type=int, default=5, help="iterations that each run trains before the next run; divides --every")
    add("--iterations", type=int, default=75)
    add("--layers", type=int, default=2)
    add("--experts", type=int, default=16)
    add("--top-k", type=int, default=2)
    add("--dim", type=int, default=64)
    add("--ffn", type=int, default=3072)
    add("--heads", type=int, default=2)
    add("--sequence", type=int, default=128, help="bytes of one sequence")
    add("--batch", type=int, default=16, help="sequences of one rank")
    add("--lr", type=float, default=1e-3)
    add(
        "--bias-rate",
        type=float,
        default=1e-2,
        help="step of the loss-free bias; 1e-3 is usual for runs of many thousand iterations",
    )
    add("--seed", type=int, default=0)
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--text", choices=TEXTS, default="code", help="source or manual of Python's standard library")
    add("--data", metavar="FOLDER", help="folder of text to train on instead of --text")
    add("--switch-at", type=int, metavar="ITERATION", help="from this iteration on, train on the other --text")
    add("--json", metavar="FILE", help="write the closing table to this file")
    add("--record", metavar="FILE", help="write the loads to this trace (.npz); not with --compare")
    add(
        "--report",
        metavar="FOLDER",
        help="write events, loads, sampled steps and a report of each model to this folder",
    )
    add("--note", default="", help="text to store in the trace, for example how it was made")
    args = parser.parse_args()
    if args.iterations <= args.every:
        parser.error(f"--iterations {args.iterations} must exceed --every {args.every}, the length of the warm-up")
    if args.record and args.compare:
        parser.error("--record records one model; leave out --compare")
    if args.record and args.report:
        parser.error("--report records the loads too; leave out --record")
    if args.micro_batches < 1 or args.batch % args.micro_batches:
        parser.error(f"--micro-batches {args.micro_batches} must divide --batch {args.batch}")
    if args.max_tokens_per_gpu and args.balance not in ("replicated", "both"):
        parser.error("--max-tokens-per-gpu is kept by replicas; pass --balance replicated or both")
    if args.turn < 1 or args.every % args.turn:
        parser.error(f"--turn {args.turn} must divide --every {args.every}")
    if args.switch_at is not None and not 1 < args.switch_at <= args.iterations:
        parser.error(f"--switch-at {args.switch_at} must be after iteration 1 and at most {args.iterations}, the last")
    return args


if __name__ == "__main__":
    main()
