"""Pretrain a small mixture-of-experts model on real text, with its experts rebalanced every N iterations.

    torchrun --standalone --nproc-per-node 2 examples/pretrain_moe.py --compare
    torchrun --standalone --nproc-per-node 2 examples/pretrain_moe.py --router plain --balance rebalanced
    python examples/pretrain_moe.py --balance static --data ~/my_text

The text is the source of Python's standard library (there on every machine), or a folder of one's own. `--compare`
trains six models, {plain, loss-free} x {static, rebalanced, forced}, in turns of `--every` iterations in the same
processes, so that whatever else the machine does hits all of them alike, and closes with a table. What distplb needs
from a training loop is in `Run`: a window that counts, a list of layers, and one call after `optimizer.step()`.

Shapes: B batch of one rank, S sequence, I iterations of a block, L layers, M GPUs (ranks), E experts.
"""

from __future__ import annotations

import argparse
import json
import os
import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from moe_model import Config, Group, Transformer
from torch import Tensor

import distplb
from distplb.comm.torchdist import TorchComm

ROUTERS = ("plain", "loss-free")
BALANCES = ("static", "rebalanced", "forced")
MAX_BYTES = 32 * 2**20  # of text


def main() -> None:
    args = parse_arguments()
    group, device = start(args.device)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    text = read_text(args.data)  # [bytes]
    modes = [(r, b) for r in ROUTERS for b in BALANCES] if args.compare else [(args.router, args.balance)]
    say(describe(args, modes, world_size(group), text))
    runs = [Run(args, router, balance, group, device) for router, balance in modes]
    train(args, runs, text)
    table = summarise(runs)
    say(format_table(table, runs))
    if args.json and rank() == 0:
        Path(args.json).write_text(json.dumps(table, indent=2) + "\n")
    if group is not None:
        dist.destroy_process_group()


def train(args: argparse.Namespace, runs: list[Run], text: Tensor) -> None:
    """Every run's first block, then every run's second block, ...; who goes first rotates."""
    started, done = time.perf_counter(), 0
    for turn, first in enumerate(range(0, args.iterations, args.every)):
        last = min(first + args.every, args.iterations)
        for i in range(len(runs)):
            run = runs[(turn + i) % len(runs)]
            run.train_block(text, first, last)
            done += last - first
            say(run.progress(last, warm_up=turn == 0))
        seconds = (time.perf_counter() - started) * (len(runs) * args.iterations / done - 1)
        if seconds > 0:
            say(f"about {seconds / 60:.1f} minutes to go")


@dataclass(frozen=True)
class Measured:
    """What all ranks measured over one block of I iterations."""

    seconds: float  # mean over ranks, rebalances included
    rebalance_seconds: float  # part of them
    tokens: int  # of all ranks
    losses: Tensor  # [I], mean over ranks
    forward: Tensor  # [M, I, L] seconds in experts
    backward: Tensor  # [M, I, L] seconds in experts
    received: Tensor  # [M, I, L] tokens


