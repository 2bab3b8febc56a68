"""torchtitan's MoE layers under a `Rebalancer`: what is found and refused; runs with moves are the runs without.

Small, real torchtitan models on gloo processes: 2 ranks with expert parallelism (EP) alone, and 4 ranks with EP 2 ×
FSDP 2, with experts sharded by FSDP along dim 0 and along dim 1. Many runs share one start of the processes, which
takes longer than the runs; each test checks its own part of the results.

Shapes: L layers, E experts, P slots.
"""

from __future__ import annotations

import copy
import tempfile
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from jobs import FREE, in_values
from ranks import on_ranks
from torch import Tensor, nn
from torch.distributed.tensor import Shard
from torch.utils.checkpoint import checkpoint

from distplb import LoadWindow, Placement
from distplb.core.ties import RouterTies
from distplb.errors import DistplbError

pytest.importorskip("torchtitan")

from titan_models import DIM, EXPERTS, SEQUENCE, TOP_K, Job, meshes, moe_config
from torchtitan.components.checkpointer.utils import canonical_fqn
from torchtitan.config import CompileConfig, ParallelismConfig, TrainingConfig
from torchtitan.distributed.activation_checkpoint import FullAC, SelectiveAC
from torchtitan.models import deepseek_v3, gpt_oss
from torchtitan.models.common.moe import MoE

from distplb.integrations.torchtitan import _Counts, moe_layers, rebalancer

EP, ITERATIONS, EVERY, RANDOM_EVERY = 2, 30, 5, 7
HALF = 15  # iterations before a checkpoint, and after it
SAVED_EVERY, COMPARED_EVERY = 40, 20  # random moves


# --- one run ------------------------------------------------------------------------------------------------------


def attached(job: Job, **options: Any) -> Any:
    options = {
        "every": EVERY,
        "parallel_dims": job.dims,
        "gpus_per_node": 1,
        "stop_loss": 0,
        "model": FREE,
    } | options
    return rebalancer(job.parts, job.optimizers, **in_values(options))


def random_placement(generator: torch.Generator, groups: int | None, gpus: int, layers: int = 2) -> Placement:
    """A random placement: of any experts, or of whole groups and of experts inside their group's block."""
    size = EXPERTS // (groups or 1)
    tables = [
        torch.cat([block * size + torch.randperm(size, generator=generator) for block in blocks.tolist()])
        for blocks in (torch.randperm(groups or 1, generator=generator) for _ in range(layers))
    ]
    return Placement(torch.stack(tables), EXPERTS, gpus)


def whole(tensor: Any) -> Tensor:
    found: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return found.detach().clone()


def logical(job: Job, placement: Placement, mode: str = "permute") -> dict[str, Tensor]:
    """All weights, biases and moments, with the experts' rows in logical order. Collective."""
    slot = placement.inverse[..., 0]  # [L, E]
    found = {canonical_fqn(name): whole(value) for part in job.parts for name, value in part.state_dict().items()}
    names = {id(parameter): name for name, parameter in named(job)}
    for optimizer in job.optimizers:
        for parameter, state in optimizer.state.items():
            found |= {f"{names[id(parameter)]}:{key}": whole(state[key]) for key in ("exp_avg", "exp_avg_sq")}
    return in_logical_order(job, found, slot, mode)


def named(job: Job) -> list[tuple[str, nn.Parameter]]:
    """All parameters of this rank, by their names without those of wrappers."""
    return [(canonical_fqn(name), parameter) for part in job.parts for name, parameter in part.named_parameters()]


def gradients(job: Job, placement: Placement, mode: str = "permute") -> dict[str, Tensor]:
    """All gradients, with the experts' rows in logical order. Collective."""
    found = {name: whole(parameter.grad) for name, parameter in named(job) if parameter.grad is not None}
    return in_logical_order(job, found, placement.inverse[..., 0], mode)


def in_logical_order(job: Job, found: dict[str, Tensor], slot: Tensor, mode: str) -> dict[str, Tensor]:
    """Tensors by name, with the experts' rows in logical order; `slot [L, E]`."""
    kinds = ("routed_experts.", "router.", "expert_bias_E") if mode == "permute" else ("routed_experts.",)
    for layer, number in enumerate(job.moe_layers):
        by_slot = tuple(f"layers.{number}.moe.{kind}" for kind in kinds)
        for name in [name for name in found if name.startswith(by_slot)]:
            found[name] = found[name][slot[layer]]
    return found


