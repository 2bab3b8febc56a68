"""Megatron-Core's optimizers: the torch optimizers inside them, and their copies and shards of each parameter."""

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

# By the parameter's id: what the optimizer steps on instead; None if this rank steps on nothing of it.
Shards = Mapping[int, FlatShard | None]


def _megatron_optimizers(optimizer: Any) -> list[Any]:
    """List Megatron's optimizers in their chain, without stubs; torch optimizers are listed unchanged."""
    if optimizer is None:
        return []
    if isinstance(optimizer, Sequence):
        return [each for one in optimizer for each in _megatron_optimizers(one)]
    if isinstance(optimizer, LayerWiseDistributedOptimizer):
        raise DistplbError(
            "a LayerWiseDistributedOptimizer distributes whole parameters over ranks, and the state of experts with "
            "them; use DistributedOptimizer"
        )
    if isinstance(optimizer, ChainedOptimizer):
        return [each for one in optimizer.chained_optimizers for each in _megatron_optimizers(one)]
    if getattr(optimizer, "is_stub_optimizer", False):
        return []
    inner = _inner(optimizer)
    if isinstance(inner, HybridDeviceOptimizer):
        raise DistplbError("the optimizer is offloaded to the CPU and keeps copies of experts there; do not offload it")
    if "Muon" in type(inner).__name__:
        raise DistplbError(f"{type(inner).__name__} was never run with distplb; use Adam or SGD")
    if not isinstance(inner, Optimizer):
        raise DistplbError(
            f"{type(optimizer).__name__} is not understood; pass what get_megatron_optimizer returned, with Adam or SGD"
        )
    if inner is not optimizer and optimizer.config.use_precision_aware_optimizer:
        raise DistplbError(
            "use_precision_aware_optimizer keeps main parameters and moments in formats of its own; turn it off"
        )
    return [optimizer]


def _inner(optimizer: Any) -> Any:
    """The torch optimizer inside one of Megatron's."""
    known = (DistributedOptimizer, Float16OptimizerWithFloat16Params, FP32Optimizer)
    return optimizer.optimizer if isinstance(optimizer, known) else optimizer


def torch_optimizers(optimizer: Any) -> list[Optimizer]:
    """Return the torch optimizers inside what `get_megatron_optimizer` returned, or inside a list, without stubs.

    Raises:
        DistplbError: for an optimizer whose state is not understood.
    """
    return [_inner(one) for one in _megatron_optimizers(optimizer)]


def shards_of_parameters(optimizer: Any) -> Shards:
    """Return the optimizer's copies or shards of all parameters that it does not step on directly.

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
    """The part of each parameter that is in this rank's range of its buffer."""
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
    """Build the `MoELayer.shards` of a layer.

    Args:
        name: name of the layer.
        declared: its tensors by name.
        shards: the shards of all parameters.

    Raises:
        DistplbError: if the optimizer does not step on all experts of one tensor alike.
    """
    found: dict[str, FlatShard | Sequence[FlatShard | None]] = {}
    for key, value in declared.items():
        tensors = [value] if isinstance(value, Tensor) else [value.tensor] if isinstance(value, Rows) else list(value)
        sharded = [id(tensor) in shards for tensor in tensors]
        if any(sharded) and not all(sharded):
            raise DistplbError(
                f"{name}: the optimizer steps on {key} itself for some experts and on a copy or shard for others; "
                "train all experts of a layer alike"
            )
        if any(sharded):
            found[key] = [shards[id(tensor)] for tensor in tensors]
    return found
