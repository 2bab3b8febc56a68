"""Experts without tokens get no gradient and fall a step behind. Each expert's history must travel with it.

The job runs along with a twin, in which every expert gets the same gradients but never moves. The job's state of each
expert must equal the twin's to the bit. Shapes: L layers, E = P experts, G slots on each GPU.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from jobs import FREE, in_values
from ranks import on_ranks
from torch import Tensor, nn

from distplb import DistplbError, LoadWindow, MoELayer, Placement, Rebalancer, Topology
from distplb.comm.torchdist import TorchComm
from distplb.migrate import optimizer_state
from distplb.migrate.optimizer_settings import optimizers_by_id
from distplb.records.events import RebalanceEvent

LAYERS, EXPERTS, DIM, EVERY = 2, 8, 3, 3
ITERATIONS = 26
Starved = Callable[[int, int, int, int], bool]  # iteration, layer, expert, its GPU

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "AdamW": lambda params: torch.optim.AdamW(params, lr=0.1),
    "AdamW, one at a time": lambda params: torch.optim.AdamW(params, lr=0.1, foreach=False, amsgrad=True),
    "SGD": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, dampening=0.3),
    "NAdam": lambda params: torch.optim.NAdam(params, lr=0.1),  # two scalars in its state
    "Adagrad": lambda params: torch.optim.Adagrad(params, lr=0.1),
}


def first(layer: int, expert: int) -> Tensor:
    return torch.randn(DIM, DIM, generator=torch.Generator().manual_seed(100 * layer + expert))


def gradient(iteration: int, layer: int, expert: int) -> Tensor:
    return torch.randn(DIM, DIM, generator=torch.Generator().manual_seed(10000 * iteration + 100 * layer + expert))


def starved(iteration: int, layer: int, expert: int, gpu: int) -> bool:
    """Starve one expert for twenty iterations, one at first, a whole rank once and at first, others now and then."""
    if (expert == 3 and 5 <= iteration < 25) or (expert == 6 and iteration < 12):
        return True
    if gpu == 1 and ((layer == 0 and iteration == 14) or (layer == 1 and iteration <= EVERY)):
        return True
    return (7 * iteration + 5 * expert + layer) % 11 == 0


class Job:
    """Layers on this rank, and a twin of all their experts.

    Args:
        optimizer: builds an optimizer.
        is_starved: whether an expert has no token, and so no gradient.
        own: whether each expert has its own tensor; else all experts of a GPU share one.
        options: options of the rebalancer.
    """

    def __init__(
        self,
        optimizer: Callable[[Any], torch.optim.Optimizer],
        is_starved: Starved,
        own: bool = True,
        **options: Any,
    ) -> None:
        ranks, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
        self.is_starved, self.own, self.gpus, self.gpu = is_starved, own, ranks, rank
        self.size = EXPERTS // ranks
        here = range(rank * self.size, (rank + 1) * self.size)
        each = [[first(layer, expert) for expert in here] for layer in range(LAYERS)]
        self.params = [
            [nn.Parameter(one) for one in of_layer] if own else [nn.Parameter(torch.stack(of_layer))]
            for of_layer in each
        ]
        self.routers = [nn.Parameter(torch.zeros(EXPERTS, 2)) for _ in range(LAYERS)]
        self.optimizer = optimizer([*(p for of_layer in self.params for p in of_layer), *self.routers])
        self.twins = {(n, e): nn.Parameter(first(n, e)) for n in range(LAYERS) for e in range(EXPERTS)}
        self.twin_optimizer = optimizer(list(self.twins.values()))
        self.events: list[RebalanceEvent] = []
        self.window = LoadWindow(LAYERS, EXPERTS, 4)
        layers = [
            MoELayer(
                name=f"moe.{n}",
                experts={"w": list(params) if own else params[0]},
                router={"weight": router},
            )
            for n, (params, router) in enumerate(zip(self.params, self.routers, strict=True))
        ]
        options = {"model": FREE, "verify": "digest", "stop_loss": 0, "every": EVERY} | options
        options |= {"on_event": self.events.append}
        self.rebalancer = Rebalancer(
            layers,
            self.optimizer,
            topology=Topology(1, ranks),
            window=self.window,
            comm=TorchComm(deadline=60) if dist.is_initialized() else None,
            **in_values(options),
        )
        self.iteration = 0

    def train(self, hold: bool = False) -> None:
        """Run one iteration; `hold` keeps gradients until the rebalancer has been called."""
        self.iteration += 1
        placement = self.rebalancer.placement
        for layer in range(LAYERS):
            gpu_of = {e: slot // self.size for slot, e in enumerate(placement.expert_of_slot[layer].tolist())}
            for expert in range(EXPERTS):
                is_without = self.is_starved(self.iteration, layer, expert, gpu_of[expert])
                self.twins[layer, expert].grad = None if is_without else gradient(self.iteration, layer, expert)
            grads = [self.twins[layer, expert].grad for expert in self.held_by(placement, layer)]
            if self.own:
                for param, grad in zip(self.params[layer], grads, strict=True):
                    param.grad = None if grad is None else grad.clone()
            else:
                filled = [torch.zeros(DIM, DIM) if grad is None else grad for grad in grads]
                self.params[layer][0].grad = None if all(g is None for g in grads) else torch.stack(filled)
            self.routers[layer].grad = torch.zeros_like(self.routers[layer])
            window = torch.Generator().manual_seed((self.iteration - 1) // EVERY * LAYERS + layer)
            counts = torch.randint(1, 100, (EXPERTS,), generator=window) ** 2
            self.window.add(layer, counts.gather(0, placement.expert_of_slot[layer]), training=True)
        self.optimizer.step()
        self.twin_optimizer.step()
        if not hold:
            self.zero_grad()
        self.rebalancer.step()
        self.check()
        self.zero_grad()

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()
        self.twin_optimizer.zero_grad()

    def held_by(self, placement: Placement, layer: int) -> list[int]:
        """The experts in this GPU's slots."""
        return placement.expert_of_slot[layer, self.gpu * self.size : (self.gpu + 1) * self.size].tolist()

    def check(self) -> None:
        """Check that weights, gradients and state of each expert equal those of its twin."""
        placement = self.rebalancer.placement
        for layer in range(LAYERS):
            for slot, expert in enumerate(self.held_by(placement, layer)):
                twin, where = self.twins[layer, expert], (self.iteration, layer, slot, expert)
                if not self.own:
                    assert torch.equal(self.params[layer][0][slot], twin), where
                    continue
                param = self.params[layer][slot]
                assert torch.equal(param, twin), where
                assert same(param.grad, twin.grad), where
                state, wanted = self.optimizer.state.get(param, {}), self.twin_optimizer.state.get(twin, {})
                assert state.keys() == wanted.keys(), where
                assert all(same(state[key], wanted[key]) for key in wanted), where

    def steps(self) -> set[float]:
        """Step counts of the experts in this rank's first layer; 0 if the optimizer never stepped on one."""
        return {float(self.optimizer.state.get(param, {}).get("step", 0.0)) for param in self.params[0]}


