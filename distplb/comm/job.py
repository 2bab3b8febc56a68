"""The job that torchrun has started: the rank of this process in it, and a process group of all its ranks."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from distplb.comm.torchdist import TorchComm
from distplb.errors import DistplbError

__all__ = ["backends", "job_rank_and_size", "process_group"]


def job_rank_and_size() -> tuple[int, int] | None:
    """The rank of this process in the job, and the job's size; None if torch.distributed is not initialised."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else None


def backends() -> dict[str, bool]:
    """Which communication libraries this torch was built with."""
    if not dist.is_available():
        return {"gloo": False, "nccl": False}
    return {"gloo": dist.is_gloo_available(), "nccl": dist.is_nccl_available()}


@contextmanager
def process_group(deadline: float) -> Iterator[TorchComm]:
    """A communicator of all ranks that torchrun has started: over NCCL if each has its own GPU, else over gloo.

    Args:
        deadline: seconds that a call may wait for the other ranks.

    Raises:
        DistplbError: if the ranks cannot connect to each other.
    """
    local, on_node = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    with_gpus = backends()["nccl"] and torch.cuda.device_count() >= on_node
    if with_gpus:
        torch.cuda.set_device(local)
    try:
        dist.init_process_group("nccl" if with_gpus else "gloo", timeout=timedelta(seconds=2 * deadline))
    except (RuntimeError, ValueError) as error:
        raise DistplbError(f"the ranks cannot connect to each other ({error}); start all with torchrun") from error
    try:
        yield TorchComm(deadline=deadline)
    finally:
        # A live reference to the group keeps its threads; a thread that needs the interpreter after its end aborts.
        gc.collect()
        dist.destroy_process_group()
