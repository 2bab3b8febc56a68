"""The job of each rank of `test_sequences`: a small model, and its twin, in which no expert moves.

The twin holds all experts in logical order and trains on the same tokens. The model must hold the same values for each
expert as the twin, wherever the expert is, and both must compute the same outputs. The twin does not use the package.
Shapes: P = E slots and experts, G slots on each GPU, N tokens, K experts of each token, D dim.
"""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from jobs import FREE
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import distplb
from distplb import (
    DistplbError,
    FlatShard,
    LoadWindow,
    MoELayer,
    Moves,
    Placement,
    Rebalancer,
    Record,
    Search,
    Spread,
    Topology,
)
from distplb.comm.torchdist import TorchComm
from distplb.migrate import transfer
from distplb.train import rebalance as rebalance_module

LAYERS, EXPERTS, DIM, TOKENS, TOP_K = 2, 8, 4, 12, 2
EVERY = 3
MOMENTS = ("exp_avg", "exp_avg_sq")
NEAR = 1e-9  # relative error in the maximum norm, because sums over experts are in another order


@dataclass(frozen=True)
class Setup:
    """The settings of a sequence.

    Args:
        ranks: 1, 2 or 4; experts are spread over `ep` of them.
        layout: "plain", "dim 0" or "dim 1" (of FSDP2), "flat" (shards of an optimizer), or "own": each expert in a
            separate tensor, which has no gradient in iterations in which it receives no tokens.
        rule: "plain", "groups" (two slots each), "blocks" (four slots each) or "classes".
        mode: "permute" or "remap".
        spread: whether rebalances are spread over iterations.
        max_bytes: byte budget of a rebalance.
    """

    ranks: int
    layout: str
    rule: str
    mode: str
    spread: bool
    max_bytes: int | None

    @property
    def ep(self) -> int:
        """Number of GPUs of the EP group; the other ranks hold copies or shards of the same experts."""
        return self.ranks if self.layout in ("plain", "own") else {1: 1, 2: 1, 4: 2}[self.ranks]

    @property
    def num_groups(self) -> int | None:
        """Number of the router's groups."""
        return {"groups": 4, "blocks": 2}.get(self.rule)

    @property
    def slot_class(self) -> Tensor | None:
        """Class of each slot `[P]`: its index on its GPU."""
        return torch.arange(EXPERTS) % (EXPERTS // self.ep) if self.rule == "classes" else None

    def is_legal(self, row: list[int]) -> bool:
        """Whether the experts of a layer's slots keep the rule, having started in logical order."""
        if sorted(row) != list(range(EXPERTS)):
            return False
        if self.num_groups is not None and self.mode == "permute":
            size = EXPERTS // self.num_groups
            return all(len({expert // size for expert in row[at : at + size]}) == 1 for at in range(0, EXPERTS, size))
        if self.rule == "classes":
            number = EXPERTS // self.ep
            return all(expert % number == slot % number for slot, expert in enumerate(row))
        return True

    def random_row(self, generator: torch.Generator) -> list[int]:
        """Draw a row that keeps the rule."""
        if self.num_groups is not None and self.mode == "permute":
            size = EXPERTS // self.num_groups
            blocks = torch.randperm(self.num_groups, generator=generator).tolist()
            return [b * size + m for b in blocks for m in torch.randperm(size, generator=generator).tolist()]
        if self.rule == "classes":
            number = EXPERTS // self.ep
            gpus = [torch.randperm(self.ep, generator=generator).tolist() for _ in range(number)]
            return [gpus[slot % number][slot // number] * number + slot % number for slot in range(EXPERTS)]
        return torch.randperm(EXPERTS, generator=generator).tolist()


Whole = dict[str, Tensor]  # all slots of each tensor and state, by name: "0.w", "0.w.exp_avg", ...


def first_values() -> Whole:
    generator = torch.Generator().manual_seed(11)
    found = {}
    for layer in range(LAYERS):
        for key, shape in (("w", (EXPERTS, DIM, DIM)), ("router", (EXPERTS, DIM))):
            found[f"{layer}.{key}"] = torch.randn(shape, generator=generator, dtype=torch.float64)
            for moment in MOMENTS:
                found[f"{layer}.{key}.{moment}"] = torch.zeros(shape, dtype=torch.float64)
        found[f"{layer}.w.step"] = torch.zeros(EXPERTS)
        found[f"{layer}.router"] += torch.linspace(0.5, -0.5, EXPERTS, dtype=torch.float64)[:, None]  # some are hot
    return found | {"step": torch.tensor(0.0)}


def tokens_of(iteration: int) -> tuple[Tensor, Tensor]:
    """Draw inputs, and the weights of the output in the loss: `[N, D]` each."""
    generator = torch.Generator().manual_seed(1000 + iteration)
    x, target = torch.randn(2, TOKENS, DIM, generator=generator, dtype=torch.float64)
    # The hot experts change with each rebalance, so that each one has something to move.
    towards = torch.randn(DIM, generator=torch.Generator().manual_seed(iteration // EVERY), dtype=torch.float64)
    return x + 2 * towards, target


def routed(scores: Tensor, num_groups: int | None) -> tuple[Tensor, Tensor]:
    """Choose outputs, from the better half of the groups if there are groups, and their gates: `[N, K]` each."""
    open_only = scores.detach()
    if num_groups is not None:
        groups = open_only.unflatten(1, (num_groups, -1))
        best = groups.amax(2).topk(num_groups // 2).indices
        closed = torch.ones(len(scores), num_groups, dtype=torch.bool).scatter(1, best, False)
        open_only = groups.masked_fill(closed[..., None], -1).flatten(1)
    chosen = open_only.topk(TOP_K).indices
    gate = scores.gather(1, chosen)
    return chosen, gate / gate.sum(1, keepdim=True)


class Experts(nn.Module):
    """The experts of one GPU, in one tensor or in a tensor each."""

    def __init__(self, w: Tensor, apart: bool = False) -> None:
        super().__init__()
        self.w = nn.ParameterList(row.clone() for row in w) if apart else nn.Parameter(w)

    def forward(self, x: Tensor, gates: Tensor) -> Tensor:  # [N, D], [N, G] -> [N, D]
        w: Any = self.w
        if isinstance(w, nn.ParameterList):
            total = 0 * x + 0 * gates.sum()  # keeps a graph for backward if no expert has tokens
            for gate, own in zip(gates.T, w, strict=True):
                if bool(gate.any()):
                    total = total + gate[:, None] * (x @ own).tanh()
            return total
        local = w.to_local() if isinstance(w, DTensor) else w  # [G, D, D]
        y = torch.einsum("nd,gde->gne", x, local).tanh()
        return (gates.T[..., None] * y).sum(0)


def adamw(parameters: list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.01)


Declared = Tensor | nn.ParameterList  # one layer's experts, or its router


class Twin:
    """All experts in logical order, the same on every rank."""

    def __init__(self, whole: Whole, apart: bool) -> None:
        self.experts = [Experts(whole[f"{layer}.w"].clone(), apart) for layer in range(LAYERS)]
        self.routers = [nn.Parameter(whole[f"{layer}.router"].clone()) for layer in range(LAYERS)]
        self.declared: dict[str, Declared] = {f"{n}.w": module.w for n, module in enumerate(self.experts)}
        self.declared |= {f"{n}.router": router for n, router in enumerate(self.routers)}
        self.optimizer = adamw(all_of(self.declared))
        set_moments(self.optimizer, self.declared, {key: value.clone() for key, value in whole.items()})

    def output(self, x: Tensor, num_groups: int | None) -> Tensor:
        total = torch.zeros(TOKENS, DIM, dtype=torch.float64)
        for experts, router in zip(self.experts, self.routers, strict=True):
            chosen, gate = routed((x @ router.T).sigmoid(), num_groups)
            gates = torch.zeros(TOKENS, EXPERTS, dtype=torch.float64).scatter(1, chosen, gate)
            total = total + experts(x, gates)
        return total

    def whole(self) -> Whole:
        return held(self.optimizer, self.declared, EXPERTS)


def all_of(declared: dict[str, Declared]) -> list[Tensor]:
    return [one for each in declared.values() for one in (each if isinstance(each, nn.ParameterList) else [each])]


def held(optimizer: torch.optim.Optimizer, declared: dict[str, Declared], slots: int) -> Whole:
    """Copy tensors, moments and steps; without state, moments and steps are 0."""
    found, step = {}, torch.tensor(0.0)
    for key, each in declared.items():
        rows = list(each) if isinstance(each, nn.ParameterList) else [each]
        states = [optimizer.state.get(row, {}) for row in rows]
        join = torch.stack if isinstance(each, nn.ParameterList) else torch.cat
        found[key] = join([local(row).clone() for row in rows])
        for moment in MOMENTS:
            values = [local(state.get(moment, torch.zeros_like(row))) for state, row in zip(states, rows, strict=True)]
            found[f"{key}.{moment}"] = join([value.clone() for value in values])
        steps = torch.stack([state.get("step", torch.tensor(0.0)).clone() for state in states])
        if key.endswith(".w"):
            found[f"{key}.step"] = steps.expand(slots).clone()
        else:
            step = steps[0]
    return found | {"step": step}


def set_moments(optimizer: torch.optim.Optimizer, declared: dict[str, Declared], whole: Whole) -> None:
    """Restore the optimizer's state as saved; parameters without a step get none."""
    for key, each in declared.items():
        apart = isinstance(each, nn.ParameterList)
        for number, row in enumerate(each if isinstance(each, nn.ParameterList) else [each]):
            step = whole[f"{key}.step"][number] if key.endswith(".w") else whole["step"]
            moments = {name: whole[f"{key}.{name}"] for name in MOMENTS}
            if step > 0:
                own = {name: moment[number].clone() if apart else moment for name, moment in moments.items()}
                optimizer.state[row] = {"step": step.clone(), **own}


# --- meshes, built once by all processes -------------------------------------------------------------------------

_MESHES: dict[tuple[int, int], DeviceMesh] = {}
_GROUPS: dict[int, Any] = {}


def meet() -> None:
    """Build groups and meshes of every size, which all processes of the pool must do together."""
    transfer._STAGING_BYTES = 1  # makes every commit as small as possible
    rebalance_module._COMMIT_BYTES = 1
    for ranks, ep in ((1, 1), (2, 2), (2, 1), (4, 4), (4, 2)):
        _MESHES[ranks, ep] = DeviceMesh("cpu", torch.arange(ranks).view(-1, ep), mesh_dim_names=("copy", "ep"))
        if ranks not in _GROUPS:
            _GROUPS[ranks] = dist.new_group(list(range(ranks)))


class World:
    """One rank of a job."""

    def __init__(self, setup: Setup, saved: dict[str, Any] | None) -> None:
        self.setup, self.mesh = setup, _MESHES[setup.ranks, setup.ep]
        self.gpu, self.copy = self.mesh.get_local_rank("ep"), self.mesh.get_local_rank("copy")
        self.copies, size = setup.ranks // setup.ep, EXPERTS // setup.ep
        self.slots = slice(self.gpu * size, (self.gpu + 1) * size)
        self.met: Counter[str] = Counter()
        self.iteration = 0 if saved is None else saved["iteration"]
        whole = first_values() if saved is None else saved["whole"]
        self.twin = Twin(first_values() if saved is None else saved["twin"], setup.layout == "own")
        self.tables = [torch.arange(EXPERTS) for _ in range(LAYERS)]
        self.window = LoadWindow(LAYERS, EXPERTS, 6)
        self.experts = [self._experts(whole[f"{layer}.w"]) for layer in range(LAYERS)]
        self.routers = [nn.Parameter(whole[f"{layer}.router"].clone()) for layer in range(LAYERS)]
        self.shards = [self._shard(module.w) for module in self.experts] if setup.layout == "flat" else []
        self.weights = [module.w for module in self.experts]  # FSDP2 replaces the module's own during a forward
        stepped = self.shards or self.weights
        self.stepped: dict[str, Any] = {f"{layer}.w": tensor for layer, tensor in enumerate(stepped)}
        self.declared = self.stepped | {f"{layer}.router": router for layer, router in enumerate(self.routers)}
        self.optimizer = adamw(all_of(self.declared))
        own = {key: self._like(key, value) for key, value in whole.items()}
        set_moments(self.optimizer, self.declared, own)
        self.rebalancer = self._rebalancer()
        if saved is not None:
            self.rebalancer.load_state_dict(saved["rebalancer"])
        self.begun: list[tuple[Future[None], dict[str, Any]]] = []
        self.goes_on, self.moved = threading.Event(), threading.Event()  # both let a late save continue
        self.done: dict[str, Any] | None = saved

    # --- construction ---

    def _experts(self, whole: Tensor) -> Experts:
        own = whole[self.slots].clone()
        if not self.setup.layout.startswith("dim"):
            return Experts(own, self.setup.layout == "own")
        dim = int(self.setup.layout[-1])
        module = Experts(distribute_tensor(whole.clone(), self.mesh["ep"], [Shard(0)]))
        fully_shard(
            module, mesh=self.mesh["copy"], shard_placement_fn=lambda _: Shard(dim), reshard_after_forward=False
        )
        return module

    def _cut(self) -> slice:
        """Return the range of this GPU's flattened rows that this rank's optimizer holds; it cuts an expert in two."""
        size = EXPERTS // self.setup.ep * DIM * DIM
        edge = size // 2 - 5 if self.copies == 2 else size
        return (slice(0, edge), slice(edge, size))[self.copy]

    def _shard(self, w: Tensor) -> nn.Parameter:
        return nn.Parameter(w.detach().flatten()[self._cut()].clone())

    def part(self, whole: Tensor) -> Tensor:
        """Return the part of the experts' whole `[P, ...]` that this rank's optimizer holds."""
        own = whole[self.slots]
        if self.setup.layout.startswith("dim"):
            return own.chunk(self.copies, int(self.setup.layout[-1]))[self.copy]
        return own.flatten()[self._cut()] if self.setup.layout == "flat" else own

    def _like(self, key: str, whole: Tensor) -> Tensor:
        if ".w" not in key:
            return whole.clone()
        if key.endswith(".step"):
            return whole[self.slots].clone()
        local = self.part(whole).clone()
        layer = key.split(".")[0]
        declared: Any = self.stepped[f"{layer}.w"]
        if not isinstance(declared, DTensor):
            return local
        return DTensor.from_local(
            local, declared.device_mesh, declared.placements, shape=declared.shape, stride=declared.stride()
        )

    def _rebalancer(self) -> Rebalancer:
        setup = self.setup
        layers = []
        for number, (weight, router) in enumerate(zip(self.weights, self.routers, strict=True)):
            shards = {"w": FlatShard(self.shards[number], self._cut().start)} if self.shards else {}
            remap = setup.mode == "remap"
            layers.append(
                MoELayer(
                    name=f"moe.{number}",
                    experts={"w": list(weight) if isinstance(weight, nn.ParameterList) else weight},
                    router={} if remap else {"weight": router},
                    shards=shards,
                    num_groups=setup.num_groups,
                    slot_of_expert=self.tables[number] if remap else None,
                )
            )
        rebalancer = Rebalancer(
            layers,
            self.optimizer,
            topology=Topology(1, setup.ep),
            every=EVERY,
            window=self.window,
            comm=TorchComm(_GROUPS[setup.ranks], deadline=20),
            gpu=self.gpu,
            search=Search(slot_class=setup.slot_class, num_candidates=4),
            moves=Moves(
                max_bytes=setup.max_bytes,
                model=FREE,
                stop_loss=0,
                spread=Spread(1, 1, 0.0) if setup.spread else None,
                verify="digest",
            ),
            record=Record(on_event=self._count),
        )
        take_up = rebalancer._parts.in_force.take_up

        def taken_up(placement: Placement) -> None:
            take_up(placement)
            self.met["commits"] += 1
            self.moved.set()
            self._check_rule(placement)

        rebalancer._parts.in_force.take_up = taken_up  # type: ignore[method-assign]
        return rebalancer

    def _count(self, event: Any) -> None:
        self.met[f"rebalance {event.decision}"] += 1
        self.met["rebalance within budget"] += any("over the budget" in text for text in event.left_out)
        self.met["layer that stays"] += any("step" in text for text in event.left_out)

    # --- computation ---

    def forward(self, x: Tensor, training: bool) -> Tensor:
        """Compute this GPU's part of the output, `[N, D]`."""
        total = torch.zeros(TOKENS, DIM, dtype=torch.float64)
        for number, (module, router) in enumerate(zip(self.experts, self.routers, strict=True)):
            chosen, gate = routed((x @ router.T).sigmoid(), self.setup.num_groups)
            self.window.add(number, chosen.flatten().bincount(minlength=EXPERTS), training=training)
            slot = self.tables[number][chosen] if self.setup.mode == "remap" else chosen
            gates = torch.zeros(TOKENS, EXPERTS, dtype=torch.float64).scatter(1, slot, gate)
            total = total + module(x, gates[:, self.slots])
        return total

    @torch.no_grad()
    def output(self, x: Tensor) -> Tensor:
        total = self.forward(x, training=False)
        dist.all_reduce(total, group=self.mesh["ep"].get_group())
        return total

    def backward(self, sync: bool = True) -> None:
        """Run one micro-batch of the model and of its twin."""
        self.iteration += 1
        x, target = tokens_of(self.iteration)
        for module in self.experts:
            if self.setup.layout.startswith("dim"):
                module.set_requires_gradient_sync(sync)  # type: ignore[operator]  # FSDP2's
        (target * self.forward(x, training=True)).sum().backward()
        (target * self.twin.output(x, self.setup.num_groups)).sum().backward()

    def optimizer_step(self) -> None:
        for future, _ in self.begun:  # wait for saves, as trainers do
            future.result(timeout=20)
        for router in self.routers:
            dist.all_reduce(router.grad, group=self.mesh["ep"].get_group())
        for module, shard in zip(self.experts, self.shards, strict=False):
            assert module.w.grad is not None
            shard.grad = module.w.grad.flatten()[self._cut()].clone()
            module.w.grad = None
        if self.setup.layout == "own":
            self.met["starved"] += any(weight.grad is None for module in self.experts for weight in module.w)
        for optimizer in (self.optimizer, self.twin.optimizer):
            optimizer.step()
            optimizer.zero_grad()
        for module, shard in zip(self.experts, self.shards, strict=False):
            parts: list[Any] = [None] * self.copies
            dist.all_gather_object(parts, shard.detach(), group=self.mesh["copy"].get_group())
            module.w.detach().view(-1).copy_(torch.cat(parts))

    # --- checks after every action ---

    def check(self) -> Counter[str]:
        """Check all invariants; return what the job met since the last check."""
        placement = self.rebalancer.placement
        self._check_rule(placement)
        self._check_rows(placement)
        x, _ = tokens_of(0)
        with torch.no_grad():
            wanted = self.twin.output(x, self.setup.num_groups)
        assert_near("the output", self.output(x), wanted)
        saved = self.rebalancer.state_dict()["layers"]
        assert [
            saved[f"moe.{n}"]["expert_of_slot"].tolist() for n in range(LAYERS)
        ] == placement.expert_of_slot.tolist()
        met, self.met = self.met, Counter()
        return met

    def _check_rule(self, placement: Placement) -> None:
        for row in placement.expert_of_slot.tolist():
            assert self.setup.is_legal(row), (self.setup, row)

    def _check_rows(self, placement: Placement) -> None:
        whole, own = self.twin.whole(), held(self.optimizer, self.declared, EXPERTS // self.setup.ep)
        for number, row in enumerate(placement.expert_of_slot):
            for key in (f"{number}.w", *(f"{number}.w.{moment}" for moment in MOMENTS)):
                assert_near(f"layer {number}, experts, {key[4:]}", own[key], self.part(whole[key][row]))
            assert torch.equal(own[f"{number}.w.step"], whole[f"{number}.w.step"][row][self.slots])
            if self.shards:
                assert_near(
                    "the model's weights", self.experts[number].w.detach(), whole[f"{number}.w"][row][self.slots]
                )
            remap, router = self.setup.mode == "remap", self.routers[number]
            state = self.optimizer.state.get(router, {})
            for key in ("", *(MOMENTS if state else ())):
                rows = whole[f"{number}.router{'.' * bool(key)}{key}"]
                found = (state[key] if key else router).detach()
                assert_near(f"layer {number}, router, {key}", found, rows if remap else rows[row])
            if remap:
                assert torch.equal(self.tables[number], row.argsort())

    # --- saving ---

    def begin_save(self, late: bool) -> None:
        """Begin a save of what this rank holds; a late one reads it later, and nothing may move until then."""
        told = {"rebalancer": self.rebalancer.state_dict(), "iteration": self.iteration, "twin": self.twin.whole()}
        future = Future[None]()

        def write() -> None:
            if late:
                self.goes_on.wait()
                self.moved.wait(0.05)  # a move must not happen before the end of this save
            told["parts"] = self._parts()
            future.set_result(None)

        self.begun.append((future, told))
        if late:
            self.goes_on, self.moved = threading.Event(), threading.Event()
            self.rebalancer.saving(future)
            threading.Thread(target=write, daemon=True).start()
        else:
            write()

    def _parts(self) -> Whole:
        return held(self.optimizer, self.declared, EXPERTS // self.setup.ep)

    def end_saves(self) -> dict[str, Any] | None:
        """Finish all saves; return the last one, joined from all ranks' parts: whole tensors in the order of slots."""
        for future, told in self.begun:
            future.result(timeout=20)
            parts: list[Any] = [None] * self.setup.ranks
            dist.all_gather_object(parts, (self.gpu, self.copy, told.pop("parts")), group=_GROUPS[self.setup.ranks])
            self.done = told | {"whole": self._joined({(gpu, copy): held for gpu, copy, held in parts})}
            self._check_save(self.done)
        self.begun.clear()
        return self.done

    def _check_save(self, saved: dict[str, Any]) -> None:
        """Check that the rows of a save match its placement."""
        for layer in range(LAYERS):
            row = saved["rebalancer"]["layers"][f"moe.{layer}"]["expert_of_slot"]
            for key in (f"{layer}.w", *(f"{layer}.w.{moment}" for moment in (*MOMENTS, "step"))):
                assert_near(f"the save's {key}", saved["whole"][key], saved["twin"][key][row])

    def _joined(self, parts: dict[tuple[int, int], Whole]) -> Whole:
        first = parts[0, 0]
        whole = first_values() | {key: value for key, value in first.items() if ".w" not in key}
        for key in (key for key in first if ".w" in key):
            gpus = []
            for gpu in range(self.setup.ep):
                copies = [parts[gpu, copy][key] for copy in range(self.copies)]
                if self.setup.layout.startswith("dim") and not key.endswith(".step"):
                    gpus.append(torch.cat(copies, int(self.setup.layout[-1])))
                elif self.setup.layout == "flat" and not key.endswith(".step"):
                    gpus.append(torch.cat(copies).view(-1, DIM, DIM))
                else:
                    gpus.append(copies[0])
            whole[key] = torch.cat(gpus)
        return whole


def local(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def assert_near(what: str, found: Tensor, wanted: Tensor) -> None:
    off = float((found - wanted).abs().max()) if found.numel() else 0.0
    scale = float(wanted.abs().max()) if wanted.numel() else 0.0
    assert off <= NEAR * max(scale, 1e-12), f"{what} is off by {off:.3g}, at a scale of {scale:.3g}"


# --- actions, one call of the pool each --------------------------------------------------------------------------

_WORLD: list[World] = []


def is_there(setup: Setup) -> bool:
    """Whether this process takes part."""
    return dist.get_rank() < setup.ranks


def build(setup: Setup, saved: dict[str, Any] | None) -> None:
    """Start or resume a job. The previous job is dropped without being closed, as if its process had been killed."""
    if not _MESHES:
        meet()
    _WORLD.clear()
    if is_there(setup):
        _WORLD.append(World(setup, saved))


def act(action: str, *args: Any) -> tuple[Counter[str], dict[str, Any] | None]:
    """Run one action and check everything after it; return what was met, and the last whole save if it ended saves."""
    if not _WORLD:
        return Counter(), None
    world = _WORLD[0]
    world.goes_on.set()
    answer = globals()[f"do_{action}"](world, *args)
    if world.begun and action != "save":
        world.end_saves()
    return world.check(), answer


def forget() -> None:
    """Make each following move of this process leave a moment of its first slot behind, as an error would."""
    if not _WORLD:
        return
    world = _WORLD[0]
    move = world.rebalancer._parts.agreed.mover.move

    def forgetful(*args: Any, **options: Any) -> Any:
        moment = world.optimizer.state.get(world.stepped["0.w"], {}).get("exp_avg")
        kept = None if moment is None else local(moment)[:1].clone()
        done = move(*args, **options)
        if moment is not None and kept is not None:
            local(moment)[:1] = kept
        return done

    world.rebalancer._parts.agreed.mover.move = forgetful  # type: ignore[method-assign]


def do_train(world: World, micro_batches: int) -> None:
    for _ in range(micro_batches):
        world.backward()
    world.optimizer_step()
    world.rebalancer.step()


def do_accumulate(world: World, seed: int) -> None:
    """Train two micro-batches, and check that nothing may move between them."""
    world.backward(sync=False)
    refused(world, lambda: do_apply(world, seed, False), "a backward pass has begun")
    world.backward()
    world.optimizer_step()
    world.rebalancer.step()


def do_evaluate(world: World) -> None:
    world.output(tokens_of(world.iteration)[0])


def do_apply(world: World, seed: int, planned: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    if planned:
        load = torch.randint(0, 100, (3, LAYERS, EXPERTS), generator=generator)
        groups = world.setup.num_groups if world.setup.mode == "permute" else None
        placement = distplb.plan(
            load if dist.get_rank() == 0 else torch.zeros_like(load),
            Topology(1, world.setup.ep),
            comm=TorchComm(_GROUPS[world.setup.ranks], deadline=20),
            num_groups=groups,
            slot_class=world.setup.slot_class,
            current=world.rebalancer.placement,
            mode=world.setup.mode,
            seed=seed,
        )
    else:
        rows = [world.setup.random_row(generator) for _ in range(LAYERS)]
        placement = Placement(torch.tensor(rows), EXPERTS, world.setup.ep)
    world.rebalancer.apply(placement)
    assert world.rebalancer.placement == placement


def do_apply_illegal(world: World, seed: int) -> None:
    row = torch.randperm(EXPERTS, generator=torch.Generator().manual_seed(seed)).tolist()
    placement = Placement(torch.tensor([row, list(range(EXPERTS))]), EXPERTS, world.setup.ep)
    if not world.setup.is_legal(row):
        refused(world, lambda: world.rebalancer.apply(placement), "of the placement moves expert")


def do_restore(world: World) -> None:
    world.rebalancer.restore()


def do_logical(world: World) -> None:
    with world.rebalancer.in_logical_order():
        assert world.rebalancer.placement == Placement.contiguous(LAYERS, EXPERTS, world.setup.ep)
        world._check_rows(world.rebalancer.placement)


def do_save(world: World, late: bool) -> None:
    world.begin_save(late)


def do_end_saves(world: World) -> dict[str, Any] | None:
    return world.end_saves()


def do_hand_over(world: World) -> None:
    """Continue with a new rebalancer of the same model."""
    state = world.rebalancer.state_dict()
    world.rebalancer.close()
    world.rebalancer = world._rebalancer()
    if world.setup.mode == "permute" and world.rebalancer._parts.in_force.knows_rows:
        assert world.rebalancer.placement == Placement.contiguous(LAYERS, EXPERTS, world.setup.ep)
    world.rebalancer.load_state_dict(state)


def refused(world: World, call: Any, text: str) -> None:
    before = world.rebalancer.placement
    with contextlib.suppress(DistplbError):
        call()
        raise AssertionError(f"not refused: {text}")
    assert world.rebalancer.placement == before
    world.met["refused"] += 1
