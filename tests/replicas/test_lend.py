"""Replicas in the autograd graph: pushed again, brought home, under recomputation, and whatever the experts do.

Shapes: N tokens of a rank, D dim, P slots, M ranks, G own and R replica slots, X rows.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from lending import Step, expert, moe, moe_after, oracle, received, run_slots
from ranks import on_ranks
from torch import Tensor
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from distplb import Topology
from distplb.comm.steps import StepOfOne
from distplb.core.stages import current_stage
from distplb.errors import DistplbError, LostRanksError
from distplb.replicas import lend
from distplb.replicas.lend import Lender, Loan
from distplb.replicas.pushes import Pushes
from distplb.replicas.stages import StepStages
from distplb.replicas.step_balancer import Dispatch, StepBalancer

DIM, OWN = 4, 2


class Layer:
    """The weights of a layer on all ranks, and this rank's own ones."""

    def __init__(self, name: str, seed: int, hidden: int = 6) -> None:
        gen = torch.Generator().manual_seed(seed)
        slots, rank = OWN * dist.get_world_size(), dist.get_rank()
        shapes = ((slots, DIM, hidden), (slots, hidden, DIM))
        self.name = name
        self.all = [torch.randn(shape, generator=gen, dtype=torch.float64).requires_grad_() for shape in shapes]
        self.mine = slice(rank * OWN, (rank + 1) * OWN)
        self.own = [one.detach()[self.mine].clone().requires_grad_() for one in self.all]

    def error(self) -> float:
        """Of this rank's gradients; those of all weights are the oracle's."""
        pairs = zip(self.own, self.all, strict=True)
        return max(relative(own.grad, every.grad[self.mine]) for own, every in pairs)  # type: ignore[index]


def relative(found: Tensor | None, wanted: Tensor) -> float:
    assert found is not None
    distance = float((found - wanted).abs().max() / wanted.abs().max())
    return distance if distance == distance else float("inf")


def new_balancer(**options: Any) -> StepBalancer:
    size = dist.get_world_size()
    return StepBalancer(topology=Topology(1, size), num_experts=OWN * size, **({"deadline": 60} | options))


def step_of(rank: int, hot: int = 0, seed: int = 0) -> Step:
    """Most tokens go to one expert."""
    gen = torch.Generator().manual_seed(10 * seed + rank)
    slots = OWN * dist.get_world_size()
    ids = torch.tensor([hot] * 8 + list(range(slots)))[:, None]
    x = torch.randn(len(ids), DIM, generator=gen, dtype=torch.float64)
    return Step(x, ids, torch.ones(len(ids), 1, dtype=torch.float64))


def weighted(out: Tensor) -> Tensor:
    return (out * torch.linspace(0.5, 2.0, out.numel(), dtype=out.dtype).view(out.shape)).sum()


def expect(layers: list[Layer], hot: int = 0, seed: int = 0) -> None:
    """Gradients of all weights, from the tokens of all ranks through one layer after the other."""
    for rank in range(dist.get_world_size()):
        step = step_of(rank, hot, seed)
        x = step.x
        for layer in layers:
            x = oracle(Step(x, step.ids, step.gate), *layer.all)
        weighted(x).backward()


def through(balancer: StepBalancer, layers: list[Layer], step: Step, x: Tensor) -> Tensor:
    for layer in layers:
        x = moe(balancer, layer.name, Step(x, step.ids, step.gate), layer.own)
    return x


def local_step(balancer: StepBalancer, layer: Layer) -> tuple[Dispatch, Tensor]:
    """A dispatched step with replicas, and rows that arrive here, without an exchange of the framework."""
    step = step_of(dist.get_rank())
    found = balancer.dispatch(layer.name, step.ids)
    assert not found.is_trivial
    rows = torch.ones(sum(found.exchange.receive_sizes), DIM, dtype=torch.float64, requires_grad=True)
    return found, rows


# --- controls --------------------------------------------------------------------------------------------------


