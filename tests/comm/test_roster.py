"""EP groups with copies of the same experts but their own communicators are refused on every rank before any move."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from jobs import EXPERTS, LAYERS, Job, skewed
from ranks import on_ranks
from torch.distributed.device_mesh import init_device_mesh

from distplb import DistplbError, Placement, Topology
from distplb.comm.grid import GridComm
from distplb.comm.torchdist import TorchComm


def groups() -> tuple[Any, list[Any]]:
    """This rank's EP group of two, and both."""
    both = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    return both[dist.get_rank() // 2], both


def side_by_side(case: str) -> tuple[str, bool]:
    """The error of a job of EP 2 × expert-data 2, and whether anything has moved."""
    rank = dist.get_rank()
    group, _ = groups()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("edp", "ep"))
    job = Job(ranks=2)
    options: dict[str, Any] = {"comm": TorchComm(group)}
    layers = job.layers()
    if case == "no communicator":
        job = Job(ranks=1)
        layers, options = job.layers(), {"comm": None, "topology": Topology(1, 1)}
    if case == "stages":
        from dataclasses import replace

        layers = [replace(layer, name=f"stage{rank // 2}.{layer.name}") for layer in layers]
    if case == "grid":
        options = {"comm": GridComm(TorchComm(mesh["ep"]), TorchComm(mesh["edp"])), "gpu": rank % 2}
    if case == "late" and rank < 2:
        dist.barrier()  # until the others are there
    message, before, rebalancer = "", job.values(), None
    try:
        rebalancer = job.rebalancer(layers, **options)
    except DistplbError as error:
        message = str(error)
    if case == "late" and rank >= 2:
        dist.barrier()
    dist.barrier()  # like averaging gradients, which no rank passes before all have their rebalancers
    try:
        # One group's load differs from the other's, so that each on its own would place differently.
        for _ in range(2 if rebalancer is not None else 0):
            job.iterate(skewed((0, 1) if rank < 2 else (4, 5)))
            job.optimizer.zero_grad()
            before = job.values()
            rebalancer.step()
    except DistplbError as error:
        message = str(error)
    moved = any(not torch.equal(a, b) for a, b in zip(before, job.values(), strict=True))
    dist.barrier()
    return message, moved


@pytest.mark.parametrize("case", ["at once", "late"])
def test_ep_groups_that_move_by_themselves_are_refused_on_every_rank(case: str) -> None:
    """They ended with different placements, and averaging over expert-data-parallel ranks mixed different experts."""
    for message, moved in on_ranks(4, side_by_side, case, deadline=60):
        assert not moved
        assert "each have their own communicator for layers of the same names (moe.0, ...)" in message
        assert "pass one communicator of all these ranks, such as comm=TorchComm(group_of_all) or GridComm(" in message


def test_processes_without_a_communicator_are_refused_like_groups() -> None:
    for message, moved in on_ranks(4, side_by_side, "no communicator", deadline=60):
        assert not moved
        assert "each have their own communicator" in message


@pytest.mark.parametrize("case", ["stages", "grid"])
def test_stages_of_other_names_and_grids_are_not(case: str) -> None:
    for message, moved in on_ranks(4, side_by_side, case, deadline=60):
        assert message == ""
        assert moved


def one_after_the_other() -> list[str]:
    """The communicator is corrected in the same process; one that was closed does not affect any other."""
    rank, messages = dist.get_rank(), []
    group, _ = groups()
    job = Job(ranks=2)
    try:
        job.rebalancer(comm=TorchComm(group))
    except DistplbError as error:
        messages.append(str(error)[:30])
    dist.barrier()
    right = job.rebalancer(comm=TorchComm(), gpu=rank % 2)
    right.apply(Placement(torch.arange(EXPERTS).flip(0).expand(LAYERS, -1), EXPERTS, 2))
    right.restore()
    right.close()
    dist.barrier()
    if rank < 2:  # alone now, because the other group has none
        other = Job(ranks=2)
        layers = other.layers()
        for number, layer in enumerate(layers):
            object.__setattr__(layer, "name", f"alone.{number}")
        other.rebalancer(layers, comm=TorchComm(group)).close()
    dist.barrier()
    if rank >= 2:
        other = Job(ranks=2)
        layers = other.layers()
        for number, layer in enumerate(layers):
            object.__setattr__(layer, "name", f"alone.{number}")
        other.rebalancer(layers, comm=TorchComm(group)).close()
    return messages


def test_what_was_refused_or_closed_does_not_stand_in_the_way_of_what_comes_after() -> None:
    messages = on_ranks(4, one_after_the_other, deadline=60)
    assert all(len(refused) <= 1 for refused in messages)
    assert sum(map(len, messages)) >= 2  # at least the group that came second
