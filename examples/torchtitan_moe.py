"""Pretrain a smaller version of torchtitan's debug Qwen3-MoE with expert parallelism, and rebalance its experts.

    torchrun --standalone --nproc-per-node 2 examples/torchtitan_moe.py

Takes under a minute on two CPU cores. Each rank trains on its own bytes of the Python standard library's source. The
model is built and parallelised as torchtitan's Trainer does it; lines marked "CPU" are only needed without a GPU. To
rebalance a job of the Trainer itself, see `distplb.integrations.torchtitan.rebalancer`.
"""

from __future__ import annotations

import argparse
from types import SimpleNamespace

import texts
import torch
import torch.distributed as dist
import torchtitan.distributed.parallel_dims as titan_meshes
from torch import nn
from torchtitan.components.optimizer import default_adamw
from torchtitan.config import CompileConfig, ParallelismConfig, TrainingConfig
from torchtitan.distributed import ParallelDims
from torchtitan.distributed.utils import set_spmd_backend
from torchtitan.models.common.attention import ScaledDotProductAttention
from torchtitan.models.qwen3 import model_registry

import distplb
from distplb import Record
from distplb.integrations import torchtitan

ITERATIONS, EVERY, SEQUENCES, LENGTH = 45, 15, 4, 64


def main() -> None:
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    parallelism = ParallelismConfig(expert_parallel_degree=2, spmd_backend="partial_dtensor")
    set_spmd_backend(parallelism.spmd_backend)
    titan_meshes.device_type = "cpu"  # CPU
    parallel_dims = ParallelDims.from_config(parallelism, dist.get_world_size())
    spec = model_registry("debugmodel_moe", moe_comm_backend="standard")
    del spec.model.layers[2:]
    for layer in spec.model.layers:
        layer.attention.inner_attention = ScaledDotProductAttention.Config()  # CPU
        layer.moe.routed_experts.inner_experts.hidden_dim = 64
    spec.model.update_from_config(config=SimpleNamespace(parallelism=parallelism))
    model = spec.model.build()
    model.init_states()
    configs = {"training": TrainingConfig(mixed_precision_param="float32"), "compile_config": CompileConfig()}
    configs |= {"parallelism": parallelism, "ac_config": None, "dump_folder": ""}
    model = spec.parallelize_fn(model, parallel_dims=parallel_dims, **configs)
    for module in model.modules():
        if hasattr(module, "set_force_sum_reduction_for_comms"):
            module.set_force_sum_reduction_for_comms(True)  # CPU: gloo cannot scale while it sums

    adamw = default_adamw(lr=1e-3)
    adamw.implementation = "for-loop"  # CPU
    optimizers = adamw.build(model_parts=[model])
    spec.post_optimizer_build_fn(optimizers, [model], parallel_dims)
    rebalancer = torchtitan.rebalancer(
        [model], optimizers, every=EVERY, parallel_dims=parallel_dims, record=Record(on_event=report)
    )

    text = texts.code()
    for iteration in range(1, ITERATIONS + 1):
        words = batch(text, iteration)
        loss = nn.functional.cross_entropy(model(words[:, :-1]).flatten(0, 1), words[:, 1:].flatten())
        (loss / dist.get_world_size()).backward()  # torchtitan's FSDP sums gradients
        optimizers.step()
        optimizers.zero_grad()
        rebalancer.step()
        if iteration % EVERY == 0 and dist.get_rank() == 0:
            print(f"iteration {iteration}  loss {loss.item():.3f}", flush=True)
    del rebalancer  # it refers to the group, whose threads would otherwise stay alive
    dist.destroy_process_group()


def batch(text: torch.Tensor, iteration: int) -> torch.Tensor:
    """Draw a batch `[SEQUENCES, LENGTH + 1]`, a different one on each rank."""
    generator = torch.Generator().manual_seed(1000 * iteration + dist.get_rank())
    starts = torch.randint(len(text) - LENGTH - 1, (SEQUENCES, 1), generator=generator)
    return text[starts + torch.arange(LENGTH + 1)].long()


def report(event: distplb.RebalanceEvent) -> None:
    if event.imbalance_next is not None or dist.get_rank():
        return  # the last event again, after a window under its plan
    # A skipped rebalance has no load, and a layer without tokens has no imbalance.
    for layer, before, after in zip(event.layers, event.imbalance_before, event.imbalance_after, strict=False):
        if before is not None and after is not None:
            print(f"{layer}: imbalance {before:.4f} -> {after:.4f}")
    print(f"{event.slots_moved} slots moved ({event.reason})")


if __name__ == "__main__":
    argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0]).parse_args()  # it has no options
    main()
