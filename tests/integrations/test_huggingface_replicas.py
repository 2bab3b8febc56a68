"""Replicas in tiny models of Hugging Face Transformers, on real ranks: the run with them is the run without.

Shapes: L layers, E experts, P slots, M GPUs, R replica slots of each GPU.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from jobs import FREE
from ranks import on_ranks
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

pytest.importorskip("transformers")

from test_huggingface import (
    EXPERTS,
    ITERATIONS,
    LAYERS,
    RANDOM_EVERY,
    batch,
    by_mesh,
    clip,
    furthest,
    groups_of,
    made,
    random_placement,
    whole,
)
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig
from transformers.integrations import moe

from distplb import DistplbError, Moves, Rebalancer
from distplb.core.private_names import is_in_backward
from distplb.integrations import huggingface
from distplb.integrations.huggingface_replicas import implementation_of
from distplb.replicas.lend import Lender

OWN_BATCHES, ONE_BATCH = {"fsdp_size": 2, "ep_size": 2}, {"tp_size": 2, "ep_size": 2}
FOUR_RANKS = {"fsdp_size": 4, "ep_size": 2}
CLOSE, FAR = 1e-9, 1e-6  # relative, in the maximum norm
FREELY = Moves(model=FREE, stop_loss=0)


# --- a job --------------------------------------------------------------------------------------------------------


class AllInFloat64(TorchFunctionMode):
    """What transformers computes in float32 whatever a model's dtype, such as routers and norms, is float64 here."""

    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        function = Tensor.double if function is Tensor.float else function
        arguments = [torch.float64 if one is torch.float32 else one for one in arguments]
        options = {key: torch.float64 if one is torch.float32 else one for key, one in (options or {}).items()}
        return function(*arguments, **options)


def in_float64(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that computes so, also in a backward, where modes of the caller are not in force."""

    def all_in_float64(*arguments: Any, **options: Any) -> Any:
        with AllInFloat64():
            return function(*arguments, **options)

    return all_in_float64


def compute_in_float64(module: nn.Module) -> None:
    """Let a module compute so, and what its checkpoint recomputes.

    The forward is that of the class which the module has when it is called: FSDP2 derives one, and transformers
    recomputes only in the forward of the last.
    """
    module.forward = in_float64(lambda *arguments, **options: type(module).forward(module, *arguments, **options))  # type: ignore[method-assign]


def recomputed_in_float64(layer: Any) -> None:
    """The same for what the checkpoint of a layer recomputes; a module's forward is outside of it."""
    checkpoint = layer._gradient_checkpointing_func
    layer._gradient_checkpointing_func = lambda function, *arguments: checkpoint(in_float64(function), *arguments)


@contextmanager
def grouped_in_float64() -> Iterator[None]:
    """torch's grouped product refuses float64: there transformers' fallback, which it has for such dtypes, computes."""
    can = moe._can_use_grouped_mm

    def not_in_float64(rows: Tensor, weight: Tensor, offs: Tensor) -> bool:
        return weight.dtype != torch.float64 and bool(can(rows, weight, offs))

    with patch.object(moe, "_can_use_grouped_mm", not_in_float64):
        yield


class Job:
    """A model on several ranks, its optimizer and its rebalancer.

    Args:
        name: of the model.
        sizes: of its meshes.
        lent: R.
        every: iterations between rebalances.
        mode: whether router rows move with homes, or a table does.
        products: how its experts are computed.
        ep: how tokens reach their experts.
        recomputed: None, or whether its layers are recomputed by reentrant checkpoints.
        parts: micro-batches of an iteration.
        moves: how homes move.
        iterations: of the run.
        options: other options of the adapter.
    """

    is_exact = True  # all of it in float64

    def __init__(
        self,
        name: str,
        sizes: dict[str, int],
        lent: int,
        every: int | None = None,
        *,
        mode: Any = "permute",
        products: str = "eager",
        ep: str = "auto",
        recomputed: bool | None = None,
        parts: int = 1,
        moves: Moves = FREELY,
        iterations: int = ITERATIONS,
        **options: Any,
    ) -> None:
        self.name, self.mode, self.moves, self.parts, self.iteration = name, mode, moves, parts, 0
        model = self.prepared(made(name, implementation=products)).train()
        parallel, _, meshes = model.prepare_distribute_model(DistributedConfig(**sizes, ep_implementation=ep))
        self.model = model.maybe_distribute_model(model, parallel, meshes)
        self.distributed()
        if recomputed is not None:
            self.model.activation_checkpointing_enable({"use_reentrant": recomputed})
            if self.is_exact:
                for layer in self.model.model.layers:
                    recomputed_in_float64(layer)
        self.groups = [group for one in by_mesh(self.model) if (group := [p for p in one if p.requires_grad])]
        self.optimizer = torch.optim.AdamW([{"params": one} for one in self.groups], lr=3e-3, weight_decay=0.1)
        self.rebalancer = huggingface.rebalancer(
            self.model, self.optimizer, every=every, replica_slots=lent, mode=mode, moves=moves, **options
        )
        batches = sizes.get("dp_replicate_size", 1) * sizes.get("fsdp_size", 1)
        own = max(1, 4 // batches)
        first = own * (dist.get_rank() % batches) % 4
        self.rows = slice(first, first + own)
        self.batches, self.iterations = batches, iterations
        self.steps = list[bool]()  # whether each step of each layer had replicas
        self.again = list[bool]()  # and whether it is a recomputation
        if self.rebalancer.step_balancer is not None:
            watch(self.rebalancer.step_balancer, self.steps, self.again)

    def prepared(self, model: Any) -> Any:
        """The model before transformers distributes it: it computes in float64, all of it."""
        model = model.double()
        for module in (*model.model.layers, model.model.norm, model.model.rotary_emb):
            compute_in_float64(module)
        return model

    def distributed(self) -> None:
        """What a job does with the model after transformers has distributed it."""

    def forward(self, tokens: Tensor) -> Tensor:
        logits = self.model(tokens).logits
        # Not by `labels=`, which computes in float32.
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).double(), tokens[:, 1:].flatten())

    def backward(self) -> Tensor:
        """The loss of the iteration, whose gradients are left where they are."""
        losses = []
        for part in range(self.parts):
            loss = self.forward(batch(self.parts * self.iteration + part, self.rows)) / self.parts
            loss.backward()
            losses.append(loss.detach())
        return torch.stack(losses).sum()

    def step(self) -> Tensor:
        loss = self.backward()
        self.update()
        return loss

    def update(self) -> None:
        clip(self.groups, 0.5)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.rebalancer.step()
        self.iteration += 1

    def logical(self, value: Callable[[nn.Parameter], Any]) -> dict[str, Tensor]:
        """A value of each parameter that has one, whole, with experts in their original order."""
        found = {}
        layers = [f"model.layers.{i}.mlp." for i in range(LAYERS)]
        for key, parameter in self.model.named_parameters():
            if (held := value(parameter)) is None:
                continue
            tensor = whole(held)
            layer = next((i for i, prefix in enumerate(layers) if key.startswith(prefix)), None)
            is_moved = ".experts." in key or (self.mode == "permute" and tensor.shape[:1] == (EXPERTS,))
            if layer is not None and is_moved and "shared" not in key:
                tensor = tensor[self.rebalancer.placement.expert_of_slot[layer].argsort()]
            found[key] = tensor
        return found

    def state(self) -> dict[str, Tensor]:
        """Parameters and moments, whole, with experts in their original order."""
        found = self.logical(lambda parameter: parameter)
        for kind in ("exp_avg", "exp_avg_sq"):
            moments = self.logical(lambda parameter, kind=kind: self.optimizer.state[parameter].get(kind))  # type: ignore[misc]
            found |= {f"{key}:{kind}": moment for key, moment in moments.items()}
        return found


