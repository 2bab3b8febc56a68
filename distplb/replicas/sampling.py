"""Sampled steps: what one step of all layers did and took, gathered from all ranks when the next one is sampled.

Shapes: L layers, M GPUs, P slots, R replica slots of each GPU.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from distplb.comm.steps import StepComm
from distplb.core.topology import Topology
from distplb.records.step_event import StepEvent
from distplb.splitting.bound import bound_of
from distplb.splitting.rules import EMPTY
from distplb.splitting.split_value import Split

__all__ = ["Clock", "OnEvent", "Sample", "Sampler", "seconds_of_parts"]

OnEvent = Callable[[StepEvent], object]

_LOGGER = logging.getLogger("distplb")
_FORWARD = ("count", "split", "push", "dispatch", "experts")
_PARTS = (*_FORWARD, "push again", "experts backward", "bring home")
# Parts that end together on all ranks, or that others wait for, and what the rest of the time there is called.
_SHORTEST = {"count": "waiting to count"}
_LONGEST = {"experts": "waiting", "experts backward": "waiting backward"}
_UNKNOWN = -1
_MAX_NAME = 80  # characters of a name that is no text


class Clock:
    """Marks in time: of the host or, with a GPU, of its current stream, where a mark costs the host microseconds."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def mark(self) -> Any:
        """Now, or the moment at which the stream comes to this point."""
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    @staticmethod
    def seconds(begin: Any, end: Any) -> float:
        """Seconds between two marks; waits until the stream has come to the second."""
        if isinstance(begin, float):
            return float(end - begin)
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3


class Sample:
    """One sampled step of one layer on this rank.

    Parts do not overlap: one that begins inside another, such as a push between dispatch and compute, interrupts it.

    Args:
        layer: the layer's name.
        step: the forwards that it has had.
        clock: takes the marks.

    Attributes:
        counted: the digest of what this rank counted, by which a recomputation is known.
        has_ended: whether the experts' backward has ended, after which no recomputation comes.
        num_exchanges: how often replicas' rows or gradients travelled.
        bytes_per_replica: of the rows of one expert; 0 if nothing travelled.
    """

    def __init__(self, layer: Hashable, step: int, clock: Clock) -> None:
        self.layer, self.step = layer, step
        self.counted, self.has_ended = 0, False
        self.num_exchanges = self.bytes_per_replica = 0
        self._clock, self._running = clock, dict[str, Any]()  # parts that have begun, and when
        self._spans = list[tuple[str, Any, Any]]()

    def begin(self, part: str) -> None:
        """A part begins, and ends where `end` is called."""
        self._running[part] = self._clock.mark()

    def end(self, part: str) -> None:
        """A part ends; without effect if it has not begun or has ended."""
        if part in self._running:
            self._spans.append((part, self._running.pop(part), self._clock.mark()))
            self.has_ended |= part == "experts backward"

    def forget_last(self) -> None:
        """The part that has just ended was not one of this step."""
        self._spans.pop()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """The block is a part."""
        interrupted = list(self._running)
        for other in interrupted:
            self._spans.append((other, self._running.pop(other), self._clock.mark()))
        self.begin(name)
        try:
            yield
        finally:
            self.end(name)
            for other in interrupted:
                self.begin(other)

    def watch_backward(self, computed: Tensor, rows: Tensor) -> None:
        """Time the experts' backward in a step without replicas, which has no nodes of its own in the graph.

        It ends with the gradient of the rows. Those of the weights come with it, or little later.
        """
        if computed.requires_grad and rows.requires_grad:
            computed.register_hook(lambda _: self.begin("experts backward"))
            rows.register_hook(lambda _: self.end("experts backward"))

    def describe(self, split: Split | None, counts: Tensor, own: Tensor, bound: int) -> None:
        """Keep what the event tells of the step.

        Args:
            split: the step's split; None if every token is computed at home.
            counts: `[M, P]`, tokens by source GPU and slot.
            own: `[M, G]`, the slots of each GPU.
            bound: the tokens that the busiest GPU has at least.
        """
        before = counts.sum(0)[own].sum(1)
        after = before if split is None else split.load
        self.tokens_before, self.tokens_after = tuple(before.tolist()), tuple(after.tolist())
        total, num_gpus = sum(self.tokens_before), len(self.tokens_before)
        busiest = (max(self.tokens_before), max(self.tokens_after), bound)
        self.imbalances = tuple(one * num_gpus / total if total else None for one in busiest)
        self.replicas = tuple[tuple[int, int, int], ...]()
        if split is not None:
            gpus, places = split.replica.ne(EMPTY).nonzero(as_tuple=True)
            slots = split.replica[gpus, places]
            tokens = split.quota[slots, gpus]
            self.replicas = tuple(zip(slots.tolist(), gpus.tolist(), tokens.tolist(), strict=True))

    def nanoseconds(self) -> list[int]:
        """Of each of `_PARTS`; `_UNKNOWN` if it did not run or has not ended."""
        found = dict.fromkeys(_PARTS, _UNKNOWN)
        for part, begin, end in self._spans:
            if part not in self._running:
                found[part] = max(0, found[part]) + max(0, round(self._clock.seconds(begin, end) * 1e9))
        return list(found.values())


