"""Tiny torchtitan models for tests: its own modules, meshes, optimizers and functions, on processes without a GPU.

Torchtitan's Trainer expects a GPU, so four things differ from its jobs: the device type of the meshes is "cpu", FSDP2's
reductions are plain sums, attention is `ScaledDotProductAttention` (torchtitan's language models use others, which need
CUDA), and `exact=True` replaces the grouped product, which rounds to bfloat16, by one in the precision of the weights.

Shapes: E experts, e experts on this GPU, R rows routed to them, D model width, F hidden width, V words.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from types import SimpleNamespace
from typing import Any

import spmd_types as spmd
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchtitan.distributed.parallel_dims as titan_meshes
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import PipelineStage
from torch.distributed.tensor import Replicate
from torchtitan.components.optimizer import OptimizersContainer, default_adamw, register_moe_load_balancing_hook
from torchtitan.components.optimizer.lr_scheduler import LRSchedulersContainer
from torchtitan.config.configs import ParallelismConfig
from torchtitan.distributed import ParallelDims
from torchtitan.distributed.fsdp import apply_fsdp_to_decoder
from torchtitan.distributed.full_dtensor import parallelize_inputs, resolve_fsdp_mesh, resolve_sparse_fsdp_mesh
from torchtitan.distributed.pipeline_parallel import _split_module
from torchtitan.distributed.utils import clip_grad_norm_, get_spmd_context, set_spmd_backend
from torchtitan.models.common import CosSinRoPE, Embedding, Linear, RMSNorm
from torchtitan.models.common.attention import ScaledDotProductAttention
from torchtitan.models.common.config_utils import (
    make_ffn_config,
    make_gqa_config,
    make_moe_config,
    make_router_config,
    make_token_dispatcher_config,
)
from torchtitan.models.common.moe import GroupedExperts, RoutedExperts
from torchtitan.models.common.moe_sharding import set_moe_sharding_config
from torchtitan.models.gpt_oss.moe import GptOssGroupedExperts, swiglu
from torchtitan.models.qwen3.model import Qwen3Model, Qwen3TransformerBlock

__all__ = ["EXPERTS", "SEQUENCE", "TOP_K", "Job", "PipelineJob", "meshes", "tiny_model"]

NUM_PIPELINED, MICRO_BATCHES = 4, 4  # layers of a pipeline, and forwards of an iteration in it
EXPERTS, DIM, HIDDEN, VOCABULARY, TOP_K, SEQUENCE = 8, 16, 24, 64, 2, 16
WEIGHT = partial(nn.init.normal_, std=0.2)
LINEAR: dict[str, Any] = {"weight": WEIGHT, "bias": WEIGHT}
NORM: dict[str, Any] = {"weight": nn.init.ones_}


class ExactExperts(GroupedExperts):
    """Torchtitan's experts without its casts to bfloat16."""

    @dataclass(kw_only=True, slots=True)
    class Config(GroupedExperts.Config):
        pass

    def forward(self, x_RD: Tensor, num_tokens_per_expert_E: Tensor) -> Tensor:
        w1, w2, w3 = (
            weight.to_local() if hasattr(weight, "to_local") else weight
            for weight in (self.w1_EFD, self.w2_EDF, self.w3_EFD)
        )  # [e, F, D], [e, D, F], [e, F, D]
        outputs = [
            (F.silu(rows @ w1[expert].T) * (rows @ w3[expert].T)) @ w2[expert].T
            for expert, rows in enumerate(x_RD.split(num_tokens_per_expert_E.tolist()))
        ]
        return torch.cat(outputs)


class ExactGptOssExperts(GptOssGroupedExperts):
    """Those of gpt-oss without its casts to bfloat16."""

    @dataclass(kw_only=True, slots=True)
    class Config(GptOssGroupedExperts.Config):
        pass

    def forward(self, x_RD: Tensor, num_tokens_per_expert_E: Tensor) -> Tensor:
        names = ("mlp1_weight_EGD", "mlp1_bias_EG", "mlp2_weight_EDF", "mlp2_bias_ED")
        tensors = [getattr(self, name) for name in names]
        first, first_bias, second, second_bias = (
            tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in tensors
        )  # [e, 2F, D], [e, 2F], [e, D, F], [e, D]
        outputs = [
            swiglu(rows @ first[expert].T + first_bias[expert], limit=self.swiglu_limit) @ second[expert].T
            + second_bias[expert]
            for expert, rows in enumerate(x_RD.split(num_tokens_per_expert_E.tolist()))
        ]
        return torch.cat(outputs)


