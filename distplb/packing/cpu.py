"""The `cpu` engine: the steps compiled by Numba, run on a few threads without the GIL.

Shapes: X rows, n items, E experts, P slots, M packs.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from distplb.core.cost import MAX_COST
from distplb.core.machine_code import compile_lock, compiled_module, is_there
from distplb.core.threads import in_threads
from distplb.packing.settle import Terms
from distplb.packing.steps import one_item_a_pack

__all__ = ["cost", "crowded", "finish", "is_there", "pack", "polish", "refine", "settle", "warm_up"]

_KERNELS = "distplb.packing.cpu_kernels"


def pack(weight: Tensor, num_packs: int, *, layer: Tensor, candidate: Tensor, seed: int = 0) -> Tensor:
    """Same as `reference.pack`."""
    if weight.shape[1] == num_packs:
        return one_item_a_pack(weight)
    tables = torch.empty(weight.shape, dtype=torch.int64, device="cpu")
    _run("pack_rows", tables, _array(weight), num_packs, _array(layer), _array(candidate), seed)
    return tables.to(weight.device)


def finish(weight: Tensor, items: Tensor, num_packs: int) -> Tensor:
    """Same as `reference.finish`."""
    return _in_place("finish_rows", weight, items, num_packs)


def refine(
    weight: Tensor,
    num_packs: int,
    num_slots: int,
    *,
    layer: Tensor,
    candidate: Tensor,
    seed: int = 0,
    shared: bool = True,
) -> Tensor:
    """Same as `reference.refine`."""
    if num_slots == weight.shape[1] == num_packs:
        return one_item_a_pack(weight)
    tables = torch.empty(len(weight), num_slots, dtype=torch.int64, device="cpu")
    _run("refine_rows", tables, _array(weight), num_packs, _array(layer), _array(candidate), seed, shared)
    return tables.to(weight.device)


def polish(weight: Tensor, table: Tensor, num_packs: int) -> Tensor:
    """Same as `reference.polish`."""
    return _in_place("polish_rows", weight, table, num_packs)


def settle(terms: Terms, table: Tensor, num_packs: int, *, layer: Tensor, ceiling: Tensor) -> Tensor:
    """Same as `reference.settle`."""
    tables = table.to("cpu", torch.int64, copy=True).contiguous()
    num_layers = len(terms.load)
    free = (
        torch.zeros(num_layers, 1, 1, dtype=torch.int8, device="cpu"),
        torch.zeros(num_layers, 3, dtype=torch.int64, device="cpu"),
    )
    distance, price = free if terms.distance is None or terms.price is None else (terms.distance, terms.price)
    moves = distance.to("cpu", torch.int8).contiguous().numpy(), _array(price)
    names = _array(layer), _array(ceiling)
    arguments = _array(terms.load), _array(terms.region), terms.apart, *moves, num_packs, *names
    _run("settle_rows", tables, *arguments, amount=tables.numel() * terms.load.shape[1])
    return tables.to(table.device)


@cache
def warm_up() -> None:
    """Compile the kernels, or load what another process on this node compiled.

    Once per process, before training starts; takes a minute at most.
    """
    weight, number = torch.arange(24, device="cpu").view(2, 12), torch.arange(2, device="cpu")
    with compile_lock(_KERNELS):
        items = pack(weight, 3, layer=number, candidate=number)
        finish(weight, items, 3)
        for num_slots in (12, 18):
            table = polish(weight, refine(weight, 3, num_slots, layer=number, candidate=number), 3)
        settle(Terms(weight[:, None], torch.zeros(18, device="cpu")), table, 3, layer=number, ceiling=number)
        cost(weight[None], table, 3, layer=number)
        crowded(table, 3)


def cost(load: Tensor, table: Tensor, num_packs: int, *, layer: Tensor) -> Tensor:
    """Same as `reference.cost`."""
    costs = torch.empty(len(table), dtype=torch.int64, device="cpu")
    arguments = _array(load), _array(table), num_packs, _array(layer), MAX_COST
    _run("cost_rows", costs, *arguments, amount=table.numel() * len(load) >> 4)
    return costs.to(table.device)


def crowded(table: Tensor, num_packs: int) -> Tensor:
    """Same as `reference.crowded`."""
    are_crowded = torch.empty(len(table), dtype=torch.bool, device="cpu")
    _run("crowded_rows", are_crowded, _array(table), num_packs, amount=table.numel() >> 4)
    return are_crowded.to(table.device)


def _in_place(kernel: str, weight: Tensor, table: Tensor, num_packs: int) -> Tensor:
    tables = table.to("cpu", torch.int64, copy=True).contiguous()
    _run(kernel, tables, _array(weight), num_packs)
    return tables.to(weight.device)


def _run(kernel: str, tables: Tensor, *arguments: Any, amount: int | None = None) -> None:
    """Call a kernel that writes all rows of `tables`; it works on `amount` elements, by default one per slot."""
    rows, table = getattr(compiled_module(_KERNELS), kernel), tables.numpy()
    amount = tables.numel() if amount is None else amount
    in_threads(lambda begin, end: rows(*arguments, begin, end, table), len(tables), amount)


def _array(value: Tensor) -> object:
    return value.to("cpu", torch.int64).contiguous().numpy()
