"""The helper that runs a test on real ranks: a rank that has answered stays until all have."""

from __future__ import annotations

import os
import time

import ranks
import torch
import torch.distributed as dist


def the_other_lives_while_this_is_late() -> bool:
    pids = [torch.zeros(1, dtype=torch.int64) for _ in range(2)]
    dist.all_gather(pids, torch.tensor([os.getpid()]))
    if dist.get_rank() == 1:
        time.sleep(1)
        os.kill(int(pids[0]), 0)  # ProcessLookupError if it has ended
    return True


def test_a_rank_that_has_answered_stays_until_all_have() -> None:
    """Ranks that ended at once closed connections that others were still making: tests failed on a busy machine."""
    assert ranks.on_ranks(2, the_other_lives_while_this_is_late) == [True, True]


def test_tensors_are_returned_by_value() -> None:
    assert [values.tolist() for values in ranks.on_ranks(2, torch.arange, 3)] == [[0, 1, 2]] * 2
