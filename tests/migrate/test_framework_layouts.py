"""Random moves leave every element where it belongs, to the bit, in every layout that a framework keeps experts in.

Four ranks, EP 2 × expert-data-parallel 2. What a rank must hold is cut out of the whole by torch's own DTensor or
manually, never by the code under test. Shapes: E = P experts and slots, G slots on each GPU.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from ranks import on_ranks
from stagers import AsyncSaveResponse, DefaultStager, StagingOptions, needs_stagers
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import distplb
from distplb import DistplbError, FlatShard, MoELayer, Moves, Placement, Rebalancer, Topology
from distplb.comm.torchdist import TorchComm
from distplb.core.layer import Rows

EXPERTS, GPUS, G, DIM, WIDTH = 8, 2, 4, 6, 5
Cut = Callable[[Tensor], list[Tensor]]  # from a whole [P, ...] to what this rank holds


class Held:
    """One declared tensor on this rank: the tensors that hold it, and how they are cut out of the whole."""

    def __init__(self, whole: Tensor, cut: Cut, params: list[Tensor]) -> None:
        self.whole, self.cut, self.params = whole, cut, params


def logical(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class World:
    """A layer in one layout: experts, shards and router, with other AdamW state for each element."""

    def __init__(self, name: str) -> None:
        self.rank = dist.get_rank()
        self.mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("edp", "ep"))
        self.gpu, self.copy = self.mesh.get_local_rank("ep"), self.mesh.get_local_rank("edp")
        self.held: list[Held] = []
        self.experts: dict[str, Any] = {}
        self.router: dict[str, Tensor] = {}
        self.shards: dict[str, Any] = {}
        getattr(self, name)()
        if not self.router:
            self.router["weight"] = self.keep(logical(3, EXPERTS, DIM), lambda whole: [whole])[0]
        stepped = [p for held in self.held for p in held.params if p.requires_grad]
        self.optimizer = torch.optim.AdamW(stepped or [nn.Parameter(torch.zeros(1))], lr=0.0, weight_decay=0.0)
        self.fill_state()
        self.layer = MoELayer(name="moe", experts=self.experts, router=self.router, shards=self.shards)
        self.rebalancer = Rebalancer(
            [self.layer],
            self.optimizer,
            topology=Topology(1, GPUS),
            every=1,
            window=distplb.LoadWindow(1, EXPERTS, 4),
            comm=TorchComm(),
            gpu=self.gpu,
            moves=Moves(verify="digest"),
        )

    # --- layouts ---

    def dtensors_over_ep(self) -> None:
        self.experts["w"] = self.dtensor(logical(1, EXPERTS, DIM, WIDTH), self.mesh["ep"], [Shard(0)])

    def dtensors_sharded_on_dim_0(self) -> None:
        self.fsdp(lambda _: Shard(0))
        self.router["weight"] = self.dtensor(logical(3, EXPERTS, DIM), self.flat_mesh(), [Shard(0)])

    def dtensors_sharded_on_dim_1(self) -> None:
        self.fsdp(lambda _: Shard(1))
        self.router["weight"] = self.dtensor(logical(3, EXPERTS, DIM), self.mesh, [Replicate(), Replicate()])
        self.router["bias"] = self.dtensor(logical(4, EXPERTS), self.flat_mesh(), [Shard(0)])

    def one_tensor_an_expert(self) -> None:
        self.experts["fc.weight"] = self.keep(logical(1, EXPERTS, DIM, WIDTH), lambda whole: list(self.own(whole)))
        flat = logical(2, EXPERTS, 7, WIDTH)
        grouped = self.keep(flat, lambda whole: [self.own(whole).reshape(7, -1)])[0]
        self.experts["grouped"] = Rows(grouped)

    def flat_shards(self) -> None:
        """Shards cut anywhere, even through an expert; the model's tensors are copies on both ranks of a GPU."""
        whole, router = logical(1, EXPERTS, DIM, WIDTH), logical(3, EXPERTS, DIM)
        self.experts["w"] = self.keep(whole, lambda all_: [self.own(all_)], stepped=False)[0]
        cut = G * DIM * WIDTH // 2 - 17
        start, stop = ((0, cut), (cut, G * DIM * WIDTH))[self.copy]
        shard = self.keep(whole, lambda all_: [self.own(all_).flatten()[start:stop]])[0]
        self.shards["w"] = FlatShard(shard, start)
        self.router["weight"] = self.keep(router, lambda all_: [all_], stepped=False)[0]
        low, high = [0, 5, 5, 31, EXPERTS * DIM][self.rank : self.rank + 2]  # rank 1 holds nothing
        piece = self.keep(router, lambda all_: [all_.flatten()[low:high]])
        self.shards["weight"] = FlatShard(piece[0] if piece else torch.empty(0), low)

    def flat_shards_of_one_tensor_an_expert(self) -> None:
        """As in Megatron-Core's distributed optimizer: a rank has all of some experts, part of one, none of others."""
        whole, size = logical(1, EXPERTS, DIM, WIDTH), DIM * WIDTH
        ranges = ([(0, size), (0, 11), None, None], [None, (11, size), (0, size), (0, size)])[self.copy]
        self.experts["w"] = self.keep(whole, lambda all_: list(self.own(all_)), stepped=False)
        parts = [(slot, each) for slot, each in enumerate(ranges) if each is not None]
        tensors = iter(
            self.keep(whole, lambda all_: [self.own(all_)[slot].flatten()[slice(*each)] for slot, each in parts])
        )
        self.shards["w"] = [None if each is None else FlatShard(next(tensors), each[0]) for each in ranges]

    def all_on_one_copy(self) -> None:
        """The optimizer of one data-parallel rank steps on everything; the other rank holds no state at all."""
        whole = logical(1, EXPERTS, DIM, WIDTH)
        self.experts["w"] = self.keep(whole, lambda all_: [self.own(all_)], stepped=False)[0]
        values = self.keep(whole, lambda all_: [self.own(all_)] if self.copy == 0 else [])
        self.shards["w"] = FlatShard(values[0] if values else torch.empty(0), 0)

    # --- tensors ---

    def own(self, whole: Tensor) -> Tensor:
        return whole[self.gpu * G : (self.gpu + 1) * G]

    def keep(self, whole: Tensor, cut: Cut, stepped: bool = True) -> list[Tensor]:
        params: list[Tensor] = [nn.Parameter(part.clone().contiguous(), requires_grad=stepped) for part in cut(whole)]
        self.held.append(Held(whole, cut, params))
        return params

    def flat_mesh(self) -> DeviceMesh:
        return self.mesh._flatten("dp")

    def dtensor(self, whole: Tensor, mesh: DeviceMesh, placements: list[Any]) -> Tensor:
        param = nn.Parameter(distribute_tensor(whole.clone(), mesh, placements))
        self.held.append(Held(whole, lambda all_: [distribute_tensor(all_, mesh, placements).to_local()], [param]))
        return param

    def fsdp(self, shard: Callable[[nn.Parameter], Shard]) -> None:
        """As in a trainer: rows are sharded over EP, then by FSDP2 over the ranks that hold the same rows."""
        whole = logical(1, EXPERTS, DIM, WIDTH)
        module = nn.Module()
        module.w = nn.Parameter(distribute_tensor(whole, self.mesh["ep"], [Shard(0)]))
        fully_shard(module, mesh=self.mesh["edp"], shard_placement_fn=shard)
        param = module.w
        assert isinstance(param, DTensor)
        assert param.device_mesh.ndim == 2
        own, dim = self.copy, shard(param).dim
        self.held.append(Held(whole, lambda all_: [self.own(all_).chunk(2, dim)[own]], [param]))
        self.experts["w"] = param
        self.module = module

    # --- state ---

    def fill_state(self) -> None:
        for held in self.held:
            for param in held.params:
                if param.requires_grad:
                    param.grad = torch.zeros_like(param)
        self.optimizer.step()
        self.optimizer.zero_grad()
        for held in self.held:
            for param, first, second in zip(
                held.params, held.cut(held.whole * 2), held.cut(held.whole * 3), strict=True
            ):
                if param.requires_grad:
                    local(self.optimizer.state[param]["exp_avg"]).copy_(first)
                    local(self.optimizer.state[param]["exp_avg_sq"]).copy_(second)

    def wrong(self, placement: Placement) -> int:
        """The number of tensors that differ, in any bit, from what a placement requires."""
        table, wrong = placement.expert_of_slot[0], 0
        for held in self.held:
            moved = held.whole[table]
            for factor, key in ((1, ""), (2, "exp_avg"), (3, "exp_avg_sq")):
                for param, expected in zip(held.params, held.cut(moved * factor), strict=True):
                    if not key or param.requires_grad:
                        actual = local(self.optimizer.state[param][key] if key else param)
                        wrong += not torch.equal(actual, expected)
        return wrong

    def on_this_rank(self) -> dict[str, Tensor]:
        """Views of everything that travels."""
        tensors = {}
        for number, held in enumerate(self.held):
            for part, param in enumerate(held.params):
                state = self.optimizer.state.get(param, {})
                for key in ("", "exp_avg", "exp_avg_sq"):
                    if not key or key in state:
                        tensors[f"{self.rank}.{number}.{part}.{key}"] = local(state[key] if key else param)
        return tensors


