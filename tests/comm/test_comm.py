"""Communicators: one conformance test for every implementation, and what they refuse."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conformance import conforms
from ranks import on_ranks
from torch.distributed.device_mesh import init_device_mesh

import distplb
from distplb import DistplbError
from distplb.comm import torchdist
from distplb.comm.agreement import agree
from distplb.comm.base import WorldOfOne
from distplb.comm.torchdist import TorchComm, device_type
from distplb.errors import HalfMovedError


def over_the_default_group() -> int:
    conforms(TorchComm())
    return TorchComm().size


def over_groups_and_meshes() -> int:
    """Ranks of a group are not global ranks: the odd ranks form a group, and a mesh's axis is strided."""
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    conforms(TorchComm(groups[dist.get_rank() % 2]))
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "expert"))
    for axis in ("data", "expert"):
        conforms(TorchComm(mesh[axis]))
    with pytest.raises(DistplbError, match=r"the mesh has 2 axes \('data', 'expert'\); pass one of them"):
        TorchComm(mesh)
    with pytest.raises(DistplbError, match="is not in the group"):
        TorchComm(groups[1 - dist.get_rank() % 2])
    return TorchComm(mesh["data"]).size


def over_the_default_group_and_one_beside_it() -> int:
    comm = TorchComm(side_group=True)
    conforms(comm)
    return comm.size


def test_gloo_with_a_side_group_conforms() -> None:
    """NCCL has a side group too, and does the same in it."""
    assert on_ranks(3, over_the_default_group_and_one_beside_it) == [3] * 3


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_gloo_conforms(ranks: int) -> None:
    assert on_ranks(ranks, over_the_default_group) == [ranks] * ranks


def test_subgroups_and_mesh_axes_conform() -> None:
    assert on_ranks(4, over_groups_and_meshes) == [2] * 4


@pytest.mark.parametrize(
    ("backends", "has_gpu", "expected"),
    [
        ("cpu:gloo,cuda:gloo", True, "cpu"),  # created with "gloo"
        ("cpu:gloo", True, "cpu"),  # with "cpu:gloo", or with no backend and no GPU
        ("cpu:gloo", False, "cpu"),
        ("cuda:nccl", True, "cuda"),  # with "nccl", or with no backend and a GPU
        ("cpu:gloo,cuda:nccl", True, "cuda"),  # as asynchronous checkpoints need it
        ("cuda:nccl,cpu:gloo", True, "cuda"),
        ("cpu:gloo,cuda:nccl", False, "cpu"),
        ("cpu:mpi,cuda:nccl", True, "cuda"),
        ("cpu:gloo,cuda:custom", True, "cpu"),
        ("cpu:gloo,cuda:ucc,xpu:xccl", True, "cpu"),
        ("cpu:ucc,cuda:ucc", True, "cpu"),
    ],
)
def test_messages_lie_on_the_gpu_where_the_group_has_nccl_for_it(backends: str, has_gpu: bool, expected: str) -> None:
    """Only a group with the single backend "nccl" was recognised; others sent messages through host memory."""
    assert device_type(backends, has_gpu) == expected


@pytest.mark.parametrize(
    ("backends", "has_gpu", "wording"),
    [
        (
            "cuda:nccl",
            False,
            "the group's backends are cuda:nccl, and torch sees no GPU here; ranks exchange over NCCL",
        ),
        (
            "cuda:custom",
            True,
            "the group's backends are cuda:custom; ranks exchange over NCCL between GPUs, or through host memory",
        ),
        (
            "xpu:xccl",
            True,
            r"pass a group with a backend for the CPU, such as torch.distributed.new_group\(backend='gloo'",
        ),
    ],
)
def test_a_group_that_cannot_carry_what_is_sent_is_refused(backends: str, has_gpu: bool, wording: str) -> None:
    with pytest.raises(DistplbError, match=wording):
        device_type(backends, has_gpu)


def over_groups_of_several_backends(folder: str) -> list[str]:
    """Over each group that can be created without a GPU; at the end over a default group without a named backend."""
    dist.Backend.register_backend("standin", dist.ProcessGroupGloo, devices=["cpu", "cuda"])
    devices = []
    for backend in ("gloo", "cpu:gloo", "cpu:gloo,cuda:gloo", "cpu:gloo,cuda:standin", "standin"):
        comm = TorchComm(dist.new_group(backend=backend))
        conforms(comm)
        devices.append(comm.device.type)
    with pytest.raises(DistplbError, match="the group's backends are cuda:standin; ranks exchange"):
        TorchComm(dist.new_group(backend="cuda:standin"))
    # As with `device_id=`, which the side group inherits.
    dist.group.WORLD.bound_device_id = torch.device("cuda:0")
    comm = TorchComm(side_group=True)
    conforms(comm)
    devices.append(comm.device.type)
    rank, size = dist.get_rank(), dist.get_world_size()
    del comm
    dist.destroy_process_group()
    dist.init_process_group(init_method=f"file://{folder}/again", rank=rank, world_size=size)
    assert dist.get_backend() == "undefined"
    conforms(TorchComm(side_group=True))
    return devices


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the default group is NCCL's")
def test_groups_of_several_backends_conform(tmp_path: Path) -> None:
    """A group without a backend for the CPU failed in its first collective, with an error from torch."""
    assert on_ranks(2, over_groups_of_several_backends, str(tmp_path)) == [["cpu"] * 6] * 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: NCCL has no CPU backend")
