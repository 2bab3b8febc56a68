"""How the layers follow a placement: by permuting router rows, or by a table after the router's choice.

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
    """The layers' common properties, and the updates that let tokens find the experts after a move.

    Args:
        layers: the MoE layers of this rank; may be empty.

    Attributes:
        mode: "remap" if the layers have tables, else "permute".
        num_groups: groups of group-limited routing, if placements must keep groups together; else None.

    Raises:
        DistplbError: if layers differ in how they follow a placement, or a layer does not have exactly one of router
            and table.
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

    def window(self, num_steps: int, seed: int, *, is_filled: bool = True) -> LoadWindow:
        """Build a window that the layers fill themselves.

        Args:
            num_steps: how many steps it keeps.
            seed: seed of the choice of steps.
            is_filled: whether the layers count; otherwise it stays empty, and forwards cost nothing.

        Raises:
            DistplbError: if a layer has no `counts`, or its `counts` returns no valid handle. All subscriptions are
                ended then.
        """
        missing = [layer.name for layer in self._layers if layer.counts is None]
        if missing and is_filled:
            raise DistplbError(
                f"{missing[0]} has no counts; pass window=, a LoadWindow that its forward fills, or set MoELayer.counts"
            )
        sizes = [self._num_experts(layer) for layer in self._layers]
        num_experts = self._common("the number of experts", sizes, 1)
        window = window_near(self._device(), max(1, len(self._layers)), num_experts, num_steps, seed)
        if is_filled:
            self.subscribe([partial(window.add, index) for index in range(len(self._layers))])
        return window

    def subscribe(self, takers: Sequence[Callable[..., None]] | None = None) -> None:
        """Subscribe to each layer's counts, and to all else that its `counts` function sets up, until `close`.

        Args:
            takers: by layer, the function that receives the counts. None ignores them, because the loop fills the
                window.

        Raises:
            DistplbError: if a layer's `counts` returns no valid handle. All subscriptions are ended then.
        """
        try:
            for layer, take in zip(self._layers, takers or [_ignore] * len(self._layers), strict=True):
                if layer.counts is not None:
                    self._subscriptions += _handles(layer.name, layer.counts(take))
        except BaseException:
            self.close()
            raise

    def start(self, logical: Placement) -> Placement:
        """Return the initial placement: that of the tables if there are any, else logical order.

        Raises:
            DistplbError: if a table does not contain each slot once.
        """
        rows = []
        for row, layer in zip(logical.expert_of_slot, self._layers, strict=True):
            table = layer.slot_of_expert
            if table is None or not bool(table.any()):  # all zeros: not filled yet
                rows.append(row)
                continue
            if not torch.equal(table.cpu().sort().values, row):
                raise DistplbError(
                    f"{layer.name}: slot_of_expert is {table.tolist()}; it must contain each of {len(row)} slots once: "
                    f"pass torch.arange({len(row)}) if experts have not moved"
                )
            rows.append(table.cpu().argsort())
        return Placement(torch.stack(rows), logical.num_experts, logical.num_gpus) if rows else logical

    def check_tables(self, placement: Placement) -> None:
        """Refuse tables that other code has written since the last move.

        Raises:
            DistplbError: with the first expert whose table entry is not its slot.
        """
        for layer, slots in zip(self._layers, placement.inverse[..., 0], strict=False):
            if layer.slot_of_expert is None:
                continue
            wrong = (layer.slot_of_expert.cpu() != slots).nonzero()
            if len(wrong):
                expert = int(wrong[0])
                raise DistplbError(
                    f"{layer.name}: slot_of_expert has expert {expert} in slot {int(layer.slot_of_expert[expert])}, "
                    f"but the rebalancer put it into slot {int(slots[expert])}; other code has written the table, "
                    "probably by loading a model state: load the rebalancer's state along with the model's"
                )

    def follow(self, old: Placement | None, new: Placement) -> None:
        """Route tokens to the experts as placed in `new`; `old` is None if all layers may have changed."""
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
        """End all subscriptions: no more counts are received."""
        while self._subscriptions:
            self._subscriptions.pop().remove()

    def _common(self, what: str, values: Sequence[Any], default: Any) -> Any:
        for layer, value in zip(self._layers, values, strict=True):
            if value != values[0]:
                raise DistplbError(
                    f"layers differ in {what}: {values[0]} in {self._layers[0].name}, {value} in {layer.name}; "
                    "make a separate Rebalancer for each kind"
                )
        return values[0] if values else default

    def _num_experts(self, layer: MoELayer) -> int:
        if layer.slot_of_expert is not None:
            return layer.slot_of_expert.numel()
        return int(next(iter(layer.router.values())).shape[0])

    def _device(self) -> torch.device:
        """The device of the experts."""
        for layer in self._layers:
            for declared in layer.experts.values():
                tensor = declared if isinstance(declared, Tensor) else _first(declared)
                return tensor.device
        return torch.device("cpu")


def _ignore(*_: Any, **__: Any) -> None:
    """Ignore counts, because the loop fills the window."""


def _first(declared: Rows | Sequence[Tensor]) -> Tensor:
    return declared.tensor if isinstance(declared, Rows) else declared[0]


def _handles(name: str, subscription: Any) -> list[Removable]:
    """List the handles of a layer's subscription. A list is unpacked, because its `remove` means something else."""
    if subscription is None:
        return []
    handles = list(subscription) if isinstance(subscription, Sequence) else [subscription]
    if not all(callable(getattr(handle, "remove", None)) for handle in handles):
        raise DistplbError(
            f"{name}: counts returned {subscription!r}; return a handle with remove(), a sequence of them, or None"
        )
    return handles


def _check(layer: MoELayer) -> None:
    if not layer.experts or bool(layer.router) == (layer.slot_of_expert is not None):
        raise DistplbError(
            f"{layer.name} has {len(layer.experts)} expert tensor{'s' * (len(layer.experts) != 1)}, "
            f"{len(layer.router)} router tensor{'s' * (len(layer.router) != 1)} and "
            f"{'a' if layer.slot_of_expert is not None else 'no'} table; declare all expert tensors, and either all "
            "router tensors or a table slot_of_expert: tensors that are not declared do not travel"
        )
    table = layer.slot_of_expert
    if table is not None and (table.dim() != 1 or table.dtype != torch.int64):
        raise DistplbError(
            f"{layer.name}: slot_of_expert is {table.dtype} of shape {tuple(table.shape)}; pass int64 of shape "
            "[E], the slot of each expert"
        )
