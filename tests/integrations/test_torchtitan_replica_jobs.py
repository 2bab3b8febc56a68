"""Replicas in the life of a torchtitan job: checkpoints, moves by hand, several rebalancers, and what is refused.

Shapes: L layers, E experts.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from ranks import on_ranks

pytest.importorskip("torchtitan")

from test_torchtitan import furthest, gradients, layer_of, logical, random_placement, states
from titan_models import DIM, EXPERTS, Job, meshes
from titan_runs import Left, broken, lent_job, run, without
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torchtitan.models.common.moe import GroupedExperts, MoE
from torchtitan.models.common.token_dispatcher import AllToAllTokenDispatcher, LocalTokenDispatcher

from distplb import StepBalancer, Topology
from distplb.errors import DistplbError
from distplb.integrations.lending import step_balancer, with_rows
from distplb.integrations.torchtitan_replicas import lend, refuse_what_cannot_lend, stop_lending

TOLERANCE = 1e-9
HALF, ITERATIONS = 8, 16
QUIET: dict[str, Any] = {"replica_slots": 0, "every": None}


# --- checkpoints, on four ranks -------------------------------------------------------------------------------------


def saved(job: Job, folder: Path, **options: Any) -> dict[str, Any]:
    """Train half a run, save it, and go on for three iterations while it is written; return the names in it."""
    left = Left()
    built = lent_job(job, left, **options)
    run(job, range(HALF), balancer=built, left=left)
    writers = dist.new_group(backend="gloo")
    writing = dcp.async_save(states(job, built), checkpoint_id=str(folder), process_group=writers)
    built.saving(writing)
    run(job, range(HALF, HALF + 3), balancer=built, left=left)
    writing.result()
    parts = {name: part if isinstance(part, dict) else part.state_dict() for name, part in states(job, built).items()}
    names = {name: sorted(map(str, part)) for name, part in parts.items()}
    built.close()
    return {"names": names, "lent": left.lent}


def resumed(job: Job, folder: Path, quiet: Left, **options: Any) -> dict[str, Any]:
    """Train the second half from a checkpoint; how far losses and state are from those of an unbroken run."""
    left = Left()
    built = lent_job(job, left, **options)
    dcp.load(states(job, built), checkpoint_id=str(folder))
    run(job, range(HALF, ITERATIONS), balancer=built, left=left)
    built.close()
    wanted = torch.tensor(quiet.losses[HALF:])
    losses = float((torch.tensor(left.losses) - wanted).abs().max() / wanted.abs().max())
    return {"apart": max(losses, furthest(left.state, quiet.state)), "lent": left.lent}


def checkpoints(folder: Path) -> dict[str, Any]:
    def job(ep: int = 2, dim_1: bool = False) -> Job:
        return Job(meshes(ep), steps=ITERATIONS, dim_1=dim_1)

    quiet = without(job(), range(ITERATIONS))
    found: dict[str, Any] = {
        "with": saved(job(), folder / "with"),
        "without": saved(job(), folder / "without", **QUIET),
    }
    found["with -> without, EP 4"] = resumed(job(ep=4), folder / "with", quiet, **QUIET)
    found["without -> with, dim 1"] = resumed(job(dim_1=True), folder / "without", quiet)
    found["with -> with, EP 4"] = resumed(job(ep=4), folder / "with", quiet)
    with broken("gradients stay away"):
        found["control"] = resumed(job(), folder / "with", quiet)
    return found


# --- moves by hand, with steps between ------------------------------------------------------------------------------


def moves_and_steps(job: Job, moves: int) -> dict[str, Any]:
    """Random placements with a step before each: how often weights or moments of logical experts change by a move."""
    left = Left()
    built = lent_job(job, left, every=None, verify="off")  # compared here, to the bit
    generator, differing = torch.Generator().manual_seed(1), 0
    for number in range(moves):
        job.step(number)
        job.optimizers.zero_grad()
        before = logical(job, built.placement)
        built.apply(random_placement(generator, None, job.dims.ep, layers=1))
        differing += furthest(logical(job, built.placement), before) != 0
        built.step()
    weight: Any = next(one for name, one in job.model.named_parameters() if "w1_EFD" in name)
    with torch.no_grad():
        rows = weight.to_local()
        rows.copy_(rows.roll(1, 0))
    torn = furthest(logical(job, built.placement), before)
    built.close()
    return {"differing": differing, "lent": left.lent, "forwards": left.forwards, "torn": torn}


def moves_in_each_layout(moves: int) -> dict[str, Any]:
    layouts: dict[str, Callable[[], Job]] = {
        "dim 0": lambda: Job(meshes(2), steps=moves, dense=(0,)),
        "dim 1": lambda: Job(meshes(2), steps=moves, dense=(0,), dim_1=True),
        "HSDP": lambda: Job(meshes(2, replicate=2), steps=moves, dense=(0,)),
        "EP 4": lambda: Job(meshes(4), steps=moves, dense=(0,)),
    }
    return {name: moves_and_steps(job(), moves) for name, job in layouts.items()}


@pytest.mark.parametrize("moves", [10, pytest.param(200, marks=pytest.mark.long)])
def test_a_move_between_steps_with_replicas_changes_no_bit_of_an_expert(moves: int) -> None:
    for layouts in on_ranks(4, moves_in_each_layout, moves, deadline=600):
        for layout, one in layouts.items():
            assert one["differing"] == 0, layout
            assert one["lent"] > 0.5 * one["forwards"], layout
            assert one["torn"] > 1e-3


@pytest.fixture(scope="module")
def four() -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        return on_ranks(4, checkpoints, Path(folder), deadline=300)


def test_nothing_of_replicas_is_in_a_checkpoint(four: list[dict[str, Any]]) -> None:
    for found in four:
        assert found["with"]["lent"] > 0
        assert found["with"]["names"] == found["without"]["names"]


@pytest.mark.parametrize("change", ["with -> without, EP 4", "without -> with, dim 1", "with -> with, EP 4"])
def test_a_run_goes_on_with_or_without_replicas(four: list[dict[str, Any]], change: str) -> None:
    for found in four:
        assert (found[change]["lent"] > 0) == ("> with," in change)
        assert found[change]["apart"] <= TOLERANCE


def test_the_comparison_of_resumed_runs_notices(four: list[dict[str, Any]]) -> None:
    for found in four:
        assert found["control"]["apart"] > 1e5 * TOLERANCE


# --- on two ranks ---------------------------------------------------------------------------------------------------

BFLOAT16 = {"dtype": torch.float32, "exact": False}  # torchtitan's own grouped product


def errors(**kind: Any) -> dict[str, float]:
    """Errors of gradients against an oracle in float64: relative, in the Euclidean norm, over four batches."""

    def job(**options: Any) -> Job:
        return Job(meshes(2), steps=4, **options, **kind)

    plain, lent, wrong, oracle = job(**BFLOAT16), job(**BFLOAT16), job(**BFLOAT16), job()
    for one in (lent, wrong, oracle):
        for copied, parameter in zip(one.model.parameters(), plain.model.parameters(), strict=True):
            copied.detach().to_local().copy_(parameter.detach().to_local())  # type: ignore[attr-defined]  # DTensors
    left = Left()
    built = [lent_job(one, left, every=None) for one in (lent, wrong)]

    def all_gradients(job: Job) -> Tensor:
        parts = []
        for iteration in range(4):
            job.optimizers.zero_grad()
            job.backward(iteration)
            parts += [one.double().flatten() for _, one in sorted(gradients(job, built[0].placement).items())]
        return torch.cat(parts)

    wanted = all_gradients(oracle)
    found = {
        name: float((all_gradients(one) - wanted).norm() / wanted.norm())
        for name, one in {"plain": plain, "lent": lent}.items()
    }
    with broken("gradients stay away"):
        found["wrong"] = float((all_gradients(wrong) - wanted).norm() / wanted.norm())
    for one in built:
        one.close()
    return found | {"lent in": left.lent / left.forwards}


def layers_of(job: Job) -> list[Any]:
    return [module for module in job.model.modules() if isinstance(module, MoE)]


def places(job: Job) -> list[Any]:
    """What an adapter may replace in each layer."""
    routed = [moe.routed_experts for moe in layers_of(job)]
    return [(one.token_dispatcher, vars(one.inner_experts).get("forward")) for one in routed]


def one_after_another() -> dict[str, bool]:
    """Whether replicas are lent after each of some calls."""
    job, found = Job(meshes(2), steps=16), {}
    before = places(job)

    def note(when: str) -> None:
        kinds = [type(dispatcher) is AllToAllTokenDispatcher for dispatcher, _ in places(job)]
        found[when] = not all(kinds)
        if all(kinds):
            assert places(job) == before  # both compare as the same objects
        job.step(0)
        job.optimizers.zero_grad()

    note("at first")
    try:
        lent_job(job, Left(), every=-3)
    except DistplbError:
        note("after a refusal")
    first = lent_job(job, Left())
    note("with one")
    with pytest.raises(DistplbError, match="the other one first"):
        lent_job(job, Left())
    note("with one, and a second refused")
    first.close()
    note("with the first closed")
    left = Left()
    second = lent_job(job, left)
    note("with another")
    assert left.forwards == 2
    first.close()
    note("with the first closed twice")
    second.close()
    third = lent_job(job, Left(), replica_slots=0)
    note("with replica_slots=0")
    third.close()
    return found


def two_models() -> list[float]:
    """How far two models that train in turns are from each alone."""
    iterations = range(6)
    alone = [without(Job(meshes(2), steps=6, seed=seed), iterations).losses for seed in (0, 1)]
    jobs = [Job(meshes(2), steps=6, seed=seed) for seed in (0, 1)]
    lefts = [Left(), Left()]
    built = [lent_job(job, left) for job, left in zip(jobs, lefts, strict=True)]
    for iteration in iterations:
        for job, left, one in zip(jobs, lefts, built, strict=True):
            left.losses.append(job.step(iteration))
            job.optimizers.zero_grad()
            one.step()
    assert all(left.lent for left in lefts)
    for one in built:
        one.close()
    pairs = zip((left.losses for left in lefts), alone, strict=True)
    return [float((torch.tensor(one) - torch.tensor(other)).abs().max()) for one, other in pairs]


def compiled() -> dict[str, str]:
    """What is said of blocks that are compiled before and after the rebalancer is built."""
    torch._dynamo.config.capture_scalar_outputs = True
    said = {}
    job = Job(meshes(2), steps=4, **BFLOAT16)
    for block in job.model.layers.values():
        block.compile(backend="aot_eager", fullgraph=True)  # as torchtitan's `apply_compile`, without a compiler
    try:
        lent_job(job, Left())
    except DistplbError as error:
        said["before"] = str(error)
    job = Job(meshes(2), steps=4, **BFLOAT16)
    built = lent_job(job, Left())
    for block in job.model.layers.values():
        block.compile(backend="aot_eager", fullgraph=True)
    try:
        job.step(0)
    except Exception as error:
        said["after"] = str(error)
    built.close()
    return said


def on_two() -> dict[str, Any]:
    return {
        "grouped": errors(),
        "gpt-oss": errors(gpt_oss=True),
        "one after another": one_after_another(),
        "two models": two_models(),
        "compiled": compiled(),
    }


@pytest.fixture(scope="module")
def two() -> list[dict[str, Any]]:
    return on_ranks(2, on_two, deadline=240)


@pytest.mark.parametrize("kind", ["grouped", "gpt-oss"])
def test_products_in_bfloat16_err_little_more_than_without_replicas(two: list[dict[str, Any]], kind: str) -> None:
    for found in two:
        print(kind, found[kind])
        assert found[kind]["lent in"] > 0.5
        assert 0 < found[kind]["lent"] <= 2 * found[kind]["plain"]
        # Most of gpt-oss's error is that of its bfloat16 router, which sends tokens elsewhere; a fault still shows.
        assert found[kind]["wrong"] - found[kind]["plain"] > 20 * abs(found[kind]["lent"] - found[kind]["plain"])


def test_the_last_rebalancer_decides_and_closing_it_ends_replicas(two: list[dict[str, Any]]) -> None:
    for found in two:
        assert found["one after another"] == {
            "at first": False,
            "after a refusal": False,
            "with one": True,
            "with one, and a second refused": True,
            "with the first closed": False,
            "with another": True,
            "with the first closed twice": True,
            "with replica_slots=0": False,
        }


def test_two_models_do_not_disturb_each_other(two: list[dict[str, Any]]) -> None:
    for found in two:
        assert max(found["two models"]) < TOLERANCE


def test_compiled_blocks_are_refused_by_name(two: list[dict[str, Any]]) -> None:
    for found in two:
        before, after = found["compiled"]["before"], found["compiled"]["after"]
        assert before.startswith("layers.0.moe is compiled (its Checkpoint") or "TransformerBlock)" in before
        assert "'model' out of compile.components" in before
        assert "layers.0.moe is being compiled" in after


# --- in this process ------------------------------------------------------------------------------------------------


class OwnExperts(GroupedExperts):
    """Experts whose forward calls a method, and the one of its base class."""

    def forward(self, x_RD: Tensor, num_tokens_per_expert_E: Tensor) -> Tensor:
        return self._scaled(super().forward(x_RD, num_tokens_per_expert_E))

    def _scaled(self, rows: Tensor) -> Tensor:
        return rows * self.w1_EFD.sum()


def test_methods_that_a_forward_calls_see_the_replaced_rows() -> None:
    """They were those of the module, which computed replicas with its own rows and said nothing."""
    torch.manual_seed(0)
    config = GroupedExperts.Config(dim=16, hidden_dim=16, num_experts=2)
    experts, other = OwnExperts(config), OwnExperts(config)
    for parameter in (*experts.parameters(), *other.parameters()):
        nn.init.normal_(parameter)
    rows, tokens = torch.randn(6, 16), torch.tensor([2, 4])
    replaced = {name: parameter.detach() for name, parameter in other.named_parameters()}
    assert torch.equal(with_rows(experts, **replaced).forward(rows, tokens), other(rows, tokens))
    assert not torch.equal(experts(rows, tokens), other(rows, tokens))
    assert list(experts.state_dict()) == list(replaced)


def lent_layer() -> tuple[Any, list[str]]:
    """A layer in one process whose balancer notes its steps."""
    moe: Any = layer_of()["moe"]  # type: ignore[index]  # a ModuleDict
    for parameter in moe.parameters():
        nn.init.normal_(parameter)
    balancer, seen = StepBalancer(topology=Topology(1, 1), num_experts=EXPERTS, replica_slots=1), []
    dispatch = balancer.dispatch
    balancer.dispatch = lambda *arguments: (seen.append(arguments[0]), dispatch(*arguments))[1]  # type: ignore[method-assign]
    lend("moe", moe, balancer)
    return moe, seen


@pytest.mark.filterwarnings("ignore:In CPU autocast")
def test_a_copy_of_a_model_takes_part_in_no_steps() -> None:
    """It shared thread state and process groups, which cannot be copied."""
    moe, seen = lent_layer()
    copied = copy.deepcopy(moe)
    x = torch.randn(2, 4, DIM)
    before = moe(x)
    assert seen == ["moe"]
    assert torch.equal(copied(x), before)
    with torch.no_grad():
        copied.routed_experts.inner_experts.w2_EDF.zero_()
    assert not copied(x).any()
    assert seen == ["moe"]
    assert type(copied.routed_experts.token_dispatcher) is AllToAllTokenDispatcher
    assert torch.equal(moe(x), before)
    stop_lending(moe)
    assert "forward" not in vars(moe.routed_experts.inner_experts)
    assert list(moe.state_dict()) == list(copied.state_dict())


def refusal(change: Callable[[Any], object]) -> str:
    moe: Any = layer_of()["moe"]  # type: ignore[index]  # a ModuleDict
    change(moe)
    with pytest.raises(DistplbError) as caught:
        refuse_what_cannot_lend("layers.3.moe", moe, [])
    return str(caught.value)


def test_what_cannot_lend_is_refused_by_name() -> None:
    def other_dispatcher(moe: Any) -> None:
        config = LocalTokenDispatcher.Config(num_experts=EXPERTS, top_k=2)
        moe.routed_experts.token_dispatcher = LocalTokenDispatcher(config)

    def buffer(moe: Any) -> None:
        moe.routed_experts.inner_experts.register_buffer("scale", torch.ones(EXPERTS))

    def wrapped(moe: Any) -> None:
        moe.routed_experts.inner_experts = checkpoint_wrapper(moe.routed_experts.inner_experts)

    def replaced(moe: Any) -> None:
        moe.routed_experts.inner_experts.forward = lambda *_: None

    assert refusal(other_dispatcher).startswith("layers.3.moe dispatches with LocalTokenDispatcher, which has no place")
    assert refusal(lambda moe: moe.compile()).startswith("layers.3.moe is compiled (its MoE), and a compiled forward")
    assert refusal(buffer).startswith("layers.3.moe: its GroupedExperts has scale, and only parameters of the module")
    assert "its CheckpointWrapper has w1_EFD, and only" in refusal(wrapped)
    assert refusal(replaced).startswith("layers.3.moe: the forward of its GroupedExperts was replaced, and replicas")


def test_layers_of_different_sizes_and_unknown_options_are_refused() -> None:
    def of(sizes: dict[str, int], **options: Any) -> StepBalancer | None:
        return step_balancer(
            None,
            Topology(1, 1),
            sizes,
            replica_slots=1,
            replicas=options,
            of_rebalancer={},
            is_writer=True,
            deadline=9.0,
        )

    with pytest.raises(DistplbError, match=r"layers\.1 has 16 experts and layers\.0 has 8; replicas need"):
        of({"layers.0": 8, "layers.1": 16})
    with pytest.raises(DistplbError, match=r"replicas has 'min_quotas'; pass options of distplb\.StepBalancer: keep,"):
        of({"layers.0": 8}, min_quotas=3)
    with pytest.raises(DistplbError, match="replicas has 'topology'"):
        of({"layers.0": 8}, topology=Topology(1, 1))
