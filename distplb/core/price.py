"""The two prices that a plan weighs: the time that tokens take, and the tokens that a moved slot must save.

Shapes: L layers, P slots, M GPUs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from distplb.core.arguments import plain, refuse_wrong_types, shown
from distplb.core.counts import Counts, as_counts
from distplb.core.hashing import digest
from distplb.core.placement import Placement
from distplb.core.topology import Topology
from distplb.errors import DistplbError

__all__ = ["MoveModel", "TimeCurve", "moved_slots"]

# 18 minutes for one expert in one step. Times saturate there, so that the sum of 2^22 of them fits into an int64.
_MAX_NANOSECONDS = 1 << 40
_MAX_TOKENS = 1 << 40
_LINEAR_TOKENS = 1 << 20


@dataclass(frozen=True)
class TimeCurve:
    """The nanoseconds that an expert needs for a number of tokens: piecewise linear and non-decreasing.

    >>> curve = TimeCurve(tokens=(0, 10, 110), nanoseconds=(0, 500, 1500))
    >>> curve.time(torch.tensor([0, 5, 10, 60, 210]))
    tensor([   0,  250,  500, 1000, 2500])

    Args:
        tokens: the points' tokens, ascending from 0.
        nanoseconds: the points' times; the last segment continues beyond the last point.

    Raises:
        DistplbError: if there are fewer than two points, tokens do not ascend, times fall, or points are too far apart
            for int64.
    """

    tokens: tuple[int, ...]
    nanoseconds: tuple[int, ...]

    def __post_init__(self) -> None:
        for name, limit in (("tokens", _MAX_TOKENS), ("nanoseconds", _MAX_NANOSECONDS)):
            refuse_wrong_types(
                {f"TimeCurve: {name}": (getattr(self, name), (Sequence, np.ndarray), "a sequence of integers")}
            )
            values = [plain(value) for value in getattr(self, name)]
            wrong = [value for value in values if type(value) is not int or not 0 <= value <= limit]
            if wrong:
                raise DistplbError(f"TimeCurve: {name} has {wrong[0]!r}; pass integers from 0 to {limit}")
            object.__setattr__(self, name, tuple(values))
        if len(self.tokens) < 2 or len(self.tokens) != len(self.nanoseconds):
            raise DistplbError(
                f"TimeCurve: tokens has length {len(self.tokens)}, nanoseconds has length {len(self.nanoseconds)}; "
                "pass the same number of both, at least two"
            )
        self._check_order()

    def _check_order(self) -> None:
        if self.tokens[0] != 0:
            raise DistplbError(f"TimeCurve: tokens starts with {self.tokens[0]}; pass a point for 0 tokens first")
        for nth in range(len(self.tokens) - 1):
            more, longer = self.tokens[nth + 1] - self.tokens[nth], self.nanoseconds[nth + 1] - self.nanoseconds[nth]
            if more <= 0 or longer < 0:
                raise DistplbError(
                    f"TimeCurve: (tokens, nanoseconds) = ({self.tokens[nth + 1]}, {self.nanoseconds[nth + 1]}) follows "
                    f"({self.tokens[nth]}, {self.nanoseconds[nth]}); pass ascending tokens and times that never fall, "
                    "or pass measured points to TimeCurve.through"
                )
            if more * longer >= 1 << 63:
                raise DistplbError(
                    f"TimeCurve: points {nth} and {nth + 1} differ by {more} tokens and {longer} ns; "
                    "pass points whose differences multiply to less than 2^63"
                )

    @classmethod
    def linear(cls, nanoseconds_per_token: float) -> TimeCurve:
        """The curve with the same time for every token, to a millionth of a nanosecond.

        >>> TimeCurve.linear(2.5).time(torch.tensor([4, 5]))
        tensor([10, 12])
        """
        most = (1 << 40) // _LINEAR_TOKENS
        nanoseconds_per_token = plain(nanoseconds_per_token)
        number = (nanoseconds_per_token, (int, float), "a number")
        refuse_wrong_types({"nanoseconds_per_token": number})
        if not 0 < nanoseconds_per_token <= most:
            raise DistplbError(
                f"nanoseconds_per_token is {nanoseconds_per_token!r}; pass a number above 0 and at most {most}"
            )
        return cls((0, _LINEAR_TOKENS), (0, round(nanoseconds_per_token * _LINEAR_TOKENS)))

    @classmethod
    def through(cls, tokens: Sequence[int], seconds: Sequence[float]) -> TimeCurve:
        """The non-decreasing least-squares fit to measured points, which may be in any order.

        Points with the same number of tokens are averaged. Without a point for 0 tokens, an idle expert takes no time.

        >>> TimeCurve.through([64, 128, 192], [3e-6, 2e-6, 4e-6]).nanoseconds
        (0, 2500, 2500, 4000)
        """
        from scipy.optimize import isotonic_regression  # on first use: its import takes a third as long as torch's

        numbers, seconds = _numbers("tokens", tokens), _numbers("seconds", seconds)
        if len(numbers) != len(seconds) or not numbers:
            raise DistplbError(
                f"tokens has length {len(numbers)}, seconds has length {len(seconds)}; pass the same number of both"
            )
        if not all(math.isfinite(value) and value >= 0 for value in (*numbers, *seconds)):
            raise DistplbError(f"tokens is {numbers}, seconds is {list(seconds)}; pass finite numbers of at least 0")
        if not all(value == int(value) for value in numbers):
            raise DistplbError(f"tokens is {numbers}; pass integers")
        places, place, weight = np.unique(np.asarray(numbers), return_inverse=True, return_counts=True)
        mean = np.bincount(place, weights=np.asarray(seconds, dtype=np.float64)) / weight
        times = [round(value * 1e9) for value in isotonic_regression(mean, weights=weight).x.tolist()]
        idle = [] if places[0] == 0 else [0]
        return cls((*idle, *(int(value) for value in places)), (*idle, *times))

    @property
    def nanoseconds_per_token(self) -> float:
        """The last point's time divided by its tokens."""
        return self.nanoseconds[-1] / self.tokens[-1]

    def time(self, load: Counts) -> Tensor:
        """int64 nanoseconds for each number of tokens in a tensor of any shape, by integer arithmetic on every device.

        Rounded down; saturates at 2^40 ns.

        Raises:
            DistplbError: for values that are not counts.
        """
        load = as_counts("load", load, ()).contiguous()
        tokens, times = (torch.tensor(values, device=load.device) for values in (self.tokens, self.nanoseconds))
        more, longer = tokens.diff(), times.diff()  # of each segment
        segment = (torch.searchsorted(tokens, load, right=True) - 1).clamp_(0, len(more) - 1)
        beyond = load - tokens[segment]
        # Whole lengths of the segment and the rest are multiplied separately, so that neither product overflows.
        whole = (beyond // more[segment]).clamp_(max=_MAX_NANOSECONDS // longer.clamp(min=1)[segment] + 1)
        rest = beyond % more[segment] * longer[segment] // more[segment]
        return (times[segment] + whole * longer[segment] + rest).clamp_(max=_MAX_NANOSECONDS)

    def digest(self) -> int:
        """A hash in [0, 2^62), the same on every machine, that differs between different curves."""
        data = np.array([self.tokens, self.nanoseconds], dtype="<i8").tobytes()
        return digest(data)


def _numbers(name: str, values: Sequence[float]) -> list[float]:
    refuse_wrong_types({name: (values, (Sequence, np.ndarray, Tensor), "a sequence of measured numbers")})
    numbers = [plain(value) for value in values]
    words = "a number"
    refuse_wrong_types({f"{name}[{nth}]": (one, (int, float), words) for nth, one in enumerate(numbers)})
    return numbers


@dataclass(frozen=True)
class MoveModel:
    """The time to move an expert and the time of a token, from which the price of a move follows.

    >>> model = MoveModel(seconds_per_token=0.5, bytes_per_slot=640, bandwidth_inside=128, bandwidth_between=64)
    >>> model.price(window_steps=32, steps_until_next=320)
    (2.0, 4.0)

    Args:
        seconds_per_token: seconds that the busiest GPU needs for one more token of a layer, forward and backward.
        bytes_per_slot: bytes of an expert's weights and all that travels with them (optimizer state, gradients).
        bandwidth_inside: bytes per second of the whole EP group between GPUs of the same node, when all of them
            exchange at once.
        bandwidth_between: the same between nodes.
        trust: the share, in (0, 1], of a plan's saving on the window that is expected on later steps. 0.5 did best over
            the traces and generators of `benchmarks/study/bench_replay.py`.

    Raises:
        DistplbError: if an argument is not a positive number, or `trust` is above 1.
    """

    seconds_per_token: float
    bytes_per_slot: int
    bandwidth_inside: float
    bandwidth_between: float
    trust: float = 0.5

    def __post_init__(self) -> None:
        for field in fields(self):
            object.__setattr__(self, field.name, plain(getattr(self, field.name)))
        if isinstance(self.trust, bool) or not isinstance(self.trust, int | float) or not 0 < self.trust <= 1:
            raise DistplbError(f"MoveModel: trust is {shown(self.trust)}; pass a number above 0 and at most 1")
        for name in ("seconds_per_token", "bytes_per_slot", "bandwidth_inside", "bandwidth_between"):
            _check_positive(f"MoveModel: {name}", getattr(self, name))

    def price(self, window_steps: int, steps_until_next: float) -> tuple[float, float]:
        """The price of one moved slot inside a node and between nodes, in tokens of the window.

        If `trust` is 1, a token that a plan saves in a window of T steps is saved steps_until_next / T times before the
        next rebalance. A move pays off if it saves more tokens of the window than its price.

        Args:
            window_steps: T, the steps of the load that the plan is based on.
            steps_until_next: steps of the same kind until the next rebalance.
        """
        window_steps, steps_until_next = plain(window_steps), plain(steps_until_next)
        _check_positive("price: window_steps", window_steps)
        _check_positive("price: steps_until_next", steps_until_next)
        share = window_steps / steps_until_next / self.seconds_per_token / self.trust
        return self.seconds(1, 0) * share, self.seconds(0, 1) * share

    def seconds(self, inside: int, between: int) -> float:
        """How long it takes to move `inside` slots within nodes and then `between` slots across nodes."""
        return self.bytes_per_slot * (inside / self.bandwidth_inside + between / self.bandwidth_between)


def _check_positive(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise DistplbError(f"{name} is {shown(value)}; pass a number above 0")


def moved_slots(old: Placement, new: Placement, topology: Topology) -> Tensor:
    """`[L, 2]` int64: how many slots of `new` get their expert from another GPU of the node, or else from another node.

    A GPU that holds an expert can copy it to any number of its slots; these copies do not count.

    >>> old = Placement.contiguous(num_layers=1, num_experts=4, num_gpus=4)
    >>> new = Placement(torch.tensor([[1, 0, 2, 0, 2, 3, 3, 3]]), num_experts=4, num_gpus=4)
    >>> moved_slots(old, new, Topology(num_nodes=2, gpus_per_node=2))
    tensor([[3, 1]])

    Args:
        old, new: placements of the same layers, experts and GPUs; their numbers of slots may differ.
        topology: topology of these GPUs.

    Raises:
        DistplbError: if they belong to different models or clusters.
    """
    arguments = {"old": (old, (Placement,), "a Placement"), "new": (new, (Placement,), "a Placement")}
    refuse_wrong_types(arguments | {"topology": (topology, (Topology,), "a Topology")})
    shapes = [(one.num_layers, one.num_experts, one.num_gpus) for one in (old, new)]
    if shapes[0] != shapes[1] or old.num_gpus != topology.num_gpus:
        raise DistplbError(
            f"the placements have (layers, experts, GPUs) = {shapes[0]} and {shapes[1]}, the topology has num_gpus="
            f"{topology.num_gpus}; pass placements of the same model and cluster"
        )
    from_gpu = ~_held(old, new, 1)  # [L, P]
    from_node = ~_held(old, new, topology.gpus_per_node)
    return torch.stack([(from_gpu & ~from_node).sum(1), from_node.sum(1)], dim=1)


def _held(old: Placement, new: Placement, gpus: int) -> Tensor:
    """`[L, P]` bool: for each slot of `new`, whether its block of `gpus` GPUs already holds its expert in `old`."""
    keys = []
    for one in (old, new):
        block = torch.arange(one.num_slots, device="cpu") // (one.slots_per_gpu * gpus)  # [P]
        expert = one.expert_of_slot + torch.arange(one.num_layers, device="cpu")[:, None] * one.num_experts  # [L, P]
        keys.append(expert * one.num_gpus + block)
    return torch.isin(keys[1], keys[0])
