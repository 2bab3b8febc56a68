"""Checks that involve all ranks: whether versions agree, how fast ranks exchange, and whether a small move arrives.

Every function is collective. Shapes: L layers, E experts, P slots, G slots on each GPU.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from distplb.comm.base import Comm
from distplb.core.layer import MoELayer
from distplb.core.placement import Placement
from distplb.core.topology import Topology
from distplb.doctor.finding import Finding, Timing, ok, wrong
from distplb.train.options import Moves
from distplb.train.rebalancer import Rebalancer
from distplb.train.window import LoadWindow

__all__ = ["collectives", "merge_findings", "same_versions", "small_move", "wait_for_device"]

_MIB = 1 << 20
_SIZES = (_MIB, 64 * _MIB)
_ROUNDS = 4  # the first one is not timed
_LAYERS, _SLOTS_PER_GPU, _ROWS, _COLUMNS = 2, 4, 256, 512  # an expert has 0.5 MiB, and two moments of that size


def _gathered(comm: Comm, text: str) -> list[str]:
    """All-gather a text from each rank."""
    data = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
    sizes = torch.zeros(comm.size, dtype=torch.int64, device=comm.device)
    sizes[comm.rank] = len(data)
    comm.all_reduce_sum(sizes)
    texts = torch.zeros(comm.size, int(sizes.max()), dtype=torch.int64, device=comm.device)
    texts[comm.rank, : len(data)] = data.to(comm.device)
    comm.all_reduce_sum(texts)
    return [bytes(row[:size]).decode() for row, size in zip(texts.tolist(), sizes.tolist(), strict=True)]


def merge_findings(comm: Comm, own: Sequence[Finding]) -> list[Finding]:
    """Return rank 0's findings, then the notes and errors of other ranks that rank 0 does not have."""
    texts = _gathered(comm, json.dumps(own if comm.rank == 0 else [one for one in own if one.level != "ok"]))
    first, *others = ([Finding(*one) for one in json.loads(text)] for text in texts)
    extra = [
        one._replace(text=f"rank {rank}: {one.text}")
        for rank, findings in enumerate(others, 1)
        for one in findings
        if one not in first
    ]
    return [*first, *extra]


def same_versions(comm: Comm, own: Mapping[str, str]) -> Iterator[Finding]:
    """Compare versions: ranks of different versions may plan differently, or store their state differently."""
    root, *others = (json.loads(text) for text in _gathered(comm, json.dumps(dict(own))))
    alike = True
    for rank, versions in enumerate(others, 1):
        for name in sorted({*root, *versions}):
            here, there = root.get(name, "none"), versions.get(name, "none")
            if here != there:
                alike = False
                yield wrong(name, f"rank 0 has {here}, rank {rank} has {there}; install the same version on all nodes")
    if alike:
        yield ok("versions", f"the same on {comm.size} ranks")


# --- exchanging -------------------------------------------------------------------------------------------------


def collectives(comm: Comm) -> Iterator[Timing | Finding]:
    """Time each call at 1 MiB and 64 MiB, and check the result.

    Raises:
        LostRanksError: naming the ranks that did not arrive before the communicator's deadline.
    """
    for size in _SIZES:
        for name, call in _CALLS.items():
            seconds, arrived = _timed(comm, call, size)
            yield Timing(f"{name}, {size // _MIB} MiB", size, seconds)
            if not arrived:
                yield wrong(name, f"{size // _MIB} MiB arrived with wrong values; check the network and its driver")


