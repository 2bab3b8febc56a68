"""Pretrain a tiny Qwen3-MoE of Hugging Face Transformers with expert parallelism, and rebalance its experts.

    torchrun --standalone --nproc-per-node 2 examples/huggingface_moe.py
    torchrun --standalone --nproc-per-node 2 examples/huggingface_moe.py --replica-slots 2

Takes half a minute on two CPU cores. Each rank trains on its own bytes of the Python standard library's source. With
`--replica-slots`, GPUs also lend replicas of hot experts in every step.
"""

from __future__ import annotations

import argparse

import texts
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.distributed import DistributedConfig

import distplb
from distplb import Record
from distplb.integrations import huggingface

ITERATIONS, EVERY, SEQUENCES, LENGTH = 45, 15, 8, 64


def main(replica_slots: int) -> None:
    config = Qwen3MoeConfig(
        vocab_size=256,
        hidden_size=64,
        moe_intermediate_size=128,
        num_experts=16,
        num_experts_per_tok=2,
        num_hidden_layers=2,
        num_attention_heads=4,
        head_dim=16,
    )
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(config)
    # Each rank holds half of the experts; FSDP2 shards the rest. This also initialises torch.distributed.
    parallel, _, meshes = model.prepare_distribute_model(DistributedConfig(fsdp_size=2, ep_size=2))
    model = model.maybe_distribute_model(model, parallel, meshes).train()

    # Experts have their own mesh, and the parameters of one AdamW group must share a mesh.
    meshed: list[list[torch.nn.Parameter]] = [[], []]
    for name, parameter in model.named_parameters():
        meshed[".experts." in name].append(parameter)
    optimizer = torch.optim.AdamW([{"params": some} for some in meshed], lr=1e-3)
    rebalancer = huggingface.rebalancer(
        model,
        optimizer,
        every=EVERY,
        replica_slots=replica_slots,
        # Called on rank 0 alone. Real jobs sample one of 100 steps, and also pass prices, such as min_quota.
        replicas={"on_event": report_step if dist.get_rank() == 0 else None, "sample_every": EVERY},
        record=Record(on_event=report),
    )

    text = texts.code()
    for iteration in range(1, ITERATIONS + 1):
        tokens = batch(text, iteration)
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        rebalancer.step()
        say(f"iteration {iteration}  loss {loss.item():.3f}", iteration % EVERY == 0)
    del rebalancer  # it refers to the group, whose threads would otherwise stay alive
    dist.destroy_process_group()


def batch(text: Tensor, iteration: int) -> Tensor:
    """Draw a batch `[SEQUENCES, LENGTH]`, a different one on each rank."""
    generator = torch.Generator().manual_seed(1000 * iteration + dist.get_rank())
    starts = torch.randint(len(text) - LENGTH, (SEQUENCES, 1), generator=generator)
    return text[starts + torch.arange(LENGTH)].long()


def report(event: distplb.RebalanceEvent) -> None:
    if event.imbalance_next is not None:
        return  # the last event again, after a window under its plan
    # A skipped rebalance has no load, and a layer without tokens has no imbalance.
    for layer, before, after in zip(event.layers, event.imbalance_before, event.imbalance_after, strict=False):
        if before is not None and after is not None:
            say(f"{layer}: imbalance {before:.4f} -> {after:.4f}")
    say(f"{event.slots_moved} slots moved ({event.reason}); router ties {event.router_ties}")


def report_step(event: distplb.StepEvent) -> None:
    for layer, before, after, replicas in zip(
        event.layers, event.imbalance_before, event.imbalance_after, event.replicas, strict=True
    ):
        if before is not None and after is not None:
            say(f"step {event.step}, {layer}: imbalance {before:.4f} -> {after:.4f}, replicas: {len(replicas)}")


def say(line: str, now: bool = True) -> None:
    if now and dist.get_rank() == 0:
        print(line, flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--replica-slots", type=int, default=0, help="replicas that a GPU may hold in one step")
    options = parser.parse_args()
    main(options.replica_slots)