def meshes(ep: int, backend: str = "partial_dtensor", tp: int = 1, pp: int = 1, replicate: int = 1) -> ParallelDims:
    """Build torchtitan's meshes over all ranks: `ep` × FSDP × the other degrees."""
    set_spmd_backend(backend)
    return _meshes(ep, backend, tp, pp, replicate)


@cache  # as in a job: FSDP2 refuses parameters on an equal mesh that is a different object
def _meshes(ep: int, backend: Any, tp: int, pp: int, replicate: int) -> ParallelDims:
    titan_meshes.device_type = "cpu"
    world = dist.get_world_size()
    degrees = {"dp_replicate": replicate, "dp_shard": -1, "cp": 1, "tp": tp, "pp": pp, "ep": ep}
    dims = ParallelDims(**degrees, world_size=world, spmd_backend=backend)
    dims.build_mesh()
    return dims


def moe_config(
    *, groups: int | None, bias: bool, score: str, exact: bool, gpt_oss: bool, num_experts: int = EXPERTS
) -> Any:
    experts: Any = GroupedExperts.Config
    names = ["w1_EFD", "w2_EDF", "w3_EFD"]
    if gpt_oss:
        experts, names = (
            ExactGptOssExperts.Config if exact else GptOssGroupedExperts.Config,
            ["mlp1_weight_EGD", "mlp1_bias_EG", "mlp2_weight_EDF", "mlp2_bias_ED"],
        )
    elif exact:
        experts = ExactExperts.Config
    return make_moe_config(
        num_experts=num_experts,
        load_balance_coeff=1e-2 if bias else None,
        router=make_router_config(
            dim=DIM,
            num_experts=num_experts,
            gate_param_init=LINEAR,
            top_k=TOP_K,
            score_func=score,  # type: ignore[arg-type]  # one of two literals
            route_norm=score == "softmax",
            num_expert_groups=groups,
            num_limited_groups=None if groups is None else groups // 2,
            bias=gpt_oss,
        ),
        routed_experts=RoutedExperts.Config(
            inner_experts=experts(
                dim=DIM, hidden_dim=HIDDEN, num_experts=num_experts, param_init=dict.fromkeys(names, WEIGHT)
            ),
            token_dispatcher=make_token_dispatcher_config(
                num_experts=num_experts, top_k=TOP_K, comm_backend="standard"
            ),
        ),
    )


def tiny_model(
    dims: ParallelDims,
    *,
    seed: int = 0,
    dense: tuple[int, ...] = (),
    groups: int | None = None,
    bias: bool = True,
    score: str = "sigmoid",
    exact: bool = True,
    gpt_oss: bool = False,
    dtype: torch.dtype = torch.float64,
    dim_1: bool = False,
    checkpointing: Any = None,
    num_experts: int = EXPERTS,
    stages: Sequence[Sequence[str]] = (),
) -> list[Qwen3Model]:
    """Build a torchtitan decoder, or parts of it, parallelised as by its `parallelize_qwen3`.

    Args:
        dense: layers without experts.
        groups: number of groups of group-limited routing.
        bias: whether there is an `expert_bias_E`, and the hook that balances by it.
        exact: whether grouped products are in `dtype`, instead of torchtitan's in bfloat16.
        gpt_oss: whether experts are those of gpt-oss, with biases.
        dim_1: whether FSDP shards dim 1 of the experts, as torchtitan does with fewer experts than ranks.
        checkpointing: a torchtitan configuration of activation checkpointing.
        num_experts: of each layer.
        stages: the names of the modules in each part, for a pipeline; the whole model is the only part without.
    """
    rope = CosSinRoPE.Config(dim=8, max_seq_len=SEQUENCE, theta=1e4)
    blocks = []
    for number in range(max(2, len(stages) and NUM_PIPELINED)):
        ffn = make_ffn_config(dim=DIM, hidden_dim=HIDDEN, w1_param_init=LINEAR, w2w3_param_init=LINEAR)
        moe = moe_config(groups=groups, bias=bias, score=score, exact=exact, gpt_oss=gpt_oss, num_experts=num_experts)
        blocks.append(
            Qwen3TransformerBlock.Config(
                attention_norm=RMSNorm.Config(normalized_shape=DIM, param_init=NORM),
                ffn_norm=RMSNorm.Config(normalized_shape=DIM, param_init=NORM),
                attention=make_gqa_config(
                    dim=DIM,
                    n_heads=2,
                    n_kv_heads=2,
                    head_dim=8,
                    wqkv_param_init=LINEAR,
                    wo_param_init=LINEAR,
                    inner_attention=ScaledDotProductAttention.Config(),
                    rope=rope,
                ),
                moe=None if number in dense else moe,
                feed_forward=ffn if number in dense else None,
            )
        )
    config = Qwen3Model.Config(
        dim=DIM,
        vocab_size=VOCABULARY,
        tok_embeddings=Embedding.Config(num_embeddings=VOCABULARY, embedding_dim=DIM, param_init=LINEAR),
        norm=RMSNorm.Config(normalized_shape=DIM, param_init=NORM),
        lm_head=Linear.Config(in_features=DIM, out_features=VOCABULARY, param_init=LINEAR),
        layers=blocks,
    )
    parallelism = ParallelismConfig(expert_parallel_degree=dims.ep, spmd_backend=dims.spmd_backend)
    config.update_from_config(config=SimpleNamespace(parallelism=parallelism))
    if gpt_oss:  # gpt-oss's own model would set this
        for block in blocks:
            layout = dict.fromkeys(block.moe.routed_experts.inner_experts.param_init, spmd.R)
            set_moe_sharding_config(block.moe, enable_ep=True, enable_sp=True, expert_param_layout=layout)
    torch.manual_seed(seed)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        model = config.build()
        # Before sharding, so that the weights do not depend on it.
        model.init_states()
        parts = [_split_module(model, list(names)) for names in stages] if stages else [model]
        # gpt-oss's experts compute in bfloat16 whatever the dtype of their inputs.
        computes_in = torch.bfloat16 if gpt_oss and not exact else dtype
        for part in parts:
            parallelize(part, dims, computes_in, dim_1, checkpointing, num_experts)
    finally:
        torch.set_default_dtype(default)
    return parts