class Run:
    """One model in training, and what was measured on it."""

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
        )
        self.model = Transformer(config, group, args.seed).to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=args.lr, fused=True)
        self.rebalancer = self.make_rebalancer() if balance == "rebalanced" else None
        self.blocks: list[Measured] = []

    def make_rebalancer(self) -> distplb.Rebalancer:
        moes = self.model.moes
        window = distplb.LoadWindow(len(moes), self.args.experts, self.args.every, device=self.device)
        layers = []
        for index, moe in enumerate(moes):
            moe.on_counts = lambda counts, index=index: window.add(index, counts)
            layers.append(
                distplb.MoELayer(
                    name=f"blocks.{index}.moe",
                    experts={"w_in": moe.w_in, "w_out": moe.w_out},  # dim 0: this rank's slots
                    router={"weight": moe.router.weight, "expert_bias": moe.expert_bias},  # dim 0: E
                )
            )
        return distplb.Rebalancer(
            layers,
            self.optimizer,
            topology=distplb.Topology(1, world_size(self.group)),
            comm=None if self.group is None else TorchComm(self.group),
            window=window,
            every=self.args.every,
            seed=self.args.seed,
            on_event=report,
        )

    def train_block(self, text: Tensor, first: int, last: int) -> None:
        """Iterations first to last - 1; what each rank measured is shared at the end, outside the time taken."""
        losses, records, rebalance_seconds = [], [], 0.0
        barrier(self.group)
        start = time.perf_counter()
        for iteration in range(first, last):
            inputs, targets = self.batch(text, iteration)
            loss = self.model(inputs, targets)
            self.model.backward(loss)
            self.optimizer.step()
            if self.router == "loss-free":
                self.model.nudge_biases()
            if self.rebalancer is not None:
                before = time.perf_counter()
                self.rebalancer.step()
                rebalance_seconds += time.perf_counter() - before
            self.optimizer.zero_grad(set_to_none=True)
            losses.append(loss.detach())
            records.append([[m.forward_seconds, m.backward_seconds, m.tokens_received] for m in self.model.moes])
        synchronise(self.device)
        seconds = time.perf_counter() - start
        self.blocks.append(self.share(seconds, rebalance_seconds, torch.stack(losses), torch.tensor(records)))

    def batch(self, text: Tensor, iteration: int) -> tuple[Tensor, Tensor]:
        """This rank's rows of the iteration's global batch, which depends on the seed and the iteration alone."""
        B, S = self.args.batch, self.args.sequence
        crops = global_batch(text, self.args.seed, iteration, B * world_size(self.group), S + 1)  # [M * B, S + 1]
        mine = crops[rank() * B : (rank() + 1) * B].to(self.device)
        return mine[:, :-1], mine[:, 1:]

    def share(self, seconds: float, rebalance_seconds: float, losses: Tensor, records: Tensor) -> Measured:
        """Everybody's measurements on every rank: losses [I], records [I, L, 3]."""
        times = torch.tensor([seconds, rebalance_seconds], dtype=torch.float64)
        own = torch.cat([times, losses.cpu().double(), records.double().flatten()]).to(self.device)
        everyone = [torch.empty_like(own) for _ in range(world_size(self.group))]
        if self.group is None:
            everyone[0].copy_(own)
        else:
            dist.all_gather(everyone, own, group=self.group)
        gathered = torch.stack(everyone).cpu()  # [M, 2 + I + I * L * 3]
        count = len(losses)
        per_layer = gathered[:, 2 + count :].view(-1, *records.shape)  # [M, I, L, 3]
        return Measured(
            seconds=gathered[:, 0].mean().item(),
            rebalance_seconds=gathered[:, 1].mean().item(),
            tokens=count * self.args.batch * self.args.sequence * len(gathered),
            losses=gathered[:, 2 : 2 + count].mean(0),
            forward=per_layer[..., 0],
            backward=per_layer[..., 1],
            received=per_layer[..., 2],
        )

    def progress(self, iteration: int, warm_up: bool) -> str:
        block = self.blocks[-1]
        return (
            f"{self.router:9} {self.balance:10} iteration {iteration:4}  loss {block.losses.mean():.4f}  "
            f"{block.tokens / block.seconds:6.0f} tokens/s  imbalance {imbalance(block.received).mean():.3f}"
            + ("  (warm-up, not measured)" if warm_up else "")
        )


def imbalance(received: Tensor) -> Tensor:
    """Fullest GPU over mean GPU: [M, I, L] -> [I, L]."""
    return received.amax(0) / received.mean(0)


def summarise(runs: list[Run]) -> dict[str, dict[str, dict[str, float]]]:
    """The closing table. The first block is left out: it is warm-up, and no rebalance has happened before it."""
    table: dict[str, dict[str, dict[str, float]]] = {}
    for run in runs:
        blocks = run.blocks[1:]
        seconds = sum(block.seconds for block in blocks)
        phases = [phase for block in blocks for phase in (block.forward, block.backward)]  # [M, I, L] each
        waited = sum((phase.amax(0) - phase.mean(0)).sum().item() for phase in phases)
        table.setdefault(run.router, {})[run.balance] = {
            "tokens_per_second": sum(block.tokens for block in blocks) / seconds,
            "loss": blocks[-1].losses.mean().item(),
            "imbalance": torch.cat([imbalance(block.received) for block in blocks]).mean().item(),
            "expert_share": sum(phase.mean(0).sum().item() for phase in phases) / seconds,
            "wait_share": waited / seconds,
            "rebalance_share": sum(block.rebalance_seconds for block in blocks) / seconds,
        }
    return table


def format_table(table: dict[str, dict[str, dict[str, float]]], runs: list[Run]) -> str:
    lines = ["", "measured over all blocks but each run's first; ± is the standard deviation over blocks"]
    for router, modes in table.items():
        lines += ["", f"router: {router}"]
        lines += [f"{'':12}{'tokens/s':>14}{'loss':>9}{'imbalance':>11}{'experts':>9}{'waiting':>9}{'rebalancing':>13}"]
        for balance, row in modes.items():
            run = next(run for run in runs if (run.router, run.balance) == (router, balance))
            speeds = torch.tensor([block.tokens / block.seconds for block in run.blocks[1:]])
            spread = speeds.std().item() if len(speeds) > 1 else 0.0
            lines += [
                f"{balance:12}{row['tokens_per_second']:8.0f} ±{spread:4.0f}{row['loss']:9.4f}{row['imbalance']:11.3f}"
                f"{row['expert_share']:9.1%}{row['wait_share']:9.1%}{row['rebalance_share']:13.2%}"
            ]
        if {"static", "rebalanced"} <= modes.keys():
            lines += [format_gain(router, modes["static"], modes["rebalanced"], runs)]
    return "\n".join(lines)


