"""Replicas in the jobs that users of Hugging Face Transformers run: accumulation, HSDP, checkpointing, spread moves,
adapters, low precision, evaluation; each is the job without replicas and moves.

Shapes: E experts, K experts of each token.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

pytest.importorskip("transformers")

from test_huggingface import EXPERTS, batch, made, random_placement
from test_huggingface_replicas import (
    FAR,
    FREELY,
    ONE_BATCH,
    OWN_BATCHES,
    AllInFloat64,
    Case,
    Job,
    Runs,
    all_compared,
    check,
    distributed,
    grouped_in_float64,
    left_behind,
    rebalancer,
    refusal,
    skewed_ids,
)
from transformers import Trainer

from distplb import DistplbError, Moves, Spread
from distplb.integrations import huggingface

HSDP = {"dp_replicate_size": 2, "fsdp_size": 2, "ep_size": 2}
BATCHED = {"products": "batched_mm"}  # gpt-oss's "eager" fails where partial outputs are reduced, as in evaluation
SPREAD = Moves(model=FREELY.model, stop_loss=0, spread=Spread(1, 2, move_seconds=0))


# --- jobs ---------------------------------------------------------------------------------------------------------


class Accumulating(Job):
    """As transformers' `Trainer`: its loss is over the tokens of all micro-batches, and gradients are reduced once."""

    def backward(self) -> Tensor:
        losses = []
        for part in range(self.parts):
            tokens = batch(self.parts * self.iteration + part, self.rows)
            number = self.parts * tokens[:, 1:].numel()
            with AllInFloat64():
                loss = self.model(tokens, labels=tokens, num_items_in_batch=number).loss
            if part < self.parts - 1:
                with Trainer._defer_fsdp_gradient_reduction(SimpleNamespace(model=self.model)):  # type: ignore[arg-type]
                    loss.backward()
            else:
                loss.backward()
            losses.append(loss.detach())
        return torch.stack(losses).sum()


class Balanced(Job):
    """Each expert's bias is changed after each iteration by the sign of what it lacks, as DeepSeek balances."""

    def distributed(self) -> None:
        self.counts = [torch.zeros(EXPERTS, dtype=torch.int64) for _ in self.model.model.layers]
        for layer, counts in zip(self.model.model.layers, self.counts, strict=True):
            layer.mlp.gate.register_forward_hook(functools.partial(self.count, counts))

    @staticmethod
    def count(counts: Tensor, module: nn.Module, arguments: Any, choice: tuple[Tensor, ...]) -> None:
        counts += choice[2].flatten().bincount(minlength=EXPERTS)

    @torch.no_grad()
    def update(self) -> None:
        for layer, counts in zip(self.model.model.layers, self.counts, strict=True):
            dist.all_reduce(counts)
            lacking = counts.double().mean() - counts
            layer.mlp.gate.e_score_correction_bias.add_(lacking.sign(), alpha=0.01)
            counts.zero_()
        with torch.enable_grad():
            super().update()


class Evaluating(Job):
    """Evaluates between backward and update, with other numbers of tokens on each rank; also without `model.eval()`."""

    def backward(self) -> Tensor:
        found = [super().backward()]
        tokens = batch(1000 + self.iteration)
        if dist.get_world_size() == self.batches:
            tokens = tokens[: 1 + 2 * dist.get_rank(), : 5 + 4 * dist.get_rank()]
        for training in (False, True):
            self.model.train(training)
            with torch.no_grad():
                found.append(self.forward(tokens))
        return torch.stack(found)


class OfLowRank(nn.Module):
    """An adapter of low rank, beside a linear layer or alone."""

    def __init__(self, base: nn.Module | None, seed: int, width: int = 16) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.base = base
        self.a = nn.Parameter(0.2 * torch.randn(4, width, generator=generator).double())
        self.b = nn.Parameter(0.2 * torch.randn(width, 4, generator=generator).double())

    def forward(self, rows: Tensor) -> Tensor:
        found = rows @ self.a.T @ self.b.T
        return found if self.base is None else self.base(rows) + found


