"""`Topology`: what it derives and refuses. Shapes: M GPUs, P slots, G slots on each GPU."""

from __future__ import annotations

import os
from dataclasses import FrozenInstanceError
from typing import Any

import pytest
import torch
from ranks import on_ranks
from torch.distributed.device_mesh import init_device_mesh

from distplb import DistplbError, Topology


def test_gpus_are_nodes_times_gpus_per_node() -> None:
    assert Topology(1, 1).num_gpus == 1
    assert Topology(num_nodes=3, gpus_per_node=8).num_gpus == 24


def test_slots_are_spread_evenly_over_gpus() -> None:
    assert Topology(2, 4).slots_per_gpu(256) == 32
    assert Topology(2, 4).slots_per_gpu(8) == 1


@pytest.mark.parametrize("num_slots", [0, -8, 7, 12])
def test_slots_that_cannot_be_spread_evenly_are_refused(num_slots: int) -> None:
    wording = rf"{num_slots} slots cannot be spread evenly over 8 GPUs \(2 nodes × 4\); make the number of slots a mul"
    with pytest.raises(DistplbError, match=wording):
        Topology(2, 4).slots_per_gpu(num_slots)


@pytest.mark.parametrize("value", [0, -1, 2.0, "2", True, None])
@pytest.mark.parametrize("name", ["num_nodes", "gpus_per_node"])
def test_what_is_not_a_positive_whole_number_is_refused_by_its_name(name: str, value: object) -> None:
    numbers = {"num_nodes": 2, "gpus_per_node": 2} | {name: value}
    with pytest.raises(DistplbError, match=f"Topology: {name} is {value!r}; pass an integer of at least 1"):
        Topology(**numbers)  # type: ignore[arg-type]


def test_a_topology_is_a_frozen_value() -> None:
    topology = Topology(2, 4)
    assert topology == Topology(2, 4)
    assert len({topology, Topology(2, 4), Topology(4, 2)}) == 2
    with pytest.raises(FrozenInstanceError):
        topology.num_nodes = 3  # type: ignore[misc]


# --- what launchers report -----------------------------------------------------------------------------------------

