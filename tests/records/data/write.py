"""Writes the files of a job with the distplb that is imported: `python tests/records/data/write.py FOLDER`."""

from __future__ import annotations

import sys
from dataclasses import fields, replace
from pathlib import Path

import torch

import distplb

LAYERS = ("blocks.0.moe", "blocks.1.moe")
TABLES = ([[0, 1, 2, 3], [0, 1, 2, 3]], [[0, 2, 1, 3], [3, 1, 2, 0]])
EVENT = {
    "iteration": 2,
    "layers": LAYERS,
    "decision": "moved",
    "reason": "the moves lower the cost",
    "seconds": {"count": 0.5},
    "last_applied": 2,
    "num_experts": 4,
    "num_nodes": 1,
    "steps": 4,
    "imbalance_before": (1.5, 1.25),
    "imbalance_after": (1.0, 1.125),
    "imbalance_bound": (1.0, 1.0),
    "tokens_of_gpu_before": ((30, 10), (20, 20)),
    "tokens_of_gpu_after": ((20, 20), (20, 20)),
    "hottest_experts": (((3, 25), (0, 5)), ((1, 20), (2, 10))),
    "time_curve": ((0, 0), (10, 100)),
}
NEXT = {"imbalance_next": (1.0, 1.25), "iteration_seconds_next": 0.25, "repaid": True}


def write(folder: Path) -> None:
    """Write a trace of two parts, a placement, and the records of two rebalances if this distplb has records."""
    placements = [distplb.Placement(torch.tensor(table), 4, 2) for table in TABLES]
    load = torch.arange(64).reshape(8, 2, 4) % 37
    with distplb.TraceWriter(folder, layers=LAYERS, note="a run") as writer:
        writer.add(load[:4], placements[0], [1, 1, 2, 2])
        writer.add(load[4:], placements[1], [3, 3, 4, 4])
    placements[1].save(folder / "placement.json", LAYERS)
    if not hasattr(distplb, "EventLog"):
        return
    names = {one.name for one in fields(distplb.RebalanceEvent)}
    event = distplb.RebalanceEvent(**{name: value for name, value in EVENT.items() if name in names})  # type: ignore[arg-type]
    log = distplb.EventLog(folder / "events.jsonl")
    log(event)
    log(replace(event, **NEXT))  # type: ignore[arg-type]
    log(replace(event, iteration=4, decision="kept", last_applied=4))
    log.close()


if __name__ == "__main__":
    write(Path(sys.argv[1]))
