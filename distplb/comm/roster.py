"""Which communicators of the job move layers of which names: no two may move the same layers.

EP groups side by side hold copies of the same experts, whose gradients are averaged between them. If each group planned
and moved for itself, they would average different experts.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence

import torch

from distplb.comm.agreement import digest
from distplb.comm.base import Comm
from distplb.comm.store import Store, StoreClient, job_store
from distplb.errors import DistplbError

__all__ = ["Roster"]

_ANY = "any"  # exists once some rank has layers
_SECONDS = 30.0  # that the job's store may take to answer


class Roster:
    """The entry of one communicator for its layers. Making one is collective; its rank 0 writes and reads.

    Args:
        comm: the ranks that move these layers together.
        names: of the layers, unique in the model.
    """

    def __init__(self, comm: Comm, names: Sequence[str]) -> None:
        self._client: StoreClient | None = None
        self._names, self._is_root = sorted(names), comm.rank == 0
        self._prefix = digest(self._names)  # of the keys of all communicators with layers of these names
        self._number, self._ranks = 0, list[int]()
        job = _job_rank_and_size()
        if job is None or comm.size == job[1] or not names:  # there are no others
            return
        ranks = torch.zeros(comm.size, dtype=torch.int64, device=comm.device)
        ranks[comm.rank] = job[0]
        comm.all_reduce_sum(ranks)
        self._ranks = ranks.tolist()

    def enter(self) -> None:
        """Write the entry, and read the others'; on rank 0.

        Raises:
            DistplbError: where the store does not answer, or as `refuse_others`.
        """
        if not self._is_root or not self._ranks:
            return
        self._client = StoreClient(job_store("layers"))
        if not self._client.ask(_SECONDS, self._write):
            raise DistplbError(f"the job's store has not answered in {_SECONDS:g} s; look whether its host is there")
        self.refuse_others()

    def refuse_others(self) -> None:
        """Look for other ranks that hold layers of the same names, and move them by themselves; on rank 0.

        Raises:
            DistplbError: with their ranks and what to pass.
        """
        others: list[list[int]] = []
        # Where the store does not answer any more, its host is lost, which the next collective reports better.
        if self._client is None or not self._client.ask(_SECONDS, lambda store: self._look(store, others)):
            return
        for ranks in others:
            if not set(ranks) & set(self._ranks):  # else it is one of these ranks' own, from before
                raise DistplbError(
                    f"ranks {self._ranks} and ranks {ranks} each have a communicator of their own for layers of the "
                    f"same names ({self._names[0]}, ...). If they hold copies of the same experts, these would be "
                    "placed differently and then averaged: pass one communicator of all of them, such as "
                    "comm=TorchComm(group_of_all) or GridComm(TorchComm(mesh['ep']), TorchComm(mesh['edp'])), and "
                    "gpu=, this rank's number in its EP group. If they are different layers, as of two stages of a "
                    "pipeline, give them the names that they have in the whole model"
                )

    def warn_if_nobody_has_layers(self) -> None:
        """On the job's first rank, which has no layers: the loop calls a rebalancer that will never do anything.

        Called once all ranks train. Stages of a pipeline without MoE layers have none either, while others have.
        """
        job = _job_rank_and_size()
        have_layers: list[bool] = []
        if job is not None and job[1] > 1:
            if job[0] > 0:
                return
            client = StoreClient(job_store("layers"))
            if not client.ask(_SECONDS, lambda store: have_layers.append(store.check([_ANY]))):
                return
        if not any(have_layers):
            warnings.warn(
                "distplb: the Rebalancer was given no layers on any rank, and moves nothing; pass the MoE layers of "
                "the model, as integrations or the README's first snippet describe them",
                RuntimeWarning,
                stacklevel=4,
            )

    def withdraw(self) -> None:
        """Mark the entry: these ranks move the layers no more."""
        if self._client is not None:
            self._client.ask(_SECONDS, lambda store: store.set(f"{self._entry(self._number)}/withdrawn", "1"))
            self._client = None

    def _write(self, store: Store) -> None:
        store.set(_ANY, "1")
        number = store.add(f"{self._prefix}/count", 1)
        store.set(f"{self._entry(number)}/ranks", ",".join(map(str, self._ranks)))
        self._number = number

    def _entry(self, number: int) -> str:
        return f"{self._prefix}/{number}"

    def _look(self, store: Store, others: list[list[int]]) -> None:
        """Each writes its entry before it reads the others': of two that come at once, at least one sees the other."""
        for number in range(1, store.add(f"{self._prefix}/count", 0) + 1):
            entry = self._entry(number)
            if number == self._number or not store.check([f"{entry}/ranks"]):
                continue
            if not store.check([f"{entry}/withdrawn"]):
                others.append([int(rank) for rank in store.get(f"{entry}/ranks").decode().split(",")])


def _job_rank_and_size() -> tuple[int, int] | None:
    if "torch.distributed" not in sys.modules:
        return None
    from distplb.comm.job import job_rank_and_size

    return job_rank_and_size()