class Adapted(Job):
    """All weights are frozen; adapters of the attention and beside each MoE block are trained.

    They are attached before transformers distributes the model, so that FSDP2 shards them with their layer.
    """

    def prepared(self, model: Any) -> Any:
        return adapted(super().prepared(model))


class AdaptedLater(Job):
    """Adapters are attached to the distributed model, as transformers' `Trainer` supports it: each rank holds them."""

    def distributed(self) -> None:
        for parameter in adapted(self.model).parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(averaged)


def averaged(parameter: Tensor) -> None:
    assert parameter.grad is not None
    dist.all_reduce(parameter.grad)
    parameter.grad /= dist.get_world_size()


def adapted(model: Any) -> Any:
    model.requires_grad_(False)
    for number, layer in enumerate(model.model.layers):
        layer.self_attn.q_proj = OfLowRank(layer.self_attn.q_proj, seed=number)
        layer.beside = OfLowRank(None, seed=100 + number)
        layer.mlp.register_forward_hook(functools.partial(beside, layer.beside))
    return model


def beside(adapter: OfLowRank, block: nn.Module, arguments: tuple[Tensor, ...], found: Tensor) -> Tensor:
    return found + adapter(arguments[0])


class FrozenExperts(Job):
    """Everything else is trained."""

    def prepared(self, model: Any) -> Any:
        for layer in model.model.layers:
            layer.mlp.experts.requires_grad_(False)
        return super().prepared(model)


class OnlyExperts(Job):
    """Everything else is frozen, so that the first layer's tokens have no gradient."""

    def prepared(self, model: Any) -> Any:
        model.requires_grad_(False)
        for layer in model.model.layers:
            layer.mlp.experts.requires_grad_(True)
        return super().prepared(model)


# --- the job with replicas is the job without -----------------------------------------------------------------------

SHORT = {"iterations": 10}
CASES: dict[str, Case] = {
    "accumulated, reduced once": ("mixtral", OWN_BATCHES, {"job": Accumulating, "parts": 2}),
    "adapted later": ("mixtral", OWN_BATCHES, {"job": AdaptedLater}),
    "evaluated": ("gpt_oss", OWN_BATCHES, {"job": Evaluating}),
    "one batch, not reentrant": ("gpt_oss", ONE_BATCH, BATCHED | {"recomputed": False}),
    "spread, groups, bias": ("deepseek_v3", OWN_BATCHES, {"job": Balanced, "moves": SPREAD}),
}
LONG_CASES: dict[str, Case] = CASES | {
    "accumulated, recomputed": ("mixtral", OWN_BATCHES, {"job": Accumulating, "parts": 3, "recomputed": False}),
    "accumulated, reentrant": ("mixtral", OWN_BATCHES, {"job": Accumulating, "parts": 3, "recomputed": True}),
    "adapted": ("mixtral", OWN_BATCHES, {"job": Adapted}),
    "adapted, recomputed": ("mixtral", OWN_BATCHES, {"job": AdaptedLater, "recomputed": False, "parts": 2}),
    "evaluated, one batch": ("gpt_oss", ONE_BATCH, BATCHED | {"job": Evaluating}),
    "evaluated, recomputed": ("gpt_oss", OWN_BATCHES, {"job": Evaluating, "recomputed": True}),
    "frozen experts": ("gpt_oss", OWN_BATCHES, {"job": FrozenExperts}),
    "frozen experts, recomputed": ("gpt_oss", OWN_BATCHES, {"job": FrozenExperts, "recomputed": False}),
    "one batch, reentrant": ("gpt_oss", ONE_BATCH, BATCHED | {"recomputed": True}),
    "only experts": ("mixtral", ONE_BATCH, {"job": OnlyExperts}),
    "only experts, own batches": ("mixtral", OWN_BATCHES, {"job": OnlyExperts}),
    "only experts, recomputed": ("mixtral", ONE_BATCH, {"job": OnlyExperts, "recomputed": False}),
    "spread, groups, bias, table": ("deepseek_v3", OWN_BATCHES, {"job": Balanced, "moves": SPREAD, "mode": "remap"}),
    "spread, one batch, table": ("mixtral", ONE_BATCH, {"moves": SPREAD, "mode": "remap"}),
    "spread, accumulated": ("mixtral", OWN_BATCHES, {"moves": SPREAD, "parts": 2, "recomputed": False}),
}
CASES_OF_FOUR: dict[str, Case] = {
    "HSDP, spread": ("deepseek_v3", HSDP, {"job": Balanced, "moves": SPREAD, "recomputed": False}),
}
LONG_CASES_OF_FOUR: dict[str, Case] = {
    "HSDP, accumulated": ("mixtral", HSDP, {"job": Accumulating, "parts": 2}),
    "HSDP, evaluated": ("gpt_oss", HSDP, {"job": Evaluating, "recomputed": True}),
}
CASES_OF_EIGHT: dict[str, Case] = {
    "HSDP, two shards": ("mixtral", HSDP | {"fsdp_size": 4}, {"job": Accumulating, "parts": 2})
}


