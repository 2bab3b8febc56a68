"""The shape of one expert-parallel group: how many nodes, how many GPUs on each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from distplb.errors import DistplbError

__all__ = ["Topology"]


@dataclass(frozen=True)
class Topology:
    """Nodes and GPUs of one expert-parallel (EP) group; GPU m lives on node `m // gpus_per_node`.

    >>> Topology(num_nodes=2, gpus_per_node=8).num_gpus
    16

    Args:
        num_nodes: nodes of the group; a node is the set of GPUs that share the fast links.
        gpus_per_node: GPUs of the group on each node, the same number on all.

    Raises:
        DistplbError: if either is not a positive integer.
    """

    num_nodes: int
    gpus_per_node: int

    def __post_init__(self) -> None:
        for name in ("num_nodes", "gpus_per_node"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise DistplbError(f"Topology: {name} is {value!r}; pass a whole number of at least 1")

    @classmethod
    def of_ranks(cls, ranks: Sequence[int], gpus_per_node: int) -> Topology:
        """Of the EP group that has these global ranks, where node n has the ranks from n × `gpus_per_node` on.

        >>> Topology.of_ranks([1, 3, 9, 11], gpus_per_node=8)
        Topology(num_nodes=2, gpus_per_node=2)

        Args:
            ranks: in the order of the group; may be strided.
            gpus_per_node: GPUs of the whole job on each node.

        Raises:
            DistplbError: if the nodes have different numbers of the ranks, or the ranks of a node do not follow each
                other.
        """
        if gpus_per_node < 1:
            raise DistplbError(f"gpus_per_node is {gpus_per_node}; pass the job's GPUs on each node, at least 1")
        nodes = [rank // gpus_per_node for rank in ranks]
        blocks = [len(list(block)) for _, block in groupby(nodes)]
        if len(set(blocks)) != 1 or len(blocks) != len(set(nodes)):
            raise DistplbError(
                f"ranks {list(ranks)} of the EP group lie on nodes {nodes} (of {gpus_per_node} GPUs), not evenly node "
                "by node; pass the topology and the order of the group yourself"
            )
        return cls(len(blocks), blocks[0])

    @property
    def num_gpus(self) -> int:
        """M, the GPUs of the group."""
        return self.num_nodes * self.gpus_per_node

    def slots_per_gpu(self, num_slots: int) -> int:
        """G, the slots on each GPU when `num_slots` are spread evenly.

        Raises:
            DistplbError: if they cannot be.
        """
        if num_slots < 1 or num_slots % self.num_gpus:
            raise DistplbError(
                f"{num_slots} slots cannot be spread evenly over {self.num_gpus} GPUs "
                f"({self.num_nodes} nodes × {self.gpus_per_node}); make the number of slots "
                f"a multiple of {self.num_gpus}, or use a number of GPUs that divides {num_slots}"
            )
        return num_slots // self.num_gpus
