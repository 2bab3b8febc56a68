"""Training with the adapters on the ranks of a job: seconds, imbalance and memory with replicas and without.

The models are those of examples/torchtitan_moe.py and examples/huggingface_moe.py, with wider experts and more tokens.
Shapes: N tokens of a rank, E experts, K top-k, M ranks.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.shared.processes import outside
from distplb import Record, StepEvent
from distplb.errors import DistplbError

__all__ = ["EVEN", "FRAMEWORKS", "TEXT", "Case", "Method", "imbalances", "memory", "times"]

TEXT, EVEN = "text", "even"  # the model's own router on text; every expert gets equally many tokens
EVERY = 5  # iterations between rebalances


@dataclass(frozen=True)
class Framework:
    """An example and the names in it.

    Args:
        example: the module of examples/.
        router: the class whose forward returns the choice.
        place: the position of the choice and of its scores among what the router returns.
        experts, top_k: E and K of the example's model.
    """

    example: str
    router: str
    choice: int
    scores: int
    experts: int
    top_k: int


FRAMEWORKS = {
    "torchtitan": Framework("torchtitan_moe", "TokenChoiceTopKRouter", 1, 0, 64, 8),
    "transformers": Framework("huggingface_moe", "Qwen3MoeTopKRouter", 2, 1, 16, 2),
}


@dataclass(frozen=True)
class Case:
    """What is trained.

    Args:
        framework: a name of FRAMEWORKS.
        workload: TEXT, EVEN, or the name of one of examples/workloads.py, which replace the router's choice.
        sequences: of a rank in an iteration.
        hidden: width of an expert.
    """

    framework: str
    workload: str
    sequences: int
    hidden: int


@dataclass(frozen=True)
class Method:
    """How a model is balanced.

    Args:
        name: in the tables.
        moves: whether homes move.
        slots: replicas that a GPU may hold in a step.
        options: others of the `StepBalancer`.
        cap: None, or the most tokens of a GPU in a layer over the even share.
    """

    name: str
    moves: bool = False
    slots: int = 0
    options: dict[str, Any] = field(default_factory=dict)
    cap: float | None = None


class Training:
    """A model of the example on this rank, with its rebalancer.

    Args:
        case: what is trained.
        method: how it is balanced.
        on_event: called with the record of every step; None leaves steps without a record.
    """

    def __init__(self, case: Case, method: Method, on_event: Callable[[StepEvent], object] | None = None) -> None:
        self.case, self.framework, self.iteration = case, FRAMEWORKS[case.framework], 0
        self._example, self._workloads = outside("examples", self.framework.example), outside("examples", "workloads")
        self._example.SEQUENCES = case.sequences
        self._text = outside("examples", "texts").code()
        options = dict(method.options)
        if method.cap is not None:
            options["max_tokens_per_gpu"] = int(method.cap * self.tokens * self.framework.top_k)
        if on_event is not None:
            options |= {"on_event": on_event, "sample_every": 1}
        every = EVERY if method.moves else None
        self.job = self._example.Job(every, method.slots, case.hidden, Record(), options if method.slots else {})
        routers = [one for one in self.job.model.modules() if type(one).__name__ == self.framework.router]
        assert routers
        if case.workload != TEXT:
            for layer, router in enumerate(routers):
                router.register_forward_hook(partial(self._steered, layer), prepend=True)

    @property
    def tokens(self) -> int:
        """N."""
        return int(self.case.sequences * self._example.LENGTH)

    def train(self) -> None:
        """Train an iteration."""
        self.iteration += 1
        self.job.train(self._example.batch(self._text, self.iteration))

    def _steered(self, layer: int, router: nn.Module, _: Any, returned: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """What a router returns, with the workload's choice instead of its own and the same scores."""
        (number, top_k), changed = (self.tokens, self.framework.top_k), list(returned)
        chosen = changed[self.framework.choice]
        assert chosen.numel() == number * top_k
        experts = self._choice(layer, (number, top_k, self.framework.experts))
        # The router's rows move with the homes, so that its choice is of slots.
        slots = self.job.rebalancer.placement.inverse[layer, :, 0][experts]
        changed[self.framework.choice] = slots.to(chosen).view_as(chosen)
        return tuple(changed)

    def _choice(self, layer: int, shape: tuple[int, int, int]) -> Tensor:
        number, top_k, experts = shape
        rank, ranks = dist.get_rank(), dist.get_world_size()
        if self.case.workload == EVEN:
            return torch.arange(number * top_k).view(number, top_k) % experts
        chosen = self._workloads.choice(
            self.case.workload, shape, seed=0, step=self.iteration, layer=layer, rank=rank, gpus=ranks
        )
        assert isinstance(chosen, Tensor)
        return chosen


def times(case: Case, methods: list[Method], steps: int) -> dict[str, Any]:
    """Seconds of each iteration by method, and the tokens of an iteration; each iteration is taken by all in turn.

    The first iterations, in which homes move for the first time, are not timed.
    """
    trainings = {method.name: Training(case, method) for method in methods}
    seconds: dict[str, list[float]] = {name: [] for name in trainings}
    names = list(trainings)
    for iteration in range(EVERY + 1 + steps):
        turn = iteration % len(names)
        for name in names[turn:] + names[:turn]:
            dist.barrier()
            begin = time.perf_counter()
            trainings[name].train()
            dist.barrier()
            if iteration > EVERY:
                seconds[name].append(time.perf_counter() - begin)
    return {"seconds": seconds, "tokens": dist.get_world_size() * next(iter(trainings.values())).tokens}


def imbalances(case: Case, methods: list[Method], steps: int) -> dict[str, list[list[Any]]]:
    """By method: of each step, the layers' mean imbalance before and after, and the replicas of a layer."""
    found: dict[str, list[list[Any]]] = {}
    for method in methods:
        told: list[StepEvent] = []
        training = Training(case, method, told.append)
        for _ in range(steps + 1):  # a step is told when the next one is sampled
            training.train()
        del training
        gc.collect()
        found[method.name] = [
            [mean_of(one.imbalance_before), mean_of(one.imbalance_after), one.num_replicas / len(one.layers)]
            for one in told[:steps]
        ]
    return found


def mean_of(layers: tuple[float | None, ...]) -> float:
    """The mean of the layers that have tokens."""
    return sum(known := [value for value in layers if value is not None]) / len(known)


def memory(case: Case, methods: list[Method], steps: int) -> dict[str, Any]:
    """By method: bytes by rank that an iteration held at most above what is held between iterations.

    The process's own peak, in which large tensors are mapped and unmapped one by one; see `MALLOC_MMAP_THRESHOLD_` in
    bench_replicas. A method whose cap no split keeps has the text of the refusal instead.
    """
    found: dict[str, Any] = {}
    for method in methods:
        training: Training | None = None
        try:
            training = Training(case, method)
            training.train()  # creates the optimizer's state
            gc.collect()
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
            begin = status("VmRSS")
            for _ in range(steps):
                training.train()
        except DistplbError as error:
            found[method.name] = str(error)
            continue
        peaks: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(peaks, status("VmHWM") - begin)
        found[method.name] = peaks
        del training
        gc.collect()
    return found


def status(name: str) -> int:
    """A size of this process in bytes, by its name in /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(f"{name}:")).split()[1])
