"""The options that determine a plan together with the load and the topology, and the checks that refuse bad ones.

Shapes: L layers, E experts, P slots, M GPUs, G slots on each.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from distplb.core.arguments import plain, refuse_wrong_types, shown
from distplb.core.counts import as_integers
from distplb.core.hashing import digest
from distplb.core.placement import Placement
from distplb.core.price import TimeCurve
from distplb.core.topology import Topology
from distplb.errors import DistplbError, OptionError
from distplb.packing.engines import engine_named
from distplb.packing.noise import CANDIDATE_BITS

__all__ = ["PlanOptions"]

_MAX_SLOTS = 1 << 20  # per layer; larger tables would not fit in memory
_MAX_PRICE = 2.0**200  # above any load, in tokens or time; finite, because times 0 ns per token it must give 0


@dataclass(frozen=True)
class PlanOptions:
    """The options of `plan`, where they are explained."""

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
        # NumPy and torch numbers become Python's here; `check` refuses wrong types, on all ranks together.
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
        """K; by default 1, or 4 with a current placement: two fresh starts and two from that placement."""
        return (1 if self.current is None else 4) if self.num_candidates is None else self.num_candidates

    @property
    def prices(self) -> tuple[float, float]:
        """Price in tokens of a slot moved inside a node, and between nodes; 0 without a current placement."""
        if self.current is None:
            return 0.0, 0.0
        inside, between = self._price_pair
        return float(min(inside, _MAX_PRICE)), float(min(between, _MAX_PRICE))

    @property
    def _price_pair(self) -> tuple[float, ...]:
        return self.move_price if isinstance(self.move_price, tuple) else (self.move_price, self.move_price)

    def check(self, topology: Topology, num_layers: int, num_experts: int) -> None:
        """Refuse options that do not fit together.

        Raises:
            DistplbError: if an option is wrong; it names the value and what to pass instead.
        """
        refuse_wrong_types({"topology": (topology, (Topology,), "a Topology, such as Topology.from_env()")})
        self._check_types()
        self._check_numbers()
        self._check_slots(topology, num_experts)
        self._check_groups(topology, num_experts)
        self._check_current(topology, num_layers, num_experts)
        self._check_slot_class(num_experts)

    @property
    def _may_have_replicas(self) -> bool:
        return self.mode == "remap" and self.slot_class is None

    def fields(self, num_experts: int) -> dict[str, int]:
        """The values that must be equal on all ranks, as integers by name; the engine may differ."""
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
        whole, maybe = "an integer", (int, None)
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
            raise OptionError(
                "{num_candidates} is {value}; pass 1 to 2^{bits}", value=self.num_candidates, bits=CANDIDATE_BITS
            )
        if not 0 <= self.seed < 1 << 62:
            raise OptionError("{seed} is {value}; pass an integer in [0, 2^62)", value=self.seed)
        if not isinstance(self.mode, str) or self.mode not in ("permute", "remap"):
            raise OptionError("{mode} is {value}; pass 'permute' or 'remap'", value=shown(self.mode))
        prices = self._price_pair
        if len(prices) != 2 or not all(_is_price(price) for price in prices):
            raise OptionError(
                "{move_price} is {value!r}; pass tokens of the window per moved slot, at least 0: one number, or a "
                "tuple (inside a node, between nodes)",
                value=self.move_price,
            )
        if any(prices) and self.current is None:
            raise OptionError(
                "{move_price} is {value!r} without {current}; pass the placement in force, or no price",
                value=self.move_price,
            )
        engine_named(self.engine)

    def _check_slots(self, topology: Topology, num_experts: int) -> None:
        num_slots = self.slots(num_experts)
        if num_slots < num_experts:
            raise self._too_few_slots(topology, num_experts)
        if self.num_slots is not None and num_slots > _MAX_SLOTS:
            raise OptionError(
                "{num_slots} is {value}, more than can be planned; pass the slots of all GPUs together, at most {max}",
                value=num_slots,
                max=_MAX_SLOTS,
            )
        if num_slots % topology.num_gpus:
            raise self._uneven_slots(topology, num_experts)
        size = topology.slots_per_gpu(num_slots)
        if num_slots == num_experts:
            return
        if self.mode == "permute":
            raise OptionError(
                f"{{num_slots}} is {{value}} for {{experts}} expert{'s' * (num_experts != 1)}, and {{mode}} 'permute' "
                "does not support replicas; pass {mode:'remap'}, or {num_slots:{experts}}",
                value=num_slots,
                experts=num_experts,
            )
        nodes = topology.num_nodes if self.num_groups is not None else 1
        if not self.allow_shared_replicas and size > num_experts // nodes:
            raise DistplbError(
                f"{size} slots on each GPU for {num_experts // nodes} expert{'s' * (num_experts // nodes != 1)}: some "
                "GPU must hold an expert twice; pass allow_shared_replicas=True or fewer slots"
            )

    def _too_few_slots(self, topology: Topology, num_experts: int) -> OptionError:
        """Error for fewer slots than experts: perhaps the slots of one GPU were meant, or only the extra ones."""
        num_slots, gpus = self.slots(num_experts), topology.num_gpus
        minimum, all_ = _next_multiple(num_experts, gpus), num_slots * gpus
        more = _next_multiple(num_experts + num_slots, gpus)
        remedies = [] if all_ == minimum else ["at least {num_slots:{minimum}}"]
        if num_slots > 0 and self._may_have_replicas and more <= _MAX_SLOTS:
            remedies.append("{num_slots:{more}} ({extra} for replicas)")
        if all_ == num_experts or (self._may_have_replicas and num_experts < all_ <= _MAX_SLOTS):
            remedies.append("{num_slots:{all_}} ({value} on each of {gpus} GPUs)")
        return OptionError(
            f"{{num_slots}} is {{value}} for {{experts}} expert{'s' * (num_experts != 1)}; it counts the slots of all "
            f"GPUs, and every expert needs one: pass {', or '.join(remedies)}",
            value=num_slots,
            experts=num_experts,
            gpus=gpus,
            minimum=minimum,
            more=more,
            extra=more - num_experts,
            all_=all_,
        )

    def _uneven_slots(self, topology: Topology, num_experts: int) -> OptionError:
        """Error for slots that the GPUs cannot share evenly."""
        num_slots = self.slots(num_experts)
        fits = _next_multiple(num_slots, topology.num_gpus)
        what = (
            f"{{slots}} slot{'s' * (num_slots != 1)} cannot be spread evenly over {{gpus}} GPUs "
            f"({{nodes}} node{'s' * (topology.num_nodes != 1)} × {{each}}); pass "
        )
        replicas = "{num_slots:{fits}} ({extra} for replicas), or "
        may_have = self._may_have_replicas and fits <= _MAX_SLOTS
        return OptionError(
            f"{what}{replicas if may_have else ''}{{num_nodes}} and {{gpus_per_node}} whose product divides {{slots}}",
            slots=num_slots,
            gpus=topology.num_gpus,
            nodes=topology.num_nodes,
            each=topology.gpus_per_node,
            fits=fits,
            extra=fits - num_experts,
        )

    def _check_groups(self, topology: Topology, num_experts: int) -> None:
        groups = self.num_groups
        if groups is None:
            return
        if groups < 1 or num_experts % groups:
            raise OptionError(
                f"{{num_groups}} is {{groups}}, which does not divide {{experts}} expert{'s' * (num_experts != 1)}; "
                "pass the router's number of groups, or leave it out",
                groups=groups,
                experts=num_experts,
            )
        if self.mode == "remap" and groups % topology.num_nodes:
            raise OptionError(
                "{num_groups} is {groups}, which {nodes} nodes cannot share evenly; pass a multiple of {nodes}, or "
                "leave it out to plan without groups",
                groups=groups,
                nodes=topology.num_nodes,
            )
        block, size = num_experts // groups, num_experts // topology.num_gpus
        if self.mode == "permute" and block % size and size % block:
            raise OptionError(
                "a block of {block} slots ({num_groups} is {groups}) neither fills whole GPUs of {size} slots nor "
                "divides them, so no block permutation balances the GPUs; use a number of GPUs that divides "
                "{groups} or is a multiple of it",
                block=block,
                groups=groups,
                size=size,
            )

    def _check_current(self, topology: Topology, num_layers: int, num_experts: int) -> None:
        if self.current is None:
            return
        current = self.current
        sizes = (current.num_layers, current.num_experts, current.num_slots, current.num_gpus)
        expected = (num_layers, num_experts, self.slots(num_experts), topology.num_gpus)
        if sizes != expected:
            differ = [at for at in range(4) if sizes[at] != expected[at]]
            remedy = "pass the placement in force for the same model"
            if differ == [2]:
                remedy += ", or {num_slots:{slots}}"
            elif differ == [3]:
                remedy += f", or {{num_nodes}} and {{gpus_per_node}} of {{gpus}} GPU{'s' * (current.num_gpus != 1)}"
            raise OptionError(
                "{current} has (layers, experts, slots, GPUs) = {sizes}, load and topology have {expected}; " + remedy,
                sizes=sizes,
                expected=expected,
                slots=current.num_slots,
                gpus=current.num_gpus,
            )

    def _check_slot_class(self, num_experts: int) -> None:
        if self.slot_class is None:
            return
        expected = f"an integer for each of {num_experts} slots"
        classes = as_integers("slot_class", self.slot_class, expected)
        if tuple(classes.shape) != (num_experts,):
            raise DistplbError(f"slot_class is {classes.dtype} of shape {tuple(classes.shape)}; pass {expected}")
        if self.slots(num_experts) != num_experts or self.num_groups is not None:
            raise DistplbError(
                "slot_class cannot be combined with replicas or groups; leave out num_slots and num_groups, or "
                "slot_class"
            )


def _is_price(price: object) -> bool:
    return isinstance(price, int | float) and not isinstance(price, bool) and price >= 0  # also False for a NaN


def _price_field(price: float) -> int:
    return round(min(price, 2.0**46) * 2**16)


def _next_multiple(number: int, of: int) -> int:
    return -(-number // of) * of


def _digest(value: Tensor) -> int:
    data = torch.as_tensor(value, device="cpu").to(torch.int64).contiguous().numpy().astype("<i8").tobytes()
    return digest(data)
