"""`split`: from counts to a checked `Split`, and what it refuses."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from distplb import DistplbError, TimeCurve, Topology
from distplb.splitting.split import split

TOPOLOGY = Topology(num_nodes=1, gpus_per_node=4)
HOME = [0, 1, 2, 3]
COUNTS = [[90, 1, 2, 3], [80, 2, 0, 1], [70, 3, 1, 0], [60, 4, 5, 6]]


def test_a_hot_expert_is_spread_over_its_node_to_within_the_tolerance() -> None:
    found = split(COUNTS, HOME, topology=TOPOLOGY, engine="reference")
    assert found.load.tolist() == [82, 82, 82, 82]
    assert found.replica.tolist() == [[-1, -1], [0, -1], [0, -1], [0, -1]]
    assert found.pushes.tolist() == [[0, 1, 1, 1], [0] * 4, [0] * 4, [0] * 4]


def test_replicas_stay_inside_nodes_and_no_node_is_evened_out_below_the_busiest() -> None:
    found = split(COUNTS, HOME, topology=Topology(2, 2), engine="reference")
    assert found.load.tolist() == [155, 155, 8, 10]
    assert found.num_replicas == 1


def test_a_split_keeps_its_values_when_the_caller_reuses_its_buffers() -> None:
    counts, home = torch.tensor(COUNTS), torch.tensor(HOME)
    found = split(counts, home, topology=TOPOLOGY)
    counts.zero_()
    home.zero_()
    assert found.counts.tolist() == COUNTS
    assert found.home.tolist() == HOME


@pytest.mark.parametrize("engine", ["reference", "cpu"])
def test_all_options_at_once_on_two_nodes(engine: str) -> None:
    """A smallest quota, tiles, one slot and homes in a strided view, with more tokens than fit into 32 bits."""
    if engine == "cpu":
        pytest.importorskip("numba")
    random = np.random.default_rng(0)
    counts = random.lognormal(20, 1.5, (8, 32)).astype(np.int64)
    home = torch.arange(64).view(32, 2)[:, 1] // 8
    options: dict[str, Any] = {"replica_slots": 1, "tolerance": 0.02, "min_quota": 10**6, "tile": 128}
    found = split(counts, home, topology=Topology(2, 4), engine=engine, **options)
    assert found.num_replicas
    lent = found.quota.clone()
    lent[torch.arange(32), home] = 0
    assert lent[lent > 0].amin() >= 10**6
    assert not (lent % 128).any()
    expert, gpu = lent.nonzero(as_tuple=True)
    assert torch.equal(home[expert] // 4, gpu // 4)
    same = split(counts, home, topology=Topology(2, 4), engine="reference", **options)
    assert torch.equal(found.quota, same.quota)
    assert torch.equal(found.replica, same.replica)


def test_with_a_price_only_what_pays_is_pushed() -> None:
    """Three GPUs take replicas from GPU 0 for 218 tokens; each replica costs a price at GPU 0."""
    cost = {}
    for price in (40, 110):
        found = split(COUNTS, HOME, topology=TOPOLOGY, push_price=(price, math.inf))
        cost[price] = int(found.load.amax()) + price * int(max(found.pushes.sum(0).amax(), found.pushes.sum(1).amax()))
    assert cost[40] == 100 + 2 * 40  # the takers pass their own tokens on; three replicas would cost 82 + 3 × 40
    assert cost[110] < 300
    assert split(COUNTS, HOME, topology=TOPOLOGY, push_price=(250, math.inf)).is_trivial
    assert split(COUNTS, HOME, topology=TOPOLOGY, push_price=(math.inf, math.inf)).is_trivial


def test_replicas_leave_their_node_where_that_pays() -> None:
    nodes = Topology(2, 2)
    inside = split(COUNTS, HOME, topology=nodes, push_price=(1, math.inf))
    between = split(COUNTS, HOME, topology=nodes, push_price=(1, 20))
    assert torch.equal(inside.quota, split(COUNTS, HOME, topology=nodes, push_price=(1, 300)).quota)
    assert between.load.amax() + 2 * 20 < inside.load.amax()


def test_with_a_curve_times_are_even_and_not_tokens() -> None:
    """Every expert takes 50 ns before its first token: GPU 0 holds four of them, and so gets fewer tokens."""
    curve = TimeCurve((0, 1, 1001), (0, 51, 1051))
    counts, home = [[100] * 4 + [400], [0] * 5], [0, 0, 0, 0, 1]
    options: dict[str, Any] = {"topology": Topology(1, 2), "replica_slots": 1, "tolerance": 0.0}
    plain = split(counts, home, **options)
    timed = split(counts, home, time_curve=curve, **options)
    assert plain.is_trivial
    assert timed.load.tolist() == [350, 450]  # 550 ns and 550 ns, with the replica's 50


def test_within_the_tolerance_it_is_trivial() -> None:
    even = [[101, 100, 99, 100]] * 4
    assert split(even, HOME, topology=TOPOLOGY, tolerance=0.02).is_trivial
    assert not split(even, HOME, topology=TOPOLOGY, tolerance=0.0).is_trivial


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_counts_and_homes_of_any_kind_give_the_same(kind: Any) -> None:
    found = split(kind(COUNTS), kind(HOME), topology=TOPOLOGY)
    assert torch.equal(found.quota, split(COUNTS, HOME, topology=TOPOLOGY).quota)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "GPUs": ({"topology": Topology(1, 2)}, "counts has shape [4, 4]; pass [GPUs, experts] with the topology's 2 GPUs"),
    "no sources": ({"counts": [329, 10, 8, 10]}, "counts has shape [4]; pass [GPUs, experts] with the topology's 4"),
    "fractions": ({"counts": [[0.5] * 4] * 4}, "counts has 0.5 for expert 0"),
    "homes": ({"home": [0, 1, 2]}, "home has shape [3]; pass the GPU of each of 4 experts"),
    "a home": ({"home": [0, 1, 2, 4]}, "home has GPUs 0 to 4; pass GPUs in [0, 4)"),
    "float homes": ({"home": [0.0, 1.0, 2.0, 3.0]}, "home is torch.float64 of shape (4,); pass the GPU of each expert"),
    "slots": ({"replica_slots": -1}, "replica_slots is -1; pass an integer of at least 0"),
    "half a slot": ({"replica_slots": 0.5}, "replica_slots is 0.5; pass an integer of at least 0"),
    "too many slots": ({"replica_slots": 10**9}, "replica_slots is 1000000000; pass at most 1,024"),
    "overflow": ({"counts": [[2**61] * 4] * 4}, "counts add up to 3.69e+19 tokens; pass those of one step, fewer"),
    "no quota": ({"min_quota": 0}, "min_quota is 0; pass an integer of at least 1"),
    "a huge tile": ({"tile": 2**63}, "tile is 9223372036854775808; pass tokens of one step, at most 2^50"),
    "one price": ({"push_price": 5.0}, "push_price is 5.0; pass two numbers of tokens, such as (2000.0, math.inf)"),
    "three prices": ({"push_price": (1, 2, 3)}, "push_price is '1', '2', '3'; pass two numbers of tokens"),
    "prices in words": ({"push_price": ("low", "high")}, "push_price is 'low', 'high'; pass two numbers of tokens"),
    "a dear inside": ({"push_price": (9.0, 5.0)}, "push_price is (9.0, 5.0); pass two numbers from 0 to infinity"),
    "no price": ({"push_price": (float("nan"), 5.0)}, "push_price is (nan, 5.0); pass two numbers from 0 to infinity"),
    "half a token": ({"max_tokens_per_gpu": 0.5}, "max_tokens_per_gpu is 0.5; pass an integer of at least 1"),
    "a list of times": ({"time_curve": [1, 2]}, "time_curve is a list; pass a TimeCurve, such as measured_curve"),
    "percent": ({"tolerance": 5}, "tolerance is 5; pass a fraction from 0 to 1, such as 0.005"),
    "NaN": ({"tolerance": float("nan")}, "tolerance is nan; pass a fraction from 0 to 1"),
    "engine": ({"engine": "abacus"}, "engine 'abacus' is unknown; pass one of reference, cpu, or engine=None"),
    "no engine": ({"engine": 1}, "engine is 1; pass the name of an engine, or None for the fastest"),
    "no topology": ({"topology": (1, 4)}, "topology is a tuple; pass a Topology, such as Topology.from_env()"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_refused_with_what_to_pass(name: str) -> None:
    changed, text = WRONG[name]
    arguments: dict[str, Any] = {"counts": COUNTS, "home": HOME, "topology": TOPOLOGY} | changed
    with pytest.raises(DistplbError) as refused:
        split(arguments.pop("counts"), arguments.pop("home"), **arguments)
    assert text in str(refused.value)
