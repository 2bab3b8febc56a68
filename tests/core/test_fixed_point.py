"""Loads and weights as integers that are small enough for packing.

Shapes: T steps, L layers, E experts.
"""

from __future__ import annotations

import random

import pytest
import torch

from distplb.core.fixed_point import excess_bits, scaled, spare_bits

# --- excess_bits ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [1, 30, 40, 62])
def test_a_shift_is_the_least_that_is_enough(bits: int) -> None:
    powers = {max(0, (1 << power) + off) for power in range(63) for off in (-1, 0, 1)}
    borders = {((1 << bits) + 1 << shift) + off for shift in range(63 - bits) for off in (-2, -1, 0)}
    totals = sorted(total for total in powers | borders | {2**63 - 1} if total < 2**63)
    for total, shift in zip(totals, excess_bits(torch.tensor(totals)[None, :, None], bits).tolist(), strict=True):
        assert total >> shift <= 1 << bits
        assert shift == 0 or total >> shift - 1 > 1 << bits


# --- scaled -----------------------------------------------------------------------------------------------------


def test_totals_come_down_to_2_to_the_40_by_a_power_of_two() -> None:
    random_ = random.Random(0)
    totals = [
        2**40 + 1,
        2**41,
        2**41 + 1,
        2**45 - 1,
        2**45,
        2**61,
        *(random_.randrange(2**40, 2**62) for _ in range(50)),
    ]
    load = torch.zeros(2, len(totals), 3, dtype=torch.int64)  # [T, L, E]
    for layer, total in enumerate(totals):
        first, second = sorted(random_.randrange(total) for _ in range(2))
        load[:, layer, 0] = torch.tensor([first, second - first])
        load[1, layer, 2] = total - second
    found = scaled(load)
    for layer, total in enumerate(totals):
        shift = 0
        while total >> shift > 2**40:
            shift += 1
        assert shift > 0
        assert torch.equal(found[:, layer], load[:, layer] >> shift)
        assert 2**39 - 6 < int(found[:, layer].sum()) <= 2**40


def test_other_layers_are_left_untouched() -> None:
    load = torch.tensor([[[2**40, 0], [3, 5], [2**41, 2]], [[0, 0], [2**39, 0], [2, 2**41]]])  # [T, L, E]
    assert scaled(load)[:, :2].tolist() == load[:, :2].tolist()
    assert scaled(load)[:, 2].tolist() == [[2**38, 0], [0, 2**38]]


# --- spare_bits -------------------------------------------------------------------------------------------------


def test_totals_go_up_to_2_to_the_40_by_a_power_of_two() -> None:
    """The remainders that replicas lose in integer division are negligible then."""
    random_ = random.Random(1)
    totals = [1, 2, 3, 2**20, 2**20 + 1, 2**39 - 1, 2**39, 2**39 + 1, 2**40 - 1, 2**40]
    totals += [random_.randrange(1, 2 ** random_.randrange(1, 41)) for _ in range(50)]
    load = torch.zeros(2, len(totals), 3, dtype=torch.int64)  # [T, L, E]
    for layer, total in enumerate(totals):
        first, second = sorted(random_.randrange(total + 1) for _ in range(2))
        load[:, layer, 0] = torch.tensor([first, second - first])
        load[1, layer, 2] = total - second
    before = load.clone()
    found = load << spare_bits(load)[:, None]
    assert found.dtype == torch.int64
    assert torch.equal(load, before)
    for layer, total in enumerate(totals):
        shift = 0
        while total << shift + 1 <= 2**40:
            shift += 1
        assert torch.equal(found[:, layer], load[:, layer] << shift)
        assert 2**39 < int(found[:, layer].sum()) <= 2**40
    assert torch.equal(scaled(found), found)


def test_a_layer_without_tokens_stays_without() -> None:
    load = torch.tensor([[[0, 0], [3, 5]], [[0, 0], [0, 0]]])  # [T, L, E]
    assert (load << spare_bits(load)[:, None]).tolist() == [[[0, 0], [3 << 37, 5 << 37]], [[0, 0], [0, 0]]]
