"""Quiet layers: which steps are looked at, alike on all ranks, also under recomputation and after a refusal.

Shapes: N tokens of a rank, P slots, M ranks.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from lending import Step, moe, oracle
from ranks import on_ranks
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from distplb import Topology
from distplb.errors import DistplbError
from distplb.replicas.quiet import Quiet
from distplb.replicas.step_balancer import StepBalancer

EVEN, UNEVEN = [0, 1, 2, 3], [0, 0, 0, 0, 0, 0, 1, 2, 3]


def looked_at(quiet: Quiet, trivial: list[bool]) -> list[int]:
    looks = []
    for step, is_trivial in enumerate(trivial):
        if quiet.looks:
            looks.append(step)
            quiet.note(is_trivial=is_trivial)
        else:
            quiet.skip()
    return looks


def test_four_looks_without_replicas_come_before_steps_are_left_out() -> None:
    assert looked_at(Quiet(), [True] * 40) == [0, 1, 2, 3, 5, 9, 17, 25, 33]


def test_a_layer_with_replicas_is_always_looked_at() -> None:
    assert looked_at(Quiet(), [False] * 20) == list(range(20))
    assert looked_at(Quiet(), [True, True, True, False] * 5) == list(range(20))


def test_a_layer_that_turns_uneven_is_looked_at_within_eight_steps_and_then_in_each() -> None:
    for turn in range(4, 40):
        looks = looked_at(Quiet(), [step < turn for step in range(60)])
        first = min(step for step in looks if step >= turn)
        assert first - turn < 8
        assert looks[looks.index(first) :] == list(range(first, 60))


def test_asking_twice_changes_nothing() -> None:
    quiet = Quiet()
    for _ in range(4):
        quiet.note(is_trivial=True)
    assert [quiet.looks for _ in range(5)] == [False] * 5


# --- on ranks --------------------------------------------------------------------------------------------------


def step_of(ids: list[int], rank: int) -> Step:
    gen = torch.Generator().manual_seed(rank)
    x = torch.randn(len(ids), 3, generator=gen, dtype=torch.float64)
    return Step(x, torch.tensor(ids).view(-1, 1), torch.ones(len(ids), 1, dtype=torch.float64))


def new_balancer(**options: Any) -> StepBalancer:
    return StepBalancer(topology=Topology(1, dist.get_world_size()), num_experts=4, deadline=20, **options)


def looks(cap: int | None) -> list[str]:
    """Even steps, then uneven ones: what each dispatch is."""
    balancer, found = new_balancer(max_tokens_per_gpu=cap), []
    for step in range(30):
        ids = UNEVEN if step >= 20 and dist.get_rank() == 0 else EVEN
        one = balancer.dispatch("a", torch.tensor(ids)[:, None])
        found.append("skipped" if one.split is None else "even" if one.is_trivial else "uneven")
        moved = one.slot_of_token.flatten().ne(torch.tensor(ids) + 2 * (torch.tensor(ids) >= 2))
        assert bool(moved.any()) <= (not one.is_trivial)
    return found


def test_all_ranks_skip_alike_and_wake() -> None:
    first, second = on_ranks(2, looks, None)
    assert first == second
    assert [step for step, one in enumerate(first) if one != "skipped"] == [0, 1, 2, 3, 5, 9, 17, *range(25, 30)]
    assert first[25:] == ["uneven"] * 5


def test_a_cap_asks_for_a_look_in_every_step() -> None:
    for found in on_ranks(2, looks, 20):
        assert "skipped" not in found


def recomputed(reentrant: bool) -> list[str]:
    """A layer falls quiet in evaluation and is then trained, each batch under recomputation."""
    rank, size = dist.get_rank(), dist.get_world_size()
    balancer, gen = new_balancer(), torch.Generator().manual_seed(0)
    full = [torch.randn(4, 3, 3, generator=gen, dtype=torch.float64).requires_grad_() for _ in range(2)]
    own = [one.detach()[2 * rank : 2 * rank + 2].clone().requires_grad_() for one in full]
    kinds: list[str] = []
    dispatch = balancer.dispatch

    def noted(layer: Any, ids: Tensor) -> Any:
        found = dispatch(layer, ids)
        kinds.append("skipped" if found.split is None else "even" if found.is_trivial else "uneven")
        return found

    balancer.dispatch = noted  # type: ignore[method-assign]
    with torch.no_grad():
        moe(balancer, "a", step_of(UNEVEN, rank), own)  # the counts that training meets again, in a step that it skips
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


def test_a_quiet_layer_is_recomputed_as_its_forward_ran() -> None:
    """A skipped step was recomputed with replicas if an earlier step with the same counts had had some."""
    for reentrant in (False, True):
        first, second = on_ranks(2, recomputed, reentrant)
        assert first == second
        steps = " ".join(first).split(" | ")[1:]
        assert {tuple(step.split()) for step in steps} >= {("skipped", "skipped"), ("uneven", "uneven")}
        assert all(len(set(step.split())) == 1 for step in steps)


def changed_router(reentrant: bool, quiet: bool) -> tuple[str, bool]:
    """Rank 1's router chooses otherwise in the recomputation; whether the next step runs."""
    rank = dist.get_rank()
    balancer = new_balancer()
    own = [torch.ones(2, 3, 3, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    if quiet:
        for _ in range(6):
            balancer.dispatch("a", torch.tensor(EVEN)[:, None])
    step, calls = step_of(EVEN if quiet else UNEVEN, rank), list[int]()

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
    return [changed_router(reentrant, quiet) for reentrant in (False, True) for quiet in (False, True)]


def test_a_router_that_chooses_otherwise_is_refused_on_all_ranks() -> None:
    for found in on_ranks(2, every_change):
        for text, goes_on in found:
            assert text.startswith("the router of layer 'a' chose other experts in the recomputation than")
            assert goes_on
