"""What, with the load and the topology, fixes a plan, and what of it is refused.

Shapes: L layers, E experts, P slots, M GPUs, G slots on each.
"""

from __future__ import annotations

import hashlib
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from distplb.arguments import plain, refuse_wrong_types, shown
from distplb.counts import as_integers
from distplb.errors import DistplbError
from distplb.packing.candidates import CANDIDATE_BITS
from distplb.packing.engines import engine_named
from distplb.placement import Placement
from distplb.price import TimeCurve
from distplb.topology import Topology

__all__ = ["SearchOptions"]

_MOST_PRICE = 2.0**200  # more than any load, in tokens or in time, and finite: 0 where a curve takes no time


@dataclass(frozen=True)
class SearchOptions:
    """Options of `plan`, which explains them."""

    num_slots: int | None = None
    num_groups: int | None = None
    slot_class: Tensor | None = None
    current: Placement | None = None
    num_candidates: int | None = None
    seed: int = 0
    engine: str | None = None
    allow_shared_replicas: bool = True
    mode: str = "remap"
    move_price: float | tuple[float, float] = 0.0
    time_curve: TimeCurve | None = None

    def __post_init__(self) -> None:
        # Numbers of NumPy and torch become Python's; what is none is refused by `check`, where all ranks hear of it.
        for name in ("num_slots", "num_groups", "num_candidates", "seed", "allow_shared_replicas"):
            object.__setattr__(self, name, plain(getattr(self, name)))
        price = self.move_price
        object.__setattr__(self, "move_price", tuple(map(plain, price)) if isinstance(price, tuple) else plain(price))
        if isinstance(self.slot_class, Tensor):
            with suppress(DistplbError):
                object.__setattr__(self, "slot_class", as_integers("slot_class", self.slot_class, "integers"))

    def slots(self, num_experts: int) -> int:
        """P."""
        return num_experts if self.num_slots is None else self.num_slots

    @property
    def candidates(self) -> int:
        """K; by default one, or two that start afresh and two that start from the placement in force."""
        return (1 if self.current is None else 4) if self.num_candidates is None else self.num_candidates

    @property
    def prices(self) -> tuple[float, float]:
        """Tokens of a slot that is moved inside a node, and between nodes; 0 where there is nothing to move from."""
        if self.current is None:
            return 0.0, 0.0
        inside, between = self._given_prices
        return float(min(inside, _MOST_PRICE)), float(min(between, _MOST_PRICE))

    @property
    def _given_prices(self) -> tuple[float, ...]:
        return self.move_price if isinstance(self.move_price, tuple) else (self.move_price, self.move_price)

    def check(self, topology: Topology, num_layers: int, num_experts: int) -> None:
        """Refuse what does not go together.

        Raises:
            DistplbError: with the value and what to pass instead.
        """
        refuse_wrong_types({"topology": (topology, (Topology,), "a Topology, such as Topology.from_env()")})
        self._check_types()
        self._check_numbers()
        self._check_slots(topology, num_experts)
        self._check_groups(topology, num_experts)
        self._check_current(topology, num_layers, num_experts)
        self._check_slot_class(num_experts)

    def fields(self, num_experts: int) -> dict[str, int]:
        """What all ranks must share, as integers by name; the engine may differ."""
        return {
            "num_slots": self.slots(num_experts),
            "num_groups": -1 if self.num_groups is None else self.num_groups,
            "slot_class (digest)": -1 if self.slot_class is None else _digest(self.slot_class),
            "the current placement (digest)": -1 if self.current is None else self.current.digest(),
            "num_candidates": self.candidates,
            "seed": self.seed,
            "allow_shared_replicas": int(self.allow_shared_replicas),
            "mode (permute is 1)": int(self.mode == "permute"),
            "move_price inside a node (in 2^-16)": _price_field(self.prices[0]),
            "move_price between nodes (in 2^-16)": _price_field(self.prices[1]),
            "move_price (digest)": _digest(
                torch.tensor(self.prices, dtype=torch.float64, device="cpu").view(torch.int64)
            ),
            "time_curve (digest)": -1 if self.time_curve is None else self.time_curve.digest(),
        }

    def _check_types(self) -> None:
        whole, maybe = "a whole number", (int, None)
        refuse_wrong_types(
            {
                "num_slots": (self.num_slots, maybe, whole),
                "num_groups": (self.num_groups, maybe, whole),
                "slot_class": (self.slot_class, (Tensor, None), "a tensor of integers, one for each slot"),
                "current": (self.current, (Placement, None), "a Placement"),
                "num_candidates": (self.num_candidates, maybe, whole),
                "seed": (self.seed, (int,), whole),
                "engine": (self.engine, (str, None), "the name of an engine, or None for the fastest"),
                "allow_shared_replicas": (self.allow_shared_replicas, (bool,), "True or False"),
                "time_curve": (self.time_curve, (TimeCurve, None), "a TimeCurve, such as measured_curve returns"),
            }
        )

    def _check_numbers(self) -> None:
        if not 1 <= self.candidates <= 1 << CANDIDATE_BITS:
            raise DistplbError(f"num_candidates is {self.num_candidates}; pass 1 to 2^{CANDIDATE_BITS}")
        if not 0 <= self.seed < 1 << 62:
            raise DistplbError(f"seed is {self.seed}; pass a whole number in [0, 2^62)")
        if not isinstance(self.mode, str) or self.mode not in ("permute", "remap"):
            raise DistplbError(f"mode is {shown(self.mode)}; pass 'permute' or 'remap'")
        given = self._given_prices
        if len(given) != 2 or not all(_is_price(price) for price in given):
            raise DistplbError(
                f"move_price is {self.move_price!r}; pass tokens of the window for each moved slot, at least 0: one "
                "number, or a pair (inside a node, between nodes)"
            )
        if any(given) and self.current is None:
            raise DistplbError(
                f"move_price is {self.move_price!r} without current; pass the placement in force, or no price"
            )
        engine_named(self.engine)

    def _check_slots(self, topology: Topology, num_experts: int) -> None:
        num_slots = self.slots(num_experts)
        if num_slots < num_experts:
            raise DistplbError(
                f"num_slots is {num_slots} for {num_experts} experts; every expert needs a slot: "
                f"pass at least {_next_multiple(num_experts, topology.num_gpus)}"
            )
        size = topology.slots_per_gpu(num_slots)
        if num_slots == num_experts:
            return
        if self.mode == "permute":
            raise DistplbError(
                f"num_slots is {num_slots} for {num_experts} experts, and mode 'permute' knows no replicas; "
                f"pass mode='remap', or num_slots={num_experts}"
            )
        nodes = topology.num_nodes if self.num_groups is not None else 1
        if not self.allow_shared_replicas and size > num_experts // nodes:
            raise DistplbError(
                f"{size} slots on each GPU for {num_experts // nodes} experts: some GPU must hold an expert twice; "
                "pass allow_shared_replicas=True or fewer slots"
            )

    def _check_groups(self, topology: Topology, num_experts: int) -> None:
        groups = self.num_groups
        if groups is None:
            return
        if groups < 1 or num_experts % groups:
            raise DistplbError(
                f"num_groups is {groups}, which does not divide {num_experts} experts; pass the number of groups of "
                "the router, or leave it out"
            )
        if self.mode == "remap" and groups % topology.num_nodes:
            raise DistplbError(
                f"num_groups is {groups}, which {topology.num_nodes} nodes cannot share evenly; pass a multiple of "
                f"{topology.num_nodes}, or leave it out to plan without groups"
            )
        block, size = num_experts // groups, num_experts // topology.num_gpus
        if self.mode == "permute" and block % size and size % block:
            raise DistplbError(
                f"a block of {block} slots (num_groups is {groups}) neither fills whole GPUs of {size} slots nor "
                "divides them, so no block permutation evens out the GPUs; use a number of GPUs that divides "
                f"{groups} or is a multiple of it"
            )

    def _check_current(self, topology: Topology, num_layers: int, num_experts: int) -> None:
        if self.current is None:
            return
        current = self.current
        found = (current.num_layers, current.num_experts, current.num_slots, current.num_gpus)
        wanted = (num_layers, num_experts, self.slots(num_experts), topology.num_gpus)
        if found != wanted:
            raise DistplbError(
                f"current has (layers, experts, slots, GPUs) = {found}, the load and topology {wanted}; "
                "pass the placement in force of the same model"
            )

    def _check_slot_class(self, num_experts: int) -> None:
        if self.slot_class is None:
            return
        wanted = f"an integer for each of {num_experts} slots"
        found = as_integers("slot_class", self.slot_class, wanted)
        if tuple(found.shape) != (num_experts,):
            raise DistplbError(f"slot_class is {found.dtype} of shape {tuple(found.shape)}; pass {wanted}")
        if self.slots(num_experts) != num_experts or self.num_groups is not None:
            raise DistplbError(
                "slot_class goes with neither replicas nor groups: leave out num_slots and num_groups, or slot_class"
            )


def _is_price(price: object) -> bool:
    return isinstance(price, int | float) and not isinstance(price, bool) and price >= 0  # nor is a NaN


def _price_field(price: float) -> int:
    return round(min(price, 2.0**46) * 2**16)


def _next_multiple(number: int, of: int) -> int:
    return -(-number // of) * of


def _digest(value: Tensor) -> int:
    data = torch.as_tensor(value, device="cpu").to(torch.int64).contiguous().numpy().astype("<i8").tobytes()
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "big") >> 2