def local(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


LAYOUTS = (
    "dtensors_over_ep",
    "dtensors_sharded_on_dim_0",
    "dtensors_sharded_on_dim_1",
    "one_tensor_an_expert",
    "flat_shards",
    "flat_shards_of_one_tensor_an_expert",
    "all_on_one_copy",
)
SHARDED = ("dtensors_sharded_on_dim_0", "dtensors_sharded_on_dim_1", "flat_shards_of_one_tensor_an_expert")


class SlowStager(DefaultStager):
    """Copies in a thread as usual, but late: the next move comes first, unless it waits."""

    def _stage(self, state_dict: Any, **options: Any) -> Any:
        time.sleep(0.05)
        return super()._stage(state_dict, **options)


class Saves:
    """Asynchronous saves of a world while its experts move; the rebalancer waits only for their staging."""

    def __init__(self, world: World, folder: Path) -> None:
        self.world, self.folder = world, folder
        self.stager = SlowStager(StagingOptions(False, False, True, False))  # in a thread, without pinned memory
        self.group = dist.new_group()
        self.upload: Any = None
        self.placement = world.rebalancer.placement

    def begin(self) -> None:
        """Start saving what this rank holds now, under keys of its own."""
        self.end()
        self.placement = self.world.rebalancer.placement
        writer = dcp.FileSystemWriter(self.folder, overwrite=True)
        response = dcp.async_save(
            self.world.on_this_rank(), storage_writer=writer, process_group=self.group, async_stager=self.stager
        )
        assert isinstance(response, AsyncSaveResponse)
        self.world.rebalancer.saving(response)
        self.upload = response.upload_completion

    def end(self) -> None:
        if self.upload is not None:
            self.upload.result(timeout=60)

    def wrong(self) -> int:
        """Read the last save back; the number of its tensors that differ from what its placement requires."""
        self.end()
        self.stager.close()
        before = {key: value.clone() for key, value in self.world.on_this_rank().items()}
        state = {key: torch.zeros_like(value) for key, value in before.items()}
        dcp.load(state, checkpoint_id=self.folder)
        for key, value in self.world.on_this_rank().items():
            value.copy_(state[key])
        wrong = self.world.wrong(self.placement)
        for key, value in self.world.on_this_rank().items():
            value.copy_(before[key])
        return wrong


def moved_about(folder: str, layouts: tuple[str, ...], moves: int) -> dict[str, tuple[int, int, int]]:
    results = {}
    for name in layouts:
        torch.manual_seed(dist.get_rank())  # nothing may depend on it
        world, wrong = World(name), 0
        saves = Saves(world, Path(folder) / name)
        generator = torch.Generator().manual_seed(5)
        for move in range(moves):
            if move % 25 == 1:
                saves.begin()
            placement = Placement(torch.randperm(EXPERTS, generator=generator)[None], EXPERTS, GPUS)
            world.rebalancer.apply(placement)
            wrong += world.wrong(placement)
        elsewhere = Placement(torch.randperm(EXPERTS, generator=generator)[None], EXPERTS, GPUS)
        wrong += saves.wrong()
        results[name] = wrong, world.wrong(elsewhere), world.wrong(world.rebalancer.placement)
    return results


@needs_stagers
@pytest.mark.parametrize("moves", [30, pytest.param(200, marks=pytest.mark.long)])
def test_random_moves_beside_saves_leave_every_element_where_it_belongs(moves: int, tmp_path: Path) -> None:
    layouts = LAYOUTS if moves == 30 else SHARDED
    for rank in on_ranks(4, moved_about, str(tmp_path), layouts, moves, deadline=280):
        assert sorted(rank) == sorted(layouts)
        for name, (wrong, elsewhere, left) in rank.items():
            assert (name, wrong) == (name, 0)
            assert elsewhere > 0  # the comparison can fail
            assert left == 0


# --- what is refused --------------------------------------------------------------------------------------------


def refused_one(case: str) -> str:
    world = World("dtensors_over_ep")
    world.rebalancer.close()
    w = world.experts["w"]
    ep, both = world.mesh["ep"], world.mesh
    gpu, optimizer = world.gpu, world.optimizer
    experts: dict[str, Any] = {"w": w}
    if case == "columns of columns":
        experts["w"] = distribute_tensor(logical(1, EXPERTS, DIM, WIDTH), ep, [Shard(2)])
    if case == "partial":
        part = DTensor.from_local(logical(1, EXPERTS, DIM), both, [Partial(), Replicate()], run_check=False)
        experts["w"] = part
    if case == "other gpu":
        gpu = 1 - gpu
    if case == "few":
        experts["w"] = [torch.zeros(3)] * 3
    if case == "unlike":
        experts["w"] = [torch.zeros(3 + slot % 2) for slot in range(G)]
    if case == "rows":
        experts["w"] = Rows(torch.zeros(7))
    if case == "global":
        experts["w"] = distribute_tensor(torch.zeros(6, 4), ep, [Shard(0)])
    try:
        layer = MoELayer(name="moe", experts=experts, router=world.router)
        window = distplb.LoadWindow(1, EXPERTS, 4)
        comm, topology = TorchComm(), Topology(1, GPUS)
        built = Rebalancer([layer], optimizer, topology=topology, every=1, window=window, comm=comm, gpu=gpu)
        if case == "state elsewhere":
            optimizer.state[w]["exp_avg"] = optimizer.state[w]["exp_avg"].to_local()
        if case == "other steps" and world.rank == 1:
            optimizer.state[w]["step"] += 1
        built.apply(Placement(torch.arange(EXPERTS).flip(0)[None], EXPERTS, GPUS))
    except DistplbError as error:
        return str(error)
    return "no error"


def refused() -> list[str]:
    return [refused_one(case) for case in REFUSED]


REFUSED = {
    "columns of columns": "pass one that is replicated, or sharded along dim 0 (experts) or dim 1, because",
    "partial": "pass one that is replicated, or sharded",
    "other gpu": "this rank is GPU 1 of its EP group, but holds experts of GPUs [0]; pass gpu= as the coordinate",
    "few": "moe.experts.w is 3 tensors; pass 4, one for each slot of this GPU",
    "unlike": "experts that change places must have the same dtype and shape",
    "rows": "moe.experts.w has 7 elements; pass a multiple of 4, with a row for each slot of this GPU",
    "global": "moe.experts.w has shape (6, 4); its first dim must be 8, one row per slot of all GPUs, because it is a",
    "state elsewhere": "it is not known which elements belong to which expert and nothing is moved",
    "other steps": "moe could not be moved: moe.experts.w: step 1 on ranks 0, 2, 3; step 2 on rank 1",
}


def test_what_is_not_understood_is_refused_by_name_on_every_rank() -> None:
    for texts in on_ranks(4, refused, deadline=120):
        for wording, text in zip(REFUSED.values(), texts, strict=True):
            assert wording in text
