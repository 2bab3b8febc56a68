"""Replicas in torchtitan's own models, on real ranks: the run with them is the run without."""

from __future__ import annotations

from typing import Any

from ranks import on_ranks
from test_torchtitan import furthest, logical
from titan_models import Job, meshes

from distplb.integrations.torchtitan import rebalancer


def run(replica_slots: int, iterations: int, every: int | None, **kind: Any) -> dict[str, Any]:
    job = Job(meshes(2), steps=iterations, **kind)
    events: list[Any] = []
    built = rebalancer(
        job.model,
        job.optimizers,
        every=every,
        replica_slots=replica_slots,
        parallel_dims=job.dims,
        gpus_per_node=2,
        replicas={"on_event": events.append, "sample_every": 1} if replica_slots else {},
    )
    losses = []
    for iteration in range(iterations):
        losses.append(job.step(iteration))
        job.optimizers.zero_grad()
        built.step()
    lent = [event.num_replicas for event in events]
    return {"loss": losses, "state": logical(job, built.placement), "lent": lent}


def both() -> Any:
    plain, lent = run(0, 6, None), run(2, 6, None)
    return furthest(lent["state"], plain["state"]), [plain["loss"], lent["loss"]], lent["lent"]


def test_it() -> None:
    print(on_ranks(2, both))
