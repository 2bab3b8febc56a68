"""The `cuda` engine: the packing core in Triton, one program per row, without waiting between launch and result.

Shapes: X rows, n items, M packs, g = n / M items in each, q pairs of two positions in a pack; with replicas E experts,
P slots, G = P / M slots in each pack; steps 10 and 11 see T steps and L layers. Entry points mean the same as their
namesakes in `packing.reference`, and make the same choices. Triton itself is imported when they are called.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from distplb.errors import DistplbError
from distplb.packing.cuda_checks import check, check_settle, check_slots
from distplb.packing.noise import noisy_keys
from distplb.packing.reference import cost, crowded
from distplb.packing.settle import Terms, scans
from distplb.packing.steps import (
    MAX_ROUNDS,
    PAIR_ROUNDS,
    PAIR_SLOTS,
    one_item_a_pack,
    rounds_of_step_7,
    tries_of_step_8,
)

__all__ = [
    "cost",
    "crowded",
    "finish",
    "greedy",
    "is_there",
    "lower_max",
    "lower_variance",
    "pack",
    "polish",
    "refine",
    "settle",
    "swap_pairs",
]

_MIN_BLOCK = 32  # a smaller block would save nothing and need another compilation
_CELLS = 16  # of a tile, per thread
_STEPS_AT_ONCE = 4  # of the load, in steps 10 and 11
_SCRATCH_BYTES = 1 << 28  # at most, for all rows of one launch


def is_there() -> bool:
    """Whether this engine can run: Triton is installed, and there is a GPU or Triton's interpreter is on.

    The interpreter is on if TRITON_INTERPRET=1 is set before Python starts. It runs on the CPU and is slow.
    """
    return _missing() is None


def pack(weight: Tensor, num_packs: int, *, layer: Tensor, candidate: Tensor, seed: int = 0) -> Tensor:
    """Steps 1 to 4 for one candidate per row: `items [X, n]`, on the device of `weight`.

    Args:
        weight: `[X, n]` int64, each row's total at most 2^40; n a multiple of `num_packs`, up to 4,096. If it is not
            on a GPU, it is copied to the current one.
        num_packs: M.
        layer: `[X]` int64, the row's layer.
        candidate: `[X]` int64, the row's candidate.
        seed: seed of the whole plan.

    Raises:
        DistplbError: if a shape or type is wrong, or the engine is not available.
    """
    check(weight, num_packs, {"layer": layer, "candidate": candidate}, weight.shape[:1])
    if weight.shape[1] == num_packs:
        return one_item_a_pack(weight)
    home, weight = weight.device, _to_gpu(weight)
    layer, candidate = layer.to(weight.device), candidate.to(weight.device)
    items = greedy(weight, noisy_keys(weight, layer=layer, candidate=candidate, seed=seed), num_packs)
    items = lower_variance(weight, items, num_packs)
    return lower_max(weight, items, num_packs).to(home)


def finish(weight: Tensor, items: Tensor, num_packs: int) -> Tensor:
    """Steps 6 and 7 on the chosen packings `items [X, n]`; other arguments as for `pack`."""
    check(weight, num_packs, {"items": items}, weight.shape)
    home, weight = weight.device, _to_gpu(weight)
    items = items.to(weight.device)
    return lower_max(weight, swap_pairs(weight, items, num_packs), num_packs).to(home)


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
    """The planner's own search for one candidate per row: `table [X, P]`, the expert of each slot.

    Args:
        weight: `[X, E]` int64, each row's total at most 2^40; copied to a GPU as for `pack`.
        num_packs: M.
        num_slots: P, at least E and up to 4,096; a multiple of `num_packs`.
        layer, candidate, seed: as for `pack`.
        shared: as for `reference.refine`.

    Raises:
        DistplbError: as for `pack`.
    """
    names = {"layer": layer, "candidate": candidate}
    check(weight, num_packs, names, weight.shape[:1], num_slots)
    num_experts = weight.shape[1]
    check_slots(num_experts, num_slots)
    if num_slots == num_experts == num_packs:
        return one_item_a_pack(weight)
    home, weight = weight.device, _to_gpu(weight)
    layer, candidate = layer.to(weight.device), candidate.to(weight.device)
    key = noisy_keys(weight, layer=layer, candidate=candidate, seed=seed)
    if num_slots > num_experts:
        return _search(weight, key, num_packs, num_slots, shared).to(home)
    table = lower_variance(weight, greedy(weight, key, num_packs), num_packs)
    table = swap_pairs(weight, lower_max(weight, table, num_packs), num_packs)
    return lower_max(weight, table, num_packs, rounds_of_step_7(num_packs)).to(home)


def polish(weight: Tensor, table: Tensor, num_packs: int) -> Tensor:
    """Step 9 on the chosen packings `table [X, P]`; `weight [X, E]` as for `refine`, with any number of experts."""
    check(weight, num_packs, {"table": table}, torch.Size((len(weight), *table.shape[1:])), table.shape[-1])
    home, weight = weight.device, _to_gpu(weight).contiguous()
    num_experts, num_slots = weight.shape[1], table.shape[1]
    size = num_slots // num_packs
    table = table.to(weight.device).contiguous()
    result, share = torch.empty_like(table), torch.empty_like(weight)
    pairs, pair_options = _pairs(size, weight.device, warps := _warps(num_slots))
    for rows, holds in _parts(weight, num_packs):
        tensors = [value[rows] for value in (weight, table, result, share)]
        _launch(
            _kernels().polish_kernel,
            (*tensors, holds, pairs, num_experts, num_slots, num_packs, pairs.shape[1], _pair_rounds(size, num_packs)),
            {"N": _block(num_slots), "A": _height(_block(num_slots), size, warps), **pair_options, "num_warps": warps},
        )
    return result.to(home)


def settle(terms: Terms, table: Tensor, num_packs: int, *, layer: Tensor, ceiling: Tensor) -> Tensor:
    """Steps 10 and 11 on the packings `table [X, P]`, which are copied to a GPU as for `pack`.

    Args:
        terms: the terms of the cost; a layer's total and its prices must be at most 2^30, which is not checked.
        table: `[X, P]` int64, P up to 4,096.
        num_packs: M.
        layer: `[X]` int64, the row's layer in `terms`.
        ceiling: `[X]` int64 in [0, 2^16], as for `reference.settle`.

    Raises:
        DistplbError: as for `pack`.
    """
    check_settle(terms, table, num_packs, layer, ceiling)
    if num_packs == 1:
        return table.clone()
    home, table = table.device, _to_gpu(table).contiguous()
    result = torch.empty_like(table)
    at_once = min(_STEPS_AT_ONCE, _power_of_two(terms.load.shape[1]))
    tokens = pad(terms.load, (0, 0, 0, -terms.load.shape[1] % at_once))  # a step without tokens costs nothing
    inputs = [
        None if value is None else value.to(table.device).contiguous()
        for value in (tokens, terms.region, terms.distance, terms.price)
    ]
    layer, ceiling = layer.to(table.device).contiguous(), ceiling.to(table.device).contiguous()
    (_, num_steps, num_experts), num_slots, warps = tokens.shape, table.shape[1], 4
    packs, slots = _power_of_two(num_packs), _block(num_slots)
    blocks = {"N": slots, "M": packs, "S": _height(packs, num_steps, warps), "U": at_once}
    # Each exchange needs cells for its score, its index and its operands.
    blocks |= {"K": _height(4, num_slots // num_packs * num_slots, warps), "A": _height(slots, num_slots, warps)}
    shapes = _scratch_shapes(num_steps, num_experts, num_slots, num_packs)
    for rows in _slices(len(table), sum(math.prod(shape) * dtype.itemsize for shape, dtype in shapes)):
        count = rows.stop - rows.start
        scratch = [torch.empty(count, *shape, dtype=dtype, device=table.device) for shape, dtype in shapes]
        tensors = table[rows], result[rows], *scratch, *inputs, layer[rows], ceiling[rows]
        numbers = num_steps, num_experts, num_slots, num_packs, scans(num_packs), int(terms.apart)
        _launch(_kernels().settle_kernel, (*tensors, *numbers), {**blocks, "num_warps": warps})
    return result.to(home)


def _scratch_shapes(
    num_steps: int, num_experts: int, num_slots: int, num_packs: int
) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and types of the scratch tensors of `settle_kernel` for one row, in the order of its arguments."""
    return [
        ((num_slots,), torch.int64),
        ((num_steps, _block(num_slots)), torch.int32),
        ((num_steps, _power_of_two(num_packs)), torch.int32),
        ((num_steps, _power_of_two(num_packs)), torch.int32),
        ((num_steps,), torch.int32),
        ((num_packs,), torch.int32),
        ((num_experts, num_packs), torch.int8),
    ]


