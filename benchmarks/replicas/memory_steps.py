"""Training steps of the example's model on the ranks of a job: the bytes that each rank holds, and the seconds.

Shapes: N tokens of a rank, L layers, M GPUs, E experts, K top-k, R replica slots, S steps.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.shared.allocations import Allocations, released
from benchmarks.shared.processes import outside
from benchmarks.splitting.caps import named_cap
from distplb import Topology
from distplb.errors import DistplbError
from distplb.replicas.step_balancer import StepBalancer

__all__ = ["LAYERS", "SEQUENCE", "SIZES", "Case", "Method", "Training", "cap_of", "largest", "measured", "timed"]

LAYERS, SEQUENCE = 2, 4
EXPERTS, TOP_K, R = 16, 2, 2
SIZES = {"layers": LAYERS, "experts": EXPERTS, "top_k": TOP_K, "dim": 64, "ffn": 256, "max_sequence": SEQUENCE}
ABOVE = 0.02  # of the cap above the even share of a batch


@dataclass(frozen=True)
class Case:
    """What is trained.

    Args:
        workload: the name of one of examples/workloads.py, which replaces the router's choice.
        nodes: of the EP group; replicas stay inside nodes.
        recompute: whether each block's forward runs again in the backward.
    """

    workload: str
    nodes: int = 1
    recompute: bool = False


@dataclass(frozen=True)
class Method:
    """How a step's tokens are spread over the GPUs.

    Args:
        name: in the tables.
        options: of `StepBalancer`; None for the layer without one.
        is_capped: whether no GPU may compute more than the even share of the batch and ABOVE of it.
        is_forced: whether every expert gets equally many tokens, whatever the router chooses.
    """

    name: str
    options: dict[str, Any] | None = field(default_factory=dict)
    is_capped: bool = False
    is_forced: bool = False


def cap_of(tokens: int) -> int:
    """The cap of a batch of `tokens` tokens on each rank: tokens times K that a GPU computes at most.

    >>> cap_of(1000)
    2040
    """
    return math.floor((1 + ABOVE) * TOP_K * tokens)


class Training:
    """A model on this rank, and its steps.

    Args:
        case: what is trained.
        method: how tokens are spread.
        sequences: of this rank, SEQUENCE tokens each.
    """

    def __init__(self, case: Case, method: Method, sequences: int) -> None:
        moe_model, self._workloads = outside("examples", "moe_model"), outside("examples", "workloads")
        self.case, self.rank, self.num_gpus = case, dist.get_rank(), dist.get_world_size()
        moe_model.exchange = exchange
        config = moe_model.Config(**SIZES, forced=method.is_forced, recompute=case.recompute)
        balancer = None
        if method.options is not None:
            options = dict(method.options)
            if method.is_capped:
                options["max_tokens_per_gpu"] = cap_of(sequences * SEQUENCE)
            topology = Topology(case.nodes, self.num_gpus // case.nodes)
            balancer = StepBalancer(topology=topology, num_experts=EXPERTS, replica_slots=R, **options)
        self.model = moe_model.Transformer(config, dist.group.WORLD, seed=0, balancer=balancer)
        generator = torch.Generator().manual_seed(self.rank)
        self.text = torch.randint(256, (sequences, SEQUENCE + 1), generator=generator)

    def step(self, number: int) -> tuple[list[int], list[int]]:
        """A forward and backward; the tokens that this rank computes, and all replicas, of each layer.

        Raises:
            DistplbError: on all ranks, if no split of a layer keeps the cap.
        """
        self.model.zero_grad()
        for layer, moe in enumerate(self.model.moes):
            moe.choose = partial(self._choice, number, layer)
        # Without the all-reduce of gradients, whose buffer is the same for all methods.
        self.model.accumulate(self.model(self.text[:, :-1], self.text[:, 1:]))
        return [moe.tokens_received for moe in self.model.moes], [moe.num_replicas for moe in self.model.moes]

    def _choice(self, step: int, layer: int, scores: Tensor) -> Tensor:
        chosen = self._workloads.choice(
            self.case.workload,
            (len(scores), TOP_K, EXPERTS),
            seed=0,
            step=step,
            layer=layer,
            rank=self.rank,
            gpus=self.num_gpus,
        )
        assert isinstance(chosen, Tensor)
        return chosen


def exchange(rows: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup) -> Tensor:
    """As in examples/moe_model.py, but when it returns, gloo holds none of the rows any more."""
    rows, received = rows.contiguous(), rows.new_empty(sum(receive), *rows.shape[1:])
    send_all = partial(dist.all_to_all_single, received, rows, receive, send, group=group)
    released([rows, received], send_all)
    return received


def measured(case: Case, method: Method, sequences: int, steps: int) -> dict[str, Any]:
    """Train some steps and tell what ranks held; collective, the same on all ranks.

    Returns:
        "tokens" of a rank; "peaks", bytes by rank: the most that it held in any step, weights, gradients and replicas
        included; "busiest", the tokens of the busiest GPU over those of the mean one in each layer and step; "replicas"
        in a mean layer and step. A batch that is refused has "refused", the smallest cap that a split of that step
        keeps over the even share, and none of the others but "tokens".
    """
    gc.collect()
    tokens = sequences * SEQUENCE
    computed, replicas = list[int](), list[int]()
    try:
        with Allocations() as allocations:
            training = Training(case, method, sequences)
            for number in range(steps):
                with allocations.window():
                    received, lent = training.step(number)
                computed += received
                replicas += lent
    except DistplbError as error:
        return {"tokens": tokens, "refused": least_cap(error) / (TOP_K * tokens)}
    of_ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(of_ranks, (max(allocations.peaks), computed))
    load = np.array([loads for _, loads in of_ranks])  # [M, S * L]
    assert (load.sum(0) == tokens * TOP_K * len(load)).all()
    return {
        "tokens": tokens,
        "peaks": [most for most, _ in of_ranks],
        "busiest": (load.max(0) / load.mean(0)).tolist(),
        "replicas": float(np.mean(replicas)),
    }


def least_cap(error: DistplbError) -> int:
    """The smallest cap that a refusal names; any other error is raised again."""
    if not str(error).startswith("max_tokens_per_gpu"):
        raise error
    return named_cap(str(error))[0]


def largest(budget: float, most: int, peak: Callable[[int], float]) -> int:
    """The largest batch, from 0 to `most`, whose peak is within the budget, if peaks grow with the batch.

    Peaks are nearly a line in the batch, so the next guess is where the line through two measured ones meets the
    budget; every third one halves what is left, so that no curve takes long.

    >>> largest(100, 1000, lambda batch: 30 + 3 * batch)
    23

    Args:
        budget: bytes.
        most: the largest batch that is tried.
        peak: bytes of a batch; infinity for one that is refused.
    """
    peaks: dict[int, float] = {}
    low, high = 0, most + 1  # the first fits, the second does not
    while high - low > 1:
        finite = sorted((abs(bytes_ - budget), batch) for batch, bytes_ in peaks.items() if bytes_ < math.inf)
        guess = (low + high) // 2
        if not peaks:
            guess = low + max(1, most // 16)
        elif len(finite) == 1 and len(peaks) == 1:
            guess = low * 2 if low else high // 2
        elif len(finite) > 1 and len(peaks) % 3:
            (one, other) = sorted(batch for _, batch in finite[:2])
            slope = (peaks[other] - peaks[one]) / (other - one)
            guess = one + math.floor((budget - peaks[one]) / slope) if slope > 0 else guess
        guess = min(max(guess, low + 1), high - 1)
        peaks[guess] = peak(guess)
        if peaks[guess] <= budget:
            low = guess
        else:
            high = guess
    return low


def timed(case: Case, methods: list[Method], sequences: int, steps: int) -> dict[str, dict[str, Any]]:
    """Seconds of each step, of the slowest rank, by method; each step is taken by all methods, one after the other.

    A method is left out from the first step on that is refused; "refused" is then the cap that it needs over the even
    share.
    """
    trainings = {method.name: Training(case, method, sequences) for method in methods}
    taken: dict[str, dict[str, Any]] = {name: {"seconds": [], "busiest": [], "lent": []} for name in trainings}
    for number in range(-1, steps):  # the first one compiles and allocates
        names = [name for name in trainings if "refused" not in taken[name]]
        for name in names[number % len(names) :] + names[: number % len(names)]:
            dist.barrier()
            begin = time.perf_counter()
            try:
                computed, replicas = trainings[name].step(max(number, 0))
            except DistplbError as error:
                taken[name]["refused"] = least_cap(error) / (TOP_K * SEQUENCE * sequences)
                continue
            values = torch.tensor([time.perf_counter() - begin, *computed], dtype=torch.float64)
            mean = values / dist.get_world_size()
            dist.all_reduce(values, dist.ReduceOp.MAX)
            dist.all_reduce(mean)
            if number >= 0:
                taken[name]["seconds"].append(float(values[0]))
                taken[name]["busiest"] += (values[1:] / mean[1:]).tolist()
                taken[name]["lent"] += replicas
    return taken
