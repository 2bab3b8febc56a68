"""Tiny Megatron-Core jobs for tests: its own models, DDP, optimizers and schedules, on processes without a GPU.

Megatron-Core expects CUDA and Transformer Engine, so the following is replaced, and nothing else:

- `device="cuda"` in any torch call becomes "cpu", `torch.cuda.current_device()` returns "cpu", and `tensor.type()` of a
  CPU tensor returns the CUDA type, because the optimizers check it (a `TorchFunctionMode`);
- in "float64", every float32 that Megatron-Core requests becomes float64, and `.float()` is `.double()`, so that runs
  agree to 1e-8; "mixed" is float32 with separate main parameters in float64, where a job has bfloat16 and float32, so
  that runs agree to 1e-3; "bfloat16" is as in a job;
- the all-to-all dispatcher's CUDA stream does nothing, and its counts become NumPy arrays, as they do on CUDA;
- `torch.compile` is off, the random states are the inference tracker's (there is no dropout), and
  `moe_utils.te_general_gemm`, which Megatron-Core 0.16.1 leaves undefined without Transformer Engine, is None;
- for GroupedMLP, the grouped GEMM is a loop of plain products, and its config claims bfloat16.

Shapes: E experts, G slots on this GPU, N tokens.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from functools import wraps
from types import SimpleNamespace
from typing import Any

import megatron.core.transformer.moe.experts as megatron_experts
import megatron.core.transformer.moe.moe_utils as megatron_moe
import megatron.core.transformer.moe.token_dispatcher as megatron_dispatchers
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel.random import initialize_rng_tracker
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["EXPERTS", "Job", "groups"]

# Three experts on each of two GPUs and three layers: the middle of the buffer that two ranks share is inside an expert.
EXPERTS, DIM, HIDDEN, VOCABULARY, SEQUENCE, BATCH = 6, 16, 12, 32, 8, 2


_WIDER = {"DoubleTensor": "FloatTensor"}


class _AsOnCuda(TorchFunctionMode):
    def __init__(self, precision: str) -> None:
        super().__init__()
        self.precision = precision

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if "cuda" in str(kwargs.get("device")):
            kwargs["device"] = "cpu"
        if self.precision == "float64":
            args = tuple(torch.float64 if value is torch.float32 else value for value in args)
            kwargs = {key: torch.float64 if value is torch.float32 else value for key, value in kwargs.items()}
        if self.precision != "bfloat16" and func is torch.Tensor.float:
            func = torch.Tensor.double
        found = func(*args, **kwargs)
        if func is torch.Tensor.type and isinstance(found, str):
            kind = found.removeprefix("torch.")
            known = {"bfloat16": {}, "float64": _WIDER, "mixed": _WIDER | {"FloatTensor": "HalfTensor"}}
            return "torch.cuda." + known[self.precision].get(kind, kind)
        return found


class _NoStream:
    def record_event(self) -> _NoStream:
        return self

    def synchronize(self) -> None:
        pass


_STREAM = _NoStream()


def _on_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    return tensor.numpy() if as_numpy and isinstance(tensor, Tensor) else tensor


def _grouped_product(rows: Tensor, weights: Tensor, counts: Tensor, trans_b: bool = False) -> Tensor:
    parts = rows.split(counts.tolist())
    return torch.cat([part @ weight for part, weight in zip(parts, weights, strict=True)])


def _prepare() -> None:
    """Replace what a `TorchFunctionMode` cannot, in this process, which has no GPU and ends after the test."""
    torch.compiler.set_stance("force_eager")
    initialize_rng_tracker(inference_rng_tracker=True)
    cuda: Any = torch.cuda
    cuda.current_device = lambda: "cpu"
    cuda.Stream = lambda *_, **__: _STREAM
    cuda.current_stream = lambda *_: _STREAM
    cuda.stream = lambda _: contextlib.nullcontext()
    cuda.synchronize = lambda *_: None
    megatron_dispatchers.maybe_move_tensor_to_cpu = _on_cpu
    megatron_moe.te_general_gemm = None
    megatron_experts.gg = SimpleNamespace(
        ops=SimpleNamespace(gmm=_grouped_product), assert_grouped_gemm_is_available=lambda: None
    )


def _as_on_cuda(method: Callable[..., Any]) -> Callable[..., Any]:
    """Pretend to run on CUDA inside the method; distplb moves experts without this pretence."""

    @wraps(method)
    def inside(job: Job, *arguments: Any, **options: Any) -> Any:
        with _AsOnCuda(job.precision):
            return method(job, *arguments, **options)

    return inside


@contextlib.contextmanager
def groups(expert_parallel: int = 2, pipeline: int = 1) -> Iterator[None]:
    """Create Megatron's process groups for the duration of the block."""
    _prepare()
    parallel_state.initialize_model_parallel(
        expert_model_parallel_size=expert_parallel,
        pipeline_model_parallel_size=pipeline,
        create_gloo_process_groups=False,
    )
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()