def _search(weight: Tensor, key: Tensor, num_packs: int, num_slots: int, shared: bool) -> Tensor:
    """Steps 0 to 8 with replicas."""
    num_rows, num_experts = weight.shape
    size = num_slots // num_packs
    is_roomy = num_slots <= num_packs * num_experts  # there is room to keep replicas apart
    weight, key = weight.contiguous(), key.contiguous()
    result, table, best, order = (weight.new_empty(num_rows, num_slots) for _ in range(4))
    share = torch.empty_like(weight)
    pairs, pair_options = _pairs(size, weight.device, warps := _warps(num_slots))
    attempts = tries_of_step_8(num_slots, num_packs)
    numbers = num_experts, num_slots, num_packs, pairs.shape[1], _pair_rounds(size, num_packs), attempts
    blocks = {"B": _block(num_experts), "M": _power_of_two(num_packs), "N": _block(num_slots)}
    heights = {"R": _height(blocks["B"], num_experts, warps), "A": _height(blocks["N"], size, warps)}
    for rows, holds in _parts(weight, num_packs):
        tensors = [value[rows] for value in (weight, key, result, table, best, order, share)]
        _launch(
            _kernels().refine_kernel,
            (*tensors, holds, pairs, *numbers, 0 if is_roomy else 1, 2 if shared or not is_roomy else 1),
            {**blocks, **heights, **pair_options, "num_warps": warps},
        )
    return result


