"""The example's Transformer with replicas trains as it does without, on any number of ranks, and still times itself."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from jobs import FREE
from lending import draw_step, oracle
from pages import ROOT, blocks
from ranks import on_ranks
from torch import Tensor
from training_runs import EXPERTS, SEQUENCE, batch, furthest

import distplb
from distplb.comm.torchdist import TorchComm
from distplb.replicas import lend
from distplb.replicas.step_balancer import StepBalancer

sys.path.insert(0, str(ROOT / "examples"))

LAYERS, ITERATIONS, EVERY = 2, 10, 3
TOLERANCE = 1e-10


def built(replica_slots: int | None, **options: Any) -> tuple[Any, StepBalancer | None]:
    """The model on all ranks, and its balancer; None for no balancer."""
    from moe_model import Config, Transformer

    balancer = None
    if replica_slots is not None:
        topology = distplb.Topology(1, dist.get_world_size())
        balancer = StepBalancer(topology=topology, num_experts=EXPERTS, replica_slots=replica_slots, **options)
    sizes = {"experts": EXPERTS, "dim": 16, "ffn": 24, "heads": 2, "max_sequence": SEQUENCE}
    config = Config(layers=LAYERS, **sizes)
    return Transformer(config, dist.group.WORLD, seed=0, dtype=torch.float64, balancer=balancer), balancer


def lent_steps(balancer: StepBalancer) -> list[bool]:
    """A list that gets an item for every later dispatch: whether it has replicas."""
    lent: list[bool] = []
    dispatch: Callable[..., Any] = balancer.dispatch

    def watched(*arguments: Any) -> Any:
        step = dispatch(*arguments)
        lent.append(not step.is_trivial)
        return step

    balancer.dispatch = watched  # type: ignore[method-assign]
    return lent


def trained(replica_slots: int | None) -> tuple[dict[str, Tensor], list[bool]]:
    """Losses, counts and gradients of every iteration, all ranks' experts together; which steps had replicas."""
    model, balancer = built(replica_slots)
    lent = [] if balancer is None else lent_steps(balancer)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    found: dict[str, Tensor] = {}
    for iteration in range(ITERATIONS):
        loss = model(*batch(iteration))
        model.backward(loss)
        dist.all_reduce(loss.detach())
        found[f"{iteration} loss"] = loss.detach() / dist.get_world_size()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            gradient = parameter.grad.clone()
            found[f"{iteration} {name}"] = gathered(gradient) if name.endswith(("w_in", "w_out")) else gradient
        for layer, moe in enumerate(model.moes):
            counts = moe.counts.clone()
            dist.all_reduce(counts)
            found[f"{iteration} counts {layer}"] = counts.double()
            assert moe.forward_seconds > 0
            assert moe.backward_seconds > 0
            assert moe.tokens_received >= 0
        optimizer.step()
        optimizer.zero_grad()
    return found, lent


def gathered(tensor: Tensor) -> Tensor:
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


def runs() -> tuple[dict[str, Any], list[tuple[float, str]], list[list[bool]]]:
    """A run without a balancer; how far runs with R = 0 and R = 2 are from it; which of their steps had replicas.

    Its values are arrays, because tensors do not outlive the process that sends them.
    """
    plain, _ = trained(None)
    balanced = [trained(replica_slots) for replica_slots in (0, 2)]
    arrays = {name: tensor.numpy() for name, tensor in plain.items()}
    return arrays, [furthest(plain, run) for run, _ in balanced], [lent for _, lent in balanced]