def overwritten_between(control: str) -> float:
    """The error of gradients, where another step and NaN have replaced the replicas between forward and backward."""
    balancer, layers = new_balancer(), [Layer("a", 1), Layer("b", 2, hidden=9)]
    step = step_of(dist.get_rank())
    out = through(balancer, layers, step, step.x.requires_grad_())
    with torch.no_grad():
        other = Layer("c", 3, hidden=9)
        for one in other.own:
            one.fill_(float("nan"))
        assert through(balancer, [other], step, step.x).isnan().any()
    balancer._lender._weights._memory.fill_(255)  # NaN in any dtype
    patched: dict[str, Callable[..., Any]] = {
        "not pushed again": lambda self, loan, runs: None,
        "left behind": lambda self, loan, home, lent: None,
    }
    names = {"not pushed again": "begin_backward", "left behind": "bring_home"}
    whole = Lender._holds
    # Without its own check, or the first control would only show that it is refused.
    holds = whole if control != "not pushed again" else lambda self, loan: True
    with (
        patch.object(Lender, names[control], patched[control]) if control else nullcontext(),
        patch.object(Lender, "_holds", holds),
    ):
        weighted(out).backward()
    expect(layers)
    return max(layer.error() for layer in layers)


def test_replicas_are_pushed_again_before_the_backward() -> None:
    assert max(on_ranks(3, overwritten_between, "")) < 1e-12


def each(body: Callable[..., Any], cases: list[tuple[Any, ...]]) -> list[Any]:
    """Several cases on the same ranks."""
    return [body(*case) for case in cases]


def test_the_comparison_notices_what_is_left_out() -> None:
    for found in zip(*on_ranks(2, each, overwritten_between, [("not pushed again",), ("left behind",)]), strict=True):
        assert max(found) > 1e-2


def kept_gradients(alias: str) -> list[float]:
    """How far tensors that share memory with the gradient of own rows are from what they were."""
    balancer, layer = new_balancer(), Layer("a", 1)
    found, rows = local_step(balancer, layer)
    kept: list[tuple[Tensor, Tensor]] = []
    adapter = torch.zeros_like(layer.own[0]).requires_grad_()
    tokens = found.exchange.tokens_of_slot

    def experts(rows: Tensor, own: Any, away: Any) -> Tensor:
        first = own[0]
        if alias == "hook":
            first.register_hook(lambda gradient: kept.append((gradient, gradient.clone())))
        elif alias == "retained":
            first.retain_grad()
            first.register_hook(lambda gradient: kept.append((first, gradient.clone())))
        elif alias == "adapter":
            first = first + adapter
            first.register_hook(lambda gradient: kept.append((adapter, gradient.clone())))
        elif alias == "view":
            first = first.flatten()
            first.register_hook(lambda gradient: kept.append((gradient, gradient.clone())))
            first = first.view(own[0].shape)
        return run_slots(rows, (first, own[1]), away, tokens)

    weighted(balancer.compute(found, experts, rows, *layer.own)).backward()
    assert kept
    values = [(one.grad if one.requires_grad else one, copy) for one, copy in kept]
    return [relative(one, copy) for one, copy in values]


def test_gradients_that_somebody_else_reads_are_not_written_into() -> None:
    """A hook's list of gradients once got the replicas' gradients too: only references of C++ were counted."""
    aliases = [("hook",), ("retained",), ("adapter",), ("view",)]
    assert on_ranks(2, each, kept_gradients, aliases) == [[[0.0]] * 4] * 2


def sums_of_low_precision() -> list[float]:
    """256 here and 1 from each of three replicas, in three rounds; 256 + 1 is 256 in bfloat16."""
    rank, size = dist.get_rank(), dist.get_world_size()
    balancer = StepBalancer(topology=Topology(1, size), num_experts=size, replica_slots=1, deadline=60)
    ids = torch.zeros(12, 1, dtype=torch.int64)
    found = balancer.dispatch("a", ids)
    assert found.split is not None
    assert found.split.num_replicas == 3
    weight = torch.ones(1, 1, dtype=torch.bfloat16, requires_grad=True)
    factor = 256.0 if rank == 0 else 1.0
    out = balancer.compute(
        found, lambda rows, own, away: own[0][0] * factor + away[0][0], torch.ones(1, dtype=torch.bfloat16), weight
    )
    out.sum().backward()
    assert weight.grad is not None
    return [float(weight.grad)]