def _parts(weight: Tensor, num_packs: int) -> Iterator[tuple[slice, Tensor]]:
    """Yield the rows of each launch with a zeroed `holds [x, E, M]` int8, which would be too large for all rows."""
    num_rows, num_experts = weight.shape
    for rows in _slices(num_rows, num_experts * num_packs):
        shape = rows.stop - rows.start, num_experts, num_packs
        yield rows, torch.zeros(shape, dtype=torch.int8, device=weight.device)


def _slices(num_rows: int, each: int) -> Iterator[slice]:
    """Yield all rows in slices that fit the scratch memory, where a row takes `each` bytes."""
    at_once = max(1, _SCRATCH_BYTES // each)
    at_once -= at_once % 2 if at_once > 1 else 0  # Triton would compile again for slices not aligned to 16 bytes
    for first in range(0, num_rows, at_once):
        yield slice(first, min(first + at_once, num_rows))


# The steps. Their tensors are on the device where the kernels run.


def greedy(weight: Tensor, key: Tensor, num_packs: int) -> Tensor:
    """Step 2: in descending order of key, put each item into the lightest pack that is not full."""
    num_items = weight.shape[1]
    order = key.sort(dim=1, descending=True, stable=True).indices.contiguous()  # [X, n]
    items = torch.empty_like(order)
    block = _power_of_two(num_packs)
    _launch(
        _kernels().greedy_kernel,
        (weight.gather(1, order), order, items, num_items, num_items // num_packs),
        {"N": _block(num_items), "M": block, "num_warps": 1 if block <= 256 else 4},  # one warp needs no barriers
    )
    return items


def lower_variance(weight: Tensor, items: Tensor, num_packs: int) -> Tensor:
    """Step 3: make the swap that lowers the sum of squared pack loads most, as long as there is one."""
    return _launch_refinement(_kernels().variance_kernel, weight, items, num_packs, tried=weight.shape[1])


def lower_max(weight: Tensor, items: Tensor, num_packs: int, rounds: int = MAX_ROUNDS) -> Tensor:
    """Steps 4 and 7: make the swap with the heaviest pack that minimises the heavier of the two packs."""
    return _launch_refinement(
        _kernels().max_kernel, weight, items, num_packs, rounds, tried=weight.shape[1] // num_packs
    )


def swap_pairs(weight: Tensor, items: Tensor, num_packs: int) -> Tensor:
    """Step 6: swap two items of the heaviest pack for the two of the lightest that leave the smallest difference."""
    num_items = weight.shape[1]
    size = num_items // num_packs
    if not _pair_rounds(size, num_packs):
        return items
    weight, items = weight.contiguous(), items.contiguous()
    warps = 4
    pairs, options = _pairs(size, weight.device, warps)
    result = torch.empty_like(items)
    _launch(
        _kernels().pairs_kernel,
        (weight, items, result, pairs, num_items, size, pairs.shape[1]),
        {"N": _block(num_items), "Q": options["Q"], "A": options["A2"], "num_warps": warps},
    )
    return result


def _pair_rounds(size: int, num_packs: int) -> int:
    """Rounds of step 6; 0 if packs have no pairs, too many pairs, or no partner."""
    return PAIR_ROUNDS if size in PAIR_SLOTS and num_packs > 1 else 0


def _pairs(size: int, device: torch.device, warps: int) -> tuple[Tensor, dict[str, int]]:
    """`[2, q]`: pairs of positions in a pack, in lexicographic order; and the block sizes for them."""
    pairs = (
        torch.triu_indices(size, size, 1, device=device)
        if size in PAIR_SLOTS
        else torch.zeros(2, 1, dtype=torch.int64, device=device)
    )
    block = _block(pairs.shape[1])
    return pairs.contiguous(), {"Q": block, "A2": _height(block, pairs.shape[1], warps)}


def _launch_refinement(kernel: Any, weight: Tensor, items: Tensor, num_packs: int, *numbers: int, tried: int) -> Tensor:
    """Run a refinement that tries `tried` positions of a row against all of them; returns `[X, n]`."""
    num_items = weight.shape[1]
    weight, items = weight.contiguous(), items.contiguous()
    result = torch.empty_like(items)
    block, warps = _block(num_items), _warps(num_items)
    _launch(
        kernel,
        (weight, items, result, num_items, num_items // num_packs, *numbers),
        {"N": block, "A": _height(block, tried, warps), "num_warps": warps},
    )
    return result


def _launch(kernel: Any, arguments: tuple[Any, ...], options: dict[str, int]) -> None:
    """Run a kernel, one program per row of the first argument; tensors must be contiguous and on one device."""
    first = arguments[0]
    if len(first):
        with torch.cuda.device_of(first):  # Triton launches on the current device, which may be another one
            # No kernel uses floats, but Triton 3.9 warns if this is not set.
            kernel[(len(first),)](*arguments, **options, enable_fp_fusion=False)


def _power_of_two(number: int) -> int:
    """The smallest power of two that is at least `number`."""
    return 1 << (number - 1).bit_length()


def _block(number: int) -> int:
    return max(_MIN_BLOCK, _power_of_two(number))


def _warps(num_items: int) -> int:
    return 4 if _block(num_items) <= 256 else 8


def _height(block: int, tried: int, warps: int) -> int:
    """Height A of a tile `[A, block]`: as many rows as the threads have cells for, but no more than are tried."""
    return min(_power_of_two(tried), max(1, _CELLS * 32 * warps // block))


# Whether the engine can run.


def _missing() -> str | None:
    """Why this engine cannot run, with the remedy; None if it can."""
    if find_spec("triton") is None:
        return "Triton is not installed; install triton, which comes with CUDA builds of torch"
    if not torch.cuda.is_available() and not _imported().INTERPRETED:
        return "torch.cuda.is_available() is False; run on a machine with a GPU, or set TRITON_INTERPRET=1 to interpret"
    return None


@cache  # the check takes longer than a launch
def _kernels() -> ModuleType:
    missing = _missing()
    if missing is not None:
        raise DistplbError(f"engine 'cuda' is not available: {missing}, or pass another engine")
    return _imported()


def _imported() -> ModuleType:
    from distplb.packing import cuda_kernels

    return cuda_kernels


def _to_gpu(value: Tensor) -> Tensor:
    """`value` on the device where the kernels run."""
    return value if value.is_cuda or _kernels().INTERPRETED else value.to("cuda")
