"""A job with replicas whose rank is killed in a step: torchrun starts it again, and it is the job without replicas."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import lending_job
import pytest
from lending_job import ITERATIONS, KILLED_AT, SAVE_EVERY, Job
from ranks import on_ranks


def undisturbed(replica_slots: int) -> tuple[list[float], int]:
    job = Job(replica_slots, None)
    return job.train(0), job.steps_with_replicas


@pytest.fixture(scope="module")
def losses() -> list[float]:
    """Of the job without replicas, which nobody kills."""
    found, steps = on_ranks(2, undisturbed, 0)[0]
    assert not steps
    return found


# The push of a forward, and the gradients of its backward; the rest is one case more in the long form.
@pytest.mark.parametrize("stage", ["push", "bring home", pytest.param("count", marks=pytest.mark.long)])
def test_torchrun_restarts_a_job_that_was_killed_in_a_step(stage: str, losses: list[float], tmp_path: Path) -> None:
    launcher = [
        "--standalone",
        "--nproc-per-node",
        "2",
        "--max-restarts",
        "3",
    ]  # more than one, because a port may be taken
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *launcher, lending_job.__file__, str(tmp_path), stage],
        # Without the last one torch 2.13 reuses the store of the killed run after the restart, and gloo its addresses.
        env=os.environ
        | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
        timeout=400,
        check=True,
    )
    assert (tmp_path / lending_job.KILLED).exists()
    done = KILLED_AT // SAVE_EVERY * SAVE_EVERY
    for rank in range(2):
        found = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert found["done"] == done
        assert found["losses"] == pytest.approx(losses[done:], rel=1e-12)
        assert found["steps with replicas"] == 2 * (ITERATIONS - done)


def test_a_loss_would_show_a_step_that_was_trained_twice(losses: list[float]) -> None:
    """The control: an iteration more changes the losses by far more than replicas do."""
    assert losses[5] != pytest.approx(losses[4], rel=1e-3)
    with_replicas, steps = on_ranks(2, undisturbed, 2)[0]
    assert steps == 2 * ITERATIONS
    assert with_replicas == pytest.approx(losses, rel=1e-12)