def test_sums_of_low_precision_are_rounded_once() -> None:
    """With more replicas than fit into one round of gradients, each round was rounded by itself."""
    assert on_ranks(4, sums_of_low_precision)[0] == [260.0]  # 259 lies between 258 and 260; the even one of them


# --- experts, and how compute is called ------------------------------------------------------------------------


def ignored(what: str) -> tuple[float, bool]:
    """Rank 1 does not use what it gets; the others' gradients are right, and nobody waits."""
    rank = dist.get_rank()
    balancer, layer = new_balancer(), Layer("a", 1)
    found, rows = local_step(balancer, layer)
    tokens = found.exchange.tokens_of_slot

    def experts(rows: Tensor, own: Any, away: Any) -> Tensor:
        if rank != 1:
            return run_slots(rows, own, away, tokens)
        if what == "everything":
            return torch.zeros(rows.shape, dtype=rows.dtype)
        if what == "replicas":
            return run_slots(rows, own, [one.detach() for one in away], tokens)
        return run_slots(torch.ones_like(rows), own, away, tokens)

    weighted(balancer.compute(found, experts, rows, *layer.own)).backward()
    gradient = layer.own[0].grad
    assert gradient is not None
    # By hand: rank 0's expert 0 on its own rows, and on those of every replica that was used.
    full = [one.detach().clone().requires_grad_() for one in layer.all]
    assert found.split is not None
    for holder in range(dist.get_world_size()):
        if holder == 1 and what in ("everything", "replicas"):
            continue
        of_holder = found.split.quota[:, holder]
        held = [holder * OWN + own for own in range(OWN)] + found.split.replica[holder].tolist()
        total = sum(int(of_holder[one]) for one in held if one >= 0)
        parts = torch.ones(total, DIM, dtype=torch.float64).split(
            [int(of_holder[one]) if one >= 0 else 0 for one in held]
        )
        out = torch.cat([expert(part, *(w[one] for w in full)) for part, one in zip(parts, held, strict=True)])
        weighted(out).backward()
    if what == "replicas":  # rank 1's own rows still count, on rank 1
        return (0.0 if rank == 1 else relative(gradient, full[0].grad[layer.mine])), rows.grad is not None  # type: ignore[index]
    if what == "everything" and rank == 1:
        return float(gradient.abs().max()), rows.grad is not None
    return relative(gradient, full[0].grad[layer.mine]), rows.grad is not None  # type: ignore[index]


def test_experts_that_ignore_what_they_get_keep_nobody_waiting() -> None:
    """A rank whose experts returned a constant built no graph, and the others waited for its part of the backward."""
    for found in on_ranks(3, each, ignored, [("everything",), ("rows",), ("replicas",)]):
        for error, has_gradient in found:
            assert error < 1e-12
            assert has_gradient


def unused_output() -> str:
    balancer, layer = new_balancer(deadline=4), Layer("a", 1)
    found, rows = local_step(balancer, layer)
    out = balancer.compute(
        found, lambda r, own, away: run_slots(r, own, away, found.exchange.tokens_of_slot), rows, *layer.own
    )
    try:
        if dist.get_rank() == 0:
            out.sum().backward()
        balancer.dispatch("a", step_of(dist.get_rank()).ids)
    except LostRanksError as lost:
        return str(lost)
    return "no error"


def test_an_output_that_one_rank_does_not_use_ends_in_an_error_that_names_the_stage() -> None:
    first, second = on_ranks(2, unused_output)
    assert "in stage bring home" in first
    assert "in stage count" in second


