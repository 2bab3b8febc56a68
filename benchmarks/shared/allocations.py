"""The most bytes of tensors that are alive at once on a CPU, from the events of torch's allocator.

The resident size of a process does not tell: it hardly changes when tensors are freed.
"""

from __future__ import annotations

import json
import tempfile
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

__all__ = ["Allocations", "peaks_of", "released"]

MEMORY, WINDOW = "[memory]", "window of allocations "
UNSEEN = 0.05  # of the peak, over all windows: what small rows of counts amount to


class Allocations:
    """Watches what is allocated from now on, and tells the peak in each window.

    What was allocated before does not count, and neither does it when it is freed. Only this thread is watched, so it
    has to be the one that frees: see `released`.

    >>> import torch
    >>> with Allocations() as allocations:
    ...     weights = torch.empty(1000)
    ...     for size in (10, 20):
    ...         with allocations.window():
    ...             activations = torch.empty(100 * size)
    ...             del activations
    >>> allocations.peaks  # bytes: those of `weights`, and of each window's `activations`
    [8000, 12000]
    """

    def __init__(self) -> None:
        self.peaks: list[int] = []
        self._windows = 0
        self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)

    def __enter__(self) -> Allocations:
        self._profile.__enter__()
        return self

    @contextmanager
    def window(self) -> Iterator[None]:
        """A time whose peak is told."""
        self._windows += 1
        with record_function(f"{WINDOW}{self._windows}"):
            yield

    def __exit__(self, *of_error: Any) -> None:
        self._profile.__exit__(*of_error)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            self._profile.export_chrome_trace(str(path))
            self.peaks = peaks_of(json.loads(path.read_text())["traceEvents"])


def released(tensors: Sequence[Tensor], call: Callable[[], object]) -> None:
    """Call a function, and wait until nobody else holds the tensors who did not hold them before.

    gloo's threads hold what they sent a little longer than its caller waits. A tensor that its caller drops at once is
    then freed by one of them, which no profile tells.
    """
    before = [tensor._use_count() for tensor in tensors]  # type: ignore[attr-defined]
    call()
    while any(tensor._use_count() > uses for tensor, uses in zip(tensors, before, strict=True)):  # type: ignore[attr-defined]
        time.sleep(0)


def peaks_of(events: list[dict[str, Any]]) -> list[int]:
    """The most bytes held in each window, windows in their order.

    Args:
        events: of a Chrome trace; allocations have "Addr" and "Bytes", which are negative where memory is freed.

    Raises:
        AssertionError: if other threads freed more than UNSEEN, as allocations at the same addresses show.
    """
    windows = sorted(
        (float(one["ts"]), float(one["ts"]) + float(one["dur"]))
        for one in events
        if str(one.get("name", "")).startswith(WINDOW)
    )
    changes = sorted((one for one in events if one.get("name") == MEMORY), key=lambda one: float(one["ts"]))
    held, totals = dict[int, int](), [0]  # bytes by address; all bytes after each change
    unseen = 0  # bytes at addresses that are allocated anew without having been freed
    for change in changes:
        address, size = change["args"]["Addr"], int(change["args"]["Bytes"])
        gone = held.pop(address, 0)
        if size > 0:
            held[address], unseen = size, unseen + gone
            totals.append(totals[-1] + size - gone)
        else:
            totals.append(totals[-1] + size)
    if unseen > UNSEEN * max(totals):
        raise AssertionError(
            f"{unseen} bytes were freed by threads that nobody watches, and {max(totals)} were held; pass the tensors "
            "to `released`"
        )
    times = [float(change["ts"]) for change in changes]
    return [max(totals[bisect_right(times, begin) : bisect_right(times, end) + 1]) for begin, end in windows]
