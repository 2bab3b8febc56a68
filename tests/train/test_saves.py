"""Real asynchronous saves of torch.distributed.checkpoint while rebalances are due.

Shapes: L layers, E experts.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from jobs import EXPERTS, LAYERS, Job, by_slot, skewed
from ranks import on_ranks
from stagers import DefaultStager, StagingOptions, needs_stagers
from torch import Tensor

from distplb import Placement

pytestmark = needs_stagers


class LiveStager:
    """Passes on the original tensors, as torch 2.6 does on the CPU; directly, or by a future."""

    should_synchronize_after_execute = False

    def __init__(self, by_a_future: bool) -> None:
        self.by_a_future = by_a_future

    def stage(self, state_dict: Any) -> Any:
        if not self.by_a_future:
            return state_dict
        from concurrent.futures import Future

        staged = Future[Any]()
        staged.set_result(state_dict)
        return staged

    def synchronize_staging(self) -> None:
        """Do nothing: no staging is under way."""

    def close(self) -> None:
        """Do nothing: there are no resources."""


class SlowWriter(dcp.FileSystemWriter):
    """Waits before it reads the tensors that it writes."""

    def write_data(self, plan: Any, planner: Any) -> Any:
        time.sleep(0.2)
        return super().write_data(plan, planner)


def saved_beside(folder: str, stager: str, until: Any) -> tuple[bool, bool, bool, bool]:
    """Whether the saved rows fit the saved placement, whether experts moved, and whether before the save ended.

    The last value is a control: whether the saved rows fit the placement after the move.
    """
    rank, job = dist.get_rank(), Job()
    rebalancer = job.rebalancer(every=1, stop_loss=0)
    logical = [
        torch.arange(EXPERTS, dtype=torch.float32)[rank * 4 : rank * 4 + 4] + 100 * layer for layer in range(LAYERS)
    ]
    for weight, own in zip(job.weights, logical, strict=True):
        weight.data.copy_(own[:, None, None].expand_as(weight))
    staging = {
        "live, at once": LiveStager(False),
        "live, by a future": LiveStager(True),
        "copied, by a future": DefaultStager(StagingOptions(False, False, True, False)),
        "copied, at once": DefaultStager(StagingOptions(False, False, False, False)),
    }[stager]
    state = {f"{rank}.{layer}": weight.detach() for layer, weight in enumerate(job.weights)}
    told = rebalancer.state_dict()["layers"]
    writer = SlowWriter(Path(folder))
    response = dcp.async_save(state, storage_writer=writer, process_group=dist.new_group(), async_stager=staging)
    rebalancer.saving(response, until=until)
    written, early = getattr(response, "upload_completion", response), False
    # No optimizer step, which would change tensors that are still being read; trainers avoid that themselves.
    for iteration in range(40):
        if iteration == 30:
            written.result(timeout=30)
            dist.barrier()
        for layer in range(LAYERS):
            job.window.add(layer, by_slot(skewed((0, 1)), rebalancer.placement)[layer])
        rebalancer.step()
        early |= rebalancer.last_applied > 0 and not written.done()
        time.sleep(0.01)
    read = {key: torch.zeros_like(value) for key, value in state.items()}
    dcp.load(read, checkpoint_id=folder)

    def is_of(rows: Tensor, row: Tensor, layer: int) -> bool:
        return rows[:, 0, 0].tolist() == (row[rank * 4 : rank * 4 + 4] + 100.0 * layer).tolist()

    right = all(is_of(read[f"{rank}.{n}"], told[f"moe.{n}"]["expert_of_slot"], n) for n in range(LAYERS))
    now = rebalancer.placement
    moved = now != Placement.contiguous(LAYERS, EXPERTS, 2)
    elsewhere = all(is_of(read[f"{rank}.{n}"], now.expert_of_slot[n], n) for n in range(LAYERS))
    staging.close()
    return right, moved, early, elsewhere


@pytest.mark.parametrize(
    ("stager", "until"),
    [
        ("live, at once", "written"),
        ("live, by a future", "written"),
        ("copied, by a future", "written"),
        ("copied, by a future", "staged"),
        ("copied, at once", "staged"),  # a plain future, which does not report staging
    ],
)
def test_a_checkpoint_tells_the_placement_whose_rows_it_holds(stager: str, until: str, tmp_path: Path) -> None:
    """It had one placement and the rows of another if the staged tensors were the originals."""
    for right, moved, early, elsewhere in on_ranks(2, saved_beside, str(tmp_path), stager, until, deadline=90):
        assert right
        assert moved
        assert early == (until == "staged" and stager == "copied, by a future")
        assert not elsewhere