def short(cases: dict[str, Case]) -> dict[str, Case]:
    return {what: (name, sizes, kind | SHORT) for what, (name, sizes, kind) in cases.items()}


def control(name: str, sizes: dict[str, Any], kind: dict[str, Any]) -> dict[str, Any]:
    """The same with a gradient that stays with its replica."""
    with left_behind(), grouped_in_float64():
        return Runs().compared(name, sizes, **kind)


# --- low precision ---------------------------------------------------------------------------------------------------

MIXED = OWN_BATCHES | {"fsdp_mixed_precision": True}


class Forced(Job):
    """The router gives weights, but each token's experts are given: rounding would send tokens elsewhere."""

    def distributed(self) -> None:
        for layer in self.model.model.layers:
            router = layer.mlp.router if self.name == "gpt_oss" else layer.mlp.gate
            router.register_forward_hook(lambda _module, _arguments, choice: (*choice[:2], skewed_ids(len(choice[2]))))
            # Of experts that one rank holds whole, FSDP2 divides gradients in float64, and on a CPU not in float32.
            layer.mlp.experts.set_gradient_divide_factor(1.0)


class InFloat32(Forced):
    is_exact = False

    def prepared(self, model: Any) -> Any:
        return model


class Autocast(InFloat32):
    def forward(self, tokens: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(tokens)


def all_gradients(job: Job) -> Tensor:
    """Of four batches, with other homes for each where replicas are lent."""
    parts, generator = [], torch.Generator().manual_seed(1)
    for _ in range(4):
        job.optimizer.zero_grad()
        job.backward()
        parts += [one.double().flatten() for _, one in sorted(job.logical(lambda parameter: parameter.grad).items())]
        job.optimizer.zero_grad()
        if job.rebalancer.step_balancer is not None:
            job.rebalancer.apply(random_placement(job.rebalancer.placement, generator))
        job.iteration += 1
    job.rebalancer.close()
    return torch.cat(parts)


def errors(name: str, job: type[Job], sizes: dict[str, Any], **kind: Any) -> dict[str, float]:
    """Errors of gradients against an oracle in float64: relative, in the Euclidean norm."""
    kind |= {"mode": "remap"}  # the experts given are no slots
    wanted = all_gradients(Forced(name, OWN_BATCHES, 0, **kind))
    lent = job(name, sizes, 2, **kind)
    low = {"plain": all_gradients(job(name, sizes, 0, **kind)), "lent": all_gradients(lent)}
    with left_behind():
        low["wrong"] = all_gradients(job(name, sizes, 2, **kind))
    found = {what: float((one - wanted).norm() / wanted.norm()) for what, one in low.items()}
    return found | {"steps": sum(lent.steps) / len(lent.steps)}


Low = tuple[str, type[Job], dict[str, Any], dict[str, Any]]
LOW: dict[str, Low] = {
    "autocast": ("gpt_oss", Autocast, OWN_BATCHES, {"recomputed": False}),
    "FSDP2's mixed precision": ("mixtral", InFloat32, MIXED, {}),
}
LONG_LOW: dict[str, Low] = {
    "autocast, not recomputed": ("mixtral", Autocast, OWN_BATCHES, {}),
    "autocast, grouped_mm": ("mixtral", Autocast, OWN_BATCHES, {"products": "grouped_mm"}),
    "FSDP2's mixed precision, reentrant": ("gpt_oss", InFloat32, MIXED, {"recomputed": True}),
    "FSDP2's mixed precision, grouped_mm": ("mixtral", InFloat32, MIXED, {"products": "grouped_mm"}),
    "FSDP2's mixed precision, batched_mm": ("gpt_oss", InFloat32, MIXED, {"products": "batched_mm"}),
}


@grouped_in_float64()
def all_errors(cases: dict[str, Low]) -> dict[str, dict[str, float]]:
    return {what: errors(name, job, sizes, **kind) for what, (name, job, sizes, kind) in cases.items()}


# --- what is refused ----------------------------------------------------------------------------------------------


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


class Scaled(nn.Module):
    """A parametrization with weights of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, weight: Tensor) -> Tensor:
        return self.scale * weight


class Wrapped(nn.Module):
    """As PEFT wraps experts whose parameters it adapts."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora_a = nn.Parameter(torch.ones(EXPERTS, 16, 4))

    def forward(self, *arguments: Any) -> Any:
        return self.base_layer(*arguments)


def said_of(change: Callable[[Any], object]) -> str:
    """What is said of a model in one process after its second layer was changed, also where only homes move."""
    model = made("mixtral")
    change(model.model.layers[1].mlp)
    with pytest.raises(DistplbError) as error:
        huggingface.moe_layers(model)
    return str(error.value)


def test_adapters_of_experts_and_routers_are_refused() -> None:
    """Only the parameters that a parametrization had left in place moved, and nobody was told."""
    doubled = said_of(lambda block: register_parametrization(block.experts, "gate_up_proj", Doubled()))
    assert doubled.startswith(
        "model.layers.1.mlp.experts.parametrizations.gate_up_proj.original belongs to a module inside "
        "model.layers.1.mlp.experts, as adapters and parametrizations add it, and it is not known"
    )
    assert "attach adapters elsewhere" in doubled
    router = said_of(lambda block: register_parametrization(block.gate, "weight", Scaled()))
    assert "model.layers.1.mlp.gate.parametrizations.weight.original belongs to a module inside" in router
    inside = said_of(lambda block: block.experts.add_module("adapter", Scaled()))
    assert "model.layers.1.mlp.experts.adapter.scale belongs to a module inside" in inside

    def wrap(block: Any) -> None:
        block.experts = Wrapped(block.experts)

    assert "model.layers.1.mlp is a MixtralSparseMoeBlock, but the forward of its Wrapped is defined in" in said_of(
        wrap
    )


def adapted_experts() -> str:
    """Experts that get an adapter while replicas are lent."""
    model = distributed("mixtral", torch.float32, "eager", ONE_BATCH)
    built = rebalancer(model, 2)
    model(batch(0))
    model.model.layers[0].mlp.experts.adapter = Scaled()
    found = refusal(lambda: model(batch(0)))
    built.close()
    return found


def lone_evaluation() -> str:
    """What each rank hears if rank 1 has no batch to evaluate and goes on to train."""
    job = Job("mixtral", OWN_BATCHES, 2, deadline=60.0)
    job.step()
    if dist.get_rank() == 0:
        with torch.no_grad():
            job.model.eval()
            return refusal(lambda: job.forward(batch(0, slice(1))))
    return refusal(job.step)


# --- on several ranks -----------------------------------------------------------------------------------------------


def all_of_two_ranks() -> dict[str, Any]:
    """All in one pair of processes, because importing transformers takes longer than most of them."""
    return {
        "runs": all_compared(short(CASES)),
        "left behind": control(*short(CASES)["accumulated, reduced once"]),
        "errors": all_errors(LOW),
        "adapted experts": adapted_experts(),
        "lone evaluation": lone_evaluation(),
    }


@pytest.fixture(scope="module")
def two_ranks() -> list[dict[str, Any]]:
    return on_ranks(2, all_of_two_ranks, deadline=240)


@pytest.mark.parametrize("what", CASES)
def test_a_job_with_replicas_and_moves_is_the_job_without_both(two_ranks: list[dict[str, Any]], what: str) -> None:
    check([rank["runs"][what] for rank in two_ranks], what, CASES[what][2])


def test_a_gradient_that_stays_with_its_replica_shows(two_ranks: list[dict[str, Any]]) -> None:
    for rank in two_ranks:
        print(rank["left behind"])
        assert rank["left behind"]["gradients"] > FAR


@pytest.mark.parametrize("what", LOW)
def test_low_precision_errs_as_without_replicas(two_ranks: list[dict[str, Any]], what: str) -> None:
    check_errors([rank["errors"][what] for rank in two_ranks], what)


@pytest.mark.long
def test_low_precision_errs_as_without_replicas_in_further_jobs() -> None:
    ranks = on_ranks(2, all_errors, LONG_LOW, deadline=240)
    for what in LONG_LOW:
        check_errors([rank[what] for rank in ranks], what)


def check_errors(ranks: list[dict[str, float]], what: str) -> None:
    for found in ranks:
        print(what, found)
        assert found["steps"] > 0.5, what
        assert 0 < found["lent"] <= 2 * found["plain"], what
        assert found["wrong"] - found["plain"] > 20 * abs(found["lent"] - found["plain"]), what


def test_experts_that_are_adapted_later_are_refused(two_ranks: list[dict[str, Any]]) -> None:
    """Replicas were computed with rows of the wrong number, or without the adapter."""
    for found in (rank["adapted experts"] for rank in two_ranks):
        print(found)
        assert found.startswith(
            "model.layers.0.mlp: its experts have the parameters gate_up_proj, down_proj, adapter.scale, but had "
            "gate_up_proj, down_proj when replicas were set up"
        )


def test_an_evaluation_that_a_rank_leaves_out_is_refused(two_ranks: list[dict[str, Any]]) -> None:
    """One rank trained while the other evaluated, until they met in collectives of different sizes: gloo aborted."""
    for found in (rank["lone evaluation"] for rank in two_ranks):
        assert found.startswith("rank 0 would compute this step without gradients, as in an evaluation")


@pytest.mark.long
def test_further_jobs_with_replicas_and_moves_are_the_jobs_without_both() -> None:
    ranks = on_ranks(2, all_compared, LONG_CASES, deadline=400)
    for what, (_, _, kind) in LONG_CASES.items():
        check([rank[what] for rank in ranks], what, kind)


@pytest.mark.parametrize("cases", [CASES_OF_FOUR, pytest.param(LONG_CASES_OF_FOUR, marks=pytest.mark.long)])
def test_a_job_with_copies_of_shards_is_the_job_without(cases: dict[str, Case]) -> None:
    ranks = on_ranks(4, all_compared, short(cases), deadline=240)
    for what, (_, _, kind) in cases.items():
        check([rank[what] for rank in ranks], what, kind)


@pytest.mark.long
def test_a_job_with_copies_of_shards_of_each_expert_is_the_job_without() -> None:
    ranks = on_ranks(8, all_compared, short(CASES_OF_EIGHT), deadline=400)
    for what, (_, _, kind) in CASES_OF_EIGHT.items():
        check([rank[what] for rank in ranks], what, kind)
