"""`Split`: the replicas and quotas of one step of one layer, as a value that checks itself.

Shapes: E experts, M GPUs, R replica slots on each GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from distplb.core.arguments import refuse_wrong_types
from distplb.errors import DistplbError
from distplb.splitting.engines import engine_named
from distplb.splitting.rules import EMPTY

__all__ = ["Split"]


@dataclass(frozen=True, eq=False)
class Split:
    """Which GPUs hold replicas of which experts in one step, and how many tokens of each expert each GPU computes.

    >>> split = Split(
    ...     counts=torch.tensor([[6, 1], [4, 1]]),  # 10 tokens for expert 0, 2 for expert 1
    ...     home=torch.tensor([0, 1]),
    ...     quota=torch.tensor([[6, 4], [0, 2]]),
    ...     replica=torch.tensor([[-1], [0]]),  # GPU 1 computes 4 tokens of expert 0
    ... )
    >>> split.load, split.imbalance, split.num_replicas
    (tensor([6, 6]), 1.0, 1)

    Args:
        counts: `[M, E]` int64, the tokens that each GPU's router sends to each expert.
        home: `[E]` int64, the GPU that owns each expert.
        quota: `[E, M]` int64, the tokens of each expert that each GPU computes.
        replica: `[M, R]` int64, the expert in each replica slot; -1 for an empty one.

    Raises:
        DistplbError: if shapes or dtypes differ from these, quotas do not add up to the counts, a GPU has a quota of
            an expert that it does not hold, or a replica is useless: without a quota, on its expert's home, or twice on
            a GPU.
    """

    counts: Tensor
    home: Tensor
    quota: Tensor
    replica: Tensor

    def __post_init__(self) -> None:
        if not self._has_shapes():
            self._refuse_shapes()
        arrays = (each.contiguous().numpy() for each in (self.counts, self.home, self.quota, self.replica))
        if not engine_named(None).is_legal(*arrays):
            self._refuse_quotas()
            self._refuse_replicas()
            raise AssertionError("a split that is not legal was not refused")

    @property
    def load(self) -> Tensor:
        """`[M]` int64: the tokens that each GPU computes."""
        return self.quota.sum(0)

    @property
    def imbalance(self) -> float:
        """Busiest GPU / mean GPU, in tokens; 1 if there are none."""
        total = int(self.quota.sum())
        return int(self.load.amax()) * self.quota.shape[1] / total if total else 1.0

    @property
    def num_replicas(self) -> int:
        """Replicas on all GPUs."""
        return int(self.replica.ne(EMPTY).sum())

    @property
    def is_trivial(self) -> bool:
        """Whether every expert is computed at home, as without distplb."""
        return self.num_replicas == 0

    @property
    def pushes(self) -> Tensor:
        """`[M, M]` int64: the replicas that each GPU (row) sends to each other one (column)."""
        gpu, slot = self.replica.ne(EMPTY).nonzero(as_tuple=True)
        pushes = torch.zeros(len(self.replica), len(self.replica), dtype=torch.int64, device=self.replica.device)
        source = self.home[self.replica[gpu, slot]]
        return pushes.index_put_((source, gpu), torch.ones_like(gpu), accumulate=True)

    def _has_shapes(self) -> bool:
        """Whether shapes and dtypes are right; short, because this runs in every step."""
        values = self.counts, self.home, self.quota, self.replica
        if not all(isinstance(one, Tensor) and one.dtype == torch.int64 and one.is_cpu for one in values):
            return False
        counts, home, quota, replica = (one.shape for one in values)
        is_fit = len(counts) == 2 and home == counts[1:] and quota == counts[::-1] and len(replica) == 2
        return is_fit and replica[0] == counts[0] and 0 not in counts

    def _refuse_shapes(self) -> None:
        letters = {"counts": "ME", "home": "E", "quota": "EM", "replica": "MR"}
        refuse_wrong_types(
            {f"Split: {name}": (getattr(self, name), (Tensor,), "a tensor of int64") for name in letters}
        )
        sizes: dict[str, int] = {}
        for name, dims in letters.items():
            value: Tensor = getattr(self, name)
            if value.dim() == len(dims):
                for letter, size in zip(dims, value.shape, strict=True):
                    sizes.setdefault(letter, size)
            expected = [sizes.get(letter, letter) for letter in dims]
            if value.dtype != torch.int64 or list(value.shape) != expected or not value.is_cpu:
                shape = ", ".join(map(str, expected))
                raise DistplbError(
                    f"Split: {name} is {value.dtype} of shape {list(value.shape)} on {value.device}; pass int64 of "
                    f"shape [{shape}] on the CPU"
                )
        raise DistplbError(f"Split: counts has shape {list(self.counts.shape)}; pass at least one GPU and one expert")

    def _refuse_quotas(self) -> None:
        num_gpus = len(self.counts)
        if (self.home.lt(0) | self.home.ge(num_gpus)).any():
            raise DistplbError(f"Split: home is {self.home.tolist()}; pass a GPU in [0, {num_gpus}) for each expert")
        for name in ("counts", "quota"):
            if getattr(self, name).lt(0).any():
                raise DistplbError(f"Split: {name} has {int(getattr(self, name).amin())} tokens; pass 0 or more")
        routed, computed = self.counts.sum(0), self.quota.sum(1)
        for expert in routed.ne(computed).nonzero().flatten().tolist():
            raise DistplbError(
                f"Split: quotas of expert {expert} add up to {int(computed[expert])}, its counts to "
                f"{int(routed[expert])}; pass quotas of all its tokens"
            )

    def _refuse_replicas(self) -> None:
        gpu, slot = self.replica.ne(EMPTY).nonzero(as_tuple=True)
        expert, num_experts = self.replica[gpu, slot], len(self.home)
        for wrong in expert[expert.lt(0) | expert.ge(num_experts)].tolist():
            raise DistplbError(f"Split: replica has {wrong}; pass an expert in [0, {num_experts}), or {EMPTY} for none")
        copies = torch.zeros_like(self.quota)  # [E, M]
        copies.index_put_((expert, gpu), torch.ones_like(expert), accumulate=True)
        copies.index_put_(
            (torch.arange(num_experts, device=self.home.device), self.home), torch.ones_like(self.home), accumulate=True
        )
        for one, where in copies.gt(1).nonzero().tolist():
            raise DistplbError(f"Split: GPU {where} holds expert {one} twice; leave out one of the copies")
        for one, where in (self.quota.gt(0) & copies.eq(0)).nonzero().tolist():
            raise DistplbError(
                f"Split: GPU {where} computes {int(self.quota[one, where])} tokens of expert {one}, which it does not "
                "hold; pass a replica"
            )
        for one, where in zip(expert.tolist(), gpu.tolist(), strict=True):
            if not self.quota[one, where]:
                raise DistplbError(f"Split: the replica of expert {one} on GPU {where} has no quota; leave it out")
