"""Imbalance and cost against plain loops.

Shapes: T steps, L layers, E experts, P slots, M GPUs, G slots on each GPU.
"""

from __future__ import annotations

import math
import random
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distplb import DistplbError, Placement, imbalance
from distplb.core.balance import balancedness_sglang, balancedness_vllm, max_violation
from distplb.core.cost import (
    gpu_tokens,
    gpu_units,
    layer_cost,
    mean_of_known,
    mean_of_layers,
    nan_to_none,
    steps_with_tokens,
)


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


def random_table(random_: random.Random, num_experts: int, num_slots: int) -> list[int]:
    """`[P]`: every expert at least once, in random order."""
    extra = random_.choices(range(num_experts), k=num_slots - num_experts)
    return random_.sample([*range(num_experts), *extra], num_slots)


def plain_gpu_loads(tokens: list[int], table: list[int], num_gpus: int) -> list[float]:
    """`[M]`: the load of each GPU; replicas share evenly."""
    size = len(table) // num_gpus
    return [
        sum(tokens[expert] / table.count(expert) for expert in table[gpu * size : (gpu + 1) * size])
        for gpu in range(num_gpus)
    ]


# --- imbalance --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_slots", "num_gpus"), [(6, 1), (6, 2), (6, 6), (8, 2), (9, 3), (12, 4)])
def test_imbalance_is_busiest_over_mean_gpu(num_slots: int, num_gpus: int) -> None:
    random_ = random.Random(num_slots * 100 + num_gpus)
    load = random_load(random_, 20, 3, 6)  # [T, L, E]
    table = [random_table(random_, 6, num_slots) for _ in range(3)]
    result = imbalance(torch.tensor(load), Placement(torch.tensor(table), 6, num_gpus))
    assert result.dtype == torch.float64
    assert result.shape == (20, 3)
    for t in range(20):
        for layer in range(3):
            gpus = plain_gpu_loads(load[t][layer], table[layer], num_gpus)
            expected = max(gpus) / (sum(gpus) / num_gpus) if sum(gpus) else math.nan
            assert float(result[t, layer]) == pytest.approx(expected, rel=1e-12, nan_ok=True)


def test_replicas_share_the_tokens_of_their_expert() -> None:
    placement = Placement(torch.tensor([[0, 1, 0, 2]]), num_experts=3, num_gpus=2)
    assert imbalance(torch.tensor([[10, 4, 2]]), placement).tolist() == [[9 / 8]]  # 5 + 4 and 5 + 2


def test_a_load_without_steps_is_one_step() -> None:
    load = torch.tensor([[6, 2, 1, 3], [1, 1, 1, 1]])
    placement = Placement.contiguous(2, 4, 2)
    assert torch.equal(imbalance(load, placement), imbalance(load[None], placement))


def test_a_load_of_another_model_is_refused() -> None:
    wording = (
        r"load has \[layers, experts\] = \[1, 4\], but the placement has \[2, 4\]; pass the load of the same model"
    )
    with pytest.raises(DistplbError, match=wording):
        imbalance(torch.ones(1, 4), Placement.contiguous(2, 4, 2))


# --- steps and layers without tokens ----------------------------------------------------------------------------


def test_a_step_without_tokens_has_no_imbalance() -> None:
    """It counted as even, so that a partly filled buffer looked balanced."""
    load = torch.tensor([[[100, 200], [0, 0]], *[[[0, 0], [0, 0]]] * 3])
    result = imbalance(load, Placement.contiguous(2, 2, 2))
    assert result.shape == (4, 2)
    assert nan_to_none(mean_of_known(result, dim=0)) == (4 / 3, None)
    assert float(mean_of_known(result)) == 4 / 3
    assert math.isnan(mean_of_known(result[1:]))


@given(st.data())
@settings(deadline=None, max_examples=60)
def test_steps_without_tokens_change_no_mean(data: st.DataObject) -> None:
    row = st.lists(st.sampled_from([0, 0, 1, 7, 10**6]), min_size=4, max_size=4)
    load = torch.tensor(data.draw(st.lists(st.lists(row, min_size=2, max_size=2), min_size=1, max_size=5)))
    where = data.draw(st.lists(st.integers(0, len(load)), max_size=4))
    padded = load
    for at in sorted(where, reverse=True):
        padded = torch.cat([padded[:at], torch.zeros_like(load[:1]), padded[at:]])
    assert torch.equal(steps_with_tokens(padded), steps_with_tokens(load))
    placement = Placement(torch.tensor([[0, 1, 2, 3, 0, 2], [0, 1, 2, 3, 1, 1]]), 4, 2)
    means = [nan_to_none(mean_of_known(imbalance(one, placement), dim=0)) for one in (load, padded)]
    assert [mean is None for mean in means[1]] == [not bool(layer.any()) for layer in load.unbind(1)]
    assert [mean or 0 for mean in means[1]] == pytest.approx([mean or 0 for mean in means[0]], rel=1e-12)
    others = [
        [balancedness_vllm(of_gpu), balancedness_sglang(of_gpu), max_violation(one)]
        for one in (load, padded)
        for of_gpu in [gpu_tokens(one, placement.expert_of_slot, 2)]
    ]
    assert others[1] == pytest.approx(others[0], rel=1e-12, nan_ok=True)
    assert math.isnan(others[0][1]) == (not bool(load.any()))


