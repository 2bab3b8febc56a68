"""Random steps with replicas give the outputs and gradients of one process that has all tokens and all weights.

Shapes: N tokens of a rank, K experts of each token, D dim, H ffn, P slots, M ranks, R replica slots.
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lending import Step, moe_after, oracle
from ranks import on_ranks
from torch import Tensor

from distplb import Topology
from distplb.replicas.step_balancer import StepBalancer

STEPS = 9  # of a world
# In the default run; four times as many with --long. Together they are 1,000 steps.
WORLDS = {2: range(10), 3: range(100, 109), 4: range(200, 209)}
MORE_WORLDS = {2: range(10, 40), 3: range(109, 136), 4: range(209, 236)}
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 0.06}
MODES = (
    *("plain", "plain", "summed", "in order", "in reverse", "retained", "no grad", "inference"),
    *("frozen", "one frozen", "rows frozen", "two layers", "two layers"),
)
TOKENS = ("all", "all", "all", "idle ranks", "one rank", "silent rank", "nobody")


@dataclass(frozen=True)
class World:
    """A balancer and its layers, drawn from a seed, the same on all ranks."""

    seed: int
    size: int

    @property
    def drawn(self) -> random.Random:
        return random.Random(self.seed)

    def options(self) -> dict[str, Any]:
        rng, size = self.drawn, self.size
        topology, price = Topology(1, size), (0.0, float("inf"))
        if size == 4 and rng.random() < 0.5:
            topology, price = Topology(2, 2), rng.choice([(0.0, float("inf")), (0.0, 3.0), (1.0, 4.0), (0.0, 0.0)])
        slots = size * rng.choice([1, 1, 2, 3, 4, 8, 64 // size])
        replicas, keep = rng.choice([1, 2, 2, 3]), rng.random() < 0.25
        return {
            "topology": topology,
            "push_price": price,
            "num_experts": slots,
            "replica_slots": replicas,
            "keep": keep,
            "tile": rng.choice([1, 1, 4]),
        }

    def weights(self, layer: int, num_slots: int) -> list[Tensor]:
        """Of all slots: one to three tensors of different shapes, and perhaps dtypes; the second layer is larger."""
        rng, gen = random.Random(self.seed + 1), torch.Generator().manual_seed(self.seed)
        dtype = self.dtype
        number, other = rng.randint(1, 3), rng.choice([dtype, dtype, torch.float32])
        hidden = 5 if number == 1 else (7, 12)[layer]
        shapes = [(5, hidden), (hidden, 5), (5,)][:number]
        dtypes = [dtype, dtype, other][:number]
        return [
            (torch.randn(num_slots, *shape, generator=gen, dtype=torch.float64) * 0.4).to(kind)
            for shape, kind in zip(shapes, dtypes, strict=True)
        ]

    @property
    def dtype(self) -> torch.dtype:
        return random.Random(self.seed + 2).choice([torch.float64] * 4 + [torch.float32, torch.bfloat16])

    def step(self, number: int, rank: int, num_slots: int) -> Step:
        """The tokens of a rank in one forward."""
        rng = random.Random(f"{self.seed} {number}")
        kind, of_rank = rng.choice(TOKENS), rng.randrange(self.size)
        has_none = {
            "idle ranks": rank in rng.sample(range(self.size), self.size - 1),
            "one rank": rank != of_rank,
            "silent rank": rank == of_rank,
            "nobody": True,
        }
        popularity = torch.tensor([rng.random() + 0.05 for _ in range(num_slots)])
        for hot in rng.sample(range(num_slots), min(num_slots, rng.choice([1, 1, 2, 3]))):
            popularity[hot] *= 30
        num_own, k = num_slots // self.size, min(2, num_slots // self.size)
        if kind == "silent rank":
            popularity[of_rank * num_own : (of_rank + 1) * num_own] = -1  # nobody sends it anything
        gen = torch.Generator().manual_seed(hash((self.seed, number, rank)) % 2**31)
        tokens = 0 if has_none.get(kind, False) else int(torch.randint(1, 40, (), generator=gen))
        ids = (popularity.expand(tokens, -1) * torch.rand(tokens, num_slots, generator=gen)).topk(k, 1).indices
        x = torch.randn(tokens, 5, generator=gen, dtype=torch.float64).to(self.dtype)
        return Step(x, ids, torch.rand(tokens, k, generator=gen, dtype=torch.float64).to(self.dtype))


@dataclass
class Case:
    """One training step in one of the modes: its forwards, and what is trained."""

    mode: str
    forwards: list[list[Step]]  # of each forward, by rank
    weights: list[list[Tensor]]  # of each layer, all slots

    def prepared(self, dtype: torch.dtype | None) -> tuple[list[list[Step]], list[list[Tensor]]]:
        """Leaves of their own, in a dtype if one is given."""
        frozen = {"frozen": (0, 1, 2), "one frozen": (0,)}.get(self.mode, ())
        forwards = [
            [
                Step(leaf(one.x, dtype, self.mode != "rows frozen"), one.ids, one.gate.to(dtype or one.gate.dtype))
                for one in steps
            ]
            for steps in self.forwards
        ]
        weights = [[leaf(w, dtype, place not in frozen) for place, w in enumerate(layer)] for layer in self.weights]
        return forwards, weights


def leaf(values: Tensor, dtype: torch.dtype | None, is_trained: bool) -> Tensor:
    return values.detach().clone().to(dtype or values.dtype).requires_grad_(is_trained)


def loss_of(out: Tensor) -> Tensor:
    factors = torch.sin(1 + torch.arange(out.numel(), dtype=torch.float64)).view(out.shape).to(out.dtype)
    return (out * factors).sum()


def backward(mode: str, losses: list[Tensor]) -> None:
    """Losses of each forward, in the order of the mode."""
    if mode == "summed":
        torch.stack(losses).sum().backward()
    elif mode == "in reverse":
        for loss in reversed(losses):
            loss.backward()
    elif mode == "retained":
        losses[0].backward(retain_graph=True)
        losses[0].backward()
    else:
        for loss in losses:
            loss.backward()


def run_case(case: Case, balancer: StepBalancer, rng: random.Random, early: bool) -> tuple[list[Any], int]:
    """Outputs and gradients of this rank, and how many dispatches had replicas."""
    rank = dist.get_rank()
    forwards, weights = case.prepared(None)
    num_own = len(weights[0][0]) // dist.get_world_size()
    local = [
        [leaf(w[rank * num_own : (rank + 1) * num_own], None, w.requires_grad) for w in layer] for layer in weights
    ]
    mode = {"no grad": torch.no_grad, "inference": torch.inference_mode}.get(case.mode, torch.enable_grad)
    outs, uneven = [], 0
    with mode():
        for steps in forwards:
            x = steps[rank].x
            for layer, own in enumerate(local):
                time.sleep(rng.choice([0, 0, 0, 0.004]))
                found = balancer.dispatch(f"layer {layer}", steps[rank].ids)
                uneven += not found.is_trivial
                if early:
                    balancer.push(found, *own)
                step = Step(x, steps[rank].ids, steps[rank].gate)
                x = moe_after(balancer, found, step, own)
            outs.append(x)
    if mode is torch.enable_grad:
        backward(case.mode, [loss_of(one) for one in outs])
    values = [*outs, *(steps[rank].x.grad for steps in forwards), *(w.grad for layer in local for w in layer)]
    return values, uneven


def expected(case: Case) -> list[Any]:
    """The same in one process, in float64."""
    rank, size = dist.get_rank(), dist.get_world_size()
    forwards, weights = case.prepared(torch.float64)
    outs, losses = [], []
    for steps in forwards:
        loss = torch.zeros((), dtype=torch.float64)
        for other, step in enumerate(steps):
            x = step.x
            for layer in weights:
                x = oracle(Step(x, step.ids, step.gate), *layer)
            loss = loss + loss_of(x)
            if other == rank:
                outs.append(x)
        losses.append(loss)
    if case.mode not in ("no grad", "inference"):
        backward(case.mode, losses)
    num_own = len(weights[0][0]) // size
    own = slice(rank * num_own, (rank + 1) * num_own)
    gradients = [None if w.grad is None else w.grad[own] for layer in weights for w in layer]
    return [*outs, *(steps[rank].x.grad for steps in forwards), *gradients]


def difference(found: Any, wanted: Any, at_least: float) -> float:
    """In the maximum norm, relative."""
    if found is None or wanted is None:
        return 0.0 if (found is None or not found.any()) and (wanted is None or not wanted.any()) else float("inf")
    if not found.numel():
        return 0.0
    distance = float((found.double() - wanted).abs().max())
    return distance / max(at_least, float(wanted.abs().max())) if distance == distance else float("inf")


def random_worlds(seeds: range) -> list[tuple[int, int, int]]:
    """For each world its dispatches, those with replicas, and those with tokens."""
    rank, size = dist.get_rank(), dist.get_world_size()
    found = []
    for seed in seeds:
        world = World(seed, size)
        options = world.options()
        num_slots, rng = options["num_experts"], random.Random(seed)
        delays = random.Random(f"{seed} {rank}")
        balancer = StepBalancer(deadline=60, **options)
        dispatches = uneven = number = 0
        for _ in range(STEPS):
            mode, early = rng.choice(MODES), rng.random() < 0.3
            forwards = 2 if mode in ("summed", "in order", "in reverse") else 1
            layers = range(2 if mode == "two layers" or (forwards == 2 and rng.random() < 0.4) else 1)
            steps = [[world.step(number + one, other, num_slots) for other in range(size)] for one in range(forwards)]
            number += forwards
            case = Case(mode, steps, [world.weights(layer, num_slots) for layer in layers])
            values, times = run_case(case, balancer, delays, early)
            for place, (one, wanted) in enumerate(zip(values, expected(case), strict=True)):
                dtype = world.dtype if one is None else one.dtype  # a weight may have another one than the tokens
                # Sums of low precision that cancel are not measured by themselves.
                error = difference(one, wanted, 1e-3 if dtype == torch.float64 else 0.3)
                assert error < max(TOLERANCE[dtype], TOLERANCE[world.dtype]), (
                    seed,
                    number,
                    mode,
                    place,
                    error,
                    options,
                )
            dispatches += forwards * len(layers)
            uneven += times
        found.append((seed, dispatches, uneven))
    return found


def check(size: int, seeds: range) -> None:
    found = on_ranks(size, random_worlds, seeds)
    assert all(one == found[0] for one in found)
    dispatches, uneven = (sum(one[place] for one in found[0]) for place in (1, 2))
    assert uneven > 0.6 * dispatches, found[0]


@pytest.mark.parametrize("size", [2, 3, 4])
def test_random_steps_give_what_one_process_gives(size: int) -> None:
    check(size, WORLDS[size])


@pytest.mark.long
@pytest.mark.parametrize("size", [2, 3, 4])
def test_more_random_steps_give_what_one_process_gives(size: int) -> None:
    check(size, MORE_WORLDS[size])
