"""The description of one MoE layer: its router's and its experts' tensors, who holds what of them, its counts.

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
    """What ends a subscription, such as torch's handle of a hook."""

    def remove(self) -> None:
        """End the subscription."""


@dataclass(frozen=True)
class Rows:
    """A tensor of any shape whose memory is one contiguous row after the other, one for each of this GPU's slots.

    Megatron-Core keeps the weights of all local experts as one matrix, and views it so where it computes.
    """

    tensor: Tensor


ExpertTensor = Tensor | Rows | Sequence[Tensor]


@dataclass(frozen=True)
class FlatShard:
    """The part of a tensor that this rank's optimizer steps on, where that is not the tensor itself.

    Args:
        values: of any shape; flattened, elements `start` to `start + n` of this GPU's tensor, flattened. A master copy
            of the whole starts at 0.
        start: in elements.
    """

    values: Tensor
    start: int

    def __post_init__(self) -> None:
        refuse_wrong_types({"FlatShard: values": (self.values, (Tensor,), "the tensor that the optimizer steps on")})
        object.__setattr__(self, "start", whole_number("FlatShard: start", self.start, minimum=0))


@dataclass(frozen=True, kw_only=True)
class MoELayer:
    """One MoE layer, as an adapter or one's own loop describes it.

    >>> import torch
    >>> layer = MoELayer(
    ...     name="blocks.0.moe",
    ...     experts={"w_in": torch.zeros(8, 64, 256), "w_out": torch.zeros(8, 256, 64)},
    ...     router={"weight": torch.zeros(16, 64)},
    ... )

    A tensor may be plain and contiguous, or a DTensor whose rows (dim 0) are sharded over expert-parallel ranks and
    then, along dim 0 or 1, over others; the layout is read off it.

    Args:
        name: fully qualified and unique in the model; placements and checkpoints are keyed by it.
        experts: `[G, ...]` each: row g belongs to the expert in this GPU's slot g; `Rows` of a tensor of another
            shape; or, where every expert has tensors of its own, a sequence of G equal ones. A DTensor is `[P, ...]`
            over all its ranks. Whatever has a row for each expert and is left out here would stay behind when experts
            move: a moving average of the weights is declared like the weights.
        router: `[P, ...]` each, the same on all ranks, or sharded: row p belongs to the expert in slot p. Parameters
            (weight) and buffers (a balancing bias) alike. Left empty where `slot_of_expert` is given. A router that
            also looks experts up by number, as hash routing does with a table from tokens to experts, needs
            `slot_of_expert`: its rows could move, but the numbers in its table would stay.
        shards: for tensors (by their name in `experts` or `router`) that the optimizer does not step on itself, but on
            a shard or a copy: this rank's; for a sequence, one or None for each of its tensors. The tensor itself is
            then whole on each of the ranks that share it.
        num_groups: of group-limited routing; experts then keep to blocks of groups, unless `slot_of_expert` is given.
        slot_of_expert: `[E]` int64, the table by which the layer's dispatcher finds an expert's slot after the
            router's choice. It is written in place after every move, and the router keeps its rows. Any placement is
            possible then.
        counts: is called with the function that takes this layer's counts `[P]` (`[E]` with `slot_of_expert`) of each
            forward, as `LoadWindow.add` does, and a keyword `training`. Returns what ends that: a handle with
            `remove()`, as of a hook, a sequence of these, or None where nothing is to be ended. None in its place where
            the loop fills the window.
        ties: to be filled by the layer with its router's scores, so that the event can tell how many tokens are
            routed by chance.
        invalidate: called after each commit that changed this layer, to drop what is derived from its tensors: cached
            low-precision weights, unsharded copies.
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
        by_name = "tensors by name"
        refuse_wrong_types(
            {
                "MoELayer: name": (self.name, (str,), "the layer's name in the model"),
                "MoELayer: experts": (self.experts, (Mapping,), by_name),
                "MoELayer: router": (self.router, (Mapping,), by_name),
                "MoELayer: shards": (self.shards, (Mapping,), "FlatShards by the name of a tensor"),
                "MoELayer: slot_of_expert": (self.slot_of_expert, (Tensor, None), "a table of int64"),
                "MoELayer: counts": (self.counts, (Callable, None), "a function that takes the one to be told"),
                "MoELayer: invalidate": (self.invalidate, (Callable, None), "a function"),
            }
        )
        if self.num_groups is not None:
            object.__setattr__(self, "num_groups", whole_number("MoELayer: num_groups", self.num_groups, minimum=1))
