"""The job of each rank of test_hosts.py, under torchrun on its own host: write results, then wait to lose others.

    torchrun ... tests/helpers/host_job.py FOLDER

Shapes: T steps, L layers, E experts, P slots.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from conformance import conforms
from jobs import DIM, EXPERTS, LAYERS, Job, by_slot, skewed
from torch import Tensor

import distplb
from distplb import Placement, Topology
from distplb.comm.torchdist import TorchComm
from distplb.train.measure import measured_bandwidths

STEPS, DEADLINE_SECONDS, SHORT_SECONDS = 3, 60.0, 6.0
ENGINE = "reference"


def main(folder: Path) -> None:
    """Run every check once, then repeat one plan until other ranks are lost."""
    dist.init_process_group("gloo")
    comm = TorchComm(deadline=DEADLINE_SECONDS)
    conforms(comm)
    topology = Topology.of_ranks(range(comm.size), int(os.environ["LOCAL_WORLD_SIZE"]))
    found = {"topology": [topology.num_nodes, topology.gpus_per_node]}
    found |= planned(comm, topology) | moved(comm, topology)
    found["links"] = measured_bandwidths(comm, topology, range(comm.size), comm.rank)
    if topology == Topology(2, 2):
        found |= crossed(comm, topology)
    write(folder / f"rank{comm.rank}.json", found)
    impatient = TorchComm(deadline=SHORT_SECONDS)
    try:
        while True:
            distplb.plan(shares(comm.size)[comm.rank], topology, comm=impatient, engine=ENGINE)
    except distplb.DistplbError as error:
        write(folder / f"rank{comm.rank}.lost", {"kind": type(error).__name__, "text": str(error)})
    os._exit(0)  # a group that has lost ranks cannot be destroyed cleanly


def shares(ranks: int) -> Tensor:
    """Draw the counts of each rank, `[ranks, T, L, E]`."""
    generator = torch.Generator().manual_seed(5)
    popular = torch.rand(LAYERS, 32, generator=generator) ** 4 * 1000
    return torch.poisson(popular.expand(ranks, STEPS, -1, -1), generator=generator).long()


def planned(comm: TorchComm, topology: Topology) -> dict[str, Any]:
    """Return the digests of the plans, each made from the ranks' own shares."""
    own = shares(comm.size)[comm.rank]
    return {name: distplb.plan(own, topology, comm=comm, **options).digest() for name, options in plans(comm.size)}


def plans(ranks: int) -> list[tuple[str, dict[str, Any]]]:
    """Return the options of each plan; the engine is the fastest to import."""
    priced = {"current": Placement.contiguous(LAYERS, 32, ranks), "move_price": (20.0, 90.0)}
    options = {
        "afresh": {"num_candidates": 6},
        "from there": {"num_candidates": 5} | priced,
        "replicas": {"num_candidates": 3, "num_slots": 40, "num_groups": 8},
    }
    return [(name, {"engine": ENGINE} | some) for name, some in options.items()]


def moved(comm: TorchComm, topology: Topology) -> dict[str, Any]:
    """Rebalance a job; return what moved, and the tensors whose values are not their expert's."""
    job = Job()
    job.topology = topology
    everything = torch.randn(LAYERS, EXPERTS, DIM, 2 * DIM, generator=torch.Generator().manual_seed(6))
    mine = slice(comm.rank * EXPERTS // comm.size, (comm.rank + 1) * EXPERTS // comm.size)
    for weight, whole in zip(job.weights, everything, strict=True):
        weight.data.copy_(whole[mine])
    # The same experts on one rank in logical order; AdamW treats each element independently.
    still = [torch.nn.Parameter(whole.clone()) for whole in everything]
    optimizer = torch.optim.AdamW(still)
    events: list[distplb.RebalanceEvent] = []
    rebalancer = job.rebalancer(comm=comm, engine=ENGINE, on_event=events.append)
    for hot in ((0, 1), (2, 3), (4, 6), (0, 7), (1, 5), (3, 4)):
        job.iterate(by_slot(skewed(hot), rebalancer.placement))
        optimizer.zero_grad()
        sum((p**2).sum() for p in still).backward()
        optimizer.step()
        rebalancer.step()
    wrong = []
    for layer, (weight, whole) in enumerate(zip(job.weights, still, strict=True)):
        experts = rebalancer.placement.expert_of_slot[layer, mine]
        pairs = {"weight": (weight, whole)}
        for moment in ("exp_avg", "exp_avg_sq"):
            pairs[moment] = job.optimizer.state[weight][moment], optimizer.state[whole][moment]
        wrong += [f"{layer}.{name}" for name, (own, all_) in pairs.items() if not torch.equal(own, all_[experts])]
    prices = sorted({event.move_price[1] / event.move_price[0] for event in events})
    crossed = [sum(event.bytes_inside for event in events), sum(event.bytes_between for event in events)]
    slots = sum(event.slots_moved for event in events)
    return {"slots moved": slots, "bytes": crossed, "wrong": wrong, "prices": prices}


def crossed(comm: TorchComm, topology: Topology) -> dict[str, Any]:
    """Compare a rebalance that knows the nodes with one that does not: bytes over the links, and imbalance."""
    from benchmark_modules import imported

    bench_hosts = imported("train.bench_hosts")
    bench_hosts.ROW = 1 << 12
    generator = torch.Generator().manual_seed(7)
    popular = torch.rand(4, 64, generator=generator) ** 2 * 1000 + 100
    changed = popular * torch.exp(torch.randn(4, 64, generator=generator) / 3)
    before, after = (torch.poisson(one.expand(4, -1, -1), generator=generator).long() for one in (popular, changed))
    found = {}
    for name, known in (("aware", topology), ("unaware", Topology(1, comm.size))):
        told = bench_hosts.rebalanced(comm, known, None, before, after, 0)
        found[name] = {key: told[key] for key in ("crossed", "imbalance", "before")}
    return found


def write(path: Path, found: dict[str, Any]) -> None:
    """Write the file atomically, because another process waits for it."""
    draft = path.with_suffix(".part")
    draft.write_text(json.dumps(found))
    draft.replace(path)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
