"""A plan from one candidate is not worse than greedy, DeepSeek's algorithm, in any of thousands of rows.

Shapes: L layers, E experts, P slots, N nodes, B groups.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from distplb import Placement, Topology, imbalance, plan
from distplb.planning.greedy import greedy_numpy


def thousand_rows(num_experts: int) -> Tensor:
    """`[1000, E]`: lognormal, Zipf, a few hot experts, equal, many zeros; 200 of each."""
    generator = np.random.default_rng(num_experts)
    zipf = 1e5 / np.arange(1, num_experts + 1) ** generator.uniform(0.5, 2, (200, 1))
    hot = generator.permuted(np.arange(num_experts) < max(1, num_experts // 16), axis=0)
    warm = generator.integers(50, 150, (200, num_experts))
    some = generator.random((200, num_experts)) < generator.uniform(0.02, 0.4, (200, 1))
    kinds = [
        generator.lognormal(6, 1.2, (200, num_experts)),
        generator.permuted(zipf, axis=1),
        generator.permuted(warm * np.where(hot, generator.integers(5, 200, (200, 1)), 1), axis=1),
        np.repeat(generator.integers(1, 1000, (200, 1)), num_experts, axis=1),
        generator.integers(0, 1000, (200, num_experts)) * some,
    ]
    return torch.from_numpy(np.rint(np.concatenate(kinds)).astype(np.int64))


# (E, P, N, GPUs on each, B)
CLUSTERS = [
    (8, 8, 1, 2, None),
    (8, 16, 1, 16, None),  # one slot per GPU
    (8, 12, 1, 4, None),
    (8, 28, 1, 4, None),
    (5, 9, 1, 3, None),
    (3, 6, 1, 2, None),
    (16, 16, 2, 2, 4),
    (16, 24, 2, 4, 4),
    (16, 32, 2, 8, 4),
    (16, 24, 2, 4, 2),  # one group per node
    (12, 24, 4, 2, 12),  # one expert per group
    (9, 18, 3, 3, 3),
    (32, 48, 4, 2, 8),
    (64, 64, 2, 4, 8),
    (64, 72, 1, 8, None),
    (32, 64, 1, 32, None),
]


def both_imbalances(
    load: Tensor, cluster: tuple[int, int, int, int, int | None], shared: bool
) -> tuple[Tensor, Tensor]:
    """`[L]` each: the imbalance of a plan from one candidate, and of greedy under the same rules."""
    num_experts, num_slots, nodes, gpus, groups = cluster
    topology, options = Topology(nodes, gpus), {"num_groups": groups, "allow_shared_replicas": shared}
    greedy = Placement(greedy_numpy(load, topology, num_slots, **options), num_experts, topology.num_gpus)
    planned = plan(load, topology, num_slots=num_slots, **options)
    counted = load.any(1)  # a row without tokens has no imbalance
    return imbalance(load, planned)[0, counted], imbalance(load, greedy)[0, counted]


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("cluster", CLUSTERS)
def test_a_plan_is_never_worse_than_greedy(cluster: tuple[int, int, int, int, int | None], shared: bool) -> None:
    """In every one of 1,000 rows, with one candidate, whether or not replicas share a GPU."""
    load = thousand_rows(cluster[0])
    planned, greedy = both_imbalances(load, cluster, shared)
    worse = (planned > greedy * (1 + 1e-9)).nonzero()[:, 0]
    assert not len(worse), [
        (load[load.any(1)][row].tolist(), float(planned[row]), float(greedy[row])) for row in worse[:3]
    ]
    if cluster[1] > cluster[2] * cluster[3]:
        assert planned.mean() <= greedy.mean()
    if cluster in ((64, 72, 1, 8, None), (16, 24, 2, 4, 4)):
        assert planned.mean() < greedy.mean() - 0.01


@pytest.mark.parametrize(
    ("load", "cluster", "shared"),
    [
        ([1, 1, 1, 1, 3, 1], (6, 12, 2, 3, 6), True),
        ([1, 1, 2, 1, 0, 1, 1, 2], (8, 12, 2, 3, 4), True),
        ([0, 0, 2, 2, 1, 0, 0, 2, 1, 1, 1, 0], (12, 20, 2, 5, 4), False),
        ([1, 1, 2, 3, 3, 3, 3, 1, 0, 0, 0, 4], (12, 24, 2, 3, 6), False),
    ],
)
def test_ties_among_groups_do_not_make_it_worse_than_greedy(
    load: list[int], cluster: tuple[int, int, int, int, int | None], shared: bool
) -> None:
    """Greedy takes equal experts of a node in the order in which the node got their groups. In a few rows in 100,000,
    a search that took them in ascending order ended up to a fifth worse than greedy."""
    planned, greedy = both_imbalances(torch.tensor([load]), cluster, shared)
    assert float(planned) <= float(greedy) * (1 + 1e-9)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("cluster", [cluster for cluster in CLUSTERS if cluster[4] is not None])
def test_rows_full_of_ties_are_never_worse_than_greedy_either(
    cluster: tuple[int, int, int, int, int | None], shared: bool
) -> None:
    load = torch.randint(0, 4, (2000, cluster[0]), generator=torch.Generator().manual_seed(1))
    planned, greedy = both_imbalances(load, cluster, shared)
    assert (planned <= greedy * (1 + 1e-9)).all()