def _timed(comm: Comm, call: Callable[[Comm, Tensor], bool], size: int) -> tuple[float, bool]:
    seconds, arrived = [], True
    for _ in range(_ROUNDS):
        data = torch.full((size // 8,), 1 + comm.rank, dtype=torch.int64, device=comm.device)
        wait_for_device(comm.device)
        began = time.perf_counter()
        result = call(comm, data)
        wait_for_device(comm.device)
        seconds.append(time.perf_counter() - began)
        arrived = arrived and result
    return statistics.median(seconds[1:]), arrived


def wait_for_device(device: torch.device) -> None:
    """Wait until a GPU has computed all that it was given, so that times are those of the work itself."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _sum(comm: Comm, data: Tensor) -> bool:
    comm.all_reduce_sum(data)
    return _ends_with(data, comm.size * (comm.size + 1) // 2)


def _min(comm: Comm, data: Tensor) -> bool:
    comm.all_reduce_min(data)
    return _ends_with(data, 1)


def _broadcast(comm: Comm, data: Tensor) -> bool:
    comm.broadcast(data, comm.size - 1)
    return _ends_with(data, comm.size)


def _exchange(comm: Comm, data: Tensor) -> bool:
    room = torch.empty_like(data)
    before = (comm.rank - 1) % comm.size
    comm.exchange([([(data, (comm.rank + 1) % comm.size)], [(room, before)])])
    return _ends_with(room, 1 + before)


def _ends_with(data: Tensor, value: int) -> bool:
    """Check both ends only, because the check is timed along with the call."""
    return int(data[0]) == int(data[-1]) == value


_CALLS = {"sum": _sum, "min": _min, "broadcast": _broadcast, "exchange": _exchange}


# --- moving -----------------------------------------------------------------------------------------------------


def small_move(comm: Comm, topology: Topology) -> Iterator[Timing | Finding]:
    """Move every expert to the next GPU with its AdamW state, compare checksums, and check every value.

    Raises:
        DistplbError: on all ranks, with the reason, if one rank refuses; or if ranks are lost.
    """
    size = comm.size * _SLOTS_PER_GPU
    weights = [nn.Parameter(torch.zeros(_SLOTS_PER_GPU, _ROWS, _COLUMNS, device=comm.device)) for _ in range(_LAYERS)]
    routers = [nn.Parameter(torch.zeros(size, 1, device=comm.device)) for _ in range(_LAYERS)]
    optimizer = torch.optim.AdamW([*weights, *routers])
    experts = torch.arange(size, device=comm.device)
    _fill(weights, routers, optimizer, experts, experts.unflatten(0, (comm.size, -1))[comm.rank])
    layers = [
        MoELayer(name=f"layer {at}", experts={"w": weight}, router={"weight": router})
        for at, (weight, router) in enumerate(zip(weights, routers, strict=True))
    ]
    window = LoadWindow(_LAYERS, size, 1, device=comm.device)
    rebalancer = Rebalancer(
        layers, optimizer, topology=topology, comm=comm, every=1, window=window, moves=Moves(verify="digest")
    )
    target = experts.cpu().roll(_SLOTS_PER_GPU)  # [P]
    began = time.perf_counter()
    rebalancer.apply(Placement(target.expand(_LAYERS, -1), size, comm.size))
    wait_for_device(comm.device)
    seconds = time.perf_counter() - began
    rebalancer.close()
    moved = 3 * _LAYERS * size * _ROWS * _COLUMNS * weights[0].element_size()
    yield Timing(f"move of {moved // _MIB} MiB, with AdamW state", moved, seconds)
    mine = target.unflatten(0, (comm.size, -1))[comm.rank].to(comm.device)
    if not _is_filled(weights, optimizer, mine):
        yield wrong("move", "experts or their state arrived with wrong values; report this as a bug of distplb")


def _fill(
    weights: Sequence[nn.Parameter],
    routers: Sequence[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    experts: Tensor,
    mine: Tensor,
) -> None:
    """Set the weights of expert e to e, and its moments to e + 1/4 and e + 1/2."""
    for parameter in (*weights, *routers):
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # creates the state
    optimizer.zero_grad()
    with torch.no_grad():
        for weight in weights:
            for tensor, value in zip(_state(weight, optimizer), (0, 0.25, 0.5), strict=True):
                tensor.copy_((mine + value)[:, None, None].expand_as(tensor))
        for router in routers:
            router.copy_(experts[:, None].to(router.dtype))


def _is_filled(weights: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer, mine: Tensor) -> bool:
    return all(
        bool((tensor == (mine + value)[:, None, None]).all())
        for weight in weights
        for tensor, value in zip(_state(weight, optimizer), (0, 0.25, 0.5), strict=True)
    )


def _state(weight: nn.Parameter, optimizer: torch.optim.Optimizer) -> tuple[Tensor, Tensor, Tensor]:
    state = optimizer.state[weight]
    return weight.data, state["exp_avg"], state["exp_avg_sq"]
