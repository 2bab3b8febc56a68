"""Weights that FSDP2 has gathered, and gradients that it holds back, between an optimizer step and a move.

Real FSDP2 on four gloo ranks, EP 2 × 2 shards, and EP 1 × 2 copies × 2 shards.
Shapes: P slots, G slots on each GPU, N tokens, D dim.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from fsdp2 import needs_fsdp2
from jobs import FREE
from ranks import on_ranks
from torch import Tensor, nn
from torch.distributed._composable_state import _module_state_mapping
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from distplb import DistplbError, LoadWindow, MoELayer, Moves, Placement, Rebalancer, Topology
from distplb.comm.fsdp2 import has_pending_gradients, param_groups
from distplb.comm.torchdist import TorchComm

EXPERTS, DIM, TOKENS = 8, 4, 6
pytestmark = needs_fsdp2


class Experts(nn.Module):
    """The experts of one GPU, each of which computes all tokens."""

    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        self.w = nn.Parameter(weights)  # [P, D, D], of which this rank computes G

    def forward(self, x: Tensor) -> Tensor:  # [N, D] -> [G, N, D]
        w: Any = self.w
        return torch.einsum("nd,gde->gne", x, w.to_local() if hasattr(w, "to_local") else w)


class World:
    """One layer, whose output does not depend on where experts are, as long as gate and rows move together."""

    def __init__(self, ep: int, shard_dim: int = 0, **options: Any) -> None:
        shards, copies = 2, 4 // ep // 2
        names = ("copy", "shard", "ep")
        mesh = init_device_mesh("cpu", (copies, shards, ep), mesh_dim_names=names)
        self.ep: DeviceMesh = mesh["ep"]
        self.gpu, size = self.ep.get_local_rank(), EXPERTS // ep
        self.slots = slice(self.gpu * size, (self.gpu + 1) * size)
        torch.manual_seed(7)
        weights, self.gate = torch.randn(EXPERTS, DIM, DIM), nn.Parameter(torch.randn(EXPERTS, DIM))
        self.x = torch.randn(TOKENS, DIM)
        self.experts = Experts(distribute_tensor(weights, self.ep, [Shard(0)]) if ep > 1 else weights)
        over = mesh["copy", "shard"] if copies > 1 else mesh["shard"]
        fully_shard(self.experts, mesh=over, shard_placement_fn=lambda _: Shard(shard_dim), **options)
        self.optimizer = torch.optim.AdamW([*self.experts.parameters(), self.gate], lr=0.01)
        layer = MoELayer(name="moe", experts={"w": self.experts.w}, router={"weight": self.gate})
        self.rebalancer = Rebalancer(
            [layer],
            self.optimizer,
            topology=Topology(1, ep),
            every=1,
            window=LoadWindow(1, EXPERTS, 4),
            comm=TorchComm(),
            gpu=self.gpu,
            moves=Moves(model=FREE, stop_loss=0, verify="digest"),
        )

    def forward(self) -> Tensor:
        """`[N, D]`, this GPU's part of it."""
        score = (self.x @ self.gate.T).softmax(-1)[:, self.slots]  # [N, G]
        return torch.einsum("ng,gne->ne", score, self.experts(self.x))

    def output(self) -> Tensor:
        """`[N, D]`, of all GPUs, without gradients."""
        with torch.no_grad():
            whole = self.forward()
        dist.all_reduce(whole, group=self.ep.get_group())
        return whole

    def backward(self) -> None:
        self.forward().square().sum().backward()

    def step(self) -> None:
        self.backward()
        assert self.gate.grad is not None
        dist.all_reduce(self.gate.grad)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def move(self, seed: int = 1) -> None:
        table = torch.randperm(EXPERTS, generator=torch.Generator().manual_seed(seed))[None]
        self.rebalancer.apply(Placement(table, EXPERTS, self.ep.size()))


def module(world: World) -> FSDPModule:
    assert isinstance(world.experts, FSDPModule)
    return world.experts


# --- gathered weights --------------------------------------------------------------------------------------------


def left_whole(how: str, ep: int, dim: int) -> tuple[bool, bool]:
    """Whether a move keeps the output when weights are gathered at that moment; and a control."""
    world = World(ep, dim, reshard_after_forward=how == "after a step")
    world.step()
    before = world.output()
    if how == "after an evaluation":
        world.output()
    if how == "after a step":
        world.step()
        before = world.output()
    if how == "unsharded by hand":
        module(world).unshard()
    if how == "being gathered":
        module(world).unshard(async_op=True)
    world.move()
    same = torch.allclose(world.output(), before, atol=1e-6)
    with torch.no_grad():
        world.gate.copy_(world.gate.flip(0))
    return same, torch.allclose(world.output(), before, atol=1e-3)


@pytest.mark.parametrize("how", ["after an evaluation", "after a step", "unsharded by hand", "being gathered"])
@pytest.mark.parametrize(("ep", "dim"), [(2, 0), (2, 1), (1, 0)])
def test_a_move_reaches_weights_that_fsdp_holds_whole(how: str, ep: int, dim: int) -> None:
    """The next forward used expert rows in their old places, with a gate whose rows had moved."""
    assert on_ranks(4, left_whole, how, ep, dim, deadline=60) == [(True, False)] * 4


# --- gradients that are held back --------------------------------------------------------------------------------


def held_back(how: str, ep: int) -> tuple[str, bool, bool]:
    """The error of a move between two micro-batches, whether nothing moved, and whether moves work afterwards."""
    world = World(ep)
    world.step()
    if how == "no gradient sync":
        module(world).set_requires_gradient_sync(False)
    if how == "no all-reduce":
        module(world).set_requires_all_reduce(False)
    world.backward()
    world.gate.grad = None  # the gate's gradient alone would show it
    text, before = "", [param.detach().clone() for param in world.experts.parameters()]
    try:
        world.move()
    except DistplbError as error:
        text = str(error)
    still = all(torch.equal(a, b) for a, b in zip(before, world.experts.parameters(), strict=True))
    module(world).set_requires_gradient_sync(True)
    world.step()
    after = world.output()
    world.move()
    return text, still, torch.allclose(world.output(), after, atol=1e-6)


@pytest.mark.parametrize(("how", "ep"), [("no gradient sync", 2), ("no gradient sync", 1), ("no all-reduce", 1)])
def test_gradients_that_fsdp_has_not_shared_out_yet_are_a_backward_pass_that_has_begun(how: str, ep: int) -> None:
    """FSDP2 accumulates them by slot in a buffer of its own; they would have gone to the experts that moved there."""
    for text, still, goes_on in on_ranks(4, held_back, how, ep, deadline=60):
        assert "a backward pass has begun since the optimizer's last step" in text
        assert still
        assert goes_on


# --- what is declared --------------------------------------------------------------------------------------------


def declared_whole() -> str:
    world = World(2, reshard_after_forward=False)
    world.output()
    world.rebalancer.close()
    layer = MoELayer(name="moe", experts={"w": world.experts.w}, router={"weight": world.gate})
    options: dict[str, Any] = {"topology": Topology(1, 2), "every": 1, "window": LoadWindow(1, EXPERTS, 4)}
    try:
        Rebalancer([layer], world.optimizer, comm=TorchComm(), gpu=world.gpu, **options)
    except DistplbError as error:
        return str(error)
    return "no error"


def test_whole_weights_of_a_forward_are_not_taken_for_parameters() -> None:
    for text in on_ranks(4, declared_whole, deadline=60):
        assert "moe.experts.w is the whole weight that FSDP2 gathered for a forward" in text
        assert "call reshard() on the module" in text


def assigned() -> str:
    world = World(2)
    world.step()
    state = {key: value.clone() for key, value in world.experts.state_dict().items()}
    world.experts.load_state_dict(state, assign=True)
    world.output()  # FSDP2 picks up the new parameters here
    try:
        world.move()
    except DistplbError as error:
        return str(error)
    return "no error"


def test_parameters_that_were_replaced_are_noticed_at_once() -> None:
    for text in on_ranks(4, assigned, deadline=60):
        assert "moe.experts.w is no longer the parameter of its FSDP2 module, as after load_state_dict(assign" in text


# --- private names -----------------------------------------------------------------------------------------------


def names() -> list[str]:
    """The names that `comm.fsdp2` reads and this torch lacks."""
    world = World(2)
    world.step()
    (group,) = param_groups([*world.experts.parameters()])
    (param,) = group.fsdp_params
    assert len(_module_state_mapping) >= 1
    assert not has_pending_gradients([group])
    missing = [f"group.{name}" for name in ("wait_for_unshard", "reshard") if not callable(getattr(group, name, None))]
    missing += [f"group.{name}" for name in ("_all_gather_result", "_partial_reduce_output") if name not in vars(group)]
    own = ("sharded_param", "_unsharded_param", "unsharded_accumulated_grad")
    missing += [f"param.{name}" for name in own if name not in vars(param)]
    return missing


def test_this_torch_has_the_private_names_that_are_read() -> None:
    assert on_ranks(4, names, deadline=60) == [[]] * 4