class Sampler:
    """Chooses the steps, alike on all ranks, and tells what happened in them.

    Args:
        comm: the ranks of the group.
        on_event: called on this rank with the event of each sampled step; None calls nobody.
        every: one of so many forwards of a layer is sampled, beginning with the first.
        started: when the balancer was created, in seconds since 1970, on rank 0.
        topology: nodes and GPUs.
        own: `[M, G]`, the slots of each GPU.
        num_replicas: R.
        between: whether replicas may leave nodes.
    """

    def __init__(
        self,
        comm: StepComm,
        on_event: OnEvent | None,
        every: int,
        started: float,
        *,
        topology: Topology,
        own: Tensor,
        num_replicas: int,
        between: bool,
    ) -> None:
        self._comm, self._on_event, self._every, self._started = comm, on_event, every, started
        self._topology, self._own, self._num_replicas = topology, own, num_replicas
        self._reach = Topology(1, topology.num_gpus) if between else topology
        self._home = torch.arange(own.numel(), device="cpu") // own.shape[1]
        self._clock = Clock(comm.device)
        self._forwards = dict[Hashable, int]()
        self._samples = list[Sample]()  # of one step, of the layers that have come to it

    def sample(self, layer: Hashable) -> Sample | None:
        """Count a forward of a layer; a `Sample` if it is sampled."""
        forwards = self._forwards[layer] = self._forwards.get(layer, 0) + 1
        return None if (forwards - 1) % self._every else Sample(layer, forwards, self._clock)

    def recomputed(self, layer: Hashable) -> Sample | None:
        """The sample of a layer whose step is possibly recomputed now, in its backward."""
        return next((one for one in self._samples if one.layer == layer and not one.has_ended), None)

    def take(self, sample: Sample, counts: Tensor, split: Split | None) -> None:
        """Add a layer to the step that is sampled; the first layer of a new one has the last one told. Collective."""
        if self._samples and self._samples[0].step != sample.step:
            self._tell(self._samples)
            self._samples = []
        bound = bound_of(counts.sum(0), self._home, self._reach, self._num_replicas)
        sample.describe(split, counts, self._own, bound)
        self._samples.append(sample)

    def _tell(self, samples: Sequence[Sample]) -> None:
        """Gather the seconds of all ranks, and pass the event on."""
        own = torch.tensor([one.nanoseconds() for one in samples], dtype=torch.int64, device="cpu")  # [L, parts]
        gathered = self._comm.all_gather(own.flatten().to(self._comm.device)).view(-1, *own.shape)
        if self._on_event is None:
            return
        try:
            self._on_event(self._event(samples, gathered))
        except Exception:  # a failing callback must not end the training
            _LOGGER.exception("on_event failed at step %d; training continues", samples[0].step)

    def _event(self, samples: Sequence[Sample], nanoseconds: Tensor) -> StepEvent:
        before, after, bound = zip(*(one.imbalances for one in samples), strict=True)
        inside, between, each = 0, 0, self._topology.gpus_per_node
        for one in samples:
            for slot, gpu, _ in one.replicas:
                size = one.bytes_per_replica * one.num_exchanges
                is_inside = gpu // each == int(self._home[slot]) // each
                inside, between = inside + size * is_inside, between + size * (not is_inside)
        return StepEvent(
            step=samples[0].step,
            started=self._started,
            layers=tuple(_name(one.layer) for one in samples),
            num_slots=self._own.numel(),
            num_nodes=self._topology.num_nodes,
            replica_slots=self._num_replicas,
            seconds=seconds_of_parts(nanoseconds),
            imbalance_before=before,
            imbalance_after=after,
            imbalance_bound=bound,
            tokens_of_gpu_before=tuple(one.tokens_before for one in samples),
            tokens_of_gpu_after=tuple(one.tokens_after for one in samples),
            replicas=tuple(one.replicas for one in samples),
            bytes_inside=inside,
            bytes_between=between,
        )


def seconds_of_parts(nanoseconds: Tensor) -> dict[str, float]:
    """The `seconds` of a `StepEvent`.

    Args:
        nanoseconds: `[M, L, parts]` int64; negative where a part did not run, or its end is not known.
    """
    found = dict[str, float]()
    for number, part in enumerate(_PARTS):
        of_layers = nanoseconds[:, :, number]
        known = of_layers[:, of_layers.ge(0).all(0)].double() / 1e9  # [M, layers where every rank knows it]
        if not known.shape[1]:
            continue
        if part in _SHORTEST:
            least = known.amin(0)
            found |= {part: float(least.sum()), _SHORTEST[part]: float((known.mean(0) - least).sum())}
        else:
            mean = known.mean(0)
            found[part] = float(mean.sum())
            if part in _LONGEST:
                found[_LONGEST[part]] = float((known.amax(0) - mean).sum())
    return found


def _name(layer: Hashable) -> str:
    """A layer's name as text."""
    return layer if isinstance(layer, str) else repr(layer)[:_MAX_NAME]