class Job:
    """A model of MoE layers, its optimizer and schedule, trained as Megatron-LM's `train_step` does.

    Args:
        precision: "float64", "mixed" or "bfloat16", as described above.
        distributed: whether to use DistributedOptimizer.
        overlap: whether gradients are reduced during the backward pass, and parameters gathered in the next forward.
        grouped: whether experts are a GroupedMLP.
        config: fields of TransformerConfig that override those below.
    """

    def __init__(
        self,
        *,
        precision: str = "float64",
        distributed: bool = True,
        overlap: bool = False,
        grouped: bool = False,
        **config: Any,
    ) -> None:
        self.precision = precision
        self._build(distributed, overlap, grouped, config)

    @_as_on_cuda
    def _build(self, distributed: bool, overlap: bool, grouped: bool, config: dict[str, Any]) -> None:
        dtype = {"float64": torch.float64, "mixed": torch.float32, "bfloat16": torch.bfloat16}[self.precision]
        half = self.precision == "bfloat16"
        stages = parallel_state.get_pipeline_model_parallel_world_size()
        self.config = TransformerConfig(
            **{
                "num_layers": 3,
                "hidden_size": DIM,
                "num_attention_heads": 2,
                "ffn_hidden_size": 24,
                "moe_ffn_hidden_size": HIDDEN,
                "num_moe_experts": EXPERTS,
                "moe_router_topk": 2,
                "moe_router_load_balancing_type": "none",
                "moe_token_dispatcher_type": "alltoall",
                "moe_grouped_gemm": grouped,
                "expert_model_parallel_size": parallel_state.get_expert_model_parallel_world_size(),
                "pipeline_model_parallel_size": stages,
                "gated_linear_unit": True,
                "activation_func": torch.nn.functional.silu,
                "add_bias_linear": False,
                "params_dtype": dtype,
                "pipeline_dtype": dtype,
                "bf16": half,
                "init_method_std": 0.3,
                "use_cpu_initialization": True,
                "attention_dropout": 0.0,
                "hidden_dropout": 0.0,
                "gradient_accumulation_fusion": False,
                "bias_dropout_fusion": False,
                "bias_activation_fusion": False,
                "masked_softmax_fusion": False,
                "apply_rope_fusion": False,
                "persist_layer_norm": False,
            }
            | config
        )
        torch.manual_seed(0)
        spec = get_gpt_decoder_block_spec(self.config, use_transformer_engine=False, normalization="LayerNorm")
        model: Any = GPTModel(
            self.config,
            spec,
            vocab_size=VOCABULARY,
            max_sequence_length=SEQUENCE,
            pre_process=parallel_state.is_pipeline_first_stage(),
            post_process=parallel_state.is_pipeline_last_stage(),
        )
        self.moes: list[Any] = [module for module in model.modules() if isinstance(module, MoELayer)]
        for moe in self.moes:
            _draw_weights(moe)
            if grouped:  # GroupedMLP requires bfloat16 in its config, whatever its inputs are
                moe.experts.config = copy.copy(self.config)
                moe.experts.config.bf16 = True
        self.config.finalize_model_grads_func = finalize_model_grads
        ddp = DistributedDataParallelConfig(
            use_distributed_optimizer=distributed, overlap_grad_reduce=overlap, overlap_param_gather=overlap
        )
        if overlap:
            ddp.bucket_size = 2000  # several buckets
        self.model = DistributedDataParallel(
            self.config, ddp, Float16Module(self.config, model) if half else model.to(dtype)
        )
        self.chunks = [self.model]
        self.optimizer: Any = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=1e-2,
                min_lr=1e-3,
                weight_decay=0.1,
                clip_grad=0.5,
                bf16=half,
                params_dtype=dtype,
                use_distributed_optimizer=distributed,
                overlap_param_gather=overlap,
            ),
            self.chunks,
            use_gloo_process_groups=False,
        )
        self.schedule = OptimizerParamScheduler(
            self.optimizer,
            init_lr=0.0,
            max_lr=1e-2,
            min_lr=1e-3,
            lr_warmup_steps=5,
            lr_decay_steps=40,
            lr_decay_style="cosine",
            start_wd=0.05,
            end_wd=0.1,
            wd_incr_steps=40,
            wd_incr_style="linear",
        )
        self.norms: list[float] = []

    @_as_on_cuda
    def train(self, iteration: int, micro_batches: int = 2) -> float:
        """Train one iteration; return the mean loss over all ranks, on all ranks."""
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        told = self._forwards(iteration, micro_batches, forward_only=False)
        successful, norm, _ = self.optimizer.step()
        assert successful
        self.schedule.step(increment=1)
        self.optimizer.zero_grad()
        self.norms.append(float(norm))
        losses = torch.tensor([sum(told, 0.0), len(told)], dtype=torch.float64)
        dist.all_reduce(losses)
        return float(losses[0] / losses[1])

    @_as_on_cuda
    @torch.no_grad()
    def logits(self, iteration: int = 0) -> Tensor:
        """Compute the logits of one batch, on a pipeline of one stage."""
        tokens, positions = _batch(iteration, 0)
        found: Tensor = self.model(tokens, positions, None)
        return found.detach().clone()

    @_as_on_cuda
    def evaluate(self, iteration: int) -> None:
        """Run a forward pass in evaluation."""
        self.model.eval()
        self._forwards(iteration, 1, forward_only=True)
        self.model.train()

    @_as_on_cuda
    def forward_backward(self, iteration: int) -> None:
        """Compute the gradients of one iteration."""
        self.model.zero_grad_buffer()
        self._forwards(iteration, 2, forward_only=False)

    def have_it_step_as_on_cuda(self) -> None:
        """Make the optimizer's step pretend to run on CUDA, for loops that call it themselves."""
        step = self.optimizer.step

        def inside(*arguments: Any) -> Any:
            with _AsOnCuda(self.precision):
                return step(*arguments)

        self.optimizer.step = inside

    def _forwards(self, iteration: int, micro_batches: int, forward_only: bool) -> list[float]:
        told: list[float] = []

        def forward(batches: Iterator[tuple[Tensor, Tensor]], model: Any) -> Any:
            tokens, positions = next(batches)
            output = model(tokens, positions, None, labels=tokens.roll(1, 1))

            def loss_of(values: Tensor) -> Any:
                told.append(float(values.detach().mean()))
                return values.mean(), {}

            return output, loss_of

        get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=iter([_batch(iteration, number) for number in range(micro_batches)]),
            model=self.chunks,
            num_microbatches=micro_batches,
            seq_length=SEQUENCE,
            micro_batch_size=BATCH,
            forward_only=forward_only,
        )
        return told

    # --- values of experts, read without the adapter ----------------------------------------------------------

    @_as_on_cuda
    @torch.no_grad()
    def by_slot(self) -> dict[str, Tensor]:
        """Gather weights, main parameters and moments of all experts and router rows from all ranks, `[P, ...]` each.

        They are read from the optimizers' own maps; main parameters and moments are joined from all their shards.
        """
        if self.model.ddp_config.overlap_param_gather:
            self.model.start_param_sync(force_sync=True)  # as before a checkpoint
        found: dict[str, Tensor] = {}
        for moe in self.moes:
            name = f"layer {moe.layer_number - 1}"
            copies = parallel_state.get_expert_data_parallel_group()
            for key, parameters in _of_experts(moe):
                for kind in ("weight", "main", "exp_avg", "exp_avg_sq"):
                    each = torch.stack([self._of(kind, p, copies) for p in parameters])
                    own = each.flatten().view(moe.num_local_experts, -1)
                    ranks = [torch.empty_like(own) for _ in range(moe.ep_group.size())]
                    dist.all_gather(ranks, own, group=moe.ep_group)
                    found[f"{name} {key} {kind}"] = torch.cat(ranks)
            dense = parallel_state.get_data_parallel_group(with_context_parallel=True)
            for kind in ("weight", "main", "exp_avg", "exp_avg_sq"):
                found[f"{name} router {kind}"] = self._of(kind, moe.router.weight, dense)
            if moe.router.expert_bias is not None:
                found[f"{name} expert_bias"] = moe.router.expert_bias.clone()
        return found

    def _of(self, kind: str, parameter: Tensor, copies: Any) -> Tensor:
        """Return a parameter, or its state in the optimizer, whole and in the parameter's shape."""
        if kind == "weight":
            return parameter.detach().clone()
        for optimizer in self.optimizer.chained_optimizers:
            if not isinstance(optimizer, DistributedOptimizer):
                main = getattr(parameter, "main_param", parameter)
                if main in optimizer.optimizer.state:
                    state = optimizer.optimizer.state[main]
                    return (main if kind == "main" else state[kind]).detach().clone()
                continue
            for buffer in optimizer.buffers:
                if parameter in buffer.param_index_map:
                    return self._from_shards(kind, parameter, optimizer, buffer, copies)
        raise AssertionError("no optimizer has the parameter")

    def _from_shards(self, kind: str, parameter: Any, optimizer: Any, buffer: Any, copies: Any) -> Tensor:
        whole = torch.zeros(parameter.numel(), dtype=torch.float64)
        if parameter in optimizer.model_param_gbuf_map:
            groups_of = [optimizer.model_float16_groups, optimizer.model_fp32_groups]
            shards_of = [optimizer.shard_fp32_from_float16_groups, optimizer.shard_fp32_groups]
            shard = next(
                shard
                for parameters, shards in zip(groups_of, shards_of, strict=True)
                for model_group, shard_group in zip(parameters, shards, strict=True)
                for model, shard in zip(model_group, shard_group, strict=True)
                if model is parameter
            )
            values = shard if kind == "main" else optimizer.optimizer.state[shard][kind]
            # By the buffer's map: the start of this rank's range in the buffer minus the start of the parameter.
            held = optimizer._get_model_param_range_map(parameter)["gbuf_world"]
            start = held.start - buffer.param_index_map[parameter][0]
            whole[start : start + values.numel()] = values.detach().flatten()
        dist.all_reduce(whole, group=copies)
        return whole.view(parameter.shape)