def watch(balancer: Any, steps: list[bool], again: list[bool] | None = None) -> None:
    """Note of each step whether it has replicas, and whether it is a recomputation."""
    dispatch = balancer.dispatch

    def noted(*arguments: Any) -> Any:
        found = dispatch(*arguments)
        steps.append(not found.is_trivial)
        if again is not None:
            again.append(is_in_backward())
        return found

    balancer.dispatch = noted


def trained(
    name: str, sizes: dict[str, int], lent: int, every: int | None = None, *, job: type[Job] = Job, **kind: Any
) -> dict[str, Any]:
    """Losses, gradients of some iterations and the final state; homes move by plans and at random if `every` is set."""
    return results(job(name, sizes, lent, every, **kind), every)


def results(job: Job, every: int | None) -> dict[str, Any]:
    """Of a job, which is closed; no random moves while a rebalance is spread over iterations."""
    generator, at_random = torch.Generator().manual_seed(1), every and job.moves.spread is None
    losses, gradients, slots = [], {}, 0
    for iteration in range(job.iterations):
        losses.append(job.backward())
        if iteration % 10 == 9:
            found = job.logical(lambda parameter: parameter.grad)
            gradients |= {f"{key} of {iteration}": gradient for key, gradient in found.items()}
        before = job.rebalancer.placement
        job.update()
        if at_random and iteration % RANDOM_EVERY == 3:
            job.rebalancer.apply(random_placement(before, generator, groups_of(job.name, job.mode)))
        slots += int((job.rebalancer.placement.expert_of_slot != before.expert_of_slot).sum())
    state = job.state()
    job.rebalancer.close()
    return {"loss": {"loss": torch.stack(losses)}, "gradients": gradients, "state": state, "slots": slots} | {
        "steps": job.steps,
        "again": job.again,
    }


