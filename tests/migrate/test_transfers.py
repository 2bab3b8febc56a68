"""Random changes of placement of random models, one after the other in one process group: every byte is compared.

DISTPLB_TRANSFERS is the number of transfers for each number of ranks.
Shapes: L layers, E experts, P slots, G slots on each GPU.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Sequence

import pytest
import torch
from ranks import on_ranks
from torch import Tensor

from distplb import LoadWindow, MoELayer, Moves, Placement, Rebalancer, Topology
from distplb.comm.base import Comm, Round
from distplb.comm.torchdist import TorchComm
from distplb.migrate import staging, transfer

TRANSFERS = int(os.environ.get("DISTPLB_TRANSFERS", "150"))
PER_MODEL = 10
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.int64)
KINDS = ("random", "derangement", "few", "return", "identity")


class Model:
    """Layers of random tensors with random bytes, determined by the seed alone; and what they should hold."""

    def __init__(self, seed: int, comm: Comm) -> None:
        random_ = random.Random(seed)
        self.gpus = random_.choice([comm.size, comm.size, comm.size // 2])  # the last: two copies of each expert
        self.experts = self.gpus * random_.randint(-(-2 // self.gpus), 64 // self.gpus)
        size, gpu = self.experts // self.gpus, comm.rank % self.gpus
        self.mine = slice(gpu * size, (gpu + 1) * size)
        self.bytes = torch.Generator().manual_seed(seed)
        # Layer, its slots, tensors, [E, bytes of a row].
        self.declared: list[tuple[int, slice, list[Tensor], Tensor]] = []
        self.commits = Counter[int]()  # by layer
        self.tables: list[Tensor] = []  # [E] of each layer, or none
        self.is_remapped = random_.random() < 0.3
        layers = [self.layer(number, random_) for number in range(random_.randint(1, 4))]
        self.placement = Placement.contiguous(len(layers), self.experts, self.gpus)
        self.rebalancer = Rebalancer(
            layers,
            [],
            topology=Topology(1, self.gpus),
            every=1,
            window=LoadWindow(len(layers), self.experts, 1),
            comm=comm,
            gpu=gpu,
            moves=Moves(verify=random_.choice(["off", "off", "off", "digest"])),
        )

    def layer(self, number: int, random_: random.Random) -> MoELayer:
        experts = {}
        for key in "wxyz"[: random_.randint(1, 4)]:
            rows = self.rows(number, random_, self.mine)
            if random_.random() < 0.3:  # a tensor for each expert, not one for all
                apart = [row.clone() for row in rows]
                self.declared[-1] = (*self.declared[-1][:2], apart, self.declared[-1][3])
                experts[key] = apart
            else:
                experts[key] = rows
        if self.is_remapped:
            router, table = {}, torch.arange(self.experts)
            self.tables.append(table)
        else:
            router = {str(nth): self.rows(number, random_, slice(None)) for nth in range(random_.randint(1, 2))}
            table = None
        return MoELayer(
            name=str(number),
            experts=experts,
            router=router,
            slot_of_expert=table,
            invalidate=lambda: self.commits.update([number]),
        )

    def rows(self, layer: int, random_: random.Random, slots: slice) -> Tensor:
        """A tensor `[slots, ...]` of this rank, recorded with the rows of all experts."""
        dtype, shape = random_.choice(DTYPES), (random_.choice([1, 2, 5, 33]), random_.choice([1, 3, 8]))
        row_bytes = shape[0] * shape[1] * dtype.itemsize
        own = torch.randint(0, 256, (self.experts, row_bytes), generator=self.bytes, dtype=torch.uint8)
        rows = own[slots].clone().view(dtype).unflatten(1, shape)
        self.declared.append((layer, slots, [rows], own))
        return rows

    def change(self, kind: str, random_: random.Random, before: Placement) -> Placement:
        """A placement that differs from the one in force according to `kind`, differently in each layer."""
        table = self.placement.expert_of_slot.clone()
        if kind == "return":
            return before
        for row in table:
            if kind == "random":
                row.copy_(row[random_.sample(range(self.experts), self.experts)])
            elif kind == "derangement":
                order = random_.sample(range(self.experts), self.experts)
                row[order] = row[order].roll(random_.randrange(1, self.experts))
            elif kind == "few":
                for _ in range(random_.randint(0, 2)):
                    one, other = random_.sample(range(self.experts), 2)
                    row[[one, other]] = row[[other, one]]
        return Placement(table, self.experts, self.gpus)

    def wrong(self) -> list[str]:
        """The tensors that differ, in any byte, from what the placement in force requires; and the wrong tables."""
        inverse = self.placement.inverse[..., 0]
        lost = [f"table {n}" for n, table in enumerate(self.tables) if not torch.equal(table, inverse[n])]
        return lost + [
            f"layer {layer}, {tensors[0].dtype} {tuple(tensors[0].shape)}"
            for layer, slots, tensors, own in self.declared
            if not torch.equal(
                torch.cat([tensor.contiguous().view(-1).view(torch.uint8) for tensor in tensors]),
                own[self.placement.expert_of_slot[layer, slots]].flatten(),
            )
        ]


def transferred(times: int) -> dict[str, int | list[str]]:
    """Run `times` transfers, each from where the last one ended; count them by kind, and list what was wrong."""
    comm, counts = TorchComm(), Counter[str]()
    for seed in range(-(-times // PER_MODEL)):
        model, random_ = Model(seed, comm), random.Random(seed)
        # From the smallest, a swap of the largest experts, so that longer cycles are split, to all in one commit.
        transfer._STAGING_BYTES = random_.choice([1, 2000, 20_000, 256 << 20])
        transfer._LARGE_BYTES = random_.choice([1, 500, 1 << 18])
        before = model.placement
        for number in range(seed * PER_MODEL, min((seed + 1) * PER_MODEL, times)):
            kind = random_.choice(KINDS)
            after = model.change(kind, random_, before)
            before, model.placement = model.placement, after
            model.commits.clear()
            model.rebalancer.apply(after)
            wrong = model.wrong()
            if wrong or model.rebalancer.placement != after:
                return {
                    "wrong": [f"transfer {number} (model {seed}, {kind}): {name}" for name in wrong] or ["placement"]
                }
            is_many = max(model.commits.values(), default=0) > 1
            counts.update([kind, f"{'many' if is_many else 'one'} at most in a layer"])
            counts["slots"] += int((before.expert_of_slot != after.expert_of_slot).sum())
            counts["nothing moved"] += not model.commits
        model.rebalancer.close()
    return {"wrong": [], **counts}


@pytest.mark.parametrize("ranks", [pytest.param(2, marks=pytest.mark.long), 4])
def test_every_byte_is_its_experts_own_after_each_of_many_random_transfers(ranks: int) -> None:
    first, *others = on_ranks(ranks, transferred, TRANSFERS, deadline=120 + TRANSFERS)
    print(first)
    assert first["wrong"] == []
    assert all(other == first for other in others)
    assert sum(first[kind] for kind in KINDS) == TRANSFERS
    assert first["nothing moved"] >= first["identity"]
    if TRANSFERS >= 100:
        assert min(first[kind] for kind in KINDS) > 0
        assert first["many at most in a layer"] > TRANSFERS / 10
        assert first["slots"] > 10 * TRANSFERS


# --- meetings and connections -----------------------------------------------------------------------------------


class Listening(TorchComm):
    """Meets in a gloo group first, as over NCCL; counts meetings and rounds, and records the peers."""

    def __init__(self) -> None:
        self.meetings, self.rounds, self.peers = 0, 0, set[int]()
        super().__init__(side_group=True)

    def _meet(self) -> None:
        self.meetings += 1
        super()._meet()

    def exchange(self, rounds: Sequence[Round]) -> None:
        """As `Comm`."""
        self.rounds += len(rounds)
        self.peers |= {peer for one in rounds for messages in one for _, peer in messages}
        super().exchange(rounds)


def meetings_and_peers() -> list[dict[str, object]]:
    """Meetings and peers with one and two copies of each expert, at construction and in moves of few or many rounds."""
    results = []
    transfer._LARGE_BYTES = 1
    for seed in (0, 5):
        comm = Listening()
        model, random_ = Model(seed, comm), random.Random(seed)
        one = {"copies": comm.size // model.gpus, "connected": sorted(comm.peers)}
        comm.peers.clear()
        for transfer._OPERATIONS in (10_000, 2):
            comm.meetings = comm.rounds = 0
            model.placement = model.change("derangement", random_, model.placement)
            model.rebalancer.apply(model.placement)
            one[f"of {transfer._OPERATIONS}"] = comm.meetings, comm.rounds
        results.append(one | {"wrong": model.wrong(), "used": sorted(comm.peers)})
        model.rebalancer.close()
    return results


def test_ranks_meet_once_for_all_rounds_of_a_commit_and_connect_before_there_is_any() -> None:
    """Over NCCL they met before each round, and the first message between two ranks allocated buffers in a move."""
    ranks = on_ranks(4, meetings_and_peers)
    for rank, (alone, in_twos) in enumerate(ranks):
        assert (alone["copies"], in_twos["copies"]) == (1, 2)
        assert alone["connected"] == [other for other in range(4) if other != rank]
        assert in_twos["connected"] == [rank ^ 1]  # of its own EP group
        for results in (alone, in_twos):
            assert results["wrong"] == []
            assert results["used"] == results["connected"]
            (few_meetings, few_rounds), (many_meetings, many_rounds) = results["of 10000"], results["of 2"]
            assert few_rounds <= 2 < 5 < many_rounds
            assert few_meetings == many_meetings


def test_staging_memory_is_kept_where_a_move_needs_more_than_the_one_before() -> None:
    """It was allocated again for each larger size, and all its pages were touched for the first time again."""
    memory, host = staging.StagingMemory(), torch.device("cpu")
    first = memory.room("arriving", 10_000, host).fill_(7)
    again = memory.room("arriving", 20_000_000, host)
    assert again.data_ptr() == first.data_ptr()
    assert again[:10_000].eq(7).all()
    assert len(again) == 20_000_000
    assert memory.room("packed", 10_000, host).data_ptr() != first.data_ptr()
    assert len(memory.room("arriving", staging.KEPT_BYTES + 1, host)) == staging.KEPT_BYTES + 1
