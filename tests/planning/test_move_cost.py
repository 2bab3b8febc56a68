"""Distances, the cost of moves and the units of a price, against plain loops over plain numbers.

Shapes: L layers, E experts, P slots, M GPUs, G slots on each GPU.
"""

from __future__ import annotations

import random
from fractions import Fraction

import pytest
import torch

from distplb import Placement, Topology
from distplb.core.price import moved_slots
from distplb.planning.move_cost import cost_of_moves, distances, price_by_distance

# (N, GPUs on each, E, P)
SHAPES = [(1, 1, 4, 4), (1, 4, 8, 8), (2, 2, 8, 8), (3, 2, 6, 12), (2, 3, 5, 18), (4, 1, 8, 16), (2, 4, 3, 16)]


def random_table(random_: random.Random, num_layers: int, num_experts: int, num_slots: int) -> torch.Tensor:
    """`[L, P]`: every expert, some of them more than once."""
    spare = [random_.choices(range(num_experts), k=num_slots - num_experts) for _ in range(num_layers)]
    return torch.tensor([random_.sample([*range(num_experts), *more], num_slots) for more in spare])


def plain_distances(row: list[int], num_experts: int, nodes: int, gpus: int) -> list[list[int]]:
    """`[E, M]` of one layer."""
    size = len(row) // (nodes * gpus)
    homes = [{slot // size for slot, held in enumerate(row) if held == expert} for expert in range(num_experts)]
    return [
        [0 if gpu in home else 1 if gpu // gpus in {one // gpus for one in home} else 2 for gpu in range(nodes * gpus)]
        for home in homes
    ]


@pytest.mark.parametrize("shape", SHAPES)
def test_distances_are_0_where_a_gpu_holds_an_expert_and_1_where_its_node_does(shape: tuple[int, ...]) -> None:
    nodes, gpus, num_experts, num_slots = shape
    table = random_table(random.Random(num_slots), 20, num_experts, num_slots)
    by_gpu = distances(Placement(table, num_experts, nodes * gpus), Topology(nodes, gpus))
    assert by_gpu.dtype == torch.int8
    assert by_gpu.is_contiguous()
    assert by_gpu.tolist() == [plain_distances(row, num_experts, nodes, gpus) for row in table.tolist()]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_cost_of_moves_is_summed_over_the_slots(shape: tuple[int, ...]) -> None:
    nodes, gpus, num_experts, num_slots = shape
    random_, topology = random.Random(num_slots), Topology(nodes, gpus)
    current = Placement(random_table(random_, 6, num_experts, num_slots), num_experts, topology.num_gpus)
    tables = torch.stack([random_table(random_, 6, num_experts, num_slots) for _ in range(5)])  # [5, L, P]
    price = torch.tensor([[0, random_.randrange(100), random_.randrange(2**41)] for _ in range(6)])
    size, far = num_slots // topology.num_gpus, distances(current, topology).tolist()
    expected = [
        [
            sum(price[layer, far[layer][expert][slot // size]].item() for slot, expert in enumerate(row))
            for layer, row in enumerate(table)
        ]
        for table in tables.tolist()
    ]
    costs = cost_of_moves(tables, distances(current, topology), price)
    assert costs.dtype == torch.int64
    assert costs.tolist() == expected
    assert torch.equal(cost_of_moves(tables[2], distances(current, topology), price), costs[2])
    # A plan pays for the moves that an event counts.
    for table in tables:
        moved = moved_slots(current, Placement(table, num_experts, topology.num_gpus), topology)
        for column in (0, 1):
            one = torch.tensor([0, 1 - column, column]).expand(6, -1)
            assert torch.equal(cost_of_moves(table, distances(current, topology), one), moved[:, column])


def test_a_price_in_the_units_of_a_load_is_rounded_and_never_to_nothing() -> None:
    random_ = random.Random(1)
    prices = [0.0, 5e-324, 1e-9, 0.25, 0.5, 1.0, 1.5, 2.5, 3.0, 1e6, 2.0**40, 2.0**41 - 1, 2.0**41, 1e30, float("inf")]
    prices += [random_.uniform(0, 1000) for _ in range(20)] + [2.0 ** random_.uniform(-50, 70) for _ in range(40)]
    shifts = [-20, -1, 0, 1, 7, 40]

    def unit(price: float, shift: int) -> int:
        if price in (0.0, float("inf")):
            return 0 if price == 0 else 2**41 - 1
        return min(max(round(Fraction(price) * Fraction(2) ** shift), 1), 2**41 - 1)

    for inside, between in zip(prices, reversed(prices), strict=True):
        scaled = price_by_distance((inside, between), torch.tensor(shifts))
        assert scaled.dtype == torch.int64
        assert scaled.tolist() == [[0, unit(inside, shift), unit(between, shift)] for shift in shifts]
