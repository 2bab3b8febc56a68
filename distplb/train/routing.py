"""How the layers follow a placement: by their routers' rows, or by a table after the router's choice.

Shapes: L layers, E experts, P slots.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from distplb.core.layer import MoELayer, Removable, Rows
from distplb.core.placement import Placement
from distplb.errors import DistplbError
from distplb.train.window import LoadWindow, window_near

__all__ = ["Routing"]


class Routing:
    """What the layers have in common, and what is done to them so that tokens find the experts after a move.

    Args:
        layers: the MoE layers of this rank; there may be none.

    Attributes:
        mode: "remap" where the layers have tables, else "permute".
        num_groups: of group-limited routing, where the placement must keep to its blocks.

    Raises:
        DistplbError: if layers differ in how they follow, or one has neither a router nor a table.
    """

    def __init__(self, layers: Sequence[MoELayer]) -> None:
        self._layers = list(layers)
        self._subscriptions: list[Removable] = []
        for layer in layers:
            _check(layer)
        has_tables = self._common(
            "having slot_of_expert", [layer.slot_of_expert is not None for layer in layers], False
        )
        groups: int | None = self._common("num_groups", [layer.num_groups for layer in layers], None)
        self.mode = "remap" if has_tables else "permute"
        self.num_groups = None if has_tables else groups

    def window(self, num_steps: int, seed: int) -> LoadWindow:
        """A window that the layers fill by themselves.

        Raises:
            DistplbError: if a layer does not say how its counts are had, or how to end that. Nothing is subscribed to
                then.
        """
        missing = [layer.name for layer in self._layers if layer.counts is None]
        if missing:
            raise DistplbError(
                f"{missing[0]} has no counts; pass window=, a LoadWindow that its forward fills, or MoELayer.counts"
            )
        sizes = [self._num_experts(layer) for layer in self._layers]
        num_experts = self._common("the number of experts", sizes, 1)
        window = window_near(self._device(), max(1, len(self._layers)), num_experts, num_steps, seed)
        self.subscribe([partial(window.add, index) for index in range(len(self._layers))])
        return window

    def subscribe(self, takers: Sequence[Callable[..., None]] | None = None) -> None:
        """Have each layer tell its counts, and do what else it does for a rebalancer, until `close`.

        Args:
            takers: by layer, what takes the counts; nothing does where None, as the loop fills the window.

        Raises:
            DistplbError: if a layer does not say how to end it. Nothing is subscribed to then.
        """
        try:
            for layer, take in zip(self._layers, takers or [_ignore] * len(self._layers), strict=True):
                if layer.counts is not None:
                    self._subscriptions += _handles(layer.name, layer.counts(take))
        except BaseException:
            self.close()
            raise

    def start(self, logical: Placement) -> Placement:
        """Where the experts are to begin with: as the tables say, if there are any, else in logical order.

        Raises:
            DistplbError: if a table does not name each slot once.
        """
        rows = []
        for row, layer in zip(logical.expert_of_slot, self._layers, strict=True):
            table = layer.slot_of_expert
            if table is None or not bool(table.any()):  # zeros: nobody has filled it yet
                rows.append(row)
                continue
            if not torch.equal(table.cpu().sort().values, row):
                raise DistplbError(
                    f"{layer.name}: slot_of_expert is {table.tolist()}; it must name each of {len(row)} slots once: "
                    f"pass torch.arange({len(row)}) for experts that have not moved"
                )
            rows.append(table.cpu().argsort())
        return Placement(torch.stack(rows), logical.num_experts, logical.num_gpus) if rows else logical

    def check_tables(self, placement: Placement) -> None:
        """Refuse tables that somebody else has written since.

        Raises:
            DistplbError: with the first expert that is looked up elsewhere than in its slot.
        """
        for layer, slots in zip(self._layers, placement.inverse[..., 0], strict=False):
            if layer.slot_of_expert is None:
                continue
            wrong = (layer.slot_of_expert.cpu() != slots).nonzero()
            if len(wrong):
                expert = int(wrong[0])
                raise DistplbError(
                    f"{layer.name}: slot_of_expert has expert {expert} in slot {int(layer.slot_of_expert[expert])}, "
                    f"and it was put into slot {int(slots[expert])}: something else has written the table, as loading "
                    "a state of the model does; load the rebalancer's state along with it"
                )

    def follow(self, old: Placement | None, new: Placement) -> None:
        """Have tokens find the experts where `new` has them; `old` is None where all layers may have changed."""
        slot = new.inverse[..., 0]  # [L, E]
        for index, layer in enumerate(self._layers):
            if old is not None and torch.equal(old.expert_of_slot[index], new.expert_of_slot[index]):
                continue
            if layer.slot_of_expert is not None:
                layer.slot_of_expert.copy_(slot[index])
            if layer.invalidate is not None:
                layer.invalidate()

    def ties(self) -> list[float | None]:
        """By layer, the share of tokens that were routed by chance in one forward since the last call."""
        return [None if layer.ties is None else layer.ties.take() for layer in self._layers]

    def close(self) -> None:
        """Take in no more counts: end all that was subscribed to."""
        while self._subscriptions:
            self._subscriptions.pop().remove()

    def _common(self, what: str, values: Sequence[Any], default: Any) -> Any:
        for layer, value in zip(self._layers, values, strict=True):
            if value != values[0]:
                raise DistplbError(
                    f"layers differ in {what}: {values[0]} in {self._layers[0].name}, {value} in {layer.name}; "
                    "give each kind a Rebalancer of its own"
                )
        return values[0] if values else default

    def _num_experts(self, layer: MoELayer) -> int:
        if layer.slot_of_expert is not None:
            return layer.slot_of_expert.numel()
        return int(next(iter(layer.router.values())).shape[0])

    def _device(self) -> torch.device:
        """Of the experts."""
        for layer in self._layers:
            for declared in layer.experts.values():
                tensor = declared if isinstance(declared, Tensor) else _first(declared)
                return tensor.device
        return torch.device("cpu")


def _ignore(*_: Any, **__: Any) -> None:
    """Counts that somebody else takes."""


def _first(declared: Rows | Sequence[Tensor]) -> Tensor:
    return declared.tensor if isinstance(declared, Rows) else declared[0]


def _handles(name: str, subscription: Any) -> list[Removable]:
    """What ends a layer's subscription, piece by piece: a sequence has a `remove`, too, but of another meaning."""
    if subscription is None:
        return []
    handles = list(subscription) if isinstance(subscription, Sequence) else [subscription]
    if not all(callable(getattr(handle, "remove", None)) for handle in handles):
        raise DistplbError(
            f"{name}: counts returned {subscription!r}; return a handle with remove(), a sequence of handles, or None"
        )
    return handles


def _check(layer: MoELayer) -> None:
    if not layer.experts or bool(layer.router) == (layer.slot_of_expert is not None):
        raise DistplbError(
            f"{layer.name} has {len(layer.experts)} expert tensors, {len(layer.router)} router tensors and "
            f"{'a' if layer.slot_of_expert is not None else 'no'} table; declare all expert tensors, and either all "
            "router tensors or a table slot_of_expert: what is not declared does not travel"
        )
    table = layer.slot_of_expert
    if table is not None and (table.dim() != 1 or table.dtype != torch.int64):
        raise DistplbError(
            f"{layer.name}: slot_of_expert is {table.dtype} of shape {tuple(table.shape)}; pass an int64 for each "
            "expert"
        )
