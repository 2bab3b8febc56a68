"""Pretrain a tiny Qwen3-MoE of Hugging Face Transformers with expert parallelism, and rebalance its experts.

    torchrun --standalone --nproc-per-node 2 examples/huggingface_moe.py
    torchrun --standalone --nproc-per-node 2 examples/huggingface_moe.py --replica-slots 2

Takes half a minute on two CPU cores. Each rank trains on its own bytes of the Python standard library's source. With
`--replica-slots`, GPUs also lend replicas of hot experts in every step.
"""

from __future__ import annotations

import argparse
import os
from typing import Any

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
HIDDEN = 128  # width of an expert


def main(replica_slots: int) -> None:
    text = texts.code()
    # Called on rank 0 alone. Real jobs sample one of 100 steps, and also pass prices, such as min_quota.
    sampled = {"on_event": report_step, "sample_every": EVERY}
    job = Job(EVERY, replica_slots, HIDDEN, Record(on_event=report), sampled)
    for iteration in range(1, ITERATIONS + 1):
        loss = job.train(batch(text, iteration))
        say(f"iteration {iteration}  loss {loss:.3f}", iteration % EVERY == 0)
    del job  # it refers to the group, whose threads would otherwise stay alive
    dist.destroy_process_group()


class Job:
    """A model, its optimizer and its rebalancer. Building the first one initialises torch.distributed.

    Args:
        every: iterations between rebalances; None for none.
        replica_slots: replicas that a GPU may hold in a step.
        hidden: width of an expert.
        record: what is recorded of rebalances.
        replicas: other options of the `StepBalancer`.
    """

    def __init__(
        self, every: int | None, replica_slots: int, hidden: int, record: Record, replicas: dict[str, Any]
    ) -> None:
        config = Qwen3MoeConfig(
            vocab_size=256,
            hidden_size=64,
            moe_intermediate_size=hidden,
            num_experts=16,
            num_experts_per_tok=2,
            num_hidden_layers=2,
            num_attention_heads=4,
            head_dim=16,
        )
        torch.manual_seed(0)
        model = Qwen3MoeForCausalLM(config)
        # Experts are spread over all ranks; FSDP2 shards the rest.
        ranks = int(os.environ["WORLD_SIZE"])
        parallel, _, meshes = model.prepare_distribute_model(DistributedConfig(fsdp_size=ranks, ep_size=ranks))
        self.model = model.maybe_distribute_model(model, parallel, meshes).train()
        # Experts have their own mesh, and the parameters of one AdamW group must share a mesh.
        meshed: list[list[torch.nn.Parameter]] = [[], []]
        for name, parameter in self.model.named_parameters():
            meshed[".experts." in name].append(parameter)
        self.optimizer = torch.optim.AdamW([{"params": some} for some in meshed], lr=1e-3)
        self.rebalancer = huggingface.rebalancer(
            self.model, self.optimizer, every=every, replica_slots=replica_slots, record=record, replicas=replicas
        )

    def train(self, tokens: Tensor) -> float:
        """Train an iteration; return this rank's loss."""
        loss = self.model(tokens, labels=tokens).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.rebalancer.step()
        return loss.item()


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
