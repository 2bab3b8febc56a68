"""Run benchmarks in a fresh process, on ranks of this host, or on hosts behind slow links; import test helpers.

A job of several ranks is a module with the option `--job FOLDER`: its ranks call `run_job`, which reads the task from
that folder and writes the result of rank 0 to it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist

__all__ = ["on_hosts", "on_this_host", "outside", "run_alone", "run_job"]

ROOT = Path(__file__).parents[2]
TASK, RESULT = "task.json", "result.json"


def outside(folder: str, name: str) -> ModuleType:
    """Import a module from a folder that is not a package, such as `outside("tests/helpers", "ranks")`.

    The folder stays on the path, because its modules import each other, and child processes import them again.
    """
    path = str(ROOT / folder)
    if path not in sys.path:
        sys.path.insert(0, path)
    return import_module(name)


def run_alone(module: str, *words: str, **environment: str) -> Any:
    """Run a module of the benchmarks in a fresh process, and return the JSON that it prints."""
    command = [sys.executable, "-m", module, *words]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | environment, stdout=subprocess.PIPE, check=True, text=True
    )
    return json.loads(done.stdout)


def on_this_host(ranks: int, module: str, task: object, *, seconds: float) -> Any:
    """Run a job on `ranks` ranks under torchrun, stop it after `seconds`, and return its result."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, TASK).write_text(json.dumps(task))
        command += ["-m", module, "--job", folder]
        subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=seconds)
        return json.loads(Path(folder, RESULT).read_text())


def on_hosts(
    number: int, ranks: int, module: str, task: object, *, megabits: float | None, delay_ms: float = 0.0, seconds: float
) -> Any:
    """Run a job on `number` network namespaces, with `ranks` ranks each, and return its result.

    Ranks of a host reach each other over its loopback; `megabits` per second and `delay_ms` describe the links between
    hosts.
    """
    helper, spec = outside("tests/helpers", "hosts"), find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    with (
        tempfile.TemporaryDirectory() as name,
        helper.hosts(number, megabits=megabits, delay_ms=delay_ms) as members,
    ):
        folder, end = Path(name), time.monotonic() + seconds
        (folder / TASK).write_text(json.dumps(task))
        launchers = helper.torchrun(members, ranks, Path(spec.origin), ["--job", name], folder / "log")
        while any(launcher.poll() is None for launcher in launchers) and time.monotonic() < end:
            time.sleep(0.1)
        if not (folder / RESULT).exists():
            raise SystemExit(f"the job on {number} host{'s' * (number > 1)} failed:\n{(folder / 'log').read_text()}")
        return json.loads((folder / RESULT).read_text())


def run_job(folder: Path, body: Callable[[Any], object]) -> None:
    """Join a gloo group and call `body(task)`; rank 0 writes the result."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    result = body(json.loads((folder / TASK).read_text()))
    if dist.get_rank() == 0:
        (folder / RESULT).write_text(json.dumps(result))
    dist.destroy_process_group()