def calls() -> list[str]:
    """Texts of refused calls; between them, steps are right."""
    balancer, layer, texts = new_balancer(), Layer("a", 1), []
    step = step_of(dist.get_rank())

    def train(found: Dispatch, layer: Layer = layer) -> None:
        for one in (*layer.own, *layer.all):
            one.grad = None
        weighted(moe_after(balancer, found, step, layer.own)).backward()
        expect([layer])
        assert layer.error() < 1e-12

    found = balancer.dispatch("a", step.ids)
    train(found)
    try:
        moe_after(balancer, found, step, layer.own)
    except DistplbError as error:
        texts.append(str(error))
    balancer.dispatch("a", step.ids)  # never computed
    first, second = balancer.dispatch("a", step.ids), balancer.dispatch("a", step.ids)
    train(first)  # after another dispatch
    train(second)
    found = balancer.dispatch("a", step.ids)
    rows = torch.ones(sum(found.exchange.receive_sizes), DIM, dtype=torch.float64)
    try:
        balancer.compute(found, lambda *_: [][0], rows, *layer.own)  # an error of the experts
    except IndexError:
        texts.append("experts")
    train(balancer.dispatch("a", step.ids))
    other = Layer("b", 2)
    pushed = balancer.dispatch("b", step.ids)
    balancer.push(pushed, *other.own)  # pushed, then replaced by another layer's, then computed
    train(balancer.dispatch("a", step.ids))
    train(pushed, other)
    # A backward that ends in an error, and the next one.
    out = moe(balancer, "a", step, layer.own)
    with patch.object(Lender, "leave", side_effect=ValueError("stop")):
        try:
            out.sum().backward()
        except ValueError:
            texts.append("backward")
    train(balancer.dispatch("a", step.ids))
    # Second derivatives are refused, because those of replicas would be missing.
    out = moe(balancer, "a", step, layer.own)
    (gradient,) = torch.autograd.grad(out.sum(), layer.own[0], create_graph=True)
    try:
        gradient.sum().backward()
    except RuntimeError as error:
        texts.append(str(error))
    train(balancer.dispatch("a", step.ids))
    return texts


def test_wrong_calls_are_refused_and_the_next_step_is_right() -> None:
    texts = on_ranks(2, calls)
    assert texts[0] == texts[1]
    twice, experts, backward, differentiated = texts[0]
    assert twice == "this step of layer 'a' was computed already; call compute once after each dispatch"
    assert (experts, backward) == ("experts", "backward")
    assert "once_differentiable" in differentiated


def of_inputs_alone() -> tuple[float, float]:
    """Errors where a backward has asked for the gradient of the input alone, of it and of the next backward."""
    balancer, layers = new_balancer(), [Layer("a", 1), Layer("b", 2)]
    step = step_of(dist.get_rank())
    x = step.x.requires_grad_()
    (alone,) = torch.autograd.grad(weighted(through(balancer, layers, step, x)), [x])
    assert all(one.grad is None for layer in layers for one in layer.own)
    weighted(through(balancer, layers, step, x)).backward()
    expect(layers)
    assert x.grad is not None
    return relative(alone, x.grad), max(layer.error() for layer in layers)


def test_a_backward_may_ask_for_the_gradient_of_the_input_alone() -> None:
    """A pipeline of torch does so in its first iteration, to learn shapes.

    The part of the backward that brings gradients of weights home never came, so the layer before was refused.
    """
    for errors in on_ranks(2, of_inputs_alone):
        assert max(errors) < 1e-12


# --- layers side by side -------------------------------------------------------------------------------------


