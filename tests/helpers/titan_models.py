"""Tiny torchtitan models for tests: its own modules, meshes, optimizers and functions, on processes without a GPU.

Torchtitan's Trainer expects a GPU, so four things differ from its jobs: the device type of the meshes is "cpu", FSDP2's
reductions are plain sums, attention is `ScaledDotProductAttention` (torchtitan's language models use others, which need
CUDA), and `exact=True` replaces the grouped product, which rounds to bfloat16, by one in the precision of the weights.

Shapes: E experts, e experts on this GPU, R rows routed to them, D model width, F hidden width, V words.
"""

from __future__ import annotations

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
from torchtitan.components.optimizer import OptimizersContainer, default_adamw, register_moe_load_balancing_hook
from torchtitan.components.optimizer.lr_scheduler import LRSchedulersContainer
from torchtitan.config.configs import ParallelismConfig
from torchtitan.distributed import ParallelDims
from torchtitan.distributed.fsdp import apply_fsdp_to_decoder
from torchtitan.distributed.full_dtensor import parallelize_inputs, resolve_fsdp_mesh, resolve_sparse_fsdp_mesh
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
from torchtitan.models.gpt_oss.moe import GptOssGroupedExperts
from torchtitan.models.qwen3.model import Qwen3Model, Qwen3TransformerBlock

__all__ = ["EXPERTS", "SEQUENCE", "TOP_K", "Job", "meshes", "tiny_model"]

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


def moe_config(*, groups: int | None, bias: bool, score: str, exact: bool, gpt_oss: bool) -> Any:
    experts: Any = GroupedExperts.Config
    names = ["w1_EFD", "w2_EDF", "w3_EFD"]
    if gpt_oss:
        experts, names = (
            GptOssGroupedExperts.Config,
            ["mlp1_weight_EGD", "mlp1_bias_EG", "mlp2_weight_EDF", "mlp2_bias_ED"],
        )
    elif exact:
        experts = ExactExperts.Config
    return make_moe_config(
        num_experts=EXPERTS,
        load_balance_coeff=1e-2 if bias else None,
        router=make_router_config(
            dim=DIM,
            num_experts=EXPERTS,
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
                dim=DIM, hidden_dim=HIDDEN, num_experts=EXPERTS, param_init=dict.fromkeys(names, WEIGHT)
            ),
            token_dispatcher=make_token_dispatcher_config(num_experts=EXPERTS, top_k=TOP_K, comm_backend="standard"),
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
) -> Qwen3Model:
    """Build a torchtitan decoder, parallelised as by its `parallelize_qwen3`.

    Args:
        dense: layers without experts.
        groups: number of groups of group-limited routing.
        bias: whether there is an `expert_bias_E`, and the hook that balances by it.
        exact: whether grouped products are in `dtype`, instead of torchtitan's in bfloat16.
        dim_1: whether FSDP shards dim 1 of the experts, as torchtitan does with fewer experts than ranks.
        checkpointing: a torchtitan configuration of activation checkpointing.
    """
    rope = CosSinRoPE.Config(dim=8, max_seq_len=SEQUENCE, theta=1e4)
    blocks = []
    for number in range(2):
        ffn = make_ffn_config(dim=DIM, hidden_dim=HIDDEN, w1_param_init=LINEAR, w2w3_param_init=LINEAR)
        moe = moe_config(groups=groups, bias=bias, score=score, exact=exact, gpt_oss=gpt_oss)
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
        # gpt-oss's experts compute in bfloat16 whatever the dtype of their inputs.
        parallelize(model, dims, torch.bfloat16 if gpt_oss else dtype, dim_1, checkpointing)
    finally:
        torch.set_default_dtype(default)
    return model


def parallelize(model: Qwen3Model, dims: ParallelDims, dtype: torch.dtype, dim_1: bool, checkpointing: Any) -> None:
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
        module.num_experts = 1 if dim_1 else EXPERTS
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
        module.num_experts = EXPERTS
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)  # gloo cannot scale while it sums


class Job:
    """A training loop as in torchtitan's Trainer: its optimizers, balancing hook, clipping and learning rates.

    Args:
        dims: the meshes.
        steps: length of the learning rate's schedule.
        batch: sequences of an iteration on all ranks.
        model: options of `tiny_model`.
    """

    def __init__(self, dims: ParallelDims, *, steps: int, batch: int = 4, **model: Any) -> None:
        self.dims, self.batch, self.groups = dims, batch, model.get("groups")
        self.moe_layers = [number for number in range(2) if number not in model.get("dense", ())]
        self.model = tiny_model(dims, **model)
        optimizers = default_adamw(lr=1e-2)
        optimizers.implementation = "foreach"  # "fused" needs a GPU
        self.optimizers: OptimizersContainer[Any] = optimizers.build(model_parts=[self.model])
        register_moe_load_balancing_hook(self.optimizers, [self.model], dims)
        schedule = LRSchedulersContainer.Config(warmup_steps=4, decay_ratio=0.5, decay_type="cosine", min_lr_factor=0.1)
        self.schedulers = schedule.build(optimizers=self.optimizers, training_steps=steps)
        self.context = get_spmd_context(parallel_dims=dims)

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
        found: Tensor = logits.to_local() if hasattr(logits, "to_local") else logits
        return found

    def backward(self, iteration: int) -> Tensor:
        """Accumulate an iteration's gradients; return this rank's part of the mean loss over all ranks' tokens."""
        words = self.tokens(iteration)
        with self.context():
            logits = self.forward(words[:, :-1])
            loss = F.cross_entropy(logits.flatten(0, 1), words[:, 1:].flatten(), reduction="sum")
            loss = loss / (self.batch * SEQUENCE)
            loss.backward()
        return loss.detach()

    def step(self, iteration: int) -> float:
        """Train one iteration; return the mean loss over all ranks' tokens."""
        self.optimizers.zero_grad()
        loss = self.backward(iteration)
        clip_grad_norm_(list(self.model.parameters()), 1.0, foreach=False, ep_enabled=self.dims.ep_enabled)
        self.optimizers.step()
        self.schedulers.step()
        dist.all_reduce(loss)
        return float(loss)
