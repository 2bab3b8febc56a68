"""Ranks in rows and columns without a common group: what they send, and a job of EP groups and stages on them.

Shapes: L layers, E experts, P slots, G slots on each GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conformance import conforms, message
from jobs import EXPERTS, LAYERS, SLOT_BYTES, Job
from ranks import mesh_of, on_ranks
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from distplb import DistplbError, LoadWindow, Placement
from distplb.comm.base import Comm, Round, WorldOfOne
from distplb.comm.grid import GridComm
from distplb.comm.torchdist import TorchComm
from distplb.errors import LostRanksError
from distplb.records.events import RebalanceEvent

ALONG = [(source, target) for source in range(4) for target in range(4) if source != target and source + target != 3]


def refusal(call: Any) -> str:
    try:
        call()
    except DistplbError as error:
        return str(error)
    return "no error"


def grids() -> dict[str, Any]:
    results: dict[str, Any] = {}
    for axes in ("edp ep", "ep edp"):
        mesh = mesh_of(axes)
        grid = GridComm(TorchComm(mesh["ep"]), TorchComm(mesh["edp"]))
        conforms(grid, ALONG)
        results[axes] = (grid.rank, grid.size)
        # One rank sends to the rank on the diagonal.
        sends = [(message(0, 3, grid), 3)] if grid.rank == 0 else []
        receives = [(torch.zeros_like(message(0, 3, grid)), 0)] if grid.rank == 3 else []
        results[f"{axes} diagonal"] = refusal(lambda: grid.exchange([(sends, receives)]))  # noqa: B023, called at once
        conforms(grid, ALONG)  # no rank was left waiting
    ep = TorchComm(mesh["ep"])
    results["same axis"] = refusal(lambda: GridComm(ep, ep))
    # Ranks 0 and 1 form rows of their own, 2 and 3 one row; columns are {0, 2} and {1, 3}.
    rows = [dist.new_group([0]), dist.new_group([1]), dist.new_group([2, 3])]
    row, column = TorchComm(rows[min(2, dist.get_rank())]), TorchComm(mesh_of("edp ep")["edp"])
    results["uneven"] = refusal(lambda: GridComm(row, column))
    results["mesh"] = refusal(lambda: TorchComm(mesh))
    return results


@pytest.fixture(scope="module")
def grids_of_ranks() -> list[dict[str, Any]]:
    return on_ranks(4, grids, deadline=60)


def test_a_grid_conforms_but_for_the_diagonal(grids_of_ranks: list[dict[str, Any]]) -> None:
    assert [results["edp ep"] for results in grids_of_ranks] == [(0, 4), (1, 4), (2, 4), (3, 4)]
    assert [results["ep edp"] for results in grids_of_ranks] == [(0, 4), (2, 4), (1, 4), (3, 4)]
    for results in grids_of_ranks:
        for axes in ("edp ep", "ep edp"):
            assert results[f"{axes} diagonal"] == (
                "rank 0: rank 0 of the 2 × 2 grid has messages to or from rank 3, in neither its row nor its "
                "column; if experts are sharded over EP groups, pass a communicator of all ranks, such as "
                "TorchComm(dist.new_group(ranks))"
            )


def test_what_is_no_grid_is_refused_on_all_ranks(grids_of_ranks: list[dict[str, Any]]) -> None:
    for results in grids_of_ranks:
        for case, wording in (
            ("same axis", "ranks disagree on the row in the grid (outer.rank): 0 on one, 1 on another"),
            ("uneven", "inner and outer are not the rows and columns of one grid"),
        ):
            assert wording in results[case]
            assert "as in GridComm(TorchComm(mesh['ep']), TorchComm(mesh['edp']))" in results[case]
        assert results["mesh"].startswith("the mesh has 2 axes ('ep', 'edp'); pass one of them, as in mesh['ep'], or")


def test_two_devices_are_refused() -> None:
    with pytest.raises(DistplbError, match="inner has its buffers on cpu, outer on meta; pass groups of the same back"):
        GridComm(WorldOfOne(), WorldOfOne("meta"))


def lost() -> tuple[list[int], str, str]:
    """Which ranks a rank of the grid misses after rank 3 is gone, in a first call and in one that needs no other."""
    mesh = mesh_of("ep edp")
    grid = GridComm(TorchComm(mesh["ep"], deadline=4), TorchComm(mesh["edp"], deadline=4))
    if grid.rank == 3:
        return [], "", ""
    value = torch.ones(1, dtype=torch.int64)
    with pytest.raises(LostRanksError) as first:
        grid.all_reduce_sum(value)
    with pytest.raises(LostRanksError) as second:
        grid.exchange([])
    return list(first.value.missing), str(first.value), str(second.value)


def test_a_lost_rank_is_named_by_its_place_in_the_grid_and_nobody_goes_on() -> None:
    _, *ranks = sorted(on_ranks(4, lost, deadline=60))
    for missing, text, again in ranks:
        assert again == text
        assert "of the grid: " in text
        assert str(missing[0]) in text
    # Rank 3's row and column miss it; the rank on the diagonal misses the rank that waited for it.
    assert [missing for missing, *_ in ranks] == [[2], [3], [3]]


# --- a job on a grid -----------------------------------------------------------------------------------------------

ITERATIONS, EVERY = 6, 2


class Recorded(TorchComm):
    """Keeps the peers of all messages."""

    def __init__(self, mesh: DeviceMesh) -> None:
        super().__init__(mesh)
        self.peers: list[int] = []

    def exchange(self, rounds: Sequence[Round]) -> None:
        self.peers += [peer for one in rounds for messages in one for _, peer in messages]
        super().exchange(rounds)


def filled(job: Job, gpu: int) -> None:
    """Give each expert its own weights, the same in all EP groups."""
    for layer, weight in enumerate(job.weights):
        for slot in range(len(weight)):
            generator = torch.Generator().manual_seed(100 * layer + gpu * len(weight) + slot)
            weight.data[slot] = torch.randn(weight.shape[1:], generator=generator)


def counts_of(group: int, placement: Placement) -> Tensor:
    """`[L, P]`, by slot: in both groups the first two experts are hot, and in each group one more."""
    counts = torch.full((LAYERS, EXPERTS), 10)
    counts[:, :2] = 90
    counts[:, 2 + group] = 50
    return counts.gather(1, placement.expert_of_slot)


def by_expert(job: Job, placement: Placement, row: TorchComm) -> list[list[float]]:
    """Weights and both moments of every expert of the EP group, in logical order."""
    rows = []
    for layer, weight in enumerate(job.weights):
        state = job.optimizer.state[weight]
        for tensor in (weight.detach(), state["exp_avg"], state["exp_avg_sq"]):
            whole = torch.zeros(EXPERTS, *tensor.shape[1:], dtype=torch.float32)  # by slot
            whole[row.rank * len(tensor) : (row.rank + 1) * len(tensor)] = tensor
            row.all_reduce_sum(whole)
            rows.append(whole[placement.inverse[layer, :, 0]].flatten().tolist())
    return rows


def trained(comm: Comm | None, mesh: DeviceMesh) -> dict[str, Any]:
    """A job of two EP groups of two ranks, rebalanced over `comm`, or not at all."""
    events: list[RebalanceEvent] = []
    row, group = TorchComm(mesh["ep"]), mesh["edp"].get_local_rank()
    job = Job(ranks=2)
    job.window = LoadWindow(LAYERS, EXPERTS, 4)
    filled(job, row.rank)
    placement = Placement.contiguous(LAYERS, EXPERTS, 2)
    if comm is not None:
        rebalancer = job.rebalancer(comm=comm, gpu=row.rank, engine="reference", on_event=events.append)
    for _ in range(ITERATIONS):
        job.iterate(counts_of(group, placement))
        if comm is not None:
            rebalancer.step()
            placement = rebalancer.placement
    return {
        "events": [replace(event, seconds={}, iteration_seconds=0, iteration_seconds_next=None) for event in events],
        "placement": placement.expert_of_slot.tolist(),
        "experts": by_expert(job, placement, row),
    }


def jobs() -> dict[str, Any]:
    results: dict[str, Any] = {}
    for axes in ("edp ep", "ep edp"):
        mesh = mesh_of(axes)
        along = Recorded(mesh["edp"])
        results[axes] = trained(GridComm(TorchComm(mesh["ep"]), along), mesh) | {"sent across": along.peers}
        results[f"{axes} static"] = trained(None, mesh)
    results["one group"] = trained(TorchComm(), mesh_of("edp ep"))
    results["stages"] = [staged(with_all) for with_all in (True, False)]
    return results


def staged(with_all: bool) -> list[Any]:
    """Two stages of a pipeline, EP 2 each: the second has one layer with another name, or none at all."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "ep"))
    stage, events = mesh["pp"].get_local_rank(), []
    job = Job(ranks=2)
    layers = job.layers()
    if stage == 1:
        layers = [replace(layers[1], name="moe.9")] if with_all else []
        job.window = LoadWindow(1, EXPERTS, 4)
    rebalancer = job.rebalancer(layers, comm=TorchComm(mesh["ep"]), engine="reference", on_event=events.append)
    for _ in range(2 * EVERY):
        job.optimizer.zero_grad()
        job.backward()
        job.optimizer.step()
        for layer in range(len(layers)):
            job.window.add(layer, counts_of(stage, Placement.contiguous(LAYERS, EXPERTS, 2))[layer])
        rebalancer.step()
    moved = [event.slots_moved for event in events if event.imbalance_next is None]
    return [rebalancer.iteration, moved, [event.layers for event in events[:1]]]