def side_by_side(keep: bool, is_frozen: bool, backwards: int) -> tuple[str, float]:
    """Layer b runs between the halves of layer a's experts, so that their backwards interleave."""
    balancer, a, b = new_balancer(keep=keep), Layer("a", 1), Layer("b", 2)
    for layer in (a, b):
        for one in layer.own:
            one.requires_grad_(not is_frozen)
    step, branch = step_of(dist.get_rank()), list[Tensor]()
    x = step.x.requires_grad_()
    other = Step(x, step.ids, step.gate)
    found = balancer.dispatch("a", step.ids)

    def experts(rows: Tensor, own: Any, away: Any) -> Tensor:
        tokens = found.exchange.tokens_of_slot
        slots = [torch.cat([mine, theirs]) for mine, theirs in zip(own, away, strict=True)]
        halves = [part @ one for part, one in zip(rows.split(tokens), slots[0], strict=True)]
        branch.append(moe(balancer, "b", other, b.own))
        return torch.cat([torch.tanh(part) @ one for part, one in zip(halves, slots[1], strict=True)])

    rows = received(found, x)
    loss = balancer.compute(found, experts, rows, *a.own).square().sum()
    of_branch = weighted(branch[0])
    try:
        if backwards == 2:  # one by one first, which is fine
            loss.backward(retain_graph=True)
            of_branch.backward(retain_graph=True)
        (loss + of_branch).backward()
    except DistplbError as error:
        return str(error), 0.0
    for rank in range(dist.get_world_size()):
        step = step_of(rank)
        hidden = torch.einsum("nd,ndh->nh", step.x, a.all[0][step.ids.flatten()])
        torch.einsum("nh,nhd->nd", torch.tanh(hidden), a.all[1][step.ids.flatten()]).square().sum().backward()
    expect([b])
    return "", max(a.error(), b.error())


def test_layers_side_by_side_are_refused_in_words_or_run_with_keep() -> None:
    """The second backward of a retained graph once went unnoticed, and used the other layer's replicas."""
    cases = [(False, False, 1), (False, True, 1), (False, True, 2), (True, False, 1)]
    for *refused, kept in on_ranks(2, each, side_by_side, cases):
        for text, _ in refused:
            assert "the replicas of layer 'b' are needed while those of layer 'a' are in use" in text
        assert not kept[0]
        assert kept[1] < 1e-12


def branches() -> float:
    """Two layers of one input, one after the other: their backwards do not interleave."""
    balancer, layers = new_balancer(), [Layer("a", 1), Layer("b", 2)]
    step = step_of(dist.get_rank())
    x = step.x.requires_grad_()
    outs = [moe(balancer, layer.name, Step(x, step.ids, step.gate), layer.own) for layer in layers]
    weighted(outs[0] + outs[1]).backward()
    for layer in layers:
        expect([layer])
    return max(layer.error() for layer in layers)


def test_branches_of_a_model_are_right() -> None:
    assert max(on_ranks(2, branches)) < 1e-12


def test_replicas_that_were_overwritten_are_noticed_where_only_rows_have_gradients() -> None:
    lender = new_lender()
    loan = Loan("layer 'a'", (1, 2), Pushes((), (), 0), 1)
    with pytest.raises(DistplbError, match="the replicas of layer 'a' were overwritten during its backward"):
        lender.leave(loan, "rows")


def new_lender() -> Lender:
    comm = StepOfOne()
    return Lender(comm, StepStages(comm), keep=False)


# --- recomputation -------------------------------------------------------------------------------------------


def recomputed(reentrant: bool, early_stop: bool, num_layers: int, together: bool) -> tuple[float, dict[str, int]]:
    balancer = new_balancer()
    layers = [Layer(f"layer {number}", number, hidden=6 + number) for number in range(num_layers)]
    step = step_of(dist.get_rank())
    x = step.x.requires_grad_()
    parts = [layers] if together else [[layer] for layer in layers]
    pushed = {"push": 0, "push again": 0}
    whole = Lender._push

    def counted(self: Lender, loan: Loan) -> None:
        pushed[str(current_stage())] += 1
        whole(self, loan)

    with set_checkpoint_early_stop(early_stop), patch.object(lend.Lender, "_push", counted):
        for part in parts:
            x = checkpoint(lambda x, part=part: through(balancer, part, step, x), x, use_reentrant=reentrant)
        weighted(x).backward()
    expect(layers)
    return max(layer.error() for layer in layers), pushed


def test_recomputation_of_layers_and_blocks() -> None:
    kinds, parts = ((False, True), (False, False), (True, True)), ((1, True), (3, False), (2, True))
    cases = [(*kind, *part) for kind in kinds for part in parts]
    for found in on_ranks(2, each, recomputed, cases):
        for (_, _, num_layers, together), (error, pushed) in zip(cases, found, strict=True):
            assert error < 1e-12
            if not together or num_layers == 1:
                assert sum(pushed.values()) <= 2 * num_layers  # pushed once, and kept until the backward
