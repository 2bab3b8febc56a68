"""A small job that saves while it trains: MoE layers over pipeline stages, experts as DTensors over EP ranks.

Plain torch, float64, with torch.distributed.checkpoint; all ranks of an EP group have all tokens, and their outputs are
summed. Shapes: N tokens, D dim, H ffn, E experts, K top-k.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from jobs import FREE
from stagers import DefaultStager, StagingOptions
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import distplb
from distplb.comm.torchdist import TorchComm
from distplb.integrations.common import counts_of

__all__ = ["EXPERTS", "ITERATIONS", "run"]

LAYERS, EXPERTS, K, DIM, FFN, TOKENS = 4, 8, 2, 8, 6, 24
ITERATIONS, SAVE_EVERY, EVERY, RANDOM_EVERY = 20, 5, 3, 4


class FromExperts(torch.autograd.Function):
    """Sums the outputs of the ranks' experts; all ranks have the same gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        total = x.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class ToExperts(torch.autograd.Function):
    """The reverse: passes tokens, which all ranks have, to each rank's experts, and sums the gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        total = gradient.clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


class Router(nn.Linear):
    """Chooses K experts for each token, and their gates."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = super().forward(x).softmax(1)
        gate, expert = scores.topk(K, dim=1)
        return gate / gate.sum(1, keepdim=True), expert


class MoE(nn.Module):
    def __init__(self, number: int, mesh: Any) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(number)  # depends on the layer, not on its stage

        def drawn(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64) / 2

        self.router = Router(DIM, EXPERTS, bias=False, dtype=torch.float64)
        self.router.weight.data.copy_(drawn(EXPERTS, DIM))
        self.group = mesh.get_group()
        self.w_in = nn.Parameter(distribute_tensor(drawn(EXPERTS, DIM, FFN), mesh, [Shard(0)], src_data_rank=None))
        self.w_out = nn.Parameter(distribute_tensor(drawn(EXPERTS, FFN, DIM), mesh, [Shard(0)], src_data_rank=None))

    def forward(self, x: Tensor) -> Tensor:  # [N, D] -> [N, D]
        gate, expert = self.router(x)
        gate, rows = ToExperts.apply(gate, self.group), ToExperts.apply(x, self.group)
        assert isinstance(self.w_in, DTensor)
        assert isinstance(self.w_out, DTensor)
        w_in, w_out = self.w_in.to_local(), self.w_out.to_local()
        first, out = dist.get_rank(self.group) * len(w_in), torch.zeros_like(x)
        for slot in range(len(w_in)):
            token, choice = (expert == first + slot).nonzero(as_tuple=True)
            made = F.gelu(rows[token] @ w_in[slot]) @ w_out[slot] * gate[token, choice, None]
            out = out.index_add(0, token, made)
        return x + FromExperts.apply(out, self.group)