def _of_experts(moe: Any) -> list[tuple[str, list[Any]]]:
    """List each kind of expert parameter: one tensor for all experts of this GPU, or one tensor for each."""
    if hasattr(moe.experts, "weight1"):
        return [(key, [getattr(moe.experts, key)]) for key in ("weight1", "weight2")]
    experts = list(moe.experts.local_experts)
    return [(key, [getattr(expert, key).weight for expert in experts]) for key in ("linear_fc1", "linear_fc2")]


@torch.no_grad()
def _draw_weights(moe: Any) -> None:
    """Draw different experts on each EP rank; Megatron-Core's CPU initialisation gives all ranks the same."""
    generator = torch.Generator().manual_seed(moe.layer_number)
    # Uneven: some experts are hot.
    moe.router.weight.copy_(torch.randn(moe.router.weight.shape, generator=generator))
    for _, parameters in _of_experts(moe):
        own = torch.cat([parameter.data.view(-1) for parameter in parameters])  # [G * row]
        drawn = 0.3 * torch.randn(moe.router.num_experts, own.numel() // moe.num_local_experts, generator=generator)
        held = drawn[moe.local_expert_indices].flatten()
        for parameter, values in zip(parameters, held.chunk(len(parameters)), strict=True):
            parameter.copy_(values.view(parameter.shape))


def _batch(iteration: int, number: int) -> tuple[Tensor, Tensor]:
    """Draw tokens and positions of one micro-batch of this data-parallel rank."""
    seed = 10_000 * iteration + 100 * number + parallel_state.get_data_parallel_rank()
    generator = torch.Generator().manual_seed(seed)
    # Squared, so that some words, and with them some experts, are far more frequent than others.
    tokens = (torch.rand(BATCH, SEQUENCE, generator=generator).square() * VOCABULARY).long()
    return tokens, torch.arange(SEQUENCE).expand(BATCH, -1)