@pytest.mark.parametrize("backend", ["nccl", "cpu:gloo,cuda:nccl", None])
@pytest.mark.parametrize("is_bound", [False, True])
def test_nccl_conforms_at_world_1(tmp_path: Path, backend: str | None, is_bound: bool) -> None:
    device = torch.device("cuda", torch.cuda.device_count() - 1)
    bound = {"device_id": device} if is_bound else {}
    dist.init_process_group(backend, init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1, **bound)
    try:
        comm = TorchComm()
        conforms(comm)
        assert comm.device == device if is_bound else comm.device.index == torch.cuda.current_device()
    finally:
        dist.destroy_process_group()


def test_a_world_of_one_conforms_and_needs_no_group() -> None:
    conforms(WorldOfOne())
    with pytest.raises(DistplbError, match=r"torch\.distributed is not initialised; call .*init_process_group first"):
        TorchComm()


def agreements() -> list[str]:
    """What each rank raises, case by case."""
    comm, heard = TorchComm(), []
    cases: list[tuple[dict[str, int], Exception | None]] = [
        ({"a": 1, "b": -(2**62)}, None),
        ({"a": 1, "b": comm.rank}, None),
        ({"a": 1}, DistplbError("ä too long " * 400) if comm.rank == 2 else None),
        ({"a": 1}, ValueError("mine") if comm.rank else None),
        ({"a": 1}, DistplbError("record: \udcff is a file") if comm.rank == 1 else None),
        ({"a": 1}, HalfMovedError("torn") if comm.rank == 2 else DistplbError("other") if comm.rank == 1 else None),
    ]
    for fields, error in cases:
        try:
            agree(comm, fields, error)
            heard.append("well")
        except DistplbError as raised:
            heard.append(f"{type(raised).__name__} {raised}"[:60])
    return heard


def test_ranks_agree_on_fields_and_share_the_error_of_the_lowest_failed_rank() -> None:
    for rank, heard in enumerate(on_ranks(3, agreements)):
        assert heard[0] == "well"
        assert heard[1] == f"DisagreementError ranks disagree on b: 0 on one, 2 on another, {rank} on rank"[:60]
        assert heard[2].startswith("DistplbError rank 2: ä too long")
        assert heard[3] == "DistplbError rank 1: ValueError('mine')"
        # A folder name that was not UTF-8 stopped the rank that reported it, and the others waited for its text.
        assert heard[4] == r"DistplbError rank 1: record: \udcff is a file"
        # The gravest kind wins, whichever rank reports: afterwards no rank may treat its experts as whole.
        assert heard[5] == "HalfMovedError rank 1: other"


# --- nothing is pickled --------------------------------------------------------------------------------------------

# mpi4py's methods in lower case pickle their arguments; those in upper case take buffers.
PICKLING = {
    *("send", "recv", "bsend", "ssend", "isend", "irecv", "ibsend", "issend", "sendrecv", "bcast", "gather", "scatter"),
    *("allgather", "alltoall", "reduce", "allreduce", "scan", "exscan"),
}
SOURCES = {path.name: path.read_text() for path in Path(distplb.__file__).parent.rglob("*.py")}


def called(source: str) -> set[str]:
    """Names of functions and methods that are called or passed on."""
    nodes = list(ast.walk(ast.parse(source)))
    names = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    return names | {node.id for node in nodes if isinstance(node, ast.Name)}


def test_nothing_is_pickled_between_ranks() -> None:
    assert {"allreduce", "Iallreduce", "broadcast"} <= set.union(*map(called, SOURCES.values()))
    assert not {name for source in SOURCES.values() for name in called(source) if "_object" in name}
    assert not called(SOURCES["mpi.py"]) & PICKLING  # no other module imports mpi4py: see test_layers.py


def given_up_at_the_end() -> list[bool]:
    """What happens when the interpreter ends, while a name still refers to the communicator."""
    comm = TorchComm(deadline=60)
    held = comm._group is not None
    comm.all_reduce_sum(torch.ones(2, dtype=torch.int64))
    torchdist._let_go()
    return [held, comm._group is None, comm._side is None]


def test_a_communicator_that_is_still_referred_to_gives_its_groups_up_when_the_interpreter_ends() -> None:
    """It kept the threads of a destroyed group alive, one of which then aborted the process after a success."""
    assert on_ranks(2, given_up_at_the_end) == [[True] * 3] * 2