class Stage(nn.Module):
    """The layers of one stage, named as in the whole model."""

    def __init__(self, stage: int, stages: int, mesh: Any) -> None:
        super().__init__()
        own = range(stage * LAYERS // stages, (stage + 1) * LAYERS // stages)
        self.layers = nn.ModuleDict({str(number): MoE(number, mesh) for number in own})

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers.values():
            x = layer(x)
        return x

    def described(self) -> list[distplb.MoELayer]:
        def count(_: Any, output: tuple[Tensor, Tensor]) -> Tensor:
            return output[1].flatten().bincount(minlength=EXPERTS)

        return [
            distplb.MoELayer(
                name=f"layers.{number}",
                experts={"w_in": layer.w_in, "w_out": layer.w_out},
                router={"weight": layer.router.weight},
                counts=counts_of(layer.router, count),
            )
            for number, layer in self.layers.items()
        ]


class Job:
    """One rank's part of the training, and its checkpoints."""

    def __init__(self, stages: int, folder: Path, moves: bool, killed: str) -> None:
        self.stages, self.folder, self.moves, self.killed = stages, folder, moves, killed
        ep_size = dist.get_world_size() // stages
        mesh = init_device_mesh("cpu", (stages, ep_size), mesh_dim_names=("pp", "ep"))
        self.stage, self.ep_size = mesh.get_local_rank("pp"), ep_size
        self.model = Stage(self.stage, stages, mesh["ep"])
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.rebalancer = distplb.Rebalancer(
            self.model.described(),
            self.optimizer,
            topology=distplb.Topology(1, ep_size),
            every=EVERY,
            comm=TorchComm(mesh["ep"]),
            moves=distplb.Moves(model=FREE, stop_loss=0, verify="digest"),
        )
        self.rebalancer.enabled = moves
        self.saving_group = dist.new_group()  # a save runs in a thread, concurrently with the job's collectives
        self.stager = DefaultStager(StagingOptions(False, False, True, False))  # in a thread, without pinned memory
        self.generator = torch.Generator().manual_seed(7)
        self.upload: Any = None
        self.staging: Any = None

    def train(self, first: int) -> list[float]:
        """Train from iteration `first` to the last, and return their losses on every rank."""
        losses = []
        for iteration in range(first, ITERATIONS + 1):
            losses.append(self.iterate(iteration))
            if iteration % SAVE_EVERY == 0:
                self.save(iteration)
            if self.moves and iteration % RANDOM_EVERY == 0 and self.model.layers:
                tables = [torch.randperm(EXPERTS, generator=self.generator) for _ in self.model.layers]
                self.rebalancer.apply(distplb.Placement(torch.stack(tables), EXPERTS, self.ep_size))
        if self.upload is not None:
            self.upload.result()
        self.stager.close()
        return losses

    def iterate(self, iteration: int) -> float:
        generator = torch.Generator().manual_seed(iteration)
        x, target = torch.randn(2, TOKENS, DIM, generator=generator, dtype=torch.float64)
        x = x + 1  # so that some experts are hotter than others
        rank, total = dist.get_rank(), torch.zeros((), dtype=torch.float64)
        if self.stage > 0:
            dist.recv(x, rank - self.ep_size)
            x.requires_grad_()
        y = self.model(x)
        if self.stage < self.stages - 1:
            dist.send(y.detach(), rank + self.ep_size)
            gradient = torch.empty_like(y)
            dist.recv(gradient, rank + self.ep_size)
            y.backward(gradient)
        else:
            total = F.mse_loss(y, target)
            total.backward()
        if self.stage > 0:
            assert x.grad is not None
            dist.send(x.grad, rank - self.ep_size)
        if self.staging is not None:  # a step during staging would make the checkpoint inconsistent, in any trainer
            self.staging.result()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.rebalancer.step()
        loss = total.detach().clone()
        dist.broadcast(loss, dist.get_world_size() - 1)
        return float(loss)

    def in_logical_order(self) -> dict[str, list[float]]:
        """Compute a checksum of each expert in each tensor of this stage's layers."""
        found = {}
        with self.rebalancer.in_logical_order(), torch.no_grad():
            for name, layer in self.model.layers.items():
                for key, param in layer.named_parameters():
                    whole = param.full_tensor() if isinstance(param, DTensor) else param
                    flat = whole.reshape(EXPERTS, -1)
                    found[f"{name}.{key}"] = (flat * torch.arange(1, flat.shape[1] + 1)).sum(1).tolist()
        return found

    def state(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer, "rebalancer": self.rebalancer}

    def save(self, iteration: int) -> None:
        """Start a save without waiting for it, so that the following move runs meanwhile."""
        if self.upload is not None:
            self.upload.result()
        writer = Writer(self.folder / f"{iteration:04d}", kills=self.killed == f"saving {iteration}")
        response = dcp.async_save(
            self.state(), storage_writer=writer, process_group=self.saving_group, async_stager=self.stager
        )
        self.rebalancer.saving(response)
        self.staging = getattr(response, "staging_completion", None)
        self.upload = getattr(response, "upload_completion", response)

    def resume(self, forgets: bool) -> int:
        """Resume from the newest whole checkpoint, and return its iteration."""
        whole = sorted(path.parent for path in self.folder.glob("*/.metadata"))
        state = self.state()
        if forgets:
            del state["rebalancer"]
        dcp.load(state, checkpoint_id=whole[-1])
        set_state_dict(self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        return int(whole[-1].name)


class Writer(dcp.FileSystemWriter):
    """Writes normally, or kills its process once something has been written."""

    def __init__(self, path: Path, kills: bool) -> None:
        super().__init__(path)
        self.kills = kills

    def write_data(self, plan: Any, planner: Any) -> Any:
        done = super().write_data(plan, planner)
        if self.kills and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return done


def run(stages: int, folder: str, *, moves: bool, resume: bool = False, killed: str = "", forgets: bool = False) -> Any:
    """Run the job; return the iteration resumed from, the losses after it, and checksums of experts in logical order.

    Args:
        stages: number of pipeline stages; the ranks of a stage are its EP group.
        folder: folder of the checkpoints.
        moves: whether experts move.
        resume: whether to resume from the newest whole checkpoint.
        killed: "saving 10" or "moving 12": kill -9 rank 1 in the middle of the save at iteration 10, or between two
            commits of the move at iteration 12.
        forgets: whether to resume the weights without the placement.
    """
    job = Job(stages, Path(folder), moves, killed)
    if killed.startswith("moving"):
        _kill_between_commits(job, int(killed.split()[1]))
    done = job.resume(forgets) if resume else 0
    return done, job.train(done + 1), job.in_logical_order()


def _kill_between_commits(job: Job, iteration: int) -> None:
    from distplb.migrate import transfer

    transfer._STAGING_BYTES = 0  # a commit is one swap of two slots
    told: list[distplb.Placement] = []
    take_up = job.rebalancer._parts.in_force.take_up

    def taken_up(placement: distplb.Placement) -> None:
        take_up(placement)
        if job.rebalancer.iteration == iteration:
            told.append(placement)
            if len(told) == 2 and dist.get_rank() == 1:
                os.kill(os.getpid(), signal.SIGKILL)

    job.rebalancer._parts.in_force.take_up = taken_up  # type: ignore[method-assign]
