"""Host time of `StepBalancer.dispatch` without any communication, for groups larger than this machine.

Shapes: N tokens of this rank, K = 2 experts of each token, P slots, M GPUs.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from unittest.mock import patch

import torch
from torch import Tensor

from distplb import Topology
from distplb.comm.base import Message
from distplb.comm.steps import Transfer
from distplb.replicas import step_balancer
from distplb.replicas.step_balancer import StepBalancer

__all__ = ["host_time"]

TOKENS = 4096
STEPS = 400


class Echo:
    """A communicator of M ranks that all do what this one does."""

    rank = 0

    def __init__(self, size: int) -> None:
        self.size, self.device = size, torch.device("cpu")

    def all_gather(self, row: Tensor) -> Tensor:
        """The row of every rank."""
        return row.expand(self.size, -1).contiguous()

    def start(self, sends: Sequence[Message], receives: Sequence[Message]) -> Transfer:
        """Only `dispatch` is timed."""
        raise AssertionError

    def tell(self, error: Exception) -> None:
        """Nobody to tell."""


def host_time(gpus: int, slots: int) -> dict[str, float]:
    """Median seconds of a plain dispatcher's counting, and of `dispatch`, in even steps and with replicas."""
    even = (torch.arange(2 * TOKENS) % slots).view(TOKENS, 2)
    hot = even.clone()
    hot[: TOKENS // 3, 0] = 0

    def plain() -> None:
        counts = even.flatten().bincount(minlength=slots)
        received = counts.clone()  # stands for the exchange
        for each in (counts, received):
            each.view(gpus, -1).sum(1).tolist()

    def split_sizes(ids: Tensor, balancer: StepBalancer) -> str:
        step = balancer.dispatch("layer", ids)
        assert len(step.exchange.send_sizes) == len(step.exchange.receive_sizes)
        return "even" if step.is_trivial else "replicas"

    with patch.object(step_balancer, "TorchStepComm", lambda *_, **__: Echo(gpus)):
        balanced, uneven = (StepBalancer(topology=Topology(1, gpus), num_experts=slots) for _ in range(2))
    found: dict[str, list[float]] = {"plain": [timed(plain) for _ in range(STEPS)]}
    for ids, balancer in ((even, balanced), (hot, uneven)):
        for number in range(STEPS + 20):
            begin = time.perf_counter()
            kind = split_sizes(ids, balancer)
            if number >= 20:
                found.setdefault(kind, []).append(time.perf_counter() - begin)
    return {kind: statistics.median(seconds) for kind, seconds in found.items()}


def timed(run: Callable[[], object]) -> float:
    """The seconds that a call takes."""
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin
