"""`Transfer`: acts on a schedule. It stages each commit, has all ranks agree, and writes it in place.

Nothing is half moved: until all ranks have staged a commit, nobody has written any of it.
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

_STAGING_BYTES = KEPT_BYTES  # in one commit on one rank, so that the memory that is kept is enough
_OPERATIONS = 32  # in one round, on one rank
_LARGE_BYTES = 1 << 18  # of a copy that is a message of its own: packing it would take longer than another message

TravellingLayer = tuple[Sequence[Layout], Sequence[Traveller]]  # of its declared tensors; all that travels with these


class Limits(NamedTuple):
    """How much of a change of placement is made at once; at least one commit of it is."""

    commits: int  # at most
    bytes: int  # staged on a rank in one of them; more where the smallest exchange takes more
    seconds: float  # after which no further one begins: when the first rank's time is over


class MoveTotals(NamedTuple):
    """What was moved."""

    slots: int = 0  # that received another expert, over all layers
    bytes_inside: int = 0  # that crossed from rank to rank of a node, over all ranks
    bytes_between: int = 0  # that crossed from node to node
    commits: int = 0

    def plus(self, more: MoveTotals) -> MoveTotals:
        """Both together."""
        return MoveTotals(*(one + other for one, other in zip(self, more, strict=True)))


class Transfer:
    """A change of placement that is ready to run: scheduled, with the memory that its staging takes.

    Making one is local to the rank; running it is collective. What can fail for want of memory fails while it is
    made, before the ranks agree to run it.

    Args:
        old: the placement in force.
        new: of the same shape; neither with replicas.
        layers: layouts, and what travels on this rank.
        comm: the ranks that hold the tensors.
        node_of_rank: of the communicator, to count bytes inside nodes and between them.
        memory: to stage in, kept from transfer to transfer.
        limits: to do the beginning of it only; all of it where None.
        num_groups: of a router whose groups stay in blocks, so that every commit keeps them; None where it has none.

    Attributes:
        layers: indices of those in which slots receive another expert.
        placement: in force; after each commit another one.
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
        """Bring experts and all that travels with them to their new slots, commit by commit.

        Args:
            on_commit: called with the placement in force after each commit, before the next begins.

        Returns:
            What was moved: all that is scheduled, unless the time was over before.

        Raises:
            DistplbError: if a commit could not be staged: it and those after it did not happen.
            HalfMovedError: if one could not be written, or ranks were lost after the first had been staged: the
                model is not whole any more.
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
                # Also when something has failed here: the others wait for this rank's part before they agree.
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
                error = HalfMovedError(f"in stage move: commit {number} was not written whole: {caught!r}")
            if not is_time_left:
                break
        self._agree_on(totals.commits, error, False)
        return totals

    def _agree_on(self, number: int, error: Exception | None, is_time_left: bool) -> bool:
        """Whether all ranks have time for another commit after this one."""
        try:
            (all_have_time,) = agree(
                self._comm, {"the number of the commit": number}, error, minimum=[int(is_time_left)]
            )
        except DistplbError as refused:
            if isinstance(refused, LostRanksError) and (number or error is None):
                raise _half_moved(number, refused) from refused
            raise  # where this rank has failed before it agreed, nobody has written the first commit
        except Exception as lost:
            raise _half_moved(number, lost) from lost
        return bool(all_have_time)


def _half_moved(number: int, why: Exception) -> HalfMovedError:
    """Without an answer no rank knows whether the others went on to write."""
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
    """By layer, the number of each tensor that travels, counted over all layers, and its layout."""
    number, by_layer = 0, []
    for layouts, travellers in layers:
        by_layer.append([(number + i, layouts[traveller.index]) for i, traveller in enumerate(travellers)])
        number += len(travellers)
    return by_layer


def _row_bytes(layers: Sequence[TravellingLayer], slots_per_gpu: int) -> tuple[list[int], list[int]]:
    """By layer, the bytes of one slot's rows that a rank of its own GPU stages, and those that any rank may stage."""
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
    """Bytes staged on a rank in one commit: 256 MiB, or a swap of two of the largest experts."""
    largest = max((one + other for one, other in zip(own, every, strict=True)), default=0)
    return max(_STAGING_BYTES, 2 * largest)
