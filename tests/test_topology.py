"""`Topology`: what it derives and what it refuses. Shapes: M GPUs, P slots, G slots on each GPU."""

from __future__ import annotations

from dataclasses import FrozenInstanceError

import pytest

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
    with pytest.raises(DistplbError, match=f"Topology: {name} is {value!r}; pass a whole number of at least 1"):
        Topology(**numbers)  # type: ignore[arg-type]


def test_a_topology_is_a_frozen_value() -> None:
    topology = Topology(2, 4)
    assert topology == Topology(2, 4)
    assert len({topology, Topology(2, 4), Topology(4, 2)}) == 2
    with pytest.raises(FrozenInstanceError):
        topology.num_nodes = 3  # type: ignore[misc]