def same(one: Any, other: Any) -> bool:
    return torch.equal(one, other) if isinstance(one, Tensor) and isinstance(other, Tensor) else one is other


# --- tensors of their own: histories travel -------------------------------------------------------------------------


def starving(names: list[str], hold: bool) -> list[tuple[int, int, list[str]]]:
    """By optimizer: rebalances that moved experts, histories that differ at the end, layers left out."""
    found = []
    for name in names:
        job = Job(OPTIMIZERS[name], starved)
        for _ in range(ITERATIONS):
            job.train(hold)
        left_out = [text for event in job.events for text in event.left_out if "could not" in text or "step" in text]
        moved = sum(event.decision == "moved" for event in job.events if event.imbalance_next is None)
        found.append((moved, len(job.steps()), left_out))
        job.rebalancer.close()
    return found


@pytest.mark.parametrize("hold", [False, True], ids=["zero_grad first", "gradients held"])
def test_each_experts_own_history_goes_where_it_goes(hold: bool) -> None:
    """One starved expert ended the job at the first rebalance, because its moments would have gone to another."""
    for rank in on_ranks(2, starving, list(OPTIMIZERS), hold):
        for (moved, steps, left_out), name in zip(rank, OPTIMIZERS, strict=True):
            assert moved >= 6, name
            assert steps > 1 or name == "SGD", name
            assert left_out == [], name


def test_on_one_gpu_too_with_moves_by_hand_and_back() -> None:
    job = Job(OPTIMIZERS["AdamW"], starved)
    generator = torch.Generator().manual_seed(1)
    for iteration in range(ITERATIONS):
        job.train()
        rows = torch.stack([torch.randperm(EXPERTS, generator=generator) for _ in range(LAYERS)])
        job.rebalancer.apply(Placement(rows, EXPERTS, 1))
        job.check()
        if iteration % 4 == 3:
            with job.rebalancer.in_logical_order():
                job.check()
    assert len(job.steps()) > 2


# --- one tensor of several: the layer stays, and says why ------------------------------------------------------------


def once(iteration: int, layer: int, expert: int, gpu: int) -> bool:
    return iteration == 2 and layer == 0 and gpu == 1


def left_out(dry_run: bool, betas: tuple[float, float]) -> tuple[list[RebalanceEvent], list[str], str]:
    job = Job(lambda params: torch.optim.AdamW(params, lr=0.1, betas=betas), once, own=False, dry_run=dry_run)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(64 if betas[1] < 0.9 else 9):
            job.train()
    refused = "nothing"
    try:
        job.rebalancer.apply(Placement(torch.arange(EXPERTS).flip(0).expand(LAYERS, -1), EXPERTS, 2))
    except DistplbError as error:
        refused = str(error)
    told = [str(one.message) for one in caught if issubclass(one.category, RuntimeWarning)]
    return [event for event in job.events if event.imbalance_next is None], told, refused


