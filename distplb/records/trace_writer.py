"""`TraceWriter`: writes a trace in parts while a job runs.

Shapes: T steps of a part, L layers, E experts.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from distplb.core.arguments import refuse_wrong_types
from distplb.core.counts import Counts, as_integers, as_step_counts
from distplb.core.placement import Placement
from distplb.core.plain_tensor import as_tensor
from distplb.errors import DistplbError
from distplb.records.trace import Trace, write_trace
from distplb.records.trace_parts import check_folder

__all__ = ["TraceWriter"]


class TraceWriter:
    """Writes a trace in parts while a job runs, from a background thread; holds at most two parts in memory.

    A failure to write a part never stops the job: the next call warns, once, `error` keeps the exception, and nothing
    more is written. Even without `close`, all added parts are on disk when the process exits normally.

    >>> import tempfile
    >>> folder = tempfile.TemporaryDirectory()
    >>> with TraceWriter(folder.name) as writer:
    ...     for iteration in (0, 1):
    ...         writer.add(torch.tensor([[[3, 1]]]), Placement.contiguous(1, 2, 2), [iteration])
    >>> Trace.read(folder.name).load.shape
    torch.Size([2, 1, 2])
    >>> folder.cleanup()

    Args:
        folder: folder for the parts, created if it does not exist. Parts are named by their first iteration; a part of
            the same name is replaced. Nothing is written next to parts of another job. Parts of an earlier run of the
            same job stay, and `Trace.read` leaves out their steps from the iteration where this run begins.
        layers: names of the layers, as in `Trace`.
        note: as in `Trace`.
    """

    def __init__(self, folder: str | os.PathLike[str], *, layers: Sequence[str] = (), note: str = "") -> None:
        refuse_wrong_types({"folder": (folder, (str, os.PathLike), "the path of a folder")})
        refuse_wrong_types(
            {"layers": (layers, (Sequence,), "the names of the layers"), "note": (note, (str,), "a text")}
        )
        self.error: Exception | None = None
        self._folder, self._layers, self._note = Path(folder), tuple(layers), note
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="distplb-trace")
        self._room = threading.Semaphore(2)
        self._warned = self._closed = False
        self._life = 0  # which run of the job this is, by the folder; known once a part is written
        self._last = -1  # iteration written

    def add(self, load: Counts, placement: Placement, iterations: Counts) -> None:
        """Copy one part and return; waits only while two earlier parts are still being written.

        Args:
            load: `[T, L, E]`, tokens of each expert, of any dtype that holds them exactly.
            placement: the placement that the steps ran under.
            iterations: `[T]` integers, the job's iteration of each step.

        Raises:
            DistplbError: if the writer is closed, or if arguments are not counts, a placement and iterations.
        """
        self._warn()
        if self._closed:
            raise DistplbError(f"the trace in {self._folder} is closed; create another TraceWriter")
        refuse_wrong_types({"placement": (placement, (Placement,), "a Placement")})
        values = as_tensor("load", load)
        if self.error is not None or (values.dim() == 3 and not len(values)):
            return
        counts = as_step_counts("load", values, self._layers).to("cpu", copy=True)
        numbers = as_integers("iterations", iterations, "integers").to("cpu", copy=True)
        self._room.acquire()
        self._thread.submit(self._write, counts, placement, numbers)

    def close(self) -> None:
        """Wait until all parts are written."""
        self._closed = True
        self._thread.shutdown()
        self._warn()

    def __enter__(self) -> TraceWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _write(self, load: Tensor, placement: Placement, iteration: Tensor) -> None:
        try:
            if self.error is None:
                trace = Trace(load, (placement,), torch.zeros(len(load), dtype=torch.int64, device="cpu"), iteration)
                trace = replace(trace, layers=self._layers or trace.layers, note=self._note)
                self._folder.mkdir(parents=True, exist_ok=True)
                if not self._life:
                    self._life = check_folder(self._folder, trace.layers, trace.num_experts, placement.num_gpus)
                first, last = int(trace.iteration[0]), int(trace.iteration[-1])
                self._life, self._last = self._life + (first <= self._last), last  # a job that went back
                write_trace(trace, self._folder / f"{first:012d}.npz", self._life)
        except Exception as error:
            self.error = error
        finally:
            self._room.release()

    def _warn(self) -> None:
        if self.error is not None and not self._warned:
            self._warned = True
            warnings.warn(
                f"no more parts of the trace are written to {self._folder}: {self.error}", RuntimeWarning, stacklevel=3
            )
