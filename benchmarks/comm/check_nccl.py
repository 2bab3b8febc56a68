"""Check distplb on the GPUs of this job: collectives, plans to the bit, and moves with optimizer state.

    launch/nccl.sh                                                                 # all GPUs of this host
    torchrun --nproc-per-node 2 -m benchmarks.comm.check_nccl --backend gloo       # the same code without any

Every rank checks for itself and the results are collected over a gloo group, so that a faulty collective cannot hide a
fault. Exits with 1 if anything is wrong. Shapes: T steps, L layers, E experts, P slots, G slots on each GPU, M GPUs.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.shared.tables import command_line, header, markdown
from distplb import LoadWindow, MoELayer, Moves, Placement, Rebalancer, Topology, plan
from distplb.comm.base import Comm
from distplb.comm.torchdist import TorchComm

STEPS, LAYERS, EXPERTS_PER_GPU = 8, 12, 16
REPEATS = 20
DEADLINE_SECONDS = 60.0
MIB = 1 << 20


@dataclass(frozen=True)
class Timing:
    """Seconds on rank 0: the median, minimum and maximum of the repeats."""

    what: str
    bytes: int
    median: float
    least: float
    largest: float


def main() -> int:
    """Check, time, print and write; returns the exit status."""
    options = parsed_options()
    device = started(options.backend)
    comm, verdicts = TorchComm(deadline=DEADLINE_SECONDS), dist.new_group(backend="gloo")
    errors = {name: agreed(check, comm, device, options.dim, verdicts) for name, check in CHECKS.items()}
    timings = [] if any(errors.values()) else timed(comm, device, options)  # ranks may have lost each other
    if comm.rank == 0:
        report(options, comm, errors, timings)
    dist.destroy_process_group()
    return int(any(errors.values()))


def parsed_options() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description="Check distplb on several GPUs.")
    parser.add_argument("--backend", choices=["nccl", "gloo"], default="nccl")
    parser.add_argument("--dim", type=int, default=1024, help="size of a moved expert: dim × 4 dim elements")
    parser.add_argument("--repeats", type=int, default=REPEATS, metavar="R", help="number of timed calls")
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "results", metavar="DIR")
    return parser.parse_args()


def started(backend: str) -> torch.device:
    """Initialise the process group; returns this rank's device."""
    if backend == "gloo":
        dist.init_process_group("gloo")
        return torch.device("cpu")
    local = int(os.environ["LOCAL_RANK"])
    if torch.cuda.device_count() <= local:
        raise SystemExit(f"local rank {local} has no GPU; GPUs on this host: {torch.cuda.device_count()}")
    torch.cuda.set_device(local)
    device = torch.device("cuda", local)
    dist.init_process_group("nccl", device_id=device)
    return device


