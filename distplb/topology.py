"""The shape of one expert-parallel group: how many nodes, how many GPUs on each."""

from __future__ import annotations

from dataclasses import dataclass

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
