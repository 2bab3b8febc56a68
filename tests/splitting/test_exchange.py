"""One GPU's exchange: both engines read `routes` at the physical slots, all exchanges fit, and tokens arrive by them.

Shapes: E experts, M GPUs, G own slots and R replica slots on each GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from splits import random_split
from torch import Tensor

from distplb import DistplbError, Topology
from distplb.core.machine_code import compiled_module
from distplb.splitting import cpu
from distplb.splitting.routes import Exchange, exchange_of, routes
from distplb.splitting.rules import EMPTY
from distplb.splitting.split import split
from distplb.splitting.split_value import Split

ENGINES = [
    "reference",
    pytest.param("cpu", marks=pytest.mark.skipif(not cpu.is_there(), reason="Numba is not installed")),
]
SHAPES = [(1, 1), (1, 4), (2, 2), (3, 2), (2, 4), (4, 1)]


def table(home: Tensor, num_gpus: int, seed: int, spare: int = 0) -> Tensor:
    """`[M, G]`: each GPU's experts in any order, and empty slots where it owns fewer than others, or to spare."""
    random = np.random.default_rng(seed)
    owned = [(home == gpu).nonzero().flatten().tolist() for gpu in range(num_gpus)]
    width = max(map(len, owned)) + spare
    return torch.tensor([random.permutation(row + [EMPTY] * (width - len(row))).tolist() for row in owned])


def decided(seed: int, topology: Topology) -> Split:
    """What `split` decides for skewed counts and homes in any order, some GPUs with more experts than others."""
    random = np.random.default_rng(seed)
    num_gpus = topology.num_gpus
    popularity = random.lognormal(3, 1.5, num_gpus * int(random.integers(1, 4)))
    counts = random.poisson(popularity, (num_gpus, len(popularity))) * (random.random((num_gpus, 1)) < 0.9)
    home = random.integers(0, num_gpus, len(popularity))
    return split(counts, home, topology=topology, replica_slots=min(len(popularity), int(random.integers(0, 3))))


