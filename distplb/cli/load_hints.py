"""Hints that a load does not look like that of a job; the results are right for the load as given.

Shapes: T steps, L layers, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

__all__ = ["load_hints"]

_EVEN = 1.005  # no job would notice half a percent
_MIN_TOKENS = 4  # mean of the counts that are not zero; sparser steps use different experts by chance
_MIN_LAYERS = 3  # in two, the same extra may be chance
# (factor, share): a layer's largest counts are an extra if they are more than `factor` times the next one and, in all
# layers, at least `share` of the greatest. _SAME if they belong to the same experts in all layers, _ANY if not.
_SAME, _ANY = (2.5, 0.6), (3.0, 0.8)
_MAX_EXTRA = 1 / 4  # of the experts


def load_hints(load: Tensor, *, before: float | None, is_trace: bool) -> list[str]:
    """List what is unusual about a load, in one sentence each; most loads have none.

    >>> import torch
    >>> load_hints(torch.tensor([[[9, 7, 0, 0]], [[0, 0, 8, 6]]]), before=2.0, is_trace=True)[0]
    "no expert has tokens in more than one of 2 steps: if each step counts only one rank's experts, add the steps up"

    Args:
        load: `[T, L, E]` int64.
        before: the mean imbalance under the placement in force; None if it does not matter.
        is_trace: whether the load has steps; a sum over steps has no hint about their number.
    """
    has_tokens = load > 0
    return list(_hints(load[has_tokens.flatten(1).any(1)][:, has_tokens.any(2).any(0)], before, is_trace))


def _hints(load: Tensor, before: float | None, is_trace: bool) -> Iterator[str]:
    """Hints for a load whose steps and layers all have tokens."""
    if not load.numel():
        return
    if len(load) == 1 and is_trace:
        yield "there is one step: the plan is judged on the step it was made from; record more steps"
    if _steps_are_disjoint(load):
        yield (
            f"no expert has tokens in more than one of {len(load)} steps: if each step counts only one rank's experts, "
            "add the steps up"
        )
    if before is not None and before <= _EVEN:
        yield (
            f"the GPUs are already balanced: the busiest has {100 * (before - 1):.1f} % more than the mean, so there "
            "is nothing to gain"
        )
    elif _layers_are_alike(load):
        yield f"all {load.shape[1]} layers have the same counts: was one layer recorded for all of them?"
    elif extra := _extra_experts(load):
        experts, extra_tokens = extra
        yield (
            f"in every layer {experts} at least {extra_tokens:,} token{'s' * (extra_tokens != 1)} more than the next "
            "one, about equally many in all layers: if this is padding, leave it out of the counts"
        )


def _steps_are_disjoint(load: Tensor) -> bool:
    """Whether no expert has tokens in two steps, in any layer, and that is not chance."""
    has_tokens = load > 0
    if int(has_tokens.any(2).sum(0).min()) < 2 or bool((has_tokens.sum(0) > 1).any()):
        return False
    num_counts = int(has_tokens.sum())
    return 2 * num_counts >= load[0].numel() and int(load.sum()) >= _MIN_TOKENS * num_counts


def _layers_are_alike(load: Tensor) -> bool:
    return load.shape[1] > 1 and bool((load == load[:, :1]).all())


def _extra_experts(load: Tensor) -> tuple[str, int] | None:
    """The experts that have the same large extra in all layers, in words, and the smallest extra in tokens."""
    _, num_layers, num_experts = load.shape
    if num_layers < _MIN_LAYERS:
        return None
    total = load.sum(0)
    counts, experts = total.sort(dim=1, descending=True)  # [L, E]
    for number in range(1, int(num_experts * _MAX_EXTRA) + 1):
        last, following = counts[:, number - 1], counts[:, number]
        chosen = experts[:, :number].sort(dim=1).values
        same = bool((chosen == chosen[:1]).all())
        factor, share = _SAME if same else _ANY
        if int(last.min()) >= share * int(counts[:, 0].max()) and bool((last > factor * following).all()):
            names = ", ".join(map(str, chosen[0].tolist()))
            which = f"expert{'s' * (number > 1)} {names}" if same else f"{number} expert{'s' * (number > 1)}"
            return f"{which} {'have' if number > 1 else 'has'}", int((last - following).min())
    return None
