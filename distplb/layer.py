"""What distplb is told of one MoE layer: its router's and its experts' tensors, and who holds what of them.

Shapes: E experts, P slots, G slots on this GPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

__all__ = ["FlatShard", "MoELayer"]


@dataclass(frozen=True)
class FlatShard:
    """The part of an expert tensor that this rank's optimizer holds, where it is sharded over data-parallel ranks.

    Args:
        values: `[n]`, elements `start` to `start + n` of this GPU's expert tensor, flattened: the tensor that the
            optimizer steps on (a master copy of the parameter's range).
        start: in elements.
    """

    values: Tensor
    start: int


@dataclass(frozen=True, kw_only=True)
class MoELayer:
    """One MoE layer, as an adapter or one's own loop describes it.

    >>> import torch
    >>> layer = MoELayer(
    ...     name="blocks.0.moe",
    ...     experts={"w_in": torch.zeros(8, 64, 256), "w_out": torch.zeros(8, 256, 64)},
    ...     router={"weight": torch.zeros(16, 64)},
    ... )

    Args:
        name: fully qualified and unique in the model; placements and checkpoints are keyed by it.
        experts: `[G, ...]` each, contiguous: row g belongs to the expert in this GPU's slot g.
        router: `[P, ...]` each, contiguous and equal on all ranks: row p belongs to the expert in slot p. Parameters
            (weight) and buffers (a balancing bias) alike; whatever has a row for each expert and is left out here
            would stay behind when experts move.
        shards: for expert tensors (by their name in `experts`) whose optimizer state is sharded over the ranks that
            hold the same experts: this rank's shard. The tensor itself is then whole on each of those ranks.
    """

    name: str
    experts: Mapping[str, Tensor]
    router: Mapping[str, Tensor]
    shards: Mapping[str, FlatShard] = field(default_factory=dict)
