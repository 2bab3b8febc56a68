"""Which communicators of the job move which layers, by name: no two may move the same layers.

EP groups that hold copies of the same experts average their gradients. If each group planned and moved on its
own, they would average different experts.
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
_SECONDS = 30.0  # for the job's store to answer


class Roster:
    """The entry of one communicator for its layers. Creating it is collective; rank 0 writes and reads.

    Args:
        comm: the ranks that move these layers together.
        names: names of the layers, unique in the model.
    """

    def __init__(self, comm: Comm, names: Sequence[str]) -> None:
        self._client: StoreClient | None = None
        self._names, self._is_root = sorted(names), comm.rank == 0
        self._prefix = digest(self._names)  # of the keys of every communicator with layers of these names
        self._number, self._ranks = 0, list[int]()
        job = _job_rank_and_size()
        if job is None or comm.size == job[1] or not names:  # no other communicator has these layers
            return
        ranks = torch.zeros(comm.size, dtype=torch.int64, device=comm.device)
        ranks[comm.rank] = job[0]
        comm.all_reduce_sum(ranks)
        self._ranks = ranks.tolist()

    def enter(self) -> None:
        """On rank 0, write the entry and read the others'.

        Raises:
            DistplbError: if the store does not answer, or as for `refuse_others`.
        """
        if not self._is_root or not self._ranks:
            return
        self._client = StoreClient(job_store("layers"))
        if not self._client.ask(_SECONDS, self._write):
            raise DistplbError(f"the job's store did not answer in {_SECONDS:g} s; check that its host is up")
        self.refuse_others()

    def refuse_others(self) -> None:
        """On rank 0, refuse other ranks that hold layers of the same names and move them on their own.

        Raises:
            DistplbError: if there are any; names them and says what to pass.
        """
        others: list[list[int]] = []
        # If the store no longer answers, its host is lost, which the next collective reports better.
        if self._client is None or not self._client.ask(_SECONDS, lambda store: self._look(store, others)):
            return
        for ranks in others:
            if not set(ranks) & set(self._ranks):  # else it is an earlier entry of these ranks
                raise DistplbError(
                    f"ranks {self._ranks} and ranks {ranks} each have their own communicator for layers of the same "
                    f"names ({self._names[0]}, ...). If they hold copies of the same experts, these would be placed "
                    "differently and then averaged: pass one communicator of all these ranks, such as "
                    "comm=TorchComm(group_of_all) or GridComm(TorchComm(mesh['ep']), TorchComm(mesh['edp'])), and "
                    "gpu=, this rank's index in its EP group. If the layers are different, as in two stages of a "
                    "pipeline, give them the names that they have in the whole model"
                )

    def warn_if_nobody_has_layers(self) -> None:
        """Warn on the job's rank 0, which has no layers, that no rank has any: the rebalancer will never do anything.

        Called once all ranks train. A pipeline stage without MoE layers has none either, while other stages do.
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
                "distplb: the Rebalancer was given no layers on any rank and moves nothing; pass the model's MoE "
                "layers, as the integrations or the README's first snippet describe them",
                RuntimeWarning,
                stacklevel=4,
            )

    def withdraw(self) -> None:
        """Mark the entry as withdrawn: these ranks no longer move the layers."""
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
        """Read the others' entries; each writes its own first, so of two at once at least one sees the other."""
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