def parallelize(
    model: Qwen3Model, dims: ParallelDims, dtype: torch.dtype, dim_1: bool, checkpointing: Any, num_experts: int
) -> None:
    """Parallelise like `parallelize_qwen3`, which cannot keep float64."""
    if dims.spmd_backend != "partial_dtensor" or dims.ep_enabled:
        model.parallelize(dims)
    if checkpointing is not None:
        checkpointing.build().apply(model)
    if dims.spmd_backend == "partial_dtensor":
        replicate = ["dp_replicate"] if dims.dp_replicate_enabled else []
        dense, dense_axes = dims.get_mesh([*replicate, "fsdp"]), None
        sparse, sparse_axes = dims.get_optional_mesh([*replicate, "efsdp"]) if dims.ep_enabled else None, None
    else:
        dense, dense_axes = resolve_fsdp_mesh(dims)
        sparse, sparse_axes = resolve_sparse_fsdp_mesh(dims)
    experts = [module for module in model.modules() if isinstance(module, GroupedExperts)]
    for module in experts:
        # Torchtitan shards dim 1 if this number of experts is smaller than the number of ranks.
        module.num_experts = 1 if dim_1 else num_experts
    apply_fsdp_to_decoder(
        model,
        dense,
        param_dtype=dtype,
        reduce_dtype=torch.float32 if dtype == torch.bfloat16 else dtype,
        pp_enabled=dims.pp_enabled,
        ep_degree=dims.ep,
        edp_mesh=sparse,
        dp_mesh_dims=dense_axes,
        edp_mesh_dims=sparse_axes,
    )
    for module in experts:
        module.num_experts = num_experts
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)  # gloo cannot scale while it sums


