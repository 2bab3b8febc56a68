"""The scripts of launch/ start the processes that they promise, on this host and on simulated nodes."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmark_modules import imported
from mpi_ranks import MPIEXEC
from ranks import on_ranks
from torch import Tensor

from distplb.comm.torchdist import TorchComm

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "launch").glob("*.sh"))
DEADLINE = 300  # seconds

# A user's script: the ranks plan together, and each one writes the result and the arguments that it received.
PLANNING = """
import json, os, sys, torch
from distplb import Topology, plan
{start}
load = torch.tensor([[90, 80, 10, 10]]) * (comm.rank == 0)
placement = plan(load, Topology(1, 2), comm=comm, engine="reference").expert_of_slot.tolist()
topology = Topology.from_env()
told = [comm.size, placement, [topology.num_nodes, topology.gpus_per_node], sys.argv[1:], os.getcwd()]
open(f"rank{{comm.rank}}.json", "w").write(json.dumps(told))
{end}
"""
OVER_TORCH = PLANNING.format(
    start="""
import torch.distributed as dist
from distplb.comm.torchdist import TorchComm
dist.init_process_group("gloo")
comm = TorchComm()
""",
    # The last reference to the group joins its threads; a thread that outlives the interpreter aborts the process.
    end="del comm; dist.destroy_process_group()",
)
OVER_MPI = PLANNING.format(start="from distplb.comm.mpi import MpiComm; comm = MpiComm()", end="")
# Writes the environment only, to save the time that importing torch takes.
TELLING = """
import os
names = ("GROUP_RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "WORLD_SIZE")
open("rank" + os.environ["RANK"], "w").write(" ".join(os.environ[name] for name in names))
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """An active environment whose python logs its arguments, and installs nothing."""
    tool(
        tmp_path / "bin" / "python",
        f'echo "$@" >> "{tmp_path}/called"\nif [ "${{2:-}}" != pip ]; then exec "{sys.executable}" "$@"; fi\n',
    )
    own = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "NNODES", "NODE_RANK"))}
    return own | {
        "PATH": f"{tmp_path}/bin:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "VIRTUAL_ENV": sys.prefix,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
    }


