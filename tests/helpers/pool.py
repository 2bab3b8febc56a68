"""Rank processes that persist between calls: objects that a test builds in them stay until they are replaced."""

from __future__ import annotations

import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist
from ranks import START_SECONDS, fork_server, join_group

__all__ = ["Pool"]

_GRACE_SECONDS = 3.0  # how long the other ranks may take to answer once one has failed


class Pool:
    """`size` ranks of a gloo group, each of which runs one call after another.

    A call that fails on any rank, or is not answered by all ranks before the deadline, ends the processes; the next
    call starts new ones.
    """

    def __init__(self, size: int, deadline: float = 180.0) -> None:
        self._size, self._deadline = size, deadline
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def call(self, body: Callable[..., Any], *args: Any) -> list[Any]:
        """Call `body(*args)` on each rank, and return the results by rank.

        Raises:
            AssertionError: with the traceback of each rank that raised, and the ranks that did not answer.
        """
        seconds = self._deadline
        if not self._processes:
            self._start()
            seconds += START_SECONDS
        for pipe in self._pipes:
            pipe.send((body, args))
        answers: dict[int, tuple[bool, Any]] = {}
        end = time.monotonic() + seconds
        while len(answers) < self._size and time.monotonic() < end:
            silent = [pipe for rank, pipe in enumerate(self._pipes) if rank not in answers]
            for pipe in wait(silent, timeout=max(0.0, end - time.monotonic())):
                rank = self._pipes.index(pipe)  # type: ignore[arg-type]
                try:
                    answers[rank] = self._pipes[rank].recv()
                except EOFError:
                    answers[rank] = (False, "ended without an answer")
                if not answers[rank][0]:  # the others may be waiting for it
                    end = min(end, time.monotonic() + _GRACE_SECONDS)
        failed = [f"rank {rank}:\n{text}" for rank, (ok, text) in sorted(answers.items()) if not ok]
        failed += [f"rank {rank}: no answer" for rank in range(self._size) if rank not in answers]
        if failed:
            self.close()
        assert not failed, "\n".join(failed)
        return [answers[rank][1] for rank in range(self._size)]

    def close(self) -> None:
        """End all processes."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(2)
            if process.is_alive():
                process.kill()
                process.join()
        if self._folder is not None:
            self._folder.cleanup()
        self._processes, self._pipes, self._folder = [], [], None

    def _start(self) -> None:
        context = fork_server()
        self._folder = tempfile.TemporaryDirectory()
        for rank in range(self._size):
            here, there = context.Pipe()
            arguments = (rank, self._size, self._folder.name, there)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            there.close()
            self._pipes.append(here)
            self._processes.append(process)


def _serve(rank: int, size: int, folder: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    join_group(rank, size, folder)
    try:
        while True:
            try:
                body, args = pipe.recv()
            except EOFError:
                return
            try:
                pipe.send((True, body(*args)))
            except BaseException:
                pipe.send((False, traceback.format_exc()))
    finally:
        dist.destroy_process_group()
