"""Background work: one task at a time, in its own thread and on its own CUDA stream."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch

__all__ = ["Background"]


class Background:
    """A thread for background work, started when it is first used.

    Args:
        device: if it is a GPU, tasks run on a separate stream of it, and see all that the training stream has written
            when they are started.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._thread: ThreadPoolExecutor | None = None
        self._stream: torch.cuda.Stream | None = None

    def start(self, run: Callable[[], None]) -> Callable[[], None]:
        """Run a task in the background, after those started before.

        Returns:
            A function that waits until the task has ended, and raises what it raised.
        """
        if self._thread is None:
            self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="distplb")
        if self._device.type != "cuda":
            return _waiting(self._thread.submit(run))
        if self._stream is None:
            self._stream = torch.cuda.Stream(self._device)
        written = torch.cuda.current_stream(self._device).record_event()
        return _waiting(self._thread.submit(self._on_stream, run, self._stream, written))

    def close(self) -> None:
        """Wait for pending tasks and end the thread."""
        if self._thread is not None:
            self._thread.shutdown()
            self._thread = None

    def _on_stream(self, run: Callable[[], None], stream: torch.cuda.Stream, written: torch.cuda.Event) -> None:
        with torch.cuda.stream(stream):
            stream.wait_event(written)
            run()
        # So the training stream can use the results without waiting for this stream.
        stream.synchronize()


def _waiting(future: Future[None]) -> Callable[[], None]:
    def wait() -> None:
        future.result()

    return wait
