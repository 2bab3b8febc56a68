"""The row that a rank tells of its ids: counted on the host in few operations, elsewhere without waiting."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from distplb.comm.steps import StepOfOne
from distplb.core.plain_tensor import INTEGERS
from distplb.errors import DistplbError
from distplb.replicas import count
from distplb.replicas.count import Row, checked_counts, counts_of

SLOTS, CPU = 6, torch.device("cpu")
HEAD = Row(call=7, layer=1 << 61, options=(1 << 62) - 1, backward=True, gradients=False)


def both_ways(ids: Tensor) -> tuple[Tensor, Tensor]:
    """The row as the host counts, and as a device would."""
    on_host = HEAD.tensor(ids, SLOTS, CPU)
    with patch.object(count, "_host_counts", lambda *_: None):
        return on_host, HEAD.tensor(ids, SLOTS, CPU)


@pytest.mark.parametrize("dtype", sorted(set(INTEGERS) - {torch.bool}, key=str), ids=str)
@pytest.mark.parametrize("shape", [(0, 2), (5, 0), (1, 1), (40, 3)], ids=str)
def test_valid_ids_are_counted_alike_both_ways(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    ids = torch.randint(SLOTS, shape, generator=torch.Generator().manual_seed(0))
    on_host, on_device = both_ways(ids.to(dtype))
    assert on_host.dtype == on_device.dtype == torch.int64
    on_host[count._EXAMPLE] = on_device[count._EXAMPLE] = 0  # nobody reads it if all ids are valid
    assert on_host.tolist() == on_device.tolist()
    assert counts_of(on_host).tolist() == [int((ids == slot).sum()) for slot in range(SLOTS)]


@pytest.mark.parametrize(
    ("ids", "number", "example"),
    [([0, 5, 6], 1, 6), ([-1, 0, 0], 1, -1), ([9, -3, 2], 2, -3), ([10**12, 1, 1], 1, 10**12)],
)
def test_invalid_ids_are_refused_with_their_number_and_an_example(ids: list[int], number: int, example: int) -> None:
    for row in both_ways(torch.tensor([ids])):
        with pytest.raises(DistplbError) as caught:
            checked_counts(StepOfOne(), row, {})
        assert f"has {number} id{'s' * (number > 1)} such as {example} in expert_of_token" in str(caught.value)


def test_a_row_that_is_not_contiguous_is_counted() -> None:
    ids = torch.tensor([[0, 1, 2], [3, 4, 5]]).T
    assert [counts_of(row).tolist() for row in both_ways(ids)] == [[1] * SLOTS] * 2
