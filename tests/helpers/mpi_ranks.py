"""Runs a test on real MPI processes: started by mpiexec, with a deadline, and no process left behind."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

__all__ = ["MPIEXEC", "on_mpi_ranks"]

# The wheel `mpich` installs mpiexec next to the interpreter. None if there is no MPI or no mpi4py.
MPIEXEC = shutil.which("mpiexec", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
MPIEXEC = MPIEXEC if find_spec("mpi4py") else None


def on_mpi_ranks(size: int, body: Callable[..., Any], *args: Any, deadline: float = 120.0) -> list[Any]:
    """Call `body(*args)` on each of `size` ranks of COMM_WORLD, and return what each returned, by rank.

    Args:
        size: the number of ranks.
        body: a function of a module of the tests.
        args: arguments that JSON can represent; the same holds for the return value.
        deadline: how many seconds to wait for all ranks.

    Raises:
        AssertionError: if a rank raised, or the ranks did not end in time. All processes have ended by then.
    """
    assert MPIEXEC is not None
    with tempfile.TemporaryDirectory() as folder:
        job = json.dumps([folder, body.__module__, body.__name__, args])
        command = [MPIEXEC, "-n", str(size), sys.executable, "-m", "mpi4py", __file__, job]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        try:
            said, _ = process.communicate(timeout=deadline)
        except subprocess.TimeoutExpired:
            process.terminate()  # mpiexec then ends its ranks
            said, _ = process.communicate(timeout=10)
            raise AssertionError(f"not finished after {deadline} s:\n{said}") from None
        finally:
            process.kill()
        assert process.returncode == 0, said
        return [json.loads((Path(folder) / str(rank)).read_text()) for rank in range(size)]


def _one_rank(folder: str, module: str, name: str, args: list[Any]) -> None:
    from mpi4py import MPI

    torch.set_num_threads(1)
    answer = getattr(importlib.import_module(module), name)(*args)
    (Path(folder) / str(MPI.COMM_WORLD.rank)).write_text(json.dumps(answer))


if __name__ == "__main__":
    _one_rank(*json.loads(sys.argv[1]))
