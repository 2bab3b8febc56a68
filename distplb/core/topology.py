"""The shape of one expert-parallel group: how many nodes, how many GPUs on each."""

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
    """The part of a device mesh that is used; `torch.distributed.device_mesh.DeviceMesh` has it."""

    @property
    def ndim(self) -> int:
        """The number of its axes."""

    @property
    def mesh(self) -> Any:
        """Tensor of the global ranks."""


@dataclass(frozen=True)
class Topology:
    """Nodes and GPUs of one expert-parallel (EP) group; GPU m lives on node `m // gpus_per_node`.

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
        """The topology of the EP group of these global ranks, where node n has the ranks from n × `gpus_per_node` on.

        >>> Topology.of_ranks([1, 3, 9, 11], gpus_per_node=8)
        Topology(num_nodes=2, gpus_per_node=2)

        Args:
            ranks: in the order of the group; may be strided.
            gpus_per_node: GPUs of the whole job on each node.

        Raises:
            DistplbError: if the nodes have different numbers of the ranks, or the ranks of a node do not follow each
                other.
        """
        gpus_per_node = whole_number("gpus_per_node", gpus_per_node, 1, "the job's GPUs on each node, at least 1")
        ranks = _ranks(ranks)
        nodes = [rank // gpus_per_node for rank in ranks]
        blocks = [len(list(block)) for _, block in groupby(nodes)]
        if len(set(blocks)) != 1 or len(blocks) != len(set(nodes)):
            raise DistplbError(
                f"ranks {list(ranks)} of the EP group lie on nodes {nodes} (of {gpus_per_node} GPUs), not evenly node "
                "by node; pass the topology and the order of the group yourself"
            )
        return cls(len(blocks), blocks[0])

    @classmethod
    def from_env(cls, ranks: Sequence[int] | None = None) -> Topology:
        """The topology of the EP group of these global ranks, with the nodes that the launcher tells of.

        One process for each GPU; torchrun, srun, mpiexec of MPICH and mpirun of Open MPI are known, looked for in this
        order. A node is what the launcher takes for one; where a faster link joins several, pass the topology yourself.

        Args:
            ranks: in the order of the group; all ranks of the job where None.

        Raises:
            DistplbError: if no launcher is known by its environment variables, or the ranks are not spread evenly.
        """
        job = _job(os.environ)
        ranks = range(job.size) if ranks is None else _ranks(ranks)
        outside = [rank for rank in ranks if not 0 <= rank < job.size]
        if outside:
            raise DistplbError(f"ranks {outside} of the EP group are none of the job's {job.size}; pass global ranks")
        return cls.of_ranks(ranks, job.gpus_per_node)

    @classmethod
    def from_mesh(cls, mesh: Mesh, gpus_per_node: int | None = None) -> Topology:
        """The topology of the EP group that is one axis of a device mesh, its ranks strided or not.

        Args:
            mesh: of one axis, as in `mesh["ep"]`.
            gpus_per_node: GPUs of the whole job on each node; what the launcher tells where None, as of `from_env`.

        Raises:
            DistplbError: if the mesh has several axes, or its ranks are not spread evenly.
        """
        if not hasattr(mesh, "ndim") or not hasattr(mesh, "mesh"):
            raise DistplbError(f"mesh is {shown(mesh)}; pass the device mesh of the EP group, as in mesh['ep']")
        if mesh.ndim != 1:
            raise DistplbError(f"the mesh has {mesh.ndim} axes; pass that of the EP group, as in mesh['ep']")
        ranks = mesh.mesh.tolist()
        return cls.from_env(ranks) if gpus_per_node is None else cls.of_ranks(ranks, gpus_per_node)

    @property
    def num_gpus(self) -> int:
        """M, the GPUs of the group."""
        return self.num_nodes * self.gpus_per_node

    def slots_per_gpu(self, num_slots: int) -> int:
        """G, the slots on each GPU when `num_slots` are spread evenly.

        Raises:
            DistplbError: if they cannot be.
        """
        num_slots = whole_number("num_slots", num_slots)
        if num_slots < 1 or num_slots % self.num_gpus:
            raise OptionError(
                "{slots} slots cannot be spread evenly over {gpus} GPUs ({nodes} nodes × {each}); make the number of "
                "slots a multiple of {gpus}, or {num_nodes} × {gpus_per_node} a divisor of {slots}",
                slots=num_slots,
                gpus=self.num_gpus,
                nodes=self.num_nodes,
                each=self.gpus_per_node,
            )
        return num_slots // self.num_gpus

    def experts_per_gpu(self, num_experts: int) -> int:
        """Experts on each GPU where each has one slot.

        Raises:
            DistplbError: if they cannot be spread evenly.
        """
        if num_experts % self.num_gpus:
            raise OptionError(
                "{experts} experts cannot be spread evenly over {gpus} GPUs ({nodes} nodes × {each}); make {num_nodes} "
                "× {gpus_per_node} a divisor of {experts}",
                experts=num_experts,
                gpus=self.num_gpus,
                nodes=self.num_nodes,
                each=self.gpus_per_node,
            )
        return num_experts // self.num_gpus


def _ranks(ranks: Any) -> list[int]:
    """The ranks of an EP group, as whole numbers."""
    try:
        numbers = list(ranks)
    except TypeError:
        raise DistplbError(f"ranks is {shown(ranks)}; pass the global ranks of the EP group") from None
    return [whole_number(f"ranks[{nth}]", rank) for nth, rank in enumerate(numbers)]


class _Job(NamedTuple):
    size: int  # ranks
    gpus_per_node: int


class _Launcher(NamedTuple):
    """The variables in which a launcher tells each process of the job; the first names it by being there."""

    ranks_of_node: str  # one number, or Slurm's list of one for each node
    size: str
    rank: str
    local_rank: str
    nodes: str = ""  # looked at where it is set


_LAUNCHERS = (
    # https://docs.pytorch.org/docs/stable/elastic/run.html, "Environment Variables"; the last one is set beside these
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
_TASKS = re.compile(r"(\d+)(?:\(x(\d+)\))?")  # of so many nodes in a row, as in 8(x4)


def _job(environment: Mapping[str, str]) -> _Job:
    """How many ranks there are, and how many on each node, where it is the same number on all and node follows node."""
    launcher = next((one for one in _LAUNCHERS if one.ranks_of_node in environment), None)
    if launcher is None:
        raise DistplbError(
            f"no launcher has set {', '.join(one.ranks_of_node for one in _LAUNCHERS)}; start the job by torchrun, "
            "srun or mpiexec, or pass Topology(num_nodes, gpus_per_node)"
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
            f"{variables}: the nodes have different numbers of ranks, or ranks do not follow each other node by node; "
            "start as many on each, in blocks (srun --distribution=block)"
        )
    return _Job(size, per_node)


def _ranks_of_nodes(text: str) -> list[int]:
    """One number for all nodes, or one for each.

    >>> _ranks_of_nodes("2(x3),1")
    [2, 2, 2, 1]
    """
    counts = []
    for part in text.split(","):
        match = _TASKS.fullmatch(part)
        if match is None or not int(match[1]):
            raise ValueError(f"no number of ranks: {part!r}")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts
