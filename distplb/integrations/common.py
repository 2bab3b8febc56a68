"""Shared by adapters: counts from hooks, scores within groups, and the error for a model that is not understood.

Shapes: N tokens, E experts, P slots, K experts per token.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from distplb.core.private_names import forward_pre_hooks
from distplb.errors import DistplbError

__all__ = [
    "Remap",
    "Tell",
    "check_mode",
    "counts_of",
    "gpus_of_a_node",
    "named_parts",
    "not_found",
    "refuse_moved",
    "table_of",
    "tokens_of_experts",
    "within_groups",
]

# Takes a layer's counts [P] of one forward, and `training=`.
Tell = Callable[..., None]


def counts_of(module: nn.Module, read: Callable[[tuple[Any, ...], Any], Tensor]) -> Callable[[Tell], RemovableHandle]:
    """Build a `MoELayer.counts` that reports, after each forward of a module, the counts that `read` extracts.

    Args:
        module: the module whose forward is watched. The window recognises recomputations and evaluations.
        read: maps the forward's positional arguments and its output to the counts `[P]`.
    """

    def subscribe(tell: Tell) -> RemovableHandle:
        def hook(watched: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
            if watched is module:  # a copy of the model has this hook too
                tell(read(arguments, output), training=watched.training)

        return module.register_forward_hook(hook)

    return subscribe


def tokens_of_experts(chosen: Tensor, num_experts: int) -> Tensor:
    """Count how often each expert was chosen, as `[E]` int64; `chosen` has any shape. Never waits for the device.

    >>> tokens_of_experts(torch.tensor([[0, 2], [2, 1]]), num_experts=4)
    tensor([1, 1, 2, 0])
    """
    flat = chosen.detach().flatten().to(torch.int64)
    return torch.zeros(num_experts, dtype=torch.int64, device=flat.device).scatter_add_(0, flat, torch.ones_like(flat))


def check_mode(mode: str) -> None:
    """Check an adapter's mode: either router rows move ("permute"), or a table maps experts to slots ("remap").

    Raises:
        DistplbError: for any other mode.
    """
    if mode not in ("permute", "remap"):
        raise DistplbError(f"mode is {mode!r}; pass 'permute' or 'remap'")


class Remap:
    """A forward pre-hook that replaces the experts chosen by the router with their slots.

    It stays when counting ends, because experts stay where they are.

    Args:
        table: `[E]`, the slot of each expert; written in place by the rebalancer.
        arguments_by_slot: maps the table and the forward's positional arguments to arguments with slots for experts.
    """

    def __init__(self, table: Tensor, arguments_by_slot: Callable[[Tensor, tuple[Any, ...]], tuple[Any, ...]]) -> None:
        self.table, self._arguments_by_slot = table, arguments_by_slot

    def __call__(self, module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return the arguments that the forward gets."""
        return self._arguments_by_slot(self.table, arguments)


def table_of(
    module: nn.Module,
    num_experts: int,
    device: torch.device,
    arguments_by_slot: Callable[[Tensor, tuple[Any, ...]], tuple[Any, ...]],
) -> Tensor:
    """Return the table with which a module looks up experts; add one if it has none.

    An existing table is reused, because two would both be applied. For the arguments, see `Remap`.
    """
    remap = _remap_of(module)
    if remap is None:
        remap = Remap(torch.arange(num_experts, device=device), arguments_by_slot)
        module.register_forward_pre_hook(remap)
    return remap.table


def _remap_of(module: nn.Module) -> Remap | None:
    return next((hook for hook in forward_pre_hooks(module) if isinstance(hook, Remap)), None)


def refuse_moved(name: str, module: nn.Module) -> None:
    """Refuse to permute a layer whose experts were moved under mode='remap'. Waits for the device.

    Args:
        name: name of the layer.
        module: the module that may look up its experts in a table.

    Raises:
        DistplbError: if the table has experts in other slots than at the start.
    """
    remap = _remap_of(module)
    slots = [] if remap is None else remap.table.tolist()
    if slots != sorted(slots):
        raise DistplbError(
            f"{name}: experts were moved under mode='remap' and are looked up in a table (slot_of_expert is {slots}) "
            "that mode='permute' does not update; pass mode='remap', or call restore() of the Rebalancer that moved "
            "them"
        )


def within_groups(scores: Tensor, num_groups: int, best: int, chosen: int) -> Tensor:
    """Mask the scores `[N, E]` of a group-limited router: −inf in the groups that it does not choose from.

    Args:
        scores: `[N, E]`, the scores that the router chooses by.
        num_groups: number of groups, which are blocks of consecutive experts.
        best: number of a group's best experts whose scores add up to the score of the group.
        chosen: number of groups chosen for each token.
    """
    groups = scores.unflatten(-1, (num_groups, -1))  # [N, groups, E / groups]
    worth = groups.topk(best, -1).values.sum(-1)  # [N, groups]
    closed = torch.ones_like(worth, dtype=torch.bool)
    closed.scatter_(-1, worth.topk(chosen, -1).indices, False)
    open_only: Tensor = groups.masked_fill(closed[..., None], -torch.inf)
    return open_only.flatten(-2)


def gpus_of_a_node(given: int | None, otherwise: int | None = None) -> int:
    """Return the number of the job's GPUs on each node.

    Args:
        given: the user's value, or None.
        otherwise: the value if neither the user nor torchrun gives one.

    Raises:
        DistplbError: if no value is given.
    """
    if given is not None:
        return given
    told = os.environ.get("LOCAL_WORLD_SIZE", otherwise)
    if told is None:
        raise DistplbError("torchrun's LOCAL_WORLD_SIZE is not set; pass gpus_per_node")
    return int(told)


def named_parts(model: nn.Module | Sequence[nn.Module]) -> list[nn.Module]:
    """Return a model, or the parts of it that a pipeline stage holds, as a list."""
    return [model] if isinstance(model, nn.Module) else list(model)


def not_found(framework: str, looked_for: Sequence[str], parts: Iterable[nn.Module]) -> DistplbError:
    """Build the error for a model without a layer that is understood: what was looked for and what was found.

    Args:
        framework: name of the framework.
        looked_for: the things that a layer needs.
        parts: the parts of the model.
    """
    suspects = ("moe", "expert", "router", "gate")
    modules = [module for part in parts for module in part.modules()]
    classes = Counter(f"{type(module).__module__}.{type(module).__qualname__}" for module in modules)
    alike = {name: count for name, count in classes.items() if any(word in name.lower() for word in suspects)}
    found = ", ".join(f"{name} × {count}" for name, count in sorted(alike.items()))
    return DistplbError(
        f"no MoE layer of {framework} was recognised. Looked for: {'; '.join(looked_for)}. "
        f"Found: {found or 'no module whose class name suggests experts, routers or gates'} "
        f"(among {len(modules)} module{'s' * (len(modules) != 1)}); describe the layers yourself with distplb.MoELayer"
    )