def steps(topology: Topology) -> Iterator[tuple[Split, Tensor]]:
    """Splits with own slots: replicas anywhere with random quotas, and what `split` decides."""
    for seed in range(40):
        one = random_split(topology.num_gpus, seed, tokens=1000 if seed % 4 else 3)
        yield one, table(one.home, topology.num_gpus, seed, spare=seed % 3 // 2)
    for seed in range(30):
        one = decided(seed, topology)
        yield one, table(one.home, topology.num_gpus, seed)


def exchanges(one: Split, topology: Topology, slot_expert: Tensor, engine: str | None = None) -> tuple[Tensor, Tensor]:
    """`[M, M, G + R]` each: what each GPU (first dim) sends, and what each receives."""
    every = [exchange_of(one, topology, gpu, slot_expert, engine=engine) for gpu in range(topology.num_gpus)]
    return torch.stack([each.send for each in every]), torch.stack([each.receive for each in every])


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_the_routes_by_physical_slot_and_what_is_sent_is_received(shape: tuple[int, int], engine: str) -> None:
    topology, num_replicas = Topology(*shape), 0
    for one, slot_expert in steps(topology):
        flow, expert = routes(one, topology), torch.cat([slot_expert, one.replica], 1)
        wanted = torch.zeros(topology.num_gpus, *expert.shape, dtype=torch.int64)  # [M, M, G + R]
        for gpu, slot in expert.ne(EMPTY).nonzero().tolist():
            wanted[:, gpu, slot] = flow[:, expert[gpu, slot], gpu]
        sent, received = exchanges(one, topology, slot_expert, engine)
        assert sent.dtype == received.dtype == torch.int64
        assert torch.equal(sent, wanted)
        assert torch.equal(received, wanted.transpose(0, 1))
        assert sent.sum() == one.counts.sum()  # each token has a slot
        num_replicas += one.num_replicas
    assert num_replicas > 50 or topology.num_gpus == 1


@pytest.mark.parametrize("engine", ENGINES)
def test_a_large_step_on_several_nodes_fits_too(engine: str) -> None:
    topology = Topology(4, 8)
    random = np.random.default_rng(0)
    popularity = random.lognormal(0, 1, 128)
    counts = random.multinomial(8192, popularity / popularity.sum(), 32)
    one = split(counts, np.arange(128) // 4, topology=topology)
    slot_expert, flow = torch.arange(128).view(32, 4), routes(one, topology)
    sent, received = exchanges(one, topology, slot_expert, engine)
    assert one.num_replicas > 10
    assert torch.equal(sent, received.transpose(0, 1))
    assert torch.equal(sent.sum(2), flow.sum(1))
    assert torch.equal(sent[:, :, :4].reshape(32, 128), flow[:, torch.arange(128), one.home])


def test_tokens_sorted_and_sent_by_it_arrive_at_slots_with_their_expert() -> None:
    """One dispatch by hand: each source cuts its tokens into messages by the sizes, receivers sort them by slot."""
    topology = Topology(2, 2)
    for seed in range(20):
        one = random_split(topology.num_gpus, seed, tokens=20)
        slot_expert = table(one.home, topology.num_gpus, seed)
        expert = torch.cat([slot_expert, one.replica], 1)  # [M, G + R]
        every = [exchange_of(one, topology, gpu, slot_expert) for gpu in range(topology.num_gpus)]
        inbox: list[list[Tensor]] = [[] for _ in every]  # of each GPU, the messages in the order of sources
        for source, exchange in enumerate(every):
            rows = expert.flatten().repeat_interleave(exchange.send.flatten())  # the expert that each token asks for
            assert torch.equal(rows[rows >= 0].bincount(minlength=len(one.home)), one.counts[source])
            for gpu, message in enumerate(rows.split(exchange.send_sizes)):
                inbox[gpu].append(message)
        for gpu, exchange in enumerate(every):
            assert [len(message) for message in inbox[gpu]] == exchange.receive_sizes
            slot = torch.arange(expert.shape[1]).repeat(topology.num_gpus).repeat_interleave(exchange.receive.flatten())
            by_slot = torch.cat(inbox[gpu])[slot.argsort(stable=True)]
            for number, rows in enumerate(by_slot.split(exchange.tokens_of_slot)):
                assert rows.eq(expert[gpu, number]).all()


def equal(one: Exchange, other: Exchange) -> bool:
    return torch.equal(one.send, other.send) and torch.equal(one.receive, other.receive)


@pytest.mark.parametrize("engine", ENGINES)
def test_without_tokens_or_replica_slots(engine: str) -> None:
    topology, home = Topology(1, 2), torch.tensor([1, 0])
    none = split(torch.zeros(2, 2), home, topology=topology)
    exchange = exchange_of(none, topology, 0, torch.tensor([[1], [0]]), engine=engine)
    assert exchange.send.tolist() == exchange.receive.tolist() == [[0, 0, 0], [0, 0, 0]]
    bare = split([[5, 1], [2, 4]], home, topology=topology, replica_slots=0)
    exchange = exchange_of(bare, topology, 0, torch.tensor([[1], [0]]), engine=engine)
    assert (exchange.send.tolist(), exchange.receive.tolist()) == ([[1], [5]], [[1], [4]])


@pytest.mark.parametrize("engine", ENGINES)
def test_a_gpu_without_experts_computes_with_replicas(engine: str) -> None:
    topology = Topology(1, 2)
    one = split([[6, 0], [4, 2]], [0, 0], topology=topology, replica_slots=1)
    slot_expert = torch.tensor([[0, 1], [EMPTY, EMPTY]])
    exchange = exchange_of(one, topology, 1, slot_expert, engine=engine)
    assert exchange.receive.tolist() == [[0, 0, 2], [0, 0, 4]]
    assert exchange.send.tolist() == [[0, 2, 0], [0, 0, 4]]


@pytest.mark.parametrize("engine", ENGINES)
def test_large_counts_are_exact_to_a_token(engine: str) -> None:
    topology = Topology(2, 2)
    for seed in range(20):
        one, scale = random_split(4, seed), 2**38 - 1
        large = Split(one.counts * scale, one.home, one.quota * scale, one.replica)
        slot_expert = table(one.home, 4, seed)
        small = exchange_of(one, topology, seed % 4, slot_expert, engine=engine)
        scaled = Exchange(small.send * scale, small.receive * scale)
        assert equal(exchange_of(large, topology, seed % 4, slot_expert, engine=engine), scaled)


@pytest.mark.parametrize("engine", ENGINES)
def test_strides_and_defaults_make_no_difference(engine: str) -> None:
    topology, one = Topology(2, 2), random_split(4, 3)
    slot_expert = table(one.home, 4, 3)
    wanted = exchange_of(one, topology, 2, slot_expert, engine=engine)
    values = (one.counts, one.home, one.quota, one.replica)
    strided = Split(*(value.T.contiguous().T if value.dim() == 2 else value for value in values))
    assert not strided.counts.is_contiguous()
    with torch.device("meta"):
        found = exchange_of(strided, topology, 2, slot_expert.T.contiguous().T, engine=engine)
    assert equal(found, wanted)
    assert found.send.is_contiguous()


@pytest.mark.skipif(not cpu.is_there(), reason="Numba is not installed")
def test_the_kernel_is_compiled_once() -> None:
    """Whatever the strides: compiling again would hold up a training step for seconds."""
    topology, one = Topology(1, 2), split([[6, 1], [4, 1]], [0, 1], topology=Topology(1, 2), replica_slots=1)
    strided = Split(one.counts.T.contiguous().T, one.home, one.quota.T.contiguous().T, one.replica)
    for each, slot_expert in ((one, torch.tensor([[0], [1]])), (strided, torch.tensor([[0, 1], [1, 0]])[:, :1])):
        exchange_of(each, topology, 0, slot_expert)
    assert len(compiled_module("distplb.splitting.cpu_routes").exchange.signatures) == 1


def test_without_numba_the_specification_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    topology, one = Topology(2, 2), random_split(4, 5)
    slot_expert = table(one.home, 4, 5)
    wanted = exchange_of(one, topology, 1, slot_expert)
    monkeypatch.setattr(cpu, "is_there", lambda: False)
    assert equal(exchange_of(one, topology, 1, slot_expert), wanted)
    with pytest.raises(DistplbError, match="Numba is not installed"):
        exchange_of(one, topology, 1, slot_expert, engine="cpu")


GOOD = torch.tensor([[0, 2], [1, EMPTY]])  # homes: 0, 1, 0
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "another cluster": (
        {"topology": Topology(1, 4)},
        "the split has 2 GPUs, the topology 4; pass the split's topology",
    ),
    "GPU": ({"gpu": 2}, "gpu is 2; pass a GPU of the split, in [0, 2)"),
    "negative GPU": ({"gpu": -1}, "gpu is -1; pass a GPU of the split, in [0, 2)"),
    "a float": ({"gpu": 1.0}, "gpu is 1.0; pass an integer"),
    "a list": ({"slot_expert": [[0, 2], [1, -1]]}, "slot_expert is a list; pass a tensor of int64"),
    "int32": ({"slot_expert": GOOD.int()}, "slot_expert is torch.int32 of shape [2, 2] on cpu; pass int64 of shape"),
    "one row": ({"slot_expert": GOOD.flatten()}, "of shape [4] on cpu; pass int64 of shape [2, own slots] on the CPU"),
    "meta": ({"slot_expert": GOOD.to("meta")}, "of shape [2, 2] on meta; pass int64 of"),
    "more GPUs": ({"slot_expert": GOOD.repeat(2, 1)}, "of shape [4, 2] on cpu; pass int64 of shape [2, own slots]"),
    "unknown expert": (
        {"slot_expert": torch.tensor([[0, 3], [1, -1]])},
        "slot_expert has 3; pass an expert in [0, 3), or -1 for none",
    ),
    "below -1": ({"slot_expert": torch.tensor([[0, 2], [1, -2]])}, "slot_expert has -2; pass an expert in"),
    "missing": (
        {"slot_expert": torch.tensor([[0, -1], [1, -1]])},
        "slot_expert has expert 2 on GPUs []; pass it once, on its home, GPU 0",
    ),
    "twice": (
        {"slot_expert": torch.tensor([[0, 2, 0], [1, -1, -1]])},
        "slot_expert has expert 0 on GPUs [0, 0]; pass it once",
    ),
    "twice, another missing": (
        {"slot_expert": torch.tensor([[0, 0], [1, -1]])},
        "slot_expert has expert 0 on GPUs [0, 0]; pass it once, on its home, GPU 0",
    ),
    "elsewhere": (
        {"slot_expert": torch.tensor([[0, 2], [1, 2]])},
        "expert 2 on GPUs [0, 1]; pass it once, on its home, GPU 0",
    ),
    "no slots": ({"slot_expert": GOOD[:, :0]}, "slot_expert has expert 0 on GPUs []; pass it once, on its home, GPU 0"),
    "engine": ({"engine": "gpu"}, "engine 'gpu' is unknown"),
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_refused_with_what_to_pass(name: str, engine: str) -> None:
    changed, text = WRONG[name]
    one = split([[6, 0, 1], [4, 2, 1]], [0, 1, 0], topology=Topology(1, 2))
    arguments = {"topology": Topology(1, 2), "gpu": 1, "slot_expert": GOOD, "engine": engine}
    assert exchange_of(one, **arguments).receive.sum() == one.load[1]
    with pytest.raises(DistplbError) as refused:
        exchange_of(one, **arguments | changed)
    assert text in str(refused.value)
