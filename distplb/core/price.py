"""From tokens to time, and what a moved slot has to save: the two prices that a plan weighs.

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

# 18 minutes for one expert in one step. Times stop there, so that 2^22 of them can be added up in an int64.
_MAX_NANOSECONDS = 1 << 40
_MAX_TOKENS = 1 << 40
_LINEAR_TOKENS = 1 << 20


@dataclass(frozen=True)
class TimeCurve:
    """Nanoseconds that an expert needs for so many tokens, straight between the points and never falling.

    >>> curve = TimeCurve(tokens=(0, 10, 110), nanoseconds=(0, 500, 1500))
    >>> curve.time(torch.tensor([0, 5, 10, 60, 210]))
    tensor([   0,  250,  500, 1000, 2500])

    Args:
        tokens: of the points, ascending, the first 0.
        nanoseconds: of the points; the last segment goes on beyond the last point.

    Raises:
        DistplbError: if there are fewer than two points, or they fall, or are too far apart for int64.
    """

    tokens: tuple[int, ...]
    nanoseconds: tuple[int, ...]

    def __post_init__(self) -> None:
        for name, limit in (("tokens", _MAX_TOKENS), ("nanoseconds", _MAX_NANOSECONDS)):
            refuse_wrong_types(
                {f"TimeCurve: {name}": (getattr(self, name), (Sequence, np.ndarray), "the points' numbers")}
            )
            values = [plain(value) for value in getattr(self, name)]
            wrong = [value for value in values if type(value) is not int or not 0 <= value <= limit]
            if wrong:
                raise DistplbError(f"TimeCurve: {name} has {wrong[0]!r}; pass whole numbers from 0 to {limit}")
            object.__setattr__(self, name, tuple(values))
        if len(self.tokens) < 2 or len(self.tokens) != len(self.nanoseconds):
            raise DistplbError(
                f"TimeCurve: {len(self.tokens)} tokens and {len(self.nanoseconds)} nanoseconds; "
                "pass as many of both, at least two"
            )
        self._check_order()

    def _check_order(self) -> None:
        if self.tokens[0] != 0:
            raise DistplbError(f"TimeCurve: the first point is at {self.tokens[0]} tokens; pass one for 0 tokens first")
        for nth in range(len(self.tokens) - 1):
            more, longer = self.tokens[nth + 1] - self.tokens[nth], self.nanoseconds[nth + 1] - self.nanoseconds[nth]
            if more <= 0 or longer < 0:
                raise DistplbError(
                    f"TimeCurve: {self.tokens[nth + 1]} tokens in {self.nanoseconds[nth + 1]} ns follow "
                    f"{self.tokens[nth]} in {self.nanoseconds[nth]} ns; pass more tokens each time and no less time, "
                    "or measured points to TimeCurve.through"
                )
            if more * longer >= 1 << 63:
                raise DistplbError(
                    f"TimeCurve: {more} tokens more take {longer} ns more between points {nth} and {nth + 1}; "
                    "pass points whose distances multiply to less than 2^63"
                )

    @classmethod
    def linear(cls, nanoseconds_per_token: float) -> TimeCurve:
        """The same time for every token, to a millionth of a nanosecond.

        >>> TimeCurve.linear(2.5).time(torch.tensor([4, 5]))
        tensor([10, 12])
        """
        most = (1 << 40) // _LINEAR_TOKENS
        nanoseconds_per_token = plain(nanoseconds_per_token)
        number = (nanoseconds_per_token, (int, float), "a number")
        refuse_wrong_types({"nanoseconds_per_token": number})
        if not 0 < nanoseconds_per_token <= most:
            raise DistplbError(f"{nanoseconds_per_token!r} nanoseconds per token; pass more than 0 and at most {most}")
        return cls((0, _LINEAR_TOKENS), (0, round(nanoseconds_per_token * _LINEAR_TOKENS)))

    @classmethod
    def through(cls, tokens: Sequence[int], seconds: Sequence[float]) -> TimeCurve:
        """The curve that never falls and is nearest, in least squares, to measured points, in any order.

        Points of the same number of tokens are averaged. Without one for 0 tokens, an idle expert takes no time.

        >>> TimeCurve.through([64, 128, 192], [3e-6, 2e-6, 4e-6]).nanoseconds
        (0, 2500, 2500, 4000)
        """
        from scipy.optimize import isotonic_regression  # when first used: it takes a third as long to import as torch

        numbers, seconds = _numbers("tokens", tokens), _numbers("seconds", seconds)
        if len(numbers) != len(seconds) or not numbers:
            raise DistplbError(f"{len(numbers)} tokens and {len(seconds)} seconds were measured; pass as many of both")
        if not all(math.isfinite(value) and value >= 0 for value in (*numbers, *seconds)):
            raise DistplbError(
                f"measured {list(seconds)} seconds at {numbers} tokens; pass finite numbers of at least 0"
            )
        if not all(value == int(value) for value in numbers):
            raise DistplbError(f"measured at {numbers} tokens; pass whole numbers of tokens")
        places, place, weight = np.unique(np.asarray(numbers), return_inverse=True, return_counts=True)
        mean = np.bincount(place, weights=np.asarray(seconds, dtype=np.float64)) / weight
        times = [round(value * 1e9) for value in isotonic_regression(mean, weights=weight).x.tolist()]
        idle = [] if places[0] == 0 else [0]
        return cls((*idle, *(int(value) for value in places)), (*idle, *times))

    @property
    def nanoseconds_per_token(self) -> float:
        """The last point's time over its tokens."""
        return self.nanoseconds[-1] / self.tokens[-1]

    def time(self, load: Counts) -> Tensor:
        """Nanoseconds for each number of tokens of a tensor of any shape, int64; whole numbers on every device.

        Rounded down; from 2^40 ns on, 2^40 ns.

        Raises:
            DistplbError: for what is no number of tokens.
        """
        load = as_counts("load", load, ()).contiguous()
        tokens, times = (torch.tensor(values, device=load.device) for values in (self.tokens, self.nanoseconds))
        more, longer = tokens.diff(), times.diff()  # of each segment
        segment = (torch.searchsorted(tokens, load, right=True) - 1).clamp_(0, len(more) - 1)
        beyond = load - tokens[segment]
        # Whole lengths of the segment and the rest apart: neither product can leave an int64.
        whole = (beyond // more[segment]).clamp_(max=_MAX_NANOSECONDS // longer.clamp(min=1)[segment] + 1)
        rest = beyond % more[segment] * longer[segment] // more[segment]
        return (times[segment] + whole * longer[segment] + rest).clamp_(max=_MAX_NANOSECONDS)

    def digest(self) -> int:
        """A number in [0, 2^62) that differs between different curves, equal on every machine."""
        data = np.array([self.tokens, self.nanoseconds], dtype="<i8").tobytes()
        return digest(data)


def _numbers(name: str, values: Sequence[float]) -> list[float]:
    refuse_wrong_types({name: (values, (Sequence, np.ndarray, Tensor), "what was measured, number by number")})
    numbers = [plain(value) for value in values]
    words = "a number"
    refuse_wrong_types({f"{name}[{nth}]": (one, (int, float), words) for nth, one in enumerate(numbers)})
    return numbers


@dataclass(frozen=True)
class MoveModel:
    """What it takes to move an expert, against what a token costs.

    >>> model = MoveModel(seconds_per_token=0.5, bytes_per_slot=640, bandwidth_inside=128, bandwidth_between=64)
    >>> model.price(window_steps=32, steps_until_next=320)
    (2.0, 4.0)

    Args:
        seconds_per_token: that the busiest GPU needs for one more token of a layer, forward and backward.
        bytes_per_slot: an expert's weights with all that travels with them (optimizer state, gradients).
        bandwidth_inside: bytes per second of the whole EP group between GPUs of the same node, all of them
            exchanging at once.
        bandwidth_between: the same between nodes.
        trust: how much of what a plan saves on the steps that it was made from it is expected to save on those to
            come, in (0, 1]. A half did best over the traces and generators of `benchmarks/study/bench_replay.py`.

    Raises:
        DistplbError: if one of them is not a positive number, or `trust` is above 1.
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
            raise DistplbError(f"MoveModel: trust is {shown(self.trust)}; pass a share, above 0 and at most 1")
        for name in ("seconds_per_token", "bytes_per_slot", "bandwidth_inside", "bandwidth_between"):
            _check_positive(f"MoveModel: {name}", getattr(self, name))

    def price(self, window_steps: int, steps_until_next: float) -> tuple[float, float]:
        """Tokens of the window that one moved slot costs, inside a node and between nodes.

        A token that a plan saves in each window of T steps is saved steps_until_next / T times before the next
        rebalance, if `trust` is 1; a move pays if it saves more tokens of the window than its price.

        Args:
            window_steps: T, of the load that is planned on.
            steps_until_next: of the same kind, until the next rebalance.
        """
        window_steps, steps_until_next = plain(window_steps), plain(steps_until_next)
        _check_positive("price: window_steps", window_steps)
        _check_positive("price: steps_until_next", steps_until_next)
        share = window_steps / steps_until_next / self.seconds_per_token / self.trust
        return self.seconds(1, 0) * share, self.seconds(0, 1) * share

    def seconds(self, inside: int, between: int) -> float:
        """How long it takes to move so many slots, `inside` nodes and then `between` them."""
        return self.bytes_per_slot * (inside / self.bandwidth_inside + between / self.bandwidth_between)


def _check_positive(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise DistplbError(f"{name} is {shown(value)}; pass a number above 0")


def moved_slots(old: Placement, new: Placement, topology: Topology) -> Tensor:
    """`[L, 2]` int64: slots of `new` whose expert comes from another GPU of the node, and from other nodes only.

    A GPU that holds an expert copies it to as many of its slots as it likes, and those do not count.

    >>> old = Placement.contiguous(num_layers=1, num_experts=4, num_gpus=4)
    >>> new = Placement(torch.tensor([[1, 0, 2, 0, 2, 3, 3, 3]]), num_experts=4, num_gpus=4)
    >>> moved_slots(old, new, Topology(num_nodes=2, gpus_per_node=2))
    tensor([[3, 1]])

    Args:
        old, new: of the same layers, experts and GPUs; their slots may differ in number.
        topology: of these GPUs.

    Raises:
        DistplbError: if they are of different models or clusters.
    """
    arguments = {"old": (old, (Placement,), "a Placement"), "new": (new, (Placement,), "a Placement")}
    refuse_wrong_types(arguments | {"topology": (topology, (Topology,), "a Topology")})
    shapes = [(one.num_layers, one.num_experts, one.num_gpus) for one in (old, new)]
    if shapes[0] != shapes[1] or old.num_gpus != topology.num_gpus:
        raise DistplbError(
            f"placements of {shapes[0]} and {shapes[1]} (layers, experts, GPUs) on a topology of "
            f"{topology.num_gpus} GPUs; pass two of the same model and cluster"
        )
    from_gpu = ~_held(old, new, 1)  # [L, P]
    from_node = ~_held(old, new, topology.gpus_per_node)
    return torch.stack([(from_gpu & ~from_node).sum(1), from_node.sum(1)], dim=1)


def _held(old: Placement, new: Placement, gpus: int) -> Tensor:
    """`[L, P]` bool: whether the block of so many GPUs that a slot of `new` lies in holds its expert in `old`."""
    keys = []
    for one in (old, new):
        block = torch.arange(one.num_slots, device="cpu") // (one.slots_per_gpu * gpus)  # [P]
        expert = one.expert_of_slot + torch.arange(one.num_layers, device="cpu")[:, None] * one.num_experts  # [L, P]
        keys.append(expert * one.num_gpus + block)
    return torch.isin(keys[1], keys[0])
