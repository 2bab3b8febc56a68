"""Expert-parallel size 2 × expert-data-parallel size 2, with the experts' optimizer state sharded over the latter.

A run with moves equals the run without them, to a relative 1e-8 in float64, as in `test_training`, whose batches and
comparison are used here. Ranks 0 and 1 are one EP group, 2 and 3 the other; ranks 0 and 2 hold the same experts.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from jobs import FREE
from ranks import on_ranks
from torch import Tensor
from training_runs import EXPERTS, batch, furthest

import distplb
from distplb.comm.torchdist import TorchComm

GPUS, ITERATIONS, EVERY, RANDOM_EVERY = 2, 36, 5, 7


class ShardedExperts:
    """The optimizer of one expert tensor: each of its two holders steps on half of the elements and broadcasts them.

    A minimal version of ZeRO stage 1 and Megatron-Core's distributed optimizer, for one tensor.
    """

    def __init__(self, weight: torch.nn.Parameter, copies: dist.ProcessGroup) -> None:
        self.weight, self.copies = weight, copies
        # Uneven on purpose: the cut goes through an expert.
        self.cut = weight.numel() // 2 - 100
        start, stop = ((0, self.cut), (self.cut, weight.numel()))[dist.get_rank(copies)]
        self.shard = distplb.FlatShard(torch.nn.Parameter(weight.detach().flatten()[start:stop].clone()), start)

    def take_gradient(self) -> None:
        assert self.weight.grad is not None
        dist.all_reduce(self.weight.grad, group=self.copies)
        count = self.shard.values.numel()
        self.shard.values.grad = self.weight.grad.flatten()[self.shard.start : self.shard.start + count].clone()

    def share_values(self) -> None:
        flat = self.weight.detach().view(-1)
        flat[self.shard.start : self.shard.start + self.shard.values.numel()] = self.shard.values.detach()
        for copy, part in enumerate((flat[: self.cut], flat[self.cut :])):
            dist.broadcast(part, dist.get_global_rank(self.copies, copy), group=self.copies)


def trained(moves: bool, leave_behind: bool = False) -> dict[str, Tensor]:
    sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
    from moe_model import Config, Transformer

    rank = dist.get_rank()
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]  # EP groups
    copies = [dist.new_group([0, 2]), dist.new_group([1, 3])]  # ranks with the same experts
    sizes = {"layers": 2, "experts": EXPERTS, "dim": 32, "ffn": 48, "heads": 2, "max_sequence": 24}
    model = Transformer(Config(**sizes), groups[rank // GPUS], seed=0, dtype=torch.float64)
    experts = [
        {key: ShardedExperts(weight, copies[rank % GPUS]) for key, weight in (("in", moe.w_in), ("out", moe.w_out))}
        for moe in model.moes
    ]
    spread = {id(each.weight) for layer in experts for each in layer.values()}
    replicated = [p for p in model.parameters() if id(p) not in spread]
    shards = [each.shard.values for layer in experts for each in layer.values()]
    optimizer = torch.optim.AdamW([*shards, *replicated], lr=3e-3)
    rebalancer = described(model, experts, optimizer)
    rebalancer.enabled = moves
    generator = torch.Generator().manual_seed(1)
    losses = []
    for iteration in range(ITERATIONS):
        loss = model(*batch(iteration))
        model.backward(loss / 2)  # the mean over both EP groups
        for parameter in replicated:
            assert parameter.grad is not None
            dist.all_reduce(parameter.grad, group=copies[rank % GPUS])
        for each in (each for layer in experts for each in layer.values()):
            each.take_gradient()
        optimizer.step()
        for each in (each for layer in experts for each in layer.values()):
            each.share_values()
        model.zero_grad()
        optimizer.zero_grad()
        rebalancer.step()
        if moves and iteration % RANDOM_EVERY == 0:
            moment = optimizer.state[shards[0]]["exp_avg"]
            kept = moment[:1536].clone()  # the first slot's, 32 × 48 elements
            tables = [torch.randperm(EXPERTS, generator=generator) for _ in model.moes]
            rebalancer.apply(distplb.Placement(torch.stack(tables), EXPERTS, GPUS))
            if leave_behind:
                moment[:1536] = kept
        losses.append(loss.detach())
    return {"loss": torch.stack(losses)} | in_logical_order(model, groups[rank // GPUS], rebalancer.placement)


def described(model: Any, experts: list[dict[str, ShardedExperts]], optimizer: Any) -> distplb.Rebalancer:
    window = distplb.LoadWindow(len(model.moes), EXPERTS, EVERY)
    layers = []
    for index, (moe, tensors) in enumerate(zip(model.moes, experts, strict=True)):
        moe.on_counts = lambda counts, index=index: window.add(index, counts)
        layers.append(
            distplb.MoELayer(
                name=str(index),
                experts={key: each.weight for key, each in tensors.items()},
                shards={key: each.shard for key, each in tensors.items()},
                router={"weight": moe.router.weight},
            )
        )
    return distplb.Rebalancer(
        layers,
        optimizer,
        topology=distplb.Topology(1, GPUS),
        window=window,
        every=EVERY,
        comm=TorchComm(),
        gpu=dist.get_rank() % GPUS,
        moves=distplb.Moves(model=FREE, stop_loss=0, verify="digest"),
    )


def in_logical_order(model: Any, group: dist.ProcessGroup, placement: distplb.Placement) -> dict[str, Tensor]:
    found, slot = {}, placement.inverse[..., 0]  # [L, E]
    for layer, moe in enumerate(model.moes):
        for name, weight in (("in", moe.w_in), ("out", moe.w_out)):
            parts = [torch.empty_like(weight) for _ in range(GPUS)]
            dist.all_gather(parts, weight.detach(), group=group)
            found[f"{layer}.{name}"] = torch.cat(parts)[slot[layer]]
        found[f"{layer}.router"] = moe.router.weight.detach()[slot[layer]]
    return found


def compared() -> tuple[float, float, bool]:
    quiet = trained(moves=False)
    same, _ = furthest(quiet, trained(moves=True))
    left_behind, _ = furthest(quiet, trained(moves=True, leave_behind=True))
    return same, left_behind, float(quiet["loss"][-1]) < 0.95 * float(quiet["loss"][0])


def test_a_run_with_sharded_state_and_moves_is_the_run_without_and_notices_a_moment_left_behind() -> None:
    for same, left_behind, learned in on_ranks(4, compared, deadline=300):
        assert learned
        assert same <= 1e-8
        assert left_behind > 1e-2