def tensors(arrays: dict[str, Any]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


@pytest.fixture(scope="module")
def one_rank() -> dict[str, Tensor]:
    plain, differences, lent = on_ranks(1, runs)[0]
    assert not any(map(any, lent))  # nobody to lend to
    assert [one for one, _ in differences] == [0.0, 0.0]
    return tensors(plain)


@pytest.mark.parametrize("ranks", [2, 4])
def test_losses_and_gradients_are_those_without_replicas_and_those_of_one_rank(
    ranks: int, one_rank: dict[str, Tensor]
) -> None:
    for plain, differences, (without, lent) in on_ranks(ranks, runs):
        assert differences[0] == (0.0, differences[0][1])  # R = 0 is the plain layer, to the bit
        assert differences[1][0] <= TOLERANCE, differences[1]
        assert furthest(one_rank, tensors(plain))[0] <= TOLERANCE
        assert not any(without)
        assert len(lent) == LAYERS * ITERATIONS
        assert sum(lent) > 0.8 * len(lent)


# --- with homes that move -----------------------------------------------------------------------------------------


def moved_and_lent(replica_slots: int | None, remap: bool) -> tuple[dict[str, Tensor], int, list[bool]]:
    """Losses and final weights by expert, of a run that moves homes; how many slots moved; which steps had replicas."""
    model, balancer = built(replica_slots)
    lent = [] if balancer is None else lent_steps(balancer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    window, layers = distplb.LoadWindow(LAYERS, EXPERTS, EVERY), []
    for index, moe in enumerate(model.moes):
        moe.on_counts = lambda counts, index=index: window.add(index, counts)
        table = {"slot_of_expert": moe.slot_of_expert} if remap else {"router": {"weight": moe.router.weight}}
        layers.append(distplb.MoELayer(name=moe.name, experts={"in": moe.w_in, "out": moe.w_out}, **table))
    events: list[distplb.RebalanceEvent] = []
    rebalancer = distplb.Rebalancer(
        layers,
        optimizer,
        topology=distplb.Topology(1, dist.get_world_size()),
        window=window,
        every=EVERY,
        comm=TorchComm(),
        moves=distplb.Moves(model=FREE, stop_loss=0),
        record=distplb.Record(on_event=events.append),
    )
    rebalancer.enabled = replica_slots is not None
    found: dict[str, Tensor] = {}
    for iteration in range(ITERATIONS):
        loss = model(*batch(iteration))
        model.backward(loss)
        optimizer.step()
        rebalancer.step()
        optimizer.zero_grad()
        dist.all_reduce(loss.detach())
        found[f"{iteration} loss"] = loss.detach()
    for moe, slots in zip(model.moes, rebalancer.placement.inverse[..., 0], strict=True):
        for name in ("w_in", "w_out"):
            found[f"{moe.name}.{name}"] = gathered(getattr(moe, name).detach())[slots]
        found[f"{moe.name}.router"] = moe.router.weight.detach()[torch.arange(EXPERTS) if remap else slots].clone()
    rebalancer.close()
    return found, sum(event.slots_moved for event in events), lent


def with_moves(remap: bool) -> tuple[tuple[float, str], int, list[bool]]:
    still, _, _ = moved_and_lent(None, remap)
    moved, slots, lent = moved_and_lent(2, remap)
    return furthest(still, moved), slots, lent


@pytest.mark.parametrize("remap", [False, True], ids=["router rows", "tables"])
def test_replicas_and_moves_of_homes_together_change_nothing(remap: bool) -> None:
    for (difference, where), slots, lent in on_ranks(2, with_moves, remap):
        assert slots > 0
        assert sum(lent) > 0.7 * len(lent)
        # Moments of AdamW magnify the order of sums where a gradient is almost zero.
        assert difference <= 1e-8, where


# --- its times ----------------------------------------------------------------------------------------------------


def order_of_events() -> list[str]:
    """What happens in the backward of a step with replicas, in order, of the last layer."""
    model, _ = built(2)
    seen: list[str] = []
    last = model.moes[-1]

    def noted(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            seen.append(name)
            return method(*arguments)

        return call

    for name in ("backward_begins", "backward_ends"):
        setattr(last, name, noted(name, getattr(last, name)))
    with (
        patch.object(lend.Lender, "begin_backward", noted("pushed again", lend.Lender.begin_backward)),
        patch.object(lend.Lender, "bring_home", noted("brought home", lend.Lender.bring_home)),
    ):
        model.backward(model(*batch(0)))
    return seen[:4]


def test_the_experts_times_leave_out_what_replicas_send() -> None:
    """So that they compare what ranks compute, with replicas as without."""
    expected = ["pushed again", "backward_begins", "backward_ends", "brought home"]
    assert on_ranks(2, order_of_events) == [expected] * 2


# --- the page's function ------------------------------------------------------------------------------------------


def of_the_page() -> tuple[float, int]:
    """How far output and gradients of the page's function are from those of one process; replicas of its steps."""
    rank, ranks, found, lent = dist.get_rank(), dist.get_world_size(), [0.0], 0
    own = slice(rank * EXPERTS // ranks, (rank + 1) * EXPERTS // ranks)
    names = {"distplb": distplb, "group": dist.group.WORLD, "num_nodes": 1, "gpus_per_node": ranks}
    exec(blocks(ROOT / "docs" / "replicas.md", "python")[0], names)
    kinds = {"experts": EXPERTS, "hot": 30.0, "most_tokens": 40, "dim": 6, "dtype": torch.float64}
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        shapes = ((EXPERTS, 6, 10), (EXPERTS, 10, 6))
        everything = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
        mine = [weight[own].clone().requires_grad_() for weight in everything]
        for weight in everything:
            weight.requires_grad_()
        steps = [draw_step(seed, one, **kinds) for one in range(ranks)]
        outputs = [oracle(step, *everything) for step in steps]
        torch.cat(outputs).square().sum().backward()
        step = steps[rank]
        output = names["moe"]("layer", step.x, step.ids, step.gate, *mine)
        output.square().sum().backward()
        lent += not names["balancer"].dispatch("layer", step.ids).is_trivial
        output, expected = output.detach(), outputs[rank].detach()
        found.append(float((output - expected).abs().max() / expected.abs().max()) if len(output) else 0.0)
        for weight, all_of_it in zip(mine, everything, strict=True):
            assert weight.grad is not None
            assert all_of_it.grad is not None
            found.append(float((weight.grad - all_of_it.grad[own]).abs().max() / all_of_it.grad.abs().max()))
    return max(found), lent


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_function_on_the_page_computes_what_one_process_computes(ranks: int) -> None:
    for difference, lent in on_ranks(ranks, of_the_page):
        assert difference <= TOLERANCE
        assert lent >= 3 * (ranks > 1)
