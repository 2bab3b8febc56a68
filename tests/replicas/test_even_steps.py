"""Steps in which no replica pays: known from the loads of the GPUs, without a split; and recomputations of any step.

Shapes: N tokens of a rank, P slots, M ranks.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from lending import Step, moe, oracle
from ranks import on_ranks
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from distplb import Topology, split
from distplb.errors import DistplbError
from distplb.replicas.step_balancer import StepBalancer
from distplb.splitting.gate import is_surely_trivial
from distplb.splitting.inputs import checked_prices, checked_tolerance

EVEN, UNEVEN = [0, 1, 2, 3], [0, 0, 0, 0, 0, 0, 1, 2, 3]


def test_the_gate_closes_only_where_a_split_makes_no_replica() -> None:
    """Random loads near the gate, with and without prices, tolerance and cap, on one node and on two."""
    closed = opened = 0
    for seed in range(1500):
        random = np.random.default_rng(seed)
        counts = 100 + random.integers(0, int(random.choice((2, 10, 60))), (1, 8)).repeat(4, 0) // 4
        load = counts.sum(0).reshape(4, 2).sum(1)
        tolerance, price = float(random.choice((0.0, 0.005, 0.05))), float(random.choice((0, 1, 20, math.inf)))
        cap = None if random.random() < 0.7 else int(load.max()) + int(random.integers(-2, 3))
        options: dict[str, Any] = {"tolerance": tolerance, "push_price": (price, max(price, 3 * price))}
        closes = is_surely_trivial(
            load, tolerance=checked_tolerance(tolerance), inside=checked_prices(options["push_price"])[0], cap=cap
        )
        topology = Topology(*((1, 4), (2, 2))[seed % 2])
        try:
            found = split(counts, np.arange(8) // 2, topology=topology, max_tokens_per_gpu=cap, **options)
        except DistplbError:
            assert not closes
            continue
        assert found.is_trivial or not closes
        closed += closes
        opened += not found.is_trivial
    assert min(closed, opened) > 300


# --- on ranks --------------------------------------------------------------------------------------------------


def step_of(ids: list[int], rank: int) -> Step:
    gen = torch.Generator().manual_seed(rank)
    x = torch.randn(len(ids), 3, generator=gen, dtype=torch.float64)
    return Step(x, torch.tensor(ids).view(-1, 1), torch.ones(len(ids), 1, dtype=torch.float64))


def new_balancer(**options: Any) -> StepBalancer:
    return StepBalancer(topology=Topology(1, dist.get_world_size()), num_experts=4, deadline=20, **options)


def kinds_of_steps() -> list[str]:
    """Even steps, then uneven ones."""
    balancer, found = new_balancer(), []
    for step in range(12):
        ids = UNEVEN if step >= 8 and dist.get_rank() == 0 else EVEN
        one = balancer.dispatch("a", torch.tensor(ids)[:, None])
        found.append("even" if one.is_trivial else "uneven")
        assert one.is_trivial == (one.split is None)
        moved = one.slot_of_token.flatten().ne(torch.tensor(ids) + 2 * (torch.tensor(ids) >= 2))
        assert bool(moved.any()) <= (not one.is_trivial)
    return found


def test_a_layer_that_turns_uneven_is_split_in_that_very_step() -> None:
    assert on_ranks(2, kinds_of_steps) == [["even"] * 8 + ["uneven"] * 4] * 2


def exchanged() -> list[Any]:
    """Ranks send to different slots, and both GPUs get four tokens."""
    step = new_balancer().dispatch("a", torch.tensor([[[0, 0, 2, 2], [1, 1, 3, 3]][dist.get_rank()]]).T)
    assert step.split is None
    return [step.send.tolist(), step.receive.tolist(), step.slot_of_token.flatten().tolist()]


def test_an_even_step_tells_what_each_rank_sends_and_receives() -> None:
    first, second = on_ranks(2, exchanged)
    assert first == [[[2, 0, 0, 0], [2, 0, 0, 0]], [[2, 0, 0, 0], [0, 2, 0, 0]], [0, 0, 4, 4]]
    assert second == [[[0, 2, 0, 0], [0, 2, 0, 0]], [[2, 0, 0, 0], [0, 2, 0, 0]], [1, 1, 5, 5]]


def recomputed(reentrant: bool) -> list[str]:
    """A layer is evaluated and then trained, each batch under recomputation; even steps and uneven ones."""
    rank, size = dist.get_rank(), dist.get_world_size()
    balancer, gen = new_balancer(), torch.Generator().manual_seed(0)
    full = [torch.randn(4, 3, 3, generator=gen, dtype=torch.float64).requires_grad_() for _ in range(2)]
    own = [one.detach()[2 * rank : 2 * rank + 2].clone().requires_grad_() for one in full]
    kinds: list[str] = []
    dispatch = balancer.dispatch

    def noted(layer: Any, ids: Tensor) -> Any:
        found = dispatch(layer, ids)
        kinds.append("even" if found.is_trivial else "uneven")
        return found

    balancer.dispatch = noted  # type: ignore[method-assign]
    with torch.no_grad():
        moe(balancer, "a", step_of(UNEVEN, rank), own)
        for _ in range(6):
            moe(balancer, "a", step_of(EVEN, rank), own)
    for number in range(12):
        for one in (*own, *full):
            one.grad = None
        ids = UNEVEN if number % 3 == 0 else EVEN
        kinds.append("|")
        step = step_of(ids, rank)
        x = step.x.requires_grad_()
        out = checkpoint(lambda x, step=step: moe(balancer, "a", Step(x, step.ids, step.gate), own), x,
                         use_reentrant=reentrant)  # fmt: skip
        out.square().sum().backward()
        for other in range(size):
            oracle(step_of(ids, other), *full).square().sum().backward()
        for one, every in zip(own, full, strict=True):
            assert one.grad is not None
            assert every.grad is not None
            torch.testing.assert_close(one.grad, every.grad[2 * rank : 2 * rank + 2], rtol=1e-12, atol=1e-12)
    return kinds


def test_a_step_is_recomputed_as_its_forward_ran() -> None:
    for reentrant in (False, True):
        first, second = on_ranks(2, recomputed, reentrant)
        assert first == second
        steps = " ".join(first).split(" | ")[1:]
        assert {tuple(step.split()) for step in steps} == {("even", "even"), ("uneven", "uneven")}


def changed_router(reentrant: bool, even: bool) -> tuple[str, bool]:
    """Rank 1's router chooses otherwise in the recomputation; whether the next step runs."""
    rank = dist.get_rank()
    balancer = new_balancer()
    own = [torch.ones(2, 3, 3, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    step, calls = step_of(EVEN if even else UNEVEN, rank), list[int]()

    def layer(x: Tensor) -> Tensor:
        calls.append(1)
        ids = step.ids.flip(0) + 0 if len(calls) == 1 or rank == 0 else torch.zeros_like(step.ids)
        return moe(balancer, "a", Step(x, ids, step.gate), own)

    text = "no error"
    try:
        checkpoint(layer, step.x.requires_grad_(), use_reentrant=reentrant).sum().backward()
    except DistplbError as error:
        text = str(error)
    found = balancer.dispatch("b", step_of(UNEVEN, rank).ids)
    return text, not found.is_trivial


def every_change() -> list[tuple[str, bool]]:
    return [changed_router(reentrant, even) for reentrant in (False, True) for even in (False, True)]


def test_a_router_that_chooses_otherwise_is_refused_on_all_ranks() -> None:
    for found in on_ranks(2, every_change):
        for text, goes_on in found:
            assert text.startswith("the router of layer 'a' chose other experts in the recomputation than")
            assert goes_on
