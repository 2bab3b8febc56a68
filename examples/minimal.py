"""The shortest training loop with distplb: EP over each pair of ranks, expert-data-parallel (EDP) over the pairs.

torchrun --standalone --nproc-per-node 4 examples/minimal.py
"""

import torch
import torch.distributed as dist
from moe_model import Config, Transformer  # in examples/, in place of your model
from texts import code

import distplb
from distplb.comm.torchdist import TorchComm


def main():
    dist.init_process_group()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    mesh = dist.init_device_mesh(device, (dist.get_world_size() // 2, 2), mesh_dim_names=("edp", "ep"))
    ep, edp = mesh["ep"].get_group(), mesh["edp"].get_group()
    model = Transformer(Config(layers=2, dim=64, ffn=128), ep, seed=0).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    window = distplb.LoadWindow(num_layers=2, num_experts=16, num_steps=20)  # at most 20 steps are kept
    layers = []
    for i, moe in enumerate(model.moes):
        moe.on_counts = lambda counts, i=i: window.add(i, counts)  # in forward: [16], this rank's tokens
        experts = {"w_in": moe.w_in, "w_out": moe.w_out}  # dim 0: the 8 experts on this rank
        router = {"weight": moe.router.weight, "bias": moe.expert_bias}  # dim 0: all 16; rows move with the experts
        layers.append(distplb.MoELayer(name=f"blocks.{i}.moe", experts=experts, router=router))
    rebalancer = distplb.Rebalancer(
        layers,
        optimizer,
        topology=distplb.Topology.from_mesh(mesh["ep"]),
        comm=TorchComm(),  # the default group: all ranks that hold these layers
        gpu=mesh.get_local_rank("ep"),  # this rank's index in its EP group
        window=window,
        every=20,
        record=distplb.Record("run"),  # a folder, for: distplb report run
    )

    text, generator = code(), torch.Generator().manual_seed(dist.get_rank())
    for iteration in range(1, 101):
        start = torch.randint(len(text) - 128, (16, 1), generator=generator)
        batch = text[start + torch.arange(129)].long().to(device)  # 16 sequences of 128 tokens
        loss = model(batch[:, :-1], batch[:, 1:])
        (loss / dist.get_world_size()).backward()
        for name, parameter in model.named_parameters():  # experts over edp, everything else over all ranks
            dist.all_reduce(parameter.grad, group=edp if ".w_" in name else None)
        optimizer.step()
        optimizer.zero_grad()
        rebalancer.step()  # every 20th call plans a placement and moves experts
        if iteration % 20 == 0 and dist.get_rank() == 0:
            print(f"iteration {iteration}: loss {loss.item():.3f}", flush=True)
    dist.destroy_process_group()


main()
