"""Megatron-Core's optimizers: the torch optimizers in them, and their copies and shards of each parameter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

from megatron.core.optimizer.cpu_offloading.hybrid_optimizer import HybridDeviceOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.layer_wise_optimizer import LayerWiseDistributedOptimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer, Float16OptimizerWithFloat16Params, FP32Optimizer
from torch import Tensor
from torch.optim import Optimizer

from distplb.core.layer import ExpertTensor, FlatShard, Rows
from distplb.errors import DistplbError

__all__ = ["Shards", "shards_of_layer", "shards_of_parameters", "torch_optimizers"]

# By the parameter's id: what the optimizer steps on in its stead; None where this rank steps on nothing of it.
Shards = Mapping[int, FlatShard | None]


def _megatron_optimizers(optimizer: Any) -> list[Any]:
    """Megatron's optimizers in their chain, without those of nothing; torch optimizers as they are."""
    if optimizer is None:
        return []
    if isinstance(optimizer, Sequence):
        return [each for one in optimizer for each in _megatron_optimizers(one)]
    if isinstance(optimizer, LayerWiseDistributedOptimizer):
        raise DistplbError(
            "a LayerWiseDistributedOptimizer deals whole parameters to ranks, and the state of experts with them; "
            "use DistributedOptimizer"
        )
    if isinstance(optimizer, ChainedOptimizer):
        return [each for one in optimizer.chained_optimizers for each in _megatron_optimizers(one)]
    if getattr(optimizer, "is_stub_optimizer", False):
        return []
    inner = _inner(optimizer)
    if isinstance(inner, HybridDeviceOptimizer):
        raise DistplbError("the optimizer is offloaded to the CPU, where copies of experts are kept; do not offload it")
    if "Muon" in type(inner).__name__:
        raise DistplbError(f"{type(inner).__name__} was never run with distplb; use Adam or SGD")
    if not isinstance(inner, Optimizer):
        raise DistplbError(
            f"{type(optimizer).__name__} is not understood; pass what get_megatron_optimizer returned, with Adam or SGD"
        )
    if inner is not optimizer and optimizer.config.use_precision_aware_optimizer:
        raise DistplbError(
            "use_precision_aware_optimizer keeps main parameters and moments in forms of its own; turn it off"
        )
    return [optimizer]


def _inner(optimizer: Any) -> Any:
    """The torch optimizer in one of Megatron's."""
    known = (DistributedOptimizer, Float16OptimizerWithFloat16Params, FP32Optimizer)
    return optimizer.optimizer if isinstance(optimizer, known) else optimizer


def torch_optimizers(optimizer: Any) -> list[Optimizer]:
    """The torch optimizers in what `get_megatron_optimizer` returned, or in a list; those of nothing left out.

    Raises:
        DistplbError: for an optimizer whose state is not understood.
    """
    return [_inner(one) for one in _megatron_optimizers(optimizer)]


def shards_of_parameters(optimizer: Any) -> Shards:
    """Of all parameters that an optimizer does not step on itself, its copies or shards.

    Raises:
        DistplbError: for an optimizer whose state is not understood.
    """
    found: dict[int, FlatShard | None] = {}
    for one in _megatron_optimizers(optimizer):
        if isinstance(one, DistributedOptimizer):
            found |= _shards_of_distributed(one)
        elif isinstance(one, Float16OptimizerWithFloat16Params):
            for parameters, mains in zip(one.float16_groups, one.fp32_from_float16_groups, strict=True):
                found |= {id(p): FlatShard(main, 0) for p, main in zip(parameters, mains, strict=True)}
    return found


def _shards_of_distributed(optimizer: Any) -> Shards:
    """Of this rank's range of each buffer, the part that lies in each parameter."""
    found: dict[int, FlatShard | None] = {id(p): None for buffer in optimizer.buffers for p in buffer.params}
    groups = chain(
        zip(optimizer.model_float16_groups, optimizer.shard_fp32_from_float16_groups, strict=True),
        zip(optimizer.model_fp32_groups, optimizer.shard_fp32_groups, strict=True),
    )
    for parameters, shards in groups:
        for parameter, shard in zip(parameters, shards, strict=True):
            start = optimizer._get_model_param_range_map(parameter)["param"].start
            found[id(parameter)] = FlatShard(shard, start)
    return found


def shards_of_layer(
    name: str, declared: Mapping[str, ExpertTensor], shards: Shards
) -> dict[str, FlatShard | Sequence[FlatShard | None]]:
    """For `MoELayer.shards`.

    Args:
        name: of the layer.
        declared: its tensors by name.
        shards: of all parameters.

    Raises:
        DistplbError: where experts of one tensor are not stepped on alike.
    """
    found: dict[str, FlatShard | Sequence[FlatShard | None]] = {}
    for key, value in declared.items():
        tensors = [value] if isinstance(value, Tensor) else [value.tensor] if isinstance(value, Rows) else list(value)
        sharded = [id(tensor) in shards for tensor in tensors]
        if any(sharded) and not all(sharded):
            raise DistplbError(
                f"{name}: of {key}, the optimizer steps on itself for some experts and on a copy or shard for others; "
                "experts that change places must be alike"
            )
        if any(sharded):
            found[key] = [shards[id(tensor)] for tensor in tensors]
    return found