def test_what_is_known_of_layers() -> None:
    assert mean_of_layers((2.0, None, 1.0)) == 1.5
    assert mean_of_layers((None, None)) is mean_of_layers(()) is None
    values = torch.rand(5, 3, dtype=torch.float64)
    assert torch.equal(mean_of_known(values, dim=0), values.mean(0))  # to the bit if all are known
    assert torch.equal(mean_of_known(values), values.mean())


def test_what_other_projects_report_is_unknown_without_tokens() -> None:
    nothing = torch.zeros(2, 1, 4, dtype=torch.int64)
    assert all(math.isnan(metric(nothing)) for metric in (balancedness_vllm, balancedness_sglang, max_violation))


# --- shares of replicas -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_slots", "num_gpus"), [(6, 3), (8, 2), (9, 3), (12, 4), (512, 8)])
def test_the_tokens_of_gpus_are_exact_however_few_there_are(num_slots: int, num_gpus: int) -> None:
    """Shares were rounded down: a single token of an expert with two replicas was on no GPU at all."""
    random_, experts = random.Random(num_slots), 6 if num_slots < 100 else 256
    load = [[[random_.choice([0, 1, 1, 2, 3, 5]) for _ in range(experts)] for _ in range(2)] for _ in range(3)]
    tables = [random_table(random_, experts, num_slots) for _ in range(2)]
    result = gpu_tokens(torch.tensor(load), torch.tensor(tables), num_gpus)
    size = num_slots // num_gpus
    expected = [
        [
            [
                float(sum(Fraction(row[e], table.count(e)) for e in table[at : at + size]))
                for at in range(0, num_slots, size)
            ]
            for row, table in zip(step, tables, strict=True)
        ]
        for step in load
    ]
    assert result.tolist() == [[pytest.approx(row, rel=1e-12) for row in step] for step in expected]
    assert result.dtype == (torch.int64 if num_slots == experts else torch.float64)
    ratios = result.amax(2) / (torch.tensor(load).sum(2).double() / num_gpus)
    assert torch.allclose(imbalance(torch.tensor(load), Placement(torch.tensor(tables), experts, num_gpus)), ratios)


def test_without_replicas_tokens_are_integers_however_many() -> None:
    load = torch.tensor([[[2**47, 1, 2**46, 3]]])
    table = torch.tensor([[3, 0, 2, 1]])
    assert gpu_tokens(load, table, 2).tolist() == [[[2**47 + 3, 2**46 + 1]]]
    assert torch.equal(gpu_units(load, table, 2), gpu_tokens(load, table, 2))


# --- cost -------------------------------------------------------------------------------------------------------


def test_cost_is_the_busiest_gpu_added_up_over_the_steps() -> None:
    random_ = random.Random(3)
    load = random_load(random_, 7, 4, 6)
    tables = [[random_table(random_, 6, 6) for _ in range(4)] for _ in range(5)]  # [5, L, P]
    result = layer_cost(torch.tensor(load), torch.tensor(tables), 3)
    assert result.dtype == torch.int64
    assert result.tolist() == [
        [sum(max(plain_gpu_loads(load[t][x], table[x], 3)) for t in range(7)) for x in range(4)] for table in tables
    ]
    assert torch.equal(layer_cost(torch.tensor(load), torch.tensor(tables[2]), 3), result[2])


def test_cost_shares_an_experts_tokens_out_by_integer_division() -> None:
    load = torch.tensor([[[5, 4, 2]]])
    assert layer_cost(load, torch.tensor([[0, 1, 0, 2]]), 2).tolist() == [
        6
    ]  # 2 + 4; of 5 tokens, two replicas get 2 each


@pytest.mark.parametrize(("num_slots", "num_gpus"), [(8, 2), (9, 3), (12, 4), (12, 1)])
def test_cost_with_replicas_is_that_of_whole_shares(num_slots: int, num_gpus: int) -> None:
    random_ = random.Random(num_slots)
    load = random_load(random_, 5, 4, 6)
    tables = [[random_table(random_, 6, num_slots) for _ in range(4)] for _ in range(3)]  # [3, L, P]
    size = num_slots // num_gpus
    expected = [
        [
            sum(
                max(
                    sum(load[t][x][expert] // table[x].count(expert) for expert in table[x][at : at + size])
                    for at in range(0, num_slots, size)
                )
                for t in range(5)
            )
            for x in range(4)
        ]
        for table in tables
    ]
    assert layer_cost(torch.tensor(load), torch.tensor(tables), num_gpus).tolist() == expected


def test_cost_saturates_at_41_bits() -> None:
    load = torch.tensor([[[2**41, 0], [2**41 - 2, 1], [2**41 - 2, 0]]])
    assert layer_cost(load, torch.zeros(3, 2, dtype=torch.int64), 2).tolist() == [2**41 - 1, 2**41 - 2, 2**41 - 2]
    assert layer_cost(load.repeat(3, 1, 1), torch.zeros(3, 2, dtype=torch.int64), 2).tolist() == [2**41 - 1] * 3
