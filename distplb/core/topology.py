"""The shape of one expert-parallel group: how many nodes, and how many GPUs on each."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple, Protocol

from distplb.core.arguments import shown, whole_number
from distplb.errors import DistplbError, OptionError

__all__ = ["Mesh", "Topology"]


class Mesh(Protocol):
    """The part of `torch.distributed.device_mesh.DeviceMesh` that is used here."""

    @property
    def ndim(self) -> int:
        """The number of axes."""

    @property
    def mesh(self) -> Any:
        """A tensor of the global ranks."""


@dataclass(frozen=True)
class Topology:
    """Nodes and GPUs of one expert-parallel (EP) group; GPU m is on node `m // gpus_per_node`.

    >>> Topology(num_nodes=2, gpus_per_node=8).num_gpus
    16

    Args:
        num_nodes: nodes of the group; a node is the set of GPUs that share the fast links.
        gpus_per_node: GPUs of the group on each node, the same number on all.

    Raises:
        DistplbError: if either is not a positive integer.
    """

    num_nodes: int
    gpus_per_node: int

    def __post_init__(self) -> None:
        for name in ("num_nodes", "gpus_per_node"):
            object.__setattr__(self, name, whole_number(f"Topology: {name}", getattr(self, name), minimum=1))

    @classmethod
    def of_ranks(cls, ranks: Sequence[int], gpus_per_node: int) -> Topology:
        """The topology of the EP group of these global ranks, if node n has the ranks from n × `gpus_per_node` on.

        >>> Topology.of_ranks([1, 3, 9, 11], gpus_per_node=8)
        Topology(num_nodes=2, gpus_per_node=2)

        Args:
            ranks: the group's global ranks in the order of the group; may be strided.
            gpus_per_node: GPUs of the whole job on each node.

        Raises:
            DistplbError: if the nodes have different numbers of these ranks, or the ranks of a node are not
                consecutive in the group.
        """
        gpus_per_node = whole_number("gpus_per_node", gpus_per_node, 1, "the job's GPUs on each node, at least 1")
        ranks = _ranks(ranks)
        nodes = [rank // gpus_per_node for rank in ranks]
        blocks = [len(list(block)) for _, block in groupby(nodes)]
        if len(set(blocks)) != 1 or len(blocks) != len(set(nodes)):
            raise DistplbError(
                f"ranks {list(ranks)} of the EP group are on nodes {nodes} (gpus_per_node={gpus_per_node}), not evenly "
                "and node by node; order the group by node, or pass Topology(num_nodes, gpus_per_node)"
            )
        return cls(len(blocks), blocks[0])

    @classmethod
    def from_env(cls, ranks: Sequence[int] | None = None) -> Topology:
        """The topology of the EP group of these global ranks, on the nodes that the launcher reports.

        The job needs one process for each GPU. Supported are torchrun, srun, MPICH's mpiexec and Open MPI's mpirun,
        detected in this order. Nodes are those of the launcher; if faster links join several of them, pass the
        topology yourself.

        Args:
            ranks: the group's global ranks in the order of the group; None for all ranks of the job.

        Raises:
            DistplbError: if no launcher is detected by its environment variables, or the ranks are not spread evenly.
        """
        job = _job(os.environ)
        ranks = range(job.size) if ranks is None else _ranks(ranks)
        outside = [rank for rank in ranks if not 0 <= rank < job.size]
        if outside:
            raise DistplbError(
                f"the EP group has ranks {outside}, but the job has ranks 0 to {job.size - 1}; pass global ranks"
            )
        return cls.of_ranks(ranks, job.gpus_per_node)

    @classmethod
    def from_mesh(cls, mesh: Mesh, gpus_per_node: int | None = None) -> Topology:
        """The topology of the EP group on one axis of a device mesh, whose ranks may be strided.

        Args:
            mesh: a device mesh with one axis, as in `mesh["ep"]`.
            gpus_per_node: GPUs of the whole job on each node; None for the launcher's number, as in `from_env`.

        Raises:
            DistplbError: if the mesh has several axes, or its ranks are not spread evenly.
        """
        if not hasattr(mesh, "ndim") or not hasattr(mesh, "mesh"):
            raise DistplbError(f"mesh is {shown(mesh)}; pass the device mesh of the EP group, as in mesh['ep']")
        if mesh.ndim != 1:
            raise DistplbError(f"the mesh has {mesh.ndim} axes; pass the axis of the EP group, as in mesh['ep']")
        ranks = mesh.mesh.tolist()
        return cls.from_env(ranks) if gpus_per_node is None else cls.of_ranks(ranks, gpus_per_node)

    @property
    def num_gpus(self) -> int:
        """M, the GPUs of the group."""
        return self.num_nodes * self.gpus_per_node

    def slots_per_gpu(self, num_slots: int) -> int:
        """G, the slots on each GPU if `num_slots` are spread evenly.

        Raises:
            DistplbError: if they cannot be spread evenly.
        """
        num_slots = whole_number("num_slots", num_slots)
        if num_slots < 1 or num_slots % self.num_gpus:
            raise OptionError(
                f"{{slots}} slot{'s' * (num_slots != 1)} cannot be spread evenly over {{gpus}} "
                f"GPU{'s' * (self.num_gpus != 1)} ({{nodes}} node{'s' * (self.num_nodes != 1)} × {{each}}); "
                "make the number of slots a multiple of {gpus}, or {num_nodes} × {gpus_per_node} a divisor of {slots}",
                slots=num_slots,
                gpus=self.num_gpus,
                nodes=self.num_nodes,
                each=self.gpus_per_node,
            )
        return num_slots // self.num_gpus

    def experts_per_gpu(self, num_experts: int) -> int:
        """The experts on each GPU if each expert has one slot.

        Raises:
            DistplbError: if they cannot be spread evenly.
        """
        if num_experts % self.num_gpus:
            raise OptionError(
                f"{{experts}} expert{'s' * (num_experts != 1)} cannot be spread evenly over {{gpus}} GPUs "
                f"({{nodes}} node{'s' * (self.num_nodes != 1)} × {{each}}); "
                "make {num_nodes} × {gpus_per_node} a divisor of {experts}",
                experts=num_experts,
                gpus=self.num_gpus,
                nodes=self.num_nodes,
                each=self.gpus_per_node,
            )
        return num_experts // self.num_gpus


def _ranks(ranks: Any) -> list[int]:
    """The ranks of an EP group, as integers."""
    try:
        numbers = list(ranks)
    except TypeError:
        raise DistplbError(f"ranks is {shown(ranks)}; pass the global ranks of the EP group") from None
    return [whole_number(f"ranks[{nth}]", rank) for nth, rank in enumerate(numbers)]


class _Job(NamedTuple):
    size: int  # ranks
    gpus_per_node: int


class _Launcher(NamedTuple):
    """The variables by which a launcher describes the job to each process; if the first is set, it is this launcher."""

    ranks_of_node: str  # one number, or Slurm's list with one for each node
    size: str
    rank: str
    local_rank: str
    nodes: str = ""  # read if it is set


_LAUNCHERS = (
    # https://docs.pytorch.org/docs/stable/elastic/run.html, "Environment Variables"; the last one is set as well
    _Launcher("LOCAL_WORLD_SIZE", "WORLD_SIZE", "RANK", "LOCAL_RANK", "GROUP_WORLD_SIZE"),
    # https://slurm.schedmd.com/srun.html, "OUTPUT ENVIRONMENT VARIABLES": of the step, then of the allocation
    _Launcher(
        *("SLURM_STEP_TASKS_PER_NODE", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_NODES")
    ),
    _Launcher("SLURM_TASKS_PER_NODE", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NNODES"),
    # Hydra, the process manager of MPICH and Intel MPI, sets these without documenting them; seen with MPICH 5.0
    _Launcher("MPI_LOCALNRANKS", "PMI_SIZE", "PMI_RANK", "MPI_LOCALRANKID"),
    # https://docs.open-mpi.org/en/v5.0.x/tuning-apps/environment-var.html
    _Launcher(
        *("OMPI_COMM_WORLD_LOCAL_SIZE", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK")
    ),
)
_TASKS = re.compile(r"(\d+)(?:\(x(\d+)\))?")  # a number of tasks, and for how many nodes in a row, as in 8(x4)


def _job(environment: Mapping[str, str]) -> _Job:
    """The job's ranks and ranks on each node; all nodes must have equally many, numbered node by node."""
    launcher = next((one for one in _LAUNCHERS if one.ranks_of_node in environment), None)
    if launcher is None:
        raise DistplbError(
            f"no launcher has set any of {', '.join(one.ranks_of_node for one in _LAUNCHERS)}; start the job with "
            "torchrun, srun or mpiexec, or pass Topology(num_nodes, gpus_per_node)"
        )
    variables = {name: environment.get(name) for name in launcher if name}
    try:
        of_node = _ranks_of_nodes(environment[launcher.ranks_of_node])
        size, rank, local_rank = (int(environment[name]) for name in launcher[1:4])
        nodes = int(environment.get(launcher.nodes, size // of_node[0]))
    except (KeyError, ValueError) as unreadable:
        raise DistplbError(
            f"the launcher's {variables} cannot be read; pass Topology(num_nodes, gpus_per_node)"
        ) from unreadable
    per_node = of_node[0]
    if len(set(of_node)) != 1 or size != nodes * per_node or rank % per_node != local_rank:
        raise DistplbError(
            f"{variables}: the nodes have different numbers of ranks, or ranks are not numbered node by node; "
            "start the same number on each node, in blocks (srun --distribution=block)"
        )
    return _Job(size, per_node)


def _ranks_of_nodes(text: str) -> list[int]:
    """The ranks on each node, from one number for all nodes or a list with one for each.

    >>> _ranks_of_nodes("2(x3),1")
    [2, 2, 2, 1]
    """
    counts = []
    for part in text.split(","):
        match = _TASKS.fullmatch(part)
        if match is None or not int(match[1]):
            raise ValueError(f"not a number of ranks: {part!r}")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts
