"""Pretrain a small Megatron-Core GPT with expert parallelism, and rebalance its experts.

    torchrun --standalone --nproc-per-node 2 examples/megatron_moe.py

Takes under a minute on two CPU cores. Each rank trains on its own bytes of the Python standard library's source, with
Megatron-Core's DDP, DistributedOptimizer and schedule. Megatron-Core 0.16 expects CUDA and Transformer Engine, so this
script adapts it to a CPU: `OnCpu` turns every device="cuda" into "cpu" and reports CPU tensors as CUDA tensors to the
optimizers, random states are those of inference (there is no dropout), torch.compile is off, and the one name that is
undefined without Transformer Engine is set to None.
"""

from __future__ import annotations

import argparse

import texts
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel.random import initialize_rng_tracker
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.overrides import TorchFunctionMode

import distplb
from distplb import Record
from distplb.core.cost import mean_of_layers
from distplb.integrations import megatron

ITERATIONS, EVERY, SEQUENCES, LENGTH = 60, 20, 4, 64


class OnCpu(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if "cuda" in str(kwargs.get("device")):
            kwargs["device"] = "cpu"
        found = func(*args, **kwargs)  # a string if func is Tensor.type
        return found.replace("torch.", "torch.cuda.") if isinstance(found, str) else found


def main() -> None:
    dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel(expert_model_parallel_size=2, create_gloo_process_groups=False)
    sizes = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 2, "attention_dropout": 0.0}
    moe = {"num_moe_experts": 16, "moe_ffn_hidden_size": 128, "moe_router_load_balancing_type": "none"}
    moe |= {"expert_model_parallel_size": 2, "moe_token_dispatcher_type": "allgather", "add_bias_linear": False}
    on_cpu = {"use_cpu_initialization": True, "gradient_accumulation_fusion": False, "hidden_dropout": 0.0}
    config = TransformerConfig(**sizes, **moe, **on_cpu)
    config.finalize_model_grads_func = finalize_model_grads
    spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization="LayerNorm")
    torch.manual_seed(dist.get_rank())  # experts differ between ranks; shared parameters are broadcast below
    model = GPTModel(config, spec, vocab_size=256, max_sequence_length=LENGTH)
    model = DistributedDataParallel(config, DistributedDataParallelConfig(use_distributed_optimizer=True), model)
    model.broadcast_params()
    settings = OptimizerConfig(optimizer="adam", lr=3e-3, clip_grad=1.0, use_distributed_optimizer=True)
    optimizer = get_megatron_optimizer(settings, [model], use_gloo_process_groups=False)
    rebalancer = megatron.rebalancer([model], optimizer, every=EVERY, record=Record(on_event=report))
    text = texts.code()
    for iteration in range(ITERATIONS):
        loss = train_step(model, optimizer, text, seed=2 * iteration + dist.get_rank())
        optimizer.zero_grad()  # before the rebalance, which would move gradients too
        rebalancer.step()
        if iteration % 10 == 9 and dist.get_rank() == 0:
            print(f"iteration {iteration + 1:3}  loss {loss:.3f}", flush=True)
    del rebalancer  # it refers to the group, whose threads would otherwise stay alive
    dist.destroy_process_group()


def train_step(model, optimizer, text: torch.Tensor, seed: int) -> float:
    """Train one micro-batch as Megatron-LM's own train_step does."""
    model.zero_grad_buffer()
    starts = torch.randint(len(text) - LENGTH, (SEQUENCES, 1), generator=torch.Generator().manual_seed(seed))
    tokens = text[starts + torch.arange(LENGTH + 1)].long()
    told = []

    def forward(_, model):
        losses = model(tokens[:, :-1], torch.arange(LENGTH).expand(SEQUENCES, -1), None, labels=tokens[:, 1:])
        return losses, lambda losses: (losses.mean(), told.append(float(losses.detach().mean())))

    shapes = {"num_microbatches": 1, "seq_length": LENGTH, "micro_batch_size": SEQUENCES, "forward_only": False}
    get_forward_backward_func()(forward_step_func=forward, data_iterator=None, model=[model], **shapes)
    optimizer.step()
    return told[0]


def report(event: distplb.RebalanceEvent) -> None:
    """Print a rebalance's event twice: when it is done, and with its imbalance on the tokens after it."""
    levels = (event.imbalance_before, event.imbalance_next or event.imbalance_after)
    before, after = (mean_of_layers(of_layers) for of_layers in levels)
    if before is None or after is None:
        return  # the load is not known
    tokens = "the same" if event.imbalance_next is None else "the next"
    if dist.get_rank() == 0:
        print(f"rebalance at {event.iteration}: imbalance {before:.3f} -> {after:.3f} on {tokens} tokens", flush=True)


if __name__ == "__main__":
    argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0]).parse_args()  # it has no options
    torch.compiler.set_stance("force_eager")
    torch.cuda.current_device = lambda: "cpu"
    initialize_rng_tracker(inference_rng_tracker=True)
    moe_utils.te_general_gemm = None
    with OnCpu():
        main()