def tool(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\nset -euo pipefail\n{text}")
    path.chmod(0o755)


def launched(script: str | Path, *words: str, env: dict[str, str], cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a script of launch/ until it and all processes that it started have ended."""
    with started(script, *words, env=env, cwd=cwd) as process:
        out, err = process.communicate(timeout=DEADLINE)
    return subprocess.CompletedProcess(words, process.returncode, out, err)


@contextmanager
def started(script: str | Path, *words: str, env: dict[str, str], cwd: Path) -> Iterator[subprocess.Popen[str]]:
    """Start a script of launch/; at the end, stop it and all processes that it started."""
    command = ["bash", str(ROOT / "launch" / script), *words]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, env=env, cwd=cwd, start_new_session=True, **pipes)
    try:
        yield process
    finally:
        # SIGTERM first: on it torchrun ends its ranks, which are in other sessions.
        for sign in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError):
                os.killpg(process.pid, sign)
            with suppress(subprocess.TimeoutExpired):
                process.communicate(timeout=10)


def free_port() -> int:
    """Find a port that slurm.sh can compute from a job id, and that was free a moment ago."""
    for port in random.sample(range(20000, 32000), 50):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port
    raise AssertionError("no port is free")


def told_by_ranks(folder: Path) -> list[Any]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("rank*.json"))]


# --- syntax and usage ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_a_script_parses_and_is_short(script: Path) -> None:
    parsed = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True, timeout=100, check=False)
    assert (parsed.returncode, parsed.stderr) == (0, "")
    lines = script.read_text().splitlines()
    assert len(lines) < 50
    if script.name != "environment.sh":  # it is sourced
        assert lines[0] == "#!/usr/bin/env bash"
        assert "set -euo pipefail" in lines
        assert os.access(script, os.X_OK)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed: apt install shellcheck")
def test_shellcheck_has_no_complaint() -> None:
    command = ["shellcheck", "--external-sources", "--source-path=SCRIPTDIR"]
    command += [str(script) for script in SCRIPTS if script.name != "environment.sh"]
    checked = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert checked.returncode == 0, checked.stdout


@pytest.mark.parametrize("script", ["torchrun.sh", "slurm.sh", "mpirun.sh"])
def test_without_a_script_to_run_an_example_is_told(script: str, environment: dict[str, str], tmp_path: Path) -> None:
    refused = launched(script, env=environment, cwd=tmp_path)
    assert refused.returncode != 0
    assert "a script to run; " in refused.stderr
    assert not (tmp_path / "called").exists()


# --- torchrun --------------------------------------------------------------------------------------------------------


def test_torchrun_starts_processes_on_this_host_that_check_the_library(
    environment: dict[str, str], tmp_path: Path
) -> None:
    """Run the checks of launch/nccl.sh on two CPU processes, with a path relative to the caller's folder."""
    words = ["--backend", "gloo", "--dim", "8", "--repeats", "1", "--output", "found"]
    env = environment | {"NPROC_PER_NODE": "2"}
    done = launched("torchrun.sh", str(ROOT / "benchmarks" / "comm" / "check_nccl.py"), *words, env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    [record], [report] = (list((tmp_path / "found").glob(f"*-gloo-2cpu.{kind}")) for kind in ("json", "md"))
    found = json.loads(record.read_text())
    assert found["wrong"] == {"collectives": [], "plans": [], "moves": []}
    assert len(found["timings"]) == 5
    assert all(0 < timing["least"] <= timing["median"] <= timing["largest"] for timing in found["timings"])
    assert report.read_text() == done.stdout
    assert "| moves       |  right |" in done.stdout
    installed, *_ = (tmp_path / "called").read_text().splitlines()
    assert installed == "-m pip install --quiet --editable ."


def test_torchrun_hands_on_that_a_check_has_failed(environment: dict[str, str], tmp_path: Path) -> None:
    """An error that one rank finds is written, and the exit status is not 0."""
    (tmp_path / "wrong.py").write_text(
        "import sys\nfrom benchmarks.comm import check_nccl\n"
        "check_nccl.CHECKS = {'moves': lambda *_: iter(['a moment was left behind'])}\n"
        "sys.exit(check_nccl.main())\n"
    )
    env = environment | {"NPROC_PER_NODE": "1"}
    words = ["--backend", "gloo", "--dim", "8", "--repeats", "1", "--output", "found"]
    done = launched("torchrun.sh", "wrong.py", *words, env=env, cwd=tmp_path)
    assert done.returncode != 0
    assert "| moves | rank 0: a moment was left behind |" in done.stdout
    [record] = (tmp_path / "found").glob("*.json")
    assert json.loads(record.read_text()) == {"wrong": {"moves": ["rank 0: a moment was left behind"]}, "timings": []}


def test_torchrun_starts_one_job_on_several_hosts(environment: dict[str, str], tmp_path: Path) -> None:
    """Two hosts, both of which are this one, numbered in the order they join."""
    (tmp_path / "tell.py").write_text(TELLING)
    port = str(free_port())
    env = environment | {"NNODES": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "NPROC_PER_NODE": "2"}
    with ExitStack() as stack:
        hosts = [stack.enter_context(started("torchrun.sh", "tell.py", env=env, cwd=tmp_path)) for _ in range(2)]
        for host in hosts:
            _, said = host.communicate(timeout=DEADLINE)
            assert host.returncode == 0, said
    told = [(tmp_path / f"rank{rank}").read_text() for rank in range(4)]
    assert told == ["0 0 2 4", "0 1 2 4", "1 0 2 4", "1 1 2 4"]


def test_hosts_are_numbered_by_node_rank_where_it_is_given(environment: dict[str, str], tmp_path: Path) -> None:
    tool(tmp_path / "bin" / "python", f'echo "$@" > "{tmp_path}/called"\n')
    env = environment | {"NNODES": "4", "NODE_RANK": "3", "MASTER_ADDR": "host0"}
    (tmp_path / "train.py").touch()
    assert launched("torchrun.sh", "train.py", "--steps", "7", env=env, cwd=tmp_path).returncode == 0
    assert (tmp_path / "called").read_text().split() == [
        *("-m", "torch.distributed.run", "--nnodes", "4", "--node-rank", "3"),
        *("--master-addr", "host0", "--master-port", "29500", "--nproc-per-node", "auto", "--max-restarts", "0"),
        *(str(tmp_path / "train.py"), "--steps", "7"),
    ]


# --- Slurm, MPI, NCCL ------------------------------------------------------------------------------------------------


@pytest.fixture
def slurm(environment: dict[str, str], tmp_path: Path) -> dict[str, str]:
    """An allocation of two nodes, both of which are this host."""
    tool(tmp_path / "bin" / "scontrol", '[ "$*" = "show hostnames node[0-1]" ] && printf "127.0.0.1\\nnode1\\n"\n')
    tool(
        tmp_path / "bin" / "srun",
        f'echo "$@" "$SRUN_CPUS_PER_TASK" > "{tmp_path}/srun"\n'
        "while [[ $1 == --* ]]; do if [[ $1 == *=* ]]; then shift; else shift 2; fi; done\n"
        'for node in 0 1; do SLURM_NODEID=$node SLURM_PROCID=$node SLURM_LOCALID=0 "$@" & started+=($!); done\n'
        'for one in "${started[@]}"; do wait "$one"; done\n',
    )
    return environment | {
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_NODELIST": "node[0-1]",
        "SLURM_JOB_ID": str(free_port() - 20000),
        "SLURM_NTASKS": "2",
        "SLURM_TASKS_PER_NODE": "1(x2)",
        "SLURM_CPUS_PER_TASK": "3",
        "SLURM_GPUS_ON_NODE": "1",
    }


def test_slurm_runs_one_torchrun_on_each_node(slurm: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(f"import os\nos.chdir({str(tmp_path)!r})\n{OVER_TORCH}")
    shutil.copy(ROOT / "launch" / "slurm.sh", tmp_path / "spooled")  # as Slurm does
    done = launched(tmp_path / "spooled", "train.py", "--steps", "7", env=slurm, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert told_by_ranks(tmp_path) == [[2, [[0, 3, 1, 2]], [2, 1], ["--steps", "7"], str(tmp_path)]] * 2
    options = (tmp_path / "srun").read_text()
    assert options.startswith("--nodes 2 --ntasks 2 --ntasks-per-node 1 --kill-on-bad-exit=1 bash -c ")
    assert options.endswith(" 3\n")  # cores for each task


@pytest.mark.skipif(MPIEXEC is None, reason="no mpiexec, or no mpi4py: pip install mpich mpi4py")
def test_mpirun_plans_on_two_ranks(environment: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "plan.py").write_text(OVER_MPI)
    done = launched("mpirun.sh", "plan.py", "load.npy", env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert told_by_ranks(tmp_path) == [[2, [[0, 3, 1, 2]], [1, 2], ["load.npy"], str(tmp_path)]] * 2


def test_mpirun_says_what_is_missing(environment: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "plan.py").touch()
    refused = launched("mpirun.sh", "plan.py", env=environment | {"MPIEXEC": "no-such-mpi -n 2"}, cwd=tmp_path)
    assert refused.returncode == 2
    assert refused.stderr == "no-such-mpi is not installed; load your cluster's MPI, or pip install mpich\n"


@pytest.mark.skipif(torch.cuda.device_count() > 1, reason="here it would check the GPUs")
def test_nccl_refuses_fewer_than_two_gpus(environment: dict[str, str], tmp_path: Path) -> None:
    refused, here = launched("nccl.sh", env=environment, cwd=tmp_path), torch.cuda.device_count()
    assert refused.returncode == 2
    assert refused.stderr == (
        f"the checks need 2 GPUs or more, and torch sees {here}; run this on a host with more GPUs\n"
    )


# --- versions --------------------------------------------------------------------------------------------------------


def test_versions_runs_the_tests_with_the_python_and_the_torch_that_are_named(
    environment: dict[str, str], tmp_path: Path
) -> None:
    """The Python here is a stand-in that creates the environment, logs its arguments and installs nothing."""
    noting = f'echo "$@" >> "{tmp_path}/asked"\n'
    making = f'{noting}mkdir -p "$3/bin"\ncp "{tmp_path}/bin/inside" "$3/bin/python"\necho "$3" > "{tmp_path}/made"\n'
    tool(tmp_path / "bin" / "inside", noting)
    tool(tmp_path / "bin" / "python3.99", making)
    env = environment | {"TMPDIR": str(tmp_path)}
    done = launched("versions.sh", "python3.99", "2.6.0", "-k", "load", env=env, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    made = (tmp_path / "made").read_text().strip()
    assert Path(made).is_relative_to(tmp_path)
    assert not Path(made).exists()
    venv, install, tests = (tmp_path / "asked").read_text().splitlines()
    assert venv == f"-m venv {made}"
    assert install.startswith("-m pip install ")
    assert install.endswith(" torch==2.6.0 --editable .[test]")
    assert tests.startswith("-m pytest --numprocesses 3 ")
    assert tests.endswith(" -k load")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["python3.99"], "pass a Python and a version of torch; "),
        (["no-such-python", "2.6.0"], "no-such-python is not installed; "),
    ],
)
def test_versions_says_what_is_missing(
    words: list[str], said: str, environment: dict[str, str], tmp_path: Path
) -> None:
    refused = launched("versions.sh", *words, env=environment | {"TMPDIR": str(tmp_path)}, cwd=tmp_path)
    assert refused.returncode == 2
    assert refused.stderr.startswith(said)


# --- the check itself ------------------------------------------------------------------------------------------------


class Wrong(TorchComm):
    """Sums where the minimum is requested, as a faulty library would."""

    def all_reduce_min(self, tensor: Tensor) -> None:
        self.all_reduce_sum(tensor)


def verdicts() -> list[list[str]]:
    check_nccl = imported("comm.check_nccl")

    def failing(comm: TorchComm, *_: Any) -> Iterator[str]:
        if comm.rank == 1:
            raise MemoryError("no room")
        yield "not what it should be"

    checks = [(check_nccl.collectives, Wrong()), (failing, TorchComm()), (check_nccl.collectives, TorchComm())]
    return [check_nccl.agreed(check, comm, torch.device("cpu"), 8, None) for check, comm in checks]


def test_the_check_finds_a_wrong_collective_and_all_ranks_hear_what_one_has_found() -> None:
    for wrong, failed, right in on_ranks(2, verdicts):
        assert len(wrong) == 6
        assert wrong[0] == "rank 0: the minimum over ranks of 1 int64 is wrong"
        assert failed == ["rank 0: not what it should be", "rank 1: MemoryError('no room')"]
        assert right == []
