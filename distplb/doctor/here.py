"""What can be said of this process alone: versions, devices, backends, engines, and what its launcher has told it.

Shapes: T steps, L layers, E experts.
"""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

import torch
from torch import Tensor

import distplb
from distplb.comm.job import backends
from distplb.core.placement import Placement
from distplb.core.topology import Topology
from distplb.doctor.finding import Finding, note, ok, wrong
from distplb.errors import DistplbError
from distplb.packing.engines import engine_named
from distplb.planning.plan import plan

__all__ = ["findings", "local_ranks", "versions"]

_ENGINES = ("reference", "cpu", "cuda")


class _MadeFor(NamedTuple):
    """The versions that distplb is made for, both included as far as they are written."""

    least: str
    most: str
    extra: str = ""  # needed only with this extra


_LIBRARIES = {
    "torch": _MadeFor("2.6", "2.13"),
    "numpy": _MadeFor("2.2", "2.4"),
    "scipy": _MadeFor("1.15", "1.17"),
    "numba": _MadeFor("0.68", "0.68", "fast"),
    "triton": _MadeFor("3.2", "3.9", "torchtitan"),
    "matplotlib": _MadeFor("3.11", "3.11", "report"),
    "mpi4py": _MadeFor("4.1", "4.1", "mpi"),
    "transformers": _MadeFor("5.23", "5.23", "huggingface"),
    "torchtitan": _MadeFor("0.3", "0.3", "torchtitan"),
    "megatron-core": _MadeFor("0.16.1", "0.16.1", "megatron"),
}
_PYTHON = _MadeFor("3.10", "3.13")


def versions() -> dict[str, str]:
    """Of distplb, Python, and the libraries that are installed."""
    found = {"distplb": distplb.__version__, "Python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def local_ranks() -> int:
    """Ranks of the job on this node, as torchrun tells them; 1 where nobody does."""
    told = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return max(1, int(told)) if told.isdecimal() else 1


def findings() -> Iterator[Finding]:
    """All that is looked at without the other ranks."""
    yield from _versions()
    yield from _devices(local_ranks())
    yield from _backends()
    yield from _engines()
    yield from _launcher()


def _versions() -> Iterator[Finding]:
    there = versions()
    yield ok("distplb", there["distplb"])
    yield _judged("Python", there["Python"], _PYTHON)
    for name, wanted in _LIBRARIES.items():
        if name in there:
            yield _judged(name, there[name], wanted)
        elif wanted.extra:
            yield ok(name, f"not installed; pip install 'distplb[{wanted.extra}]' brings it")
        else:
            yield wrong(name, f"not installed; pip install {name}")


def _judged(name: str, found: str, wanted: _MadeFor) -> Finding:
    numbers, most = _numbers(found), _numbers(wanted.most)
    range_ = wanted.least if wanted.least == wanted.most else f"{wanted.least} to {wanted.most}"
    if _numbers(wanted.least) <= numbers and numbers[: len(most)] <= most:
        return ok(name, f"{found}, made for {range_}")
    return note(name, f"{found} is not of {range_}, which distplb is made for; run its tests, or install one that is")


def _numbers(version_: str) -> tuple[int, ...]:
    """The leading ones, as in 2.13.0+cpu."""
    matched = re.match(r"\d+(?:\.\d+)*", version_)
    return tuple(int(part) for part in matched[0].split(".")) if matched else ()


def _devices(ranks: int) -> Iterator[Finding]:
    count = torch.cuda.device_count()
    for index in range(count):
        about = torch.cuda.get_device_properties(index)
        yield ok(f"GPU {index}", f"{about.name}, {about.total_memory / 2**30:.0f} GiB")
    if not count:
        yield ok("GPUs", "none; plans and moves run on the CPU")
    elif count < ranks:
        yield wrong("GPUs", f"{count} for {ranks} ranks on this node; start --nproc-per-node {count}")
    cores, threads = len(os.sched_getaffinity(0)), os.environ.get("OMP_NUM_THREADS")
    share = max(1, cores // ranks)
    yield ok(
        "CPU cores", f"{cores}, {torch.get_num_threads()} threads of torch, OMP_NUM_THREADS {threads or 'not set'}"
    )
    if ranks > 1 and not threads:
        yield note("OMP_NUM_THREADS", f"not set for {ranks} ranks on {cores} cores; set OMP_NUM_THREADS={share}")
    elif ranks * torch.get_num_threads() > cores and torch.get_num_threads() > 1:
        yield note(
            "OMP_NUM_THREADS", f"{ranks} ranks take more threads than {cores} cores; set OMP_NUM_THREADS={share}"
        )


def _backends() -> Iterator[Finding]:
    there = backends()
    yield ok("backends", f"{', '.join(name for name, is_there in there.items() if is_there) or 'none'} of torch")
    if not there["gloo"]:
        yield wrong("gloo", "torch was built without it, and ranks meet over it; install a torch of pytorch.org")
    if torch.cuda.is_available() and not there["nccl"]:
        yield wrong("NCCL", "torch was built without it, so GPUs cannot exchange; install torch's CUDA build for Linux")


# --- engines ----------------------------------------------------------------------------------------------------


def _engines() -> Iterator[Finding]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    taken, _ = engine_named(None, device)
    plans: dict[str, Placement] = {}
    for name in _ENGINES:
        try:
            plans[name] = plan(_small_load().to(device), Topology(1, 4), num_candidates=4, engine=name)
        except DistplbError as missing:
            plans.pop(name, None)
            if name == "cpu":
                yield note("engine cpu", str(missing))
        except Exception as broken:
            yield wrong(f"engine {name}", f"{broken!r}; plan with engine='reference'")
    others = [name for name, found in plans.items() if found != plans["reference"]]
    yield ok("engines", f"{', '.join(plans)}; {taken} is taken, {len(plans) - len(others)} make the same plan")
    for name in others:
        yield wrong(f"engine {name}", "plans otherwise than the reference; plan with engine='reference', and report it")


def _small_load() -> Tensor:
    """`[T, L, E]` = [4, 2, 16], the same everywhere."""
    return (torch.arange(4 * 2 * 16, device="cpu") * 2654435761 % 1009).reshape(4, 2, 16)


# --- the launcher -----------------------------------------------------------------------------------------------


def _launcher() -> Iterator[Finding]:
    try:
        topology = Topology.from_env()
    except DistplbError as told:
        nobody = str(told).startswith("no launcher")
        yield ok("launcher", "none, this process is alone") if nobody else wrong("launcher", str(told))
        return
    nodes = topology.num_nodes
    yield ok("launcher", f"{nodes} {'node' if nodes == 1 else 'nodes'} of {topology.gpus_per_node} ranks")
    if nodes > 1 and not os.environ.get("GLOO_SOCKET_IFNAME"):
        yield note(
            "GLOO_SOCKET_IFNAME",
            "not set, so gloo takes the address of the host's name; set it to the interface between the nodes, as in "
            "GLOO_SOCKET_IFNAME=eth0",
        )
