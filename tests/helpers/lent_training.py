"""Trains a small MoE model with replicas or without, sharded and recomputed as trainers do it.

Ranks are EP groups of consecutive ranks, and hold copies of the experts of the ranks at their place in other EP groups.

Shapes: N tokens of a rank, K experts of each token, D dim, H ffn, L layers, E experts, P = E slots, M ranks of an EP
group, G own and R replica slots of each rank, X rows that arrived.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jobs import FREE
from lending import order_by_slot, run_slots
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import distplb
from distplb.comm.torchdist import TorchComm
from distplb.replicas.step_balancer import Dispatch, StepBalancer

__all__ = [
    "Comparison",
    "Run",
    "Trained",
    "Training",
    "check",
    "compared",
    "furthest",
    "poison",
    "relative",
    "trained",
    "words",
]

LAYERS, DIM, FFN, K = 2, 8, 8, 2
TOKENS = 16  # of a rank in a micro-batch
TOLERANCE = 1e-10  # relative, in the maximum norm
PERIOD = 24  # iterations after which the same experts are popular again
EVERY, RANDOM_EVERY = 10, 7  # iterations between rebalances, and between random placements
MAX_NORM = 0.05  # of clipping, which most iterations exceed
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=3e-3),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
}


@dataclass(frozen=True)
class Run:
    """One training.

    Args:
        sharding: "ddp"; or "fsdp 0", "fsdp 1": FSDP2 with experts sharded along that dim over ranks that hold copies.
        recompute: "none", "full", "reentrant" (full as well), or "selective": all but matrix products and all-to-alls.
        micro_batches: of an iteration, whose gradients accumulate.
        optimizer: "adamw" or "sgd", with momentum.
        homes: "still"; or "rows", "table": a `Rebalancer` and random placements move them.
        replicas: whether a `StepBalancer` lends some; otherwise the layers have a plain dispatcher.
        ep: ranks of an EP group.
        experts: E.
        keep: the option of `StepBalancer`.
        iterations: how many.
        dtype: of activations and gathered weights; optimizers step in float32, or in float64 if it is that.
        forced: whether tokens choose experts by popularity alone, so that rounding cannot change the routing.
    """

    sharding: str = "ddp"
    recompute: str = "none"
    micro_batches: int = 1
    optimizer: str = "adamw"
    homes: str = "still"
    replicas: bool = True
    ep: int = 2
    experts: int = 8
    keep: bool = False
    iterations: int = 100
    dtype: torch.dtype = torch.float64
    forced: bool = False

    @property
    def plain(self) -> Run:
        """The same training without what must not change it: under DDP, without replicas, recomputation and moves."""
        return replace(self, sharding="ddp", recompute="none", homes="still", replicas=False, keep=False)


@dataclass
class Trained:
    """What a training was, the same on all ranks.

    Args:
        values: the losses `[iterations]`, and each parameter and moment at the end, whole and in logical order.
        routing: `[forwards, L, N, K]`, the experts that this rank's tokens chose.
        lent: the share of steps that had replicas.
        clipped: the share of iterations whose gradients were clipped.
        moved: how many experts changed slots.
    """

    values: dict[str, Tensor]
    routing: Tensor
    lent: float
    clipped: float
    moved: int


def furthest(one: Trained, other: Trained) -> tuple[float, str]:
    """The largest difference of two runs, in the maximum norm of each tensor and relative to it; and the tensor."""
    assert one.values.keys() == other.values.keys()
    assert torch.equal(one.routing, other.routing), "the runs are not comparable: their tokens chose other experts"
    found = {name: relative(value, other.values[name]) for name, value in one.values.items()}
    worst = max(found, key=found.__getitem__)
    return found[worst], worst


def relative(one: Tensor, other: Tensor) -> float:
    """The maximum of the difference over the maximum of `one`; infinity if any value is NaN."""
    difference = (one.double() - other.double()).abs().max() / one.double().abs().max().clamp(min=1e-30)
    return float(difference.nan_to_num(nan=torch.inf))


# --- the model ----------------------------------------------------------------------------------------------------


class AllToAll(torch.autograd.Function):
    """By the functional collective, whose results selective recomputation can save."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.sizes, ctx.group = (receive, send), group
        functional = torch.ops._c10d_functional
        found = functional.all_to_all_single(rows.contiguous(), receive, send, group.group_name)
        waited: Tensor = functional.wait_tensor(found)
        return waited

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return AllToAll.apply(gradient, *ctx.sizes, ctx.group), None, None, None


@dataclass
class Routes:
    """Where the tokens of a step go: by a plain dispatcher, or with replicas by `step`."""

    slot_of_token: Tensor  # [N, K]
    send: Tensor  # [M, G + R]
    receive: Tensor  # [M, G + R]
    step: Dispatch | None = None


class Experts(nn.Module):
    """The experts of a rank: the unit that data parallelism shards."""

    def __init__(self, weights: Sequence[Tensor], balancer: StepBalancer | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.w_in, self.w_out = (nn.Parameter(weight) for weight in weights)  # [G, D, H], [G, H, D]
        self.balancer, self.dtype = balancer, dtype

    def forward(self, rows: Tensor, routes: Routes) -> Tensor:  # [X, D] -> [X, D], in the order of routes.receive
        weights = [local(weight).to(self.dtype) for weight in (self.w_in, self.w_out)]
        order = order_by_slot(routes.receive)
        tokens = routes.receive.sum(0).tolist()

        def computed(rows: Tensor, own: Sequence[Tensor], replicas: Sequence[Tensor]) -> Tensor:
            return run_slots(rows, own, replicas, tokens)[order.argsort()]

        if routes.step is None:
            return computed(rows[order], weights, [weight[:0] for weight in weights])
        assert self.balancer is not None
        return self.balancer.compute(routes.step, lambda x, own, away: computed(x[order], own, away), rows, *weights)


class MoE(nn.Module):
    """Router, dispatch, experts, combine."""

    def __init__(self, name: str, run: Run, world: World, generator: torch.Generator) -> None:
        super().__init__()
        self.name, self.run, self.world = name, run, world
        self.router = nn.Parameter(drawn(run, generator, run.experts, DIM))
        weights = [drawn(run, generator, run.experts, *sizes) for sizes in ((DIM, FFN), (FFN, DIM))]
        self.experts = Experts([world.own(weight) for weight in weights], world.balancer, run.dtype)
        popular = torch.randn(run.experts, PERIOD, generator=generator, dtype=torch.float64)
        popular[torch.randint(run.experts, (PERIOD,), generator=generator), torch.arange(PERIOD)] += 3.0
        self.register_buffer("popularity", popular)  # [P, PERIOD]; its rows move with the router's
        self.register_buffer("slot_of_expert", torch.arange(run.experts))
        self.chosen: list[Tensor] = []  # by forward, what the router chose: slots, or experts if there is a table
        self.lent: list[bool] = []

    def forward(self, x: Tensor, iteration: int) -> Tensor:  # [N, D] -> [N, D]
        popularity = self.popularity[:, iteration % PERIOD]
        scores = (x @ self.router.T.to(x.dtype)).double() + popularity  # [N, P]
        noise = torch.rand(len(x), 1, generator=torch.Generator().manual_seed(iteration), dtype=torch.float64)
        choice = ((popularity - 6 * noise).square().neg() if self.run.forced else scores).topk(K, 1).indices  # [N, K]
        gate = scores.gather(1, choice).softmax(1).to(x.dtype)
        slot = self.slot_of_expert[choice] if self.run.homes == "table" else choice
        routes = self.routes(slot)
        if not is_recomputed():
            self.chosen.append(choice)
            self.lent.append(routes.step is not None and not routes.step.is_trivial)
        slots = routes.slot_of_token.flatten()
        order = slots.argsort(stable=True)
        sizes = routes.send.sum(1).tolist(), routes.receive.sum(1).tolist()
        rows = AllToAll.apply(x.repeat_interleave(K, 0)[order], *sizes, self.world.group)
        rows = self.experts(rows, routes)
        rows = AllToAll.apply(rows, *reversed(sizes), self.world.group)
        back = torch.empty_like(rows).index_copy(0, order, rows).view(*slot.shape, DIM)
        return (back * gate.unsqueeze(-1)).sum(1)

    def routes(self, slot: Tensor) -> Routes:
        """A plain dispatcher's exchange of counts, or the balancer's, which takes its place."""
        if self.world.balancer is not None:
            step = self.world.balancer.dispatch(self.name, slot)
            return Routes(step.slot_of_token, step.send, step.receive, step)
        send = slot.flatten().bincount(minlength=self.run.experts).view(self.run.ep, -1)
        receive = torch.empty_like(send)
        dist.all_to_all_single(receive, send, group=self.world.group)
        return Routes(slot, send, receive)


class Block(nn.Module):
    """A dense layer and an MoE layer, which are recomputed together."""

    def __init__(self, name: str, run: Run, world: World, generator: torch.Generator) -> None:
        super().__init__()
        self.recompute = run.recompute
        self.dense = nn.Parameter(drawn(run, generator, DIM, DIM))
        self.moe = MoE(name, run, world, generator)

    def body(self, x: Tensor, iteration: int) -> Tensor:
        x = x + F.gelu(F.rms_norm(x, (DIM,)) @ self.dense.to(x.dtype))
        return x + self.moe(F.rms_norm(x, (DIM,)), iteration)

    def forward(self, x: Tensor, iteration: int) -> Tensor:
        if self.recompute == "none":
            return self.body(x, iteration)
        options: dict[str, Any] = {"use_reentrant": self.recompute == "reentrant"}
        if self.recompute == "selective":
            options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, saves)
        found: Tensor = checkpoint(self.body, x, iteration, **options)
        return found