def furthest(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The largest difference, relative to the largest element of its tensor."""
    assert one.keys() == other.keys()
    return max(
        float((one[name] - value).abs().max() / value.abs().max().clamp(min=1e-30)) for name, value in other.items()
    )


def trained(
    job: Job,
    iterations: range,
    *,
    balancer: Any = None,
    moves: bool = True,
    attach: bool = False,
    leave_behind: bool = False,
    mode: str = "permute",
    folder: str | None = None,
) -> dict[str, Any]:
    """Losses and final state of a run; with moves: a rebalance every 5 iterations and a random placement every 7."""
    moved: list[int] = []
    balancer = balancer or attached(job, mode=mode, on_event=lambda event: moved.append(event.slots_moved))
    balancer.enabled = moves
    if attach:
        balancer.attach()
    generator, losses = torch.Generator().manual_seed(5), []
    for iteration in iterations:
        losses.append(job.step(iteration))
        if not attach:
            job.optimizers.zero_grad()
            balancer.step()
        if moves and iteration % RANDOM_EVERY == 0:
            weight: Any = job.model.get_parameter("layers.0.moe.routed_experts.inner_experts.w1_EFD")
            moment = next(one.state[weight]["exp_avg"] for one in job.optimizers if weight in one.state).to_local()
            kept = moment.clone()
            balancer.apply(random_placement(generator, job.groups, job.dims.ep))
            if leave_behind:
                moment.copy_(kept)
        if folder is not None and iteration == HALF - 1:
            dcp.save(states(job, balancer), checkpoint_id=folder)
    return {
        "loss": torch.tensor(losses, dtype=torch.float64),
        "moved": sum(moved),
        "state": logical(job, balancer.placement, mode),
    }


def states(job: Job, balancer: Any) -> dict[str, Any]:
    weights = {"model": job.model.state_dict(), "optimizer": job.optimizers, "lr_scheduler": job.schedulers}
    return weights | {"rebalancer": balancer}


def resumed(job: Job, folder: str) -> Tensor:
    """The losses of a run's second half, from a checkpoint after the first half, perhaps of another EP size."""
    balancer = attached(job)
    dcp.load(states(job, balancer), checkpoint_id=folder)
    found: Tensor = trained(job, range(HALF, 2 * HALF), balancer=balancer)["loss"]
    return found


# --- on two ranks: expert parallelism alone -------------------------------------------------------------------------

BFLOAT16 = {"dtype": torch.float32, "exact": False}  # torchtitan's own grouped product of float32 weights
# Name: options of the job, mode, backend of torchtitan's meshes.
KINDS: dict[str, tuple[dict[str, Any], str, str]] = {
    "sigmoid": ({}, "permute", "partial_dtensor"),
    "bfloat16": (BFLOAT16, "permute", "partial_dtensor"),
    "softmax": (BFLOAT16 | {"score": "softmax", "bias": False}, "permute", "full_dtensor"),
    "groups": ({"groups": 4}, "permute", "full_dtensor"),
    "gpt-oss": (BFLOAT16 | {"gpt_oss": True}, "permute", "partial_dtensor"),
    "remap": ({}, "remap", "partial_dtensor"),
    "remap, groups": ({"groups": 4}, "remap", "full_dtensor"),
}
TO_THE_BIT = set(KINDS) - {"softmax"}  # which sums over experts in another order


def logits_after_moves(kind: str) -> dict[str, Any]:
    """How far logits change under random legal placements, and the error for an illegal one."""
    options, mode, backend = KINDS[kind]
    job = Job(meshes(EP, backend), steps=4, **options)
    balancer = attached(job, mode=mode)
    job.step(0)  # so that there are biases and moments
    job.optimizers.zero_grad()
    before, generator, apart = job.logits(1), torch.Generator().manual_seed(3), []
    groups = job.groups if mode == "permute" else None
    for _ in range(3):
        balancer.apply(random_placement(generator, groups, EP))
        apart.append(float((job.logits(1) - before).abs().max()))
    refused = ""
    if groups is not None:
        crossed = torch.arange(EXPERTS)
        crossed[[0, 2]] = crossed[[2, 0]]  # out of their groups
        try:
            balancer.apply(Placement(crossed.expand(2, -1), EXPERTS, EP))
        except DistplbError as error:
            refused = str(error)
        apart.append(float((job.logits(1) - before).abs().max()))
    weight: Any = next(iter(moe_layers(job.model)[0].experts.values()))
    with torch.no_grad():
        rows = weight.to_local()
        rows.copy_(rows.roll(1, 0))  # this tensor alone, which must show
    torn = float((job.logits(1) - before).abs().max())
    return {"apart": max(apart), "refused": refused, "torn": torn, "largest": float(before.abs().max())}


def counted(checkpointing: Any, *, compiled: bool = False) -> dict[str, Any]:
    """What is counted in two iterations of two forwards and one evaluation; and torchtitan's own running counts."""
    options = BFLOAT16 if compiled else {}  # the exact experts read token counts on the host
    job = Job(meshes(EP), steps=4, checkpointing=checkpointing, **options)
    if compiled:
        torch._dynamo.config.capture_scalar_outputs = True
        for block in job.model.layers.values():
            block.compile(backend="aot_eager", fullgraph=True)  # as torchtitan's `apply_compile`, without a compiler
    told: list[tuple[str, float, bool]] = []
    layers = moe_layers(job.model)
    for layer in layers:
        assert layer.counts is not None
        layer.counts(lambda counts, training, name=layer.name: told.append((name, float(counts.sum()), training)))
    own, moe = [], next(module for module in job.model.modules() if isinstance(module, MoE))
    for iteration in range(2):
        job.backward(iteration)
        job.backward(iteration)
        own.append(float(moe.tokens_per_expert_E.sum()))
        job.optimizers.step()
        job.logits(iteration)
    ties = [layer.ties.take() for layer in layers if layer.ties is not None]
    return {"told": told, "own": own, "ties": ties}


def hooks_of(job: Job) -> int:
    """The number of hooks of all kinds in all modules."""
    kinds = [kind for kind in vars(job.model) if kind.endswith("_hooks")]
    return sum(len(getattr(module, kind)) for module in job.model.modules() for kind in kinds)


def hooks_of_two_rebalancers(mode: str) -> tuple[list[int], int]:
    """Hooks beyond the job's own after two descriptions, and with and after each of two rebalancers; and tables."""
    job = Job(meshes(EP), steps=4)
    job.step(0)  # FSDP2 adds hooks of its own in the first forward
    job.optimizers.zero_grad()
    before = hooks_of(job)
    layers, _ = (moe_layers(job.model, mode=mode) for _ in range(2))  # type: ignore[arg-type]  # one of two
    found = [hooks_of(job) - before]
    for iteration in range(2):
        balancer = attached(job, mode=mode)
        found.append(hooks_of(job) - before)
        job.step(iteration)
        job.optimizers.zero_grad()
        balancer.close()
        found.append(hooks_of(job) - before)
    return found, sum(layer.slot_of_expert is not None for layer in layers)


def after_a_table() -> tuple[str, bool]:
    """The error for permuting experts that a table has moved; whether a second rebalancer with a table keeps logits."""
    job, said = Job(meshes(EP), steps=4), ""
    before, generator = job.logits(1), torch.Generator().manual_seed(3)
    first = attached(job, mode="remap")
    first.apply(random_placement(generator, None, EP))
    first.close()
    try:
        attached(job)
    except DistplbError as error:
        said = str(error)
    second = attached(job, mode="remap")
    same = torch.equal(job.logits(1), before)
    second.apply(random_placement(generator, None, EP))
    return said, same and torch.equal(job.logits(1), before)


def refused(**options: Any) -> list[str]:
    """The errors for models whose experts are not sharded over an EP group, by `moe_layers` and by `rebalancer`."""
    dims = meshes(1, **options)
    job = Job(dims, steps=1)
    said = []
    for call in (lambda: moe_layers(job.model), lambda: attached(job), lambda: attached(job, parallel_dims=None)):
        try:
            call()
        except DistplbError as error:
            said.append(str(error))
    return said


def found_in(registry: Any, **options: Any) -> list[tuple[str, int | None, list[str]]]:
    """Names, groups and tensors of torchtitan's own debug model, by its own `parallelize_fn`, without weights."""
    parallelism = ParallelismConfig(expert_parallel_degree=EP, spmd_backend="partial_dtensor")
    spec = registry("debugmodel", moe_comm_backend="standard", **options)
    del spec.model.layers[3:]
    spec.model.update_from_config(config=SimpleNamespace(parallelism=parallelism))
    with torch.device("meta"):
        model = spec.model.build()
    configs: dict[str, Any] = {"training": TrainingConfig(), "compile_config": CompileConfig()}
    configs |= {"parallelism": parallelism, "ac_config": FullAC.Config(), "dump_folder": ""}
    layers = moe_layers(spec.parallelize_fn(model, parallel_dims=meshes(EP), **configs))
    return [(layer.name, layer.num_groups, sorted({**layer.experts, **layer.router})) for layer in layers]


def on_two() -> dict[str, Any]:
    found: dict[str, Any] = {kind: logits_after_moves(kind) for kind in KINDS}
    found["no checkpointing"] = counted(None)
    found["full"], found["selective"] = counted(FullAC.Config()), counted(SelectiveAC.Config())
    found["compiled"] = counted(None, compiled=True)
    quiet = trained(Job(meshes(EP), steps=ITERATIONS), range(ITERATIONS), moves=False)
    runs: dict[str, dict[str, Any]] = {"moved": {}, "remapped": {"mode": "remap"}}
    for name, options in (runs | {"torn": {"leave_behind": True}}).items():
        run = trained(Job(meshes(EP), steps=ITERATIONS), range(ITERATIONS), **options)
        found[name] = {
            "loss": float((run["loss"] - quiet["loss"]).abs().max()),
            "state": furthest(run["state"], quiet["state"]),
            "moved": run["moved"],
        }
    found["learned"] = float(quiet["loss"][-5:].mean() / quiet["loss"][:5].mean())
    found["hooks"] = {mode: hooks_of_two_rebalancers(mode) for mode in ("permute", "remap")}
    found["after a table"] = after_a_table()
    found["refused"] = refused() + refused(tp=2)
    found["DeepSeek-V3"] = found_in(deepseek_v3.model_registry, num_mtp_layers=1)
    found["gpt-oss's own"] = found_in(gpt_oss.model_registry)
    return found


@pytest.fixture(scope="module")
def two() -> list[dict[str, Any]]:
    """The results of each of two ranks."""
    return on_ranks(2, on_two, deadline=240)


def test_layers_of_torchtitans_models_are_found_under_the_names_of_the_whole_model(two: list[dict[str, Any]]) -> None:
    weights = ["expert_bias_E", "router.gate.weight", "w1_EFD", "w2_EDF", "w3_EFD"]
    deepseek = [(name, None, weights) for name in ("layers.1.moe", "layers.2.moe", "mtp_layers.0.moe")]
    biased = ["expert_bias_E", "mlp1_bias_EG", "mlp1_weight_EGD", "mlp2_bias_ED", "mlp2_weight_EDF"]
    biased += ["router.gate.bias", "router.gate.weight"]
    for found in two:
        assert found["DeepSeek-V3"] == deepseek  # whose first layer has no experts
        assert found["gpt-oss's own"] == [(f"layers.{layer}.moe", None, biased) for layer in range(3)]


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_the_same_under_any_legal_placement(two: list[dict[str, Any]], kind: str) -> None:
    for found in two:
        assert found[kind]["apart"] <= (0 if kind in TO_THE_BIT else 1e-5)
        assert found[kind]["torn"] > 1e-3 * found[kind]["largest"]


def test_under_group_limited_routing_a_placement_across_groups_is_refused(two: list[dict[str, Any]]) -> None:
    for found in two:
        assert "group" in found["groups"]["refused"]


@pytest.mark.parametrize("checkpointing", ["no checkpointing", "full", "selective", "compiled"])
def test_each_token_is_counted_once(two: list[dict[str, Any]], checkpointing: str) -> None:
    tokens = 2 * SEQUENCE * TOP_K  # per rank and forward
    for found in two:
        told = [(name, count) for name, count, training in found[checkpointing]["told"] if training]
        assert told == [("layers.0.moe", tokens), ("layers.1.moe", tokens)] * 4
        evaluated = [count for _, count, training in found[checkpointing]["told"] if not training]
        if checkpointing == "compiled":  # torchtitan's own running count, which evaluations do not change
            assert evaluated == [0] * 4
            assert found[checkpointing]["ties"] == [None, None]
            continue
        assert evaluated == [tokens] * 4
        # torchtitan's own counts include recomputed tokens, so distplb could have counted them twice.
        assert found[checkpointing]["own"] == [tokens * (4 if checkpointing in ("full", "selective") else 2)] * 2
        assert all(0 <= share <= 1 for share in found[checkpointing]["ties"])


@pytest.mark.parametrize("run", ["moved", "remapped"])
def test_a_run_with_moves_is_the_run_without(two: list[dict[str, Any]], run: str) -> None:
    for found in two:
        assert found["learned"] < 0.95
        assert found[run]["moved"] > 0
        assert found[run]["loss"] <= 1e-8
        assert found[run]["state"] <= 1e-6


def test_the_comparison_notices_a_moment_left_behind(two: list[dict[str, Any]]) -> None:
    for found in two:
        assert found["torn"]["loss"] > 1e-4
        assert found["torn"]["state"] > 1e-2


def test_describing_a_model_hooks_nothing_but_its_table_and_closing_ends_the_rest(two: list[dict[str, Any]]) -> None:
    """Its three hooks per layer went on counting after `close`, because they were several."""
    for found in two:
        for mode, (hooks, tables) in found["hooks"].items():
            assert tables == (2 if mode == "remap" else 0)
            assert hooks == [tables, tables + 6, tables, tables + 6, tables]


def test_a_second_rebalancer_goes_on_from_the_tables_and_does_not_permute(two: list[dict[str, Any]]) -> None:
    for found in two:
        said, same = found["after a table"]
        assert "layers.0.moe: experts were moved under mode='remap'" in said
        assert same


def test_experts_that_every_rank_computes_are_refused(two: list[dict[str, Any]]) -> None:
    for found in two:
        assert len(found["refused"]) == 6
        assert all("nothing to balance; set" in text for text in found["refused"])


# --- on four ranks: with FSDP2 ----------------------------------------------------------------------------------


def random_moves(dim_1: bool, moves: int, folder: Path) -> dict[str, Any]:
    """Random moves while checkpoints are written: how often logical experts differ, and what the last one holds."""
    job = Job(meshes(EP), steps=2, dim_1=dim_1, dense=(0,))
    balancer = attached(job, verify="off")  # compared here instead, element by element: a lost value stays lost
    job.step(0)
    job.optimizers.zero_grad()
    writers = dist.new_group(backend="gloo")  # torchtitan also gives its writing thread its own group
    first, generator, differing, writing = logical(job, balancer.placement), torch.Generator().manual_seed(1), 0, None
    for number in range(moves):
        if number % SAVED_EVERY == 0:
            if writing is not None:
                writing.result()
            path = str(folder / f"{dim_1}-{number}")
            writing = dcp.async_save(states(job, balancer), checkpoint_id=path, process_group=writers)
            balancer.saving(writing)
        balancer.apply(random_placement(generator, None, EP, layers=1))
        if number % COMPARED_EVERY == COMPARED_EVERY - 1:
            differing += furthest(logical(job, balancer.placement), first) != 0
    assert writing is not None
    writing.result()
    dcp.load(states(job, balancer), checkpoint_id=path)
    read = logical(job, balancer.placement)
    return {"differing": differing, "read": furthest(read, first)}


def pipeline_stages() -> dict[str, Any]:
    """Two stages of two ranks: the first without MoE layers, the second with one."""
    dims = meshes(EP, pp=2)
    stage = dims.get_mesh("pp").get_local_rank()
    job = Job(dims, steps=4, dense=((0, 1), (0,))[stage])
    balancer = attached(job, every=2)
    before = job.logits(0)
    balancer.apply(random_placement(torch.Generator().manual_seed(4), None, EP, layers=1))
    apart = float((job.logits(0) - before).abs().max())
    for iteration in range(2):
        job.backward(iteration)
        job.optimizers.step()
        job.optimizers.zero_grad()
        balancer.step()
    found: dict[str, Any] = {"stage": stage, "apart": apart, "iteration": balancer.iteration}
    return found | {"layers": balancer.placement.num_layers}


def replicas() -> dict[str, Any]:
    """EP 2 × two copies of each expert, with the mesh read from the weights."""
    job = Job(meshes(EP, replicate=2), steps=4)
    balancer = attached(job, parallel_dims=None, every=1)
    before, generator = job.logits(0), torch.Generator().manual_seed(2)
    balancer.apply(random_placement(generator, None, EP))
    apart = float((job.logits(0) - before).abs().max())
    losses = []
    for iteration in range(3):
        losses.append(job.step(iteration))
        job.optimizers.zero_grad()
        balancer.step()
    return {"apart": apart, "losses": losses}


def on_four(folder: Path) -> dict[str, Any]:
    def job(ep: int = EP, dim_1: bool = False) -> Job:
        return Job(meshes(ep), steps=2 * HALF, dim_1=dim_1)

    quiet = trained(job(), range(2 * HALF), moves=False)
    checkpoint = str(folder / "EP 2")
    dim_0 = trained(job(), range(2 * HALF), folder=checkpoint)
    dim_1 = trained(job(dim_1=True), range(ITERATIONS), attach=True)
    found: dict[str, Any] = {
        "dim 0": float((dim_0["loss"] - quiet["loss"]).abs().max()),
        "dim 1": float((dim_1["loss"] - quiet["loss"][:ITERATIONS]).abs().max()),
        "state": furthest(dim_0["state"], quiet["state"]),
        "moved": (dim_0["moved"], dim_1["moved"]),
    }
    found["2 -> 4"] = float((resumed(job(ep=4), checkpoint) - quiet["loss"][HALF:]).abs().max())
    checkpoint = str(folder / "EP 4")
    trained(job(ep=4), range(HALF), folder=checkpoint)
    found["4 -> 2"] = float((resumed(job(dim_1=True), checkpoint) - quiet["loss"][HALF:]).abs().max())
    found["pipeline"], found["replicas"] = pipeline_stages(), replicas() | {"quiet": quiet["loss"][:3].tolist()}
    return found


@pytest.fixture(scope="module")
def four() -> list[dict[str, Any]]:
    """The results of each of four ranks."""
    with tempfile.TemporaryDirectory() as folder:
        return on_ranks(4, on_four, Path(folder), deadline=400)


@pytest.mark.parametrize("layout", ["dim 0", "dim 1"])
def test_a_run_with_moves_of_experts_sharded_by_fsdp_is_the_run_without(
    four: list[dict[str, Any]], layout: str
) -> None:
    for found in four:
        assert min(found["moved"]) > 0
        assert found[layout] <= 1e-8
        assert found["state"] <= 1e-6


@pytest.mark.parametrize("change", ["2 -> 4", "4 -> 2"])
def test_a_run_goes_on_with_another_number_of_expert_parallel_ranks(four: list[dict[str, Any]], change: str) -> None:
    for found in four:
        assert found[change] <= 1e-8


def of_both_layouts(moves: int, folder: Path) -> list[dict[str, Any]]:
    return [random_moves(dim_1, moves, folder) for dim_1 in (False, True)]


@pytest.mark.parametrize("moves", [60, pytest.param(200, marks=pytest.mark.long)])
def test_experts_survive_random_moves_while_checkpoints_are_written(moves: int, tmp_path: Path) -> None:
    for layouts in on_ranks(4, of_both_layouts, moves, tmp_path, deadline=400):
        for layout in layouts:
            assert layout["differing"] == 0
            assert layout["read"] == 0


def test_a_pipeline_stage_without_moe_layers_has_nothing_to_do(four: list[dict[str, Any]]) -> None:
    for found in four:
        stage = found["pipeline"]["stage"]
        assert found["pipeline"] == {"stage": stage, "apart": 0, "iteration": 2, "layers": stage}


def test_copies_of_experts_move_alike(four: list[dict[str, Any]]) -> None:
    for found in four:
        assert found["replicas"]["apart"] == 0
        assert found["replicas"]["losses"] == pytest.approx(found["replicas"]["quiet"], abs=1e-8)


# --- what is counted, in this process -------------------------------------------------------------------------------


class Part(nn.Module):
    """A model of one MoE layer that is recomputed, with a call after it in the forward."""

    def __init__(self, *, bias: bool = True, use_reentrant: bool | None = False) -> None:
        super().__init__()
        self.moe: Any = moe_config(groups=None, bias=bias, score="sigmoid", exact=True, gpt_oss=False).build()
        self.moe.init_states()
        self.use_reentrant = use_reentrant
        self.after: Callable[[], object] = lambda: None

    def forward(self, x: Tensor) -> Tensor:
        recomputed = partial(checkpoint, self.moe, use_reentrant=self.use_reentrant)
        found: Tensor = self.moe(x) if self.use_reentrant is None else recomputed(x)
        self.after()
        return found


def filled(part: Part) -> LoadWindow:
    """A window that the forwards of the part fill."""
    window = LoadWindow(1, EXPERTS, 9)
    _Counts(part, part.moe, RouterTies(TOP_K))(partial(window.add, 0))
    return window


def micro_batch(seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    return torch.randn(2, SEQUENCE, DIM, requires_grad=True)


def in_another_thread(call: Callable[[], object]) -> None:
    thread = threading.Thread(target=call)
    thread.start()
    thread.join()


@pytest.mark.filterwarnings("ignore:In CPU autocast")
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("run", [in_another_thread, lambda call: call()], ids=["in another thread", "in this thread"])
def test_a_recomputation_during_a_forward_is_not_counted(run: Any, use_reentrant: bool) -> None:
    """128 tokens were counted for 64 where a pipeline overlaps a forward with another micro-batch's backward.

    The growth of the layer's running counts was treated as the tokens of the forward.
    """
    part = Part(use_reentrant=use_reentrant)
    window, first = filled(part), micro_batch(0)
    chosen: list[Tensor] = []
    part.moe.router.register_forward_hook(lambda _, arguments, output: chosen.append(output[1].flatten().bincount()))
    loss = part(first).sum()
    part.after = lambda: run(loss.backward)
    part(micro_batch(1))
    assert first.grad is not None
    assert [int(counts.sum()) for counts in chosen] == [2 * SEQUENCE * TOP_K] * 3  # the third recomputes the first
    assert int(part.moe.tokens_per_expert_E.sum()) == 3 * 2 * SEQUENCE * TOP_K
    assert window.load()[:, 0].tolist() == [chosen[0].tolist(), chosen[1].tolist()]


@pytest.mark.filterwarnings("ignore:In CPU autocast")
@pytest.mark.parametrize("bias", [True, False])
def test_counts_are_exact_whatever_the_running_counts_have_grown_to(bias: bool) -> None:
    """Beyond 2^24, float32 has no odd integers."""
    part = Part(bias=bias)
    window = filled(part)
    for grown in (0.0, 2.0**24, 2.0**26):
        part.moe.tokens_per_expert_E.fill_(grown)
        part(micro_batch()).sum().backward()
    loads = window.load()[:, 0].tolist()
    assert any(count % 2 for count in loads[0])
    assert loads == [loads[0]] * 3
    assert sum(loads[0]) == 2 * SEQUENCE * TOP_K


@pytest.mark.filterwarnings("ignore:In CPU autocast")
def test_a_layer_that_a_forward_uses_twice_is_counted_twice() -> None:
    part = Part(use_reentrant=None)
    window = filled(part)
    part.after = lambda: part.moe(micro_batch(1))
    part(micro_batch(0))
    part.moe(micro_batch(2))  # not a forward of the model
    part(micro_batch(0))
    assert window.load().sum(2).tolist() == [[4 * SEQUENCE * TOP_K]] * 2


@pytest.mark.filterwarnings("ignore:In CPU autocast")
def test_a_model_that_is_compiled_as_a_whole_is_counted_by_its_running_counts() -> None:
    part = Part(use_reentrant=None)
    window = filled(part)
    part.compile(backend="eager")
    for seed in range(3):
        part(micro_batch(seed)).sum().backward()
        with torch.no_grad():
            part(micro_batch(seed))
    assert window.load().sum(2).tolist() == [[2 * SEQUENCE * TOP_K]] * 3


@pytest.mark.filterwarnings("ignore:In CPU autocast")
def test_running_counts_that_may_have_lost_tokens_are_refused() -> None:
    """Their growth is then a wrong integer, and nothing else would show it."""
    part = Part(use_reentrant=None)
    window = filled(part)
    part.compile(backend="eager")
    part(micro_batch())
    part.moe.tokens_per_expert_E.fill_(2.0**24)
    with pytest.raises(DistplbError, match=r"LoadWindow\.add: layer 0 has nan for expert 0 .* counts must be finite"):
        part(micro_batch())
    assert window.seen == 1


@pytest.mark.filterwarnings("ignore:In CPU autocast")
def test_neither_evaluations_nor_forwards_of_a_copy_are_steps() -> None:
    part = Part()
    window, other = filled(part), copy.deepcopy(part)
    other(micro_batch()).sum().backward()
    with torch.no_grad():
        part(micro_batch())
    part.eval()(micro_batch())
    assert (window.seen, other.moe.tokens_per_expert_E.sum()) == (0, 4 * SEQUENCE * TOP_K)
    part.train()(micro_batch())
    assert window.load().sum(2).tolist() == [[2 * SEQUENCE * TOP_K]]


# --- what is refused, in this process -------------------------------------------------------------------------------


def layer_of(**changed: Any) -> nn.Module:
    """A model of one MoE layer, not sharded over ranks."""
    moe: Any = moe_config(groups=None, bias=True, score="sigmoid", exact=False, gpt_oss=False).build()
    for path, value in changed.items():
        *way, last = path.split("__")
        owner = moe
        for name in way:
            owner = getattr(owner, name)
        setattr(owner, last, value)
    return nn.ModuleDict({"moe": moe})


def test_a_model_without_moe_layers_is_refused_with_what_was_found() -> None:
    class LookalikeMoE(nn.Linear):
        pass

    with pytest.raises(DistplbError, match=r"no MoE layer of torchtitan(.|\n)*LookalikeMoE × 1"):
        moe_layers(nn.Sequential(LookalikeMoE(2, 2)))


def test_experts_that_are_not_sharded_are_refused() -> None:
    with pytest.raises(DistplbError, match=r"moe\.routed_experts.*nothing to balance"):
        moe_layers(layer_of())


def test_a_balance_that_is_forced_is_refused() -> None:
    with pytest.raises(DistplbError, match="moe_force_load_balance"):
        moe_layers(layer_of(router___debug_force_load_balance=True))


def test_drops_that_depend_on_the_placement_are_refused() -> None:
    dispatcher = SimpleNamespace(non_blocking_capacity_factor=0.5)
    with pytest.raises(DistplbError, match=r"non_blocking_capacity_factor 0\.5"):
        moe_layers(layer_of(routed_experts__token_dispatcher=dispatcher))


def test_remap_is_refused_behind_a_dispatcher_that_was_not_tried() -> None:
    with pytest.raises(DistplbError, match=r"SimpleNamespace.*'permute'"):
        moe_layers(layer_of(routed_experts__token_dispatcher=SimpleNamespace()), mode="remap")


def test_quantised_experts_are_refused() -> None:
    model: Any = layer_of()
    inner = model["moe"].routed_experts.inner_experts
    kind = type("Float8GroupedExperts", (type(inner),), {"__module__": "torchtitan.components.quantization.float8"})
    inner.__class__ = kind
    with pytest.raises(DistplbError, match=r"Float8GroupedExperts.*quantised"):
        moe_layers(model)


def test_an_expert_tensor_without_a_row_for_each_expert_is_refused() -> None:
    model: Any = layer_of()
    model["moe"].routed_experts.inner_experts.register_parameter("scale", nn.Parameter(torch.ones(3)))
    with pytest.raises(DistplbError, match=r"inner_experts\.scale has shape \(3,\)"):
        moe_layers(model)


def test_experts_of_which_a_rank_holds_half_of_each_are_refused() -> None:
    model: Any = layer_of()
    for weight in model["moe"].routed_experts.inner_experts.parameters():
        weight.device_mesh = SimpleNamespace(mesh_dim_names=("ep", "tp"))
        weight.placements = (Shard(0), Shard(2))
    with pytest.raises(DistplbError, match=r"has placement S.*2.* on the mesh axis 'tp'"):
        moe_layers(model)


def test_a_mode_that_does_not_exist_is_refused() -> None:
    with pytest.raises(DistplbError, match="'permute' or 'remap'"):
        moe_layers(layer_of(), mode="shuffle")  # type: ignore[arg-type]  # on purpose
