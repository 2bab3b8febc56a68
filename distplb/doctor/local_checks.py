"""Checks of this process only: versions, devices, backends, engines, and the variables set by its launcher.

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


class _Supported(NamedTuple):
    """The supported versions: `minimum` to `maximum` inclusive, compared to as many digits as these have."""

    minimum: str
    maximum: str
    extra: str = ""  # the extra that needs the library, if it is optional


_LIBRARIES = {
    "torch": _Supported("2.6", "2.13"),
    "numpy": _Supported("2.2", "2.4"),
    "scipy": _Supported("1.15", "1.17"),
    "numba": _Supported("0.68", "0.68", "fast"),
    "triton": _Supported("3.2", "3.9", "torchtitan"),
    "matplotlib": _Supported("3.11", "3.11", "report"),
    "mpi4py": _Supported("4.1", "4.1", "mpi"),
    "transformers": _Supported("5.23", "5.23", "huggingface"),
    "torchtitan": _Supported("0.3", "0.3", "torchtitan"),
    "megatron-core": _Supported("0.16.1", "0.16.1", "megatron"),
}
_PYTHON = _Supported("3.10", "3.13")


def versions() -> dict[str, str]:
    """The versions of distplb, Python and the installed libraries."""
    installed = {"distplb": distplb.__version__, "Python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            installed[name] = version(name)
        except PackageNotFoundError:
            continue
    return installed


def local_ranks() -> int:
    """Ranks of the job on this node, from the variable that torchrun sets; 1 if it is not set."""
    size = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return max(1, int(size)) if size.isdecimal() else 1


def findings() -> Iterator[Finding]:
    """The results of all checks that need no other rank."""
    yield from _versions()
    yield from _devices(local_ranks())
    yield from _backends()
    yield from _engines()
    yield from _launcher()


def _versions() -> Iterator[Finding]:
    installed = versions()
    yield ok("distplb", installed["distplb"])
    yield _judged("Python", installed["Python"], _PYTHON)
    for name, supported in _LIBRARIES.items():
        if name in installed:
            yield _judged(name, installed[name], supported)
        elif supported.extra:
            yield ok(name, f"not installed; if you need it, pip install 'distplb[{supported.extra}]'")
        else:
            yield wrong(name, f"not installed; pip install {name}")


def _judged(name: str, installed: str, supported: _Supported) -> Finding:
    minimum, maximum, _ = supported
    numbers, limit = _numbers(installed), _numbers(maximum)
    range_ = minimum if minimum == maximum else f"{minimum} to {maximum}"
    if _numbers(minimum) <= numbers and numbers[: len(limit)] <= limit:
        return ok(name, f"{installed}, supported: {range_}")
    return note(
        name, f"{installed} is untested; distplb supports {range_}: install a supported version, or run its tests"
    )


def _numbers(version_: str) -> tuple[int, ...]:
    """The leading numbers of a version such as 2.13.0+cpu."""
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
        yield wrong("GPUs", f"{count} for {ranks} ranks on this node; use torchrun --nproc-per-node {count}")
    cores, threads = len(os.sched_getaffinity(0)), os.environ.get("OMP_NUM_THREADS")
    share = max(1, cores // ranks)
    yield ok("CPU cores", f"{cores}; torch threads: {torch.get_num_threads()}, OMP_NUM_THREADS: {threads or 'not set'}")
    if ranks > 1 and not threads:
        yield note("OMP_NUM_THREADS", f"not set for {ranks} ranks on {cores} cores; set OMP_NUM_THREADS={share}")
    elif ranks * torch.get_num_threads() > cores and torch.get_num_threads() > 1:
        yield note(
            "OMP_NUM_THREADS",
            f"the threads of {ranks} rank{'s' * (ranks > 1)} outnumber the cores ({cores}); "
            f"set OMP_NUM_THREADS={share}",
        )


def _backends() -> Iterator[Finding]:
    there = backends()
    yield ok("backends", f"{', '.join(name for name, is_there in there.items() if is_there) or 'none'}")
    if not there["gloo"]:
        yield wrong("gloo", "torch was built without gloo, which ranks use to check in; install torch from pytorch.org")
    if torch.cuda.is_available() and not there["nccl"]:
        yield wrong(
            "NCCL", "torch was built without NCCL, so GPUs cannot exchange; install torch's CUDA build for Linux"
        )


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
    others = [name for name, placement in plans.items() if placement != plans["reference"]]
    yield ok(
        "engines",
        f"{', '.join(plans)}; default: {taken}; plans equal to the reference: {len(plans) - len(others)} of "
        f"{len(plans)}",
    )
    for name in others:
        yield wrong(
            f"engine {name}", "its plan differs from the reference; plan with engine='reference', and report this"
        )


def _small_load() -> Tensor:
    """`[T, L, E]` = [4, 2, 16], the same on every machine."""
    return (torch.arange(4 * 2 * 16, device="cpu") * 2654435761 % 1009).reshape(4, 2, 16)


# --- the launcher -----------------------------------------------------------------------------------------------


def _launcher() -> Iterator[Finding]:
    try:
        topology = Topology.from_env()
    except DistplbError as error:
        is_alone = str(error).startswith("no launcher")
        yield ok("launcher", "none; single process") if is_alone else wrong("launcher", str(error))
        return
    nodes = topology.num_nodes
    yield ok("launcher", f"{nodes} {'node' if nodes == 1 else 'nodes'} × {topology.gpus_per_node} ranks")
    if nodes > 1 and not os.environ.get("GLOO_SOCKET_IFNAME"):
        yield note(
            "GLOO_SOCKET_IFNAME",
            "not set, so gloo uses the address that the hostname resolves to; set it to the interface between the "
            "nodes, for example GLOO_SOCKET_IFNAME=eth0",
        )