TORCHRUN = {"LOCAL_WORLD_SIZE": "8", "WORLD_SIZE": "32", "RANK": "13", "LOCAL_RANK": "5", "GROUP_WORLD_SIZE": "4"}
SLURM = {
    "SLURM_TASKS_PER_NODE": "8(x4)",
    "SLURM_NTASKS": "32",
    "SLURM_NNODES": "4",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
}
STEP = {"SLURM_STEP_TASKS_PER_NODE": "4(x2)", "SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NUM_NODES": "2"}
HYDRA = {"MPI_LOCALNRANKS": "2", "PMI_SIZE": "6", "PMI_RANK": "5", "MPI_LOCALRANKID": "1"}
OPEN_MPI = {
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_RANK": "3",
}


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Remove the variables that a launcher of the tests themselves may have set."""
    for name in list(os.environ):
        if name.startswith(("SLURM_", "PMI_", "MPI_", "OMPI_")) or name in TORCHRUN:
            monkeypatch.delenv(name)
    return monkeypatch


def set_all(environment: pytest.MonkeyPatch, *variables: dict[str, str]) -> None:
    for name, value in {name: value for some in variables for name, value in some.items()}.items():
        environment.setenv(name, value)


@pytest.mark.parametrize(
    ("variables", "nodes", "gpus"),
    [
        ([TORCHRUN], 4, 8),
        ([SLURM], 4, 8),
        ([SLURM, STEP], 2, 4),  # the step that this process belongs to, not the whole allocation
        ([SLURM, {"SLURM_TASKS_PER_NODE": "8(x3),8"}], 4, 8),
        ([HYDRA], 3, 2),
        ([OPEN_MPI], 1, 4),
        ([SLURM, HYDRA, {**TORCHRUN, "WORLD_SIZE": "16", "GROUP_WORLD_SIZE": "2"}], 2, 8),  # torchrun under srun
    ],
)
def test_the_launchers_environment_gives_nodes_and_gpus(
    environment: pytest.MonkeyPatch, variables: list[dict[str, str]], nodes: int, gpus: int
) -> None:
    set_all(environment, *variables)
    assert Topology.from_env() == Topology(nodes, gpus)


def test_an_ep_group_is_found_on_the_nodes_of_its_ranks(environment: pytest.MonkeyPatch) -> None:
    set_all(environment, TORCHRUN)
    assert Topology.from_env(range(8, 16)) == Topology(1, 8)
    assert Topology.from_env(range(1, 32, 4)) == Topology(4, 2)
    with pytest.raises(
        DistplbError, match=r"the EP group has ranks \[32, -1\], but the job has ranks 0 to 31; pass global"
    ):
        Topology.from_env([31, 32, -1])
    with pytest.raises(DistplbError, match="not evenly and node by node"):
        Topology.from_env([0, 1, 8])


@pytest.mark.parametrize(
    ("variables", "wording"),
    [
        (
            [],
            "no launcher has set any of LOCAL_WORLD_SIZE, SLURM_STEP_TASKS_PER_NODE, SLURM_TASKS_PER_NODE, MPI_LOCALN",
        ),
        ([{"WORLD_SIZE": "4", "RANK": "0"}], "no launcher has set any of LOCAL_WORLD_SIZE"),
        ([SLURM, {"SLURM_TASKS_PER_NODE": "8(x3),4"}], "the nodes have different numbers of ranks, or ranks are not"),
        ([SLURM, {"SLURM_NTASKS": "28"}], "'SLURM_NTASKS': '28'.* the nodes have different numbers of ranks"),
        ([SLURM, {"SLURM_TASKS_PER_NODE": "8(y4)"}], r"'8\(y4\)'.* cannot be read; pass Topology\(num_nodes"),
        ([HYDRA, {"MPI_LOCALNRANKS": "0"}], "cannot be read; pass Topology"),
        ([{"LOCAL_WORLD_SIZE": "8"}], "'WORLD_SIZE': None.* cannot be read; pass Topology"),
        # 2 + 4 ranks, as the first node's ranks see it.
        (
            [TORCHRUN, {"LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "6", "GROUP_WORLD_SIZE": "2"}],
            "start the same number on each",
        ),
        # Dealt cyclically: the second rank is the first of the second node.
        ([SLURM, {"SLURM_PROCID": "1", "SLURM_LOCALID": "0"}], "are not numbered node by node"),
    ],
)
def test_what_is_uneven_or_unknown_is_refused_with_what_was_found(
    environment: pytest.MonkeyPatch, variables: list[dict[str, str]], wording: str
) -> None:
    set_all(environment, *variables)
    with pytest.raises(DistplbError, match=wording):
        Topology.from_env()


class Mesh:
    """The part of a device mesh that `from_mesh` needs."""

    def __init__(self, *ranks: Any) -> None:
        self.mesh = torch.tensor(ranks)
        self.ndim = self.mesh.ndim


def test_a_mesh_is_of_one_axis_and_its_nodes_come_from_the_launcher_if_not_given(
    environment: pytest.MonkeyPatch,
) -> None:
    assert Topology.from_mesh(Mesh(3, 7, 11, 15), gpus_per_node=8) == Topology(2, 2)
    with pytest.raises(DistplbError, match="no launcher has set"):
        Topology.from_mesh(Mesh(3, 7, 11, 15))
    set_all(environment, TORCHRUN)
    assert Topology.from_mesh(Mesh(3, 7, 11, 15)) == Topology(2, 2)
    with pytest.raises(DistplbError, match=r"the mesh has 2 axes; pass the axis of the EP group, as in mesh\['ep'\]"):
        Topology.from_mesh(Mesh([0, 1], [2, 3]), gpus_per_node=2)


def of_axes() -> list[list[int]]:
    """The topology of each axis of a real mesh, one strided and one not, with two GPUs on a node."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("strided", "together"))
    result = [Topology.from_mesh(mesh[axis], gpus_per_node=2) for axis in ("strided", "together")]
    return [[topology.num_nodes, topology.gpus_per_node] for topology in result]


def test_axes_of_a_device_mesh_are_seen_on_their_nodes() -> None:
    assert on_ranks(4, of_axes) == [[[2, 1], [1, 2]]] * 4
