"""Experts and everything that travels with them arrive unchanged, in both layouts, move after move.

Shapes: L layers, E experts, G slots on each GPU, M GPUs, D copies of each expert (expert-data-parallel size).
"""

from __future__ import annotations

import functools
import zlib

import pytest
import torch
from ranks import on_ranks
from torch import Tensor

from distplb import FlatShard, LoadWindow, MoELayer, Moves, Placement, Rebalancer, Topology
from distplb.comm.torchdist import TorchComm
from distplb.migrate import transfer

LAYERS, EXPERTS = 2, 12
SHAPES = {"w_in": (3, 5), "w_out": (5, 3), "b_in": (7,)}  # of one expert; 7 × G is odd for G = 3
DTYPES = {"w_in": torch.float32, "w_out": torch.bfloat16, "b_in": torch.float64}


@functools.cache
def all_values(layer: int, what: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Values `[E, *shape]` that differ by expert, layer, tensor and kind of state, the same on every rank."""
    generator = torch.Generator().manual_seed(1000 * layer + zlib.crc32(what.encode()))
    return torch.rand(EXPERTS, *shape, generator=generator, dtype=torch.float64).to(dtype)


def own_value(layer: int, what: str, shape: tuple[int, ...], dtype: torch.dtype, experts: Tensor) -> Tensor:
    """The values `[len(experts), *shape]` of these experts."""
    return all_values(layer, what, shape, dtype)[experts]


def random_placement(generator: torch.Generator, gpus: int) -> Placement:
    tables = [torch.randperm(EXPERTS, generator=generator) for _ in range(LAYERS)]
    return Placement(torch.stack(tables), EXPERTS, gpus)


class Model:
    """Layers in which every tensor has its experts' own values, and a check that it still has them."""

    def __init__(self, gpu: int, gpus: int, copy: int, copies: int, sharded: bool) -> None:
        slots = EXPERTS // gpus
        self.mine = slice(gpu * slots, (gpu + 1) * slots)
        self.cut = (copy, copies)
        self.sharded = sharded
        self.parameters: list[dict[str, torch.nn.Parameter]] = []
        self.shards: list[dict[str, FlatShard]] = []
        self.routers: list[dict[str, Tensor]] = []
        contiguous = torch.arange(EXPERTS)
        for layer in range(LAYERS):
            self.parameters.append(
                {
                    key: torch.nn.Parameter(own_value(layer, key, shape, DTYPES[key], contiguous[self.mine]))
                    for key, shape in SHAPES.items()
                }
            )
            self.shards.append({key: self.shard(p) for key, p in self.parameters[layer].items()} if sharded else {})
            self.routers.append(
                {
                    "weight": torch.nn.Parameter(own_value(layer, "router", (4,), torch.float32, contiguous)),
                    "bias": own_value(layer, "bias", (), torch.float32, contiguous),
                }
            )
        stepped = [p for layer in range(LAYERS) for p in (*self.leaves(layer).values(), self.routers[layer]["weight"])]
        self.optimizer = torch.optim.AdamW(stepped)
        for layer in range(LAYERS):
            for key, leaf in self.leaves(layer).items():
                self.optimizer.state[leaf] = {"step": torch.tensor(3.0)} | {
                    kind: self.part(
                        own_value(layer, key + kind, SHAPES[key], DTYPES[key], contiguous[self.mine])
                    ).clone()
                    for kind in ("exp_avg", "exp_avg_sq")
                }
            self.parameters[layer]["w_in"].grad = own_value(
                layer, "gradient", SHAPES["w_in"], DTYPES["w_in"], contiguous[self.mine]
            )

    def leaves(self, layer: int) -> dict[str, Tensor]:
        if self.sharded:
            return {key: shard.values for key, shard in self.shards[layer].items()}
        return dict(self.parameters[layer])

    def bounds(self, count: int) -> tuple[int, int]:
        copy, copies = self.cut
        each = -(-count // copies)
        return min(copy * each, count), min((copy + 1) * each, count)

    def part(self, whole: Tensor) -> Tensor:
        if not self.sharded:
            return whole
        start, stop = self.bounds(whole.numel())
        return whole.reshape(-1)[start:stop]

    def shard(self, parameter: torch.nn.Parameter) -> FlatShard:
        start, _ = self.bounds(parameter.numel())
        return FlatShard(torch.nn.Parameter(self.part(parameter.detach()).clone()), start)

    def layers(self) -> list[MoELayer]:
        return [
            MoELayer(
                name=f"{layer}", experts=self.parameters[layer], router=self.routers[layer], shards=self.shards[layer]
            )
            for layer in range(LAYERS)
        ]

    def wrong(self, placement: Placement) -> list[str]:
        """The tensors that differ, in any bit, from the values of the experts that `placement` puts there."""
        differing = []

        def check(name: str, actual: Tensor | None, expected: Tensor) -> None:
            if actual is None or not torch.equal(actual.detach(), expected):
                differing.append(name)

        for layer in range(LAYERS):
            everyone = placement.expert_of_slot[layer]
            mine = everyone[self.mine]
            check(
                f"{layer}.router",
                self.routers[layer]["weight"],
                own_value(layer, "router", (4,), torch.float32, everyone),
            )
            check(f"{layer}.bias", self.routers[layer]["bias"], own_value(layer, "bias", (), torch.float32, everyone))
            check(
                f"{layer}.gradient",
                self.parameters[layer]["w_in"].grad,
                own_value(layer, "gradient", SHAPES["w_in"], DTYPES["w_in"], mine),
            )
            for key, leaf in self.leaves(layer).items():
                value = own_value(layer, key, SHAPES[key], DTYPES[key], mine)
                check(f"{layer}.{key}", self.parameters[layer][key], value)
                check(f"{layer}.{key} stepped", leaf, self.part(value))
                for kind in ("exp_avg", "exp_avg_sq"):
                    state = own_value(layer, key + kind, SHAPES[key], DTYPES[key], mine)
                    check(f"{layer}.{key} {kind}", self.optimizer.state[leaf][kind], self.part(state))
                check(f"{layer}.{key} step", self.optimizer.state[leaf]["step"], torch.tensor(3.0))
        return differing


def moved_again_and_again(gpus: int, sharded: bool, times: int, budget: int | None = None) -> list[str]:
    if budget is not None:
        transfer._STAGING_BYTES = budget
    comm = TorchComm()
    gpu, copy = comm.rank % gpus, comm.rank // gpus
    model = Model(gpu, gpus, copy, comm.size // gpus, sharded)
    rebalancer = Rebalancer(
        model.layers(),
        model.optimizer,
        topology=Topology(1, gpus),
        window=LoadWindow(LAYERS, EXPERTS, 1),
        every=1,
        comm=comm,
        gpu=gpu,
        moves=Moves(verify="digest"),
    )
    generator = torch.Generator().manual_seed(0)  # the same placements on all ranks
    for _ in range(times):
        rebalancer.apply(random_placement(generator, gpus))
        wrong = model.wrong(rebalancer.placement)
        if wrong:
            return wrong
    rebalancer.restore()
    return model.wrong(Placement.contiguous(LAYERS, EXPERTS, gpus))


@pytest.mark.parametrize(
    ("ranks", "gpus", "sharded", "times"),
    [
        (2, 2, False, 50),
        (2, 1, True, 50),
        (4, 2, False, 50),
        (4, 2, True, 50),
        pytest.param(4, 4, False, 200, marks=pytest.mark.long),
        pytest.param(4, 2, True, 200, marks=pytest.mark.long),
    ],
    ids=["2 owners", "1 x 2 sharded", "2 x 2 copies", "2 x 2 sharded", "4 owners", "2 x 2 sharded, 200 times"],
)
def test_every_experts_tensors_are_its_own_after_many_random_placements(
    ranks: int, gpus: int, sharded: bool, times: int
) -> None:
    assert on_ranks(ranks, moved_again_and_again, gpus, sharded, times) == [[]] * ranks


@pytest.mark.parametrize("sharded", [False, True])
def test_long_cycles_are_moved_in_parts_when_staging_is_short(sharded: bool) -> None:
    assert on_ranks(4, moved_again_and_again, 2 if sharded else 4, sharded, 20, 1) == [[]] * 4


def test_one_process_moves_without_a_group() -> None:
    model = Model(0, 1, 0, 1, sharded=False)
    rebalancer = Rebalancer(
        model.layers(), model.optimizer, topology=Topology(1, 1), window=LoadWindow(LAYERS, EXPERTS, 1), every=1
    )
    generator = torch.Generator().manual_seed(1)
    for _ in range(10):
        rebalancer.apply(random_placement(generator, 1))
        assert not model.wrong(rebalancer.placement)
