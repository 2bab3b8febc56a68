"""The gradient of a home is whole before the hooks of DDP, of FSDP2 and of its user see it.

And what must show in a comparison of trainings: a gradient left behind, replicas overwritten before the backward, a
gradient added after the hooks.

Shapes: G own slots of a rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from fsdp2 import needs_fsdp2
from lent_training import Run, Training, furthest, poison, relative, trained
from ranks import on_ranks
from torch import Tensor
from torch.distributed.tensor import DTensor

from distplb import Topology
from distplb.replicas.lend import Lender, Loan
from distplb.replicas.step_balancer import StepBalancer

Seen = list[tuple[str, Tensor]]
ITERATIONS = 4
SHARDINGS = ["ddp", pytest.param("fsdp 0", marks=needs_fsdp2), pytest.param("fsdp 1", marks=needs_fsdp2)]


# --- what hooks see -----------------------------------------------------------------------------------------------


def seen_by_ddp(training: Training, seen: Seen) -> None:
    """Note each gradient of experts in the bucket that DDP is about to reduce."""
    names = {id(parameter): name for name, parameter in training.experts.items()}
    group = training.world.copies

    def reduce(_: Any, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        for parameter, gradient in zip(bucket.parameters(), bucket.gradients(), strict=True):
            seen.append((names[id(parameter)], gradient.clone()))
        work = dist.all_reduce(bucket.buffer().div_(group.size()), group=group, async_op=True)
        assert work is not None
        reduced: torch.futures.Future[Tensor] = work.get_future().then(lambda future: future.value()[0])
        return reduced

    reduce.__annotations__.clear()  # DDP compares them with the classes, and here they are strings
    training.wrapped[0].register_comm_hook(None, reduce)


@contextmanager
def seen_by_fsdp(seen: Seen) -> Iterator[None]:
    """Note each gradient of experts when FSDP2 takes it from the gathered weights."""
    from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup

    take = FSDPParamGroup.post_backward

    def noted(group: Any, *args: Any) -> Any:
        for one in group.fsdp_params:
            whole = getattr(one, "_unsharded_param", None)
            if one._module_info.param_name in ("w_in", "w_out") and whole is not None and whole.grad is not None:
                gradient = whole.grad.to_local() if isinstance(whole.grad, DTensor) else whole.grad
                seen.append((one._param_fqn or one._module_info.param_name, gradient.clone()))
        return take(group, *args)

    with patch.object(FSDPParamGroup, "post_backward", noted):
        yield


def seen_by_users(training: Training, seen: Seen) -> None:
    """Note each gradient of experts when it has just been accumulated, as an optimizer in the backward would see it."""
    for name, parameter in training.experts.items():
        parameter.register_post_accumulate_grad_hook(
            lambda one, name=name: seen.append((name, local(one.grad).clone()))  # type: ignore[misc]
        )


def local(gradient: Any) -> Tensor:
    found: Tensor = gradient.to_local() if isinstance(gradient, DTensor) else gradient
    return found


def gradients_seen(run: Run) -> tuple[dict[str, Seen], float]:
    """By kind of hook, all that it saw in a few iterations, by name; and the share of steps with replicas."""
    training, reduced, by_users = Training(run), Seen(), Seen()
    seen_by_users(training, by_users)
    if not training.world.is_fsdp:
        seen_by_ddp(training, reduced)
    with seen_by_fsdp(reduced) if training.world.is_fsdp else nullcontext():
        for _ in range(ITERATIONS):
            training.iterate(lambda: poison(training))
    seen = {"reduced": reduced, "by users": by_users}
    return {kind: sorted(each, key=lambda one: one[0]) for kind, each in seen.items()}, training.result().lent


def hooks_compared(sharding: str) -> tuple[dict[str, tuple[float, float, int]], float]:
    """By kind of hook: how far what it sees is from the run without replicas, the same with one gradient left behind,
    and how often it runs. And the share of steps with replicas.
    """
    plain, _ = gradients_seen(Run(sharding, "none", 2, replicas=False))
    lent, share = gradients_seen(Run(sharding, "full", 2))
    with one_left_behind():
        broken, _ = gradients_seen(Run(sharding, "full", 2))
    kinds = {
        kind: (differ(plain[kind], lent[kind]), differ(plain[kind], broken[kind]), len(plain[kind])) for kind in plain
    }
    return kinds, share


def differ(one: Seen, other: Seen) -> float:
    assert [name for name, _ in one] == [name for name, _ in other]
    return max(relative(a, b) for (_, a), (_, b) in zip(one, other, strict=True))


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_hooks_see_the_whole_gradient_of_a_home(sharding: str) -> None:
    found = on_ranks(4, hooks_compared, sharding)
    for kinds, share in found:
        assert share > 0.5
        for same, _, times in kinds.values():
            assert times >= 4 * ITERATIONS  # two tensors of two layers
            assert same <= 1e-12
    for kind in ("reduced", "by users"):
        assert max(kinds[kind][1] for kinds, _ in found) > 1e-3  # where the gradient was left behind


# --- what must show in a comparison -------------------------------------------------------------------------------


@contextmanager
def one_left_behind() -> Iterator[None]:
    """Leave one replica's gradient behind, the first that this rank holds."""
    bring_home, left = Lender.bring_home, list[int]()

    def without_one(lender: Any, loan: Loan, own: Any, lent: Any) -> Any:
        if loan.pushes.receives and not left:
            left.append(loan.pushes.receives[0].slot)
            lent = [None if one is None else one.clone() for one in lent]
            for one in lent:
                one[left[0]] = 0
        return bring_home(lender, loan, own, lent)

    with patch.object(Lender, "bring_home", without_one):
        yield