@pytest.fixture(scope="module")
def jobs_of_ranks() -> list[dict[str, Any]]:
    return on_ranks(4, jobs, deadline=90)


def test_a_grid_rebalances_as_one_group_of_all_ranks_does(jobs_of_ranks: list[dict[str, Any]]) -> None:
    for results in jobs_of_ranks:
        one = jobs_of_ranks[0]["one group"]
        for name in ("edp ep", "ep edp", "one group"):
            assert results[name]["placement"] == one["placement"]
            assert results[name]["events"] == one["events"]
        first = one["events"][0]
        # Steps of both groups: expert 2 is hot in half of them, expert 3 in the other half; the rest is the same.
        assert first.slots_moved > 0
        assert first.imbalance_before == pytest.approx((2 * (90 + 90 + 50 + 10) / (2 * 90 + 50 + 5 * 10),) * LAYERS)


def test_moves_stay_in_each_group_and_experts_with_their_moments_are_what_they_are_without(
    jobs_of_ranks: list[dict[str, Any]],
) -> None:
    for results in jobs_of_ranks:
        for axes in ("edp ep", "ep edp"):
            assert results[axes]["sent across"] == []
            assert results[axes]["experts"] == results[f"{axes} static"]["experts"]
            bytes_moved = [event.bytes_moved for event in results[axes]["events"]]
            assert bytes_moved[0] == 2 * results[axes]["events"][0].slots_moved * SLOT_BYTES  # in each group


def test_stages_of_a_pipeline_have_layers_of_their_own_or_none(jobs_of_ranks: list[dict[str, Any]]) -> None:
    for rank, results in enumerate(jobs_of_ranks):
        both, one = results["stages"]
        if rank < 2:
            assert both == one
            assert both[2] == [("moe.0", "moe.1")]
        else:
            assert both[2] == [("moe.9",)]
            assert one == [2 * EVERY, [], []]
        assert both[0] == 2 * EVERY
        assert both[1][0] > 0
