"""Runs a test on real processes with a process group: file rendezvous, a deadline, and no process left behind."""

from __future__ import annotations

import math
import multiprocessing
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

__all__ = ["START_SECONDS", "errors_on_ranks", "fork_server", "join_group", "mesh_of", "on_ranks", "outcomes_on_ranks"]

DEADLINE_SECONDS = 120
_HERE = (True, "here")
_PATIENCE = 3  # factor on deadlines, which are for hangs and should not expire because cores are busy
START_SECONDS = 300  # until all ranks have started; on a busy machine importing frameworks alone takes a minute


def on_ranks(size: int, body: Callable[..., Any], *args: Any, deadline: float = DEADLINE_SECONDS) -> list[Any]:
    """Call `body(*args)` on each of `size` ranks of a gloo group, and return the results by rank.

    The deadline, in seconds of a quiet machine, counts from when all ranks have started.

    Raises:
        AssertionError: with the traceback of each rank that raised, and the ranks that did not answer before the
            deadline. All processes have ended by then.
    """
    answers = _run(size, body, args, deadline)
    failed = [f"rank {rank}:\n{text}" for rank, (ok, text) in enumerate(answers) if not ok]
    assert not failed, "\n".join(failed)
    return [value for _, value in answers]


def errors_on_ranks(size: int, body: Callable[..., Any], *args: Any, deadline: float = DEADLINE_SECONDS) -> list[str]:
    """Like `on_ranks`, for a body that returns the text of the error that it caught."""
    found = on_ranks(size, body, *args, deadline=deadline)
    assert all(isinstance(text, str) for text in found), found
    return found


def outcomes_on_ranks(
    size: int,
    body: Callable[..., Any],
    *args: Any,
    deadline: float = DEADLINE_SECONDS,
    grace: float = math.inf,
) -> list[tuple[bool, Any]]:
    """Like `on_ranks`, for ranks that may fail: return, by rank, whether it answered, and the answer or why not.

    Once one rank has failed, the others have `grace` seconds to answer, because they may be waiting for it.
    """
    return _run(size, body, args, deadline, grace)


def _run(
    size: int, body: Callable[..., Any], args: tuple[Any, ...], deadline: float, grace: float = math.inf
) -> list[tuple[bool, Any]]:
    context = fork_server()
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_one_rank, args=(rank, size, folder, theirs, body, args), daemon=True)
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        try:
            return _collect(pipes, deadline, grace)
        finally:
            for pipe in pipes:
                pipe.close()
            end = time.monotonic() + 5
            for process in processes:
                process.join(max(0.0, end - time.monotonic()))
                if process.is_alive():
                    process.kill()
                    process.join()


def fork_server() -> Any:
    """Return a context whose processes start in tenths of a second, because torch and more is preloaded.

    Importing frameworks and loading the engine's machine code take longer than most tests run.
    """
    context = multiprocessing.get_context("forkserver")
    frameworks = [f"distplb.integrations.{name}" for name in ("huggingface", "torchtitan", "megatron")]
    context.set_forkserver_preload(["torch", "torch.distributed", "distplb", *frameworks, "warm_engine", "pytest"])
    with patch.dict(os.environ, {"PYTHONPATH": os.pathsep.join(sys.path)}):  # the fork server does not inherit sys.path
        forkserver.ensure_running()
    return context


def join_group(rank: int, size: int, folder: str) -> None:
    """Initialise the default group, with a file in the folder as rendezvous."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "gloo",
        init_method=f"file://{Path(folder) / 'rendezvous'}",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=START_SECONDS),
    )


def mesh_of(axes: str) -> DeviceMesh:
    """Build a mesh of EP 2 × data 2: EP groups are consecutive ranks ("edp ep"), or every other rank ("ep edp")."""
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=tuple(axes.split()))


def _collect(pipes: list[Connection], deadline: float, grace: float) -> list[tuple[bool, Any]]:
    here = _received(pipes, dict.fromkeys(range(len(pipes)), "has not started"), START_SECONDS)
    early = {rank: answer for rank, answer in here.items() if answer != _HERE}
    if early:
        return [early.get(rank, (False, "started, but other ranks did not")) for rank in range(len(pipes))]
    seconds = _PATIENCE * deadline
    answers = _received(pipes, dict.fromkeys(range(len(pipes)), f"no answer in {seconds} s"), seconds, grace)
    return [answers[rank] for rank in range(len(pipes))]


def _received(
    pipes: list[Connection], missing: dict[int, str], seconds: float, grace: float = math.inf
) -> dict[int, Any]:
    """Receive the next message of each rank; a rank without one gets its text of `missing`."""
    answers: dict[int, Any] = {}
    end = time.monotonic() + seconds
    while len(answers) < len(pipes) and time.monotonic() < end:
        open_pipes = [pipe for rank, pipe in enumerate(pipes) if rank not in answers]
        for pipe in wait(open_pipes, timeout=max(0.0, end - time.monotonic())):
            rank = pipes.index(pipe)  # type: ignore[arg-type]
            try:
                answers[rank] = pipes[rank].recv()
            except EOFError:
                answers[rank] = (False, "ended without an answer")
            if not answers[rank][0]:
                end = min(end, time.monotonic() + grace)
    return {rank: answers.get(rank, (False, text)) for rank, text in missing.items()}


def _one_rank(
    rank: int,
    size: int,
    folder: str,
    pipe: Connection,
    body: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    join_group(rank, size, folder)
    pipe.send(_HERE)
    try:
        # Not `send`, with which torch passes on handles of tensors instead of their values.
        pipe.send_bytes(pickle.dumps((True, body(*args))))
        # Until the reader closes its end: others may still be connecting to this rank, or reading what it sent them.
        wait([pipe])
    except BaseException:
        pipe.send((False, traceback.format_exc()))
    finally:
        pipe.close()
        dist.destroy_process_group()
