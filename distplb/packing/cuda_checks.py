"""Checks of engine `cuda`, which refuses tensors that its kernels would misread.

Shapes as in `cuda`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distplb.errors import DistplbError, OptionError
from distplb.packing.settle import Terms

__all__ = ["MAX_ITEMS", "check", "check_settle", "check_slots"]

MAX_ITEMS = 4096  # a row has to fit into one program's registers


def check(
    weight: Tensor, num_packs: int, others: dict[str, Tensor], shape: torch.Size, num_items: int | None = None
) -> None:
    """Refuse tensors that the kernels would misread; reads no elements, so it waits for no device.

    Each of `others` must have `shape`; `num_items` go into the packs, as many as `weight` has columns if None.
    """
    if weight.dim() != 2 or weight.dtype != torch.int64:
        raise DistplbError(
            f"weight is {weight.dtype} of shape {tuple(weight.shape)}; pass int64 of shape [rows, items]"
        )
    for name, value in others.items():
        _check_one(name, value, shape)
    _check_packs(weight.shape[1] if num_items is None else num_items, num_packs)


def check_settle(terms: Terms, table: Tensor, num_packs: int, layer: Tensor, ceiling: Tensor) -> None:
    """Same as `check`, for the arguments of `settle`."""
    for name, value, words in (("load", terms.load, "layers, steps, experts"), ("table", table, "rows, slots")):
        if value.dim() != len(words.split()) or value.dtype != torch.int64:
            raise DistplbError(f"{name} is {value.dtype} of shape {tuple(value.shape)}; pass int64 of shape [{words}]")
    num_layers, _, num_experts = terms.load.shape
    _check_one("layer", layer, table.shape[:1])
    _check_one("ceiling", ceiling, table.shape[:1])
    _check_one("region", terms.region, table.shape[1:])
    _check_packs(table.shape[1], num_packs)
    if (terms.distance is None) != (terms.price is None):
        missing = "distance" if terms.distance is None else "price"
        raise DistplbError(f"only {missing} is None; pass both distance and price, or neither")
    if terms.distance is not None and terms.price is not None:
        _check_one("distance", terms.distance, (num_layers, num_experts, num_packs), torch.int8)
        _check_one("price", terms.price, (num_layers, 3))


def check_slots(num_experts: int, num_slots: int) -> None:
    """Refuse slots that cannot hold every expert."""
    if not 1 <= num_experts <= num_slots:
        raise DistplbError(
            f"{num_experts} expert{'s' * (num_experts != 1)} cannot fit into {num_slots} "
            f"slot{'s' * (num_slots != 1)}; pass {num_experts} slots or more"
        )


def _check_one(name: str, value: Tensor, shape: tuple[int, ...], dtype: torch.dtype = torch.int64) -> None:
    if value.shape != shape or value.dtype != dtype:
        expected = str(dtype).removeprefix("torch.")
        raise DistplbError(
            f"{name} is {value.dtype} of shape {tuple(value.shape)}; pass {expected} of shape {tuple(shape)}"
        )


def _check_packs(num_items: int, num_packs: int) -> None:
    if num_packs < 1 or num_items < 1 or num_items % num_packs:
        raise DistplbError(
            f"{num_items} item{'s' * (num_items != 1)} cannot be packed evenly into {num_packs} packs; "
            f"pass a divisor of {num_items}"
        )
    if num_items > MAX_ITEMS:
        raise OptionError(
            "a row has {items} items and {engine} 'cuda' packs at most {most}; pass {engine:'cpu'}",
            items=num_items,
            most=MAX_ITEMS,
        )