@contextmanager
def never_pushed_again() -> Iterator[None]:
    """Compute the backward with what is in the buffer."""

    def begin_backward(lender: Any, loan: Loan, runs: Any) -> None:
        lender._held = lender._computing = loan

    with patch.object(Lender, "begin_backward", begin_backward):
        yield


@contextmanager
def added_after(late: dict[str, list[Tensor]]) -> Iterator[None]:
    """Hand on the gradients of own slots alone; what comes home is kept, by layer, to be added after the hooks."""
    bring_home = Lender.bring_home

    def own_alone(lender: Any, loan: Loan, own: Any, lent: Any) -> Any:
        zeros = [torch.zeros_like(rows) for rows in loan.home_rows]
        late[loan.layer] = bring_home(lender, loan, zeros, lent) or zeros
        return bring_home(lender, loan, own, [None] * len(lent))

    with patch.object(Lender, "bring_home", own_alone):
        yield


def add_late(training: Training, late: dict[str, list[Tensor]]) -> None:
    """Add to this rank's `grad` after the backward, as a hook that comes too late would."""
    for layer, gradients in late.items():
        experts = next(moe.experts for moe in training.moes if repr(moe.name) in layer)
        for parameter, gradient in zip((experts.w_in, experts.w_out), gradients, strict=True):
            mine = gradient
            if training.world.is_fsdp:
                mine = gradient.chunk(2, int(training.run.sharding.split()[1]))[training.world.copies.rank()]
            local(parameter.grad).add_(mine)
    late.clear()


def broken_runs(sharding: str) -> dict[str, float]:
    """How far runs are from the one without replicas."""
    run = Run(sharding, iterations=ITERATIONS)
    plain = trained(run.plain)
    found = {"whole": furthest(plain, trained(run))[0]}
    with one_left_behind():
        found["left behind"] = unlike(plain, run)
    with never_pushed_again():
        found["overwritten"] = unlike(plain, run)
    late: dict[str, list[Tensor]] = {}
    with added_after(late):
        found["added late"] = unlike(plain, run, lambda training: add_late(training, late))
    return found


def unlike(plain: Any, run: Run, after_backward: Callable[[Training], None] = lambda _: None) -> float:
    """How far the parameters are from those of the run without replicas, whatever the tokens chose."""
    training = Training(run)
    for _ in range(run.iterations):
        training.iterate(lambda: poison(training), lambda: after_backward(training))
    values = training.result().values
    return max(relative(value, values[name]) for name, value in plain.values.items())


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_a_comparison_of_runs_notices_gradients_that_are_lost_wrong_or_late(sharding: str) -> None:
    for found in on_ranks(4, broken_runs, sharding):
        assert found.pop("whole") <= 1e-10
        assert min(found.values()) > 1e-4, found


# --- what the caller may do with the output -----------------------------------------------------------------------


def changed_in_place() -> tuple[bool, bool, float]:
    """Whether the step has replicas, whether the output is a view, and how far gradients are from double the usual."""
    balancer = StepBalancer(topology=Topology(1, 2), num_experts=2, replica_slots=1)
    weight = torch.full((1, 3, 3), 0.1, dtype=torch.float64, requires_grad=True)
    gradients = []
    for factor in (1.0, 2.0):
        step = balancer.dispatch("layer", torch.zeros(6, 1, dtype=torch.int64))
        rows = torch.ones(int(step.receive.sum()), 3, dtype=torch.float64, requires_grad=True) * 1.0
        computed = balancer.compute(step, both, rows, weight)
        is_view = computed._is_view()
        computed *= factor
        computed.sum().backward()
        assert weight.grad is not None
        gradients.append(weight.grad)
        weight.grad = None
    return not step.is_trivial, is_view, relative(2 * gradients[0], gradients[1]) if dist.get_rank() == 0 else 0.0


def both(rows: Tensor, own: Any, replicas: Any) -> Tensor:
    """Own rows come on rank 0, those of its replica on rank 1."""
    (mine,), (away,) = own, replicas
    rows *= 2
    return rows @ (mine[0] if dist.get_rank() == 0 else away[0]) + 0 * (mine.sum() + away[:1].nan_to_num().sum())


def test_rows_and_output_may_be_changed_in_place() -> None:
    """In a step with replicas it was an error, because they were views that a function of autograd had returned.

    FSDP2 warned of such an output of a module that it shards.
    """
    assert on_ranks(2, changed_in_place) == [(True, False, 0.0)] * 2
