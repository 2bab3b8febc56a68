"""Megatron-Core 0.16: the MoE layers of its models, its optimizers' main parameters, and a `Rebalancer` on its groups.

Router rows, `expert_bias` and the experts' weights travel, together with the tensors that the optimizer steps on: the
flat shards of `DistributedOptimizer` (main parameters and moments of this rank's range of the buffers), the main copies
of `Float16OptimizerWithFloat16Params`, or the parameters themselves. A forward hook on the router counts tokens and
ties. Nothing in Megatron-Core is replaced.

Tested, on CPU processes only: SequentialMLP, the all-to-all and the all-gather dispatcher, GroupedMLP over a plain
product, both DDP modes, gloo. Never run: CUDA, NCCL, Transformer Engine (and so TEGroupedMLP, whose parameters are
found by their names), the grouped GEMM kernels, the flex dispatcher (DeepEP, HybridEP), activation recomputation,
virtual pipelines, context parallelism, tensor parallelism of the attention, float16 with a loss scale, Megatron's own
asynchronous checkpoints.

Refused, each with its reason: expert tensor parallelism above 1, FP8 and FP4, CUDA graphs, latent projections, shared
experts overlapped with communication, routing replay, Megatron's and torch's FSDP, CPU-offloaded, precision-aware,
layer-wise and Muon optimizers.

Shapes: N tokens, E experts, P slots, G slots on this GPU.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any, NoReturn

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.transformer.moe.experts import GroupedMLP, SequentialMLP, TEGroupedMLP
from megatron.core.transformer.moe.moe_layer import BaseMoELayer
from megatron.core.transformer.moe.moe_layer import MoELayer as MegatronMoELayer
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor, nn

from distplb.comm.torchdist import TorchComm
from distplb.core.layer import ExpertTensor, MoELayer, Rows
from distplb.core.ties import RouterTies
from distplb.core.topology import Topology
from distplb.errors import DistplbError
from distplb.integrations.common import counts_of, gpus_of_a_node, named_parts, not_found, within_groups
from distplb.integrations.megatron_optimizers import Shards, shards_of_layer, shards_of_parameters, torch_optimizers
from distplb.train.options import Moves, Search
from distplb.train.rebalancer import Rebalancer

__all__ = ["MegatronRebalancer", "moe_layers", "rebalancer"]

_LOOKED_FOR = (
    "megatron.core.transformer.moe.moe_layer.MoELayer",
    "its router, a TopKRouter",
    "its experts, a SequentialMLP, TEGroupedMLP or GroupedMLP",
)
# The router's tensors by expert. The last two accumulate within an iteration and are zeroed before its optimizer step.
_ROUTER_TENSORS = ("weight", "bias", "expert_bias", "local_tokens_per_expert", "global_tokens_per_expert")


def moe_layers(model_chunks: nn.Module | Sequence[nn.Module], optimizer: Any = None) -> list[MoELayer]:
    """Return the MoE layers of this rank, in the order of its model chunks; for a `Rebalancer` that you build yourself.

    Names are those of the whole model ("decoder.layers.3.mlp", counted from 0), whatever the pipeline split.

    Args:
        model_chunks: what `get_model` returned: the model, or its chunks, with or without DDP and Float16Module.
        optimizer: what `get_megatron_optimizer` returned, or torch optimizers that step on the parameters themselves.
            Build it before this call, because it changes the layout of the parameters. None if nothing is to be moved.

    Returns:
        The layers; an empty list on a pipeline stage of an MoE model that has only dense layers.

    Raises:
        DistplbError: if the model is not an MoE model, or a layer or optimizer is of a kind that cannot be moved; with
            its name and the reason.
    """
    parts = [_unwrapped(chunk) for chunk in named_parts(model_chunks)]
    shards = shards_of_parameters(optimizer)
    found = [_layer(name, module, shards) for part in parts for name, module in _found(part)]
    if not found and not any(getattr(getattr(part, "config", None), "num_moe_experts", None) for part in parts):
        raise not_found("Megatron-Core", _LOOKED_FOR, parts)
    names = [layer.name for layer in found]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DistplbError(f"two MoE layers are named {twice[0]!r}; pass each model chunk once")
    return found


def rebalancer(
    model_chunks: nn.Module | Sequence[nn.Module],
    optimizer: Any,
    *,
    every: int,
    gpus_per_node: int | None = None,
    keep_shards_aligned: bool = False,
    deadline: float = 300.0,
    **options: Any,
) -> MegatronRebalancer:
    """Build a `Rebalancer` for a Megatron-Core job. Collective: all ranks of all pipeline stages call it.

    After model and optimizer are built, and loaded from a checkpoint if there is one::

        rebalancer = megatron.rebalancer(model, optimizer, every=500)

    and in the loop, after `train_step` or its equivalent::

        update_successful, grad_norm, num_zeros = optimizer.step()
        if update_successful:
            opt_param_scheduler.step(increment=...)
            optimizer.zero_grad()  # gradients that are still held would travel too
            rebalancer.step()

    and for a checkpoint like that of a job without rebalances::

        with rebalancer.in_logical_order():
            save_checkpoint(...)

    Args:
        model_chunks: see `moe_layers`.
        optimizer: see `moe_layers`.
        every: iterations between rebalances.
        gpus_per_node: ranks on each node; the value from `torchrun` where None.
        keep_shards_aligned: move an expert only to slots with the same index within their GPU, so that the distributed
            optimizer's shards of it stay on ranks with the same index in their expert-data-parallel groups. Moves then
            take fewer and larger messages; on loads of DeepSeek-V3 this costs 0.01 to 0.03 of imbalance.
        deadline: seconds that a rank waits for the others; see `TorchComm`.
        options: options of `Rebalancer`.

    Returns:
        The rebalancer, which does nothing on a pipeline stage without MoE layers.

    Raises:
        DistplbError: as `moe_layers` and `Rebalancer`; or if Megatron's parallel state is not initialised.
    """
    if not parallel_state.model_parallel_is_initialized():
        raise DistplbError("Megatron has no process groups yet; call parallel_state.initialize_model_parallel first")
    layers = moe_layers(model_chunks, optimizer)
    ep = TorchComm(parallel_state.get_expert_model_parallel_group(), side_group=False)
    for layer, module in zip(layers, _moe_modules(model_chunks), strict=True):
        if TorchComm(module.ep_group, side_group=False).global_ranks != ep.global_ranks:
            raise DistplbError(
                f"{layer.name} has an expert-parallel group other than that of Megatron's parallel_state; build a "
                "Rebalancer from moe_layers(...) and pass it the groups"
            )
    if keep_shards_aligned:
        search = options.get("search", Search())
        options["search"] = replace(search, slot_class=_numbers_within_gpu(layers, ep.size))
    chunks = [chunk for chunk in named_parts(model_chunks) if isinstance(chunk, DistributedDataParallel)]
    late = [chunk for chunk in chunks if layers and chunk.ddp_config.overlap_param_gather]
    if late:
        options["moves"] = _with_gather(options.get("moves", Moves()), late)
    return MegatronRebalancer(
        layers,
        torch_optimizers(optimizer),
        topology=Topology.of_ranks(ep.global_ranks, gpus_of_a_node(gpus_per_node)),
        every=every,
        # All ranks of this pipeline stage: those that hold its layers.
        comm=TorchComm(
            parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True), deadline=deadline
        ),
        gpu=ep.rank,
        **options,
    )


class MegatronRebalancer(Rebalancer):
    """A `Rebalancer` that must be called in the loop."""

    def attach(self) -> NoReturn:
        """Refuse, because the inner optimizers' steps end before Megatron's own.

        Raises:
            DistplbError: always.
        """
        raise DistplbError(
            "Megatron copies main parameters into the model after the inner optimizer's step, when attach() would "
            "already have moved them; call rebalancer.step() after Megatron's optimizer.step()"
        )


def _with_gather(moves: Moves, chunks: Sequence[Any]) -> Moves:
    """Return the moves with a gather of the parameters before each.

    Under `overlap_param_gather`, after `optimizer.step()` each rank has new values only for its own range of the
    parameters, and the next forward gathers the rest. A moved tensor must be the same on all ranks that hold it, so the
    parameters are gathered before experts may move. The forward then need not gather them again.
    """

    def gather() -> None:
        for chunk in chunks:
            chunk.start_param_sync(force_sync=True)
        if moves.before is not None:
            moves.before()

    return replace(moves, before=gather)


# --- layers ------------------------------------------------------------------------------------------------------


def _unwrapped(chunk: nn.Module) -> nn.Module:
    """Remove the wrappers of a model; refuse those that shard parameters."""
    while isinstance(getattr(chunk, "module", None), nn.Module):
        config = getattr(chunk, "ddp_config", None)
        if "FullyShardedDataParallel" in type(chunk).__name__ or getattr(config, "use_megatron_fsdp", False):
            raise DistplbError(
                f"the model is wrapped in {type(chunk).__name__}, whose shards of experts are not understood; use "
                "DistributedDataParallel with use_distributed_optimizer"
            )
        chunk = chunk.module  # type: ignore[assignment]  # a module: checked above
    return chunk


def _found(part: nn.Module) -> Iterator[tuple[str, Any]]:
    """The global name of each MoE layer of one chunk, and the layer."""
    for path, module in part.named_modules():
        if isinstance(module, BaseMoELayer):
            yield _global_name(path, module.layer_number), module


def _moe_modules(model_chunks: nn.Module | Sequence[nn.Module]) -> list[Any]:
    return [module for chunk in named_parts(model_chunks) for _, module in _found(_unwrapped(chunk))]


def _global_name(path: str, layer_number: int | None) -> str:
    """Replace the layer's index in its chunk by its index in the whole model, counted from 0.

    Layers of multi-token prediction are counted separately and are not split over stages.
    """
    if layer_number is None or path.startswith("mtp."):
        return path
    return re.sub(r"(^|\.)layers\.\d+(?=\.|$)", rf"\g<1>layers.{layer_number - 1}", path, count=1)


def _layer(name: str, module: Any, shards: Shards) -> MoELayer:
    _refuse_unknown(name, module)
    router, config = module.router, module.config
    experts = _expert_tensors(name, module.experts, module.num_local_experts)
    rows = {key: tensor for key in _ROUTER_TENSORS if (tensor := getattr(router, key, None)) is not None}
    unknown = sorted({key for key, _ in chain(router.named_parameters(), router.named_buffers())} - {*rows, "ga_steps"})
    if unknown:
        raise DistplbError(
            f"{name}.router.{unknown[0]} is not known and may have a row for each expert; describe the layer yourself "
            "with distplb.MoELayer"
        )
    ties = RouterTies(router.topk) if _choice_is_told_by_scores(config) else None

    def counts(arguments: tuple[Any, ...], output: Any) -> Tensor:
        if ties is not None and ties.is_due:
            ties.add(_scores(router, arguments[0]))
        chosen: Tensor = output[1]  # [N, E] bool
        return chosen.sum(0)

    return MoELayer(
        name=name,
        experts=experts,
        router=rows,
        shards=shards_of_layer(name, {**experts, **rows}, shards),
        num_groups=config.moe_router_num_groups if config.moe_router_group_topk else None,
        counts=counts_of(router, counts),
        ties=ties,
    )


def _refuse_unknown(name: str, module: Any) -> None:
    """Refuse a layer that would, or might, be moved incorrectly."""
    config = module.config
    if not isinstance(module, MegatronMoELayer) or not isinstance(module.router, TopKRouter):
        raise DistplbError(
            f"{name} is a {type(module).__name__} with a {type(module.router).__name__}; only an MoELayer with a "
            "TopKRouter is understood: describe the layer yourself with distplb.MoELayer"
        )
    reasons = {
        "expert tensor parallelism": _tp_size(module) > 1 and "each rank then holds a part of every row",
        "fp8": config.fp8 and "scales and cached weights belong to experts and would stay behind",
        "fp4": config.fp4 and "scales and cached weights belong to experts and would stay behind",
        "CUDA graphs": config.cuda_graph_impl != "none" and "a replayed graph calls no hooks, so nothing is counted",
        "moe_latent_size": config.moe_latent_size and "it needs Transformer Engine, and was never run with distplb",
        "moe_shared_expert_overlap": config.moe_shared_expert_overlap and "it was never run with distplb",
        "moe_enable_routing_replay": config.moe_enable_routing_replay and "recorded choices are slot indices",
    }
    for what, why in reasons.items():
        if why:
            raise DistplbError(f"{name} uses {what}, with which experts cannot be moved: {why}; turn it off")


def _tp_size(module: Any) -> int:
    """The number of ranks that share each expert of a layer."""
    group = getattr(module.experts, "tp_group", None)
    return 1 if group is None else int(group.size())


def _expert_tensors(name: str, experts: nn.Module, num_slots: int) -> dict[str, ExpertTensor]:
    """By name: a tensor for each local expert, in order, or one tensor for all of them."""
    found: dict[str, ExpertTensor] = {}
    parameters = dict(experts.named_parameters())
    if isinstance(experts, GroupedMLP):
        # Their shapes are [hidden, G * ffn] and [G * ffn, hidden], but they are used as views [G, ...].
        found = {key: Rows(parameters.pop(key)) for key in ("weight1", "weight2")}
    else:
        separate: dict[str, dict[int, Tensor]] = {}
        for key in list(parameters):
            what = _of_one_expert(experts, key)
            if what is not None:
                separate.setdefault(what[0], {})[what[1]] = parameters.pop(key)
        for key, by_slot in separate.items():
            if sorted(by_slot) != list(range(num_slots)):
                raise DistplbError(
                    f"{name}.experts: {key} exists for slots {sorted(by_slot)}, but there are {num_slots}; describe "
                    "the layer yourself with distplb.MoELayer"
                )
            found[key] = [by_slot[slot] for slot in range(num_slots)]
    left = [*parameters, *(key for key, _ in experts.named_buffers())]
    if left or not found:
        raise DistplbError(
            f"{name}.experts is a {type(experts).__name__} with {left or 'no tensors'}, which is not understood; use "
            "SequentialMLP, TEGroupedMLP or GroupedMLP, or describe the layer yourself with distplb.MoELayer"
        )
    return found


def _of_one_expert(experts: nn.Module, key: str) -> tuple[str, int] | None:
    """Split a parameter's name into the part that all experts share and this GPU's slot; None if it has no slot."""
    if isinstance(experts, SequentialMLP) and (match := re.fullmatch(r"local_experts\.(\d+)\.(.+)", key)):
        return match[2], int(match[1])
    if isinstance(experts, TEGroupedMLP) and (match := re.fullmatch(r"(linear_fc[12]\.(?:weight|bias))(\d+)", key)):
        return match[1], int(match[2])
    return None


def _numbers_within_gpu(layers: Sequence[MoELayer], num_gpus: int) -> Tensor | None:
    """The index `[P]` of each slot within its GPU."""
    if not layers:
        return None
    num_slots = len(layers[0].router["weight"])
    return torch.arange(num_slots, device="cpu") % (num_slots // num_gpus)


# --- the router's scores -----------------------------------------------------------------------------------------


def _choice_is_told_by_scores(config: Any) -> bool:
    """Whether running the gate on the same tokens again gives the scores that the router chose by."""
    by_chance = config.moe_input_jitter_eps is not None or config.moe_router_force_load_balancing
    return not by_chance and config.moe_router_load_balancing_type != "sinkhorn"


@torch.no_grad()
def _scores(router: Any, hidden: Tensor) -> Tensor:
    """Scores `[N, E]`, of which the router chooses the largest; -inf in groups that it does not choose from."""
    config = router.config
    logits: Tensor = router.gating(hidden).flatten(0, -2)
    scores = logits
    if router.score_function == "sigmoid":
        scores = logits.float().sigmoid().type_as(logits)
        if router.expert_bias is not None:
            scores = scores + router.expert_bias
    elif config.moe_router_pre_softmax:
        scores = logits.softmax(-1, dtype=torch.float32).type_as(logits)
    if not config.moe_router_group_topk:
        return scores
    chosen = config.moe_router_group_topk
    return within_groups(scores, config.moe_router_num_groups, router.topk // chosen, chosen)
