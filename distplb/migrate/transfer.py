"""`Transfer`: carries out a schedule. It stages each commit, waits until all ranks agree, and writes it in place.

No rank writes any of a commit until all ranks have staged it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from distplb.comm.agreement import agree
from distplb.comm.base import Comm
from distplb.core.placement import Placement
from distplb.errors import DistplbError, HalfMovedError, LostRanksError, in_stage
from distplb.migrate.layout import Layout
from distplb.migrate.messages import MessagePlanner
from distplb.migrate.optimizer_state import Traveller
from distplb.migrate.schedule import SlotMove, commits
from distplb.migrate.staging import KEPT_BYTES, CommitStaging, StagingMemory

__all__ = ["Limits", "MoveTotals", "Transfer", "TravellingLayer"]

_STAGING_BYTES = KEPT_BYTES  # per commit and rank, so that the memory that is kept is enough
_OPERATIONS = 32  # per round and rank
_LARGE_BYTES = 1 << 18  # from this size, packing a copy would take longer than a message of its own

TravellingLayer = tuple[Sequence[Layout], Sequence[Traveller]]  # layouts of its declared tensors; what travels


class Limits(NamedTuple):
    """How much of a change of placement to make at once; at least one commit is made."""

    commits: int  # at most
    bytes: int  # staged per commit and rank; more if the smallest exchange needs more
    seconds: float  # no further commit begins once they are over on any rank


class MoveTotals(NamedTuple):
    """What was moved."""

    slots: int = 0  # slots that received another expert, over all layers
    bytes_inside: int = 0  # bytes sent between ranks of a node, over all ranks
    bytes_between: int = 0  # bytes sent between nodes
    commits: int = 0

    def plus(self, more: MoveTotals) -> MoveTotals:
        """The sum of both."""
        return MoveTotals(*(one + other for one, other in zip(self, more, strict=True)))


class Transfer:
    """A change of placement that is ready to run: scheduled, with its staging memory allocated.

    The constructor is local to the rank; running is collective. A lack of memory shows in the constructor, before the
    ranks agree to run.

    Args:
        old: the placement in force; without replicas.
        new: the placement to reach, of the same shape; without replicas.
        layers: by layer, the layouts, and what travels on this rank.
        comm: the ranks that hold the tensors.
        node_of_rank: node of each rank of the communicator, to count bytes inside nodes and between them.
        memory: the memory to stage in, kept from transfer to transfer.
        limits: how much of the change to make; all of it where None.
        num_groups: number of routing groups, which stay in blocks after every commit; None without groups.

    Attributes:
        layers: indices of the layers in which slots receive another expert.
        placement: the placement in force; every commit changes it.
    """

    def __init__(
        self,
        old: Placement,
        new: Placement,
        layers: Sequence[TravellingLayer],
        comm: Comm,
        node_of_rank: Sequence[int],
        memory: StagingMemory,
        limits: Limits | None = None,
        num_groups: int | None = None,
    ) -> None:
        self.placement, self._comm, self._limits = old, comm, limits
        travellers = [traveller for _, of_layer in layers for traveller in of_layer]
        row_bytes = _row_bytes(layers, old.slots_per_gpu)
        budget = _default_budget(*row_bytes) if limits is None else limits.bytes
        max_commits = None if limits is None else limits.commits
        self._commits = commits(old, new, *row_bytes, budget, max_commits, num_groups)
        self.layers = {move.layer for moves in self._commits for move in moves}
        item_bytes = [traveller.dtype.itemsize for traveller in travellers]
        planner = MessagePlanner(_numbered(layers), item_bytes, comm.rank, node_of_rank, _OPERATIONS, _LARGE_BYTES)
        self._rank_commits = [planner.commit(moves) for moves in self._commits]
        self._staging = CommitStaging(travellers, self._rank_commits, comm, memory)

    def run(self, on_commit: Callable[[Placement], None]) -> MoveTotals:
        """Move experts and everything that travels with them to their new slots, commit by commit.

        Args:
            on_commit: called with the placement in force after each commit, before the next begins.

        Returns:
            What was moved: everything scheduled, unless time ran out.

        Raises:
            DistplbError: if a commit could not be staged; it and all later ones are not made.
            HalfMovedError: if a commit could not be written, or ranks were lost after the first one was staged; the
                model is then no longer whole.
        """
        totals = MoveTotals()
        error: Exception | None = None
        ends = time.monotonic() + self._limits.seconds if self._limits is not None else None
        for number, (moves, commit) in enumerate(zip(self._commits, self._rank_commits, strict=True)):
            try:
                self._staging.pack(commit)
            except Exception as caught:
                error = error or in_stage("move", caught)
            try:
                # Even if something failed here: the other ranks wait for this rank's part before they agree.
                self._staging.exchange(commit)
            except LostRanksError as lost:
                if not number:  # no rank writes before this one agrees
                    raise
                raise _half_moved(number, lost) from lost
            except Exception as caught:
                error = error or in_stage("move", caught)
            is_time_left = self._agree_on(number, error, ends is None or time.monotonic() < ends)
            try:
                self._staging.write(commit)
                self.placement = _after(self.placement, moves)
                totals = totals.plus(MoveTotals(len(moves), *commit.crossing, 1))
                on_commit(self.placement)
            except Exception as caught:
                error = HalfMovedError(f"in stage move: commit {number} was not fully written: {caught!r}")
            if not is_time_left:
                break
        self._agree_on(totals.commits, error, False)
        return totals

    def _agree_on(self, number: int, error: Exception | None, is_time_left: bool) -> bool:
        """Agree that this commit is staged; return whether all ranks have time for another one."""
        try:
            (all_have_time,) = agree(
                self._comm, {"the number of the commit": number}, error, minimum=[int(is_time_left)]
            )
        except DistplbError as refused:
            if isinstance(refused, LostRanksError) and (number or error is None):
                raise _half_moved(number, refused) from refused
            raise  # if this rank failed before it agreed, no rank has written the first commit
        except Exception as lost:
            raise _half_moved(number, lost) from lost
        return bool(all_have_time)


def _half_moved(number: int, why: Exception) -> HalfMovedError:
    """Build the error for a failed agreement, after which no rank knows whether the others went on to write."""
    if isinstance(why, LostRanksError):
        why.stage = "move"
    return HalfMovedError(f"the ranks could not agree on commit {number}: {why}")


def _after(placement: Placement, moves: Sequence[SlotMove]) -> Placement:
    """The placement in force once a commit is written."""
    table = placement.expert_of_slot.clone()
    layers, targets, sources = torch.tensor([(move.layer, move.target, move.source) for move in moves], device="cpu").T
    table[layers, targets] = placement.expert_of_slot[layers, sources]
    return Placement(table, placement.num_experts, placement.num_gpus)


def _numbered(layers: Sequence[TravellingLayer]) -> list[list[tuple[int, Layout]]]:
    """By layer, the index of each tensor that travels, counted over all layers, and its layout."""
    number, by_layer = 0, []
    for layouts, travellers in layers:
        by_layer.append([(number + i, layouts[traveller.index]) for i, traveller in enumerate(travellers)])
        number += len(travellers)
    return by_layer


def _row_bytes(layers: Sequence[TravellingLayer], slots_per_gpu: int) -> tuple[list[int], list[int]]:
    """By layer, the bytes of one slot's rows that only ranks of its GPU stage, and those that any rank may stage."""
    own, every = [], []
    for layouts, travellers in layers:
        sizes = {True: 0, False: 0}
        for traveller in travellers:
            layout = layouts[traveller.index]
            sizes[layout.is_by_gpu(slots_per_gpu)] += layout.max_row * traveller.dtype.itemsize
        own.append(sizes[True])
        every.append(sizes[False])
    return own, every


def _default_budget(own: Sequence[int], every: Sequence[int]) -> int:
    """Bytes staged on a rank in one commit: 256 MiB, or more if a swap of two of the largest experts needs it."""
    largest = max((one + other for one, other in zip(own, every, strict=True)), default=0)
    return max(_STAGING_BYTES, 2 * largest)
