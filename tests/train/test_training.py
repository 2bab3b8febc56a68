"""Moving experts does not change the model: a run with moves equals the run without them.

The example's model is trained for 60 iterations, rebalanced every 5 and given a random placement every 7. Losses,
parameters, moments and router bias are compared in logical order.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from jobs import FREE
from ranks import on_ranks
from torch import Tensor
from training_runs import EXPERTS, SEQUENCE, batch, furthest

import distplb
from distplb.comm.torchdist import TorchComm

ITERATIONS, EVERY, RANDOM_EVERY = 60, 5, 7
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4}
OPTIMIZERS = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=3e-3),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
}


def trained(optimizer_name: str, dtype: torch.dtype, moves: str) -> dict[str, Tensor]:
    """The losses of a run and all its final tensors in logical order, on every rank.

    moves: "none", "all", "remap" (all, applied by tables), "spread" (all, each rebalance over several iterations, one
        commit in each; the random placements drop some of them), or "left behind": like "all", but the first slot
        keeps its first moment of one tensor.
    """
    sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
    from moe_model import Config, Transformer

    group = dist.group.WORLD
    # Loss-free balancing under AdamW, so that a bias travels too; none under SGD.
    rate = 1e-3 if optimizer_name == "adamw" else 0.0
    sizes = {"layers": 2, "experts": EXPERTS, "dim": 32, "ffn": 48, "heads": 2, "max_sequence": SEQUENCE}
    model = Transformer(Config(**sizes, bias_rate=rate), group, seed=0, dtype=dtype)
    optimizer = OPTIMIZERS[optimizer_name](model.parameters())
    window = distplb.LoadWindow(len(model.moes), EXPERTS, EVERY)
    rebalancer = distplb.Rebalancer(
        described(model, window, moves == "remap"),
        optimizer,
        topology=distplb.Topology(1, dist.get_world_size()),
        window=window,
        every=EVERY,
        comm=TorchComm(),
        moves=distplb.Moves(
            model=FREE,
            stop_loss=0,
            spread=distplb.Spread(1, 2, move_seconds=0) if moves == "spread" else None,
            verify="digest",
        ),
    )
    rebalancer.enabled = moves != "none"
    generator = torch.Generator().manual_seed(1)
    losses = []
    for iteration in range(ITERATIONS):
        inputs, targets = batch(iteration)
        loss = model(inputs, targets)
        model.backward(loss)
        optimizer.step()
        if rate:
            model.nudge_biases()
        rebalancer.step()
        if moves != "none" and iteration % RANDOM_EVERY == 0:
            scatter(rebalancer, generator, model, optimizer, moves == "left behind")
        optimizer.zero_grad()
        dist.all_reduce(loss.detach())
        losses.append(loss.detach() / dist.get_world_size())
    return {"loss": torch.stack(losses)} | in_logical_order(model, optimizer, rebalancer.placement, moves == "remap")


def described(model: Any, window: distplb.LoadWindow, remap: bool = False) -> list[distplb.MoELayer]:
    layers = []
    for index, moe in enumerate(model.moes):
        moe.on_counts = lambda counts, index=index: window.add(index, counts)
        router = {"weight": moe.router.weight, "bias": moe.expert_bias}
        applied: dict[str, Any] = {"slot_of_expert": moe.slot_of_expert} if remap else {"router": router}
        layers.append(distplb.MoELayer(name=str(index), experts={"in": moe.w_in, "out": moe.w_out}, **applied))
    return layers


def scatter(
    rebalancer: distplb.Rebalancer, generator: torch.Generator, model: Any, optimizer: Any, leave_behind: bool
) -> None:
    tables = [torch.randperm(EXPERTS, generator=generator) for _ in model.moes]
    moment = optimizer.state[model.moes[0].w_in]["exp_avg" if "AdamW" in str(optimizer) else "momentum_buffer"]
    kept = moment[0].clone()
    rebalancer.apply(distplb.Placement(torch.stack(tables), EXPERTS, dist.get_world_size()))
    if leave_behind:
        moment[0] = kept


def in_logical_order(
    model: Any, optimizer: Any, placement: distplb.Placement, remapped: bool = False
) -> dict[str, Tensor]:
    found = {}
    same = torch.arange(EXPERTS)  # with a table, router rows stay
    slot = placement.inverse[..., 0]  # [L, E]
    for layer, moe in enumerate(model.moes):
        by_slot = {"router": (moe.router.weight, False), "in": (moe.w_in, True), "out": (moe.w_out, True)}
        for name, (parameter, spread) in by_slot.items():
            moments = {k: v for k, v in optimizer.state[parameter].items() if v is not None and v.dim()}
            for kind, tensor in {"": parameter.detach(), **moments}.items():
                found[f"{layer}.{name}{kind}"] = (
                    gathered(tensor)[slot[layer]] if spread else tensor[same if remapped else slot[layer]]
                )
        found[f"{layer}.bias"] = moe.expert_bias[same if remapped else slot[layer]]
    for name, parameter in model.named_parameters():
        if "moe." not in name:
            found[name] = parameter.detach()
    return {name: tensor.clone() for name, tensor in found.items()}


def gathered(tensor: Tensor) -> Tensor:
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


def compared() -> dict[str, tuple[float, str]]:
    found = {}
    # All cases on two ranks, where every kind of move happens; more ranks take too long on shared cores.
    everything = dist.get_world_size() == 2
    for optimizer in OPTIMIZERS if everything else ["adamw"]:
        for dtype in TOLERANCE if everything else [torch.float64]:
            quiet = trained(optimizer, dtype, "none")
            found[f"{optimizer} {dtype}"] = furthest(quiet, trained(optimizer, dtype, "all"))
            if dtype == torch.float64:
                assert float(quiet["loss"][-1]) < 0.9 * float(quiet["loss"][0])  # it did learn
                if optimizer == "adamw":
                    found["remap"] = furthest(quiet, trained(optimizer, dtype, "remap"))
                    if everything:
                        found["spread"] = furthest(quiet, trained(optimizer, dtype, "spread"))
                found[f"{optimizer} left behind"] = furthest(quiet, trained(optimizer, dtype, "left behind"))
    return found


RANKS = [pytest.param(1, marks=pytest.mark.long), 2, pytest.param(4, marks=pytest.mark.long)]


@pytest.fixture(scope="module", params=RANKS, ids=["1 rank", "2 ranks", "4 ranks"])
def differences(request: pytest.FixtureRequest) -> dict[str, tuple[float, str]]:
    return on_ranks(request.param, compared, deadline=400)[0]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_run_with_moves_is_the_run_without(
    differences: dict[str, tuple[float, str]], optimizer: str, dtype: torch.dtype
) -> None:
    if f"{optimizer} {dtype}" not in differences:
        pytest.skip("all optimizers and types are compared on two ranks")
    difference, where = differences[f"{optimizer} {dtype}"]
    assert difference <= TOLERANCE[dtype], where


@pytest.mark.parametrize("way", ["remap", "spread"])
def test_a_run_with_tables_or_spread_moves_is_the_run_without(
    differences: dict[str, tuple[float, str]], way: str
) -> None:
    if way not in differences:
        pytest.skip("all ways are compared on two ranks")
    difference, where = differences[way]
    assert difference <= TOLERANCE[torch.float64], where


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_same_comparison_notices_one_moment_left_behind(
    differences: dict[str, tuple[float, str]], optimizer: str
) -> None:
    if f"{optimizer} left behind" not in differences:
        pytest.skip("all optimizers and types are compared on two ranks")
    difference, _ = differences[f"{optimizer} left behind"]
    assert difference > 100 * TOLERANCE[torch.float32]
