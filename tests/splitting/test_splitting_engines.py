"""One contract, two engines: `cpu` decides exactly what `reference` decides; and how good that is.

Shapes: E experts, M GPUs, N nodes, R replica slots on each GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from splits import best_of_all, cheapest_of_all, power_law

from distplb import TimeCurve, Topology
from distplb.splitting import cpu, reference
from distplb.splitting.caps import nodes_of
from distplb.splitting.rules import LONGEST, NEVER, NO_CURVE, Array, Rules
from distplb.splitting.split import level_of

needs_numba = pytest.mark.skipif(not cpu.is_there(), reason="Numba is not installed")
TOLERANCE = round(0.005 * 2**20)
Case = dict[str, Any]


def case(
    tokens: Any,
    home: Any,
    topology: Topology,
    slots: int,
    level: int | None = None,
    curve: Array = NO_CURVE,
    **prices: int,
) -> Case:
    """A step with the level of the default tolerance; `prices` are the other fields of `Rules`."""
    total, owner = np.asarray(tokens, np.int64), np.asarray(home, np.int64)
    if level is None:
        time = times(total, curve, prices.get("tile", 1))
        level = level_of(time, owner, topology, TOLERANCE, "between" in prices)
    rules = Rules(slots, level, **prices)
    return {"tokens": total, "home": owner, "node": nodes_of(topology), "rules": rules, "curve": curve}


def times(tokens: Array, curve: Array, tile: int) -> Array:
    """`[E]`, what the tokens of each expert take at home."""
    if not curve.size:
        return tokens
    points, nanoseconds = (tuple(row) for row in curve.tolist())
    return TimeCurve(points, nanoseconds).time(torch.from_numpy(-(-tokens // tile) * tile)).numpy()


def drawn(seed: int) -> Case:
    """Up to 3 nodes of up to 5 GPUs, skewed tokens with zeros and ties, any homes; prices, tiles and curves."""
    random = np.random.default_rng(seed)
    topology = Topology(int(random.integers(1, 4)), int(random.integers(1, 6)))
    num_gpus = topology.num_gpus
    num_experts = num_gpus * int(random.integers(1, 5))
    tokens = random.lognormal(3, 1.5, num_experts).astype(np.int64) * (random.random(num_experts) < 0.8)
    if seed % 4 == 0:
        tokens = tokens // 8 * 8
    home = random.permutation(np.arange(num_experts) % num_gpus)
    slots, prices = int(random.integers(0, 4)), dict[str, int]()
    if seed % 2:
        tile = int(random.choice((1, 1, 4, 16)))
        prices |= {"tile": tile, "least": -(-int(random.choice((1, 1, 7, 40))) // tile) * tile}
    if seed % 3:
        mean = tokens.sum() / num_gpus
        prices["inside"] = int(mean * random.choice((0, 0.02, 0.1, 0.5)))
        if random.random() < 0.5:
            prices["between"] = prices["inside"] * int(random.integers(1, 10)) + int(random.integers(0, 3))
    curve = drawn_curve(random) if seed % 5 == 0 else NO_CURVE
    return case(tokens, home, topology, slots, curve=curve, **prices)


def drawn_curve(random: np.random.Generator) -> Array:
    """Up to 5 points, some flat stretches."""
    points = int(random.integers(2, 6))
    tokens = np.cumsum(random.integers(1, 60, points))
    times = np.cumsum(random.integers(0, 100, points) * (random.random(points) < 0.8))
    return np.stack([tokens - tokens[0], times])


def special() -> Iterator[tuple[str, Case]]:
    flat, nodes = Topology(1, 4), Topology(2, 2)
    yield "no tokens", case([0] * 8, [0, 0, 1, 1, 2, 2, 3, 3], flat, 2)
    yield "one GPU", case([5, 7], [0, 0], Topology(1, 1), 2)
    yield "one expert a GPU", case([100, 3, 2, 1], [0, 1, 2, 3], flat, 2)
    yield "all tokens on one expert", case([0, 0, 999, 0], [0, 1, 2, 3], flat, 1)
    yield "no replica slots", case([100, 3, 2, 1], [0, 1, 2, 3], flat, 0)
    yield "more slots than experts", case([100, 3, 2, 1], [0, 1, 2, 3], flat, 9)
    yield "ties", case([8, 8, 8, 8, 0, 0, 0, 0], [0, 0, 1, 1, 2, 2, 3, 3], flat, 2)
    yield "an idle node", case([9, 8, 0, 0], [0, 1, 2, 3], nodes, 2)
    yield "a GPU without experts", case([9, 8, 7, 6], [0, 0, 1, 3], flat, 2)
    yield "2^40 tokens", case([2**40, 2**39, 3, 0], [0, 1, 2, 3], flat, 2)
    yield "tiles larger than a surplus", case([40, 30, 30, 20], [0, 1, 2, 3], flat, 1, tile=16)
    yield "no surplus is worth a replica", case([40, 30, 30, 20], [0, 1, 2, 3], flat, 1, least=100)
    yield "level 0 below all loads", case([5, 4, 3, 2], [0, 1, 2, 3], flat, 1, level=0)
    yield "a price that never pays", case([5, 4, 3, 2], [0, 1, 2, 3], flat, 1, inside=100)
    yield "no price between nodes", case([9, 8, 0, 0], [0, 1, 2, 3], nodes, 2, between=0)
    long = np.array([[0, 1], [0, LONGEST]])
    yield "times that saturate", case([2**40, 2**39, 3, 0], [0, 1, 2, 3], flat, 2, curve=long)
    yield "a curve without time", case([5, 4, 3, 2], [0, 1, 2, 3], flat, 1, curve=np.array([[0, 9], [0, 0]]))
    yield "time without tokens", case([5, 4, 3, 0], [0, 1, 2, 3], flat, 1, curve=np.array([[0, 9], [50, 90]]))


SPECIAL = dict(special())


@needs_numba
def test_the_engines_agree_on_thousands_of_random_cases() -> None:
    for seed in range(4000):
        one = drawn(seed)
        assert same(cpu.replicas(**one), reference.replicas(**one)), one


@needs_numba
@pytest.mark.parametrize("name", SPECIAL)
def test_the_engines_agree_on_special_cases(name: str) -> None:
    assert same(cpu.replicas(**SPECIAL[name]), reference.replicas(**SPECIAL[name]))


def same(one: tuple[Any, Any], other: tuple[Any, Any]) -> bool:
    return all(np.array_equal(left, right) for left, right in zip(one, other, strict=True))


class Replica(NamedTuple):
    """Tokens of an expert that a GPU computes with a replica."""

    expert: int
    gpu: int
    tokens: int


def decided(one: Case) -> list[Replica]:
    experts, parts = reference.replicas(**one)
    assert ((experts >= 0) == (parts > 0)).all()
    return [Replica(int(experts[at]), int(at[0]), int(parts[at])) for at in zip(*np.nonzero(parts), strict=True)]


def gpu_times(one: Case, replicas: list[Replica]) -> list[int]:
    """`[M]`, the time of each GPU with these replicas."""
    at_home, tile = one["tokens"].copy(), one["rules"].tile
    busy = np.zeros(len(one["node"]), np.int64)
    for replica in replicas:
        at_home[replica.expert] -= replica.tokens
        busy[replica.gpu] += int(times(np.array([replica.tokens]), one["curve"], tile)[0])
    np.add.at(busy, one["home"], times(at_home, one["curve"], tile))
    return busy.tolist()


def price(one: Case, replicas: list[Replica]) -> int:
    """The prices of the replicas that one GPU sends, or receives, where they are highest."""
    rules, node = one["rules"], one["node"]
    paid = np.zeros((2, len(node)), np.int64)
    for replica in replicas:
        giver = one["home"][replica.expert]
        each = rules.inside if node[giver] == node[replica.gpu] else rules.between
        paid[0, giver] += each
        paid[1, replica.gpu] += each
    return int(paid.max())


@pytest.mark.parametrize("name", SPECIAL)
def test_a_split_never_costs_more_than_none_and_keeps_its_rules(name: str) -> None:
    check(SPECIAL[name])


def test_random_splits_never_cost_more_than_none_and_keep_their_rules() -> None:
    for seed in range(900):
        check(drawn(seed))


def check(one: Case) -> None:
    rules, replicas = one["rules"], decided(one)
    before, after = max(gpu_times(one, [])), max(gpu_times(one, replicas))
    if replicas:
        assert before > rules.level
        assert after + price(one, replicas) < before or after <= rules.level
    assert len({(replica.expert, replica.gpu) for replica in replicas}) == len(replicas)
    for replica in replicas:
        home = one["home"][replica.expert]
        assert replica.tokens >= rules.least
        assert replica.tokens % rules.tile == 0
        assert home != replica.gpu
        assert one["node"][home] == one["node"][replica.gpu] or rules.between != NEVER
    held = np.bincount([replica.gpu for replica in replicas], minlength=len(one["node"]))
    assert held.max() <= rules.slots
    given = np.bincount([r.expert for r in replicas], [r.tokens for r in replicas], minlength=len(one["tokens"]))
    assert (given <= np.array(one["tokens"])).all()


# --- how good it is, against all splits ----------------------------------------------------------------------------


def small(seed: int) -> Case:
    random = np.random.default_rng(seed)
    num_gpus = int(random.integers(2, 5))
    num_experts = int(random.integers(num_gpus, num_gpus + 3))
    tokens = random.lognormal(4, 1, num_experts).astype(np.int64)
    home = random.permutation(np.arange(num_experts) % num_gpus)
    return case(tokens, home, Topology(1, num_gpus), 1)


def test_small_splits_are_as_even_as_any_and_use_as_few_replicas() -> None:
    """Greedy placement alone is as even as possible in 70 % of these cases; relays bring it to all but one or two."""
    higher, more, number = 0, 0, 120
    for seed in range(number):
        one = small(seed)
        replicas, best = decided(one), best_of_all(one["tokens"], one["home"], len(one["node"]), one["rules"].slots)
        reached = max(one["rules"].level, max(gpu_times(one, replicas)))
        lowest = max(one["rules"].level, min(best.values()))
        assert reached >= lowest
        higher += reached > lowest
        more += len(replicas) > min(count for count, level in best.items() if level <= reached)
    assert higher <= 0.02 * number
    assert more <= 0.02 * number


@pytest.mark.parametrize("share", [0.02, 0.1, 0.4], ids="price {} of the mean".format)
def test_small_splits_cost_hardly_more_than_the_cheapest(share: float) -> None:
    """Cheapest in three of four cases or more; the others cost a few percent more."""
    over = []
    for seed in range(80):
        plain = small(seed)
        price_of_one = max(1, int(plain["tokens"].sum() / len(plain["node"]) * share))
        one = plain | {"rules": plain["rules"]._replace(inside=price_of_one)}
        replicas = decided(one)
        level = one["rules"].level
        cost = max(level, *gpu_times(one, replicas)) + price(one, replicas)
        best = cheapest_of_all(one["tokens"], one["home"], len(one["node"]), 1, price_of_one, level)
        assert cost >= best
        over.append(cost / best - 1)
    assert np.mean(over) <= 0.01
    assert max(over) <= 0.1
    assert np.mean(np.array(over) < 0.002) >= 0.75


@pytest.mark.parametrize(("imbalance", "most"), [(1.1, 29), (1.5, 36), (2.0, 41), (3.0, 43)])
def test_power_laws_on_64_gpus_need_few_replicas(imbalance: float, most: int) -> None:
    """Medians of ten draws: 256 experts on 64 GPUs, 2 replica slots, to within 0.5 % of the mean."""
    counts = []
    for seed in range(10):
        one = case(power_law(imbalance, seed), np.arange(256) // 4, Topology(1, 64), 2)
        replicas = decided(one)
        assert max(gpu_times(one, replicas)) <= one["rules"].level
        counts.append(len(replicas))
    assert np.median(counts) <= most
