"""The `cpu` engine: the steps compiled by Numba, on a few threads without the GIL.

Shapes: X rows, n items, E experts, P slots, M packs.
"""

from __future__ import annotations

import hashlib
import os
import stat
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from distplb.errors import DistplbError
from distplb.packing.settling import Terms

__all__ = ["finish", "is_there", "pack", "polish", "refine", "settle", "warm_up"]

_MOST_THREADS = 4
_ROOM_FOR_THREADS = 1 << 12  # slots below which threads cost more than they bring


def is_there() -> bool:
    """Whether Numba is installed; it is not imported for that."""
    return find_spec("numba") is not None


def pack(weight: Tensor, num_packs: int, *, layer: Tensor, candidate: Tensor, seed: int = 0) -> Tensor:
    """As `reference.pack`."""
    if weight.shape[1] == num_packs:
        return torch.arange(num_packs, device=weight.device).expand_as(weight).clone()
    tables = torch.empty(weight.shape, dtype=torch.int64, device="cpu")
    given = _array(weight), num_packs, _array(layer), _array(candidate), seed
    _in_threads(lambda begin, end: _kernels().pack_rows(*given, begin, end, tables.numpy()), tables)
    return tables.to(weight.device)


def finish(weight: Tensor, items: Tensor, num_packs: int) -> Tensor:
    """As `reference.finish`."""
    return _in_place("finish_rows", weight, items, num_packs)


def refine(
    weight: Tensor,
    num_packs: int,
    num_slots: int,
    *,
    layer: Tensor,
    candidate: Tensor,
    seed: int = 0,
    shared: bool = True,
) -> Tensor:
    """As `reference.refine`."""
    if num_slots == weight.shape[1] == num_packs:
        return torch.arange(num_packs, device=weight.device).expand_as(weight).clone()
    tables = torch.empty(len(weight), num_slots, dtype=torch.int64, device="cpu")
    given = _array(weight), num_packs, _array(layer), _array(candidate), seed, shared
    _in_threads(lambda begin, end: _kernels().refine_rows(*given, begin, end, tables.numpy()), tables)
    return tables.to(weight.device)


def polish(weight: Tensor, table: Tensor, num_packs: int) -> Tensor:
    """As `reference.polish`."""
    return _in_place("polish_rows", weight, table, num_packs)


def settle(terms: Terms, table: Tensor, num_packs: int, *, layer: Tensor, ceiling: Tensor) -> Tensor:
    """As `reference.settle`."""
    tables = table.to("cpu", torch.int64, copy=True).contiguous()
    num_layers = len(terms.load)
    free = (
        torch.zeros(num_layers, 1, 1, dtype=torch.int8, device="cpu"),
        torch.zeros(num_layers, 3, dtype=torch.int64, device="cpu"),
    )
    distance, price = free if terms.distance is None or terms.price is None else (terms.distance, terms.price)
    distance_array = distance.to("cpu", torch.int8).contiguous().numpy()
    given = _array(terms.load), _array(terms.region), terms.apart, distance_array, _array(price), num_packs
    names = _array(layer), _array(ceiling)
    amount = tables.numel() * terms.load.shape[1]
    _in_threads(lambda begin, end: _kernels().settle_rows(*given, *names, begin, end, tables.numpy()), tables, amount)
    return tables.to(table.device)


@cache
def warm_up() -> None:
    """Compile, or load what another process of this node compiled: once, a minute at most, before the training."""
    from filelock import FileLock

    weight, number = torch.arange(24, device="cpu").view(2, 12), torch.arange(2, device="cpu")
    with FileLock(_cache_folder() / "warm-up.lock"):  # the first process compiles, the others wait and load
        items = pack(weight, 3, layer=number, candidate=number)
        finish(weight, items, 3)
        for num_slots in (12, 18):
            table = polish(weight, refine(weight, 3, num_slots, layer=number, candidate=number), 3)
        settle(Terms(weight[:, None], torch.zeros(18, device="cpu")), table, 3, layer=number, ceiling=number)


def _in_place(kernel: str, weight: Tensor, table: Tensor, num_packs: int) -> Tensor:
    tables = table.to("cpu", torch.int64, copy=True).contiguous()
    given = _array(weight), num_packs
    _in_threads(lambda begin, end: getattr(_kernels(), kernel)(*given, begin, end, tables.numpy()), tables)
    return tables.to(weight.device)


def _array(value: Tensor) -> object:
    return value.to("cpu", torch.int64).contiguous().numpy()


def _in_threads(rows: Callable[[int, int], None], tables: Tensor, amount: int | None = None) -> None:
    """Call `rows(begin, end)` on parts of all rows, at once where there is enough to do.

    Threads of our own, because Numba's threading aborts when two threads of a process enter it at once; they end
    with the call, so that nothing is left behind in a process that forks.
    """
    amount = tables.numel() if amount is None else amount
    count = min(_threads(), len(tables)) if amount >= _ROOM_FOR_THREADS else 1
    if count == 1:
        rows(0, len(tables))
        return
    ends = [len(tables) * part // (4 * count) for part in range(4 * count + 1)]
    parts = iter(list(pairwise(ends)))

    def work() -> None:
        for begin, end in parts:  # whoever is free takes the next
            rows(begin, end)

    with ThreadPoolExecutor(count - 1) as pool:
        helping = [pool.submit(work) for _ in range(count - 1)]
        try:
            work()
        except BaseException:  # such as Ctrl-C: what nobody has begun is not waited for
            list(parts)
            raise
        for helper in helping:
            helper.result()


def _threads() -> int:
    """This rank's share of the node's cores, at most 4."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(_MOST_THREADS, len(os.sched_getaffinity(0)) // ranks))


@cache
def _kernels() -> ModuleType:
    """The kernels, with their machine code in a folder of this node that all its processes use."""
    import numba

    config: Any = numba.config  # its settings are made at run time
    given = config.CACHE_DIR
    config.CACHE_DIR = str(_cache_folder())
    try:
        from distplb.packing import cpu_kernels
    finally:
        config.CACHE_DIR = given
    return cpu_kernels


def _cache_folder() -> Path:
    """For machine code, on this node's own disk, because a home may be on a network's; NUMBA_CACHE_DIR where given.

    Raises:
        DistplbError: if somebody else could write there: what lies in it is executed.
    """
    given = os.environ.get("NUMBA_CACHE_DIR")
    folder = Path(given) if given else Path(tempfile.gettempdir()) / f"distplb-{os.getuid()}"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.lstat()
    if not given and (not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022):
        raise DistplbError(
            f"{folder} is not a folder that only you can write to, so compiled code cannot be kept there; "
            "remove it, or set NUMBA_CACHE_DIR to a folder of your own"
        )
    # Numba looks for changes in a function's own file only; the steps are in another one than their callers.
    own = Path(__file__).parent
    sources = b"".join((own / name).read_bytes() for name in ("cpu_steps.py", "cpu_settle.py", "cpu_kernels.py"))
    folder /= hashlib.sha256(sources).hexdigest()[:16]
    folder.mkdir(exist_ok=True)
    return folder
