"""The description of one MoE layer: the tensors of its router and experts, this rank's shards of them, its counts.

Shapes: E experts, P slots, G slots on this GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from distplb.core.arguments import refuse_wrong_types, whole_number
from distplb.core.ties import RouterTies

__all__ = ["ExpertTensor", "FlatShard", "MoELayer", "Rows"]


class Removable(Protocol):
    """A handle that ends a subscription, such as that of a torch hook."""

    def remove(self) -> None:
        """End the subscription."""


@dataclass(frozen=True)
class Rows:
    """A contiguous tensor of any shape whose memory is a sequence of equal rows, one for each of this GPU's slots.

    Megatron-Core keeps the weights of all local experts in one matrix, and views it as rows when it computes.
    """

    tensor: Tensor


ExpertTensor = Tensor | Rows | Sequence[Tensor]


@dataclass(frozen=True)
class FlatShard:
    """The part of a tensor that this rank's optimizer updates, if that is not the tensor itself.

    Args:
        values: a tensor of n elements in any shape; flattened, it is elements `start` to `start + n` of this GPU's
            flattened tensor. A master copy of the whole tensor starts at 0.
        start: the first element.
    """

    values: Tensor
    start: int

    def __post_init__(self) -> None:
        refuse_wrong_types({"FlatShard: values": (self.values, (Tensor,), "the tensor that the optimizer updates")})
        object.__setattr__(self, "start", whole_number("FlatShard: start", self.start, minimum=0))


@dataclass(frozen=True, kw_only=True)
class MoELayer:
    """One MoE layer, as an adapter or your own training loop describes it.

    >>> import torch
    >>> layer = MoELayer(
    ...     name="blocks.0.moe",
    ...     experts={"w_in": torch.zeros(8, 64, 256), "w_out": torch.zeros(8, 256, 64)},
    ...     router={"weight": torch.zeros(16, 64)},
    ... )

    A tensor may be plain and contiguous, or a DTensor whose rows (dim 0) are sharded over expert-parallel ranks and
    then, along dim 0 or 1, over others; the layout is read from the tensor.

    Args:
        name: the layer's fully qualified name, unique in the model; placements and checkpoints are keyed by it.
        experts: tensors by name, `[G, ...]` each: row g belongs to the expert in this GPU's slot g. Pass `Rows` of a
            tensor of another shape, or a sequence of G equal tensors if each expert has its own. A DTensor is
            `[P, ...]` over all its ranks. Declare every tensor with a row for each expert, such as a moving average of
            the weights: a tensor that is left out stays behind when experts move.
        router: tensors by name, `[P, ...]` each, the same on all ranks or sharded: row p belongs to the expert in slot
            p. Declare parameters (weight) and buffers (a balancing bias). Leave it empty if `slot_of_expert` is given.
            A router that also looks experts up by id, as hash routing does in a table from tokens to experts, needs
            `slot_of_expert`: its rows could move, but the ids in its table would stay.
        shards: this rank's shard or copy of each tensor (by its name in `experts` or `router`) that the optimizer does
            not update itself; for a sequence, a shard or None for each of its tensors. Each rank that shares such a
            tensor then has the whole tensor itself.
        num_groups: number of groups in group-limited routing; the experts of a group then stay together in one block
            of slots, unless `slot_of_expert` is given.
        slot_of_expert: `[E]` int64, the table in which the layer's dispatcher looks up the slot of a routed expert. It
            is updated in place after every move, and the router keeps its rows. Any placement is then possible.
        counts: a function that subscribes to the layer's counts. It gets a function that takes the counts `[P]` (`[E]`
            with `slot_of_expert`) of each forward, as `LoadWindow.add` does, and a keyword `training`. It returns what
            ends the subscription: a handle with `remove()`, as of a hook, a sequence of handles, or None if there is
            nothing to end. Pass None instead of a function if the loop fills the window.
        ties: filled by the layer with its router's scores, so that events report how many tokens are routed by chance.
        invalidate: a function that is called after each commit that changed this layer, to drop data derived from its
            tensors: cached low-precision weights, unsharded copies.
    """

    name: str
    experts: Mapping[str, ExpertTensor]
    router: Mapping[str, Tensor] = field(default_factory=dict)
    shards: Mapping[str, FlatShard | Sequence[FlatShard | None]] = field(default_factory=dict)
    num_groups: int | None = None
    slot_of_expert: Tensor | None = None
    counts: Callable[[Callable[..., None]], Removable | Sequence[Removable] | None] | None = None
    ties: RouterTies | None = None
    invalidate: Callable[[], None] | None = None

    def __post_init__(self) -> None:
        by_name = "a mapping from names to tensors"
        refuse_wrong_types(
            {
                "MoELayer: name": (self.name, (str,), "the layer's name in the model"),
                "MoELayer: experts": (self.experts, (Mapping,), by_name),
                "MoELayer: router": (self.router, (Mapping,), by_name),
                "MoELayer: shards": (self.shards, (Mapping,), "a mapping from names to FlatShards"),
                "MoELayer: slot_of_expert": (self.slot_of_expert, (Tensor, None), "an int64 tensor"),
                "MoELayer: counts": (self.counts, (Callable, None), "a function that subscribes to counts"),
                "MoELayer: invalidate": (self.invalidate, (Callable, None), "a function"),
            }
        )
        if self.num_groups is not None:
            object.__setattr__(self, "num_groups", whole_number("MoELayer: num_groups", self.num_groups, minimum=1))
