"""Acts on a schedule: stages each commit, has all ranks agree, and writes it in place.

Nothing is half moved: until all ranks have staged a commit, nobody has written any of it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from distplb.comm.agreement import agree
from distplb.comm.base import Comm
from distplb.core.placement import Placement
from distplb.errors import DistplbError, HalfMovedError, LostRanksError, in_stage
from distplb.migrate.messages import Copy, Messages, RankStep
from distplb.migrate.pieces import Layout, Part, joined
from distplb.migrate.routes import peers
from distplb.migrate.rows import RowTensor
from distplb.migrate.schedule import SlotMove, commits
from distplb.migrate.state import Traveller

__all__ = ["Limits", "Move", "Moved", "Staging", "agreed_layouts"]

_STAGING_BYTES = 256 << 20
_OPERATIONS = 32  # in one round, on one rank
_LARGE_BYTES = 1 << 18  # of a copy that is a message of its own: packing it would take longer than a message more

LayerTensors = tuple[Sequence[RowTensor], Sequence[Layout], Sequence[Traveller]]


def agreed_layouts(layers: Sequence[Sequence[RowTensor]], num_slots: int, comm: Comm) -> list[list[Layout]]:
    """By layer, the layout of each declared tensor: every rank tells the others which parts it holds.

    Two all-reduces: of the largest number of parts, and of [tensors, ranks, parts, 4] integers. Then each rank connects
    to those that it may exchange experts with, so that no move has to.

    Raises:
        DistplbError: if the ranks together do not hold a tensor whole.
    """
    flat = [tensor for layer in layers for tensor in layer]
    own = [tensor.parts for tensor in flat]
    most = torch.tensor([-max((len(parts) for parts in own), default=0)], device=comm.device)
    comm.all_reduce_min(most)
    table = torch.zeros(len(flat), comm.size, -int(most), 4, dtype=torch.int64, device="cpu")
    for number, parts in enumerate(own):
        for place, part in enumerate(parts):
            table[number, comm.rank, place] = torch.tensor([part.start, part.stop, part.low, part.high], device="cpu")
    table = table.to(comm.device)
    comm.all_reduce_sum(table)
    shared: dict[tuple[int, bytes], Layout] = {}  # equal layouts are one object, whose pieces are made once
    found = []
    for tensor, ranks in zip(flat, table.cpu(), strict=True):
        key = tensor.row, ranks.numpy().tobytes()
        if key not in shared:
            held = tuple(joined(Part(*part) for part in parts) for parts in ranks.tolist())
            try:
                shared[key] = Layout(tensor.row, num_slots, held)
            except DistplbError as error:
                raise DistplbError(f"{tensor.name}: {error}") from error
        found.append(shared[key])
    comm.connect(peers(found, comm.rank))
    following = iter(found)
    return [[next(following) for _ in layer] for layer in layers]


class Limits(NamedTuple):
    """How much of a change of placement is made at once; at least one commit of it is."""

    commits: int  # at most
    bytes: int  # staged on a rank in one of them; more where the smallest exchange takes more
    seconds: float  # after which no further one begins: when the first rank's time is over


class Moved(NamedTuple):
    """What was done."""

    slots: int = 0  # that received another expert, over all layers
    bytes_inside: int = 0  # that crossed from rank to rank of a node, over all ranks
    bytes_between: int = 0  # that crossed from node to node
    commits: int = 0

    def plus(self, more: Moved) -> Moved:
        """Both together."""
        return Moved(*(one + other for one, other in zip(self, more, strict=True)))


class Staging:
    """Memory to stage in. The host's is kept from move to move: its first touch takes longer than a fast link.

    Torch keeps a GPU's by itself, and gives it to others meanwhile.
    """

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}

    def room(self, name: str, size: int, device: torch.device) -> Tensor:
        """`[size]` uint8, of any content; `name` tells apart what is needed at once."""
        if device.type != "cpu":
            return torch.empty(size, dtype=torch.uint8, device=device)
        kept = self._kept.pop(name, None)
        if kept is None or kept.numel() < size:
            del kept  # before there is more
            # Pages that are not touched take no memory: moves of other sizes go on in those that have been.
            kept = torch.empty(max(size, _STAGING_BYTES) if size else 0, dtype=torch.uint8, device="cpu")
        self._kept[name] = kept
        return kept[:size]


class Move:
    """A change of placement made ready: scheduled, and holding the memory that its staging takes.

    Making one is local to the rank; running it is collective. What can fail for want of memory fails while it is
    made, before the ranks agree to run it.

    Args:
        old: the placement in force.
        new: of the same shape; neither with replicas.
        layers: by layer, the declared tensors, their layouts, and what travels with them on this rank.
        comm: the ranks that hold the tensors.
        node_of_rank: of the communicator; by what crosses between them is told apart. All are of one where None.
        limits: to do the beginning of it only; all of it where None.
        staging: memory that was staged in before; its own where None.
        num_groups: of a router whose groups stay in blocks, so that every commit keeps them; None where it has none.

    Attributes:
        layers: indices of those in which slots receive another expert.
        placement: in force; after each commit another one.
    """

    def __init__(
        self,
        old: Placement,
        new: Placement,
        layers: Sequence[LayerTensors],
        comm: Comm,
        node_of_rank: Sequence[int] | None = None,
        limits: Limits | None = None,
        staging: Staging | None = None,
        num_groups: int | None = None,
    ) -> None:
        self.placement, self._comm, self._limits = old, comm, limits
        staging = Staging() if staging is None else staging
        self._travelling = [traveller for _, _, travelling in layers for traveller in travelling]
        self._sizes = [traveller.dtype.itemsize for traveller in self._travelling]
        self._devices = [each.flats[0].device if each.flats else comm.device for each in self._travelling]
        row_bytes = _row_bytes(layers, old.slots_per_gpu)
        budget = _budget(*row_bytes) if limits is None else limits.bytes
        most = None if limits is None else limits.commits
        self._commits = commits(old, new, *row_bytes, budget, most, num_groups)
        self.layers = {move.layer for moves in self._commits for move in moves}
        nodes = [0] * comm.size if node_of_rank is None else node_of_rank
        messages = Messages(_numbered(layers), self._sizes, comm.rank, nodes, _OPERATIONS, _LARGE_BYTES)
        self._steps = [messages.step(moves) for moves in self._commits]
        outgoing = self._most(_all(self._packed(step)) for step in self._steps)
        self._outgoing = staging.room("outgoing", outgoing, comm.device)
        # What arrives in a commit lies together, from this rank and from others, so that both are within the budget;
        # but for a GPU's rows where the communicator wants its buffers on the host.
        own = next((flat.device for each in self._travelling for flat in each.flats), comm.device)
        self._inside: Tensor | None = None
        if own != comm.device:
            self._inside = staging.room("inside", self._most(step.local for step in self._steps), own)
        local = [step.local if self._inside is None else [] for step in self._steps]
        arriving = (some + _received(step) for some, step in zip(local, self._steps, strict=True))
        self._arriving = staging.room("arriving", self._most(arriving), comm.device)

    def run(self, on_commit: Callable[[Placement], None]) -> Moved:
        """Bring experts and all that travels with them to their new slots, commit by commit.

        Args:
            on_commit: told the placement in force after each commit, before the next begins.

        Returns:
            What was done: all that was made ready, unless the time was over before.

        Raises:
            DistplbError: if a commit could not be staged: it and those after it did not happen.
            HalfMovedError: if one could not be written, or ranks were lost after the first had been staged: the
                model is not whole any more.
        """
        done = Moved()
        error: Exception | None = None
        ends = time.monotonic() + self._limits.seconds if self._limits is not None else None
        for number, (moves, step) in enumerate(zip(self._commits, self._steps, strict=True)):
            try:
                self._pack(step)
            except Exception as caught:
                error = error or in_stage("move", caught)
            try:
                # Also when something has failed here: the others wait for this rank's part before they agree.
                self._exchange(step)
            except LostRanksError as lost:
                if not number:  # no rank writes before this one agrees
                    raise
                raise _half_moved(number, lost) from lost
            except Exception as caught:
                error = error or in_stage("move", caught)
            is_time_left = self._agree_on(number, error, ends is None or time.monotonic() < ends)
            try:
                for copy, data in self._staged(step):
                    self._bytes(copy.tensor, copy.target_offset, copy.count).copy_(data)
                self.placement = _after(self.placement, moves)
                done = done.plus(Moved(len(moves), *step.crossing, 1))
                on_commit(self.placement)
            except Exception as caught:
                error = HalfMovedError(f"in stage move: commit {number} was not written whole: {caught!r}")
            if not is_time_left:
                break
        self._agree_on(done.commits, error, False)
        return done

    def _pack(self, step: RankStep) -> None:
        """Read what this rank gives, to itself and to others, before anything is written."""
        sent = self._laid_out(_all(self._packed(step)), self._outgoing)
        for copy, place in chain(self._laid_out(step.local, self._rooms(step)[0]), sent):
            place.copy_(self._source(copy))

    def _exchange(self, step: RankStep) -> None:
        rank, packed, (_, room) = self._comm.rank, self._outgoing, self._rooms(step)
        sends: dict[int, deque[Tensor]] = {target: deque() for target in step.sends}
        for target, message in _each(step.sends):
            if self._goes_as_it_is(message):
                sends[target].append(self._source(message[0]))
            else:
                sends[target].append(packed[: self._total(message)])
                packed = packed[self._total(message) :]
        receives: dict[int, deque[Tensor]] = {source: deque() for source in step.receives}
        for source, message in _each(step.receives):
            receives[source].append(room[: self._total(message)])
            room = room[self._total(message) :]
        self._comm.exchange(
            [
                (
                    [(sends[target].popleft(), target) for source, target in ways if source == rank],
                    [(receives[source].popleft(), source) for source, target in ways if target == rank],
                )
                for ways in step.rounds
            ]
        )

    def _staged(self, step: RankStep) -> Iterator[tuple[Copy, Tensor]]:
        """Each copy into this rank, with its bytes."""
        inside, room = self._rooms(step)
        return chain(self._laid_out(step.local, inside), self._laid_out(_received(step), room))

    def _rooms(self, step: RankStep) -> tuple[Tensor, Tensor]:
        """Where copies inside this rank are staged, and those from others."""
        if self._inside is not None:
            return self._inside, self._arriving
        local = self._total(step.local)
        return self._arriving[:local], self._arriving[local:]

    def _packed(self, step: RankStep) -> list[list[Copy]]:
        """The messages that are put together before they are sent."""
        return [message for _, message in _each(step.sends) if not self._goes_as_it_is(message)]

    def _goes_as_it_is(self, message: Sequence[Copy]) -> bool:
        """Whether it is one range of memory that the communicator can read; until all have it, nobody writes there."""
        return len(message) == 1 and self._devices[message[0].tensor] == self._comm.device

    def _source(self, copy: Copy) -> Tensor:
        return self._bytes(copy.tensor, copy.source_offset, copy.count)

    def _agree_on(self, number: int, error: Exception | None, is_time_left: bool) -> bool:
        """Whether all ranks have time for another commit after this one."""
        try:
            (all_have_time,) = agree(self._comm, {"the number of the commit": number}, error, minimum=[is_time_left])
        except DistplbError as refused:
            if isinstance(refused, LostRanksError) and (number or error is None):
                raise _half_moved(number, refused) from refused
            raise  # where this rank has failed before it agreed, nobody has written the first commit
        except Exception as lost:
            raise _half_moved(number, lost) from lost
        return bool(all_have_time)

    def _laid_out(self, some: Sequence[Copy], buffer: Tensor) -> Iterator[tuple[Copy, Tensor]]:
        """Each copy with its part of the buffer, one behind the other."""
        start = 0
        for copy in some:
            yield copy, buffer[start : start + self._size(copy)]
            start += self._size(copy)

    def _most(self, steps: Iterator[list[Copy]]) -> int:
        """Bytes of the largest of the steps."""
        return max((self._total(some) for some in steps), default=0)

    def _bytes(self, tensor: int, offset: int, count: int) -> Tensor:
        """A view of some elements of a tensor as bytes."""
        return self._travelling[tensor].at(offset, count).view(torch.uint8)

    def _total(self, some: Sequence[Copy]) -> int:
        return sum(self._size(copy) for copy in some)

    def _size(self, copy: Copy) -> int:
        return copy.count * self._sizes[copy.tensor]


def _half_moved(number: int, why: Exception) -> HalfMovedError:
    """Without an answer nobody knows whether the others went on to write."""
    if isinstance(why, LostRanksError):
        why.stage = "move"
    return HalfMovedError(f"the ranks could not agree on commit {number}: {why}")


def _each(messages: Mapping[int, Sequence[list[Copy]]]) -> Iterator[tuple[int, list[Copy]]]:
    """Each message, and the rank at its other end."""
    return ((rank, message) for rank, some in messages.items() for message in some)


def _all(messages: Iterable[list[Copy]]) -> list[Copy]:
    return [copy for message in messages for copy in message]


def _received(step: RankStep) -> list[Copy]:
    return _all(chain(*step.receives.values()))


def _after(placement: Placement, moves: Sequence[SlotMove]) -> Placement:
    """The placement in force once a commit is written."""
    table = placement.expert_of_slot.clone()
    layers, targets, sources = torch.tensor([(move.layer, move.target, move.source) for move in moves], device="cpu").T
    table[layers, targets] = placement.expert_of_slot[layers, sources]
    return Placement(table, placement.num_experts, placement.num_gpus)


def _numbered(layers: Sequence[LayerTensors]) -> list[list[tuple[int, Layout]]]:
    """By layer, the number of each tensor that travels, counted over all layers, and its layout."""
    number, found = 0, []
    for _, layouts, travelling in layers:
        found.append([(number + i, layouts[traveller.of]) for i, traveller in enumerate(travelling)])
        number += len(travelling)
    return found


def _row_bytes(layers: Sequence[LayerTensors], slots_per_gpu: int) -> tuple[list[int], list[int]]:
    """By layer, the bytes of one slot's rows that a rank of its own GPU stages, and those that any rank may stage."""
    own, every = [], []
    for _, layouts, travelling in layers:
        sizes = {True: 0, False: 0}
        for traveller in travelling:
            layout = layouts[traveller.of]
            sizes[layout.is_by_gpu(slots_per_gpu)] += layout.most * traveller.dtype.itemsize
        own.append(sizes[True])
        every.append(sizes[False])
    return own, every


def _budget(own: Sequence[int], every: Sequence[int]) -> int:
    """Bytes staged on a rank in one commit: 256 MiB, or a swap of two of the largest experts."""
    largest = max((one + other for one, other in zip(own, every, strict=True)), default=0)
    return max(_STAGING_BYTES, 2 * largest)
