"""Rebalance experts in separate modules, some of which receive no tokens for many iterations.

    torchrun --nproc-per-node=2 examples/starved_experts.py

Expert 3 receives no tokens for twenty iterations, and in one iteration no expert of rank 1 receives any. They then have
no gradient and AdamW skips them, so its step counts differ between experts and must move with them. The same training
runs with and without rebalances, and the losses, in float64, are compared.
Shapes: R rows received by this rank, M GPUs (ranks), G slots per GPU, D dim, E experts.
"""

from __future__ import annotations

import argparse
import gc
from typing import Any

import torch
import torch.distributed as dist
from moe_model import Config, MoE, Transformer, expert
from torch import Tensor, nn

import distplb
from distplb.comm.torchdist import TorchComm
from distplb.core.cost import mean_of_layers

STARVED, FROM, TO, RANK_AT = 3, 12, 32, 45  # the expert, its iterations, and the iteration of the whole rank
NEVER = -1e9  # bias of an expert that is never chosen


class Expert(nn.Module):
    """One expert, as models without grouped matrix products hold it."""

    def __init__(self, w_in: Tensor, w_out: Tensor) -> None:
        super().__init__()
        self.w_in, self.w_out = nn.Parameter(w_in.clone()), nn.Parameter(w_out.clone())

    def forward(self, rows: Tensor) -> Tensor:  # [R, D] -> [R, D]
        return expert(rows, self.w_in, self.w_out)


def hold_apart(moe: MoE) -> None:
    """Put each expert of this rank in a module of its own."""
    own = nn.ModuleList(Expert(*both) for both in zip(moe.w_in.detach(), moe.w_out.detach(), strict=True))
    del moe.w_in, moe.w_out
    moe.own = own

    def run_experts(rows: Tensor, received: Tensor) -> Tensor:  # [R, D], [M, G] -> [R, D]
        pieces = rows.split(received.flatten().tolist())  # M * G pieces, by sender, then slot
        outputs: list[Any] = []
        for g, module in enumerate(own):
            mine = torch.cat(pieces[g :: len(own)])
            # An expert without rows is not run, so it has no gradient.
            outputs.append((module(mine) if len(mine) else mine).split(received[:, g].tolist()))
        return torch.cat([outputs[g][m] for m in range(len(received)) for g in range(len(own))])

    moe.run_experts = run_experts  # type: ignore[method-assign]


class Training:
    """One model, its optimizer and its rebalancer; `every` 0 means no rebalancer."""

    def __init__(self, args: argparse.Namespace, every: int) -> None:
        config = Config(layers=2, experts=8, dim=32, ffn=64, heads=2)
        self.group, self.batch = dist.group.WORLD, args.batch
        self.model = Transformer(config, self.group, seed=0, dtype=torch.float64)
        for moe in self.model.moes:
            hold_apart(moe)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.rebalancer = self.make_rebalancer(every) if every else None
        self.losses: list[float] = []

    def make_rebalancer(self, every: int) -> distplb.Rebalancer:
        moes, layers = self.model.moes, []
        window = distplb.LoadWindow(len(moes), moes[0].config.experts, every)
        for index, moe in enumerate(moes):
            moe.on_counts = lambda counts, index=index: window.add(index, counts)
            layers.append(
                distplb.MoELayer(
                    name=f"blocks.{index}.moe",
                    experts={key: [getattr(one, key) for one in moe.own] for key in ("w_in", "w_out")},
                    router={"weight": moe.router.weight},
                )
            )
        # No price: this example shows that moves are right, not whether they pay off.
        return distplb.Rebalancer(
            layers,
            self.optimizer,
            topology=distplb.Topology(1, dist.get_world_size()),
            comm=TorchComm(self.group),
            window=window,
            every=every,
            moves=distplb.Moves(model=distplb.MoveModel(1.0, 1, 1e12, 1e12), stop_loss=0, verify="digest"),
            record=distplb.Record(on_event=self.report),
        )

    def experts_in_slots(self, layer: int) -> Tensor:
        """Return the expert of each slot `[E]`."""
        experts = torch.arange(self.model.moes[0].config.experts)
        return experts if self.rebalancer is None else self.rebalancer.placement.expert_of_slot[layer]

    def step(self, iteration: int, home: list[Tensor]) -> None:
        """Train one iteration; `home[layer]` `[E]` is the expert in each slot of the rebalanced training."""
        for layer, moe in enumerate(self.model.moes):
            is_starved = torch.zeros(len(home[layer]), dtype=torch.bool)  # by expert
            is_starved[STARVED] = FROM <= iteration < TO
            if iteration == RANK_AT:
                is_starved[home[layer][len(is_starved) // 2 :]] = True
            moe.expert_bias.copy_(torch.where(is_starved[self.experts_in_slots(layer)], NEVER, 0.0))
        generator = torch.Generator().manual_seed(1000 * iteration + dist.get_rank())
        # The frequent bytes change every ten iterations, and with them the hot experts.
        text = (torch.randn(self.batch, 65, generator=generator) * 12 + 30 * (iteration // 10)).long() % 256
        loss = self.model(text[:, :-1], text[:, 1:])
        self.backward(loss)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.losses.append(loss.item())
        if self.rebalancer is not None:
            self.rebalancer.step()

    def backward(self, loss: Tensor) -> None:
        """Compute the gradients of the mean of all ranks' losses; those of experts need no all-reduce."""
        (loss / dist.get_world_size()).backward()
        for name, parameter in self.model.named_parameters():
            if ".own." not in name:
                assert parameter.grad is not None
                dist.all_reduce(parameter.grad)

    def report(self, event: distplb.RebalanceEvent) -> None:
        if event.imbalance_next is not None or dist.get_rank() > 0:
            return
        state = self.optimizer.state
        steps = [int(state[one.w_in]["step"]) if one.w_in in state else 0 for one in self.model.moes[0].own]
        before, after = (mean_of_layers(values) for values in (event.imbalance_before, event.imbalance_after))
        imbalance = "unknown" if before is None or after is None else f"{before:.3f} -> {after:.3f}"
        print(
            f"iteration {event.iteration:3}: {event.decision}, {event.slots_moved:2} slots, imbalance {imbalance}; "
            f"AdamW steps of the experts now on rank 0, first layer: {steps}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--iterations", type=int, default=60)
    parser.add_argument("--every", type=int, default=6, help="iterations between rebalances")
    parser.add_argument("--batch", type=int, default=4, help="sequences of each rank")
    args = parser.parse_args()
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    rebalanced, static = Training(args, args.every), Training(args, 0)
    for iteration in range(1, args.iterations + 1):
        home = [rebalanced.experts_in_slots(layer).clone() for layer in range(len(rebalanced.model.moes))]
        for training in (rebalanced, static):
            training.step(iteration, home)
    furthest = max(abs(one - other) for one, other in zip(rebalanced.losses, static.losses, strict=True))
    if dist.get_rank() == 0:
        print(f"losses go from {static.losses[0]:.4f} to {static.losses[-1]:.4f} with and without rebalances;")
        print(f"they differ by at most {furthest:.1e}")
    assert rebalanced.rebalancer is not None
    rebalanced.rebalancer.close()
    # Live references to the group keep its threads alive; a thread that outlives the interpreter aborts the process.
    del rebalanced, static, training
    gc.collect()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
