"""What ranks return: values of their own, which are read even if the ranks have ended."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import pytest
import ranks
import torch
from torch import Tensor


def a_tensor() -> Tensor:
    return torch.arange(3)


def test_a_tensor_is_read_after_its_rank_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader that was late, as on a busy machine, found the tensor's handle but not the process that held it."""
    waiting, seen = ranks.wait, list[int]()

    def late(pipes: Sequence[Any], timeout: float) -> list[Any]:
        found = waiting(pipes, timeout)
        seen.append(len(found))
        if len(seen) > 1:  # the first one is that all have started
            time.sleep(2)
        return found

    monkeypatch.setattr(ranks, "wait", late)
    assert [values.tolist() for values in ranks.on_ranks(1, a_tensor)] == [[0, 1, 2]]