class Job:
    """A training loop as in torchtitan's Trainer: its optimizers, balancing hook, clipping and learning rates.

    Args:
        dims: the meshes.
        steps: length of the learning rate's schedule.
        batch: sequences of an iteration on all ranks.
        micro_batches: forwards of an iteration on each rank, whose gradients are accumulated.
        model: options of `tiny_model`.
    """

    def __init__(self, dims: ParallelDims, *, steps: int, batch: int = 4, micro_batches: int = 1, **model: Any) -> None:
        self.dims, self.batch, self.groups = dims, batch, model.get("groups")
        self.micro_batches, self.num_experts = micro_batches, model.get("num_experts", EXPERTS)
        self.moe_layers = [number for number in range(2) if number not in model.get("dense", ())]
        self.parts = tiny_model(dims, **model)
        self.model = self.parts[0]
        optimizers = default_adamw(lr=1e-2)
        optimizers.implementation = "foreach"  # "fused" needs a GPU
        self.optimizers: OptimizersContainer[Any] = optimizers.build(model_parts=self.parts)
        register_moe_load_balancing_hook(self.optimizers, self.parts, dims)
        schedule = LRSchedulersContainer.Config(warmup_steps=4, decay_ratio=0.5, decay_type="cosine", min_lr_factor=0.1)
        self.schedulers = schedule.build(optimizers=self.optimizers, training_steps=steps)
        self.context = get_spmd_context(parallel_dims=dims)
        self.on_clipped: Callable[[], object] = lambda: None  # called when an iteration's gradients are clipped

    def tokens(self, iteration: int) -> Tensor:
        """Draw this rank's sequences `[B, S + 1]` of an iteration."""
        generator = torch.Generator().manual_seed(1000 + iteration)
        # Skewed, so that some experts are hot; and learnable, because each word depends on the one before.
        words = (torch.rand(self.batch, 1, generator=generator) ** 3 * VOCABULARY).long()
        noise = torch.randint(0, 3, (self.batch, SEQUENCE), generator=generator)
        words = torch.cat([words, noise], 1).cumsum(1).mul(5) % VOCABULARY
        sharing = self.dims.get_optional_mesh("batch")  # the ranks that have different sequences
        each = self.batch // (1 if sharing is None else sharing.size())
        first = 0 if sharing is None else sharing.get_local_rank() * each
        return words[first : first + each]

    def logits(self, iteration: int) -> Tensor:
        """Compute the logits `[B, S, V]` of this rank's sequences, in evaluation."""
        self.model.eval()
        with torch.no_grad(), self.context():
            found = self.forward(self.tokens(iteration)[:, :-1])
        self.model.train()
        return found

    def forward(self, words: Tensor) -> Tensor:
        if self.dims.spmd_backend == "full_dtensor":
            words, _, _ = parallelize_inputs(self.dims, words, words, {})
        logits: Any = self.model(words)
        if self.dims.tp_enabled:  # words are spread over these ranks, which share their sequences
            logits = logits.redistribute(placements=[Replicate()])
        return plain(logits)

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """This rank's part of the mean loss over all ranks' tokens."""
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
        return loss / (self.batch * SEQUENCE)

    def backward(self, iteration: int) -> Tensor:
        """Accumulate an iteration's gradients; return this rank's part of the mean loss over all ranks' tokens."""
        total = torch.zeros((), dtype=torch.float64)
        with self.context():
            for words in self.tokens(iteration).chunk(self.micro_batches):
                loss = self.loss(self.forward(words[:, :-1]), words[:, 1:])
                loss.backward()
                total += loss.detach()
        return total

    def step(self, iteration: int) -> float:
        """Train one iteration; return the mean loss over all ranks' tokens."""
        self.optimizers.zero_grad()
        loss = self.backward(iteration)
        parameters = [parameter for part in self.parts for parameter in part.parameters()]
        pp = self.dims.get_optional_mesh("pp")
        clip_grad_norm_(parameters, 1.0, foreach=False, pp_mesh=pp, ep_enabled=self.dims.ep_enabled)
        self.on_clipped()
        self.optimizers.step()
        self.schedulers.step()
        dist.all_reduce(loss)
        return float(loss)


class PipelineJob(Job):
    """The same over two pipeline ranks, with stages and a schedule as torchtitan builds them.

    Args:
        dims: the meshes, with a pipeline of two ranks.
        schedule: a schedule of `torch.distributed.pipelining`.
        loops: stages on each rank.
        steps, batch, model: as for `Job`.
    """

    def __init__(self, dims: ParallelDims, schedule: Any, loops: int, *, steps: int, batch: int, **model: Any) -> None:
        layers = [f"layers.{number}" for number in range(NUM_PIPELINED)]
        each = NUM_PIPELINED // (2 * loops)
        stages = [layers[first : first + each] for first in range(0, NUM_PIPELINED, each)]
        stages[0], stages[-1] = ["tok_embeddings", *stages[0]], [*stages[-1], "norm", "lm_head"]
        pp = dims.get_mesh("pp")
        own = range(pp.get_local_rank(), 2 * loops, 2)
        super().__init__(dims, steps=steps, batch=batch, stages=[stages[number] for number in own], **model)
        self.moe_layers = [number for index in own for number in range(index * each, (index + 1) * each)]
        built = [
            PipelineStage(part, number, 2 * loops, torch.device("cpu"), group=pp.get_group())
            for number, part in zip(own, self.parts, strict=True)
        ]
        self.schedule = schedule(
            built if loops > 1 else built[0], n_microbatches=MICRO_BATCHES, loss_fn=self.loss, scale_grads=False
        )
        self.is_first, self.is_last = own[0] == 0, own[-1] == 2 * loops - 1

    def backward(self, iteration: int) -> Tensor:
        """Run an iteration's schedule; return this rank's part of the mean loss."""
        words, losses = self.tokens(iteration), list[Tensor]()
        arguments = (words[:, :-1].contiguous(),) if self.is_first else ()
        targets = {"target": words[:, 1:].contiguous(), "losses": losses} if self.is_last else {}
        with self.context():
            self.schedule.step(*arguments, **targets)
        return torch.stack(losses).sum().detach() if losses else torch.zeros((), dtype=torch.float64)


def plain(tensor: Any) -> Tensor:
    """This rank's part of a DTensor, or the tensor."""
    found: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return found