WHY = "moe.0.experts.w: step {} on rank 0; step {} on rank 1. A tensor of several experts has one history for all of"


def test_a_rank_that_was_not_stepped_on_once_keeps_its_layer_alone_from_moving() -> None:
    """All layers were skipped from then on, with a digest as the reason."""
    for events, told, refused in on_ranks(2, left_out, False, (0.9, 0.999)):
        for nth, event in enumerate(events, start=1):
            why = WHY.format(nth * EVERY, nth * EVERY - 1)
            assert event.decision == "moved"
            assert event.left_out[0].startswith(why)
            assert "moe.0 could not be moved: " + why in event.reason
            assert "step" not in event.left_out[1]
            assert event.imbalance_after[0] == event.imbalance_before[0]
            assert event.imbalance_after[1] < event.imbalance_before[1]
        assert len(events) == 3
        (warning,) = told  # only once, not at every rebalance
        assert warning.startswith("distplb: moe.0 could not be moved: " + WHY.format(3, 2))
        assert refused.startswith("rank 0: moe.0 could not be moved: " + WHY.format(9, 8))


def test_a_dry_run_tells_it_too() -> None:
    for events, told, _ in on_ranks(2, left_out, True, (0.9, 0.999)):
        assert [event.decision for event in events] == ["dry run"] * 3
        assert all(event.left_out[0].startswith("moe.0.experts.w: step") for event in events)
        assert all("moe.0 could not be moved" in event.reason for event in events)
        assert len(told) == 1


def test_it_moves_again_once_the_number_of_the_step_enters_no_update() -> None:
    """Once the bias correction rounds to 1 it stays 1: after 37,000 steps with a beta of 0.999, or 731 with 0.95."""
    for events, _, refused in on_ranks(2, left_out, False, (0.4, 0.5)):
        stay = ["step" in event.left_out[0] for event in events]
        assert stay == [nth * EVERY - 1 < 55 for nth in range(1, len(events) + 1)]
        assert refused == "nothing"


def test_the_betas_are_those_of_the_one_optimizer_that_steps() -> None:
    """If two optimizers with different betas step, the step still matters for one of them."""
    param = nn.Parameter(torch.zeros(DIM))
    quick, slow = (torch.optim.AdamW([param], betas=(0.4, beta)) for beta in (0.5, 0.999))
    for _ in range(60):
        param.grad = torch.ones(DIM)
        quick.step()
        slow.step()
    alone, both = (
        optimizer_state._tensor_state("w", param, some, optimizers_by_id(some)).effect
        for some in ([quick], [quick, slow])
    )
    assert alone == {"step": 55.0}
    assert both == {"step": 60.0, "step of optimizer 1": 60.0}


class ManyMoments(torch.optim.Optimizer):
    """Keeps more tensors for each parameter than ranks can agree on."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})

    def step(self, closure: None = None) -> None:
        for param in (p for group in self.param_groups for p in group["params"]):
            self.state[param] = {f"moment {number}": torch.zeros_like(param) for number in range(15)}


def test_state_of_too_many_tensors_is_refused_by_name() -> None:
    job = Job(ManyMoments, starved, own=False)
    with pytest.raises(DistplbError, match=r"moe.0.experts.w has 15 tensors of state and gradient, .* at most 13"):
        job.train()


# --- what cannot be known --------------------------------------------------------------------------------------------


def unknown() -> tuple[str, str]:
    """The errors if a rank with a copy of an expert has missed a step, and if a rank has never had any state."""
    texts = []
    for gpus in (1, 2):
        params = [nn.Parameter(torch.zeros(DIM)) for _ in range(EXPERTS // gpus)]
        router = nn.Parameter(torch.zeros(EXPERTS, DIM))
        optimizer = torch.optim.AdamW([{"params": params}, {"params": [router], "lr": 0.5}])
        layer = MoELayer(name="moe", experts={"w": params}, router={"weight": router})
        rebalancer = Rebalancer(
            [layer],
            optimizer,
            topology=Topology(1, gpus),
            every=9,
            window=LoadWindow(1, EXPERTS, 1),
            comm=TorchComm(deadline=60),
            gpu=dist.get_rank() % gpus,
        )
        for number, param in enumerate([*params, router]):
            is_without = dist.get_rank() == 1 and param is not router and (gpus == 2 or number == 5)
            param.grad = None if is_without else torch.ones_like(param)
        optimizer.step()
        optimizer.zero_grad()
        with pytest.raises(DistplbError) as caught:
            rebalancer.apply(Placement(torch.arange(EXPERTS).flip(0)[None], EXPERTS, gpus))
        texts.append(str(caught.value))
        rebalancer.close()
    return texts[0], texts[1]


def test_what_cannot_be_known_is_named() -> None:
    apart = "step 1 on rank 0; no state on rank 1"
    for copies, never in on_ranks(2, unknown):
        assert f"moe.experts.w in slot 5: copies of one expert differ ({apart}); take the same optimizer" in copies
        assert f"some rank does not know the optimizer state that another has for an expert (at least {apart})" in never
