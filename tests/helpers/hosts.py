"""Several hosts on one machine: network namespaces behind a bridge, each on a link with a speed limit.

The machine's own network is not touched: links and bridge are created inside this process's namespaces, with addresses
that only these see. Ranks of one host use its loopback, which has no limit.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path

__all__ = ["Host", "hosts", "torchrun", "why_not"]

_NUMBERS = count()  # numbers the sets of hosts of this process
_PORT = 29500  # always free in a new namespace
# When its standard input closes, kills all processes in the namespaces and removes these.
_CLEANER = """
cat > /dev/null
for name in "$@"; do
    while pids=$(ip netns pids "$name" 2> /dev/null) && [ -n "$pids" ]; do kill -9 $pids 2> /dev/null; done
    ip netns delete "$name" 2> /dev/null
done
"""


@dataclass(frozen=True)
class Host:
    """One namespace with a loopback and one link, `eth0`.

    Args:
        name: name of the namespace.
        address: IP address of `eth0`.
        port: the bridge's end of the link, as (namespace, interface).
    """

    name: str
    address: str
    port: tuple[str, str]

    def start(self, command: Sequence[str], **options: object) -> subprocess.Popen[bytes]:
        """Start a command on the host; options are those of `Popen`."""
        return subprocess.Popen(["ip", "netns", "exec", self.name, *command], **options)  # type: ignore[call-overload]

    def kill(self) -> None:
        """Kill all its processes at once; unlike on a power loss, the kernel notifies their peers."""
        for pid in _ip("netns", "pids", self.name).split():
            os.kill(int(pid), 9)

    def cut(self) -> None:
        """Take the link down at the bridge: nothing arrives any more, and no peer is notified."""
        _ip("-n", self.port[0], "link", "set", self.port[1], "down")

    def sent(self) -> int:
        """Return the bytes sent over the link so far, headers included."""
        told = json.loads(_ip("-n", self.name, "-s", "-j", "link", "show", "eth0"))
        return int(told[0]["stats64"]["tx"]["bytes"])


@contextmanager
def hosts(number: int, *, megabits: float | None = None, delay_ms: float = 0.0) -> Iterator[list[Host]]:
    """Create hosts that reach each other; when the block ends, or this process is killed, they are removed.

    Their processes are killed first. Check `why_not` before.

    Args:
        number: number of hosts, 1 to 200.
        megabits: Mbit/s in each direction of each host's link; None for no limit.
        delay_ms: delay of packets that leave a host. Needs netem in the kernel.
    """
    prefix = f"distplb-{os.getpid()}-{next(_NUMBERS)}"
    bridge, names = f"{prefix}-bridge", [f"{prefix}-{i}" for i in range(number)]
    cleaner = subprocess.Popen(
        ["sh", "-c", _CLEANER, "cleaner", *names, bridge],
        stdin=subprocess.PIPE,
        start_new_session=True,  # survives an interrupt from the keyboard
    )
    try:
        _make(bridge)
        _ip("-n", bridge, "link", "add", "bridge", "type", "bridge")
        _ip("-n", bridge, "link", "set", "bridge", "up")
        yield [_host(i, name, bridge, megabits, delay_ms) for i, name in enumerate(names)]
    finally:
        assert cleaner.stdin is not None
        cleaner.stdin.close()
        cleaner.wait(timeout=60)


def _host(number: int, name: str, bridge: str, megabits: float | None, delay_ms: float) -> Host:
    host = Host(name, f"10.213.0.{number + 1}", (bridge, f"port{number}"))
    _make(name)
    _ip("link", "add", "eth0", "netns", name, "type", "veth", "peer", "name", host.port[1], "netns", bridge)
    _ip("-n", name, "address", "add", f"{host.address}/24", "dev", "eth0")
    _ip("-n", bridge, "link", "set", host.port[1], "master", "bridge", "up")
    _ip("-n", name, "link", "set", "eth0", "up")
    if megabits is not None:
        for namespace, interface in ((name, "eth0"), host.port):
            _run("tc", "-n", namespace, *_limit(interface, megabits))
    if delay_ms:
        parent = ["root"] if megabits is None else ["parent", "1:1"]
        _run("tc", "-n", name, "qdisc", "add", "dev", "eth0", *parent, "netem", "delay", f"{delay_ms}ms")
    return host


def _limit(interface: str, megabits: float) -> list[str]:
    """Return the words of a `tc` rate limit with a queue of 50 ms, on which senders slow down."""
    shape = ["rate", f"{megabits}mbit", "burst", "256kb", "latency", "50ms"]
    return ["qdisc", "add", "dev", interface, "root", "handle", "1:", "tbf", *shape]


def why_not(*queues: str) -> str | None:
    """Return why hosts cannot be created here, or None if they can.

    Args:
        queues: kinds of queues that the kernel must also have: "tbf" for limited links, "netem" for delays.
    """
    if sys.platform != "linux" or os.geteuid():
        return "namespaces need Linux and root"
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if missing:
        return f"{missing[0]} is not installed; install iproute2"
    probe = f"distplb-{os.getpid()}-probe"
    try:
        _make(probe)
        try:
            for queue in queues:
                shape = _limit("lo", 1)[4:] if queue == "tbf" else ["root", "netem", "delay", "1ms"]
                _run("tc", "-n", probe, "qdisc", "replace", "dev", "lo", *shape)
        finally:
            _ip("netns", "delete", probe)
    except OSError as refused:
        return str(refused)
    return None


def torchrun(
    members: Sequence[Host], ranks: int, script: Path, arguments: Sequence[str], log: Path
) -> list[subprocess.Popen[bytes]]:
    """Start a job under torchrun, with gloo over the hosts' links, and return the launchers.

    Args:
        members: the hosts in the order of their ranks; the first is the rendezvous.
        ranks: number of ranks on each host.
        script, arguments: the script of the job and its arguments.
        log: file that all ranks write to.
    """
    job = ["--nnodes", str(len(members)), "--nproc-per-node", str(ranks), "--max-restarts", "0"]
    job += ["--master-addr", members[0].address, "--master-port", str(_PORT)]
    environment = os.environ | {
        "GLOO_SOCKET_IFNAME": "eth0",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    started = []
    with log.open("ab") as output:
        for number, host in enumerate(members):
            own = ["--node-rank", str(number), "--local-addr", host.address]
            command = [sys.executable, "-m", "torch.distributed.run", *job, *own, str(script), *arguments]
            started.append(host.start(command, env=environment, stdout=output, stderr=output))
    return started


def _make(name: str) -> None:
    _ip("netns", "add", name)
    _ip("-n", name, "link", "set", "lo", "up")


def _ip(*words: str) -> str:
    return _run("ip", *words)


def _run(*words: str) -> str:
    """Run a command and return its output.

    Raises:
        OSError: if it fails, with its error output.
    """
    done = subprocess.run(words, capture_output=True, text=True, timeout=30, check=False)
    if done.returncode:
        raise OSError(f"{' '.join(words)}: {done.stderr.strip()}")
    return done.stdout