class Model(nn.Module):
    """Blocks between two dense layers."""

    def __init__(self, run: Run, world: World) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.dtype, self.wide = run.dtype, wide_dtype(run)
        # Modules of their own, because DDP cannot ignore parameters of the outermost one.
        self.first = nn.ParameterList([drawn(run, generator, DIM, DIM)])
        self.blocks = nn.ModuleList(Block(f"blocks.{layer}", run, world, generator) for layer in range(LAYERS))
        self.head = nn.ParameterList([drawn(run, generator, DIM, DIM)])

    def forward(self, x: Tensor, iteration: int) -> Tensor:
        x = x.to(self.dtype) @ self.first[0].to(self.dtype)
        for block in self.blocks:
            x = block(x, iteration)
        return x @ self.head[0].to(self.dtype)


def drawn(run: Run, generator: torch.Generator, *sizes: int) -> Tensor:
    values = torch.randn(*sizes, generator=generator, dtype=torch.float64) * 0.5
    return values.to(wide_dtype(run))


def wide_dtype(run: Run) -> torch.dtype:
    """The dtype of parameters, optimizers and losses."""
    return torch.float64 if run.dtype == torch.float64 else torch.float32


def local(weight: Tensor) -> Tensor:
    return weight.to_local() if isinstance(weight, DTensor) else weight


def is_recomputed() -> bool:
    return torch._C._current_graph_task_id() != -1


def saves(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    saved = (torch.ops.aten.mm.default, torch.ops._c10d_functional.all_to_all_single.default)
    return CheckpointPolicy.MUST_SAVE if operation in saved else CheckpointPolicy.PREFER_RECOMPUTE


# --- the training -------------------------------------------------------------------------------------------------


class World:
    """Meshes and the balancer of a run."""

    def __init__(self, run: Run) -> None:
        copies = dist.get_world_size() // run.ep
        self.mesh: DeviceMesh = init_device_mesh("cpu", (copies, run.ep), mesh_dim_names=("copies", "ep"))
        self.group, self.copies = (self.mesh[name].get_group() for name in ("ep", "copies"))
        self.gpu, self.num_copies = self.mesh["ep"].get_local_rank(), copies
        self.is_fsdp = run.sharding != "ddp"
        self.ep = run.ep
        self.balancer = (
            StepBalancer(
                self.group,
                topology=distplb.Topology(1, run.ep),
                num_experts=run.experts,
                replica_slots=1,
                keep=run.keep,
                deadline=60.0,
            )
            if run.replicas
            else None
        )

    def own(self, weight: Tensor) -> Tensor:
        """This rank's part of a weight `[E, ...]`."""
        if self.is_fsdp:
            return distribute_tensor(weight, self.mesh["ep"], [Shard(0)])
        return weight.chunk(self.ep)[self.gpu].clone()


@dataclass
class Training:
    """A model with its optimizer, data parallelism and rebalancer.

    Experts' gradients are sums over the ranks of an EP group, not means; for both optimizers that is a matter of the
    learning rate.

    Args:
        run: what to train.
    """

    run: Run
    model: Model = field(init=False)

    def __post_init__(self) -> None:
        run = self.run
        self.world = World(run)
        self.model = Model(run, self.world)
        self.forward, self.wrapped = self._parallel()
        names = dict(self.model.named_parameters())
        self.experts = {name: parameter for name, parameter in names.items() if "experts" in name}
        self.dense = {name: parameter for name, parameter in names.items() if "experts" not in name}
        self.optimizer = OPTIMIZERS[run.optimizer]([*self.experts.values(), *self.dense.values()])
        self.moes: list[MoE] = [block.moe for block in self.model.blocks]
        self.window = distplb.LoadWindow(LAYERS, run.experts, 4)
        self.rebalancer = self._rebalancer() if run.homes != "still" else None
        self.placements = torch.Generator().manual_seed(1)
        self.losses: list[Tensor] = []
        self.routing: list[Tensor] = []
        self.clipped, self.moved = 0, 0

    def iterate(
        self, after_forward: Callable[[], None] = lambda: None, after_backward: Callable[[], None] = lambda: None
    ) -> None:
        """Train one iteration, with something done between each forward and its backward, or after that."""
        run, iteration = self.run, len(self.losses)
        total = torch.zeros(())
        for micro in range(run.micro_batches):
            x, target = self.batch(iteration, micro)
            with self.synchronized(micro == run.micro_batches - 1):
                output = self.forward(x, iteration)
                wide = self.model.wide
                loss = F.mse_loss(output.to(wide), target.to(wide)) / run.micro_batches
                after_forward()
                loss.backward()
                after_backward()
            total = total + loss.detach().double()
            self.note_routing()
        self.clip()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.rebalancer is not None:
            self.move(iteration)
        dist.all_reduce(total)
        self.losses.append(total / dist.get_world_size())

    def batch(self, iteration: int, micro: int) -> tuple[Tensor, Tensor]:
        """`[N, D]` inputs and targets of this rank."""
        seed = (iteration * 16 + micro) * 16 + dist.get_rank()
        x = torch.randn(TOKENS, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        teacher = torch.randn(DIM, DIM, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
        return x, torch.tanh(x @ teacher)

    @contextmanager
    def synchronized(self, is_last: bool) -> Iterator[None]:
        """Accumulate gradients without reducing them, except with the last micro-batch."""
        with ExitStack() as stack:
            for module in self.wrapped:
                if isinstance(module, DistributedDataParallel):
                    if not is_last:
                        stack.enter_context(module.no_sync())
                else:
                    module.set_requires_gradient_sync(is_last)
            yield

    def clip(self) -> None:
        """Clip the gradients of dense parameters and those of experts, each by their norm over all ranks."""
        norm = torch.nn.utils.clip_grad_norm_(self.dense.values(), MAX_NORM)
        if self.world.is_fsdp:
            torch.nn.utils.clip_grad_norm_(self.experts.values(), MAX_NORM)
        else:
            gradients = [each.grad for each in self.experts.values() if each.grad is not None]
            square = torch.nn.utils.get_total_norm(gradients) ** 2
            dist.all_reduce(square, group=self.world.group)
            torch.nn.utils.clip_grads_with_norm_(self.experts.values(), MAX_NORM, square.sqrt())
        self.clipped += bool((norm.full_tensor() if isinstance(norm, DTensor) else norm) > MAX_NORM)

    def note_routing(self) -> None:
        """Keep what the tokens of the last forward chose, as experts, and count it."""
        for layer, moe in enumerate(self.moes):
            choice = moe.chosen[-1]
            self.window.add(layer, choice.flatten().bincount(minlength=self.run.experts))
        chosen = torch.stack([moe.chosen[-1] for moe in self.moes])  # [L, N, K]
        if self.run.homes == "rows":
            assert self.rebalancer is not None
            expert_of_slot = self.rebalancer.placement.expert_of_slot  # [L, P]
            chosen = expert_of_slot.gather(1, chosen.flatten(1)).view(chosen.shape)
        self.routing.append(chosen)

    def move(self, iteration: int) -> None:
        """Let the rebalancer plan, and now and then move homes anywhere."""
        assert self.rebalancer is not None
        before = self.rebalancer.placement.expert_of_slot
        self.rebalancer.step()
        if iteration % RANDOM_EVERY == 3:
            tables = [torch.randperm(self.run.experts, generator=self.placements) for _ in self.moes]
            self.rebalancer.apply(distplb.Placement(torch.stack(tables), self.run.experts, self.run.ep))
        self.moved += int(before.ne(self.rebalancer.placement.expert_of_slot).sum())

    def result(self) -> Trained:
        """The losses, and each parameter and moment, whole and in logical order."""
        values = {"losses": torch.stack(self.losses)}
        for name, parameter in [*self.experts.items(), *self.dense.items()]:
            state = self.optimizer.state[parameter]
            moments = {key: value for key, value in state.items() if isinstance(value, Tensor) and value.dim()}
            for key, value in {"": parameter.detach(), **moments}.items():
                values[f"{name} {key}"] = self.logical(name, value)
        lent = [each for moe in self.moes for each in moe.lent]
        iterations = max(1, len(self.losses))
        return Trained(values, torch.stack(self.routing), sum(lent) / len(lent), self.clipped / iterations, self.moved)

    def logical(self, name: str, value: Tensor) -> Tensor:
        """A parameter or what has its shape, whole and with rows in the order of experts."""
        if isinstance(value, DTensor):
            value = value.full_tensor()
        elif "experts" in name:
            parts = [torch.empty_like(value) for _ in range(self.run.ep)]
            dist.all_gather(parts, value.contiguous(), group=self.world.group)
            value = torch.cat(parts)
        has_moved = "experts" in name or ("router" in name and self.run.homes == "rows")
        if has_moved and self.rebalancer is not None:
            layer = int(name.split(".")[1])
            value = value[self.rebalancer.placement.inverse[layer, :, 0]]
        return value.clone()

    def _parallel(self) -> tuple[Callable[..., Tensor], list[Any]]:
        """The model under data parallelism: dense parameters over all ranks, experts over those that hold copies."""
        run, world, model = self.run, self.world, self.model
        if not world.is_fsdp:
            return self._under_ddp()
        policy = (
            MixedPrecisionPolicy()
            if run.dtype == torch.float64
            else MixedPrecisionPolicy(param_dtype=run.dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        )
        dim = int(run.sharding.split()[1])
        everybody = init_device_mesh("cpu", (dist.get_world_size(),))
        for block in model.blocks:
            fully_shard(
                block.moe.experts, mesh=world.mesh["copies"], shard_placement_fn=lambda _: Shard(dim), mp_policy=policy
            )
            fully_shard(block, mesh=everybody, mp_policy=policy)
        fully_shard(model, mesh=everybody, mp_policy=policy)
        return model, [model]

    def _under_ddp(self) -> tuple[Callable[..., Tensor], list[Any]]:
        """DDP around DDP: each reduces the parameters that the other ignores."""
        inner: Any = self.model
        experts, dense = (
            [name for name, _ in self.model.named_parameters() if ("experts" in name) is one] for one in (True, False)
        )
        buffers = [name for name, _ in self.model.named_buffers()]
        wrapped = []
        if self.world.num_copies > 1:
            inner._ddp_params_and_buffers_to_ignore = [*dense, *buffers]
            inner = DistributedDataParallel(inner, process_group=self.world.copies)
            experts, buffers = ([f"module.{name}" for name in names] for names in (experts, buffers))
            wrapped.append(inner)
        inner._ddp_params_and_buffers_to_ignore = [*experts, *buffers]
        outer = DistributedDataParallel(inner)
        return outer, [*wrapped, outer]

    def _rebalancer(self) -> distplb.Rebalancer:
        layers = []
        for moe in self.moes:
            follows: dict[str, Any] = (
                {"slot_of_expert": moe.slot_of_expert}
                if self.run.homes == "table"
                else {"router": {"weight": moe.router, "popularity": moe.popularity}}
            )
            experts = {"w_in": moe.experts.w_in, "w_out": moe.experts.w_out}
            layers.append(distplb.MoELayer(name=moe.name, experts=experts, **follows))
        return distplb.Rebalancer(
            layers,
            self.optimizer,
            topology=distplb.Topology(1, self.run.ep),
            every=EVERY,
            window=self.window,
            comm=TorchComm(),
            gpu=self.world.gpu,
            moves=distplb.Moves(model=FREE, stop_loss=0),
        )


def trained(run: Run) -> Trained:
    """Train, with the buffer for replicas full of NaN between each forward and its backward."""
    training = Training(run)
    for _ in range(run.iterations):
        training.iterate(lambda: poison(training))
    return training.result()


def poison(training: Training) -> None:
    """Overwrite the replicas in the shared buffer, as another layer's would."""
    balancer = training.world.balancer
    if balancer is not None and not training.run.keep:
        balancer._lender._weights._memory.fill_(255)  # NaN in every dtype
        balancer._lender._held = None


@dataclass(frozen=True)
class Comparison:
    """A training with replicas against its plain form, in numbers, because processes cannot send tensors and end.

    Args:
        difference: the largest one, relative to the maximum of its tensor.
        where: that tensor.
        lent: the share of steps that had replicas.
        clipped: the least share of iterations whose gradients were clipped.
        moved: how many experts changed slots.
        learned: the last loss over the first one.
    """

    difference: float
    where: str
    lent: float
    clipped: float
    moved: int
    learned: float


def compared(runs: Sequence[Run]) -> dict[Run, Comparison]:
    """Compare each training with its plain form, of which there is one for all runs that share it."""
    plain: dict[Run, Trained] = {}
    found = {}
    for run in runs:
        if run.plain not in plain:
            plain[run.plain] = trained(run.plain)
        one, other = plain[run.plain], trained(run)
        assert one.lent == one.moved == 0
        losses = one.values["losses"]
        clipped = min(one.clipped, other.clipped)
        found[run] = Comparison(
            *furthest(one, other), other.lent, clipped, other.moved, float(losses[-1]) / float(losses[0])
        )
    return found


def check(run: Run, found: Comparison) -> None:
    """Check that a run with replicas is the run without, and was a training with what it claims to have."""
    assert found.difference <= TOLERANCE, found
    assert found.lent > 0.5, "most steps are to have replicas"
    assert found.clipped > 0.5
    assert (found.moved > 10) == (run.homes != "still")
    assert found.learned < 0.95


def words(run: Run) -> str:
    changed = {each.name: getattr(run, each.name) for each in fields(run) if getattr(run, each.name) != each.default}
    return ", ".join(f"{name}={value}" for name, value in changed.items()) or "as a rule"
