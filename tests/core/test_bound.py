"""The lower bound against exhaustive search, known optima and cases solved manually.

Shapes: T steps, L layers, E experts, P slots, M GPUs, G slots on each GPU, N nodes, B groups.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from itertools import combinations, combinations_with_replacement, product

import numpy as np
import pytest
import torch

from distplb import DistplbError, Placement, Topology, imbalance, lower_bound
from distplb.core import bound

Table = tuple[tuple[int, ...], ...]  # the experts on each GPU


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Everything here is small; on a busy machine, threads that wait for each other would cost more than the work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def random_load(random_: random.Random, *shape: int) -> list:
    """Nested lists of tokens: skewed, with ties, zeros, and a hot expert here and there."""
    if len(shape) > 1:
        return [random_load(random_, *shape[1:]) for _ in range(shape[0])]
    kind = random_.randrange(5)
    draw = [lambda: random_.randrange(4), lambda: int(random_.lognormvariate(4, 1.5)), lambda: random_.randrange(1000)]
    row = [draw[kind % 3]() for _ in range(shape[0])]
    if kind == 3:
        row[random_.randrange(shape[0])] += 10 * sum(row)
    return row


def all_tables(experts: tuple[int, ...], num_gpus: int, slots_per_gpu: int, shared: bool = True) -> list[Table]:
    """Every way to fill each GPU's slots with experts and give each expert a slot; GPUs are interchangeable."""
    contents = (combinations_with_replacement if shared else combinations)(experts, slots_per_gpu)
    return [
        table
        for table in combinations_with_replacement(list(contents), num_gpus)
        if len({expert for gpu in table for expert in gpu}) == len(experts)
    ]