def agreed(check: Callable[..., Iterator[str]], comm: Comm, device: torch.device, dim: int, verdicts: Any) -> list[str]:
    """Collect the errors of all ranks, the same list on each."""
    try:
        errors = [f"rank {comm.rank}: {error}" for error in check(comm, device, dim)]
    except Exception as error:  # the others must learn of it; those that wait for this rank time out first
        errors = [f"rank {comm.rank}: {error!r}"]
    text = json.dumps(errors).encode()
    sizes = torch.zeros(comm.size, dtype=torch.int64)
    sizes[comm.rank] = len(text)
    dist.all_reduce(sizes, group=verdicts)
    texts = torch.zeros(comm.size, int(sizes.max()), dtype=torch.uint8)
    texts[comm.rank, : len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    dist.all_reduce(texts, group=verdicts)
    return [
        what for row, size in zip(texts.tolist(), sizes.tolist(), strict=True) for what in json.loads(bytes(row[:size]))
    ]


# --- what must be right ----------------------------------------------------------------------------------------


def collectives(comm: Comm, device: torch.device, dim: int) -> Iterator[str]:
    """Sums and minima near the ends of int64, broadcasts from every root, messages around the ring; small and large."""
    ranks = range(comm.size)
    for length in (1, 1000, MIB):
        at = torch.arange(length, device=comm.device)
        summed = at + 10**12 * comm.rank
        comm.all_reduce_sum(summed)
        if not torch.equal(summed, at * comm.size + 10**12 * sum(ranks)):
            yield f"the sum over ranks of {length} int64 is wrong"
        minimum = (2**62 + at) * (1 if comm.rank % 2 else -1) + comm.rank
        comm.all_reduce_min(minimum)
        if not torch.equal(minimum, -(2**62 + at)):
            yield f"the minimum over ranks of {length} int64 is wrong"
        for root in ranks:
            sent = torch.full((length,), 100 + comm.rank, dtype=torch.uint8, device=comm.device)
            comm.broadcast(sent, root)
            if not bool((sent == 100 + root).all()):
                yield f"{length} byte{'s' * (length > 1)} from root {root} did not arrive"
        following, before = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
        room = torch.zeros(length, dtype=torch.uint8, device=comm.device)
        comm.exchange([([(torch.full_like(room, 1 + comm.rank), following)], [(room, before)])])
        if not bool((room == 1 + before).all()):
            yield f"{length} byte{'s' * (length > 1)} from rank {before} did not arrive"


def skewed_load(num_experts: int) -> Tensor:
    """`[T, L, E]`, the same on every rank and device."""
    generator = torch.Generator().manual_seed(0)
    hot = torch.randn(1, LAYERS, num_experts, generator=generator).mul(1.2).exp()
    return (1000 * hot * torch.randn(STEPS, LAYERS, num_experts, generator=generator).mul(0.5).exp()).long()


def plans(comm: Comm, device: torch.device, dim: int) -> Iterator[str]:
    """Plans of all ranks on their GPUs equal those of the reference on this rank's CPU, to the bit."""
    num_experts, topology = EXPERTS_PER_GPU * comm.size, Topology(1, comm.size)
    whole = skewed_load(num_experts)
    mine = whole // comm.size if comm.rank else whole - (comm.size - 1) * (whole // comm.size)
    current = Placement.contiguous(LAYERS, num_experts, comm.size)
    variants: dict[str, dict[str, Any]] = {
        "fresh": {"num_candidates": 9},
        "replicas": {"num_candidates": 5, "num_slots": num_experts + 4 * comm.size},
        "groups": {"num_candidates": 5, "num_groups": 2 * comm.size},
        "priced": {"num_candidates": 6, "current": current, "move_price": 40.0},
    }
    for name, variant in variants.items():
        together = plan(mine.to(device), topology, comm=comm, seed=3, **variant)
        if together != plan(whole, topology, seed=3, engine="reference", **variant):
            yield f"the plan {name!r} differs from the reference's"


class Experts:
    """Two layers of experts on this rank, each expert with its own weights, and AdamW."""

    def __init__(self, comm: Comm, device: torch.device, dim: int, verify: str) -> None:
        self.comm, self.num_experts = comm, EXPERTS_PER_GPU * comm.size
        self.weights = []
        for layer in range(2):
            rows = []
            for expert in range(comm.rank * EXPERTS_PER_GPU, (comm.rank + 1) * EXPERTS_PER_GPU):
                generator = torch.Generator().manual_seed(1000 * layer + expert)
                rows.append(torch.randn(dim, 4 * dim, generator=generator))
            self.weights.append(nn.Parameter(torch.stack(rows).to(device)))
        routers = [torch.arange(self.num_experts, device=device).float().expand(4, -1).T.contiguous() for _ in range(2)]
        self.optimizer = torch.optim.AdamW(self.weights)
        self.rebalancer = Rebalancer(
            [
                MoELayer(name=f"moe.{layer}", experts={"w": weight}, router={"weight": router})
                for layer, (weight, router) in enumerate(zip(self.weights, routers, strict=True))
            ],
            self.optimizer,
            topology=Topology(1, comm.size),
            window=LoadWindow(2, self.num_experts, 1),
            comm=comm,
            every=1 << 30,
            moves=Moves(verify=verify),
        )
        self.routers = routers

    def train(self) -> None:
        """Train one step, in which every expert changes differently."""
        self.optimizer.zero_grad()
        sum((weight**2).sum() for weight in self.weights).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def shuffle(self, seed: int) -> None:
        """Move every expert to a random slot."""
        generator = torch.Generator().manual_seed(seed)
        tables = [torch.randperm(self.num_experts, generator=generator) for _ in range(2)]
        self.rebalancer.apply(Placement(torch.stack(tables), self.num_experts, self.comm.size))

    def bytes_of_move(self) -> int:
        """Bytes of this rank's experts with both moments."""
        return 3 * sum(weight.nbytes for weight in self.weights)


def moves(comm: Comm, device: torch.device, dim: int) -> Iterator[str]:
    """Experts that move after every step end with the same weights and moments as experts that stay."""
    still, moved = (Experts(comm, device, dim, "digest") for _ in range(2))
    for iteration in range(4):
        still.train()
        moved.train()
        moved.shuffle(iteration)
    for layer, router in enumerate(moved.routers):
        if router[:, 0].tolist() != moved.rebalancer.placement.expert_of_slot[layer].tolist():
            yield f"the router's rows of layer {layer} do not match the experts' slots"
    moved.rebalancer.restore()
    for layer, (one, other) in enumerate(zip(still.weights, moved.weights, strict=True)):
        for name in ("weight", "exp_avg", "exp_avg_sq"):
            a, b = (w if name == "weight" else e.optimizer.state[w][name] for e, w in ((still, one), (moved, other)))
            if not torch.equal(a, b):
                yield f"{name} of layer {layer} differs from that without moves"


CHECKS: dict[str, Callable[..., Iterator[str]]] = {"collectives": collectives, "plans": plans, "moves": moves}


# --- how long it takes -----------------------------------------------------------------------------------------


def timed(comm: Comm, device: torch.device, options: argparse.Namespace) -> list[Timing]:
    """Time the calls of one rebalance; all ranks meet before each."""
    num_experts = EXPERTS_PER_GPU * comm.size
    load = skewed_load(num_experts).to(comm.device)
    counts = torch.zeros_like(load)  # zeros, which repeated sums do not change
    keys = torch.zeros(LAYERS, dtype=torch.int64, device=comm.device)
    table = torch.zeros(LAYERS, num_experts, dtype=torch.int64, device=comm.device)
    experts = Experts(comm, device, options.dim, "off")
    experts.train()
    seeds = iter(range(1 << 30))
    calls: dict[str, tuple[int, Callable[[], object]]] = {
        "all-reduce (sum) of the load": (counts.nbytes, lambda: comm.all_reduce_sum(counts)),
        "all-reduce (min) of the keys": (keys.nbytes, lambda: comm.all_reduce_min(keys)),
        "broadcast of the placement": (table.nbytes, lambda: comm.broadcast(table, 0)),
        "a plan": (load.nbytes, lambda: plan(load, Topology(1, comm.size), comm=comm, num_candidates=comm.size)),
        "a random move of all experts": (experts.bytes_of_move(), lambda: experts.shuffle(next(seeds))),
    }
    return [timing(what, size, call, comm, options.repeats) for what, (size, call) in calls.items()]


def timing(what: str, size: int, call: Callable[[], object], comm: Comm, repeats: int) -> Timing:
    """Time a call, after one that is not timed."""
    seconds, ready = [], torch.zeros(1, dtype=torch.int64, device=comm.device)
    for turn in range(repeats + 1):
        comm.all_reduce_min(ready)
        start = now()
        call()
        if turn:
            seconds.append(now() - start)
    return Timing(what, size, statistics.median(seconds), min(seconds), max(seconds))


def now() -> float:
    """Seconds on the clock, after the GPU has finished all work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def report(options: argparse.Namespace, comm: Comm, errors: dict[str, list[str]], timings: list[Timing]) -> None:
    """Print the report, and write it as markdown and JSON."""
    is_nccl = options.backend == "nccl"
    arguments = {"--backend": options.backend, "--dim": options.dim, "--repeats": options.repeats}
    parts = [
        header(
            f"{options.backend} on {comm.size} {'GPU' if is_nccl else 'CPU rank'}{'s' * (comm.size > 1)}",
            f"Checks of all ranks, and times on rank 0: median of {options.repeats}, least and largest. The load is "
            f"[{STEPS}, {LAYERS}, {EXPERTS_PER_GPU * comm.size}]. Bytes are those of one rank; for a move, those of "
            f"its experts with both moments, of which 1 in {comm.size} stays.",
            command_line("comm.check_nccl", arguments, ranks=comm.size),
            "cuda" if is_nccl else "cpu",
        ),
        *([f"- NCCL: {'.'.join(map(str, torch.cuda.nccl.version()))}"] if is_nccl else []),
        "",
        markdown(["check", "result"], [[name, "; ".join(wrong) or "right"] for name, wrong in errors.items()]),
        "",
        markdown(
            ["call", "bytes", "median ms", "least", "largest"],
            [[t.what, str(t.bytes), *(f"{1e3 * s:.3f}" for s in (t.median, t.least, t.largest))] for t in timings],
        ),
    ]
    text = "\n".join(parts)
    print(text, flush=True)
    stem = f"{datetime.date.today().isoformat()}-{options.backend}-{comm.size}{'gpu' if is_nccl else 'cpu'}"
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / f"{stem}.md").write_text(f"{text}\n")
    record = {"wrong": errors, "timings": [asdict(t) for t in timings]}
    (options.output / f"{stem}.json").write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