def format_gain(router: str, static: dict[str, float], rebalanced: dict[str, float], runs: list[Run]) -> str:
    gain = rebalanced["tokens_per_second"] / static["tokens_per_second"] - 1
    predicted = (1 - rebalanced["wait_share"]) / (1 - static["wait_share"]) - 1
    losses = {run.balance: torch.cat([block.losses for block in run.blocks]) for run in runs if run.router == router}
    difference = (losses["rebalanced"] - losses["static"]).abs().max().item()
    return (
        f"rebalanced over static: {gain:+.1%} tokens/s; the wait shares predict {predicted:+.1%}. "
        f"Largest difference of their losses: {difference:.1e}"
    )


def report(event: Any) -> None:
    """A rebalance's record comes twice: when it is done, and again once a window has been counted under its plan."""
    if event.imbalance_next is not None:
        return  # said already: it is what the next rebalance calls before
    before, after, bound = (
        sum(values) / len(values) for values in (event.imbalance_before, event.imbalance_after, event.imbalance_bound)
    )
    say(
        f"    rebalance after iteration {event.iteration}: imbalance {before:.3f} -> {after:.3f} (bound {bound:.3f}), "
        f"{event.slots_moved} slots and {event.bytes_moved / 1e6:.0f} MB moved in {sum(event.seconds.values()):.2f} s"
    )


def describe(args: argparse.Namespace, modes: list[tuple[str, str]], ranks: int, text: Tensor) -> str:
    names = ", ".join(f"{router}/{balance}" for router, balance in modes)
    return (
        f"{args.layers} layers, {args.experts} experts, top-{args.top_k}, dim {args.dim}, ffn {args.ffn}; "
        f"{ranks} ranks x {args.batch} sequences x {args.sequence} bytes from {len(text) / 1e6:.0f} MB of text\n"
        f"{len(modes)} x {args.iterations} iterations in turns of {args.every}: {names}\n"
        f"The six runs of --compare at default sizes take about five minutes on two cores; the time left is printed "
        f"after every turn."
    )


def global_batch(text: Tensor, seed: int, iteration: int, batch: int, length: int) -> Tensor:
    """Random crops [batch, length] of the text, the same on every rank and for any number of ranks."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + iteration)
    starts = torch.randint(len(text) - length, (batch, 1), generator=generator)
    return text[starts + torch.arange(length)].long()


def read_text(folder: str | None) -> Tensor:
    """The folder's files (default: the standard library's *.py) end to end, at most MAX_BYTES: uint8 [bytes]."""
    root = Path(folder or sysconfig.get_paths()["stdlib"])
    paths = sorted(path for path in root.rglob("*" if folder else "*.py") if path.is_file())
    data = bytearray()
    for path in paths:
        if folder is None and {"site-packages", "dist-packages"} & set(path.parts):
            continue
        data += path.read_bytes()
        if len(data) > MAX_BYTES:
            break
    if not data:
        raise SystemExit(f"no text found in {root}; pass --data FOLDER with files in it")
    return torch.frombuffer(data[:MAX_BYTES], dtype=torch.uint8)


def start(device_name: str) -> tuple[Group, torch.device]:
    """The group of all ranks under torchrun, None in a plain process; and this rank's device."""
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
    add("--router", choices=ROUTERS, default="plain", help="plain: nothing balances it; loss-free: a nudged bias")
    add("--balance", choices=BALANCES, default="rebalanced", help="forced: a perfectly even choice, for reference")
    add("--compare", action="store_true", help="all balances with both routers, in turns, and a table")
    add("--every", type=int, default=20, help="iterations between rebalances, and of one block")
    add("--iterations", type=int, default=100)
    add("--layers", type=int, default=4)
    add("--experts", type=int, default=16)
    add("--top-k", type=int, default=2)
    add("--dim", type=int, default=64)
    add("--ffn", type=int, default=1536)
    add("--heads", type=int, default=2)
    add("--sequence", type=int, default=128, help="bytes of one sequence")
    add("--batch", type=int, default=16, help="sequences of one rank")
    add("--lr", type=float, default=3e-3)
    add(
        "--bias-rate",
        type=float,
        default=1e-2,
        help="of loss-free; 1e-3 is usual, for runs of many thousand iterations",
    )
    add("--seed", type=int, default=0)
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--data", metavar="FOLDER", help="text to train on instead of the standard library's source")
    add("--json", metavar="FILE", help="write the closing table there")
    args = parser.parse_args()
    if args.iterations <= args.every:
        parser.error(f"--iterations {args.iterations} must exceed --every {args.every}: the first block is warm-up")
    return args


if __name__ == "__main__":
    main()