def all_grouped_tables(num_experts: int, topology: Topology, num_slots: int, num_groups: int) -> list[Table]:
    """Every way that keeps each group on one node, with the same number of groups on every node."""
    size = num_experts // num_groups
    tables = []
    for node_of_group in product(range(topology.num_nodes), repeat=num_groups):
        if len({node_of_group.count(node) for node in range(topology.num_nodes)}) > 1:
            continue
        experts_of_node = [
            tuple(expert for expert in range(num_experts) if node_of_group[expert // size] == node)
            for node in range(topology.num_nodes)
        ]
        inside = [
            all_tables(experts, topology.gpus_per_node, topology.slots_per_gpu(num_slots))
            for experts in experts_of_node
        ]
        tables += [tuple(gpu for node in nodes for gpu in node) for nodes in product(*inside)]
    return tables


def smallest_mean_imbalance(load: np.ndarray, tables: np.ndarray) -> float:
    """The optimum, over all `tables [n, M, G]`, of the imbalance's mean over the steps of `load [T, E]`."""
    replicas = (tables[..., None] == np.arange(load.shape[1])).sum((1, 2))  # [n, E]
    total = np.zeros(len(tables))
    for step in load:
        share = np.take_along_axis(step / replicas, tables.reshape(len(tables), -1), 1)  # [n, P]
        busiest = share.reshape(tables.shape).sum(-1).max(-1)
        total += np.maximum(busiest / (step.sum() / tables.shape[1]), 1) if step.sum() else 0
    counted = int((load.sum(1) > 0).sum())
    return float(total.min()) / counted if counted else math.nan


def without_nan(lower: np.ndarray, optimum: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Bounds and optima `[L]`, with 1 in place of NaN, which both must have for a layer without tokens."""
    assert (np.isnan(lower) == np.isnan(optimum)).all()
    return np.nan_to_num(lower, nan=1.0), np.nan_to_num(optimum, nan=1.0)


# --- against exhaustive search ----------------------------------------------------------------------------------

# (E, P, M), and for how many of 100 loads of one step, at least, the optimum is the bound, and is within 10 % of it.
WITHOUT_REPLICAS = [
    ((6, 6, 2), 85, 100),
    ((8, 8, 2), 75, 100),
    ((6, 6, 3), 100, 100),
    ((8, 8, 4), 100, 100),
    ((4, 4, 4), 100, 100),
    ((6, 6, 1), 100, 100),
]
WITH_REPLICAS = [
    ((4, 6, 2), 35, 100),
    ((4, 6, 3), 70, 90),
    ((3, 6, 3), 30, 85),
    ((5, 6, 3), 90, 95),
    ((4, 8, 4), 20, 90),
    ((5, 8, 4), 40, 90),
    ((6, 8, 4), 75, 95),
    ((5, 8, 2), 55, 100),
    ((6, 9, 3), 20, 95),
    ((7, 9, 3), 35, 95),
    ((4, 6, 6), 100, 100),
    ((3, 6, 1), 100, 100),
    ((1, 6, 3), 100, 100),
]


@pytest.mark.parametrize(("shape", "reached", "near"), WITHOUT_REPLICAS + WITH_REPLICAS)
@pytest.mark.parametrize("num_steps", [1, 3])
def test_no_placement_beats_the_lower_bound(
    shape: tuple[int, int, int], reached: int, near: int, num_steps: int
) -> None:
    num_experts, num_slots, num_gpus = shape
    num_layers = 100 if num_steps == 1 else 30
    load = np.array(random_load(random.Random(f"{shape} {num_steps}"), num_steps, num_layers, num_experts))  # [T, L, E]
    lower = lower_bound(torch.from_numpy(load), Topology(1, num_gpus), num_slots).numpy()
    tables = np.array(all_tables(tuple(range(num_experts)), num_gpus, num_slots // num_gpus))
    optimum = np.array([smallest_mean_imbalance(load[:, layer], tables) for layer in range(num_layers)])
    assert lower.shape == (num_layers,)
    lower, optimum = without_nan(lower, optimum)
    assert (lower >= 1).all()
    assert (lower <= optimum).all()
    if num_steps == 1:  # replicas for several unrelated steps are another matter
        assert (optimum <= lower * (1 + 1e-5)).sum() >= reached
        assert (optimum <= lower * 1.1).sum() >= near


@pytest.mark.parametrize("shape", [(4, 6, 3), (5, 8, 4), (4, 6, 2)])
def test_it_holds_where_replicas_may_not_share_a_gpu(shape: tuple[int, int, int]) -> None:
    num_experts, num_slots, num_gpus = shape
    load = np.array(random_load(random.Random(str(shape)), 1, 60, num_experts))
    lower = lower_bound(torch.from_numpy(load), Topology(1, num_gpus), num_slots).tolist()
    tables = np.array(all_tables(tuple(range(num_experts)), num_gpus, num_slots // num_gpus, shared=False))
    assert not any(one > smallest_mean_imbalance(load[:, layer], tables) for layer, one in enumerate(lower))


def test_it_holds_where_two_heavy_replicas_fit_on_a_gpu() -> None:
    """With nearly even loads and three slots a GPU, (j) must not treat heavy slots as if each were alone on its GPU."""
    load = np.array([[random.Random(layer).choices(range(90, 130), k=7) for layer in range(100)]])
    lower = lower_bound(torch.from_numpy(load), Topology(1, 3), 9).tolist()
    tables = np.array(all_tables(tuple(range(7)), 3, 3))
    assert not any(one > smallest_mean_imbalance(load[:, layer], tables) for layer, one in enumerate(lower))


# (N, GPUs per node), (E, P), B, and the same two numbers for 50 loads of one step.
GROUPED = [
    ((2, 1), (6, 6), 2, 50, 50),
    ((2, 2), (8, 8), 4, 50, 50),
    ((2, 2), (4, 8), 4, 50, 50),
    ((2, 2), (8, 12), 4, 15, 50),
    ((3, 1), (6, 9), 6, 50, 50),
    ((3, 2), (6, 12), 3, 50, 50),
    ((1, 3), (4, 6), 2, 35, 45),
]


@pytest.mark.parametrize(("topology", "shape", "num_groups", "reached", "near"), GROUPED)
@pytest.mark.parametrize("num_steps", [1, 2])
def test_no_placement_of_whole_groups_beats_the_lower_bound(
    topology: tuple[int, int], shape: tuple[int, int], num_groups: int, reached: int, near: int, num_steps: int
) -> None:
    nodes, (num_experts, num_slots) = Topology(*topology), shape
    num_layers = 50 if num_steps == 1 else 15
    load = np.array(random_load(random.Random(f"{topology} {shape} {num_steps}"), num_steps, num_layers, num_experts))
    lower = lower_bound(torch.from_numpy(load), nodes, num_slots, num_groups).numpy()
    tables = np.array(all_grouped_tables(num_experts, nodes, num_slots, num_groups))
    optimum = np.array([smallest_mean_imbalance(load[:, layer], tables) for layer in range(num_layers)])
    lower, optimum = without_nan(lower, optimum)
    assert (lower <= optimum).all()
    if num_steps == 1:
        assert (optimum <= lower * (1 + 1e-5)).sum() >= reached
        assert (optimum <= lower * 1.1).sum() >= near


@pytest.mark.parametrize(("num_slots", "num_steps"), [(8, 1), (12, 1), (8, 2)])
def test_where_the_ways_to_deal_groups_are_too_many_the_bound_is_lower(
    num_slots: int, num_steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = torch.tensor(random_load(random.Random(num_slots), num_steps, 60, 8))
    by_ways = lower_bound(load, Topology(2, 2), num_slots, 4)
    monkeypatch.setattr(bound, "_MOST_WAYS", 2)
    by_nodes = lower_bound(load, Topology(2, 2), num_slots, 4)
    without = lower_bound(load, Topology(2, 2), num_slots)
    assert (by_nodes <= by_ways * (1 + 1e-9)).all()
    assert (without <= by_nodes).all()
    assert float(by_ways.mean()) > float(by_nodes.mean()) > float(without.mean())


# --- known optima -----------------------------------------------------------------------------------------------


def test_two_slots_a_gpu_without_replicas_are_decided() -> None:
    """The optimum pairs the heaviest expert with the lightest, the next with the next, and so on."""
    load = torch.tensor(random_load(random.Random(1), 1, 100, 64))[0]  # [L, E]
    ascending = load.sort(-1).values
    busiest = (ascending[:, :32] + ascending[:, 32:].flip(-1)).amax(-1)
    expected = torch.where(load.sum(-1) > 0, busiest.double() * 32 / load.sum(-1).clamp(min=1), 1.0)
    assert torch.allclose(lower_bound(load, Topology(4, 8), 64), expected, rtol=1e-9, atol=0)


def test_one_slot_a_gpu_with_replicas_is_decided() -> None:
    """The optimum gives each further replica to the expert with the largest share."""
    random_ = random.Random(2)
    for row in random_load(random_, 40, 16):
        replicas = [1] * 16
        for _ in range(random_.randrange(1, 50)):
            hottest = max(range(16), key=lambda expert: row[expert] / replicas[expert])
            replicas[hottest] += 1
        num_slots = sum(replicas)
        expected = max(w / c for w, c in zip(row, replicas, strict=True)) * num_slots / sum(row) if sum(row) else 1.0
        assert float(lower_bound(torch.tensor([row]), Topology(1, num_slots), num_slots)) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("load", "num_slots", "num_gpus", "expected"),
    [
        # Without replicas.
        ([[1, 1, 1, 1]], 4, 2, 1.0),
        ([[9, 7, 6, 5, 4, 3]], 6, 2, 1.0),  # (a)
        ([[9, 1, 1, 1]], 4, 2, 10 / 6),  # (b) the heaviest with the lightest
        ([[7, 0, 0, 0, 1, 2]], 6, 2, 7 / 5),
        ([[10, 8, 3, 3, 3, 3, 2, 1, 0]], 9, 3, 12 / 11),  # (b) the two heaviest with the four lightest, 0 + 1 + 2 + 3
        ([[9, 8, 5, 5, 4, 0]], 6, 2, 17 / 15.5),  # (c) 8 or 9 with two of the four others, without the lightest
        ([[4, 4, 3, 2, 2, 0]], 6, 3, 6 / 5),  # (c) 4 with one that is not the lightest
        ([[5, 5, 5, 0, 0, 0]], 6, 2, 10 / 7.5),  # (d) three heavy experts on two GPUs
        ([[6, 5, 4, 1, 1, 1, 1, 1]], 8, 2, 11 / 10),  # (d) two of the three heaviest with the two lightest
        ([[8, 8, 7, 7, 6, 1, 1, 1]], 8, 2, 21 / 19.5),  # (d) three of the five heaviest with the lightest
        ([[9, 6, 5, 4, 2, 2]], 6, 2, 15 / 14),  # (d) 9 with one of 6, 5, 4, or these together
        ([[4, 4, 4, 4, 4, 0, 0, 0]], 8, 4, 8 / 5),
        ([[3, 2, 2, 1, 1, 0]], 6, 2, 5 / 4.5),  # (e)
        ([[3, 1, 2, 2]], 4, 4, 3 / 2),  # one slot a GPU: nothing to choose
        ([[3, 1, 2, 2]], 4, 1, 1.0),
        ([[0, 0, 0, 0]], 4, 2, math.nan),
        # With replicas.
        ([[6, 1, 1]], 4, 2, 1.0),  # (a)
        ([[3, 1, 0, 0, 0]], 6, 3, 1.5 / (4 / 3)),  # (f) two halves of 3
        ([[3, 2, 1, 1]], 6, 3, 2.5 / (7 / 3)),  # (g) below it, 3 and 2 need two more replicas and then a third
        ([[1, 1, 0, 0]], 6, 3, 1 / (2 / 3)),  # (h) four halves on three GPUs, or more thirds
        ([[6, 4, 3, 2, 2]], 8, 4, (13 / 3) / (17 / 4)),  # (i)
        ([[5, 1, 0, 0]], 6, 3, 2.5 / 2),  # (j) only two zeros for three thirds of 5
        ([[3, 1, 0]], 4, 2, 2.5 / 2),
        ([[0, 0, 0]], 6, 2, math.nan),
        # Steps.
        ([[9, 1, 1, 1], [0, 0, 0, 0]], 4, 2, 10 / 6),  # a step without tokens does not count
        ([[9, 1, 1, 1], [1, 9, 1, 1]], 4, 2, 10 / 6),
        # Each step alone could be even, with a different expert beside expert 0: the bound of the mean step.
        ([[6, 0, 3, 3], [6, 3, 0, 3]], 4, 2, 5 / 4),
        ([[6, 0, 3, 3], [6, 3, 0, 3], [0, 0, 0, 0]], 4, 2, 5 / 4),
        ([[4, 0], [4, 0], [0, 0]], 4, 4, 4 / 3),
    ],
)
def test_it_is_reached_in_cases_made_by_hand(
    load: list[list[int]], num_slots: int, num_gpus: int, expected: float
) -> None:
    tokens = np.array(load)  # [T, E]
    lower = float(lower_bound(torch.from_numpy(tokens)[:, None], Topology(1, num_gpus), num_slots))
    has_replicas = num_slots > tokens.shape[1]
    tables = all_tables(tuple(range(tokens.shape[1])), num_gpus, num_slots // num_gpus, shared=has_replicas)
    assert smallest_mean_imbalance(tokens, np.array(tables)) == pytest.approx(expected, rel=1e-9, nan_ok=True)
    # Bisection stops at a millionth.
    assert lower == pytest.approx(expected, rel=1e-6 if has_replicas else 1e-9, nan_ok=True)


@pytest.mark.parametrize("num_groups", [None, 4])
@pytest.mark.parametrize("num_slots", [8, 12])
def test_steps_without_tokens_change_no_bound(num_slots: int, num_groups: int | None) -> None:
    """They counted as even, which lowered the bound."""
    load = torch.tensor(random_load(random.Random(num_slots), 3, 20, 8))  # [T, L, E]
    load[1, 4:8] = 0  # in some layers
    load[:, 8] = 0
    padded = torch.cat([load[:1], torch.zeros_like(load), load[1:]])
    lower, without = (lower_bound(one, Topology(2, 2), num_slots, num_groups) for one in (padded, load))
    torch.testing.assert_close(lower, without, rtol=1e-12, atol=0, equal_nan=True)
    assert torch.equal(lower.isnan(), load.sum((0, 2)) == 0)
    alone = lower_bound(load[[0, 2], 4:8], Topology(2, 2), num_slots, num_groups)
    torch.testing.assert_close(lower[4:8], alone, rtol=1e-12, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("load", "num_slots", "topology", "num_groups", "expected", "without"),
    [
        # (k) Two of three heavy groups are on one node.
        ([[5, 5, 5, 5, 5, 5, 0, 0]], 8, (2, 1), 4, 20 / 15, 1.0),
        # The group of 8 and the lightest other group on two GPUs.
        ([[8, 2, 1, 1]], 8, (2, 2), 4, 4.5 / 3, 1.0),
        # Each group fills a node: the hot expert with the lightest of its group.
        ([[9, 3, 3, 3, 0, 0, 0, 0]], 8, (2, 2), 2, 12 / 4.5, 9 / 4.5),
        # Each step and the mean step could be even, but groups are dealt once: two hot ones meet in two of six steps.
        (
            [[1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, 1], [0, 1, 1, 0], [0, 1, 0, 1], [0, 0, 1, 1]],
            4,
            (2, 1),
            4,
            (4 * 1 + 2 * 2) / 6,
            1.0,
        ),
    ],
)
def test_it_is_reached_by_whole_groups(
    load: list[list[int]],
    num_slots: int,
    topology: tuple[int, int],
    num_groups: int,
    expected: float,
    without: float,
) -> None:
    tokens = np.array(load)
    nodes, steps = Topology(*topology), torch.from_numpy(tokens)[:, None]
    tables = all_grouped_tables(tokens.shape[1], nodes, num_slots, num_groups)
    assert smallest_mean_imbalance(tokens, np.array(tables)) == pytest.approx(expected, rel=1e-9)
    assert float(lower_bound(steps, nodes, num_slots, num_groups)) == pytest.approx(expected, rel=1e-6)
    assert float(lower_bound(steps, nodes, num_slots)) == pytest.approx(without, rel=1e-6)


# --- what it does not depend on, and rounding -------------------------------------------------------------------


@pytest.mark.parametrize(("num_slots", "num_groups"), [(8, None), (12, None), (8, 4), (12, 4)])
def test_each_layer_is_alone_and_the_order_of_experts_and_steps_is_nothing(
    num_slots: int, num_groups: int | None
) -> None:
    load = torch.tensor(random_load(random.Random(5), 2, 3, 8))
    together = lower_bound(load, Topology(2, 2), num_slots, num_groups)
    alone = [lower_bound(load[:, layer : layer + 1], Topology(2, 2), num_slots, num_groups) for layer in range(3)]
    assert torch.equal(together, torch.cat(alone))
    assert torch.allclose(together, lower_bound(load.flip(0, 2), Topology(2, 2), num_slots, num_groups), rtol=1e-9)
    without_steps = lower_bound(load[0], Topology(2, 2), num_slots, num_groups)
    assert torch.equal(without_steps, lower_bound(load[:1], Topology(2, 2), num_slots, num_groups))


@pytest.mark.parametrize("num_slots", [8, 12])
def test_without_groups_or_with_one_node_only_the_number_of_gpus_counts(num_slots: int) -> None:
    load = torch.tensor(random_load(random.Random(6), 2, 10, 8))
    expected = lower_bound(load, Topology(1, 4), num_slots)
    assert torch.equal(expected, lower_bound(load, Topology(2, 2), num_slots))
    assert torch.equal(expected, lower_bound(load, Topology(1, 4), num_slots, 2))


@pytest.mark.parametrize("num_replicas", [1, 3])
def test_the_last_digits_do_not_lift_it_above_what_is_reached(num_replicas: int) -> None:
    """With one expert a GPU and equally many replicas of each, there is only one placement, so every digit counts."""
    load = torch.randint(2**40, (50, 40, 7), generator=torch.Generator().manual_seed(0))
    load = load // (load.sum(-1, keepdim=True) % 1000 + 1)  # many magnitudes
    table = torch.arange(7).repeat(40, num_replicas)
    for steps in (load[:1], load):
        reached = imbalance(steps, Placement(table, 7, 7 * num_replicas)).mean(0)
        lower = lower_bound(steps, Topology(1, 7), 7)
        assert (lower <= reached).all()
        if num_replicas == 1:
            assert torch.allclose(lower, reached, rtol=1e-11, atol=0)


@pytest.mark.parametrize(
    ("num_experts", "num_slots", "num_gpus"), [(64, 64, 8), (64, 64, 32), (64, 80, 16), (64, 72, 36), (64, 96, 96)]
)
def test_larger_placements_do_not_beat_it_either(num_experts: int, num_slots: int, num_gpus: int) -> None:
    """Each replica goes to the largest share, then the heaviest slot to the lightest GPU with room, on summed steps."""
    random_ = random.Random(num_slots)
    mean = [random_.lognormvariate(6, 1) for _ in range(num_experts)]
    load = [[int(random_.lognormvariate(0, 0.1) * one) for one in mean] for _ in range(4)]  # [T, E]
    total = [sum(step[expert] for step in load) for expert in range(num_experts)]
    slots = list(range(num_experts))
    while len(slots) < num_slots:
        slots.append(max(range(num_experts), key=lambda expert: total[expert] / slots.count(expert)))
    share = [total[expert] / slots.count(expert) for expert in range(num_experts)]
    gpus: list[list[int]] = [[] for _ in range(num_gpus)]
    for expert in sorted(slots, key=lambda expert: -share[expert]):
        open_gpus = [gpu for gpu in gpus if len(gpu) < num_slots // num_gpus]
        min(open_gpus, key=lambda gpu: sum(share[held] for held in gpu)).append(expert)
    table = torch.tensor([[expert for gpu in gpus for expert in gpu]])
    steps = torch.tensor(load)[:, None]
    lower = float(lower_bound(steps, Topology(1, num_gpus), num_slots))
    reached = float(imbalance(steps, Placement(table, num_experts, num_gpus)).mean())
    assert 1 <= lower <= reached < lower * 1.2


@pytest.mark.parametrize(("num_slots", "topology"), [(2048, (128, 8)), (4096, (128, 8)), (4096, (1, 4096))])
def test_thousands_of_experts_are_no_trouble(num_slots: int, topology: tuple[int, int]) -> None:
    load = torch.empty(1, 3, 2048).log_normal_(5, 1.2, generator=torch.Generator().manual_seed(0)).round()
    lower = lower_bound(load, Topology(*topology), num_slots)
    assert lower.isfinite().all()
    assert (lower >= 1).all()


# --- what is refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_slots", "topology", "num_groups", "wording"),
    [
        (8, Topology(1, 3), None, "8 slots cannot be spread evenly over 3 GPUs"),
        (
            4,
            Topology(1, 2),
            None,
            "num_slots is 4 for 8 experts, and every expert needs at least one slot; pass a num_slots of at least 8 "
            "that is a multiple of the number of GPUs, 2",
        ),
        (
            8,
            Topology(1, 2),
            3,
            "8 experts cannot be split into 3 equal groups; pass a num_groups that divides 8, or leave it out",
        ),
        (8, Topology(1, 2), 0, "8 experts cannot be split into 0 equal groups"),
        (
            8,
            Topology(4, 1),
            2,
            "2 groups cannot be dealt evenly to 4 nodes; pass a num_groups that is a multiple of 4, or leave it out",
        ),
    ],
)
def test_uneven_slots_and_groups_are_refused(
    num_slots: int, topology: Topology, num_groups: int | None, wording: str
) -> None:
    with pytest.raises(DistplbError, match=wording):
        lower_bound(torch.ones(1, 8), topology, num_slots, num_groups)


def test_what_is_no_load_is_refused() -> None:
    with pytest.raises(DistplbError, match="load has -1 for"):
        lower_bound(torch.tensor([[3, -1]]), Topology(1, 2), 2)
