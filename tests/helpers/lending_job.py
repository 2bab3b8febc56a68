"""A job with replicas for torchrun: a rank is killed in a step of the first run, and the second run resumes.

    torchrun --standalone --nproc-per-node 2 --max-restarts 3 tests/helpers/lending_job.py FOLDER push

Each rank of the second run writes to FOLDER/rank<number>.json from where it resumed, its losses, and in how many of its
steps replicas were lent. Shapes: N tokens of a rank, D dim, H ffn, G own slots.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lending import Step, moe
from torch import Tensor

from distplb import StepBalancer, Topology
from distplb.replicas.stages import StepStages

__all__ = ["ITERATIONS", "KILLED_AT", "SAVE_EVERY", "Job"]

DIM, HIDDEN, OWN, LAYERS = 4, 8, 2, 2
ITERATIONS, SAVE_EVERY, KILLED_AT = 12, 4, 7
KILLED = "killed"  # the file that tells so


class Job:
    """Layers of experts after each other, trained with AdamW to reproduce what they get.

    Args:
        replica_slots: R.
        folder: of the checkpoints; None saves nothing.
    """

    def __init__(self, replica_slots: int, folder: Path | None) -> None:
        self.size, self.rank, self.folder = dist.get_world_size(), dist.get_rank(), folder
        gen = torch.Generator().manual_seed(self.rank)
        shapes = [(OWN, DIM, HIDDEN), (OWN, HIDDEN, DIM)] * LAYERS
        self.weights = [torch.randn(one, generator=gen, dtype=torch.float64).requires_grad_() for one in shapes]
        self.optimizer = torch.optim.AdamW(self.weights, lr=1e-2)
        self.balancer = StepBalancer(
            topology=Topology(1, self.size), num_experts=OWN * self.size, replica_slots=replica_slots, deadline=60
        )
        self.steps_with_replicas = 0

    def iterate(self, iteration: int) -> float:
        """The loss of an iteration, summed over the ranks."""
        gen = torch.Generator().manual_seed(100 * iteration + self.rank)
        slots = OWN * self.size
        ids = torch.cat([torch.full((12, 1), iteration % slots), torch.arange(slots)[:, None]])  # one expert is hot
        x = torch.randn(len(ids), DIM, generator=gen, dtype=torch.float64)
        y, gate = x, torch.ones(len(ids), 1, dtype=torch.float64)
        for layer in range(LAYERS):
            self.steps_with_replicas += self._is_lent(ids)
            y = y + moe(self.balancer, str(layer), Step(y, ids, gate), self.weights[2 * layer : 2 * layer + 2])
        loss = (y - x.roll(1, 0)).pow(2).mean()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        total: Tensor = loss.detach().clone()
        dist.all_reduce(total)
        return float(total)

    def _is_lent(self, ids: Tensor) -> bool:
        """Whether a step of these ids has replicas; collective, and a step of its own, which computes nothing."""
        return not self.balancer.dispatch("looked at", ids).is_trivial

    def train(self, first: int) -> list[float]:
        losses = []
        for iteration in range(first, ITERATIONS):
            losses.append(self.iterate(iteration))
            if self.folder is not None and (iteration + 1) % SAVE_EVERY == 0:
                self._save(iteration + 1)
        return losses

    def _save(self, done: int) -> None:
        assert self.folder is not None
        state = {"weights": [one.detach() for one in self.weights], "optimizer": self.optimizer.state_dict()}
        torch.save(state, self.folder / f"{done}.{self.rank}.pt")
        dist.barrier()
        (self.folder / f"{done}.whole").touch()

    def resume(self) -> int:
        """Load the newest whole checkpoint; returns how many iterations are done."""
        assert self.folder is not None
        done = max((int(path.stem) for path in self.folder.glob("*.whole")), default=0)
        if done:
            state: Any = torch.load(self.folder / f"{done}.{self.rank}.pt")
            for weight, saved in zip(self.weights, state["weights"], strict=True):
                weight.data.copy_(saved)
            self.optimizer.load_state_dict(state["optimizer"])
        return done


def kill_in(stage: str, job: Job) -> None:
    """Let rank 1 die by signal 9 in a stage of iteration `KILLED_AT`."""
    whole, iterate, at = StepStages.stage, job.iterate, [-1]

    @contextmanager
    def entered(self: StepStages, name: str, *sample: Any) -> Iterator[None]:
        with whole(self, name, *sample):
            if name == stage and at[0] == KILLED_AT and job.rank == 1:
                assert job.folder is not None
                (job.folder / KILLED).touch()
                os.kill(os.getpid(), signal.SIGKILL)
            yield

    def counted(iteration: int) -> float:
        at[0] = iteration
        return iterate(iteration)

    StepStages.stage = entered  # type: ignore[method-assign]
    job.iterate = counted  # type: ignore[method-assign]


def main() -> None:
    folder, stage = sys.argv[1:]
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    job = Job(2, Path(folder))
    assert job.folder is not None
    # Not torchrun's count of restarts, because a rank may also fail to start, such as on a port that is taken.
    is_restarted = (job.folder / KILLED).exists()
    if not is_restarted:
        kill_in(stage, job)
    done = job.resume() if is_restarted else 0
    found = {"done": done, "losses": job.train(done), "steps with replicas": job.steps_with_replicas}
    if is_restarted:
        Path(folder, f"rank{job.rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
