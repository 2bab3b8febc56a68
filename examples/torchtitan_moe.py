"""Pretrain a smaller version of torchtitan's debug Qwen3-MoE with expert parallelism, and rebalance its experts.

    torchrun --standalone --nproc-per-node 2 examples/torchtitan_moe.py --replica-slots 2

Takes about a minute on two CPU cores. Each rank trains on its own bytes of the Python standard library's source. The
model is built and parallelised as torchtitan's Trainer does it; lines marked "CPU" are only needed without a GPU. To
rebalance a job of the Trainer itself, see `distplb.integrations.torchtitan.rebalancer`.
"""

from __future__ import annotations

import argparse
from types import SimpleNamespace
from typing import Any

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

TOLD_EVERY, SEQUENCES, LENGTH = 15, 4, 64


def main(options: argparse.Namespace) -> None:
    dist.init_process_group("gloo")
    text, steps = texts.code(), Steps()
    # Every step is sampled. Real jobs sample one of 100, and also pass prices, such as min_quota.
    sampled = {"on_event": lambda event: steps.add(event), "sample_every": 1}
    job = Job(options.every or None, options.replica_slots, options.hidden, Record(on_event=report), sampled)
    for iteration in range(1, options.iterations + 1):
        loss = job.train(batch(text, iteration))
        if iteration % TOLD_EVERY == 0 and dist.get_rank() == 0:
            print(f"iteration {iteration}  loss {loss:.3f}  {steps}", flush=True)
            steps = Steps()
    del job  # it refers to the group, whose threads would otherwise stay alive
    dist.destroy_process_group()


class Job:
    """A model, its optimizers and its rebalancer.

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
        torch.manual_seed(0)
        titan_meshes.device_type = "cpu"  # CPU
        parallelism = ParallelismConfig(expert_parallel_degree=dist.get_world_size(), spmd_backend="partial_dtensor")
        set_spmd_backend(parallelism.spmd_backend)
        parallel_dims = ParallelDims.from_config(parallelism, dist.get_world_size())
        spec = model_registry("debugmodel_moe", moe_comm_backend="standard")
        del spec.model.layers[2:]
        for layer in spec.model.layers:
            layer.attention.inner_attention = ScaledDotProductAttention.Config()  # CPU
            layer.moe.routed_experts.inner_experts.hidden_dim = hidden
        spec.model.update_from_config(config=SimpleNamespace(parallelism=parallelism))
        self.model = spec.model.build()
        self.model.init_states()
        configs = {"training": TrainingConfig(mixed_precision_param="float32"), "compile_config": CompileConfig()}
        configs |= {"parallelism": parallelism, "ac_config": None, "dump_folder": ""}
        self.model = spec.parallelize_fn(self.model, parallel_dims=parallel_dims, **configs)
        for module in self.model.modules():
            if hasattr(module, "set_force_sum_reduction_for_comms"):
                module.set_force_sum_reduction_for_comms(True)  # CPU: gloo cannot scale while it sums
        adamw = default_adamw(lr=1e-3)
        adamw.implementation = "for-loop"  # CPU
        self.optimizers = adamw.build(model_parts=[self.model])
        spec.post_optimizer_build_fn(self.optimizers, [self.model], parallel_dims)
        self.rebalancer = torchtitan.rebalancer(
            [self.model],
            self.optimizers,
            every=every,
            replica_slots=replica_slots,
            parallel_dims=parallel_dims,
            record=record,
            replicas=replicas,
        )

    def train(self, words: torch.Tensor) -> float:
        """Train an iteration; return this rank's loss."""
        loss = nn.functional.cross_entropy(self.model(words[:, :-1]).flatten(0, 1), words[:, 1:].flatten())
        (loss / dist.get_world_size()).backward()  # torchtitan's FSDP sums gradients
        self.optimizers.step()
        self.optimizers.zero_grad()
        self.rebalancer.step()
        return loss.item()


class Steps:
    """Means over the layers of the steps that it was told of."""

    def __init__(self) -> None:
        self.layers: list[tuple[float, float]] = []  # imbalance before and after
        self.replicas = 0

    def add(self, event: distplb.StepEvent) -> None:
        """Take a step's record."""
        both = zip(event.imbalance_before, event.imbalance_after, strict=True)
        self.layers += [(before, after) for before, after in both if before is not None and after is not None]
        self.replicas += event.num_replicas

    def __str__(self) -> str:
        """The imbalance of steps; nothing if no replicas are lent."""
        if not self.layers:
            return ""
        before, after = (sum(column) / len(self.layers) for column in zip(*self.layers, strict=True))
        each = self.replicas / len(self.layers)
        return f"imbalance of steps {before:.4f} -> {after:.4f} with {each:.2f} replicas in a layer"


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
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--replica-slots", type=int, default=0, help="replicas that a GPU may hold in a step")
    parser.add_argument("--every", type=int, default=15, help="iterations between rebalances; 0 for none")
    parser.add_argument("--iterations", type=int, default=45, help="of training")
    parser.add_argument("--hidden", type=int, default=64, help="hidden width of an expert")
    given = parser.parse_args()
    main(given)
