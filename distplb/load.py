"""Loads: tokens routed to each expert, counted step by step.

Shapes: T steps, L layers, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distplb.errors import DistplbError

__all__ = ["LoadWindow", "as_tokens", "scaled", "widened"]

# Packing multiplies a weight by a 14-bit noise and the packed key holds 41 bits of cost: 2^40 leaves room for both.
_MAX_TOTAL_BITS = 40
# Each rank's own total stays below this, so that the sum over 2^14 of them cannot leave an int64.
_MAX_RANK_TOTAL = 2.0**48


class LoadWindow:
    """The last `num_steps` steps of counts on this rank, in a ring buffer on the device.

    `add` belongs in the forward of a layer. It never waits for the device, writes in place and keeps its write
    index on the device, so it may be part of a captured CUDA graph.

    >>> window = LoadWindow(num_layers=1, num_experts=2, num_steps=2)
    >>> for counts in ([5, 1], [4, 2], [3, 3]):
    ...     window.add(0, torch.tensor(counts), training=True)
    >>> window.load()
    tensor([[[4, 2]],
    <BLANKLINE>
            [[3, 3]]])

    Args:
        num_layers: L.
        num_experts: E.
        num_steps: T, the steps that are kept; an iteration of several micro-batches has several steps.
        device: where the counts are made.
    """

    def __init__(
        self, num_layers: int, num_experts: int, num_steps: int, *, device: torch.device | str = "cpu"
    ) -> None:
        for name, value in (
            ("num_layers", num_layers),
            ("num_experts", num_experts),
            ("num_steps", num_steps),
        ):
            if value < 1:
                raise DistplbError(f"LoadWindow: {name} is {value}; pass at least 1")
        self._counts = torch.zeros(num_steps, num_layers, num_experts, dtype=torch.int64, device=device)
        self._written = torch.zeros(num_layers, dtype=torch.int64, device=device)  # steps since the last clear

    @property
    def shape(self) -> tuple[int, int, int]:
        """(T, L, E) of the full window."""
        steps, layers, experts = self._counts.shape
        return steps, layers, experts

    def add(self, layer: int, counts: Tensor, *, training: bool | None = None) -> None:
        """Write one step of one layer, unless this forward is an evaluation or a recomputation.

        Recomputation under activation checkpointing runs inside the backward pass, and is known by that. An
        evaluation is known by `training=False` or, where that is not given, by gradients being off.

        Args:
            layer: index in [0, L).
            counts: `[E]` integers, this rank's tokens for each of the router's outputs.
            training: pass `module.training` under *reentrant* checkpointing, whose first forward runs without
                gradients and would otherwise be taken for an evaluation.
        """
        if torch._C._current_graph_task_id() != -1:  # inside autograd: the same tokens a second time
            return
        if not (torch.is_grad_enabled() if training is None else training):
            return
        written = self._written[layer : layer + 1]  # [1], a view: nothing is read on the host
        row = counts.detach().to(self._counts.dtype).reshape(1, -1)  # [1, E]
        self._counts[:, layer].index_copy_(0, written % self._counts.shape[0], row)
        written.add_(1)

    def load(self) -> Tensor:
        """`[T', L, E]` int64: the steps that every layer has, oldest first, T' ≤ T. Waits for the device."""
        num_steps = self._counts.shape[0]
        kept = min(num_steps, int(self._written.min()))
        age = torch.arange(kept, 0, -1, device=self._written.device)  # kept, ..., 1 steps ago
        steps = (self._written[None] - age[:, None]) % num_steps  # [T', L]
        return self._counts.gather(0, steps[..., None].expand(-1, -1, self._counts.shape[2]))

    def clear(self) -> None:
        """Forget all steps, without waiting for the device."""
        self._written.zero_()


def as_tokens(load: Tensor) -> Tensor:
    """`[T, L, E]` int64 from `[L, E]` or `[T, L, E]` of any number type; floats are rounded half-even.

    Raises:
        DistplbError: for another shape, NaN, infinite or negative values, fractions of a token, or too many tokens.
    """
    load = torch.as_tensor(load).detach()
    if load.dim() not in (2, 3) or 0 in load.shape:
        raise DistplbError(
            f"load has shape {tuple(load.shape)}; pass [layers, experts] or [steps, layers, experts], none empty"
        )
    if load.is_complex() or load.dtype == torch.bool:
        raise DistplbError(f"load has dtype {load.dtype}; pass token counts as integers")
    load = load if load.dim() == 3 else load[None]
    check_weights("load", load)
    if load.is_floating_point():
        if 0 < float(load.max()) < 1:
            raise DistplbError(
                f"load has no value of a whole token (the largest is {float(load.max())}); "
                "pass token counts, or multiply the frequencies by the tokens they stand for"
            )
        load = load.double().round()
    if float(load.double().sum((0, 2)).max()) >= _MAX_RANK_TOTAL:
        raise DistplbError(
            f"load has a layer of {float(load.double().sum((0, 2)).max()):.3g} tokens; "
            "2^48 on each rank is the most that can be added up"
        )
    return load.to(torch.int64)


def check_weights(name: str, value: Tensor) -> None:
    """Refuse what is not a finite, non-negative number, with the first offender's place and value."""
    if value.is_floating_point() and not bool(value.isfinite().all()):
        wrong, what = ~value.isfinite(), "finite"
    elif value.is_floating_point() or value.is_signed():
        wrong, what = value < 0, "non-negative"
    else:
        return
    places = wrong.nonzero()
    if len(places):
        place = tuple(places[0].tolist())
        raise DistplbError(
            f"{name} is {value[place].item()} at index {list(place)} ({len(places)} such); "
            f"counts must be {what}: check the counter that made them"
        )


def scaled(load: Tensor) -> Tensor:
    """Shift each layer of `[T, L, E]` int64 right until its total over the window is at most 2^40."""
    total = load.sum((0, 2))  # [L]
    shifts = torch.arange(63 - _MAX_TOTAL_BITS, device=load.device)
    shift = ((total >> shifts[:, None]) > 1 << _MAX_TOTAL_BITS).sum(0)  # [L], the first that fits
    return load >> shift[:, None]


def widened(load: Tensor) -> Tensor:
    """Shift each layer of `[T, L, E]` int64 left as far as its total stays at most 2^40."""
    total = load.sum((0, 2))  # [L]
    shifts = torch.arange(_MAX_TOTAL_BITS + 1, device=load.device)
    fits = total <= (1 << _MAX_TOTAL_BITS) >> shifts[:, None]
    shift = torch.where(total > 0, fits.sum(0) - 1, 0)
    return load << shift[:, None]