def apart(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The largest difference of two runs, relative to the largest value of its tensor."""
    assert one.keys() == other.keys()
    return max(furthest(one[key], other[key]) / max(float(one[key].abs().max()), 1e-30) for key in one)


class Runs:
    """Runs without replicas and moves, each once."""

    def __init__(self) -> None:
        self._plain = dict[str, dict[str, Any]]()

    def compared(self, name: str, sizes: dict[str, int], every: int | None = 5, **kind: Any) -> dict[str, Any]:
        """How far a run with replicas and moves is from the run without both, and evidence that it tests something."""
        # Recomputed or not, it is the same run.
        alike = {key: value for key, value in kind.items() if key not in ("mode", "recomputed", "moves")}
        key = repr((name, sizes, alike))
        if key not in self._plain:
            self._plain[key] = trained(name, sizes, 0, **alike)
        plain, found = self._plain[key], trained(name, sizes, 2, every, **kind)
        return {kind: apart(plain[kind], found[kind]) for kind in ("loss", "gradients", "state")} | {
            "slots": found["slots"],
            "steps": sum(found["steps"]) / len(found["steps"]),
            "again": sum(found["again"]) / len(found["again"]),
        }


def check(found: list[dict[str, Any]], what: str, kind: dict[str, Any]) -> None:
    """What all ranks have told about one case.

    Checkpoints were passed by under FSDP2, because the forward that the tests replaced was not that of FSDP2's class.
    """
    for rank in found:
        print(what, {key: f"{value:.2g}" for key, value in rank.items()})
        assert rank["steps"] > 0.5, what
        assert (rank["slots"] > 0) == (kind.get("every", 5) is not None), what
        assert (rank["again"] > 0.2) == (kind.get("recomputed") is not None), what
        for part in ("loss", "gradients", "state"):
            assert rank[part] <= CLOSE, (what, part)


# --- the run with replicas is the run without ----------------------------------------------------------------------

# Models, and options of a job. Qwen3-MoE and OLMoE differ from Mixtral in the router only.
Case = tuple[str, dict[str, int], dict[str, Any]]
CASES: dict[str, Case] = {
    "mixtral": ("mixtral", OWN_BATCHES, {}),
    "deepseek_v3": ("deepseek_v3", OWN_BATCHES, {}),
    "gpt_oss": ("gpt_oss", OWN_BATCHES, {}),
    "remap": ("deepseek_v3", OWN_BATCHES, {"mode": "remap"}),
    "one batch": ("mixtral", ONE_BATCH, {}),
    "one batch, reentrant": ("mixtral", ONE_BATCH, {"recomputed": True}),
    "accumulated": ("gpt_oss", OWN_BATCHES, {"parts": 2, "recomputed": False}),
}
LONG_CASES: dict[str, Case] = {
    "qwen3_moe": ("qwen3_moe", OWN_BATCHES, {}),
    "olmoe": ("olmoe", OWN_BATCHES, {}),
    "reentrant": ("mixtral", OWN_BATCHES, {"recomputed": True}),
    "not reentrant": ("mixtral", OWN_BATCHES, {"recomputed": False}),
    "all to all": ("gpt_oss", ONE_BATCH, {"ep": "all_to_all"}),
    "deepseek_v3 in one batch": ("deepseek_v3", ONE_BATCH, {"recomputed": True}),
    "batched_mm": ("gpt_oss", OWN_BATCHES, {"products": "batched_mm"}),
    "grouped_mm": ("gpt_oss", OWN_BATCHES, {"products": "grouped_mm"}),
    "mixtral batched_mm": ("mixtral", OWN_BATCHES, {"products": "batched_mm", "recomputed": True}),
    "mixtral grouped_mm": ("mixtral", OWN_BATCHES, {"products": "grouped_mm", "recomputed": False}),
    "replicas alone": ("mixtral", OWN_BATCHES, {"every": None}),
}


def all_compared(cases: dict[str, Case], runs: Runs | None = None) -> dict[str, dict[str, Any]]:
    runs = Runs() if runs is None else runs
    with grouped_in_float64():
        return {what: runs.compared(name, sizes, **kind) for what, (name, sizes, kind) in cases.items()}


@contextmanager
def left_behind() -> Iterator[None]:
    """The gradient of one replica does not come home; it takes part in the exchange all the same."""
    bring_home = Lender.bring_home

    def without(lender: Any, loan: Any, home: Any, lent: Any) -> None:
        before = [rows.clone() for rows in home]
        bring_home(lender, loan, home, lent)
        if loan.pushes.sends:
            own = loan.pushes.sends[0].own
            for rows, kept in zip(home, before, strict=True):
                rows[own] = kept[own]

    with patch.object(Lender, "bring_home", without):
        yield


# --- experts alone ------------------------------------------------------------------------------------------------

PRODUCTS = ("eager", "batched_mm", "grouped_mm")


def distributed(name: str, dtype: torch.dtype, products: str, sizes: dict[str, int], **options: Any) -> Any:
    model = made(name, implementation=products, **options).to(dtype).train()
    parallel, _, meshes = model.prepare_distribute_model(DistributedConfig(**sizes))
    return model.maybe_distribute_model(model, parallel, meshes)


def rebalancer(model: Any, lent: int, **options: Any) -> Rebalancer:
    return huggingface.rebalancer(model, torch.optim.SGD(model.parameters()), every=None, replica_slots=lent, **options)


def called(
    name: str, ids: Tensor, lent: int, dtype: torch.dtype = torch.float64, products: str = "eager", **options: Any
) -> tuple[dict[str, Tensor], list[bool]]:
    """Results and gradients of one layer's experts for given ids `[N, K]`, and whether they had replicas."""
    model, steps = distributed(name, dtype, products, ONE_BATCH), list[bool]()
    built, experts = rebalancer(model, lent, **options), model.model.layers[0].mlp.experts
    if built.step_balancer is not None:
        watch(built.step_balancer, steps)
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(len(ids), 16, generator=generator).bfloat16().to(dtype).requires_grad_()
    weights = torch.rand(ids.shape, generator=generator).bfloat16().to(dtype).requires_grad_()
    found = experts(hidden, ids, weights)
    (found * torch.randn(found.shape, generator=generator).bfloat16()).sum().backward()
    grads = {key: whole(one.grad) for key, one in experts.named_parameters()}
    built.close()
    result = {"result": found, "hidden": hidden.grad, "weights": weights.grad} | grads
    return {key: tensor.detach().double() for key, tensor in result.items()}, steps  # type: ignore[union-attr]


def skewed_ids(tokens: int, num_experts: int = EXPERTS) -> Tensor:
    """`[N, 2]`, two experts of each token, the first ones far more often."""
    generator = torch.Generator().manual_seed(3)
    return (num_experts * torch.rand(tokens, 2, generator=generator) ** 3).long()


@grouped_in_float64()
def experts_alone(name: str) -> dict[str, Any]:
    """Differences in float64 by how products are computed and for odd numbers of tokens; errors in bfloat16."""
    found: dict[str, Any] = {}
    ids = {"skewed": skewed_ids(60), "all on one GPU": skewed_ids(60, EXPERTS // 2), "one token": skewed_ids(1)}
    ids["none that arrives on GPU 1"] = torch.zeros(2, 2, dtype=torch.int64)
    for products in PRODUCTS:
        for what, table in ids.items():
            plain, _ = called(name, table, 0, products=products)
            lent, steps = called(name, table, 2, products=products)
            found[f"{what}, {products}"] = apart(plain, lent), steps
            dry, steps = called(name, table, 2, products=products, moves=Moves(dry_run=True))
            assert all(torch.equal(dry[key], plain[key]) for key in plain), what
            assert steps == [False]
        exact, _ = called(name, ids["skewed"], 0, torch.float64, "eager")
        errors = []
        for slots in (0, 2):
            low, steps = called(name, ids["skewed"], slots, torch.bfloat16, products)
            oracle = {key: tensor.abs().max() for key, tensor in exact.items()}
            errors.append({key: float((low[key] - exact[key]).abs().max() / oracle[key]) for key in exact})
        assert steps == [True]
        found[f"bfloat16, {products}"] = errors
    return found


# --- what is refused, and what ends --------------------------------------------------------------------------------


def refusal(build: Callable[[], Any]) -> str:
    with pytest.raises(DistplbError) as error:
        build()
    return str(error.value)


def refusals() -> dict[str, str]:
    """The errors for what cannot have replicas, before any training."""
    found = {"all_reduce": refusal(lambda: Job("mixtral", ONE_BATCH, 2, ep="all_reduce"))}
    Job("mixtral", ONE_BATCH, 0, 5, ep="all_reduce").step()  # homes are as they were
    found["option"] = refusal(lambda: Job("mixtral", OWN_BATCHES, 2, replicas={"slots": 3}))
    found["negative"] = refusal(lambda: Job("mixtral", OWN_BATCHES, -1))
    model = distributed("mixtral", torch.float32, "eager", OWN_BATCHES)
    experts = model.model.layers[1].mlp.experts
    shared = distributed("mixtral", torch.float32, "eager", ONE_BATCH)  # FSDP2 refuses to be copied itself
    found["copy"] = refusal(lambda: rebalancer(copy.deepcopy(shared), 2))
    smaller = distributed("olmoe", torch.float32, "eager", OWN_BATCHES, num_experts=8)
    found["sizes"] = refusal(lambda: rebalancer(nn.ModuleList([model, smaller]), 2))
    for products in ("sonicmoe", "deepgemm_megamoe"):
        model.config._experts_implementation = products
        found[products] = refusal(lambda: rebalancer(model, 2))
    model.config._experts_implementation = "eager"
    built = rebalancer(shared, 2)
    shared.config._experts_implementation = "sonicmoe"
    found["later"] = refusal(lambda: shared(batch(0)))
    built.close()
    experts.act_fn.scale = nn.Parameter(torch.ones(1))
    found["parameter"] = refusal(lambda: rebalancer(model, 2))
    del experts.act_fn.scale
    ours = experts.forward
    experts.forward = lambda *arguments: 2 * ours(*arguments)
    found["forward"] = refusal(lambda: rebalancer(model, 2))
    experts.forward = ours
    model.model.layers[1].compile(backend="eager")
    found["compiled"] = refusal(lambda: rebalancer(model, 2))
    rebalancer(model, 0)  # homes are as they were
    return found


def life() -> dict[str, Any]:
    """Whose steps a layer takes part in, as rebalancers come and go."""
    model = distributed("mixtral", torch.float64, "eager", ONE_BATCH)
    implementation = implementation_of(model.model.layers[0].mlp.experts)
    exchange, before = implementation.all_to_all, dict(vars(implementation))
    inside, found = dict(vars(exchange)), []
    noted: list[list[bool]] = [[], []]

    def forward(training: bool = True) -> Tensor:
        model.train(training)
        with nullcontext() if training else torch.no_grad():
            return model(batch(0)).logits.detach()

    plain, counts = forward(), list[list[int]]()

    def look(training: bool = True) -> None:
        found.append(furthest(forward(training), plain))
        counts.append([len(steps) for steps in noted])

    for steps in noted:  # the second replaces the first, which was dropped, and not closed
        built = rebalancer(model, 2)
        watch(built.step_balancer, steps)
        del built
    look()
    look(training=False)  # partial outputs are reduced
    rebalancer(model, 0)
    look()
    as_before = vars(implementation) == before and vars(exchange) == inside
    built = rebalancer(model, 1)
    assert vars(exchange) != inside
    look()
    built.close()
    as_before = as_before and vars(implementation) == before and vars(exchange) == inside
    return {"apart": found, "counts": counts, "as before": as_before, "had replicas": any(noted[1])}


def compiled_later() -> tuple[float, list[bool]]:
    """A model that is compiled after the adapter has seen it computes the same; the experts run as they are."""
    plain, compiled = Job("mixtral", OWN_BATCHES, 0), Job("mixtral", OWN_BATCHES, 2)
    for layer in compiled.model.model.layers:
        layer.compile(backend="eager")
    losses = [[job.step() for _ in range(3)] for job in (plain, compiled)]
    return apart(
        *({"loss": torch.stack(one)} | job.state() for one, job in zip(losses, (plain, compiled), strict=True))
    ), (compiled.steps)


# --- checkpoints and moves ----------------------------------------------------------------------------------------


def saved(job: Job) -> bytes:
    file = io.BytesIO()
    states = {"model": job.model.state_dict(), "optimizer": job.optimizer.state_dict()}
    torch.save(states | {"rebalancer": job.rebalancer.state_dict()}, file)
    return file.getvalue()


def resumed(file: bytes, lent: int, every: int | None) -> Job:
    job = Job("gpt_oss", OWN_BATCHES, lent, every)
    states = torch.load(io.BytesIO(file), weights_only=False)
    job.model.load_state_dict(states["model"])
    job.optimizer.load_state_dict(states["optimizer"])
    job.rebalancer.load_state_dict(states["rebalancer"])
    return job


def resumes() -> dict[str, Any]:
    """Save with replicas and moves and resume without, and the other way round; against the run without both."""
    quiet = Job("gpt_oss", OWN_BATCHES, 0)
    losses = torch.stack([quiet.step() for _ in range(12)])
    found: dict[str, Any] = {}
    for what, kinds in {"with, without": ((2, 3), (0, None)), "without, with": ((0, None), (2, 3))}.items():
        job = Job("gpt_oss", OWN_BATCHES, *kinds[0])
        first = [job.step() for _ in range(6)]
        assert set(job.model.state_dict()) == set(quiet.model.state_dict())
        file, steps = saved(job), job.steps
        job.rebalancer.close()
        job = resumed(file, *kinds[1])
        job.iteration = 6
        first += [job.step() for _ in range(6)]
        found[what] = max(apart(quiet.state(), job.state()), apart({"": losses}, {"": torch.stack(first)}))
        assert sum(steps + job.steps) >= 6
        job.rebalancer.close()
    return found


def saved_in_logical_order(folder: Path) -> tuple[float, bool]:
    """What another program computes from what `save_pretrained` wrote between two steps with replicas."""
    job = Job("gpt_oss", OWN_BATCHES, 2)
    job.step()
    before = job.rebalancer.placement
    job.rebalancer.apply(random_placement(before, torch.Generator().manual_seed(1)))
    with torch.no_grad():
        logits = job.model(batch(5)).logits
    with job.rebalancer.in_logical_order():
        job.model.save_pretrained(folder)
    job.step()
    dist.barrier()
    other = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, experts_implementation="eager")
    with torch.no_grad():
        found = other(batch(5)).logits
    return furthest(found, logits), job.rebalancer.placement != before


def moved(number: int, sizes: dict[str, int] = OWN_BATCHES) -> tuple[int, int]:
    """Random moves of homes with steps between; how many moves, and how many steps of a layer had replicas."""
    job, generator, moves = Job("gpt_oss", sizes, 2), torch.Generator().manual_seed(4), 0
    job.step()
    for _ in range(number):
        before, state = job.rebalancer.placement, job.state()
        job.rebalancer.apply(random_placement(before, generator))
        moves += job.rebalancer.placement != before
        after = job.state()
        assert all(torch.equal(state[key], after[key]) for key in state)
        job.step()
    return moves, sum(job.steps)


# --- on two ranks --------------------------------------------------------------------------------------------------


def all_of_two_ranks(folder: str) -> dict[str, Any]:
    """All in one pair of processes, because importing transformers takes longer than most of them."""
    runs = Runs()
    found: dict[str, Any] = {"runs": all_compared(CASES, runs)}
    with left_behind():
        found["left behind"] = runs.compared("gpt_oss", OWN_BATCHES, None)
    found["experts"] = experts_alone("gpt_oss")
    found["refusals"] = refusals()
    found["life"] = life()
    found["compiled later"] = compiled_later()
    found["resumes"] = resumes()
    found["logical order"] = saved_in_logical_order(Path(folder))
    found["moves"] = moved(8)
    return found


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return on_ranks(2, all_of_two_ranks, str(tmp_path_factory.mktemp("saved")), deadline=240)


@pytest.mark.parametrize("what", CASES)
def test_a_run_with_replicas_and_moves_is_the_run_without_both(two_ranks: list[dict[str, Any]], what: str) -> None:
    check([rank["runs"][what] for rank in two_ranks], what, CASES[what][2])


@pytest.mark.long
def test_further_runs_with_replicas_and_moves_are_the_runs_without_both() -> None:
    ranks = on_ranks(2, all_compared, LONG_CASES, deadline=400)
    for what, (_, _, kind) in LONG_CASES.items():
        check([rank[what] for rank in ranks], what, kind)


def test_a_gradient_that_stays_with_its_replica_shows(two_ranks: list[dict[str, Any]]) -> None:
    for rank in two_ranks:
        print(rank["left behind"])
        assert rank["left behind"]["loss"] > FAR
        assert rank["left behind"]["gradients"] > FAR


def check_experts(ranks: list[dict[str, Any]]) -> None:
    """Of `experts_alone` on all ranks."""
    for found in ranks:
        for what, told in found.items():
            print(what, told)
            if what.startswith("bfloat16"):
                plain, lent = told
                for key in plain:
                    assert lent[key] <= 2 * plain[key], (what, key)
            else:
                difference, steps = told
                assert difference <= 1e-12, what
                assert steps == [True], what


def test_experts_compute_the_same_with_replicas_however_their_products_are_computed(
    two_ranks: list[dict[str, Any]],
) -> None:
    check_experts([rank["experts"] for rank in two_ranks])


@pytest.mark.long
def test_experts_without_biases_compute_the_same_with_replicas() -> None:
    check_experts(on_ranks(2, experts_alone, "mixtral"))


def test_what_cannot_have_replicas_is_refused_before_training(two_ranks: list[dict[str, Any]]) -> None:
    for found in (rank["refusals"] for rank in two_ranks):
        print(*found.values(), sep="\n")
        assert "model.layers.0.mlp: its tokens reach the experts by AllReduceEP" in found["all_reduce"]
        assert "replicas has 'slots'; pass options of distplb.StepBalancer: keep, " in found["option"]
        assert "replica_slots is -1" in found["negative"]
        assert "computes with the experts of another model" in found["copy"]
        assert "1.model.layers.0.mlp has 8 experts and 0.model.layers.0.mlp has 12" in found["sizes"]
        for products in ("sonicmoe", "deepgemm_megamoe"):
            assert f"computed by experts_implementation={products!r}, which was never run" in found[products]
        assert "computed by experts_implementation='sonicmoe', which was never run" in found["later"]
        assert "model.layers.1.mlp.experts.act_fn.scale belongs to a module inside" in found["parameter"]
        assert "model.layers.1.mlp: its experts have a forward that is not the expert-parallel" in found["forward"]
        assert "model.layers.1.mlp is compiled (its " in found["compiled"]


def test_a_layer_takes_part_in_the_steps_of_the_last_rebalancer_until_that_closes(
    two_ranks: list[dict[str, Any]],
) -> None:
    for found in (rank["life"] for rank in two_ranks):
        assert max(found["apart"]) <= 1e-6  # norms and routers compute in float32
        assert found["counts"] == [[0, LAYERS]] * 4
        assert found["as before"]
        assert found["had replicas"]


def test_a_model_that_is_compiled_later_computes_the_same(two_ranks: list[dict[str, Any]]) -> None:
    for difference, steps in (rank["compiled later"] for rank in two_ranks):
        assert difference <= CLOSE
        assert len(steps) == 3 * LAYERS
        assert sum(steps) > LAYERS


def test_a_job_resumes_with_or_without_replicas_from_either_checkpoint(two_ranks: list[dict[str, Any]]) -> None:
    for found in (rank["resumes"] for rank in two_ranks):
        assert all(difference <= CLOSE for difference in found.values()), found


def test_other_programs_read_what_is_saved_in_logical_order(two_ranks: list[dict[str, Any]]) -> None:
    for difference, has_moved in (rank["logical order"] for rank in two_ranks):
        assert has_moved
        assert difference <= 1e-5  # there, norms compute in float32


def test_homes_move_between_steps_bit_for_bit(two_ranks: list[dict[str, Any]]) -> None:
    for moves, steps in (rank["moves"] for rank in two_ranks):
        assert moves == 8
        assert steps > 8


@pytest.mark.long
@pytest.mark.parametrize("sizes", [OWN_BATCHES, ONE_BATCH])
def test_homes_move_between_a_hundred_steps_bit_for_bit(sizes: dict[str, int]) -> None:
    for moves, steps in on_ranks(2, moved, 100, sizes, deadline=240):
        assert moves == 100
        assert steps > 100


# --- on four ranks -------------------------------------------------------------------------------------------------

CASES_OF_FOUR: dict[str, Case] = {"two shards of each expert": ("mixtral", FOUR_RANKS, {})}


def test_a_run_with_two_shards_of_each_expert_is_the_run_without() -> None:
    ranks = on_ranks(4, all_compared, CASES_OF_FOUR)
    for what, (_, _, kind) in CASES_OF_FOUR.items():
        check([rank[what] for rank in ranks], what, kind)
