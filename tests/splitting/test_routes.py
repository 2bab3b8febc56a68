"""Routes: every token goes somewhere, no quota is passed, and as few tokens cross GPUs and nodes as quotas allow."""

from __future__ import annotations

import itertools

import pytest
import torch
from splits import random_split
from torch import Tensor

from distplb import DistplbError, Topology
from distplb.splitting.routes import routes
from distplb.splitting.split_value import Split

SHAPES = [(1, 1), (1, 4), (2, 2), (3, 2), (2, 4), (4, 1)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_token_goes_to_a_gpu_with_a_quota_for_it(shape: tuple[int, int]) -> None:
    topology = Topology(*shape)
    for seed in range(60):
        split = random_split(topology.num_gpus, seed)
        sent = routes(split, topology)
        assert sent.dtype == torch.int64
        assert sent.amin() >= 0
        assert torch.equal(sent.sum(2), split.counts)
        assert torch.equal(sent.sum(0), split.quota)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_no_assignment_sends_fewer_tokens_to_other_gpus_or_nodes(shape: tuple[int, int]) -> None:
    """At most the smaller of routed and computed tokens can stay, on a GPU and in a node; so many do."""
    topology = Topology(*shape)
    node = torch.arange(topology.num_gpus) // topology.gpus_per_node
    for seed in range(60):
        split = random_split(topology.num_gpus, seed)
        sent = routes(split, topology)
        stays = torch.einsum("mem->", sent)
        assert stays == torch.minimum(split.counts.T, split.quota).sum()
        of_node = (node.unsqueeze(0) == torch.arange(topology.num_nodes).unsqueeze(1)).long()  # [N, M]
        routed, computed = split.counts.T @ of_node.T, split.quota @ of_node.T  # [E, N]
        in_node = (sent * (node[:, None, None] == node[None, None, :])).sum()
        assert in_node == torch.minimum(routed, computed).sum()


def one_by_one(split: Split, topology: Topology) -> Tensor:
    """The rule, token by token: own GPU, own node, any; sources and GPUs in the order of ranks."""
    num_gpus, num_experts = split.counts.shape
    sent = torch.zeros(num_gpus, num_experts, num_gpus, dtype=torch.int64)
    left, room = split.counts.clone(), split.quota.clone()
    near = (
        lambda a, b: a == b,
        lambda a, b: a // topology.gpus_per_node == b // topology.gpus_per_node,
        lambda a, b: True,
    )
    for is_near in near:
        for expert, source, gpu in itertools.product(range(num_experts), range(num_gpus), range(num_gpus)):
            while is_near(source, gpu) and left[source, expert] and room[expert, gpu]:
                sent[source, expert, gpu] += 1
                left[source, expert] -= 1
                room[expert, gpu] -= 1
    return sent


@pytest.mark.parametrize("shape", [(1, 3), (2, 2), (3, 1), (2, 3)], ids=str)
def test_it_is_the_rule_applied_token_by_token(shape: tuple[int, int]) -> None:
    topology = Topology(*shape)
    for seed in range(12):
        split = random_split(topology.num_gpus, seed, tokens=6)
        assert torch.equal(routes(split, topology), one_by_one(split, topology))


def test_another_number_of_gpus_is_refused() -> None:
    with pytest.raises(DistplbError, match="the split has 4 GPUs, the topology 2; pass the split's topology"):
        routes(random_split(4, 0), Topology(1, 2))
